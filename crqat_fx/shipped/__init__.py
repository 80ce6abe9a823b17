"""The trained full-precision models of the drawn task that travel with the package, by name wherever a model file is asked for."""

from pathlib import Path

SHIPPED = ("pico-v1", "pico-v2")


def locate(model: str | Path) -> Path:
    """The path of a model: a shipped one by its name, unless a file of that name is there; anything else is a path already."""
    path = Path(model)
    if str(model) in SHIPPED and not path.exists():
        return Path(__file__).parent / f"{model}.pt"
    return path

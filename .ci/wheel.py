"""Builds the wheel, imports it alone from another directory, and runs an exported file where it is installed without torch."""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import crqat_fx, passes.fx
for module in (crqat_fx, passes):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__name__} came from {module.__file__}"
model, checkpoint = crqat_fx.load("pico-v2")
print("imported", crqat_fx.__version__, "with a shipped model of", sum(p.numel() for p in model.parameters()), "parameters")
"""

WITHOUT_TORCH = """
import importlib.util
assert importlib.util.find_spec("torch") is None, "the extra runtime brings torch"
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out / "dist"), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = (out / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "site")
        subprocess.run([sys.executable, "-c", CHECK, str(out / "site")], check=True, cwd=out)
        run_without_torch(wheel, out)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")


def run_without_torch(wheel: Path, folder: Path) -> None:
    """Installs the wheel with the extra `runtime` alone, and detects and evaluates with a file that is exported here."""

    def run(python: str | Path, *arguments: str | Path) -> None:
        subprocess.run([python, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL)

    run(sys.executable, "-m", "crqat_fx", "export", "pico-v2", "--out", "model.onnx")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[runtime]")
    run(python, "-c", WITHOUT_TORCH)
    run(python, "-m", "crqat_fx", "shapes", "--out", "drawn", "--train", "0", "--calibration", "0", "--val", "2", "--workers", "0")
    run(python, "-m", "crqat_fx", "detect", "model.onnx", "drawn/val", "--out", "found")
    run(python, "-m", "crqat_fx", "evaluate", "model.onnx", "--data", "drawn/data.yaml")
    run(python, ROOT / "examples" / "run_onnx.py", "model.onnx", "drawn/val/000000.png")


if __name__ == "__main__":
    main()

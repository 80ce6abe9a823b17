"""Who may import whom: the layers of the README's file map, held by reading every import with `ast`."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"crqat_fx.errors", "crqat_fx.files", "crqat_fx.progress"}
PIXELS = {*GROUND, "numpy", "cv2"}
TENSORS = {*GROUND, "torch", "numpy"}

# a module or package -> what it may import besides the standard library and itself; the longest name that fits decides
LAYERS: dict[str, set[str]] = {
    # 0
    "passes.base": set(),
    "passes.spec": set(),
    "crqat_fx.errors": set(),
    "crqat_fx.progress": set(),
    "crqat_fx.files": GROUND,
    "crqat_fx.settings": {*GROUND, "yaml"},
    # 1
    "passes.fx": {"passes.base", "passes.spec", "torch"},
    # 2, without torch: what runs an exported model needs them
    "crqat_fx.vocabulary": {*GROUND, "numpy"},
    "crqat_fx.headers": set(),
    "crqat_fx.pictures": {*PIXELS, "crqat_fx.headers"},
    "crqat_fx.detections": {*PIXELS, "crqat_fx.pictures"},
    "crqat_fx.draw": {*PIXELS, "crqat_fx.detections"},
    # 2
    "crqat_fx.models": TENSORS,
    "crqat_fx.models.text": {
        *TENSORS,
        "crqat_fx.vocabulary",
        "crqat_fx.checkpoint",
        "crqat_fx.unpickle",
        "transformers",
        "huggingface_hub",
        "safetensors",
    },
    "crqat_fx.shipped": set(),
    "crqat_fx.checkpoint": {
        *TENSORS,
        "crqat_fx.models",
        "crqat_fx.vocabulary",
        "crqat_fx.unpickle",
        "crqat_fx.shipped",
        "crqat_fx.data.shapes",
    },
    "crqat_fx.unpickle": TENSORS,
    "crqat_fx.data": {*TENSORS, "cv2", "yaml", "crqat_fx.vocabulary", "crqat_fx.pictures", "crqat_fx.settings"},
    "crqat_fx.assign": {*TENSORS, "crqat_fx.models", "crqat_fx.data.samples"},
    "crqat_fx.losses": {*TENSORS, "crqat_fx.models", "crqat_fx.data.samples", "crqat_fx.assign"},
    "crqat_fx.recipe": {*GROUND, "passes.spec", "yaml"},
    # 3: the one package that imports torch.ao
    "crqat_fx.quantize": {
        *TENSORS,
        "passes",
        "crqat_fx.models",
        "crqat_fx.recipe",
        "crqat_fx.trace",
        "crqat_fx.pipelines",
        "crqat_fx.vocabulary",
        "crqat_fx.checkpoint",
        "crqat_fx.unpickle",
        "crqat_fx.pictures",
    },
    "crqat_fx.trace": {*GROUND, "torch", "crqat_fx.models", "passes"},
    "crqat_fx.pipelines": {*TENSORS, "passes", "crqat_fx.models", "crqat_fx.recipe", "crqat_fx.trace"},
    "crqat_fx.cost": {*TENSORS, "passes", "crqat_fx.models", "crqat_fx.recipe", "crqat_fx.pipelines", "crqat_fx.trace"},
}
APPLICATIONS = {
    "detect",
    "evaluate",
    "distortion",
    "plots",
    "train",
    "pretrain",
    "ema",
    "runlog",
    "inspection",
    "graph_picture",
    "console",
    "demo",
}
ENTRANCES = {"crqat_fx", "crqat_fx.__main__", "crqat_fx.cli"}
FOR_EVERYTHING = {"crqat_fx", "passes", "torch", "numpy", "cv2", "rich", "matplotlib", "tensorboardX", "faster_coco_eval"}


def modules() -> dict[str, Path]:
    files = [path for top in ("passes", "crqat_fx") for path in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: line {node.lineno}: imports are absolute"
            found.add(node.module or "")
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


@pytest.mark.parametrize("module", modules())
def test_imports_stay_within_the_layer(module):
    if module in ENTRANCES:
        return
    layer = max((name for name in LAYERS if within(module, {name})), key=len, default=None)
    if layer is None:
        package, _, name = module.partition(".")
        assert (package == "passes" and not name) or name in APPLICATIONS, f"{module} has no layer: give it one in this table"
        allowed = FOR_EVERYTHING
    else:
        allowed = LAYERS[layer] | {layer}
    assert "crqat_fx.cli" not in imports(modules()[module])
    assert not {name for name in imports(modules()[module]) if not within(name, allowed)}


def test_torch_ao_is_imported_in_one_package_alone():
    users = {module for module, path in modules().items() if any(within(name, {"torch.ao"}) for name in imports(path))}
    assert all(within(module, {"crqat_fx.quantize"}) for module in users)


def test_no_two_modules_import_each_other():
    names = modules()
    graph = {module: (imports(path) & names.keys()) - {module} for module, path in names.items()}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in finished:
            for other in graph[module]:
                visit(other, (*path, module))
            finished.add(module)

    for module in names:
        visit(module, ())

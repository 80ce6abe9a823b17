"""Who may import whom: the layers of the README's file map, held by reading every import with `ast`."""

import ast
import fnmatch
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAP = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are")[1].split("```")[1]
GROUND = {"crqat_fx.__version__", "crqat_fx.errors", "crqat_fx.files", "crqat_fx.progress"}
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
    "crqat_fx.json_form": GROUND,
    # 1
    "passes.fx": {"passes.base", "passes.spec", "torch"},
    "passes.onnx": {"passes.base", "numpy", "ml_dtypes", "onnx", "onnx_ir", "onnxscript"},
    # 2, without torch: what runs an exported file needs them
    "crqat_fx.vocabulary": {*GROUND, "numpy"},
    "crqat_fx.headers": set(),
    "crqat_fx.pictures": {*PIXELS, "crqat_fx.headers"},
    "crqat_fx.detections": {*PIXELS, "crqat_fx.pictures"},
    "crqat_fx.draw": {*PIXELS, "crqat_fx.detections"},
    "crqat_fx.metadata": {*GROUND, "crqat_fx.detections", "crqat_fx.vocabulary"},
    "crqat_fx.processor": {"numpy"},
    "crqat_fx.onnx_session": {*GROUND, "onnxruntime"},
    "crqat_fx.onnx_run": {*GROUND, "numpy", "onnxruntime", "crqat_fx.onnx_session"},
    "crqat_fx.onnx_cuts": {*GROUND, "numpy", "onnx", "onnxruntime", "crqat_fx.onnx_session"},
    "crqat_fx.data": {*PIXELS, "yaml", "crqat_fx.vocabulary", "crqat_fx.pictures", "crqat_fx.settings"},
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
    "crqat_fx.data.batch": {*TENSORS, "crqat_fx.data"},
    "crqat_fx.data.loader": {*TENSORS, "cv2", "crqat_fx.data"},
    "crqat_fx.data.shapes_batches": {*TENSORS, "cv2", "crqat_fx.data"},
    "crqat_fx.data.training": {*TENSORS, "crqat_fx.data", "crqat_fx.vocabulary"},
    "crqat_fx.device": TENSORS,
    "crqat_fx.distributed": TENSORS,
    "crqat_fx.assign": {*TENSORS, "crqat_fx.models", "crqat_fx.data.batch"},
    "crqat_fx.losses": {*TENSORS, "crqat_fx.models", "crqat_fx.data.batch", "crqat_fx.assign", "crqat_fx.distributed"},
    "crqat_fx.distill": {*TENSORS, "crqat_fx.assign", "crqat_fx.distributed"},
    "crqat_fx.recipe": {*GROUND, "passes.spec", "yaml"},
    "crqat_fx.curriculum": GROUND,
    # 3: the one package that imports torch.ao
    "crqat_fx.quantize": {
        *TENSORS,
        "crqat_fx.detections",
        "passes",
        "crqat_fx.models",
        "crqat_fx.recipe",
        "crqat_fx.curriculum",
        "crqat_fx.trace",
        "crqat_fx.pipelines",
        "crqat_fx.vocabulary",
        "crqat_fx.shipped",
        "crqat_fx.checkpoint",
        "crqat_fx.unpickle",
        "crqat_fx.pictures",
    },
    "crqat_fx.trace": {*GROUND, "torch", "crqat_fx.models", "passes"},
    "crqat_fx.pipelines": {*TENSORS, "onnx_ir", "passes", "crqat_fx.models", "crqat_fx.recipe", "crqat_fx.trace"},
    "crqat_fx.cost": {*TENSORS, "passes", "crqat_fx.models", "crqat_fx.recipe", "crqat_fx.pipelines", "crqat_fx.trace"},
    "crqat_fx.lower": {
        *TENSORS,
        "passes",
        "crqat_fx.models",
        "crqat_fx.recipe",
        "crqat_fx.pipelines",
        "crqat_fx.trace",
        "crqat_fx.quantize",
        "crqat_fx.vocabulary",
    },
    "crqat_fx.emission": {*TENSORS, "onnx_ir", "passes", "crqat_fx.models"},
    "crqat_fx.file_ends": {"numpy", "onnx_ir", "passes.onnx", "crqat_fx.detections"},
    # 4, without torch
    "crqat_fx.detect": {*PIXELS, "crqat_fx.detections", "crqat_fx.draw", "crqat_fx.pictures", "crqat_fx.vocabulary"},
    "crqat_fx.onnx_detector": {
        *PIXELS,
        "onnxruntime",
        "crqat_fx.detect",
        "crqat_fx.detections",
        "crqat_fx.metadata",
        "crqat_fx.onnx_session",
        "crqat_fx.pictures",
        "crqat_fx.vocabulary",
    },
    "crqat_fx.evaluate": {*PIXELS, "faster_coco_eval", "crqat_fx.data.samples", "crqat_fx.detect", "crqat_fx.detections"},
    "crqat_fx.onnx_profile": {*GROUND, "google.protobuf", "onnx", "onnxruntime", "crqat_fx.onnx_run", "crqat_fx.onnx_session"},
    "crqat_fx.work": {"crqat_fx.onnx_profile"},
    "crqat_fx.coverage": {*GROUND, "crqat_fx.metadata", "crqat_fx.onnx_profile", "crqat_fx.onnx_run", "crqat_fx.recipe"},
    "crqat_fx.bench": {
        *GROUND,
        "numpy",
        "onnxruntime",
        "crqat_fx.coverage",
        "crqat_fx.onnx_profile",
        "crqat_fx.onnx_run",
        "crqat_fx.onnx_session",
        "crqat_fx.processor",
    },
}
APPLICATIONS = {
    "torch_detector",
    "model_files",
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
    "export",
    "verify",
    "recording",
    "trials",
    "qat",
    "noise",
    "correct_norms",
    "mixed_recipe",
    "sensitivity",
    "graph_layout",
    "graph_page",
    "graph_view",
    "prepared_inspection",
    "findings",
    "run_history",
    "run_study",
    "study",
    "charts",
    "report",
    "report_parts",
    "report_proof",
    "report_reasons",
    "report_results",
    "report_style",
}
ENTRANCES = {"crqat_fx", "crqat_fx.__main__", "crqat_fx.cli"}
FOR_EVERYTHING = {"crqat_fx", "passes", "torch", "numpy", "cv2", "rich", "matplotlib", "tensorboardX", "onnx", "onnx_ir"}
# what these import when they are imported never leads to torch: they run where it is not installed
TORCH_FREE = (
    "crqat_fx.__main__",
    "crqat_fx.cli",
    "crqat_fx.model_files",
    "crqat_fx.detect",
    "crqat_fx.evaluate",
    "crqat_fx.onnx_detector",
    "crqat_fx.data.opening",
    "crqat_fx.bench",
)


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
            found |= {f"crqat_fx.{alias.name}" for alias in node.names} if node.module == "crqat_fx" else {node.module or ""}
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def imports_at_once(path: Path) -> set[str]:
    """Every module that a file imports as it is imported itself: not those that only a function or a type checker asks for."""
    found: set[str] = set()
    rest: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            rest += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        rest += ast.iter_child_nodes(node)
    return found


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


@pytest.mark.parametrize("start", TORCH_FREE)
def test_what_runs_exported_files_never_leads_to_torch(start):
    files = modules()
    way, rest = {start: start}, [start]
    while rest:
        module = rest.pop()
        for name in imports_at_once(files[module]):
            assert not within(name, {"torch"}), f"{way[module]} -> {name}"
            packages = {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)}  # importing a module imports its packages
            for other in ({name} | packages) & files.keys() - way.keys():
                way[other] = f"{way[module]} -> {other}"
                rest.append(other)
    assert len(way) > 3


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


def mapped() -> set[str]:
    """The modules that the README's file map names, some by a pattern: `a.py` in its place, or as a word where its package is told."""
    found, top, package = set(), "", ""
    for line in MAP.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            top = name
        if line[: len("      ")].strip():
            package = f"{top}{name}" if line.startswith(" ") and name.endswith("/") else ""
        found |= {f"{top}{each}" for each in re.findall(r"[\w/*]+\.py", line)}
        found |= {f"{package}{each}.py" for each in re.findall(r"\w+", line)} if package else set()
    return found


def test_the_readmes_map_names_every_module():
    modules = {str(path.relative_to(ROOT)) for top in ("passes", "crqat_fx") for path in (ROOT / top).rglob("*.py")}
    named = mapped()
    told = {each for each in modules if any(fnmatch.fnmatchcase(each, pattern) for pattern in named)}
    assert {each for each in modules - told if not each.endswith("/__init__.py")} == set()

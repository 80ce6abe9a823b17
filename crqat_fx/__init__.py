"""crqat-fx: torch.fx passes that take an open-vocabulary detector from full precision to a 4-bit model that still knows its classes.

The Python API; the command line is thin over it. Names are imported when first used, so that `import crqat_fx` is fast and a detector that
needs no torch imports none.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crqat_fx.bench import BenchSettings, bench
    from crqat_fx.checkpoint import load_model as load
    from crqat_fx.checkpoint import read_checkpoint, write_checkpoint
    from crqat_fx.correct_norms import correct_norms
    from crqat_fx.cost import cost
    from crqat_fx.data.opening import open_evaluation, open_pictures
    from crqat_fx.data.shapes import ShapesSet, ShapesTask
    from crqat_fx.data.shapes_batches import ShapesBatches
    from crqat_fx.detect import detect_pictures
    from crqat_fx.distortion import distortion
    from crqat_fx.errors import UserError
    from crqat_fx.evaluate import evaluate
    from crqat_fx.export import export
    from crqat_fx.findings import closing_table, load_study
    from crqat_fx.models.text import embed
    from crqat_fx.models.yolo_world import build, decode_boxes
    from crqat_fx.onnx_detector import OnnxDetector
    from crqat_fx.pictures import read_picture
    from crqat_fx.qat import QatSettings, train_file, train_prepared
    from crqat_fx.quantize.calibrate import calibrate, picture_batches
    from crqat_fx.quantize.prepare import load_prepared, prepare
    from crqat_fx.recipe import QuantRecipe
    from crqat_fx.report import write_report
    from crqat_fx.run_study import RunStudySettings, study_run
    from crqat_fx.study import Contender, StudySettings, study
    from crqat_fx.torch_detector import TorchDetector
    from crqat_fx.trace import trace
    from crqat_fx.train import TrainSettings, train
    from crqat_fx.verify import verify_file as verify
    from crqat_fx.vocabulary import Vocabulary

__version__ = "0.1.0"

_API = {
    "BenchSettings": "bench.BenchSettings",
    "Contender": "study.Contender",
    "OnnxDetector": "onnx_detector.OnnxDetector",
    "QatSettings": "qat.QatSettings",
    "QuantRecipe": "recipe.QuantRecipe",
    "RunStudySettings": "run_study.RunStudySettings",
    "ShapesBatches": "data.shapes_batches.ShapesBatches",
    "ShapesSet": "data.shapes.ShapesSet",
    "ShapesTask": "data.shapes.ShapesTask",
    "StudySettings": "study.StudySettings",
    "TorchDetector": "torch_detector.TorchDetector",
    "TrainSettings": "train.TrainSettings",
    "UserError": "errors.UserError",
    "Vocabulary": "vocabulary.Vocabulary",
    "bench": "bench.bench",
    "build": "models.yolo_world.build",
    "calibrate": "quantize.calibrate.calibrate",
    "closing_table": "findings.closing_table",
    "correct_norms": "correct_norms.correct_norms",
    "cost": "cost.cost",
    "decode_boxes": "models.yolo_world.decode_boxes",
    "detect_pictures": "detect.detect_pictures",
    "distortion": "distortion.distortion",
    "embed": "models.text.embed",
    "evaluate": "evaluate.evaluate",
    "export": "export.export",
    "load": "checkpoint.load_model",
    "load_prepared": "quantize.prepare.load_prepared",
    "load_study": "findings.load_study",
    "open_evaluation": "data.opening.open_evaluation",
    "open_pictures": "data.opening.open_pictures",
    "picture_batches": "quantize.calibrate.picture_batches",
    "prepare": "quantize.prepare.prepare",
    "read_checkpoint": "checkpoint.read_checkpoint",
    "read_picture": "pictures.read_picture",
    "study": "study.study",
    "study_run": "run_study.study_run",
    "trace": "trace.trace",
    "train": "train.train",
    "train_file": "qat.train_file",
    "train_prepared": "qat.train_prepared",
    "verify": "verify.verify_file",
    "write_checkpoint": "checkpoint.write_checkpoint",
    "write_report": "report.write_report",
}
__all__ = [
    "BenchSettings",
    "Contender",
    "OnnxDetector",
    "QatSettings",
    "QuantRecipe",
    "RunStudySettings",
    "ShapesBatches",
    "ShapesSet",
    "ShapesTask",
    "StudySettings",
    "TorchDetector",
    "TrainSettings",
    "UserError",
    "Vocabulary",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "closing_table",
    "correct_norms",
    "cost",
    "decode_boxes",
    "detect_pictures",
    "distortion",
    "embed",
    "evaluate",
    "export",
    "load",
    "load_prepared",
    "load_study",
    "open_evaluation",
    "open_pictures",
    "picture_batches",
    "prepare",
    "read_checkpoint",
    "read_picture",
    "study",
    "study_run",
    "trace",
    "train",
    "train_file",
    "train_prepared",
    "verify",
    "write_checkpoint",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = f"{__name__}.{_API[name]}".rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `crqat_fx.trace` the function when something imports the module of that name, which would otherwise take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _API or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

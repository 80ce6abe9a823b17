"""What a model's file is, and how it is opened: an exported file (`.onnx`) for onnxruntime, anything else for torch.

The name alone decides, so that torch is imported for the files that need it and for no other.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from crqat_fx.errors import UserError
from crqat_fx.shipped import locate

if TYPE_CHECKING:
    from torch import nn

    from crqat_fx.checkpoint import Checkpoint
    from crqat_fx.onnx_detector import OnnxModel
    from crqat_fx.quantize.prepared import Prepared
    from crqat_fx.torch_detector import TorchModel


def is_onnx(name: str | Path) -> bool:
    return Path(name).suffix.lower() == ".onnx"


def open_model(name: str | Path, *, raw: bool = False) -> "OnnxModel | TorchModel":
    """Whatever detects: an exported file, a prepared model, a checkpoint, or the shipped model of that name. `raw`: of a trained one the
    raw weights, not their average."""
    if is_onnx(name):
        if raw:
            raise UserError(
                "has one set of weights, as it was exported with", where=name, remedy="leave out --raw-weights, or export with it"
            )
        from crqat_fx.onnx_detector import read_onnx

        return read_onnx(name)
    from crqat_fx.torch_detector import TorchModel

    return TorchModel(*load_module(name, raw=raw))


def read_model(name: str | Path, *, raw: bool = False) -> "Checkpoint | Prepared":
    """What is in a file of torch: opened once, and told by what it says of itself."""
    from crqat_fx.checkpoint import checkpoint_in
    from crqat_fx.quantize.prepare import rebuilt
    from crqat_fx.quantize.prepared import holds_prepared, saved_in
    from crqat_fx.unpickle import opened

    with opened(locate(name)) as archive:
        if not holds_prepared(archive):
            if raw:
                raise UserError("is a checkpoint, with one set of weights", where=name, remedy="leave out --raw-weights")
            return checkpoint_in(archive)
        saved = saved_in(archive)
    return rebuilt(saved, raw=raw)


def load_module(name: str | Path, *, raw: bool = False) -> "tuple[nn.Module, Checkpoint]":
    """A model that runs in torch, and what its file carries: of a checkpoint, or of a prepared model with its ranges set."""
    from crqat_fx.checkpoint import Checkpoint, model_of

    prepared = read_model(name, raw=raw)
    if isinstance(prepared, Checkpoint):
        return model_of(prepared), prepared
    if not prepared.calibrated or prepared.config is None:
        raise UserError("its quantizers have no ranges", where=name, remedy="prepare it again with --calibrate")
    extra: dict[str, object] = {"size": prepared.size, "weights": prepared.weights}
    carried = Checkpoint(Path(name), "crqat-fx", prepared.config, {}, prepared.vocabulary, extra=extra)
    return prepared.graph.eval(), carried

"""An ONNX file opened in onnxruntime; whatever is wrong with it is told in one line.

The file is data alone: no library of operators is loaded for it, and onnxruntime refuses weights that lie outside its folder.
"""

import errno
import os
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from crqat_fx.errors import UserError

# what onnxruntime raises; its classes share no base of their own
FAILURES: tuple[type[Exception], ...] = (
    state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoModel,
    state.NoSuchFile, state.NotFound, state.NotImplemented, state.RuntimeException, RuntimeError, ValueError, MemoryError,
)  # fmt: skip
EXPORT = "make one with `crqat-fx export`"
_FATAL_ALONE = 4  # onnxruntime's log level: what it raises is not told a second time on stderr
_LONGEST_REASON = 240


def open_session(
    path: str | Path, threads: int | None = None, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """The file's session on the processor, with `threads` threads or as many as onnxruntime chooses. `options`, if given, are changed."""
    source = Path(path)
    try:
        with source.open("rb"):  # onnxruntime takes a folder for a damaged file
            pass
    except OSError as error:
        raise UserError(f"cannot be read ({os.strerror(error.errno or errno.EIO)})", where=source, remedy="name an ONNX file") from error
    chosen = onnxruntime.SessionOptions() if options is None else options
    chosen.log_severity_level = _FATAL_ALONE
    if threads is not None:
        chosen.intra_op_num_threads = threads
    try:  # with its fallback, onnxruntime prints, and tries the same again
        return onnxruntime.InferenceSession(str(source), chosen, providers=["CPUExecutionProvider"], enable_fallback=False)
    except FAILURES as error:
        raise UserError(f"cannot be opened by onnxruntime ({reason_of(error)})", where=source, remedy=EXPORT) from error


def summing_whole() -> onnxruntime.SessionOptions:
    """Options for a file whose weights have all their 8 bits: on processors that would saturate its sums onnxruntime takes slower kernels,
    and on others the same as ever."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def reason_of(error: Exception) -> str:
    """onnxruntime's message without its codes, and not longer than a line."""
    reason = " ".join(str(error).rpartition(" failed:")[2].split()).rstrip(".") or type(error).__name__
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."

"""Running any ONNX file in onnxruntime on made-up inputs: to time it, or to see what it runs.

What an input is follows from its rank: four axes are pictures, three are texts. An axis that the file leaves open takes the size asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from crqat_fx.errors import UserError
from crqat_fx.onnx_session import FAILURES, reason_of

Feed = Mapping[str, NDArray[np.generic]]

KINDS: Mapping[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


@dataclass(frozen=True)
class Extent:
    """What open axes become."""

    size: int = 640
    batch: int = 1
    texts: int = 80


USUAL = Extent()


def run(session: onnxruntime.InferenceSession, feed: Feed, where: object) -> list[NDArray[np.generic]]:
    """All outputs of one run."""
    try:
        outputs: list[NDArray[np.generic]] = session.run(None, dict(feed))
    except FAILURES as error:
        raise UserError(
            f"onnxruntime cannot run it on inputs of {', '.join(f'{name} {list(value.shape)}' for name, value in feed.items())} "
            f"({reason_of(error)})",
            where=where,
            remedy="give another size",
        ) from error
    return outputs


def made_up_inputs(session: onnxruntime.InferenceSession, extent: Extent, where: object, seed: int = 0) -> Feed:
    """The same noise for every file whose inputs have the same shapes: pictures in [0, 1] or bytes, texts of length 1."""
    feed: dict[str, NDArray[np.generic]] = {}
    for wanted in session.get_inputs():
        if wanted.type not in KINDS:
            raise UserError(f"its input {wanted.name!r} is a {wanted.type}", where=where, remedy="give a file that takes pictures")
        shape = _filled(wanted.name, wanted.shape, extent, where)
        generator = np.random.default_rng(seed)
        if KINDS[wanted.type] is np.uint8:
            feed[wanted.name] = generator.integers(0, 256, shape, dtype=np.uint8)
        elif len(shape) == 3:
            drawn = generator.standard_normal(shape, dtype=np.float32)
            feed[wanted.name] = (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(KINDS[wanted.type])
        else:
            feed[wanted.name] = generator.random(shape, dtype=np.float32).astype(KINDS[wanted.type])
    return feed


def _filled(name: str, shape: list[int | str | None], extent: Extent, where: object) -> tuple[int, ...]:
    """The shape with numbers for its open axes: [B,3,H,W] or [B,H,W,3]; [B,N,D]."""
    usual = {4: (extent.batch, extent.size, extent.size, extent.size), 3: (extent.batch, extent.texts, None)}.get(len(shape))
    if usual is None:
        raise UserError(f"its input {name!r} has {len(shape)} axes", where=where, remedy="give a file that takes pictures")
    sides = [given if isinstance(given, int) and given > 0 else asked for given, asked in zip(shape, usual, strict=True)]
    if None in sides or (len(shape) == 4 and not isinstance(shape[1], int) and not isinstance(shape[3], int)):
        raise UserError(f"its input {name!r} leaves the channels open", where=where, remedy="export it with fixed channels")
    return tuple(side for side in sides if side is not None)

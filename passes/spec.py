"""How one tensor is quantized: pure data, read by the torch half and by the ONNX half."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantSpec:
    """`bits` wide; `symmetric` has no zero point; `channel_axis` has a scale of its own for each index, None one for the tensor."""

    bits: int
    symmetric: bool = False
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}: give a whole number from 2 to 8")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric is {self.symmetric!r}: give true or false")
        axis = self.channel_axis
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or axis < 0):
            raise ValueError(f"channel_axis is {axis!r}: give an axis counted from 0, or none for one scale")

    @property
    def lowest(self) -> int:
        """The smallest code: symmetric codes are signed, the others start at 0."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

"""How one tensor is quantized: pure data, read by the torch half and by the ONNX half."""

from dataclasses import dataclass

ODD_BITS = 3  # the most that odd codes have: they fill one bit more, and 4 are what is stored


@dataclass(frozen=True)
class QuantSpec:
    """`bits` wide; `symmetric` has no zero point; `channel_axis` has a scale of its own for each index, None one for the tensor.

    `odd` takes odd codes alone: as many below zero as above, and none at it. With 2 bits -3, -1, 1, 3 in place of -2, -1, 0, 1. Their
    number is what `bits` says; 4 bits hold those of 2 and 3.
    """

    bits: int
    symmetric: bool = False
    channel_axis: int | None = None
    odd: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}: give a whole number from 2 to 8")
        for name in ("symmetric", "odd"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give true or false")
        axis = self.channel_axis
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or axis < 0):
            raise ValueError(f"channel_axis is {axis!r}: give an axis counted from 0, or none for one scale")
        if self.odd and not (self.symmetric and self.bits <= ODD_BITS):
            raise ValueError(f"odd codes are for symmetric tensors of 2 to {ODD_BITS} bits")

    @property
    def lowest(self) -> int:
        """The smallest code: symmetric codes are signed, the others start at 0."""
        if self.odd:
            return 1 - (1 << self.bits)
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + self.step * ((1 << self.bits) - 1)

    @property
    def step(self) -> int:
        """Between two codes."""
        return 2 if self.odd else 1

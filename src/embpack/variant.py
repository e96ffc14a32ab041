"""Variant: one way to pack a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to pack a table.

    Attributes:
        method: as parse_method reads it: "greedy", "greedy:b=1000,r=0.5".
        bits: of each code; float where it has a fraction.
        param_dtype: "float16" or "float32"; None is what quantize takes for the method and bits.
        rotate: what quantize takes.
    """

    method: str
    bits: float
    param_dtype: str | None = None
    rotate: str | None = None

    def __str__(self) -> str:
        params = f" with {self.param_dtype} parameters" if self.param_dtype else ""
        return f"{self.name} at {self.bits} bits{params}"

    @property
    def name(self) -> str:
        """The method, and the rotation if there is one."""
        return f"{self.method}, {self.rotate}" if self.rotate else self.method

"""Variant: one way to pack a table."""

from dataclasses import dataclass, fields, replace

from embpack.layouts import LAYOUTS, RowFormat
from embpack.methods import DEFAULT_METHOD, METHODS, Method, parse_method

# What parse_variant sets beside a method's own parameters.
_SETTINGS = ("bits", "param_dtype", "rotate")


@dataclass(frozen=True)
class Variant:
    """One way to pack a table.

    Attributes:
        method: as parse_method reads it: "greedy", "greedy:b=1000,r=0.5"; or a Method.
        bits: as quantize takes them; float where they have a fraction.
        param_dtype: "float16" or "float32"; None is quantize's default for the method and bits.
        rotate: "hadamard" or None, as quantize takes it.
    """

    method: str | Method = DEFAULT_METHOD
    bits: float = 4
    param_dtype: str | None = None
    rotate: str | None = None

    def __str__(self) -> str:
        params = f" with {self.param_dtype} parameters" if self.param_dtype else ""
        return f"{self.name} at {self.bits} bits{params}"

    @property
    def name(self) -> str:
        """The method, and the rotation if there is one."""
        return f"{self.spec}, {self.rotate}" if self.rotate else self.spec

    @property
    def spec(self) -> str:
        """The method, as parse_method reads it."""
        return self.method if isinstance(self.method, str) else self.method.spec

    @property
    def parsed_method(self) -> Method:
        """The method.

        Raises:
            ValueError: there is no such method.
        """
        return parse_method(self.method)

    def make_row_format(self, embedding_dim: int) -> RowFormat:
        """Make the format of rows of this embedding_dim.

        Raises:
            TypeError: bits is not of the right type.
            ValueError: there is no such method, or it has no rows of this embedding_dim, bits, param_dtype or rotation.
        """
        layout = LAYOUTS[self.parsed_method.layout]
        param_dtype = self.param_dtype or layout.default_param_dtype(self.bits)
        return RowFormat(embedding_dim, self.bits, param_dtype, layout.name, self.rotate)

    def count_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Count the bytes of a packed table, and of what lies beside its rows.

        Raises:
            TypeError, ValueError: as make_row_format.
        """
        row_format = self.make_row_format(embedding_dim)
        num_codebooks = self.parsed_method.num_codebooks(num_embeddings, row_format)
        beside = row_format.form.beside(num_embeddings, num_codebooks)
        return num_embeddings * row_format.row_bytes + sum(spec.nbytes for spec in beside)

    def find_refusal(self) -> str | None:
        """Say why no row can be packed in this way, whatever its width and values; None if some can."""
        try:
            self.make_row_format(LAYOUTS[self.parsed_method.layout].least_dim)
        except (TypeError, ValueError) as error:
            return str(error)
        return None


def parse_variant(text: str) -> Variant:
    """Read one way to pack a table, as in "trellis", "trellis:bits=3.5,rotate=hadamard" or "greedy:b=1000,bits=8".

    Args:
        text: a method, then optionally a colon and settings with commas between: bits, param_dtype and rotate, and the
            method's own parameters. What is not set is quantize's default.

    Raises:
        ValueError: no such method or parameter, a value out of its range, or one that does not go with the others.
    """
    name, _, settings = text.partition(":")
    parameters = [field.name for field in fields(METHODS[name])] if name in METHODS else []
    own: list[str] = []
    variant = Variant()
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        key = key.replace("-", "_")  # as the flags have it
        if key == "bits":
            variant = replace(variant, bits=parse_bits(value))
        elif key == "param_dtype":
            variant = replace(variant, param_dtype=value)
        elif key == "rotate":
            variant = replace(variant, rotate=None if value == "none" else value)
        elif name in METHODS and key not in parameters:
            raise ValueError(f"{text!r} sets {key!r}; what can be set: {', '.join((*_SETTINGS, *parameters))}")
        else:
            own.append(setting)
    variant = replace(variant, method=f"{name}:{','.join(own)}" if own else name)
    refusal = variant.find_refusal()
    if refusal is not None:
        raise ValueError(refusal)
    return variant


def parse_bits(text: str) -> float:
    """Read a number of bits: int, or float where it has a fraction.

    Raises:
        ValueError: it is none.
    """
    try:
        bits = float(text)
    except ValueError:
        raise ValueError(f"bits is {text!r}; give a number") from None
    return int(bits) if bits.is_integer() else bits

"""Variant: one way to pack a table."""

from dataclasses import dataclass

from embpack.layouts import LAYOUTS, RowFormat
from embpack.methods import DEFAULT_METHOD, Method, parse_method


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
        except TypeError:
            return f"bits is {self.bits}; choose 2, 4 or 8"
        except ValueError as error:
            return str(error)
        return None


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

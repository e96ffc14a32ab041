"""What a method is, and what it becomes once it knows a table."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.layouts import RowFormat
from embpack.rows import explain_not_finite, widen

# Called as often as a method reads the table, it yields all rows each time, as they are to be packed.
Chunks = Callable[[], Iterable[NDArray[Any]]]
# Told how many more rows are packed, now and then.
OnRows = Callable[[int], object]
# What the core says of a row that it cannot pack; anything else but 0 is an overflow.
_NOT_FINITE = 1
# The share of a table's squares from which on it matters what became of rows.
_MATTERS = 1e-6
# Spans that are kept by themselves.
_MOST_SPANS = 256


class Sums(NamedTuple):
    """Of a span of rows: sums over their values.

    Attributes:
        error: of the squared errors.
        square: of the squares of the values.
        lost_rows: rows that come back no better than zeros would, because they are too small for float16 parameters.
        lost_square: of the squares of their values.
    """

    error: float
    square: float
    lost_rows: int = 0
    lost_square: float = 0.0


# What the core returns of rows: (fault, faulty row, Sums of each span).
Encoded = tuple[int, int, list[tuple[float, float, int, float]]]


@dataclass(frozen=True, eq=False)
class Packer(ABC):
    """A method that knows of a table what it must, and packs its rows.

    It keeps nothing of what it packs and has nothing of single rows: they may come in any order, and from several
    threads, processes or machines, which it is pickled for.

    Attributes:
        method: with the parameters that were found in the table.
        row_format: of the packed rows.
        name: of the table, for messages.

    Class attributes:
        params: which part of a packed row may overflow, for messages.
    """

    params: ClassVar[str] = "codebook"

    method: "Method"
    row_format: RowFormat
    name: str

    @property
    def spec(self) -> str:
        """Name and parameters of the method."""
        return self.method.spec

    def beside(self) -> dict[str, NDArray[Any]]:
        """The arrays that all rows share, by the names that a PackedTable has for them."""
        return {}

    def state(self) -> list[NDArray[Any]]:
        """List all arrays that the bytes of rows come from, beside the method and the row format."""
        return list(self.beside().values())

    def digest(self) -> bytes:
        """Return a SHA-256 of all that rows are packed by: where it is the same, rows become the same bytes.

        Weights of errors are not in it, which rows of files have none of.
        """
        digest = hashlib.sha256(f"{self.spec} in {self.row_format}".encode())
        for array in self.state():
            digest.update(f"{array.dtype.str} {array.shape}".encode() + array.tobytes())
        return digest.digest()

    def make_by_row(self, num_rows: int) -> NDArray[Any] | None:
        """Make room for the array with an entry for each of so many rows, which pack fills; None if there is none."""
        return None

    def weigh_errors(self, weights: Any, num_embeddings: int) -> "Packer":
        """Make a packer that counts squared errors by weights (see embpack.quantize).

        Raises:
            ValueError: they are not as they must be, or the method takes none.
        """
        raise ValueError(f"method {self.method.name!r} has no error_weights; choose 'optimal'")

    def pack(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        start: int = 0,
        on_rows: OnRows | None = None,
        by_row: NDArray[Any] | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> list[Sums]:
        """Pack rows of the table: a number of whole spans, or the last ones.

        Args:
            rows: float32, float16 or (bfloat16 as) uint16 [n, embedding_dim], rotated already.
            packed: uint8 [n, row_bytes], C-contiguous; filled.
            start: number of the first row in the table.
            on_rows: called about ten times a second with how many more of the rows are packed, and once at the end.
            by_row: [n], as make_by_row makes it; filled. None: nobody wants it.
            numbers: int64 [n], what messages call the rows; None: start, start + 1, ...

        Returns:
            The sums of each span, as measure_loss takes them.

        Raises:
            ValueError: a value is NaN or infinite, or a scale, bias or codebook overflows; row and column are named.
        """
        fault, row, sums = self._encode(np.ascontiguousarray(rows), packed, start, on_rows, by_row)
        if fault:
            number = start + row if numbers is None else int(numbers[row])
            if fault == _NOT_FINITE:
                raise explain_not_finite(widen(rows[row]), self.name, number)
            raise self._explain_overflow(widen(rows[row]), number)
        return [Sums(*span) for span in sums]

    @abstractmethod
    def _encode(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        start: int,
        on_rows: OnRows | None,
        by_row: NDArray[Any] | None,
    ) -> Encoded:
        """Call the core."""

    def _explain_overflow(self, row: NDArray[np.float32], number: int) -> ValueError:
        where = f"{self.name}[{number}] has values from {row.min():.6g} to {row.max():.6g}"
        if self.row_format.has_f16_params:
            return ValueError(
                f"{where}: its {self.params} overflows float16 (largest: 65504); use param_dtype='float32'"
            )
        return ValueError(f"{where}: its scale overflows float32; rescale the table")


def measure_loss(sums: Iterable[Sums]) -> float:
    """Normalized l2 loss ||X - Q(X)|| / ||X|| of rows, given the sums of their spans; 0 for rows of zeros."""
    spans = list(sums)
    square_error, square = math.fsum(span.error for span in spans), math.fsum(span.square for span in spans)
    return math.sqrt(square_error / square) if square else 0.0


def condense(sums: Iterable[Sums], most: int = _MOST_SPANS) -> list[Sums]:
    """Make few sums of those of many spans, which come to the same to the last bit, however they are summed up.

    Args:
        sums: of spans.
        most: fewer stay as they are.
    """
    spans = list(sums)
    if len(spans) < most:
        return spans
    error, square, lost_square = (
        _split(getattr(span, name) for span in spans) for name in ("error", "square", "lost_square")
    )
    parts = zip_longest(error, square, lost_square, fillvalue=0.0)
    lost_rows = [sum(span.lost_rows for span in spans), *[0] * len(spans)]
    return [Sums(own[0], own[1], rows, own[2]) for own, rows in zip(parts, lost_rows, strict=False)]


def _split(values: Iterable[float]) -> list[float]:
    """Write the exact sum of numbers as a sum of few; at least one."""
    left = list(values)
    parts = [math.fsum(left)]
    while parts[-1] and (rest := math.fsum([*left, *(-part for part in parts)])):
        parts.append(rest)
    return parts


def join_losses(parts: Iterable[tuple[float, float]]) -> float:
    """Normalized l2 loss of rows in parts, given of each part its loss and the sum of the squares of its values."""
    known = list(parts)
    square = math.fsum(own for _, own in known)
    return math.sqrt(math.fsum(loss * loss * own for loss, own in known) / square) if square else 0.0


def find_warning(sums: Iterable[Sums]) -> str | None:
    """Say how many rows are lost, and the way out, given the sums of a table's spans; None if it does not matter."""
    spans = list(sums)
    lost = sum(span.lost_rows for span in spans)
    square = math.fsum(span.square for span in spans)
    if not lost or math.fsum(span.lost_square for span in spans) <= _MATTERS * square:
        return None
    return (
        f"{lost:,} of its rows come back no better than zeros would: their values are too small for float16 "
        "parameters; use param_dtype='float32' (--param-dtype float32), or the method 'trellis'"
    )


def bound_values(rows: NDArray[Any], name: str, start: int) -> tuple[float, float]:
    """Find the smallest and the largest value of rows, the first of which is row `start` of the table.

    Raises:
        ValueError: a value is NaN or infinite; row and column are named.
    """
    fault, row, smallest, largest = _native.bound(np.ascontiguousarray(rows))
    if fault:
        raise explain_not_finite(widen(rows[row]), name, start + row)
    return smallest, largest


@dataclass(frozen=True)
class Method(ABC):
    """Chooses what the codes of each row stand for; its fields are its parameters.

    Class attributes:
        name: what users call it.
        layout: of the rows that it makes, a name in LAYOUTS.
        summary: one line on what it does and when to use it.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Read a table as often as need be, and make the packer of its rows.

        Args:
            chunks: yields all rows, rotated already, each time that it is called: chunk_rows(embedding_dim) rows at a
                time. With others the packer may differ in last bits, and so may the bytes.
            num_embeddings: how many there are.
            row_format: of the packed rows.
            name: of the table, for messages.

        Raises:
            ValueError: a value that was looked at is NaN, infinite or too large.
        """

    def num_codebooks(self, num_embeddings: int, row_format: RowFormat) -> int:
        """How many codebooks lie beside the rows of a table: never more than it has rows."""
        return 0

    def sample_rows(self, num_embeddings: int, row_format: RowFormat) -> int:
        """How many rows of a table it learns from, in a time that grows with their number."""
        return 0

    def for_part(self, num_embeddings: int, row_format: RowFormat) -> "Method":
        """Make the method that takes as long for a row of a part of a table as this does for one of the table."""
        return self

    @property
    def spec(self) -> str:
        """Name and parameters, as parse_method reads them."""
        settings = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}:{settings}" if settings else self.name

    @property
    def longest_spec(self) -> str:
        """Text at least as long as the spec of any packer that it becomes."""
        return self.spec

"""Tables in pieces: rows and columns put together again."""

import re
from functools import partial

import numpy as np
import pytest

from embpack.errors import FormatError
from embpack.formats import SourceTensor
from embpack.formats.pieces import Piece, join_pieces
from embpack.formats.stored import iter_slices


def _make_tensor(name: str, values: np.ndarray) -> SourceTensor:
    def iter_rows(start: int, stop: int, n: int):
        return (values[rows] for rows in iter_slices(start, stop, n))

    return SourceTensor(name, values.shape, "F32", iter_rows, None)


def _cut(values: np.ndarray, places: list[tuple[slice, slice]]) -> list[Piece]:
    return [
        Piece(rows.start, columns.start, _make_tensor(f"x.{number}", values[rows, columns]))
        for number, (rows, columns) in enumerate(places)
    ]


VALUES = np.arange(70, dtype=np.float32).reshape(10, 7)
_join = partial(join_pieces, "file", "x", (10, 7), "F32")
PLACES = {
    "rows": [(slice(7, 10), slice(0, 7)), (slice(0, 3), slice(0, 7)), (slice(3, 7), slice(0, 7))],
    "columns": [(slice(0, 10), slice(2, 7)), (slice(0, 10), slice(0, 2))],
    "grid": [(slice(a, b), slice(c, d)) for a, b in ((0, 4), (4, 10)) for c, d in ((0, 5), (5, 7))],
    "no grid": [(slice(0, 10), slice(0, 3)), (slice(0, 6), slice(3, 7)), (slice(6, 10), slice(3, 7))],
    "with empty ones": [(slice(0, 0), slice(0, 7)), (slice(0, 10), slice(0, 7)), (slice(10, 10), slice(0, 7))],
    "one": [(slice(0, 10), slice(0, 7))],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("n", [1, 3, 10, 100])
def test_pieces_are_joined(places: list[tuple[slice, slice]], n: int) -> None:
    tensor = _join(_cut(VALUES, places))
    for start, stop in ((0, 10), (2, 3), (2, 9), (9, 10)):
        found = np.concatenate([chunk.copy() for chunk in tensor.chunks(n, start, stop)])
        np.testing.assert_array_equal(found, VALUES[start:stop])
    np.testing.assert_array_equal(tensor.read(), VALUES)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(slice(0, 9), slice(0, 7))], "row 9, column 0"),
        ([(slice(1, 10), slice(0, 7))], "row 0, column 0"),
        ([(slice(0, 10), slice(0, 6))], "row 0, column 6"),
        ([(slice(0, 10), slice(0, 7)), (slice(4, 5), slice(0, 7))], "row 4, column 6"),
        ([(slice(0, 10), slice(0, 4)), (slice(0, 10), slice(3, 7))], "row 0, column 4"),
        ([], "row 0, column 0"),
    ],
)
def test_pieces_that_do_not_make_the_table_are_refused(places: list[tuple[slice, slice]], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        _join(_cut(VALUES, places))


def test_thousands_of_tall_pieces_beside_flat_ones_are_refused() -> None:
    """What takes time and memory by the square of the number of pieces is no table that a program cuts."""
    n = 3_000
    tall, flat = (SourceTensor("x", shape, "F32", lambda *_: iter(()), None) for shape in ((n, 1), (1, 1)))
    pieces = [*(Piece(0, column, tall) for column in range(n)), *(Piece(row, n, flat) for row in range(n))]
    with pytest.raises(FormatError, match="is cut into 6000 pieces at too many different rows"):
        join_pieces("file", "x", (n, n + 1), "F32", pieces)


def test_pieces_outside_the_table_are_refused() -> None:
    with pytest.raises(FormatError, match=re.escape("rows [0, 10)")):
        join_pieces("file", "x", (9, 7), "F32", _cut(VALUES, PLACES["one"]))


def test_pieces_of_another_type_are_refused() -> None:
    other = SourceTensor("x.1", (5, 7), "F16", lambda start, stop, n: iter(()), None)
    with pytest.raises(FormatError, match=r"x\.1.*F16"):
        _join([*_cut(VALUES[:5], [(slice(0, 5), slice(0, 7))]), Piece(5, 0, other)])

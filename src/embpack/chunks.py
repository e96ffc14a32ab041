"""How many rows are packed at a time."""

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from embpack import _native
from embpack.rotation import rotate_chunks

# Values of a span: what losses are summed over, so that they are the same to the last bit for arrays and for files.
SPAN_VALUES = 1 << 18
# Spans that are worked on at a time: of a file, and wherever NumPy makes arrays of them, few enough for memory to stay
# bounded and for Ctrl-C to be heard; of an array that the core reads in place, enough to hide thread wake-up.
SPANS_OF_A_FILE, SPANS_OF_AN_ARRAY = 16, 256


def span_rows(embedding_dim: int) -> int:
    """Rows of a span."""
    return max(1, SPAN_VALUES // embedding_dim // _native.block_rows) * _native.block_rows


def chunk_rows(embedding_dim: int) -> int:
    """Rows of a chunk of a file."""
    return SPANS_OF_A_FILE * span_rows(embedding_dim)


def iter_chunks(rows: NDArray[Any], rotation: str | None) -> Iterator[NDArray[Any]]:
    """Split an array [N, d] into chunks of those of a file, rotated."""
    return rotate_chunks(_split(rows, SPANS_OF_A_FILE), rotation, "weight")


def iter_packable(rows: NDArray[Any], rotation: str | None) -> Iterator[NDArray[Any]]:
    """Split an array [N, d] into chunks as they are to be packed: larger ones if none has to be copied."""
    if rotation is None and rows.flags.c_contiguous:
        return _split(rows, SPANS_OF_AN_ARRAY)
    return iter_chunks(rows, rotation)


def _split(rows: NDArray[Any], spans: int) -> Iterator[NDArray[Any]]:
    step = spans * span_rows(rows.shape[1])
    return (rows[start : start + step] for start in range(0, len(rows), step))

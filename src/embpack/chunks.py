"""How many rows are packed at a time."""

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from embpack import _native
from embpack.rotation import rotate_chunks

# Values of a span: what losses are summed over, so that they are the same to the last bit for arrays and for files.
SPAN_VALUES = 1 << 18
# Spans per native call, from a file and from an array: few enough to stream and interrupt, enough to hide thread
# wake-up.
SPANS_OF_A_FILE, SPANS_OF_AN_ARRAY = 16, 256


def span_rows(embedding_dim: int) -> int:
    """Rows of a span."""
    return max(1, SPAN_VALUES // embedding_dim // _native.block_rows) * _native.block_rows


def chunk_rows(embedding_dim: int) -> int:
    """Rows of a chunk of a file; of very wide ones fewer spans, so that a chunk is not many times as large."""
    rows = span_rows(embedding_dim)
    spans = SPANS_OF_A_FILE * SPAN_VALUES // (rows * embedding_dim)
    return min(max(1, spans), SPANS_OF_A_FILE) * rows


def iter_chunks(rows: NDArray[Any], rotation: str | None) -> Iterator[NDArray[Any]]:
    """Split an array [N, d] into chunks, as they are to be packed; smaller ones if each has to be copied."""
    spans = SPANS_OF_AN_ARRAY if rows.flags.c_contiguous and rotation is None else SPANS_OF_A_FILE
    step = spans * span_rows(rows.shape[1])
    chunks = (rows[start : start + step] for start in range(0, len(rows), step))
    return rotate_chunks(chunks, rotation, "weight")

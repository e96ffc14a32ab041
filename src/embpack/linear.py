"""Vectors times all rows of a table: the logits of an output layer, from packed rows."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native, rotation
from embpack.rows import ROW_DTYPES, widen

if TYPE_CHECKING:
    from embpack.table import PackedTable

# So many vectors are multiplied straight from the packed bytes. With more, BLAS makes up for the time of unpacking.
MOST_FROM_CODES = 8
# Values that are unpacked for BLAS at a time.
TILE_VALUES = 1 << 20


def multiply(table: "PackedTable", vectors: NDArray[np.float32], bias: NDArray[np.float32] | None) -> NDArray[Any]:
    """Return vectors @ weight.T + bias, float32 [n, num_embeddings].

    Args:
        table: the weight, packed.
        vectors: [n, embedding_dim], C-contiguous.
        bias: [num_embeddings], contiguous, or None.

    Raises:
        FormatError: a row has no codebook.
    """
    out = np.empty((len(vectors), table.num_embeddings), np.float32)
    if len(vectors) <= MOST_FROM_CODES:
        fault = _native.linear(table.native_view, vectors, bias, out)
        if fault != -1:
            raise table.explain_fault(fault, None)
        return out
    _multiply_tiles(table, vectors, out)
    return out if bias is None else np.add(out, bias, out=out)


def _multiply_tiles(table: "PackedTable", vectors: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Unpack some rows at a time, without undoing a rotation, which is done to the vectors instead."""
    vectors = rotation.rotate(vectors) if table.rotation else vectors
    rows_at_a_time = max(1, TILE_VALUES // table.embedding_dim)
    tile = np.empty((rows_at_a_time, table.embedding_dim), np.float32)
    for start in range(0, table.num_embeddings, rows_at_a_time):
        rows = np.arange(start, min(start + rows_at_a_time, table.num_embeddings))
        fault = _native.gather(table.as_packed.native_view, rows, tile[: len(rows)])
        if fault != -1:
            raise table.explain_fault(fault, rows)
        np.matmul(vectors, tile[: len(rows)].T, out=out[:, start : start + len(rows)])


def as_vectors(values: Any, what: str, size: int) -> NDArray[np.float32]:
    """Make an array float32 [..., size], C-contiguous.

    Args:
        values: float32, float16 or bfloat16 (of ml_dtypes, or its bits in uint16); or lists of numbers.
        what: its name, for messages.
        size: of the last axis.

    Raises:
        TypeError: it is of another type.
        ValueError: it has another size.
    """
    array = np.asarray(values) if hasattr(values, "dtype") else np.asarray(values, np.float32)
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype not in ROW_DTYPES.values():
        raise TypeError(f"{what} is {array.dtype}; it must be float32, float16 or bfloat16")
    if not array.ndim or array.shape[-1] != size:
        raise ValueError(f"{what} has shape {list(array.shape)}; its last axis must be {size} long")
    return np.ascontiguousarray(array if array.dtype == np.float32 else widen(array))

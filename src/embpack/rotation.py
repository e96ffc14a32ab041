"""Rotation: rows times an orthogonal matrix before they are packed, so that no value stands out (docs/rotation.md).

A row is split into blocks of 2^k columns, the largest first. Each value is multiplied by its column's sign, then each
block by its orthonormal Hadamard matrix. The matrix depends on embedding_dim alone. embpack.reference is the
specification.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.rows import explain_not_finite, widen

# That are widened at a time, so that Ctrl-C is heard in between.
_ROWS_AT_A_TIME = 1 << 16


def rotate(values: NDArray[Any]) -> NDArray[np.float32]:
    """Rotate rows.

    Args:
        values: float32 or float16 [..., embedding_dim], or bfloat16 as its bits in uint16.

    Returns:
        values @ matrix(embedding_dim), float32 [..., embedding_dim].

    Raises:
        ValueError: values have no columns.
    """
    return _transform(values, back=False)


def rotate_back(values: NDArray[Any]) -> NDArray[np.float32]:
    """Undo rotate, up to rounding.

    Args:
        values: float32 or float16 [..., embedding_dim], or bfloat16 as its bits in uint16, such as lookups return with
            rotate_back=False, or sums of them.

    Returns:
        values @ matrix(embedding_dim).T, float32 [..., embedding_dim].

    Raises:
        ValueError: values have no columns.
    """
    return _transform(values, back=True)


def matrix(embedding_dim: int) -> NDArray[np.float32]:
    """Make the matrix R that rows are multiplied by from the right: float32 [embedding_dim, embedding_dim].

    Multiplying by R.T gets rows back. With rotate_back=False, the layer after a lookup can do that at no cost: if it
    multiplies values by W [embedding_dim, n], let it multiply rotated ones by R.T @ W. A torch.nn.Linear keeps W.T: its
    weight becomes weight @ R.

    Raises:
        ValueError: embedding_dim is not positive.
    """
    return rotate(np.eye(embedding_dim, dtype=np.float32))


def rotate_chunks(
    chunks: Iterable[NDArray[Any]],
    rotation: str | None,
    name: str,
    start: int = 0,
    numbers: NDArray[np.int64] | None = None,
) -> Iterator[NDArray[Any]]:
    """Yield the chunks of a table as they are to be packed: rotated, or as they are if rotation is None.

    Args:
        chunks: float32, float16 or (bfloat16 as) uint16 [n, embedding_dim].
        rotation: a name in layouts.ROTATIONS, or None.
        name: of the table, for messages.
        start: number of the first row in the table, for messages.
        numbers: int64, what messages call the rows of all chunks; None: start, start + 1, ...

    Raises:
        ValueError: a value is NaN or infinite, or becomes infinite.
    """
    if rotation is None:
        yield from chunks
        return
    done = 0
    for rows in chunks:
        rotated = rotate(rows)
        wrong = np.flatnonzero(~np.isfinite(rotated).all(axis=1))
        if len(wrong):
            at = done + int(wrong[0])
            raise _explain(widen(rows[wrong[0]]), name, start + at if numbers is None else int(numbers[at]))
        yield rotated
        done += len(rows)


def _explain(row: NDArray[np.float32], name: str, number: int) -> ValueError:
    if not np.isfinite(row).all():
        return explain_not_finite(row, name, number)
    return ValueError(
        f"{name}[{number}] has values from {row.min():.6g} to {row.max():.6g}, which become infinite when they are "
        "rotated; rescale the table, or leave rotate out"
    )


def _transform(values: NDArray[Any], *, back: bool) -> NDArray[np.float32]:
    array = np.asarray(values)
    if not array.ndim or not array.shape[-1]:
        raise ValueError(f"values have shape {list(array.shape)}; they need columns")
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        out[start : start + _ROWS_AT_A_TIME] = widen(rows[start : start + _ROWS_AT_A_TIME])
    _native.rotate(out, back=back)
    return out.reshape(array.shape)

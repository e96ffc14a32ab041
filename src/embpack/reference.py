"""The specification in plain NumPy: what the kernels compute, in the paper's notation.

Guan et al. 2019, section 2: uniform n-bit quantization with clipping range [xmin, xmax] is
``scale = (xmax - xmin) / (2^n - 1)``, ``bias = xmin``, ``code = round((clip(x) - bias) / scale)`` and
``value = scale * code + bias``. The order of roundings is that of PyTorch's and FBGEMM's row quantizers, so
that rows are theirs to the byte. Slow on purpose: one row at a time, nothing clever.

What a lookup returns, rows or pooled values, is float32, or rounded to float16 or bfloat16 by ``narrow``: a finite
value that the type cannot hold becomes its largest, infinities and NaN stay.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32, fma
from embpack.layouts import RowFormat
from embpack.layouts.codes import Codes, pack_codes
from embpack.rows import narrow

Row = NDArray[np.float32]


def multiply_codes(
    codes: NDArray[np.uint8], values: NDArray[np.float32], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Values of codes of a byte, FP8 or INT8, and their scales: each product is rounded to float32 once.

    Args:
        codes: uint8 [n, d], the bits of the codes.
        values: float32 [256], what each stands for.
        scales: float32 [n, blocks], each for d / blocks columns.
    """
    with np.errstate(all="ignore"):
        return values[codes] * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


class CodebookSearch(Protocol):
    """A method: chooses the codebook of a row."""

    def search(self, x: Row, row_format: RowFormat) -> Row:
        """Return the codebook of the row ``x``, float32 [d]: float32 [2^bits], ascending."""
        ...


class RangeSearch(Protocol):
    """A method: chooses the clipping range of a row."""

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return (xmin, xmax) for the row ``x``, float32 [d]."""
        ...


@dataclass(frozen=True)
class Grid:
    """Scale and bias as they are stored, and what values are multiplied by to get codes; or arrays of these."""

    scale: Any
    bias: Any
    inverse: Any


def make_grid(xmin: Any, xmax: Any, row_format: RowFormat) -> Grid:
    """Turn a clipping range, or arrays of ranges, into scale and bias.

    Source: the paper's section 2, with the roundings of FBGEMM's
    FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf (float16 parameters) and FloatToFused8BitRowwiseQuantized
    (8 bits with float32 parameters, where constant rows get scale 0 and an epsilon guards the division).
    """
    top, one = F32(2**row_format.bits - 1), F32(1)
    with np.errstate(all="ignore"):
        if row_format.bits == 8 and not row_format.has_f16_params:
            value_range = xmax - xmin
            return Grid(value_range / top, xmin, top / (value_range + F32(1e-8)))
        bias = store_param(xmin, row_format)
        value_range = xmax - bias
        scale = np.where(value_range == 0, one, store_param(value_range / top, row_format))
        scale = np.where(scale == 0, one, scale)
        is_usable = np.isfinite(one / scale)
        scale = np.where(is_usable, scale, one)[()]
    return Grid(scale, bias, one / scale)


def store_param(value: Any, row_format: RowFormat) -> Any:
    """Round float32, one or an array, to the type that a parameter is stored in."""
    return np.asarray(value).astype(np.float16).astype(F32)[()] if row_format.has_f16_params else value


def encode(x: Row, grid: Grid, bits: int) -> Codes:
    """Codes of a row: ties to even, then clipped to 0 .. 2^bits - 1."""
    return clip_codes(x, grid, bits).astype(np.uint8)


def clip_codes(x: Row, grid: Grid, bits: int) -> Row:
    """Codes of a row as float32; NaN where the grid is not finite."""
    with np.errstate(all="ignore"):
        codes: Row = np.clip(np.rint((x - grid.bias) * grid.inverse), F32(0), F32(2**bits - 1))
    return codes


def decode(codes: NDArray[Any], scale: np.float32, bias: np.float32) -> Row:
    """Levels of codes: fma(scale, code, bias), rounded once."""
    return fma(scale, codes.astype(F32), bias)


def round_trip(x: Row, xmin: np.float32, xmax: np.float32, row_format: RowFormat) -> Row:
    """Q(X, xmin, xmax) of the paper: what a row comes back as, float32 [d]."""
    grid = make_grid(xmin, xmax, row_format)
    return fma(clip_codes(x, grid, row_format.bits), grid.scale, grid.bias)


def normalized_l2_loss(x: NDArray[Any], x_hat: NDArray[Any]) -> float:
    """||X - Q(X)|| / ||X|| over all values, the paper's figure of merit; 0 for a table of zeros."""
    error = float(np.linalg.norm(x.astype(np.float64).ravel() - x_hat.astype(np.float64).ravel()))
    norm = float(np.linalg.norm(x.astype(np.float64).ravel()))
    return error / norm if norm else 0.0


def pack_row(x: Row, xmin: np.float32, xmax: np.float32, row_format: RowFormat) -> NDArray[np.uint8]:
    """Pack one row under a clipping range: codes, then scale and bias, little endian; uint8 [row_bytes]."""
    grid = make_grid(xmin, xmax, row_format)
    codes = encode(x, grid, row_format.bits)
    params = np.array([grid.scale, grid.bias], "<f2" if row_format.has_f16_params else "<f4")
    return np.concatenate([pack_codes(codes, row_format.bits), params.view(np.uint8)])


def store_levels(levels: NDArray[np.float32], row_format: RowFormat) -> NDArray[Any]:
    """Round codebooks to the type that they are stored in."""
    with np.errstate(over="ignore"):
        return levels.astype("<f2" if row_format.has_f16_params else "<f4")


def nearest_codes(x: Row, levels: NDArray[np.float32]) -> Codes:
    """Codes of a row: the nearest level of an ascending codebook, the lower one of two; uint8 [d]."""
    boundaries = (levels[:-1] + levels[1:]) * F32(0.5)
    return np.searchsorted(boundaries, x, side="left").astype(np.uint8)


def pack_codebook_row(x: Row, levels: Row, row_format: RowFormat) -> NDArray[np.uint8]:
    """Pack one row by a codebook, float32 [2^bits]: codes, then the codebook where the layout stores it in the row."""
    stored = store_levels(levels, row_format)
    codes = pack_codes(nearest_codes(x, stored.astype(F32)), row_format.bits)
    has_room = row_format.row_bytes > row_format.code_bytes
    return np.concatenate([codes, stored.view(np.uint8)]) if has_room else codes


def quantize_by_codebooks(weight: NDArray[Any], method: CodebookSearch, row_format: RowFormat) -> NDArray[np.uint8]:
    """Pack a table, float [N, d], row by row, each with a codebook of its own; uint8 [N, row_bytes]."""
    rows = [x.astype(F32) for x in weight]
    return np.stack([pack_codebook_row(x, method.search(x, row_format), row_format) for x in rows])


def quantize(weight: NDArray[Any], method: RangeSearch, row_format: RowFormat) -> NDArray[np.uint8]:
    """Pack a table, float [N, d], row by row under clipping ranges; uint8 [N, row_bytes]."""
    rows = [x.astype(F32) for x in weight]
    return np.stack([pack_row(x, *method.search(x, row_format), row_format) for x in rows])


def dequantize(
    packed: NDArray[np.uint8],
    row_format: RowFormat,
    clusters: NDArray[Any] | None = None,
    codebooks: NDArray[Any] | None = None,
    dtype: str = "float32",
) -> NDArray[Any]:
    """Levels of packed rows, uint8 [N, row_bytes] to float32 [N, d], or to a type in rows.ROW_DTYPES.

    Args:
        packed: the rows.
        row_format: what they are.
        clusters: the array by row that lies beside them, if the layout has one.
        codebooks: the array that they share, if the layout has one.
        dtype: of the values; bfloat16 as its bits in uint16.
    """
    levels = row_format.form.decode(packed, clusters, codebooks)
    return narrow(rotate_back(levels) if row_format.rotation else levels, dtype)


def linear(
    vectors: NDArray[np.float32], rows: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Multiply vectors [n, d] by dequantized rows [N, d] and add bias [N]: float32 [n, N].

    Products and sums are float64, rounded once at the end, which is as near as float32 can be. Kernels add in float32,
    in an order of their own. They factor a uniform row's scale and bias out, ``scale * sum(code * x) + bias * sum(x)``,
    and a trellis-coded row's scale and the mean, ``scale * sum(level * x) + sum(mean * x)``.
    Source: torch.nn.functional.linear.
    """
    with np.errstate(all="ignore"):
        products = vectors.astype(np.float64) @ rows.astype(np.float64).T
        return (products if bias is None else products + bias).astype(F32)


def rotation_signs(embedding_dim: int) -> NDArray[np.float32]:
    """Signs of columns, 1 or -1: the Rudin-Shapiro sequence, float32 [embedding_dim].

    A column's sign is negative if its number, in binary, has an odd number of pairs of ones side by side. Rows of equal
    values become this sequence, of which the Hadamard matrix makes no outlier: in a block of 4^k columns all values are
    of equal size, and in one of 2 * 4^k half of them are, and half are zeros. Source: Shapiro 1951, Rudin 1959.
    """
    parity = np.arange(embedding_dim)
    parity &= parity >> 1
    for shift in (32, 16, 8, 4, 2, 1):
        parity ^= parity >> shift
    return (1 - 2 * (parity & 1)).astype(F32)


def rotation_blocks(embedding_dim: int) -> list[slice]:
    """Columns of each block: the binary digits of embedding_dim from the left, so 50 are 32, 16 and 2."""
    sizes = [1 << digit for digit in reversed(range(embedding_dim.bit_length())) if embedding_dim >> digit & 1]
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def rotate(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotate rows, float32 [N, d]: each value by its column's sign, then each block by its Hadamard matrix."""
    return _multiply_by_hadamard(rows * rotation_signs(rows.shape[1]))


def rotate_back(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo rotate: both of its factors are their own inverses. No zero that comes out is negative."""
    return _multiply_by_hadamard(rows) * rotation_signs(rows.shape[1]) + F32(0)


def _multiply_by_hadamard(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply each block of n columns by the Hadamard matrix in Sylvester's order, divided by sqrt(n).

    In stages h = 1, 2, 4, .., n / 2: columns h apart, a and b, become a + b and a - b. The factor comes last.
    """
    out = np.empty_like(rows)
    for block in rotation_blocks(rows.shape[1]):
        values = rows[:, block]
        n, h = values.shape[1], 1
        while h < n:
            pairs = values.reshape(len(rows), n // (2 * h), 2, h)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            values = np.stack([a + b, a - b], axis=2).reshape(len(rows), n)
            h *= 2
        out[:, block] = values * F32(1 / np.sqrt(n))
    return out


def embedding_bag(
    rows: NDArray[np.float32],
    bags: list[NDArray[np.int64]],
    mode: str,
    per_sample_weights: list[NDArray[np.float32]] | None = None,
    padding_idx: int | None = None,
    dtype: str = "float32",
) -> NDArray[Any]:
    """Pool dequantized rows [N, d], one bag of indices after another; float32 [len(bags), d], or of dtype.

    A sum adds rows in index order, column by column, each addition rounded; with weights it is
    fma(weight, row, sum). A mean is the sum divided by the number of rows that are not padding. An empty bag is
    zeros. Source: torch.nn.functional.embedding_bag.
    """
    out = np.zeros((len(bags), rows.shape[1]), F32)
    for i, bag in enumerate(bags):
        kept = [k for k, index in enumerate(bag) if index != padding_idx]
        if mode == "max" and kept:
            out[i] = rows[bag[kept]].max(axis=0)
            continue
        for k in kept:
            if per_sample_weights is None:
                out[i] += rows[bag[k]]
            else:
                out[i] = fma(per_sample_weights[i][k], rows[bag[k]], out[i])
        if mode == "mean" and kept:
            out[i] /= F32(len(kept))
    return narrow(out, dtype)

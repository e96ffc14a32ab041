"""Values that are stored as codes of a byte and scales, FP8 and INT8: read as float32."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.formats.base import SourceTensor
from embpack.rows import widen


def _list_floats(exponent_bits: int, *, has_infinity: bool) -> NDArray[np.float32]:
    """List the values of the 256 floats of a byte: a sign, an exponent, and the rest of the bits a fraction.

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning", table 1.
    """
    fraction_bits = 7 - exponent_bits
    codes = np.arange(128)
    exponents, fractions = codes >> fraction_bits, codes & ((1 << fraction_bits) - 1)
    bias, top = (1 << (exponent_bits - 1)) - 1, (1 << exponent_bits) - 1
    # An exponent of 0 is that of 1, without the leading bit.
    mantissas = fractions + np.where(exponents > 0, 1 << fraction_bits, 0)
    values = np.ldexp(mantissas.astype(np.float32), np.maximum(exponents, 1) - bias - fraction_bits)
    if has_infinity:
        values[exponents == top] = np.where(fractions[exponents == top], np.nan, np.inf)
    else:
        values[-1] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


CODE_VALUES = {
    "F8_E4M3": _list_floats(4, has_infinity=False),
    "F8_E5M2": _list_floats(5, has_infinity=True),
    "I8": np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32),
}
"""What each of the 256 codes of a type stands for, by its bits, float32 [256]."""

EXPONENT_VALUES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)
"""What each of the 256 scales of F8_E8M0 is, float32 [256]: 2^(e - 127), and 255 is NaN.

Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.4.1. Programs that shift e into the exponent of a
float32 take 0 for 0 and 255 for infinity.
"""

# U8 holds F8_E8M0, from programs that have no such type.
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")


def fit_scales(scale: SourceTensor, shape: tuple[int, int]) -> SourceTensor | None:
    """View scales as float32 rows, as many as a table has.

    Args:
        scale: of F32, F16, BF16 or F8_E8M0: of shape [], [1] or [1, 1] one for all values, [rows] or [rows, 1] one for
            each row, [rows, blocks] one for each block of as many columns; of U8, which is F8_E8M0, the last alone.
        shape: of the table, (rows, columns).

    Returns:
        float32 [rows, blocks], blocks being 1 where there is one for all columns; None if the scale is of no such type
        or shape.
    """
    rows, columns = shape
    if scale.dtype not in _SCALE_DTYPES:
        return None
    is_by_blocks = len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0
    if is_by_blocks and columns % scale.shape[1] == 0:
        blocks = scale.shape[1]
    elif scale.dtype != "U8" and scale.shape in ((), (1,), (1, 1)):
        return SourceTensor(scale.name, (rows, 1), "F32", partial(_iter_repeated, scale), None)
    elif scale.dtype != "U8" and scale.shape == (rows,):
        blocks = 1
    else:
        return None
    return SourceTensor(scale.name, (rows, blocks), "F32", partial(_iter_scales, scale, blocks), None)


def _iter_repeated(scale: SourceTensor, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    [value] = _widen_scales(scale.read(), scale.dtype).reshape(-1)
    return (np.full((min(n, stop - at), 1), value) for at in range(start, stop, n))


def _iter_scales(scale: SourceTensor, blocks: int, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    return (_widen_scales(rows, scale.dtype).reshape(-1, blocks) for rows in scale.chunks(n, start, stop))


def _widen_scales(scales: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return EXPONENT_VALUES[scales] if scales.dtype == np.uint8 else widen(scales)


def multiply(codes: SourceTensor, scales: SourceTensor) -> SourceTensor:
    """Make a table of float32 values of codes and their scales: each code times its scale, rounded once.

    Args:
        codes: [rows, columns] of a type in CODE_VALUES.
        scales: float32 [rows, blocks], as fit_scales makes them; each for columns / blocks columns.
    """
    read = partial(_iter_products, codes, scales)
    return SourceTensor(codes.name, codes.shape, "F32", read, None, num_pieces=codes.num_pieces)


def _iter_products(
    codes: SourceTensor, scales: SourceTensor, start: int, stop: int, n: int
) -> Iterator[NDArray[np.float32]]:
    """Yield rows [start, stop), n at a time; the next ones overwrite them."""
    room = np.empty((min(n, stop - start), codes.shape[1]), np.float32)
    for rows, own in zip(codes.chunks(n, start, stop), scales.chunks(n, start, stop), strict=True):
        out = room[: len(rows)]
        _native.multiply_codes(rows.view(np.uint8), CODE_VALUES[codes.dtype], own, out)
        yield out

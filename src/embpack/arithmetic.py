"""Arithmetic to the same bits on every machine: in float32 as the kernels do it, and what chooses how to pack.

NumPy's logarithms, powers, dot products and long sums differ in last bits with the CPU, with its version and with its
BLAS; single operations, of which all here is made, and roots do not.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
_LN2 = 0.6931471805599453
# Values that are squared together.
_VALUES_AT_A_TIME = 1 << 18


def fma(a: Any, b: Any, c: Any) -> NDArray[np.float32]:
    """Fused multiply-add in float32: a * b + c, rounded once, for finite operands.

    The product of two float32 is exact in float64. Their float64 sum with c is made to round to odd (Boldo and
    Melquiond 2008), after which rounding it to float32 is the only rounding that counts.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        of_addend = total - product
        error = (product - (total - of_addend)) + (addend - of_addend)
        even = (total.view(np.int64) & 1) == 0
        toward_error = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where((error != 0) & even, toward_error, total).astype(F32)


def log2(x: Any) -> NDArray[np.float64]:
    """Logarithm to base 2 of positive numbers, to some 15 digits: that of a number near 1 by atanh's series."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    is_low = fraction < 0.7071067811865476
    fraction, exponent = np.where(is_low, 2 * fraction, fraction), np.where(is_low, exponent - 1, exponent)
    z = (fraction - 1) / (fraction + 1)
    square, series = z * z, np.zeros_like(z)
    for k in range(23, 0, -2):
        series = series * square + 1 / k
    return np.asarray(exponent + z * series * (2 / _LN2))


def exp2(x: Any) -> NDArray[np.float64]:
    """Powers of 2 of numbers from -1000 to 1000, to some 15 digits: that of a fraction by the exponential series."""
    whole = np.rint(np.asarray(x, np.float64))
    y, series = (x - whole) * _LN2, np.ones_like(whole)
    for k in range(14, 0, -1):
        series = 1 + y * series / k
    return np.ldexp(series, whole.astype(np.int64))


def interpolate(x: Any, xs: NDArray[np.float64], ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find y at x on the line through points of ascending xs; beyond them, that of the first or last."""
    x = np.clip(x, xs[0], xs[-1])
    below = np.searchsorted(xs, x, side="right") - 1
    above = np.minimum(below + 1, len(xs) - 1)
    width = xs[above] - xs[below]
    share = np.divide(x - xs[below], width, out=np.zeros_like(width), where=width > 0)
    return np.asarray(ys[below] + share * (ys[above] - ys[below]))


def sum_along(values: NDArray[Any]) -> NDArray[np.float64]:
    """Sum in float64 along the first axis, of one or more: its second half is added to the first, again and again."""
    left = values.astype(np.float64)
    while len(left) > 1:
        half = len(left) // 2
        rest = left[-half:]
        left = left[:-half]
        left[:half] += rest
    return np.asarray(left[0])


def sum_squares(rows: NDArray[Any]) -> float:
    """Sum the squares of all values of rows [n, d], a few rows at a time."""
    step = max(1, _VALUES_AT_A_TIME // rows.shape[1])
    parts = (rows[start : start + step].astype(np.float64).reshape(-1) for start in range(0, len(rows), step))
    return math.fsum(float(sum_along(part * part)) for part in parts)

"""Arithmetic in float32 as the kernels do it, for whatever specifies them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = np.float32


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

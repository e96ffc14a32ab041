"""FP8 (E4M3) itself, as large tables are published: a byte a value, a scale for the table or one for each row."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored
from embpack.rows import narrow, widen

LARGEST, LEAST_EXPONENT, FRACTION_BITS = 448.0, -6, 3


def round_to_e4m3(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to what E4M3 has, to nearest, ties to even; what is beyond its largest becomes that."""
    exponents = np.maximum(np.frexp(values)[1] - 1, LEAST_EXPONENT)  # of a leading bit of weight 1
    steps = np.ldexp(np.float32(1), exponents - FRACTION_BITS)
    rounded: NDArray[np.float32] = np.clip(np.rint(values / steps) * steps, -LARGEST, LARGEST)
    return rounded


def restore(axis: int | None, weight: NDArray[np.float32]) -> Restored:
    """Round values by bfloat16 scales: of the whole table (axis None), or of each row (axis 1)."""
    scales = narrow(np.abs(weight).max(axis=axis, keepdims=True) / np.float32(LARGEST), "bfloat16")
    divisors = widen(scales)
    divisors[divisors == 0] = 1
    return Restored(round_to_e4m3(weight / divisors) * divisors, weight.size + scales.nbytes)


QUANTIZERS = (
    Quantizer("FP8", "E4M3, one scale", partial(restore, None)),
    Quantizer("FP8", "E4M3, a scale a row", partial(restore, 1)),
)

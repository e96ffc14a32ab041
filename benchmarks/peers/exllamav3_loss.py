"""exllamav3: its codec for tables of n-grams, by its formulas in NumPy; exllamav3 itself packs on GPUs alone."""

from functools import partial
from math import gcd

import numpy as np
from numpy.typing import NDArray

from benchmarks.ngram_codec import decode, encode
from benchmarks.peers.base import Quantizer, Restored

# The search takes up to 40 ms a row at d = 160: one of a hundred rows is packed, and no more than so many.
SHARE, MOST_ROWS = 100, 128


def _restore(bits: int, weight: NDArray[np.float32]) -> Restored:
    """Pack the first rows; the mean that is subtracted, here one for the table, is of all of them."""
    bias = weight.mean(axis=0, dtype=np.float64).astype(np.float16)
    rows = weight[: min(MOST_ROWS, -(-len(weight) // SHARE))]
    packed = encode(rows - bias.astype(np.float32), bits)
    values = (decode(packed, bits) + bias.astype(np.float32)).astype(np.float16)
    return Restored(values.astype(np.float32), packed.nbytes + bias.nbytes * len(rows) // len(weight))


QUANTIZERS = tuple(
    Quantizer("exllamav3", f"n-gram codec, K = {bits}", partial(_restore, bits), 16 // gcd(16, bits))
    for bits in range(2, 7)
)

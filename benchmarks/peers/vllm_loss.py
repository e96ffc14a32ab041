"""vLLM: rows of 4-bit codes for levels of a normal distribution, "nf4" in its n-gram tables, by its formulas."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored

# Max's (1960), the best sixteen for N(0, 1).
_UPPER = np.array([0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326], np.float32)
LEVELS = np.concatenate([-_UPPER[::-1], _UPPER])
FACTORS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
# Beside the codes of a row: a float16 scale, and two bytes that are nothing.
SCALE_BYTES = 4


def restore(weight: NDArray[np.float32]) -> Restored:
    """Round rows by the best of seven scales around their root mean squares."""
    rms = np.maximum(np.sqrt(np.square(weight).mean(axis=1, keepdims=True)), np.float32(1e-12))
    edges = (LEVELS[1:] + LEVELS[:-1]) / 2
    best, least = np.zeros_like(weight), np.full((len(weight), 1), np.inf, np.float32)
    for factor in FACTORS:
        scales = np.maximum((rms * np.float32(factor)).astype(np.float16).astype(np.float32), np.float32(2**-24))
        values = LEVELS[np.searchsorted(edges, weight / scales)] * scales
        errors = np.square(values - weight).sum(axis=1, keepdims=True)
        best = np.where(errors < least, values, best)
        least = np.minimum(errors, least)
    return Restored(best, len(weight) * (weight.shape[1] // 2 + SCALE_BYTES))


QUANTIZERS = (Quantizer("vLLM", "nf4", restore, 2),)

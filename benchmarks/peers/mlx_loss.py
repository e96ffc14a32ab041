"""MLX: groups of 4-bit codes with a scale and a bias each, by the formulas of mx.quantize."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored

NUM_STEPS = np.float32(15)
LEAST_SCALE = np.float32(1e-7)
PARAM_BYTES = 2 * 2


def restore(group: int, weight: NDArray[np.float32]) -> Restored:
    """Round groups of values by their ranges, moved so that the end of larger magnitude is exact, and 0 too."""
    values = weight.reshape(-1, group)
    least, most = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    is_below = np.abs(least) > np.abs(most)
    scales = np.maximum((most - least) / NUM_STEPS, LEAST_SCALE) * np.where(is_below, np.float32(1), np.float32(-1))
    edges = np.where(is_below, least, most)
    steps = np.rint(edges / scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(steps != 0, edges / steps, scales)
    biases = np.where(steps != 0, edges, np.float32(0))
    codes = np.clip(np.rint((values - biases) / scales), 0, NUM_STEPS)
    scales, biases = (params.astype(np.float16).astype(np.float32) for params in (scales, biases))
    nbytes = weight.size // 2 + len(values) * PARAM_BYTES
    return Restored((codes * scales + biases).reshape(weight.shape), nbytes)


# Groups of 64 are its default; rows of 160 have groups of 32 alone.
QUANTIZERS = tuple(Quantizer("MLX", f"affine, groups of {group}", partial(restore, group), group) for group in (32, 64))

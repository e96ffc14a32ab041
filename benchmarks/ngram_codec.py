"""exllamav3's codec for tables of n-grams, in NumPy: rows of codes on a ring, the last 16 bits of which make a level.

A row is a float16 scale and a ring of K bits a value. Value i is a level times the scale; the level is computed from a
state, which is the 16 bits of the ring that end with code i. So each code counts for all the values whose states it is
in: four at K = 4. No state to begin in is stored, the first states read the last codes. Viterbi's algorithm finds the
codes: all 65,536 states of a step are the branches from 2^(16 - K) nodes, which are what two states in a row share.

Written from the formulas of turboderp-org/exllamav3 (ngram_codec.py, conversion/ngram.py, its kernels), which packs on
GPUs and adds costs in float16. Here they are float32; the errors differ by less than .1 %.
"""

import numpy as np
from numpy.typing import NDArray

STATE_BITS, NUM_STATES = 16, 1 << 16
# By K: what a row's largest value by its root mean square is to be at most, in levels, and the largest such ratio of
# the row's root mean square to a level's.
_PEAKS = {1: 4.0, 2: 3.6, 3: 3.2, 4: 3.0, 5: 3.0, 6: 3.0, 7: 3.0, 8: 3.0}
_MOST_SPREAD = {1: 1.16, 2: 0.98, 3: 0.98, 4: 0.98, 5: 0.95, 6: 0.92, 7: 0.90, 8: 0.86}
_LEAST_SPREAD = 0.55
# Rows that are searched together: four have 40 MB of costs at K = 2; more are no quicker.
_BATCH = 4

F32 = np.float32
Values = NDArray[np.float32]


def make_levels() -> Values:
    """Compute the level of each state, float32 [65,536]: nearly those of a normal distribution."""
    products = np.arange(NUM_STATES, dtype=np.uint32) * np.uint32(0x83DCD12D)
    sums = products.view(np.uint8).reshape(-1, 4).sum(axis=1)
    factor, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(F32)
    levels: Values = ((1024 + sums).astype(F32) * factor + offset).astype(np.float16).astype(F32)
    return levels


LEVELS = make_levels()


def encode(rows: Values, bits: int) -> NDArray[np.uint8]:
    """Pack float32 rows [n, d], d * bits a multiple of 16: uint8 [n, 2 + d * bits / 8]."""
    rms = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    peaks = np.abs(rows).max(axis=1, keepdims=True) / np.maximum(rms, F32(1e-12))
    spread = np.clip(F32(_PEAKS[bits]) / np.maximum(peaks, F32(1e-6)), _LEAST_SPREAD, _MOST_SPREAD[bits])
    scales = (rms / spread).astype(np.float16).astype(F32)
    targets = (rows / np.where(scales > 0, scales, F32(1))).astype(np.float16).astype(F32)
    states = np.concatenate([find_states(targets[i : i + _BATCH], bits) for i in range(0, len(rows), _BATCH)])
    levels = LEVELS[states]
    best = (rows * levels).sum(axis=1) / np.maximum(np.square(levels).sum(axis=1), F32(1e-12))
    ring = states[:, :, None] >> np.arange(bits) & 1
    codes = np.packbits(ring.reshape(len(rows), -1).astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([best.astype("<f2")[:, None].view(np.uint8), codes], axis=1)


def decode(packed: NDArray[np.uint8], bits: int) -> Values:
    """Undo encode: float32 [n, d], exact products of levels and scales."""
    ring = np.unpackbits(packed[:, 2:], axis=1, bitorder="little").reshape(len(packed), -1, bits)
    codes = (ring.astype(np.int64) << np.arange(bits)).sum(axis=2)
    states = np.zeros_like(codes)
    for back in range(-(-STATE_BITS // bits)):
        states |= np.roll(codes, back, axis=1) << (back * bits)
    scales = np.ascontiguousarray(packed[:, :2]).view("<f2").astype(F32)
    values: Values = LEVELS[states & (NUM_STATES - 1)] * scales
    return values


def find_states(targets: Values, bits: int) -> NDArray[np.int64]:
    """Find the states whose levels are nearest to float32 [n, d], on a ring: int64 [n, d].

    Twice along it: from its middle and back there, free to begin and end where it is best, which tells the node at
    position 0; then from this node at position 0 to the same node. This is what the original does, and not always the
    best ring.
    """
    n, d = targets.shape
    from_middle = np.roll(targets, -(d // 2), axis=1)
    costs = _walk(from_middle, np.zeros((n, NUM_STATES >> bits), F32), bits)
    _, nodes = _trace(costs, from_middle, costs[-1].argmin(axis=1), d - d // 2, bits)
    start = np.full((n, NUM_STATES >> bits), np.inf, F32)
    start[np.arange(n), nodes] = 0
    return _trace(_walk(targets, start, bits), targets, nodes, 0, bits)[0]


def _walk(targets: Values, start: Values, bits: int) -> Values:
    """Find the least cost of each node before each step and after the last, [d + 1, n, nodes], by what it is first."""
    n, d = targets.shape
    costs = np.empty((d + 1, *start.shape), F32)
    costs[0] = start
    branches = np.empty((n, NUM_STATES), F32)
    # A state's upper bits are the node that it comes from, its lower bits the one that it goes to.
    from_nodes, to_nodes = branches.reshape(n, -1, 1 << bits), branches.reshape(n, 1 << bits, -1)
    for t in range(d):
        np.subtract(LEVELS, targets[:, t, None], out=branches)
        np.square(branches, out=branches)
        from_nodes += costs[t, :, :, None]
        to_nodes.min(axis=1, out=costs[t + 1])
    return costs


def _trace(
    costs: Values, targets: Values, nodes: NDArray[np.int64], first: int, bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Go back from nodes after the last step to those before step `first`: the states on the way, and these nodes."""
    n, d = targets.shape
    states = np.empty((n, d - first), np.int64)
    for t in reversed(range(first, d)):
        # To keep the costs and look for the best branch here is much quicker than to keep the best branch of each node.
        branches = np.arange(1 << bits) << (STATE_BITS - bits) | nodes[:, None]
        totals = np.square(LEVELS[branches] - targets[:, t, None])
        totals += np.take_along_axis(costs[t], branches >> bits, axis=1)
        states[:, t - first] = branches[np.arange(n), totals.argmin(axis=1)]
        nodes = states[:, t - first] >> bits
    return states, nodes

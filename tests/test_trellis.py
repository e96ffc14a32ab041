"""Trellis-coded rows: the reference against brute force, a reader written from the page alone, and the goals."""

from itertools import product

import numpy as np
import pytest
from test_trellis_kernels import encode_quickly

import embpack
from embpack import _native
from embpack.layouts import trellis
from embpack.layouts.trellis import TrellisFormat, TrellisParameters
from embpack.methods import trellis_search
from embpack.rows import widen


def fit(rows, row_bytes, sample=None, encode=trellis_search.encode):
    """Parameters for rows, from a sample of them, as a table's are found."""
    form = TrellisFormat(rows.shape[1], row_bytes)
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    largest = np.abs(rows - mean).max(axis=1)
    bounds = float(largest[largest > 0].min(initial=np.inf)), float(largest.max())
    return form, trellis_search.fit(rows if sample is None else sample, form, bounds, mean, encode)


def find_steps(form):
    """In the path's order: a value, its block, where in the block it is, and whether its code is a longer one."""
    d, steps = form.embedding_dim, []
    for start in range(0, d, 64):
        count = min(64, d - start)
        left, is_wide = (start + count) * form.num_wide // d - start * form.num_wide // d, {}
        for first in range(0, count, 16):
            lanes = min(16, count - first)
            wide = min(left, lanes)
            is_wide |= {first + i: (i + 1) * wide // lanes > i * wide // lanes for i in range(lanes)}
            left -= wide
        order = [j for i in range(16) for j in range(i, count, 16)]
        steps += [(start + j, start, count, place, is_wide[j]) for place, j in enumerate(order)]
    return steps


def read_row(row, form, parameters):
    """The values of a packed row, bit by bit."""
    bits = [int(byte) >> k & 1 for byte in row[:-1] for k in range(8)]
    d, b = form.embedding_dim, form.narrow_bits
    top_bits = iter(bits[b * d :])
    messages, values = [int(row[-1]) >> k & 1 for k in range(3, 8)], np.empty(d, np.float32)
    for j, start, count, place, is_wide in find_steps(form):
        at = b * start + place
        messages.append(bits[at])
        m, _, m2, m3, _, m5 = messages[:-7:-1]
        index = sum(bits[at + (k + 1) * count] << k for k in range(b - 1))
        if is_wide:
            index += next(top_bits) << (b - 1)
        level = (parameters.wide if is_wide else parameters.narrow)[4 * index + 2 * (m ^ m2 ^ m5) + m3]
        values[j] = np.float32(np.float64(parameters.scales[row[-1]]) * level + parameters.mean[j])
    return values


FORMATS = [(4, 3), (4, 6), (5, 4), (16, 12), (17, 13), (33, 21), (64, 36), (64, 17), (64, 57), (130, 69)]


@pytest.mark.parametrize(("embedding_dim", "row_bytes"), FORMATS)
def test_rows_are_read_as_the_page_says(rng, embedding_dim, row_bytes):
    rows = rng.standard_normal((20, embedding_dim), dtype=np.float32) + 1
    form, parameters = fit(rows, row_bytes, encode=encode_quickly)
    packed = trellis_search.encode(rows, form, parameters)
    assert packed.shape == (20, row_bytes)
    read = [read_row(row, form, parameters) for row in packed[:5]]
    # A product of two float32 is exact in float64, and its sum with a third is rounded twice, seldom otherwise.
    np.testing.assert_array_max_ulp(trellis.decode(packed[:5], form, parameters), np.array(read), maxulp=1)
    assert form.pack(*form.unpack(packed)).tobytes() == packed.tobytes()


@pytest.mark.parametrize("row_bytes", [6, 7])
def test_the_best_path_is_found(rng, row_bytes):
    """Of all states to begin in and all message bits, each with the nearest levels that they allow."""
    rows = rng.standard_normal((20, 7), dtype=np.float32)
    form, parameters = fit(rows, row_bytes)
    y = rows / np.float32(2.5)
    starts = rng.random((20, trellis.NUM_STATES)) < 0.2
    starts[:, 7] = True
    cost, _ = trellis_search._walk(y, starts, form, parameters)
    best = np.full(len(y), np.inf)
    for start, *bits in product(range(trellis.NUM_STATES), *((0, 1) for _ in range(7))):
        subsets = trellis.find_subsets(np.array([bits], np.uint8), np.array([8 * start], np.uint8))[0]
        allowed = [parameters.levels_of(form, t)[subset::4] for t, subset in enumerate(subsets)]
        errors = [
            np.square(y[:, t : t + 1].astype(np.float64) - levels).min(axis=1) for t, levels in enumerate(allowed)
        ]
        best = np.where(starts[:, start], np.minimum(best, np.sum(errors, axis=0)), best)
    np.testing.assert_allclose(cost.min(axis=1), best, rtol=1e-5)


def test_of_all_scales_and_states_the_best_is_found(rng):
    """By the error of the decoded rows, which must be that of the best number of 256, each of them walked by itself."""
    rows = rng.standard_normal((12, 16), dtype=np.float32)
    form, fitted = fit(rows, 9)
    scales = trellis_search.make_scales(np.abs(rows - fitted.mean).max(axis=1), (0.5, 5.0), 16)
    parameters = TrellisParameters(fitted.narrow, fitted.wide, scales, fitted.mean)
    assert len(parameters.grid) == 16
    x = (rows - parameters.mean)[:, form.columns]
    tried = trellis_search._find_tries(np.abs(x).max(axis=1), parameters.grid)
    best = np.full(len(x), np.inf)
    for number in range(1, 256):
        is_tried = (parameters.grid[tried] == scales[number]).any(axis=1)
        starts = np.tile(np.arange(trellis.NUM_STATES) == number >> 3, (len(x), 1))
        cost, _ = trellis_search._walk(x / scales[number], starts, form, parameters)
        best = np.where(is_tried, np.minimum(best, scales[number] ** 2 * cost.min(axis=1)), best)
    found = trellis.decode(trellis_search.encode(rows, form, parameters), form, parameters)
    np.testing.assert_allclose(np.square(found - rows).sum(axis=1), best, rtol=1e-4)


# Loss over greedy's at the same bytes, of rows that the codebook was not fitted to.
@pytest.mark.parametrize(
    ("embedding_dim", "distribution", "most"),
    [(16, "normal", 0.40), (32, "normal", 0.63), (64, "normal", 0.70), (128, "normal", 0.72), (64, "laplace", 0.60)],
)
def test_the_loss_by_greedys(embedding_dim, distribution, most):
    rng = np.random.default_rng(3)
    rows = getattr(rng, distribution)(size=(1000, embedding_dim)).astype(np.float32)
    form, parameters = fit(rows, embedding_dim // 2 + 4, rows[:500], encode_quickly)
    others = rows[500:]
    found = np.linalg.norm(others - trellis.decode(encode_quickly(others, form, parameters), form, parameters))
    greedy = embpack.quantize(others, "greedy")
    assert greedy.row_bytes == form.row_bytes
    assert found <= most * np.linalg.norm(others - greedy.dequantize())


def test_greedys_loss_in_fewer_bytes():
    """At most .88 of greedy's 36 bytes."""
    rows = np.random.default_rng(5).standard_normal((20_000, 64), dtype=np.float32)
    table, greedy = embpack.quantize(rows, "trellis", 3.375), embpack.quantize(rows, "greedy")
    assert table.row_bytes == 31 <= 0.88 * greedy.row_bytes
    assert np.linalg.norm(rows - table.dequantize()) <= np.linalg.norm(rows - greedy.dequantize())


def test_rows_that_are_hard(rng):
    """Rows that are the mean, one value alone, and rows a million times as small as others."""
    rows = np.tile(rng.standard_normal(32).astype(np.float32), (60, 1))
    rows[20:40] += np.eye(20, 32, dtype=np.float32) * 1000
    rows[40:50] += rng.standard_normal((10, 32)).astype(np.float32) * np.float32(1e-3)
    rows[50:] += rng.standard_normal((10, 32)).astype(np.float32)
    form, parameters = fit(rows, 20)
    found = trellis.decode(trellis_search.encode(rows, form, parameters), form, parameters)
    assert np.isfinite(found).all()
    errors, largest = np.linalg.norm(found - rows, axis=1), np.abs(rows - parameters.mean).max(axis=1)
    assert (errors <= 0.5 * largest * np.sqrt(32)).all()
    zeros = np.zeros((20, 32), np.float32)
    form, parameters = fit(zeros, 20)
    packed = trellis_search.encode(zeros, form, parameters)
    assert not packed.any() and not trellis.decode(packed, form, parameters).any()


def test_formats():
    form = TrellisFormat(64, 36)
    assert (form.narrow_bits, form.num_wide, form.num_levels) == (4, 24, (32, 64))
    assert form.columns[:6].tolist() == [0, 16, 32, 48, 1, 17]
    assert form.is_wide[:8].tolist() == [True, False, False, False, True, True, False, False]
    assert form.is_wide.sum() == 24 and form.narrow_bits * 64 + form.num_wide == form.code_bits
    assert (TrellisFormat(4, 6).narrow_bits, TrellisFormat(4, 6).num_wide) == (7, 0)
    with pytest.raises(ValueError, match="a trellis-coded row of 64 values takes at least 17 bytes, not 16"):
        TrellisFormat(64, 16)


@pytest.mark.parametrize("count", trellis_search.GRID_SIZES)
def test_scales(rng, count):
    """They reach from the smallest row to the largest, lie where rows do, and each stands for its share of states."""
    largest = rng.uniform(1.0, 2.0, 500).astype(np.float32)
    scales = trellis_search.make_scales(largest, (0.25, 8.0), count)
    zeros, ones = np.zeros(8, np.float32), np.ones(16, np.float32)
    parameters = TrellisParameters(zeros, ones, scales, zeros[:4])
    grid = parameters.grid
    assert scales.shape == (256,) and scales[0] == 0 and len(grid) == min(count, 255)
    assert grid[0] <= 0.25 and grid[-1] >= 8
    assert np.mean((grid > 0.8) & (grid < 2.5)) >= 0.5
    numbers = parameters.numbers
    assert (np.sort(numbers[numbers > 0]) == np.arange(1, 256)).all()
    for place, states in enumerate(numbers):
        for state, number in enumerate(states):
            assert number == 0 or (scales[number] == grid[place] and number >> 3 == state)
    # Number 0 is another's.
    assert set((numbers > 0).sum(axis=1)) <= {256 // count, 256 // count - 1}


def test_scales_of_rows_that_are_far_apart():
    scales = trellis_search.make_scales(np.ones(4, np.float32), (1e-30, 1.0), 128)
    assert scales[scales > 0].min() == pytest.approx(scales.max() * 2**-16, rel=1e-6)


def test_which_scales_are_tried():
    grid = np.arange(1, 101, dtype=np.float32)
    tried = trellis_search._find_tries(np.array([10, 100, 1e9, 0, 0.1], np.float32), grid)
    assert grid[tried[0]].tolist() == [8, 9, 10, 11, 12, 13, 13, 13, 13, 13, 13, 13]
    assert grid[tried[1]].tolist() == [80, 81, 83, 85, 87, 89, 90, 92, 94, 96, 98, 100]
    assert (grid[tried[2]] == 100).all() and (grid[tried[3:]] == 1).all()


def test_the_codebooks_upper_halves_are_stored():
    form = TrellisFormat(5, 4)
    halves = [np.arange(1, count // 2 + 1, dtype=np.float32) for count in form.num_levels]
    narrow, wide = (np.concatenate([-half[::-1], half]) for half in halves)
    parameters = TrellisParameters(narrow, wide, np.arange(256, dtype=np.float32), np.arange(5, dtype=np.float32))
    joined = parameters.join()
    assert joined.shape == (1, sum(form.num_levels) // 2 + 256 + 5)
    for name in ("narrow", "wide", "scales", "mean"):
        np.testing.assert_array_equal(getattr(TrellisParameters.split(joined, form), name), getattr(parameters, name))


def test_parameters_of_each_step():
    form = TrellisFormat(5, 4)
    narrow, wide = np.zeros(form.num_levels[0], np.float32), np.ones(form.num_levels[1], np.float32)
    parameters = TrellisParameters(narrow, wide, np.zeros(256, np.float32), np.zeros(5, np.float32))
    assert [parameters.levels_of(form, t)[0] for t in range(5)] == form.is_wide.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2_500, 64)])
def test_the_distances_from_the_mean_are_those_of_numpy(rng, dtype, shape):
    rows = rng.standard_normal(shape).astype(np.float32)
    rows = (rows.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else rows.astype(dtype)
    mean = widen(rows).mean(axis=0, dtype=np.float64).astype(np.float32)
    rows[-1] = (mean.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else mean
    distances = np.abs(widen(rows) - mean).max(axis=1)
    assert _native.bound_distances(rows, mean) == (distances[distances > 0].min(initial=np.inf), distances.max())

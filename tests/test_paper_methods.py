"""The paper's other uniform methods: its Figure 1, and each search against its definition, spelled out."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hard_rows import KINDS, hard_rows

import embpack
from embpack import _native, reference
from embpack.layouts import RowFormat
from embpack.methods import Aciq, Gss, HistApprx, HistBrute, parse_method
from embpack.methods.aciq import GAUSSIAN_FACTORS, LAPLACIAN_FACTORS
from embpack.methods.histogram import count_bins
from embpack.reference import normalized_l2_loss, round_trip

# Guan et al. 2019, Figure 1, read off the plot at these embedding_dim.
FIGURE_1 = {
    "greedy-opt": {8: 0.042, 64: 0.081, 512: 0.098, 4096: 0.107},
    "gss": {8: 0.067, 64: 0.090, 512: 0.101, 4096: 0.108},
    "aciq": {8: 0.047, 64: 0.092, 512: 0.104, 4096: 0.109},
    "hist-apprx": {8: 0.047, 64: 0.088, 512: 0.109, 4096: 0.125},
    "hist-brute": {8: 0.044, 64: 0.081, 512: 0.098, 4096: 0.107},
}
READING = 0.002


@pytest.mark.parametrize("embedding_dim", [8, 64, 512, 4096])
@pytest.mark.parametrize("method", FIGURE_1)
def test_losses_are_those_of_figure_1(method, embedding_dim):
    """The figure shows one table of ten rows, so it may be off by what such tables differ by, and by the reading."""
    tables = [
        np.random.default_rng(seed).standard_normal((10, embedding_dim), np.float32)
        for seed in range(200 if embedding_dim < 4096 else 20)
    ]
    losses = [embpack.quantize(table, method).loss for table in tables]
    tolerance = READING + 2 * np.std(losses, ddof=1)
    assert np.mean(losses) == pytest.approx(FIGURE_1[method][embedding_dim], abs=tolerance)


def test_methods_rank_as_in_figure_1(rng):
    rows = rng.standard_normal((1000, 64), np.float32)
    loss = {method: embpack.quantize(rows, method).loss for method in (*FIGURE_1, "asym", "greedy")}
    assert loss["greedy-opt"] == pytest.approx(loss["hist-brute"], rel=0.01)
    assert max(loss["greedy-opt"], loss["hist-brute"], loss["greedy"]) < loss["hist-apprx"] < loss["asym"]
    assert loss["asym"] < min(loss["aciq"], loss["gss"])


def minimize(f, low, high):
    """Minimum of a function with one minimum, by thirds."""
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if f(left) < f(right) else (left, high)
    return (low + high) / 2


def rounding_noise(alpha, bits):
    return (2 * alpha) ** 2 / (12 * 4**bits)


def gaussian_mse(alpha, bits):
    """Banner et al. 2018: clipping N(0, 1) at alpha, then rounding."""
    outside = (1 + alpha**2) * math.erfc(alpha / math.sqrt(2))
    return outside - math.sqrt(2 / math.pi) * alpha * math.exp(-(alpha**2) / 2) + rounding_noise(alpha, bits)


def laplacian_mse(alpha, bits):
    """Banner et al. 2018: clipping the Laplacian with E|X| = 1 at alpha, then rounding."""
    return 2 * math.exp(-alpha) + rounding_noise(alpha, bits)


@pytest.mark.parametrize(("bits", "gaussian", "laplacian"), [(2, 1.71, 2.83), (4, 2.55, 5.03), (8, 3.92, 9.89)])
def test_aciq_factors_minimize_the_expected_error(bits, gaussian, laplacian):
    # Half of the last of six digits, and what a minimum can be told apart by in float64: the root of 2^-53, relative.
    tolerance = 5e-7 + 1e-7
    assert GAUSSIAN_FACTORS[bits] == pytest.approx(minimize(lambda a: gaussian_mse(a, bits), 0, 20), abs=tolerance)
    assert LAPLACIAN_FACTORS[bits] == pytest.approx(minimize(lambda a: laplacian_mse(a, bits), 0, 20), abs=tolerance)
    # The published ones, some of them cut rather than rounded.
    assert GAUSSIAN_FACTORS[bits] == pytest.approx(gaussian, abs=0.01)
    assert LAPLACIAN_FACTORS[bits] == pytest.approx(laplacian, abs=0.01)


@pytest.mark.parametrize("bits", [2, 4])
def test_aciq_tells_gaussian_from_laplacian_rows(rng, bits):
    for draw, factor in ((rng.normal, GAUSSIAN_FACTORS[bits]), (rng.laplace, LAPLACIAN_FACTORS[bits])):
        row = draw(3.0, 0.5, 50_000).astype(np.float32)
        xmin, xmax = Aciq().search(row, RowFormat(len(row), bits))
        # E|X| and sigma of a sample are off by about a 200th, 1 / sqrt(50000).
        assert (xmin + xmax) / 2 == pytest.approx(3, abs=0.02)
        assert (xmax - xmin) / 2 == pytest.approx(factor * 0.5, rel=0.02)


def test_aciq_stays_inside_the_row():
    row = np.array([-1, 0, 0, 0, 0, 0, 0, 1], np.float32)
    assert Aciq().search(row, RowFormat(8)) == (-1, 1)


def integral(begin, end, level):
    return ((end - level) ** 3 - (begin - level) ** 3) / 3


def selection_loss(counts, start, k, bits):
    """The paper's loss of a selection, bin by bin and level by level, in fractions of a bin."""
    top = 2**bits - 1
    levels = [start + Fraction(k * m, top) for m in range(top + 1)]
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    loss = Fraction(0)
    for bin_start, count in enumerate(counts):
        for level, low, high in zip(levels, [-math.inf, *middles], [*middles, math.inf], strict=True):
            begin, end = max(low, Fraction(bin_start)), min(high, Fraction(bin_start + 1))
            if begin < end:
                loss += int(count) * integral(begin, end, level)
    return loss


def small_rows(rng):
    return [
        rng.standard_normal(20).astype(np.float32),
        rng.standard_t(2, 30).astype(np.float32),
        rng.exponential(1, 9).astype(np.float32),
        rng.integers(0, 3, 10).astype(np.float32),
        np.array([0, 0, 0, 0, 0, 0, 100], np.float32),
    ]


@pytest.mark.parametrize(("bits", "b"), [(2, 1), (2, 9), (2, 12), (4, 7), (4, 10)])
def test_hist_brute_is_the_best_of_all_selections(rng, bits, b):
    for row in small_rows(rng):
        histogram = count_bins(row, b)
        selections = [(start, k) for k in range(b, 0, -1) for start in range(b - k + 1)]
        best = min(selections, key=lambda selection: selection_loss(histogram.counts, *selection, bits))
        assert HistBrute(b).search(row, RowFormat(len(row), bits)) == histogram.select(*best)


def approximate(counts, bits):
    """Caffe2's search, one step after the other: (start, number of bins)."""
    steps, b, total = 100_000, len(counts), sum(map(int, counts))
    below = [int(c) for c in np.cumsum(counts)]
    start, end, best, alpha, beta = 0, b - 1, math.inf, 0, steps
    while alpha < beta:
        left, right = start, end
        while left < end and below[left] * steps < (alpha + 1) * total:
            left += 1
        while right > start and below[right] * steps > (beta - 1) * total:
            right -= 1
        moves_left = left - start > end - right
        alpha, beta = (alpha + 1, beta) if moves_left else (alpha, beta - 1)
        selection = (left, end) if moves_left else (start, right)
        if selection == (start, end):
            continue
        loss = selection_loss(counts, selection[0], selection[1] - selection[0] + 1, bits)
        if loss > best:
            break
        best, (start, end) = loss, selection
    return start, end - start + 1


@pytest.mark.parametrize(("bits", "b"), [(2, 12), (4, 10), (4, 31)])
def test_hist_apprx_takes_the_steps_of_its_source(rng, bits, b):
    for row in small_rows(rng):
        histogram = count_bins(row, b)
        wanted = histogram.select(*approximate(histogram.counts, bits))
        assert HistApprx(b).search(row, RowFormat(len(row), bits)) == wanted


@pytest.mark.parametrize("method", ["hist-apprx", "hist-brute"])
def test_more_bins_than_the_kernel_holds_are_refused(method):
    rows, packed = np.ones((1, 2), np.float32), np.empty((1, 5), np.uint8)
    with pytest.raises(ValueError, match="b is more bins than a histogram holds"):
        _native.quantize(rows, method, _native.SearchParams(b=_native.max_bins + 1), 4, True, 32, packed)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", ["hist-apprx", "hist-brute"])
def test_kernels_do_what_the_reference_does_with_other_bins(isa, rng, method, bits):
    for b, num_rows in ((1, 35), (2, 35), (3, 35), (64, 35), (333, 3), (_native.max_bins, 1)):
        rows = rng.standard_normal((num_rows, 50), np.float32)
        spec = f"{method}:b={b}"
        table = embpack.quantize(rows, spec, bits)
        np.testing.assert_array_equal(table.packed, reference.quantize(rows, parse_method(spec), table.row_format))


def scan(row, row_format, thresholds=2000):
    """The smallest loss of many thresholds, evenly spread over (0, max|X|]."""
    largest = np.abs(row).max()
    candidates = largest * np.arange(1, thresholds + 1, dtype=np.float32) / np.float32(thresholds)
    return min(normalized_l2_loss(row, round_trip(row, -t, t, row_format)) for t in candidates)


@pytest.mark.parametrize("bits", [2, 4])
def test_gss_finds_the_minimum_that_a_scan_finds(rng, bits):
    """Wide rows have one minimum, all but some ripple."""
    for row in rng.standard_normal((3, 4096)).astype(np.float32):
        row_format = RowFormat(4096, bits, "float32")
        loss = normalized_l2_loss(row, round_trip(row, *Gss().search(row, row_format), row_format))
        assert loss <= 1.002 * scan(row, row_format)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gss_never_loses_more_than_sym(bits):
    for kind in KINDS:
        row = hard_rows(65, bits)[kind][None]
        gss, sym = (embpack.quantize(row, m, bits, "float32").loss for m in ("gss", "sym"))
        # GSS compares sums in float64; the table's loss is summed in float32 (test_kernels.assert_loss_close).
        assert gss <= sym * (1 + 36 * 2.0**-24)

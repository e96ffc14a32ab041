"""OPTIMAL against the exact optimum, and against the searches that it must never be worse than."""

from functools import cache
from itertools import product

import numpy as np
import pytest
from hard_rows import hard_table

import embpack
from embpack import reference
from embpack.methods import Optimal, parse_method

UNIT_ROUNDOFF = 2.0**-24
EFFORTS = ("fast", "normal")


def regression_loss(x, codes, w):
    """The weighted squared error of the best scale and bias for codes [..., d]."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    centred = codes - (codes @ w / w.sum())[..., None]
    x = x - x @ w / w.sum()
    spread = centred**2 @ w
    covariance = centred @ (w * x)
    gain = np.divide(covariance**2, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return w @ x**2 - gain


def exact_loss(x, bits, w=None):
    """The least weighted squared error of a row of distinct values on any uniform grid, in real arithmetic.

    In the plane of scale s and bias b codes change on the lines b + s (k + 1/2) = x_i only, and the cell of the optimum
    touches one. Along a line, as s falls, x_j's code changes where s = (x_j - x_i) / (m - k), m another threshold; each
    change updates the sums of the regression.
    """
    w = np.ones(len(x)) if w is None else w.astype(np.float64)[np.argsort(x)]
    x = np.sort(x.astype(np.float64))
    x -= (w @ x) / w.sum()
    n, square, least = w.sum(), w @ x**2, np.inf
    thresholds = np.arange(2**bits - 1)
    for i, k in product(range(len(x)), thresholds):
        difference = x - x[i]
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = difference[:, None] / (thresholds - k)
        j, m = np.nonzero((scales > 0) & np.isfinite(scales))
        order = np.argsort(-scales[j, m], kind="stable")
        j, m = j[order], m[order]
        sign = np.sign(difference[j])
        codes = np.where(difference > 0, k + 1, k)  # of x_i k, or by one more
        totals = codes @ w + np.concatenate([[0], np.cumsum(sign * w[j])])
        sums_of_squares = codes**2 @ w + np.concatenate([[0], np.cumsum(sign * (2 * m + 1) * w[j])])
        sums_of_products = codes @ (w * x) + np.concatenate([[0], np.cumsum(sign * (w * x)[j])])
        for more in (0, 1):
            total = totals + more * w[i]
            squares = sums_of_squares + more * (2 * k + 1) * w[i]
            products = sums_of_products + more * w[i] * x[i]
            spread = n * squares - total**2
            gain = np.divide(n * products**2, spread, out=np.zeros_like(spread), where=spread > 1e-9 * n * squares)
            least = min(least, square - gain.max())
    return least


@pytest.mark.parametrize("embedding_dim", [2, 3, 5, 6])
def test_the_exact_optimum_is_the_best_of_all_codes(rng, embedding_dim):
    """Codes of any order are among all, but the best ones are those of some grid."""
    every = np.array(list(product(range(4), repeat=embedding_dim)), float)
    rows = rng.standard_normal((5, embedding_dim), dtype=np.float32)
    for x, w in product(
        rows, (np.ones(embedding_dim, np.float32), rng.gamma(1, size=embedding_dim).astype(np.float32))
    ):
        least = regression_loss(x, every, w).min()
        assert exact_loss(x, 2, w) == pytest.approx(least, abs=1e-12)
        table = embpack.quantize(x[None], "optimal:effort=exact", 2, "float32", error_weights=w)
        # Codes, scale and bias are float32, and the error of a code is half a scale at most: 2^-22 of it, squared.
        assert w @ (x - table.dequantize()[0].astype(np.float64)) ** 2 == pytest.approx(least, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("embedding_dim", "bits"), [(4, 4), (16, 4), (40, 4), (40, 2)])
def test_exact_effort_finds_the_exact_optimum(rng, embedding_dim, bits, weighted):
    rows = np.concatenate([rng.standard_normal((10, embedding_dim)), rng.laplace(size=(10, embedding_dim)) + 3])
    rows = rows.astype(np.float32)
    weights = rng.gamma(0.5, size=rows.shape).astype(np.float32) if weighted else np.ones_like(rows)
    table = embpack.quantize(rows, "optimal:effort=exact", bits, "float32", error_weights=weights if weighted else None)
    found = (weights * np.square(rows - table.dequantize(), dtype=np.float64)).sum(axis=1)
    exact = np.array([exact_loss(x, bits, w) for x, w in zip(rows, weights, strict=True)])
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-9)


def test_weighted_errors_are_measured_and_made_smaller(rng):
    rows, columns = rng.standard_normal((300, 32), dtype=np.float32), rng.gamma(0.3, size=32).astype(np.float32)
    plain, weighted = (embpack.quantize(rows, "optimal", error_weights=w) for w in (None, columns))

    def loss(table):
        errors = np.square(rows.astype(np.float64) - table.dequantize())
        return np.sqrt((errors * columns).sum() / (np.square(rows, dtype=np.float64) * columns).sum())

    assert weighted.loss == pytest.approx(loss(weighted), rel=1e-6)
    assert loss(weighted) < 0.8 * loss(plain)
    # The weight of a row moves nothing in it, and counts in the loss.
    by_rows = embpack.quantize(rows, "optimal", error_weights=np.eye(300, dtype=np.float32)[:, :1] * 4)
    np.testing.assert_array_equal(by_rows.packed[0], plain.packed[0])
    assert by_rows.loss == pytest.approx(embpack.quantize(rows[:1], "optimal").loss, rel=1e-6)


def test_wrong_error_weights_are_named(rng):
    rows = rng.standard_normal((30, 8), dtype=np.float32)
    with pytest.raises(ValueError, match="method 'greedy' has no error_weights; choose 'optimal'"):
        embpack.quantize(rows, "greedy", error_weights=np.ones(8))
    with pytest.raises(ValueError, match=r"error_weights have shape \[30\]; .*\[8\] by columns, \[30, 1\] by rows"):
        embpack.quantize(rows, "optimal", error_weights=np.ones(30))
    for wrong in (-1, np.nan, np.inf):
        weights = np.ones((30, 8))
        weights[3, 2] = wrong
        with pytest.raises(ValueError, match=r"error_weights\[3, 2\] is .*; weights are finite and at least 0"):
            embpack.quantize(rows, "optimal", error_weights=weights)


@cache
def sixty_rows(embedding_dim):
    """Normal rows, and the sum of their exact losses at 4 bits."""
    rows = np.random.default_rng(7).standard_normal((60, embedding_dim), dtype=np.float32)
    return rows, sum(exact_loss(x, 4) for x in rows)


# Sixty rows: the share of the exact loss that is added, which the issue of speed against quality is settled by.
@pytest.mark.parametrize(
    ("embedding_dim", "effort", "most"),
    [(16, "normal", 0.01), (32, "normal", 0.004), (64, "normal", 0.0015), (64, "fast", 0.007)],
)
def test_the_loss_is_close_to_the_exact_optimum(embedding_dim, effort, most):
    rows, exact = sixty_rows(embedding_dim)
    table = embpack.quantize(rows, f"optimal:effort={effort}")
    found = np.square(rows - table.dequantize(), dtype=np.float64).sum()
    assert 1 <= np.sqrt(found / exact) <= 1 + most


def row_losses(rows, method, bits, param_dtype):
    errors = rows.astype(np.float64) - embpack.quantize(rows, method, bits=bits, param_dtype=param_dtype).dequantize()
    return np.square(errors).sum(axis=1)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("embedding_dim", [1, 2, 7, 16, 33, 64, 130, 1030])
def test_no_row_loses_more_than_by_greedy(rng, effort, bits, param_dtype, embedding_dim):
    """Losses are compared in float32: (d + 8) / 2 roundings each, and a squared loss has them twice."""
    offset = rng.choice([0, 0, 3, 300], (200, 1))
    rows = [
        *(rng.standard_normal((200, embedding_dim)), rng.laplace(size=(200, embedding_dim)) + offset),
        hard_table(embedding_dim, bits, param_dtype),
    ]
    rows = np.concatenate(rows).astype(np.float32)
    optimal, greedy = (row_losses(rows, m, bits, param_dtype) for m in (f"optimal:effort={effort}", "greedy"))
    assert np.all(optimal <= greedy * (1 + (embedding_dim + 8) * UNIT_ROUNDOFF))


def test_efforts():
    assert parse_method("optimal") == Optimal(effort="normal") == parse_method("optimal:effort=normal")
    assert parse_method("optimal:effort=fast").spec == "optimal:effort=fast"
    with pytest.raises(ValueError, match="optimal: effort is 'most'; choose one of fast, normal, exact"):
        parse_method("optimal:effort=most")


@pytest.mark.parametrize(("param_dtype", "weighted"), [("float16", False), ("float16", True), ("float32", False)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("embedding_dim", [7, 20])
@pytest.mark.filterwarnings("ignore:weight.*no better than zeros")
def test_no_row_loses_more_than_zeros_would(isa, rng, embedding_dim, bits, param_dtype, weighted):
    """Of rows about as small as float16 parameters can tell apart, and much smaller ones."""
    sizes = 10.0 ** np.linspace(-9, -4, 20)[:, None]
    rows = (rng.standard_normal((20, embedding_dim)) + rng.choice([0, 0, 3, -5], (20, 1))) * sizes
    rows = np.concatenate([rows, np.zeros((1, embedding_dim))]).astype(np.float32)
    weights = rng.gamma(0.5, size=rows.shape).astype(np.float32) if weighted else np.ones_like(rows)
    table = embpack.quantize(
        rows, "optimal:effort=fast", bits, param_dtype, error_weights=weights if weighted else None
    )
    method = Optimal("fast")
    for x, w, packed in zip(rows, weights, table.packed, strict=True):
        xmin, xmax = method.search(x, table.row_format, w if weighted else None)
        np.testing.assert_array_equal(packed, reference.pack_row(x, xmin, xmax, table.row_format))
    errors, squares = (
        (np.square(part, dtype=np.float64) * weights).sum(axis=1) for part in (rows - table.dequantize(), rows)
    )
    # Losses are compared in float32, which rounds each term of the sums a few times.
    assert np.all(errors <= squares * (1 + 4 * (embedding_dim + 10) * UNIT_ROUNDOFF))


def test_rows_that_float16_parameters_lose_are_counted(rng):
    rows = rng.standard_normal((200, 32), dtype=np.float32)
    rows[50:150] *= 1e-8
    lost = r"^weight: 100 of its rows come back no better than zeros would: .* param_dtype='float32' .* 'trellis'$"
    with pytest.warns(UserWarning, match=lost):
        assert embpack.quantize(rows[50:150]).loss == pytest.approx(1, abs=1e-6)
    for method, param_dtype in (("optimal", "float32"), ("trellis", None)):
        assert embpack.quantize(rows[50:150], method, param_dtype=param_dtype).loss < 0.15
    # Beside rows that are a hundred million times as large they do not matter.
    assert embpack.quantize(rows).loss < 0.15

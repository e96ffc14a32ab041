"""OPTIMAL against the exact optimum, and against the searches that it must never be worse than."""

from itertools import product

import numpy as np
import pytest
from hard_rows import hard_table

import embpack
from embpack.methods import Optimal, parse_method

UNIT_ROUNDOFF = 2.0**-24
EFFORTS = ("fast", "normal")


def regression_loss(x, codes):
    """The squared error of the best scale and bias for codes [..., d]."""
    centred = codes - codes.mean(axis=-1, keepdims=True)
    spread = (centred**2).sum(axis=-1)
    covariance = centred @ (x - x.mean())
    gain = np.divide(covariance**2, spread, out=np.zeros_like(spread), where=spread > 0)
    return ((x - x.mean()) ** 2).sum() - gain


def exact_loss(x, bits):
    """The least squared error of a row of distinct values on any uniform grid, in real arithmetic.

    In the plane of scale s and bias b codes change on the lines b + s (k + 1/2) = x_i only, and the cell of the optimum
    touches one. Along a line, as s falls, x_j's code changes where s = (x_j - x_i) / (m - k), m another threshold; each
    change updates the sums of the regression.
    """
    x = np.sort(x.astype(np.float64)) - x.astype(np.float64).mean()
    n, square, least = len(x), (x**2).sum(), np.inf
    thresholds = np.arange(2**bits - 1)
    for i, k in product(range(n), thresholds):
        difference = x - x[i]
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = difference[:, None] / (thresholds - k)
        j, m = np.nonzero((scales > 0) & np.isfinite(scales))
        order = np.argsort(-scales[j, m], kind="stable")
        j, m = j[order], m[order]
        sign = np.sign(difference[j])
        for own in (k, k + 1):
            codes = np.where(difference > 0, k + 1, k)
            codes[i] = own
            total = codes.sum() + np.concatenate([[0], np.cumsum(sign)])
            squares = (codes**2).sum() + np.concatenate([[0], np.cumsum(sign * (2 * m + 1))])
            products = codes @ x + np.concatenate([[0], np.cumsum(sign * x[j])])
            spread = n * squares - total**2
            gain = np.divide(n * products**2, spread, out=np.zeros_like(spread), where=spread > 0.5)
            least = min(least, square - gain.max())
    return least


@pytest.mark.parametrize("embedding_dim", [2, 3, 5, 6])
def test_the_exact_optimum_is_the_best_of_all_codes(rng, embedding_dim):
    """Codes of any order are among all, but the best ones are those of some grid."""
    every = np.array(list(product(range(4), repeat=embedding_dim)), float)
    for x in rng.standard_normal((5, embedding_dim)):
        assert exact_loss(x, 2) == pytest.approx(regression_loss(x, every).min(), abs=1e-12)


# Sixty rows: the share of the exact loss that is added, which the issue of speed against quality is settled by.
@pytest.mark.parametrize(
    ("embedding_dim", "effort", "most"),
    [(16, "normal", 0.01), (32, "normal", 0.004), (64, "normal", 0.0015), (64, "fast", 0.007)],
)
def test_the_loss_is_close_to_the_exact_optimum(embedding_dim, effort, most):
    rows = np.random.default_rng(7).standard_normal((60, embedding_dim), dtype=np.float32)
    exact = sum(exact_loss(x, 4) for x in rows)
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
    with pytest.raises(ValueError, match="optimal: effort is 'most'; choose one of fast, normal"):
        parse_method("optimal:effort=most")

"""ACIQ: a closed form for the clipping threshold (Banner et al. 2018; Guan et al. 2019, section 3)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row

# alpha / sigma of a Gaussian and alpha / E|X - E X| of a Laplacian, by bits: the minima of the mean squared error that
# clipping at alpha makes, plus that of rounding, (2 alpha)^2 / (12 * 4^bits).
GAUSSIAN_FACTORS = {2: 1.710635, 4: 2.559136, 8: 3.924035}
LAPLACIAN_FACTORS = {2: 2.830683, 4: 5.028640, 8: 9.896760}
# E|X - E X| / sigma above which a row is likelier under its Gaussian than under its Laplacian.
LIKELIER_GAUSSIAN = math.sqrt(math.pi / (2 * math.e))


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.float64:
    """Mean, summed in order."""
    return np.float64(np.add.accumulate(values)[-1] / len(values))


@dataclass(frozen=True)
class Aciq(UniformMethod):
    """Clips at ``E X - alpha`` and ``E X + alpha``, where that is inside the row's own range.

    alpha is ``2.56 * sigma`` at 4 bits if the row looks Gaussian, ``5.03 * E|X - E X|`` if it looks Laplacian. It looks
    like the one under which it is likelier, each with its parameters fitted to the row. The mean log-likelihoods are
    ``-log(sigma * sqrt(2 pi e))`` and ``-log(2 e E|X - E X|)``.

    Source: Banner, Nahshan, Hoffer and Soudry 2018, Post training 4-bit quantization of convolutional networks for
    rapid-deployment; the paper's ACIQ. How to tell the distributions apart is our choice; it gives the losses of
    the paper's Figure 1.
    """

    name: ClassVar[str] = "aciq"
    kernel: ClassVar[str] = "aciq"
    summary: ClassVar[str] = "a closed form for Gaussian and Laplacian rows; to compare"

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return mean -+ alpha, within the bounds of the row."""
        values = x.astype(np.float64)
        mean = _mean(values)
        spread = _mean(np.abs(values - mean))
        sigma = np.sqrt(_mean((values - mean) ** 2))
        if spread > LIKELIER_GAUSSIAN * sigma:
            alpha = GAUSSIAN_FACTORS[row_format.bits] * sigma
        else:
            alpha = LAPLACIAN_FACTORS[row_format.bits] * spread
        xmin, xmax = x.min(), x.max()
        return F32(mean - alpha) if mean - alpha > xmin else xmin, F32(mean + alpha) if mean + alpha < xmax else xmax

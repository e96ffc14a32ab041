"""Figure 1: normalized l2 loss of every method on ten rows of normal values, by embedding_dim."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from experiments.guan2019.report import Entry, Result, mean
from experiments.guan2019.series import LLOYD, OUR_GREEDY, SERIES, Series

DIMS = tuple(2**k for k in range(3, 15))
ROWS = 10
# The paper's numbers are read off its plot: that is as far as a reading may be wrong, and as the line is thick.
READING_ERROR = 0.004

PAPER: dict[str, tuple[float, ...]] = {
    "TABLE": (0.102, 0.100, 0.117, 0.108, 0.126, 0.137, 0.129, 0.141, 0.154, 0.160, 0.164, 0.178),
    "ASYM": (0.047, 0.065, 0.079, 0.089, 0.099, 0.107, 0.112, 0.123, 0.134, 0.142, 0.149, 0.153),
    "HIST-APPRX": (0.047, 0.065, 0.077, 0.088, 0.098, 0.106, 0.109, 0.116, 0.123, 0.125, 0.127, 0.126),
    "HIST-BRUTE": (0.044, 0.057, 0.070, 0.081, 0.087, 0.096, 0.098, 0.103, 0.107, 0.107, 0.107, 0.107),
    "GSS": (0.067, 0.072, 0.090, 0.090, 0.097, 0.101, 0.101, 0.105, 0.108, 0.108, 0.108, 0.108),
    "ACIQ": (0.047, 0.064, 0.079, 0.092, 0.098, 0.104, 0.104, 0.108, 0.110, 0.109, 0.109, 0.109),
    "GREEDY": (0.042, 0.057, 0.070, 0.081, 0.087, 0.097, 0.100, 0.120, 0.134, 0.142, 0.149, 0.153),
    "GREEDY (opt)": (0.042, 0.057, 0.070, 0.081, 0.087, 0.096, 0.098, 0.104, 0.107, 0.107, 0.107, 0.107),
    "KMEANS": (0.0, 0.0, 0.035, 0.057, 0.074, 0.084, 0.092, 0.097, 0.100, 0.101, 0.102, 0.101),
}

LEGEND = (
    f"Ours: mean over the seeds. The paper's is one draw, read off a plot: ! is a difference beyond {READING_ERROR}",
    "that no seed of ours explains, ~ one that lies within what the seeds range over (one draw may be like that).",
)


@dataclass(frozen=True)
class Sizes:
    """How much to measure: embedding_dim of each point, and the number of draws averaged over."""

    dims: Sequence[int] = DIMS
    seeds: int = 30


def run(sizes: Sizes) -> Result:
    """Measure every series at every width.

    Args:
        sizes: how much.
    """
    chosen = [SERIES[name] for name in (*PAPER, LLOYD, OUR_GREEDY)]
    points = [(series, d) for series in chosen for d in sizes.dims if d <= series.widest]
    entries = [_measure(series, d, sizes.seeds) for series, d in track(points, "Figure 1", transient=True)]
    title = f"Figure 1: normalized l2 loss, {ROWS} rows from N(0, 1), by embedding_dim"
    settings = {"rows": ROWS, "seeds": sizes.seeds}
    return Result("fig1", title, settings, entries, list(LEGEND))


def _measure(series: Series, d: int, seeds: int) -> Entry:
    """Mean and range of the loss over the draws, which are the same for every series."""
    losses = []
    for seed in range(seeds):
        rows = np.random.default_rng([seed, d]).standard_normal((ROWS, d), dtype=np.float32)
        loss = series.quantize(rows).loss
        assert loss is not None
        losses.append(loss)
    paper = _find_paper(series.name, d)
    details = {"low": min(losses), "high": max(losses), "standard_deviation": float(np.std(losses))}
    return Entry(series.name, d, paper, mean(losses), _flag(paper, losses), details)


def _find_paper(name: str, d: int) -> float | None:
    return PAPER[name][DIMS.index(d)] if name in PAPER and d in DIMS else None


def _flag(paper: float | None, losses: Sequence[float]) -> str:
    """See LEGEND."""
    if paper is None or abs(mean(losses) - paper) <= READING_ERROR:
        return ""
    within = min(losses) - READING_ERROR <= paper <= max(losses) + READING_ERROR
    return "~" if within else "!"

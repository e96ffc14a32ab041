"""The picture of a report: bytes a row, loss and speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import Standing
from benchmarks.report import Report
from embpack.layouts import RowFormat

OURS, THEIRS, INK, FAINT = "#0b7a75", "#b4b8bf", "#22262b", "#6b7178"
SHOWN_DIM = 64
SHOWN_METHODS = ("optimal", "trellis")


def draw(report: Report, path: Path) -> None:
    """Draw three panels to a PNG file.

    Args:
        report: with races of asym, optimal and trellis, PyTorch among the contestants, at embedding_dim 64.
        path: of the file.

    Raises:
        ValueError: the report lacks these races.
    """
    races = {method: _find_races(report, method) for method in ("asym", *SHOWN_METHODS)}
    if any(SHOWN_DIM not in each or "PyTorch" not in each[SHOWN_DIM] for each in races.values()):
        raise ValueError(f"the picture needs PyTorch and races at d = {SHOWN_DIM}; add {SHOWN_DIM} to --dims")
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "text.color": INK})
    figure, (size, loss, speed) = plt.subplots(
        1, 3, figsize=(12, 3.6), dpi=160, facecolor="white", width_ratios=(0.8, 1.5, 1.7)
    )
    _draw_bytes(size)
    _draw_losses(loss, {method: each[SHOWN_DIM] for method, each in races.items()})
    _draw_speeds(speed, races["optimal"])
    figure.tight_layout(w_pad=3.5)
    figure.savefig(path)
    plt.close(figure)


def _find_races(report: Report, method: str) -> Mapping[int, Mapping[str, Standing]]:
    """Standings by embedding_dim and contestant, of the races on one thread."""
    wanted = {"method": method, "threads": 1}
    races = [race for race in report.races if wanted.items() <= race.settings.items()]
    return {race.settings["embedding_dim"]: {found.name: found for found in race.standings} for race in races}


def _draw_bytes(axes: Axes) -> None:
    fp32, packed = 4 * SHOWN_DIM, RowFormat(SHOWN_DIM).row_bytes
    _draw_bars(axes, {"float32": fp32, "embpack\n4 bits": packed}, "{:.0f}")
    _set_title(axes, f"{fp32 / packed:.1f}x smaller", f"bytes a row, d = {SHOWN_DIM}")


def _draw_losses(axes: Axes, races: Mapping[str, Mapping[str, Standing]]) -> None:
    losses = {
        "min/max\nPyTorch": races["asym"]["PyTorch"].loss,
        "greedy\nPyTorch": races["optimal"]["PyTorch"].loss,
        **{f"{method}\nembpack": races[method]["embpack"].loss for method in SHOWN_METHODS},
    }
    _draw_bars(axes, {name: 100 * loss for name, loss in losses.items() if loss is not None}, "{:.2f}%", theirs=2)
    first, *_, last = losses.values()
    assert first is not None and last is not None  # Races of packing measure it.
    _set_title(axes, f"{1 - last / first:.0%} less loss", f"normalized l2, d = {SHOWN_DIM}, normal values, equal bytes")


def _draw_bars(axes: Axes, bars: Mapping[str, float], label: str, *, theirs: int = 1) -> None:
    colors = [THEIRS] * theirs + [OURS] * (len(bars) - theirs)
    drawn = axes.bar(list(bars), list(bars.values()), color=colors, width=0.55)
    axes.bar_label(drawn, fmt=label, padding=4, fontsize=12, fontweight="bold")
    axes.set_ylim(0, max(bars.values()) * 1.14)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelsize=10.5, colors=INK)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(THEIRS)


def _draw_speeds(axes: Axes, races: Mapping[int, Mapping[str, Standing]]) -> None:
    dims = list(races)
    for name, label, color in (("embpack", "embpack\noptimal", OURS), ("PyTorch", "PyTorch\ngreedy", FAINT)):
        rates = [races[d][name].rows_per_second for d in dims]
        axes.plot(dims, rates, color=color, linewidth=2.4, marker="o", markersize=6, clip_on=False)
        axes.text(dims[-1] * 1.3, rates[-1], label, color=color, fontweight="bold", fontsize=12, va="center")
    for d in dims:
        _draw_ratio(axes, d, races[d]["embpack"], races[d]["PyTorch"])
    _set_log_axes(axes, dims)
    ratio = races[SHOWN_DIM]["PyTorch"].ratio
    assert ratio is not None
    _set_title(axes, f"{ratio.median:.0f}x faster search", "rows packed a second by d, one thread")


def _set_log_axes(axes: Axes, dims: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(dims, [str(d) for d in dims])
    axes.set_yticks([1e4, 1e5, 1e6], ["10 k", "100 k", "1 M"])
    axes.minorticks_off()
    axes.set_xlim(dims[0] / 1.4, dims[-1] * 2.6)
    axes.set_ylim(1e3, 3e6)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _draw_ratio(axes: Axes, d: int, ours: Standing, theirs: Standing) -> None:
    """Join the two points of a width and write the ratio between them."""
    assert theirs.ratio is not None
    low, high = theirs.rows_per_second, ours.rows_per_second
    axes.plot([d, d], [low * 1.3, high / 1.3], color=THEIRS, linewidth=1, linestyle=(0, (2, 3)), zorder=0)
    axes.annotate(
        f"{theirs.ratio.median:.0f}x",
        (d, (low * high) ** 0.5),
        ha="center",
        va="center",
        fontsize=10.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _set_title(axes: Axes, headline: str, what: str) -> None:
    axes.set_title(headline, loc="left", fontsize=15, fontweight="bold", color=INK, pad=28)
    axes.text(0, 1.055, what, transform=axes.transAxes, color=FAINT, fontsize=10.5)

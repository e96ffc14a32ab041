"""The paper's plots, with our numbers beside its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.guan2019.figure2 import KERNEL, NUMPY
from experiments.guan2019.figure2 import PAPER as FIGURE2
from experiments.guan2019.report import Entry, Result
from experiments.guan2019.series import LLOYD, OUR_GREEDY

# One look a series, in both figures: color, marker.
STYLES = {
    "TABLE": ("#7f7f7f", "s"),
    "ASYM": ("#1f77b4", "o"),
    "HIST-APPRX": ("#9467bd", "v"),
    "HIST-BRUTE": ("#8c564b", "D"),
    "GSS": ("#ff7f0e", "^"),
    "ACIQ": ("#bcbd22", "<"),
    "GREEDY": ("#d62728", "x"),
    "GREEDY (opt)": ("#e377c2", "+"),
    "KMEANS": ("#2ca02c", "*"),
    LLOYD: ("#98df8a", "h"),
    OUR_GREEDY: ("#0b7a75", "P"),
}
WIDTHS = "embedding_dim (log2)"


def draw_figure1(result: Result, path: Path) -> None:
    """Draw the paper's losses and ours, which have the range over the seeds behind them."""
    figure, (paper, ours) = plt.subplots(1, 2, figsize=(12, 5), dpi=140, sharey=True)
    _draw_lines(paper, result.entries, lambda entry: entry.paper)
    _draw_lines(ours, result.entries, lambda entry: entry.ours)
    for name, entries in _group(result.entries).items():
        low, high = ([entry.details[end] for entry in entries] for end in ("low", "high"))
        ours.fill_between([_log2(entry) for entry in entries], low, high, color=STYLES[name][0], alpha=0.08, lw=0)
    paper.set_title("Guan et al. 2019, Figure 1 (read off)")
    ours.set_title(f"embpack, mean of {result.settings['seeds']} draws and their range")
    _finish(figure, (paper, ours), "normalized l2 loss", path)


def draw_figure2(result: Result, path: Path) -> None:
    """Draw the paper's times, of which we have the ends, those of the references and those of the kernels."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), dpi=140, sharey=True)
    dims = [3, 14]
    for name, ends in FIGURE2.items():
        color, marker = STYLES[name]
        panels[0].plot(dims, ends, color=color, marker=marker, label=name)
    for panel, kind in zip(panels[1:], (NUMPY, KERNEL), strict=True):
        suffix = f", {kind}"
        _draw_lines(panel, [e for e in result.entries if e.series.endswith(suffix)], lambda entry: entry.ours, suffix)
    titles = ("Guan et al. 2019, Figure 2 (its ends)", "embpack, NumPy references", "embpack, kernels")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
    _finish(figure, panels, "time a row, ms (log10)", path)


def _group(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.series, []).append(entry)
    return groups


def _log2(entry: Entry) -> int:
    return int(entry.column).bit_length() - 1


def _draw_lines(axes: Axes, entries: Sequence[Entry], value: Callable[[Entry], float | None], suffix: str = "") -> None:
    for series, group in _group(entries).items():
        shown = [(_log2(entry), number) for entry in group if (number := value(entry)) is not None]
        if shown:
            name = series.removesuffix(suffix)
            color, marker = STYLES[name]
            axes.plot(*zip(*shown, strict=True), color=color, marker=marker, markersize=6, lw=1.4, label=name)


def _finish(figure: Figure, panels: Sequence[Axes], label: str, path: Path) -> None:
    for axes in panels:
        axes.set_xlabel(WIDTHS)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    shown = [name for name in STYLES if name in lines]
    panels[-1].legend(
        [lines[name] for name in shown], shown, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

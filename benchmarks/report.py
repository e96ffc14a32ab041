"""What a run found, as JSON and as tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.cores import MOST_LOST, Busyness
from benchmarks.harness import Spread, Standing
from benchmarks.streaming import MemoryUse
from embpack.cli import show


@dataclass(frozen=True)
class RaceResult:
    """A race's settings (method or case, embedding_dim, table_bytes, threads) and where its contestants stand."""

    settings: dict[str, Any]
    standings: list[Standing]


@dataclass(frozen=True)
class Report:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
    busyness: Busyness
    left_out: dict[str, str]
    races: list[RaceResult]
    streaming: list[MemoryUse]


def print_report(report: Report) -> None:
    """Print the machine and the tables."""
    print_machine(report.machine, report.left_out)
    print_busyness(report.busyness)
    _print_races(report.races)
    if report.streaming:
        _print_streaming(report.streaming)


def print_machine(machine: dict[str, Any], left_out: dict[str, str]) -> None:
    """Print where figures come from, and who is missing."""
    versions = (f"{name} {version or '(missing)'}" for name, version in machine["versions"].items())
    best = "" if machine["isa"] == machine["best_isa"] else f" (the CPU has {machine['best_isa']})"
    show.output.print(f"{machine['cpu']}, {machine['isa']}{best}, Python {machine['python']}")
    show.output.print(", ".join(versions))
    for peer, reason in left_out.items():
        show.output.print(f"{peer} is left out: {reason}")


def print_busyness(busyness: Busyness) -> None:
    """Print what each CPU lost to others, and whether that is too much."""
    losses = "; ".join(f"CPU {own.cpu} {100 * own.before:.0f} %, {100 * own.after:.0f} %" for own in busyness.cpus)
    show.output.print(f"lost to others, before and after: {losses}")
    if not busyness.worth_quoting:
        most = f"{100 * MOST_LOST:.0f} %"
        show.output.print(f"A CPU lost more than {most}: these figures are not worth quoting.", style="yellow")


def _print_races(races: Iterable[RaceResult]) -> None:
    show.output.print()
    shown = show.start_table(
        "Packing to 4 bits. Rows/s: fastest round; ratio: our rate by theirs, median of rounds",
        ("contestant", "isa", "M rows/s", "loss", "ratio", "quartiles", "goal", ""),
        text_columns=2,
        left=("",),
        drop=("loss",),
    )
    for race in races:
        method, d, table_bytes = (race.settings[key] for key in ("method", "embedding_dim", "table_bytes"))
        shown.add_row("")
        shown.add_row(f"{method}, d = {d}, {table_bytes / 2**20:.0f} MB")
        for standing in race.standings:
            shown.add_row(*_describe(standing))
    show.output.print(shown)


def _describe(standing: Standing) -> tuple[str, ...]:
    loss = "" if standing.loss is None else f"{standing.loss:.5f}"
    found = (f"{standing.rows_per_second / 1e6:.3f}", loss, *describe_ratio(standing.ratio))
    return standing.name, standing.isa, *found, *describe_goal(standing)


def describe_ratio(ratio: Spread | None) -> tuple[str, str]:
    """Return the median and the quartiles, as shown: of three digits."""
    if ratio is None:
        return "", ""
    median, low, high = (
        f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}" for value in (ratio.median, ratio.low, ratio.high)
    )
    return median, f"{low}..{high}"


def describe_goal(standing: Standing) -> tuple[str, str]:
    """Return the goal, and whether the median meets it, as shown."""
    if standing.goal is None or standing.ratio is None:
        return "", ""
    return f"{standing.goal:g}", "met" if standing.ratio.median >= standing.goal else "missed"


def _print_streaming(streaming: Iterable[MemoryUse]) -> None:
    show.output.print()
    shown = show.start_table(
        "embpack.quantize_file: MB at the peak",
        ("method", "d", "MB", "M rows/s", "anonymous", "file-mapped", "resident"),
    )
    for use in streaming:
        sizes = (use.peak_anonymous_bytes, use.peak_mapped_bytes, use.peak_resident_bytes)
        shown.add_row(
            use.method,
            str(use.embedding_dim),
            f"{use.table_bytes / 2**20:.0f}",
            f"{use.rows_per_second / 1e6:.3f}",
            *(f"{size / 2**20:.0f}" for size in sizes),
        )
    show.output.print(shown)

"""What a run found, as JSON and as tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
    left_out: dict[str, str]
    races: list[RaceResult]
    streaming: list[MemoryUse]


def print_report(report: Report) -> None:
    """Print the machine and the tables."""
    print_machine(report.machine, report.left_out)
    _print_races(report.races)
    if report.streaming:
        _print_streaming(report.streaming)


def print_machine(machine: dict[str, Any], left_out: dict[str, str]) -> None:
    """Print where figures come from, and who is missing."""
    versions = (f"{name} {version or '(missing)'}" for name, version in machine["versions"].items())
    show.output.print(f"{machine['cpu']}, {machine['isa']}, Python {machine['python']}")
    show.output.print(", ".join(versions))
    for peer, reason in left_out.items():
        show.output.print(f"{peer} is left out: {reason}")


def _print_races(races: Iterable[RaceResult]) -> None:
    show.output.print()
    shown = show.start_table(
        "Packing to 4 bits. Rows/s: fastest round; ratio: our rate by theirs, median of rounds",
        ("contestant", "M rows/s", "loss", "ratio", "quartiles"),
    )
    for race in races:
        method, d, table_bytes = (race.settings[key] for key in ("method", "embedding_dim", "table_bytes"))
        shown.add_row("")
        shown.add_row(f"{method}, d = {d}, {table_bytes / 2**20:.0f} MB")
        for standing in race.standings:
            shown.add_row(*_describe(standing))
    show.output.print(shown)


def _describe(standing: Standing) -> tuple[str, str, str, str, str]:
    loss = "" if standing.loss is None else f"{standing.loss:.5f}"
    return standing.name, f"{standing.rows_per_second / 1e6:.3f}", loss, *describe_ratio(standing.ratio)


def describe_ratio(ratio: Spread | None) -> tuple[str, str]:
    """Return the median and the quartiles, as shown."""
    return ("", "") if ratio is None else (f"{ratio.median:.2f}", f"{ratio.low:.2f}..{ratio.high:.2f}")


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

"""What a run found, as JSON and as tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Spread, Standing
from benchmarks.streaming import MemoryUse


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
    console = Console()
    print_machine(console, report.machine, report.left_out)
    console.print(_make_races_table(report.races))
    if report.streaming:
        console.print(_make_streaming_table(report.streaming))


def print_machine(console: Console, machine: dict[str, Any], left_out: dict[str, str]) -> None:
    """Print where figures come from, and who is missing."""
    versions = (f"{name} {version or '(missing)'}" for name, version in machine["versions"].items())
    console.print(f"{machine['cpu']}, {machine['isa']}, Python {machine['python']}")
    console.print(", ".join(versions))
    for peer, reason in left_out.items():
        console.print(f"{peer} is left out: {reason}")


def make_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """Make an empty table: headers of text, then headers of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, no_wrap=True, justify="right")
    return table


def _make_races_table(races: Iterable[RaceResult]) -> Table:
    table = make_table(
        "Packing to 4 bits. Rows/s: fastest round; ratio: our rate by theirs, median of rounds",
        ("method", "d", "MB", "contestant"),
        ("M rows/s", "loss", "ratio", "quartiles"),
    )
    for race in races:
        method, d, table_bytes = (race.settings[key] for key in ("method", "embedding_dim", "table_bytes"))
        for place, standing in enumerate(race.standings):
            of_race = ("", "", "") if place else (method, str(d), f"{table_bytes / 2**20:.0f}")
            table.add_row(*of_race, *_describe(standing))
        table.add_section()
    return table


def _describe(standing: Standing) -> tuple[str, str, str, str, str]:
    loss = "" if standing.loss is None else f"{standing.loss:.5f}"
    return standing.name, f"{standing.rows_per_second / 1e6:.3f}", loss, *describe_ratio(standing.ratio)


def describe_ratio(ratio: Spread | None) -> tuple[str, str]:
    """Return the median and the quartiles, as shown."""
    return ("", "") if ratio is None else (f"{ratio.median:.2f}", f"{ratio.low:.2f}..{ratio.high:.2f}")


def _make_streaming_table(streaming: Iterable[MemoryUse]) -> Table:
    table = make_table(
        "embpack.quantize_file: MB at the peak",
        ("method", "d", "MB"),
        ("M rows/s", "anonymous", "file-mapped", "resident"),
    )
    for use in streaming:
        sizes = (use.peak_anonymous_bytes, use.peak_mapped_bytes, use.peak_resident_bytes)
        table.add_row(
            use.method,
            str(use.embedding_dim),
            f"{use.table_bytes / 2**20:.0f}",
            f"{use.rows_per_second / 1e6:.3f}",
            *(f"{size / 2**20:.0f}" for size in sizes),
        )
    return table

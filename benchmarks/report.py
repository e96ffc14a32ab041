"""What a run found, as JSON and as tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Standing
from benchmarks.streaming import MemoryUse


@dataclass(frozen=True)
class RaceResult:
    """A race's settings (method, embedding_dim, table_bytes, threads) and where its contestants stand."""

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
    versions = (f"{name} {version or '(missing)'}" for name, version in report.machine["versions"].items())
    console.print(f"{report.machine['cpu']}, {report.machine['isa']}, Python {report.machine['python']}")
    console.print(", ".join(versions))
    for peer, reason in report.left_out.items():
        console.print(f"{peer} is left out: {reason}")
    console.print(_make_races_table(report.races))
    if report.streaming:
        console.print(_make_streaming_table(report.streaming))


def _make_table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, no_wrap=True, justify="right")
    return table


def _make_races_table(races: Iterable[RaceResult]) -> Table:
    table = _make_table(
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
    ratio = standing.ratio
    shown = ("", "") if ratio is None else (f"{ratio.median:.2f}", f"{ratio.low:.2f}..{ratio.high:.2f}")
    return standing.name, f"{standing.rows_per_second / 1e6:.3f}", f"{standing.loss:.5f}", *shown


def _make_streaming_table(streaming: Iterable[MemoryUse]) -> Table:
    table = _make_table(
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

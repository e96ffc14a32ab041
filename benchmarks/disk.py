"""Rows that stay on the disk: lookups against what the disk gives, and against a mapped file."""

import argparse
import json
import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack
from benchmarks.cores import Busyness, watch
from benchmarks.disk_file import TABLE, TableFile, compile_bare_loop, describe_disk, write_table
from benchmarks.harness import Contestant, Standing, Timing, Workload, describe_machine, race
from benchmarks.report import RaceResult, describe_goal, describe_ratio, print_busyness, print_machine
from embpack.cli import show
from embpack.layouts import RowFormat

DIMS, BATCHES = (64, 160), (256, 2048, 16384, 65536)
# Our rate by theirs: the bare loop's, that of a file mapped without advice, ours without a prefetch, a mapped file's.
BARE, PLAINLY_MAPPED, UNPREPARED, CACHED = 0.85, 20.0, 5.0, 0.7
PREFETCHED_SECONDS = 0.05
# A mapped file is asked for no more rows than these: each takes as long as the disk takes for one, or for megabytes.
MAPPED_ROWS, PLAINLY_MAPPED_ROWS = 4096, 256
MEMORY_LOOKUPS, MOST_MEGABYTES = 100_000, 200
# A call is one sample: the page cache is made ready before each.
ONE_CALL = 1e-9
EPILOG = """
The file is removed in the end. Ratios are our rate by theirs, and goals what they should be: .85 of the bare loop (64
threads that read rows and do nothing else), 20 times a file that is mapped without advice to the kernel, as embpack
mapped it before, 5 times as fast if rows were prefetched 50 ms before, and .7 of a mapped file where all is in the page
cache. Of mapped files 4,096 and 256 rows of a batch are looked up at most; their rate does not depend on it.
"""

Call = Callable[[], Any]


class Stage:
    """What all contestants share: rows to look up, and room for one open file.

    Each call has rows of its own, so that no cache of the disk's has them; only the first ones of a race, whose answers
    are compared, are everybody's.
    """

    def __init__(self, file: TableFile) -> None:
        self.file = file
        self._random = np.random.default_rng(1)
        self._call: Call | None = None
        self.start(1)

    def start(self, batch: int) -> None:
        """Begin a race of calls of so many rows."""
        self._batch = batch
        self._first = self._draw(batch)

    def enter(
        self,
        name: str,
        open: Callable[[NDArray[np.int64]], Call],
        place: Callable[[], None],
        rows: int | None = None,
        goal: float | None = None,
    ) -> Contestant[Any]:
        """Make a contestant.

        Args:
            name: its name.
            open: makes a call of rows; untimed, before each call.
            place: puts the file's pages in the page cache, or takes them out of it, before that.
            rows: of a batch, at most.
            goal: as a Contestant has it.
        """
        batch, first, answered = self._batch, self._first, list[bool]()
        count = min(rows or batch, batch)

        def make_ready() -> None:
            self._call = None  # the page cache keeps what a map has
            place()
            indices = self._draw(batch) if answered else first
            answered.append(True)
            self._call = open(indices[:count])

        def call() -> Any:
            assert self._call is not None
            return self._call()

        return Contestant(name, call, count, make_ready, goal=goal)

    def _draw(self, batch: int) -> NDArray[np.int64]:
        return self._random.integers(0, self.file.num_embeddings, batch)


def list_races(file: TableFile, batches: Sequence[int]) -> Iterator[Workload[Any]]:
    """Make the races of all sizes of batches: those with an empty page cache first."""
    read = compile_bare_loop(file)  # with as many reads under way as ours has
    differ = partial(find_difference, file.row_format)

    def open_table(access: Any, indices: NDArray[np.int64]) -> Call:
        return partial(embpack.load(file.path, access=access)[TABLE].gather, indices)

    def open_prefetched(access: Any, indices: NDArray[np.int64]) -> Call:
        table = embpack.load(file.path, access=access)[TABLE]
        table.prefetch(indices)
        time.sleep(PREFETCHED_SECONDS)
        return partial(table.gather, indices)

    def open_plainly(indices: NDArray[np.int64]) -> Call:
        shape = (file.num_embeddings, file.row_format.row_bytes)
        mapped = np.memmap(file.path, np.uint8, "r", file.offset, shape)
        return partial(embpack.PackedTable(mapped, file.row_format).gather, indices)

    def start(case: str, batch: int) -> dict[str, Any]:
        stage.start(batch)
        sizes = {"embedding_dim": file.row_format.embedding_dim, "table_bytes": file.path.stat().st_size}
        return {"case": case, "batch": batch, **sizes}

    stage = Stage(file)
    disk, mapped = partial(open_table, "disk"), partial(open_table, "mapped")
    for batch in batches:
        settings = start("nothing in the page cache", batch)
        enter = partial(stage.enter, place=file.empty_cache)
        others = [
            enter("bare loop", lambda indices: partial(read, indices), goal=BARE),
            enter("mapped", mapped, rows=MAPPED_ROWS),
            enter("mapped without advice", open_plainly, rows=PLAINLY_MAPPED_ROWS, goal=PLAINLY_MAPPED),
        ]
        yield Workload(settings, enter("disk", disk), others, differ)
        for access in ("disk", "mapped"):
            settings = start(f"prefetched {PREFETCHED_SECONDS * 1e3:.0f} ms before", batch)
            enter = partial(stage.enter, place=file.empty_cache, rows=batch if access == "disk" else MAPPED_ROWS)
            ours = enter(f"{access}, prefetched", partial(open_prefetched, access))
            yield Workload(settings, ours, [enter(access, partial(open_table, access), goal=UNPREPARED)], differ)
    file.fill_cache()
    known = embpack.load(file.path)[TABLE]
    known.packed[:: mmap.PAGESIZE // file.row_format.row_bytes, 0].sum()  # a byte of each page
    for batch in batches:
        settings = start("all in the page cache", batch)
        enter = partial(stage.enter, place=lambda: None)
        others = [
            enter("mapped, pages seen for the first time", mapped, goal=CACHED),
            enter("mapped, pages seen before", lambda indices: partial(known.gather, indices), goal=CACHED),
        ]
        yield Workload(settings, enter("disk", disk), others, differ)


def find_difference(row_format: RowFormat, ours: NDArray[Any], theirs: NDArray[Any]) -> str | None:
    """Say what is wrong if values, or packed rows, are not those of the same rows; there may be fewer of them."""
    if theirs.dtype == np.uint8:
        theirs = embpack.PackedTable(theirs, row_format).dequantize()
    wrong = np.flatnonzero((ours[: len(theirs)] != theirs).any(axis=1))
    return f"row {wrong[0]} of the batch" if len(wrong) else None


# Prints the peak of resident memory before and after, in KiB.
_SERVER = """
import sys
import numpy as np
import embpack

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

path, access, count, at_a_time = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
random, before = np.random.default_rng(2), peak()
[table] = embpack.load(path, access=access).values()
for start in range(0, count, at_a_time):
    table.gather(random.integers(0, len(table), min(at_a_time, count - start)))
print(before, peak())
"""


@dataclass(frozen=True)
class Resident:
    """The most memory that a process had in use, pages of mapped files included.

    Attributes:
        before_bytes: when it had imported embpack.
        peak_bytes: after MEMORY_LOOKUPS random rows.
    """

    embedding_dim: int
    access: str
    lookups_at_a_time: int
    before_bytes: int
    peak_bytes: int


def measure_resident(file: TableFile, access: str, at_a_time: int) -> Resident:
    """Look random rows up in a process of its own."""
    file.empty_cache()
    sizes = (str(MEMORY_LOOKUPS), str(at_a_time))
    command = [sys.executable, "-c", _SERVER, str(file.path), access, *sizes]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    before, peak = (int(kilobytes) * 1024 for kilobytes in found)
    return Resident(file.row_format.embedding_dim, access, at_a_time, before, peak)


@dataclass(frozen=True)
class DiskReport:
    """Everything that a run found."""

    machine: dict[str, Any]
    busyness: Busyness
    races: list[RaceResult]
    resident: list[Resident]


def run(folder: Path, gigabytes: float, dims: Iterable[int], batches: Sequence[int], rounds: int) -> tuple[Any, Any]:
    """Run all races, and measure memory."""
    races, resident = [], []
    for dim in dims:
        with write_table(folder, gigabytes, dim) as file:
            resident += [measure_resident(file, "disk", at_a_time) for at_a_time in (256, MEMORY_LOOKUPS)]
            for workload in list_races(file, batches):
                races.append(RaceResult(workload.settings, race(workload, Timing(rounds, ONE_CALL))))
                show.output.print(f"{describe_race(workload.settings)}: done", style="dim")
    return races, resident


def describe_race(settings: dict[str, Any]) -> str:
    """Name a race."""
    return f"{settings['case']}, d = {settings['embedding_dim']}, {settings['batch']:,} rows"


def print_report(report: DiskReport) -> None:
    """Print the machine, the races and the memory."""
    print_machine(report.machine, {})
    show.output.print(f"disk: {report.machine['disk']}")
    print_busyness(report.busyness)
    show.output.print()
    shown = show.start_table(
        "Gathering random rows. Rows/s: fastest round; ratio: our rate by theirs, median of rounds",
        ("contestant", "rows", "K rows/s", "ratio", "quartiles", "goal", ""),
        text_columns=1,
        left=("",),
    )
    for found in report.races:
        shown.add_row("")
        shown.add_row(describe_race(found.settings))
        for standing in found.standings:
            shown.add_row(*_describe(standing))
    show.output.print(shown)
    for use in report.resident:
        goal = "met" if use.peak_bytes < MOST_MEGABYTES * 1e6 else "missed"
        show.output.print(
            f"{MEMORY_LOOKUPS:,} lookups, d = {use.embedding_dim}, {use.lookups_at_a_time:,} at a time: at most "
            f"{use.peak_bytes / 1e6:.0f} MB resident, {use.before_bytes / 1e6:.0f} MB of it before the first; goal "
            f"{MOST_MEGABYTES} MB {goal}"
        )


def _describe(standing: Standing) -> tuple[str, ...]:
    rate = f"{standing.rows_per_second / 1e3:.1f}"
    return standing.name, f"{standing.rows:,}", rate, *describe_ratio(standing.ratio), *describe_goal(standing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it, and print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disk",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=Path(gettempdir()), help="folder on the disk to measure")
    parser.add_argument("--gb", type=float, default=4, metavar="N", help="of packed rows (default: 4)")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, metavar="D", help="values a row (default: 64 160)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help="rows a call")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="calls of each contestant (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    chosen = parser.parse_args(arguments)
    (races, resident), busyness = watch(lambda: run(chosen.dir, chosen.gb, chosen.dims, chosen.batches, chosen.rounds))
    machine = describe_machine(("embpack", "numpy")) | {"disk": describe_disk(chosen.dir)}
    report = DiskReport(machine, busyness, races, resident)
    print_report(report)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()

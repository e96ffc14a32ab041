"""Updating a packed file beside packing it: the time that a few rows take, and what becomes of them."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import embpack
from benchmarks.cores import watch
from benchmarks.harness import describe_machine
from benchmarks.streaming import table_file
from embpack.cli import show

GOAL = 0.05
"""Time of an update of one row in a hundred, by the time of packing all."""

EPILOG = """
A table of normal values is packed into a file, then the rows of a Parquet delta, in random order, are updated in it.
Both end on the disk. First all is compared: changed rows must be those of a table that is packed anew, all others as
they were, checksums right. Of several updates in turn the median counts; packing, which takes longest, is timed once.

  python -m benchmarks.update                                     the goal's size; 3 GB in $TMPDIR
  python -m benchmarks.update --rows 200000 --rounds 3            a smoke test, in seconds
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.update",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=10_000_000, metavar="N", help="of the table (default: %(default)s)")
    add("--dim", type=int, default=64, metavar="D", help="values a row (default: %(default)s)")
    add("--share", type=float, default=0.01, metavar="S", help="of the rows that change (default: %(default)s)")
    add("--method", default="optimal", metavar="METHOD", help="that packs (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="updates (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="of both (default: all CPUs)")
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def write_delta(path: Path, ids: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
    """Write a delta as TorchEasyRec does."""
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * rows.shape[1])
    lists = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
    names = pa.array(["embedding"] * len(ids))
    pq.write_table(pa.table({"table_fqn": names, "key_id": ids, "embedding": lists}), path)


def check(packed: Path, updated: Path, ids: NDArray[np.int64], rows: NDArray[np.float32], method: str) -> None:
    """Compare an updated file with the old one and with rows packed anew.

    Raises:
        SystemExit: they differ.
    """
    before, after = (embpack.load(path, verify=True)["embedding.weight"] for path in (packed, updated))
    wanted = np.array(before.packed)
    wanted[ids] = embpack.quantize(rows, method).packed
    if not np.array_equal(wanted, after.packed):
        raise SystemExit("the updated file does not have the bytes of a table that is packed anew")


class Seconds(NamedTuple):
    """How long a call took, and of that all CPUs for it."""

    elapsed: float
    of_cpus: float

    def __str__(self) -> str:
        return f"{self.elapsed:.2f} s, {self.of_cpus:.2f} s of CPUs"


@dataclass(frozen=True)
class Figures:
    """What packing and updates took; of the file the bytes, and the rows that changed."""

    packing: Seconds
    updates: list[Seconds]
    num_bytes: int
    num_changed: int

    @property
    def update(self) -> Seconds:
        """What an update took, of each the median."""
        return Seconds(*map(median, zip(*self.updates, strict=True)))

    @property
    def ratio(self) -> Seconds:
        """An update by packing."""
        return Seconds(*(own / all_rows for own, all_rows in zip(self.update, self.packing, strict=True)))


def measure(folder: Path, rows: int, dim: int, share: float, method: str, rounds: int) -> Figures:
    """Pack, update, compare, and time updates."""
    packed, updated, delta = (folder / name for name in ("packed.safetensors", "updated.safetensors", "delta.parquet"))
    rng = np.random.default_rng(1)
    ids = rng.permutation(rows)[: max(1, round(share * rows))]
    changed = rng.standard_normal((len(ids), dim), np.float32)
    write_delta(delta, ids, changed)
    with table_file(rows, dim) as source:
        packing = time_call(lambda: embpack.quantize_file(source, packed, method=method))
    embpack.update_file(packed, [delta], updated)
    check(packed, updated, ids, changed, method)
    updates = [time_call(lambda: embpack.update_file(packed, [delta], updated)) for _ in range(rounds)]
    return Figures(packing, updates, packed.stat().st_size, len(ids))


def time_call(run: Callable[[], object]) -> Seconds:
    """Time a call."""
    started, of_cpus = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - started, time.process_time() - of_cpus)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    options = parse_arguments(arguments)
    if options.threads is not None:
        embpack.set_num_threads(options.threads)
    sizes = options.rows, options.dim, options.share, options.method, options.rounds
    with tempfile.TemporaryDirectory() as folder:
        figures, busyness = watch(lambda: measure(Path(folder), *sizes))
    machine, verdict = describe_machine(), "met" if figures.ratio.elapsed <= GOAL else "missed"
    for line in (
        f"{machine['cpu']}, {machine['isa']}, threads: {embpack.get_num_threads()}",
        f"{options.rows:,} x {options.dim} by {options.method}, {show.size(figures.num_bytes)}; "
        f"{figures.num_changed:,} rows change, and have the bytes of a table that is packed anew",
        f"packing  {figures.packing}",
        f"updating {figures.update}; {len(figures.updates)} in turn, from {min(figures.updates).elapsed:.2f} s on",
        f"ratio    {figures.ratio.elapsed:.3f}, and {figures.ratio.of_cpus:.3f} of CPUs; the goal, {GOAL} at most, is "
        f"{verdict}",
        "" if busyness.worth_quoting else "the CPUs were busy: run it again",
    ):
        show.output.print(line)
    if options.json is not None:
        value = {"machine": machine, **asdict(figures), "ratio": figures.ratio.elapsed, "goal": GOAL}
        options.json.write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()

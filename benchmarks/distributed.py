"""Packing by the workers of Ray on this machine, by as many threads of one process: the same table, the same bytes."""

import argparse
import filecmp
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray

import embpack
from benchmarks.cores import watch
from benchmarks.harness import Contestant, Timing, Workload, describe_machine, race
from benchmarks.streaming import table_file
from embpack.cli import show
from embpack.ray import Engine

DIM, GIGABYTES, METHODS, WORKERS, ROUNDS, GOAL = 64, 4.0, ("optimal",), 2, 3, 0.9
SAMPLE_SECONDS = 0.2
# One call a sample: it takes long enough.
_ONE_CALL = 1e-9
_TICKS = os.sysconf("SC_CLK_TCK")

EPILOG = """
Ray is started before, and its workers by a first run, of which memory and CPU time are told. Then both pack the same
table in turns, each into a folder that is removed before. A ratio is Ray's rate by that of threads within a round.
"""


@dataclass
class Process:
    """A process of Ray, or the driver: its peak memory, and the CPU time that it took while it was watched."""

    name: str
    peak_bytes: int
    cpu_seconds: float


@dataclass
class Use:
    """What a run took: the wall time, the most that lay in the object store, and of each process its own."""

    seconds: float
    store_bytes: int
    processes: list[Process]


def measure_use(run: Callable[[], object]) -> Use:
    """Run something on Ray, and watch its processes."""
    before, stop, most = _read_cpu_seconds(), threading.Event(), [0]

    def watch_store() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            total, free = (each.get("object_store_memory", 0) for each in (_total(), ray.available_resources()))
            most[0] = max(most[0], int(total - free))

    watcher, start = threading.Thread(target=watch_store), time.perf_counter()
    watcher.start()
    try:
        run()
    finally:
        stop.set()
        watcher.join()
    seconds = time.perf_counter() - start
    processes = [
        Process(_name(process), _read_peak(process), own - before.get(process, 0.0))
        for process, own in _read_cpu_seconds().items()
    ]
    return Use(seconds, most[0], sorted(processes, key=lambda process: -process.cpu_seconds))


def _total() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()
    return found


def _list_processes() -> Iterator[int]:
    """List this process and all that it has started, and they."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    yield from found


def _read_cpu_seconds() -> dict[int, float]:
    seconds = {}
    for process in _list_processes():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        seconds[process] = (int(fields[11]) + int(fields[12])) / _TICKS
    return seconds


def _read_peak(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _name(process: int) -> str:
    if process == os.getpid():
        return "driver"
    words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    name = words[0] if words else ""
    if "python" in name:
        name = next((word for word in words if word.endswith(".py")), name)
    return Path(name).name


@contextmanager
def _started(workers: int) -> Iterator[float]:
    """Start Ray; yields the seconds that it took."""
    start = time.perf_counter()
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield time.perf_counter() - start
    finally:
        ray.shutdown()


def find_difference(ours: Path, theirs: Path) -> str | None:
    """Say which file of two folders differs, if one does."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (ours, theirs)]
    if names[0] != names[1]:
        return f"the files are {names[0]} and {names[1]}"
    _, others, faults = filecmp.cmpfiles(ours, theirs, names[0], shallow=False)
    return f"{[*others, *faults]}" if others or faults else None


def make_contestant(
    name: str, source: Path, method: str, rows: int, workers: int, goal: float | None
) -> Contestant[Path]:
    """Make one that packs a file into a folder: by Ray, or by threads."""
    folder = source.parent / name
    engine = Engine() if name == "ray" else None

    def pack() -> Path:
        embpack.quantize_file(source, folder, method=method, engine=engine)
        return folder

    def make_ready() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        embpack.set_num_threads(workers)

    return Contestant(name, pack, rows, make_ready, goal=goal)


def measure(method: str, options: argparse.Namespace) -> None:
    """Race both by one method, and print what came of it."""
    rows = int(options.gb * 2**30) // (4 * options.dim)
    with table_file(rows, options.dim) as source:
        make = partial(make_contestant, source=source, method=method, rows=rows, workers=options.workers)
        ours, theirs = make("ray", goal=None), make("threads", goal=GOAL)
        ours.make_ready()
        use = measure_use(ours.call)
        workload = Workload({"method": method}, ours, [theirs], find_difference)
        own, other = race(workload, Timing(options.rounds, _ONE_CALL))
    assert other.ratio is not None and other.goal is not None
    show.output.print(
        f"{method}: {rows:,} x {options.dim}: Ray {own.rows_per_second:,.0f} rows a second, threads "
        f"{other.rows_per_second:,.0f}; ratio {other.ratio.median:.3f} ({other.ratio.low:.3f} to "
        f"{other.ratio.high:.3f}), goal {other.goal}"
    )
    show.output.print(f"  the first run took {use.seconds:.1f} s, and {use.store_bytes:,} bytes in the object store")
    for each in use.processes:
        show.output.print(f"  {each.name}: {each.peak_bytes / 1e6:,.0f} MB, {each.cpu_seconds:.2f} s of CPU time")


def main(arguments: Sequence[str] | None = None) -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gb", type=float, default=GIGABYTES, metavar="GB", help="of the table, float32 (default: %(default)s)")
    add("--dim", type=int, default=DIM, metavar="D", help="values a row (default: %(default)s)")
    add("--methods", nargs="+", default=METHODS, metavar="NAME", help=f"(default: {' '.join(METHODS)})")
    add("--workers", type=int, default=WORKERS, metavar="N", help="and threads (default: %(default)s)")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help="of both in turns (default: %(default)s)")
    options = parser.parse_args(arguments)
    machine = describe_machine(("embpack", "numpy", "ray"))
    show.output.print(f"{machine['cpu']}, {machine['isa']}, Ray {machine['versions']['ray']}")
    with _started(options.workers) as seconds:
        show.output.print(f"Ray took {seconds:.1f} s to start")
        _, busyness = watch(lambda: _measure_all(options))
    lost = ", ".join(f"CPU {cpu.cpu} {max(cpu.before, cpu.after):.0%}" for cpu in busyness.cpus)
    show.output.print(f"lost to others: {lost}")


def _measure_all(options: argparse.Namespace) -> None:
    for method in options.methods:
        measure(method, options)


if __name__ == "__main__":
    main()

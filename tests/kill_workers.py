"""Killed workers: a cluster of Ray packs what one machine would, though workers and machines of it die.

    python -m tests.kill_workers --runs 30

starts three machines of one CPU each on this one, packs a checkpoint again and again, kills workers (SIGKILL) at random
moments, several times a run, and removes a machine in every third run. Each run must end, with the bytes of one
machine, and leave nothing beside them.
"""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster
from safetensors.numpy import save_file

import embpack
from embpack.ray import Engine
from tests.kill_runs import read_tree

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
WAYS = (
    {"method": "optimal", "max_shard_size": "2 MB"},
    {"method": "trellis", "bits": 3.5, "max_shard_size": "4 MB"},
    {"method": "optimal", "rotate": "hadamard", "max_shard_size": "8 MB"},
)
ROWS, DIM, TABLES = 300_000, 64, ("user", "item", "shop")
# What Ray calls its workers.
_WORKING, _IDLE = b"ray::_run", b"ray::IDLE"
# How many deaths a run has, and how much later than rows each is, in seconds, on average.
DEATHS, MOMENT = 6, 0.3


@contextmanager
def start_cluster(nodes: int) -> Iterator[Cluster]:
    """Start machines with a CPU each, and connect to them; one cluster at a time, of all processes that test."""
    with (Path(tempfile.gettempdir()) / "embpack-tests-ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = os.environ.get("RAY_TMPDIR")
        with tempfile.TemporaryDirectory(prefix="embpack-tests-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            os.environ["RAY_TMPDIR"] = folder
            cluster = Cluster(initialize_head=True, head_node_args=NODE)
            try:
                for _ in range(nodes - 1):
                    cluster.add_node(**NODE)
                ray.init(cluster.address, log_to_driver=False, logging_level="error")
                yield cluster
            finally:
                ray.shutdown()
                cluster.shutdown()
                os.environ.pop("RAY_TMPDIR")
                if before is not None:
                    os.environ["RAY_TMPDIR"] = before


def write_source(path: Path, rows: int = ROWS) -> Path:
    """Write a checkpoint of several tables, and a tensor that is none."""
    rng = np.random.default_rng(0)
    tensors = {f"{name}_embedding.weight": rng.standard_normal((rows, DIM), np.float32) for name in TABLES}
    save_file({**tensors, "top.weight": np.ones((256, DIM), np.float32)}, path)
    return path


def find_workers() -> dict[int, bool]:
    """The processes of Ray that work for this one, and whether each runs a task."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
    ours = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in ours} - ours:
        ours |= more
    # An agent of a machine that dies takes the machine with it.
    kinds = {process: titles[process].partition(b"\0")[0] for process in ours}
    return {process: kind == _WORKING for process, kind in kinds.items() if kind in (_WORKING, _IDLE)}


@dataclass
class Deaths:
    """Kills workers, and removes a machine, while a block runs.

    A death comes when a random share of the rows is packed, and then a random moment later: as often on a busy machine,
    where everything takes longer.

    Attributes:
        cluster: whose they are.
        rng: says when, and which.
        num_rows: that are packed.
        count: of deaths.
        is_removing: whether the first death is that of a machine.
        working, idle: how many workers were killed that ran a task, and that did not.
        removed: how many machines.
    """

    cluster: Cluster
    rng: np.random.Generator
    num_rows: int
    count: int
    is_removing: bool
    working: int = 0
    idle: int = 0
    removed: int = 0
    _done: int = 0
    _is_over: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def progress(self, name: str, rows: int) -> None:
        """Take notice of rows that are packed."""
        with self._changed:
            self._done += rows
            self._changed.notify()

    @contextmanager
    def happening(self) -> Iterator[None]:
        """Let them happen."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify()
            thread.join()
            for _ in range(self.removed):
                self.cluster.add_node(**NODE)

    def _run(self) -> None:
        for share in sorted(self.rng.uniform(0, 1, self.count)):
            later = self.rng.exponential(MOMENT)
            with self._changed:
                self._changed.wait_for(lambda share=share: self._is_over or self._done >= share * self.num_rows)
                if self._changed.wait_for(lambda: self._is_over, later):
                    return
            if self.is_removing and not self.removed:
                self._remove()
            else:
                self._kill()

    def _kill(self) -> None:
        workers = find_workers()
        # Of those that run a task first: the others are of no use to anybody.
        chosen = [process for process, is_working in workers.items() if is_working] or list(workers)
        if chosen:
            process = int(self.rng.choice(chosen))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                self.working += workers[process]
                self.idle += not workers[process]

    def _remove(self) -> None:
        # Neither the head nor the one that this process is connected to.
        own = ray.get_runtime_context().get_node_id()
        others = [node for node in self.cluster.worker_nodes if node.node_id != own]
        self.cluster.remove_node(others[int(self.rng.integers(len(others)))], allow_graceful=False)
        self.removed += 1


def run_with_deaths(src: Path, folder: Path, options: dict[str, object], deaths: Deaths) -> str:
    """Pack while workers die; returns what came of it: "same bytes" if all is well."""
    whole, packed = folder / "whole", folder / "packed"
    if not whole.exists():
        embpack.quantize_file(src, whole, **options)
    try:
        with deaths.happening():
            embpack.quantize_file(src, packed, engine=Engine(), progress=deaths.progress, **options)
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    is_same = read_tree(packed) == read_tree(whole)
    shutil.rmtree(packed)
    # A worker that was given up may write for a moment yet.
    left = wait_for_none(lambda: {path.name for path in folder.iterdir()} - {"whole"})
    if left:
        return f"LEFT BEHIND: {left}"
    return "same bytes" if is_same else "OTHER BYTES"


def wait_for_none(find: Callable[[], set[str]], seconds: float = 10) -> set[str]:
    """Return what is still found after some seconds."""
    until = time.monotonic() + seconds
    while (found := find()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=ROWS, help="of each table")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, all_deaths, bad = np.random.default_rng(arguments.seed), list[Deaths](), 0
    with tempfile.TemporaryDirectory() as name, start_cluster(3) as cluster:
        src = write_source(Path(name) / "source.safetensors", arguments.rows)
        for run in range(arguments.runs):
            way = run // 3 % len(WAYS)
            folder = Path(name) / str(way)
            folder.mkdir(exist_ok=True)
            num_rows, start = arguments.rows * len(TABLES), time.perf_counter()
            deaths = Deaths(cluster, rng, num_rows, DEATHS, is_removing=run % 3 == 2)
            found = run_with_deaths(src, folder, WAYS[way], deaths)
            bad += found != "same bytes"
            all_deaths.append(deaths)
            print(
                f"{run + 1}: {found}; killed {deaths.working} that ran a task and {deaths.idle} that did not, removed "
                f"{deaths.removed}; {time.perf_counter() - start:.1f} s; {WAYS[way]}",
                flush=True,
            )
    print(
        f"{arguments.runs - bad} of {arguments.runs} ended with the bytes of one machine; killed: "
        f"{sum(each.working for each in all_deaths)} workers that ran a task, "
        f"{sum(each.idle for each in all_deaths)} that did not, {sum(each.removed for each in all_deaths)} machines"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

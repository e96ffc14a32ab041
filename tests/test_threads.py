"""Threads: the same results for any number of them, after a fork, and for several callers at once."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import embpack

# Enough values for every thread to get some.
ROWS, EMBEDDING_DIM = 6000, 40


def make_rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((ROWS, EMBEDDING_DIM), np.float32)


def everything() -> str:
    """A digest of what each kernel that uses threads returns."""
    rows = make_rows()
    digest = hashlib.sha256()
    for weight in (rows, rows.astype(np.float16)):
        for method in ("greedy", "table"):
            table = embpack.quantize(weight, method)
            digest.update(table.packed.tobytes() + str(table.loss).encode())
    indices = np.random.default_rng(6).integers(0, ROWS, (1000, 20))
    digest.update(table.dequantize().tobytes() + table[indices].tobytes())
    for mode in ("sum", "mean", "max"):
        digest.update(table.embedding_bag(indices, mode=mode).tobytes())
    return digest.hexdigest()


def number_of_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture(scope="module")
def wanted() -> str:
    before = embpack.get_num_threads()
    embpack.set_num_threads(1)
    digest = everything()
    embpack.set_num_threads(before)
    return digest


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_any_number_of_threads_gives_the_same_bits(isa, restore_threads, wanted, threads):
    embpack.set_num_threads(threads)
    assert embpack.get_num_threads() == threads
    assert everything() == wanted


@pytest.mark.parametrize("count", [0, -3])
def test_fewer_than_one_thread_is_refused(count):
    before = embpack.get_num_threads()
    with pytest.raises(ValueError, match=f"^count is {count}; use 1 to 4096 threads$"):
        embpack.set_num_threads(count)
    assert embpack.get_num_threads() == before


def in_forked_child(function, *args):
    """What function(*args) returns in a forked child; fails after a minute."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*args)))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


def everything_and_threads_started() -> tuple[str, int]:
    before = number_of_threads()
    return everything(), number_of_threads() - before


def test_a_forked_child_and_its_parent_use_threads(restore_threads, wanted):
    embpack.set_num_threads(3)
    assert everything() == wanted
    assert in_forked_child(everything_and_threads_started) == (wanted, 2)
    assert everything() == wanted
    assert in_forked_child(everything_and_threads_started) == (wanted, 2)


def test_the_child_of_a_child_uses_threads(restore_threads, wanted):
    embpack.set_num_threads(2)
    assert everything() == wanted

    def child() -> tuple[str, str]:
        return everything(), in_forked_child(everything)

    assert in_forked_child(child) == (wanted, wanted)


def test_a_fork_from_another_python_thread_works(restore_threads, wanted):
    embpack.set_num_threads(2)
    assert everything() == wanted
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(everything).result(timeout=60) == wanted
        assert pool.submit(in_forked_child, everything).result(timeout=120) == wanted
        assert pool.submit(everything).result(timeout=60) == wanted
    assert everything() == wanted


def test_a_fork_while_another_thread_quantizes_works(restore_threads, wanted):
    embpack.set_num_threads(2)
    stop, digests = threading.Event(), []

    def keep_going() -> None:
        while not stop.is_set():
            digests.append(everything())

    busy = threading.Thread(target=keep_going)
    busy.start()
    try:
        for _ in range(5):
            assert in_forked_child(everything) == wanted
    finally:
        stop.set()
        busy.join(timeout=60)
    assert not busy.is_alive()
    assert set(digests) == {wanted}


def test_several_python_threads_at_once(restore_threads, wanted):
    embpack.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(everything) for _ in range(12)]
        assert {future.result(timeout=120) for future in futures} == {wanted}


def test_the_interpreter_runs_on_while_kernels_do():
    """Quantizing releases the GIL: a Python thread gets its turns meanwhile."""
    rows = make_rows()[:3200]
    stop, turns = threading.Event(), []

    def count() -> None:
        while not stop.wait(0.001):
            turns.append(None)

    counter = threading.Thread(target=count)
    counter.start()
    before = len(turns)
    embpack.quantize(rows, "greedy:b=20000,r=0.5")  # some hundred milliseconds
    after = len(turns)
    stop.set()
    counter.join()
    assert after - before > 5


@pytest.mark.parametrize("count", [1, 3])
def test_omp_num_threads_is_respected(count):
    code = "import embpack; print(embpack.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": str(count)}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=60)
    assert printed == f"{count}\n"


def test_by_default_there_is_a_thread_for_each_cpu_available():
    code = "import embpack; print(embpack.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=60)
    assert int(printed) == len(os.sched_getaffinity(0))


def test_a_small_call_starts_no_threads():
    code = (
        "import os, numpy, embpack; before = len(os.listdir('/proc/self/task')); embpack.set_num_threads(8); "
        "embpack.quantize(numpy.ones((32, 64), numpy.float32)); "
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "0\n"

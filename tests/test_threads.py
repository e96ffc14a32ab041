"""Threads: the same results for any number of them, after a fork, and for several callers at once."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checkpoints import run_python

import embpack
from embpack import _native
from embpack.layouts import RowFormat

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


def count_turns(work: Callable[[], object]) -> int:
    """How many turns a Python thread, which asks for one each millisecond, gets while work runs."""
    stop, turns = threading.Event(), []

    def count() -> None:
        while not stop.wait(0.001):
            turns.append(None)

    counter = threading.Thread(target=count)
    counter.start()
    before = len(turns)
    work()
    after = len(turns)
    stop.set()
    counter.join()
    return after - before


def test_the_interpreter_runs_on_while_kernels_do():
    """Quantizing releases the GIL: a Python thread gets its turns meanwhile."""
    rows = make_rows()[:3200]
    assert count_turns(lambda: embpack.quantize(rows, "greedy:b=20000,r=0.5")) > 5  # some hundred milliseconds


def test_the_interpreter_runs_on_while_all_rows_are_decoded():
    packed = np.zeros((100_000, 132), np.uint8)
    table = embpack.PackedTable(packed, RowFormat(256, rotation="hadamard"))
    out = np.zeros(table.shape, np.float32)
    assert count_turns(lambda: table.native_view.gather(None, out)) > 3  # some ten milliseconds


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


# Calls of the core that need memory in their threads, each with a table of its own.
CALLS = """
import os, resource, sys
import numpy as np
import embpack
from embpack import _native

rng = np.random.default_rng(0)
rows = rng.standard_normal((8, 1 << 18), dtype=np.float32)
narrow = rng.standard_normal((64, 512), dtype=np.float32)
few_values = np.round(rng.standard_normal((96, 2048), dtype=np.float32))  # exact is quick with them
halves = rows.reshape(128, -1).astype(np.float16)
starts, codebooks = np.array([0, 1, 2]), np.empty((2, 16), np.float32)
embpack.set_num_threads(1)  # so that no others are there yet
view = embpack.quantize(rows, "asym", rotate="hadamard").native_view
indices, out = np.zeros(8, np.int64), np.empty((4, 1 << 18), np.float32)
embpack.set_num_threads(2)
call = {
    "gather": lambda: view.gather(indices[:4], out),
    "sum": lambda: view.pool(indices, None, 2, None, -1, "sum", out),
    "max": lambda: view.pool(indices, None, 2, None, -1, "max", out),
    "fit": lambda: _native.fit_codebooks(rows[:2], None, starts, 4, codebooks),
    "half": lambda: embpack.quantize(halves, "asym"),
    "kmeans": lambda: embpack.quantize(narrow, "kmeans"),
    "exact": lambda: embpack.quantize(few_values, "optimal:effort=exact", 2),
    "trellis": lambda: embpack.quantize(narrow, "trellis"),
}[sys.argv[1]]
"""

# Calls it with ever more memory, from none, until it works.
LIMITED = (
    CALLS
    + """
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
refused = 0
for extra in range(0, 1 << 28, int(sys.argv[2])):
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, resource.RLIM_INFINITY))
    try:
        call()
        break
    except MemoryError:
        refused += 1
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
call()
print(refused > 0)
"""
)


@pytest.mark.parametrize(
    ("call", "step"),
    [
        *(("gather", 1 << 18), ("sum", 1 << 18), ("max", 1 << 18), ("fit", 1 << 17), ("half", 1 << 18)),
        *(("kmeans", 1 << 15), ("exact", 1 << 14), ("trellis", 1 << 18)),
    ],
)
def test_too_little_memory_is_an_error_and_no_end(call, step):
    done = run_python(LIMITED, call, step)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# Takes memory away from threads that have worked before, and never met an exception.
EXPERIENCED = """
import resource
import numpy as np
import embpack

rng = np.random.default_rng(0)
table = embpack.quantize(rng.standard_normal((5000, 64), dtype=np.float32), "asym", rotate="hadamard")
indices = rng.integers(0, 5000, (20000, 20))
embpack.set_num_threads(4)
table.embedding_bag(indices[:5000], mode="max")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
refused = 0
for call in (lambda: table.embedding_bag(indices, mode="max"), lambda: table.gather(indices), table.dequantize) * 4:
    try:
        call()
    except MemoryError:
        refused += 1
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
table.dequantize()
print(refused > 0)
"""


def test_too_little_memory_is_no_end_in_threads_that_are_there_already():
    done = run_python(EXPERIENCED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# Asks for more threads than there is memory for.
CROWDED = """
import os, resource
import numpy as np
import embpack

rows = np.random.default_rng(0).standard_normal((32768, 64), dtype=np.float32)
embpack.set_num_threads(1)
packed = embpack.quantize(rows, "asym").packed
embpack.set_num_threads(64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
assert (embpack.quantize(rows, "asym").packed == packed).all()
print(len(os.listdir("/proc/self/task")))
"""


def test_where_few_threads_can_be_started_these_do_the_work():
    """A thread takes two megabytes of addresses for its stack."""
    done = run_python(CROWDED, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 40


# Sends itself SIGINT while it works, and prints what came of it.
INTERRUPTED = """
import os, signal, sys, threading
import numpy as np
import embpack

rows = np.random.default_rng(0).standard_normal((200_000, 64), dtype=np.float32)
wide = np.random.default_rng(0).standard_normal((2, 4096), dtype=np.float32)
np.save(sys.argv[2] + "/rows.npy", rows)
exact = "optimal:effort=exact"
call = {
    "rows": lambda: embpack.quantize(rows, exact),
    "one wide row": lambda: embpack.quantize(wide, exact),
    "weights": lambda: embpack.quantize(rows, exact, error_weights=np.ones(64)),
    "rotated": lambda: embpack.quantize(rows, exact, rotate="hadamard"),
    "file": lambda: embpack.quantize_file(sys.argv[2] + "/rows.npy", sys.argv[2] + "/packed.safetensors", method=exact),
    "compare": lambda: embpack.compare(rows, [exact]),
    "threads": lambda: [embpack.set_num_threads(3), embpack.quantize(rows, exact)],
    "one thread": lambda: [embpack.set_num_threads(1), embpack.quantize(rows, exact)],
}[sys.argv[1]]
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    call()
except KeyboardInterrupt:
    assert len(embpack.quantize(rows[:4096])) == 4096  # it goes on as before
    print("interrupted", os.listdir(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "call", ["rows", "one wide row", "weights", "rotated", "file", "compare", "threads", "one thread"]
)
def test_what_takes_minutes_or_hours_can_be_interrupted(tmp_path, call):
    done = run_python(INTERRUPTED, call, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted ['rows.npy']\n", "")


def test_a_callback_that_raises_ends_the_loop(rng):
    rows = rng.standard_normal((4096, 64), dtype=np.float32)
    packed = np.empty((4096, 36), np.uint8)
    calls = []

    def refuse(done: int) -> None:
        calls.append(done)
        raise LookupError("enough")

    how = ("optimal", _native.SearchParams(is_exact=True), 4, True, 4096)
    with pytest.raises(LookupError, match="enough"):
        _native.quantize(rows, *how, packed, refuse)
    assert len(calls) == 1
    assert 0 < calls[0] < 4096


# Leaves threads at work when the interpreter ends.
DAEMONS = """
import sys, threading, time
import numpy as np
import embpack

rows = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32)
indices = np.random.default_rng(0).integers(0, 20_000, (20_000, 40))
table = embpack.quantize(rows, "asym")
embpack.set_num_threads(int(sys.argv[2]))
told = []
call = {
    "quantize": lambda: embpack.quantize(rows, "optimal:effort=exact"),
    "pool": lambda: table.embedding_bag(indices[:2000]),
    "get": lambda: table[indices[0]],
    "fit": lambda: embpack.quantize(rows[:2000], "kmeans-cls"),
}[sys.argv[1]]


def keep_going():
    while True:
        call()
        told.append(None)


for _ in range(3):
    threading.Thread(target=keep_going, daemon=True).start()
while len(told) < 9 and sys.argv[1] != "quantize":
    time.sleep(0.01)
time.sleep(0.15)  # into the look for signals
"""


@pytest.mark.parametrize(
    ("call", "threads"), [("quantize", 1), ("quantize", 3), ("pool", 1), ("pool", 3), ("get", 1), ("fit", 3)]
)
def test_threads_at_work_when_the_interpreter_ends_do_not_end_it_otherwise(call, threads):
    done = run_python(DAEMONS, call, threads)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Prints whether tiny rows are packed, decoded and pooled to the same bits whatever becomes of small floats here, by
# threads that were started before and after that was said.
FLUSHED = """
import hashlib
import numpy as np
import torch
import embpack

rng = np.random.default_rng(0)
rows = (rng.standard_normal((6000, 64)) * 1e-38).astype(np.float32)
indices = rng.integers(0, 6000, (4000, 10))


def digest():
    digest = hashlib.sha256()
    for method in ("asym", "greedy", "kmeans"):
        table = embpack.quantize(rows, method, param_dtype="float32")
        for values in (table.packed, table.dequantize(), table.embedding_bag(indices)):
            digest.update(values.tobytes())
    return digest.hexdigest()


digests = set()
for threads, flushes in ((1, False), (2, False), (1, True), (2, True), (3, True), (3, False)):
    embpack.set_num_threads(threads)
    torch.set_flush_denormal(flushes)
    digests.add(digest())
    smallest = torch.tensor([1e-39])
    assert (smallest * 1 == 0).item() == flushes
print(len(digests))
"""


def test_bits_do_not_depend_on_whether_small_floats_are_flushed_to_zero():
    pytest.importorskip("torch")
    done = run_python(FLUSHED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("count", [0, -1])
def test_the_core_refuses_fewer_threads_than_one(count):
    with pytest.raises(ValueError, match="count must be positive"):
        _native.set_num_threads(count)


def test_a_callback_is_not_called_again_after_it_raised(restore_threads, rng):
    """Neither while the others finish what they are at."""
    embpack.set_num_threads(2)
    rows = rng.standard_normal((512, 4096), dtype=np.float32)
    calls = []

    def refuse(done: int) -> None:
        calls.append(done)
        raise LookupError("enough")

    how = ("optimal", _native.SearchParams(), 4, True, 512)
    with pytest.raises(LookupError, match="enough"):
        _native.quantize(rows, *how, np.empty((512, 2052), np.uint8), refuse)
    assert len(calls) == 1


# Another thread packs while the main one is interrupted.
ELSEWHERE = """
import os, signal, threading, time
import numpy as np
import embpack

rows = np.random.default_rng(0).standard_normal((300, 64), dtype=np.float32)
embpack.set_num_threads(1)
packed = []
other = threading.Thread(target=lambda: packed.append(embpack.quantize(rows, "optimal:effort=exact")))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
other.start()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", end="")
other.join()
print(", then packed" if len(packed[0]) == 300 else ", and lost")
"""


def test_a_thread_that_is_not_main_hears_no_signal():
    """Ctrl-C is for the main thread, however long another one's call takes."""
    done = run_python(ELSEWHERE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted, then packed\n", "")

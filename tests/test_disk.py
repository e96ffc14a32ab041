"""Tables whose rows stay on the disk: the bits of mapped ones, in bounded memory, and errors in place of signals."""

import copy
import errno
import importlib
import itertools
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import embpack
from embpack import FormatError, _native, disk
from embpack.disk import DiskTable
from embpack.formats import mapped
from embpack.table import PackedTable
from embpack.torch import PackedEmbedding

NUM_ROWS = 5000
WAYS = {
    "uniform": ("asym", {}),
    "uniform-8": ("asym", {"bits": 8}),
    "codebook": ("kmeans", {}),
    "clustered": ("kmeans-cls", {}),
    "clustered-many": ("kmeans-cls:K=300", {}),
    "trellis": ("trellis", {}),
    "rotated": ("asym", {"rotate": "hadamard"}),
    "wide": ("asym", {}),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of tables of each layout."""
    random = np.random.default_rng(0)
    tables = {}
    for name, (method, options) in WAYS.items():
        rows, dim = (40, 5000) if name == "wide" else (NUM_ROWS, 40)
        tables[name] = embpack.quantize(random.standard_normal((rows, dim), dtype=np.float32), method, **options)
    path = tmp_path_factory.mktemp("disk") / "tables.safetensors"
    embpack.save(path, tables)
    return path


@pytest.fixture(params=[None, 1000], ids=["at once", "some at a time"])
def tables(path, request, monkeypatch):
    """The same tables, mapped and on the disk, where a lookup may have few bytes of rows in memory."""
    if request.param is not None:
        monkeypatch.setattr(disk, "MOST_BYTES", request.param)
    return {access: embpack.load(path, access=access) for access in ("mapped", "disk")}


def message_of(kind, call, *arguments, **options):
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return str(caught.value)


def draw(rng, table, size=777):
    return rng.integers(0, len(table), size)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rotate_back", [True, False])
def test_rows_are_those_of_a_mapped_table(rng, tables, name, dtype, rotate_back):
    known, table = tables["mapped"][name], tables["disk"][name]
    assert isinstance(table, DiskTable)
    for indices in (
        draw(rng, table, (7, 11)),
        draw(rng, table).astype(np.int32),
        [],
        3,
        [5, 5, 5],
        [len(table) - 1, 0],
    ):
        found = table.gather(indices, dtype, rotate_back=rotate_back)
        np.testing.assert_array_equal(found, known.gather(indices, dtype, rotate_back=rotate_back))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_bags_are_those_of_a_mapped_table(rng, tables, name, mode, padding_idx):
    known, table = tables["mapped"][name], tables["disk"][name]
    indices = draw(rng, table)
    indices[[4, 700]] = 3, len(table) - 1
    starts = np.sort(draw(rng, table, 20) * 777 // len(table))
    starts[:3] = 0
    bags = [
        {"indices": indices.reshape(7, 111)},
        {"indices": indices.astype(np.int32), "offsets": starts},
        {"indices": indices, "offsets": [*starts, 777], "include_last_offset": True},
        {"indices": indices[:0], "offsets": []},
        {"indices": indices[:0], "offsets": [0, 0]},
    ]
    for each, dtype in itertools.product(bags, ["float32", "bfloat16"]):
        weights = rng.standard_normal(each["indices"].shape, dtype=np.float32) if mode == "sum" else None
        options = {"mode": mode, "padding_idx": padding_idx, "dtype": dtype, "per_sample_weights": weights}
        np.testing.assert_array_equal(table.embedding_bag(**each, **options), known.embedding_bag(**each, **options))


@pytest.mark.parametrize("name", WAYS)
def test_a_table_is_an_array_as_a_mapped_one(tables, name):
    known, table = tables["mapped"][name], tables["disk"][name]
    rows = known.dequantize()
    np.testing.assert_array_equal(table.dequantize(), rows)
    np.testing.assert_array_equal(np.asarray(table, np.float16), np.asarray(known, np.float16))
    np.testing.assert_array_equal(np.stack(list(table)), rows)
    for key in (3, -1, slice(10, 30, 7), [[1, -2], [3, 4]], (5, 2), (slice(None), 2), ..., rows[:, 0] > 1):
        np.testing.assert_array_equal(table[key], rows[key])
    assert repr(table) == repr(known).replace("PackedTable", "DiskTable")
    for what in ("shape", "bits", "layout", "row_bytes", "nbytes", "rotation", "dtype", "method", "loss"):
        assert getattr(table, what) == getattr(known, what)
    assert len(table) == len(known)


def test_groups_are_those_of_mapped_tables(rng, tables):
    names = [name for name in WAYS if name != "wide"]
    table_of = [*range(len(names)), 2, 0]
    for on_disk in (range(len(names)), (0, 3), (2,)):
        mixed = [tables["disk" if at in on_disk else "mapped"][name] for at, name in enumerate(names)]
        known = [tables["mapped"][name] for name in names]
        for modes in ("sum", ["sum", "mean", "max"] * 3):
            own, group = (embpack.TableGroup(each, table_of, modes) for each in (mixed, known))
            lengths = rng.integers(0, 5, len(table_of) * 50)
            indices = rng.integers(0, NUM_ROWS, lengths.sum()).astype(np.int32)
            weights = rng.standard_normal(len(indices), dtype=np.float32) if modes == "sum" else None
            options = {"lengths": lengths, "per_sample_weights": weights}
            np.testing.assert_array_equal(
                own.embedding_bag(indices, **options), group.embedding_bag(indices, **options)
            )
            again = copy.copy(own)
            np.testing.assert_array_equal(
                again.embedding_bag(indices, **options), own.embedding_bag(indices, **options)
            )


@pytest.mark.parametrize("table_of", [[0], [2, 2], [1], [2, 0, 2]])
def test_groups_may_have_tables_that_no_feature_reads(rng, tables, table_of):
    mixed = [tables["disk"]["uniform"], tables["mapped"]["trellis"], tables["disk"]["clustered"]]
    known = [tables["mapped"][name] for name in ("uniform", "trellis", "clustered")]
    indices = draw(rng, mixed[0], 30 * len(table_of))
    own, group = (embpack.TableGroup(each, table_of) for each in (mixed, known))
    lengths = np.full(10 * len(table_of), 3)
    np.testing.assert_array_equal(
        own.embedding_bag(indices, lengths=lengths), group.embedding_bag(indices, lengths=lengths)
    )
    indices[-1] = NUM_ROWS
    messages = {message_of(IndexError, each.embedding_bag, indices, lengths=lengths) for each in (own, group)}
    assert len(messages) == 1


@pytest.mark.parametrize("index", [NUM_ROWS, -1, 2**62, -(2**63)])
def test_an_index_out_of_range_is_named_as_of_a_mapped_table(rng, tables, index):
    indices = draw(rng, tables["disk"]["clustered"])
    indices[[333, 700]] = index
    groups = [embpack.TableGroup([each["clustered"]] * 3) for each in tables.values()]
    known, table = (each["clustered"] for each in tables.values())
    for call in (
        lambda table, _: table.gather(indices),
        lambda table, _: table.embedding_bag(indices, [0, 50, 600]),
        lambda table, _: table.prefetch(indices),
        lambda _, group: group.embedding_bag(indices, [0, 50, 600, 777]),
    ):
        assert message_of(IndexError, call, table, groups[1]) == message_of(IndexError, call, known, groups[0])


def test_bags_are_cut_where_ends_are_near_the_largest_of_their_type():
    ends = np.array([0, 2**31 - 5, 2**31 - 4, 2**31 - 2], np.int32)
    assert list(disk.cut(ends, 1 << 24)) == [slice(0, 1), slice(1, 3)]


@pytest.mark.parametrize("offsets", [[1, 2], [0, 5, 3], [0, 1000], [0, -1, 5]])
def test_offsets_that_are_wrong_are_named_as_of_a_mapped_table(rng, tables, offsets):
    indices = draw(rng, tables["disk"]["uniform"])
    known, table = (each["uniform"] for each in tables.values())
    assert message_of(ValueError, table.embedding_bag, indices, offsets) == message_of(
        ValueError, known.embedding_bag, indices, offsets
    )
    offsets = [*offsets, 777]
    if (len(offsets) - 1) % 2 == 0:
        groups = [embpack.TableGroup([each] * 2) for each in (known, table)]
        assert len({message_of(ValueError, group.embedding_bag, indices, offsets) for group in groups}) == 1


def test_types_that_are_wrong_are_named(tables):
    table = tables["disk"]["uniform"]
    assert message_of(TypeError, table.gather, [0.5]) == "indices are float64; they must be integers"
    assert message_of(TypeError, table.prefetch, [0.5]) == "indices are float64; they must be integers"
    with pytest.raises(TypeError, match=r"must be an embpack\.PackedTable or DiskTable"):
        embpack.TableGroup(["table"])


def test_damaged_clusters_are_named(tmp_path):
    table = embpack.quantize(np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32), "kmeans-cls")
    clusters = table.clusters.copy()
    clusters[7] = 255
    damaged = PackedTable(table.packed, table.row_format, clusters=clusters, codebooks=table.codebooks)
    embpack.save(tmp_path / "t.safetensors", {"t": damaged})
    found = embpack.load(tmp_path / "t.safetensors", access="disk")["t"]
    for call in (
        lambda table: table.gather([1, 7, 2]),
        lambda table: table.embedding_bag([1, 7, 2], [0, 1]),
        lambda table: table.dequantize(),
        lambda table: embpack.TableGroup([table, table]).embedding_bag([1, 7, 2], [0, 1, 3]),
    ):
        assert message_of(FormatError, call, found) == message_of(FormatError, call, damaged)


# Pieces of files.


@pytest.mark.parametrize("method", ["asym", "kmeans-cls"])
def test_a_table_in_pieces_is_one_table(rng, tmp_path, method):
    source = tmp_path / "user_embedding.npy"
    np.save(source, rng.standard_normal((30_000, 16), dtype=np.float32))
    embpack.quantize_file(source, tmp_path / "packed", method=method, max_shard_size=150_000)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    [known], [table] = (embpack.load(tmp_path / "packed", access=access).values() for access in ("mapped", "disk"))
    np.testing.assert_array_equal(table.dequantize(), known.dequantize())
    indices = draw(rng, table)
    table.prefetch(indices)
    np.testing.assert_array_equal(table.gather(indices), known.gather(indices))


def test_rows_of_several_pieces_and_pages(rng, tmp_path):
    """Rows of 7 to 10,000 bytes, in three pieces at any offset: those on a page, next to each other, and far apart."""
    for row_bytes in (7, 36, 4096, 10_000):
        arrays = [rng.integers(0, 256, (count, row_bytes), np.uint8) for count in (300, 1, 200)]
        files = []
        for number, array in enumerate(arrays):
            place = tmp_path / f"{row_bytes}-{number}"
            place.write_bytes(bytes(11 * number) + array.tobytes())
            with place.open("rb") as file:
                files.append((_native.DiskFile(file.fileno()), 11 * number, len(array)))
        rows, whole = _native.DiskRows(files, row_bytes), np.concatenate(arrays)
        for wanted in (
            np.arange(501),
            np.unique(draw(rng, whole, 60)),
            np.array([0, 1, 299, 300, 301, 500]),
            np.arange(0),
        ):
            out = np.empty((len(wanted), row_bytes), np.uint8)
            assert _native.read_rows([(rows, wanted, out)]) is None
            np.testing.assert_array_equal(out, whole[wanted])
        _native.prefetch_rows(rows, np.arange(501))


def test_what_the_core_cannot_read_is_refused(path):
    with path.open("rb") as file:
        rows = _native.DiskRows([(_native.DiskFile(file.fileno()), 0, 10)], 8)
    out = np.empty((2, 8), np.uint8)
    for wanted in ([1, 0], [-1, 0], [0, 10]):
        with pytest.raises(ValueError):
            _native.read_rows([(rows, np.array(wanted), out)])
        with pytest.raises(ValueError):
            _native.prefetch_rows(rows, np.array(wanted))
    for wanted in ([0], [3, 3]):
        with pytest.raises(ValueError):
            _native.read_rows([(rows, np.array(wanted), out)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.DiskFile(-1)


# Files that change.


def write_one(folder, num_rows=3000):
    rows = np.random.default_rng(1).standard_normal((num_rows, 64), dtype=np.float32)
    path = folder / "t.safetensors"
    embpack.save(path, {"t": embpack.quantize(rows, "asym")})
    return path


def test_a_file_that_was_cut_is_an_error_with_its_name_and_the_offset(tmp_path):
    path = write_one(tmp_path)
    table = embpack.load(path, access="disk")["t"]
    row = table.gather([5])
    size = path.stat().st_size
    os.truncate(path, size // 2)
    message = f"{path}: ends before byte {size}, where a row lies that is looked up; it was cut since it was loaded"
    for call in (
        lambda: table.gather([5, 2999]),
        lambda: table.embedding_bag([[5, 2999]]),
        lambda: embpack.TableGroup([table]).embedding_bag([5, 2999], [0, 2]),
    ):
        assert message_of(FormatError, call).startswith(message)
    table.prefetch([5, 2999])
    np.testing.assert_array_equal(table.gather([5]), row)


@pytest.mark.parametrize("rows", [[40, 41, 42, 43], [40, 42, 44]])
def test_of_rows_that_are_read_together_the_one_that_is_cut_is_named(tmp_path, rows):
    path = write_one(tmp_path)
    table = embpack.load(path, access="disk")["t"]
    end = path.stat().st_size - (len(table) - 43) * table.row_bytes  # of row 42, which neither list ends with
    os.truncate(path, end - 1)
    message = f"{path}: ends before byte {end}, where a row lies that is looked up"
    assert message_of(FormatError, table.gather, rows).startswith(message)


def test_a_read_error_names_the_file_and_the_offset(tmp_path):
    """The descriptor of a folder is one that cannot be read from, as a disk that fails."""
    path = write_one(tmp_path)
    table = embpack.load(path, access="disk")["t"]
    descriptor = os.open(tmp_path, os.O_RDONLY)
    table.packed.native = _native.DiskRows([(_native.DiskFile(descriptor), 100, len(table))], table.row_bytes)
    os.close(descriptor)
    with pytest.raises(IsADirectoryError) as caught:
        table.gather([2])
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, str(path))
    assert "at byte 172 and the 36 from there on" in caught.value.strerror


def test_a_table_outlives_its_file(tmp_path):
    path = write_one(tmp_path)
    table, rows = embpack.load(path, access="disk")["t"], embpack.load(path, access="memory")["t"].dequantize()
    path.unlink()
    np.testing.assert_array_equal(table.dequantize(), rows)
    write_one(tmp_path, 20)
    np.testing.assert_array_equal(table.gather([2999]), rows[2999:])


def count_descriptors(path):
    """Those of this process that are of a file."""
    return sum(each.readlink() == path for each in Path("/proc/self/fd").iterdir() if each.is_symlink())


def test_files_are_closed_with_the_last_table(tmp_path):
    path = write_one(tmp_path)
    tables = embpack.load(path, access="disk")
    assert count_descriptors(path) == 1
    del tables
    assert count_descriptors(path) == 0


def test_too_many_open_files_say_what_to_do(tmp_path):
    path = write_one(tmp_path)
    code = f"""
import os, resource, embpack
limit = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
embpack.load({str(path)!r}, access="disk")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError" in done.stderr
    assert "each file whose rows stay on the disk keeps a descriptor; allow more (ulimit -n)" in done.stderr


# Copies.


def test_copies_are_the_table_and_what_takes_its_bytes_is_refused(path, tmp_path):
    table = embpack.load(path, access="disk")["uniform"]
    assert copy.copy(table) is table
    assert copy.deepcopy([table])[0] is table
    with pytest.raises(TypeError, match=r'cannot be pickled; .*: embpack\.load\(path, access="disk"\)'):
        pickle.dumps(table)
    with pytest.raises(TypeError, match="is DiskTable; load it mapped"):
        embpack.save(tmp_path / "x.safetensors", {"t": table})
    for reader, call in (
        ("onnx", lambda onnx: onnx.export(table, tmp_path / "x.onnx")),
        ("fbgemm", lambda fbgemm: fbgemm.to_tbe([table])),
    ):
        pytest.importorskip("fbgemm_gpu" if reader == "fbgemm" else reader)
        with pytest.raises(TypeError, match="is DiskTable, not PackedTable; load it mapped"):
            call(importlib.import_module(f"embpack.{reader}"))


def test_what_is_said_of_a_table_is_checked(path):
    table = embpack.load(path, access="disk")["clustered"]
    with pytest.raises(ValueError, match="the clustered layout needs clusters and codebooks"):
        DiskTable(table.packed, table.row_format)
    with pytest.raises(ValueError, match="packed has 20 bytes a row"):
        DiskTable(table.packed, embpack.load(path)["uniform"].row_format)


# Prefetching.


def count_cached_pages(path):
    """Pages of a file that are in the page cache; those beside what was asked for are not to be there."""
    found = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "PAGES", path], capture_output=True, text=True
    )
    return int(found.stdout)


@pytest.fixture
def cold_path(tmp_path):
    """A file of which nothing is in the page cache, where that can be had and seen."""
    path = write_one(tmp_path, 200_000)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if count_cached_pages(path):
            pytest.skip("the file system keeps what is in the page cache")
    except FileNotFoundError:
        pytest.skip("there is no fincore (util-linux)")
    return path


@pytest.mark.parametrize("access", ["mapped", "disk", "a module's"])
def test_prefetched_rows_come_into_the_page_cache_and_no_others(monkeypatch, cold_path, access):
    monkeypatch.setattr(mapped, "_LARGE_BYTES", 0)
    table = embpack.load(cold_path, access="disk" if access == "disk" else "mapped")["t"]
    if access == "a module's":
        table = PackedEmbedding.from_table(table).table
    before = count_cached_pages(cold_path)  # the header's
    indices = np.arange(0, len(table), 2000)
    start = time.perf_counter()
    table.prefetch(indices)
    assert time.perf_counter() - start < 1
    end = time.monotonic() + 30
    while (found := count_cached_pages(cold_path)) < before + len(indices):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert found <= before + 2 * len(indices)
    np.testing.assert_array_equal(table.gather(indices), embpack.load(cold_path, access="memory")["t"].gather(indices))


def test_a_large_mapped_file_is_read_where_it_is_looked_up(monkeypatch, cold_path):
    monkeypatch.setattr(mapped, "_LARGE_BYTES", 0)
    table = embpack.load(cold_path)["t"]
    before = count_cached_pages(cold_path)
    table.gather([100_000, 150_000])
    assert count_cached_pages(cold_path) <= before + 4


@pytest.mark.parametrize("how", ["copy", "dequantize", "a module's", "save"])
def test_all_rows_of_a_large_mapped_file_are_read_ahead(monkeypatch, tmp_path, how):
    """A page at a time it would take 30 times as long."""
    monkeypatch.setattr(mapped, "_LARGE_BYTES", 0)
    path = write_one(tmp_path)
    table = embpack.load(path)["t"]
    if how == "a module's":
        table = PackedEmbedding.from_table(table).table
    advices = []
    advise = mapped._advise

    def note(array, advice):
        advices.append((array.nbytes, advice, mapped.is_of_file(array)))
        advise(array, advice)

    monkeypatch.setattr(mapped, "_advise", note)
    if how == "save":
        embpack.save(tmp_path / "copy.safetensors", {"t": table})
    else:
        {"copy": table.copy}.get(how, table.dequantize)()
    assert advices == [(table.packed.nbytes, advice, True) for advice in (mmap.MADV_SEQUENTIAL, mmap.MADV_RANDOM)]


def test_to_prefetch_no_rows_does_nothing(path):
    for table in (embpack.load(path)["uniform"], embpack.load(path, access="disk")["uniform"]):
        table.prefetch([])
    table = embpack.load(path)["uniform"]
    PackedTable(table.packed[:0], table.row_format).prefetch([])


def test_a_lookup_reads_no_more_than_its_rows(cold_path):
    table = embpack.load(cold_path, access="disk")["t"]
    before = count_cached_pages(cold_path)
    table.gather([100_000, 150_000, 100_000])
    assert count_cached_pages(cold_path) <= before + 4


@pytest.mark.parametrize("access", ["mapped", "memory", "disk"])
def test_prefetching_changes_nothing_of_what_is_looked_up(rng, path, access):
    for name, table in embpack.load(path, access=access).items():
        indices = draw(rng, table)
        for _ in range(20):
            table.prefetch(indices)
        table.prefetch([])
        np.testing.assert_array_equal(table.gather(indices), embpack.load(path)[name].gather(indices))


def test_prefetches_of_tables_that_are_gone_do_no_harm(rng, path):
    for access in ("mapped", "disk"):
        for _ in range(10):
            for table in embpack.load(path, access=access).values():
                table.prefetch(draw(rng, table))


# Threads, forks, signals, memory.


def test_many_threads_at_once(path, rng):
    known, table = (embpack.load(path, access=access)["clustered"] for access in ("mapped", "disk"))
    wrong = []

    def look_up(seed):
        random = np.random.default_rng(seed)
        for _ in range(20):
            indices = draw(random, table, 300)
            table.prefetch(draw(random, table, 300))
            if not np.array_equal(table.gather(indices), known.gather(indices)):
                wrong.append(seed)

    threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, sys, warnings
import numpy as np
import embpack
warnings.simplefilter("error")  # Python warns of a fork beside other threads
path = sys.argv[1]
table = embpack.load(path, access="disk")["t"]
def evict():
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
indices = np.arange(0, len(table), 97)
evict()
known = table.gather(indices)
for _ in range(3):
    child = os.fork()
    evict()
    right = np.array_equal(table.gather(indices), known)
    if not child:
        os._exit(0 if right else 1)
    assert right and os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_and_its_parent_read(tmp_path):
    path = write_one(tmp_path, 50_000)
    subprocess.run([sys.executable, "-c", FORK, str(path)], check=True, timeout=60)


INTERRUPT = """
import os, sys, threading, time
import embpack
from embpack import _native
import numpy as np
reading, writing = os.pipe()
rows = _native.DiskRows([(_native.DiskFile(os.open(sys.argv[1], os.O_RDONLY)), 0, 100_000_000)], 1)
wanted = np.arange(0, 100_000_000, 3)
print("ready", flush=True)
try:
    while True:
        _native.read_rows([(rows, wanted, np.empty((len(wanted), 1), np.uint8))])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_a_long_read(tmp_path):
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with subprocess.Popen([sys.executable, "-c", INTERRUPT, str(path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=30)[0] == "interrupted\n"


MEMORY = """
import sys
import numpy as np
import embpack
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
[table] = embpack.load(sys.argv[1], access="disk").values()
table.gather([0])
before = peak()
rows = np.arange(len(table), dtype=np.int32)
table.embedding_bag(rows, np.arange(0, len(table), 1000), "sum")
print(peak() - before)
"""


def test_memory_is_bounded(tmp_path):
    """All rows of a table of 180 MB in one call."""
    table = embpack.quantize(np.zeros((1, 64), np.float32), "asym")
    packed = np.tile(table.packed, (5_000_000, 1))
    embpack.save(tmp_path / "t.safetensors", {"t": PackedTable(packed, table.row_format)})
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "t.safetensors")], check=True, capture_output=True
    )
    assert int(found.stdout) < 150

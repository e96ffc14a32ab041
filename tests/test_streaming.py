"""Memory stays bounded: a 400 MB table is packed and unpacked in a fraction of that."""

import json
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import run_python, write_raw, write_sparse_table

import embpack

ROWS, DIM = 1_600_000, 64
TABLE_BYTES = ROWS * DIM * 4
# Anonymous memory, and all that is resident, pages of mapped files included.
MOST_ANONYMOUS = 150_000_000
MOST_RESIDENT = 300_000_000

# Samples RssAnon and VmRSS of /proc/self/status every 2 ms in a thread while the file is converted, and prints how
# much more there was at the peak than after the imports.
MEASURE = """
import json, sys, threading
from pathlib import Path
import numpy, embpack
import embpack.formats.npy, embpack.formats.safetensors

def sample():
    status = Path("/proc/self/status").read_text()
    return [int(status.split(key)[1].split()[0]) * 1024 for key in ("RssAnon:", "VmRSS:")]

def watch():
    while not done.wait(0.002):
        samples.append(sample())

function, src, dst = sys.argv[1:4]
options = {"method": sys.argv[4]} if len(sys.argv) > 4 else {}
done, before, samples = threading.Event(), sample(), []
watcher = threading.Thread(target=watch)
watcher.start()
getattr(embpack, function)(src, dst, **options)
done.set()
watcher.join()
anonymous, resident = (max(peak) - start for peak, start in zip(zip(*samples), before))
print(json.dumps({"samples": len(samples), "anonymous": anonymous, "resident": resident}))
"""


def measure(*args: object) -> dict[str, int]:
    done = run_python(MEASURE, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(growth: dict[str, int]) -> None:
    assert growth["samples"] >= 20
    assert growth["anonymous"] < MOST_ANONYMOUS
    assert growth["resident"] < MOST_RESIDENT


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of zeros that takes no room on the disk."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    write_sparse_table(path, "user_emb.weight", ROWS, DIM)
    assert path.stat().st_size > TABLE_BYTES
    return path


@pytest.fixture(scope="module")
def packed(table):
    path = table.with_name("packed.safetensors")
    embpack.quantize_file(table, path, method="asym")
    return path


@pytest.mark.parametrize("method", ["asym", "table"])
def test_packing_a_safetensors_file(table, tmp_path, method):
    check(measure("quantize_file", table, tmp_path / "packed.safetensors", method))


def test_packing_an_npy_file(tmp_path):
    np.lib.format.open_memmap(tmp_path / "vectors.npy", "w+", np.float32, (ROWS, DIM))
    check(measure("quantize_file", tmp_path / "vectors.npy", tmp_path / "packed.safetensors", "asym"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_packing_an_npz_file(tmp_path, compression):
    with (
        zipfile.ZipFile(tmp_path / "model.npz", "w", compression, compresslevel=1) as archive,
        archive.open("user_emb.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, DIM)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(16):
            member.write(bytes(TABLE_BYTES // 16))
    check(measure("quantize_file", tmp_path / "model.npz", tmp_path / "packed.safetensors", "asym"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz"])
def test_unpacking(packed, tmp_path, suffix):
    plain = tmp_path / f"plain{suffix}"
    check(measure("dequantize_file", packed, plain))
    assert plain.stat().st_size > TABLE_BYTES


# Reads every tensor of files, about a megabyte at a time, where no more than some memory can be had, mapped or not.
READ_WITHIN = """
import resource, sys
from pathlib import Path
from embpack.formats import open_checkpoint
import embpack.formats.parquet, embpack.formats.torch

status = Path("/proc/self/status").read_text()
most = int(status.split("VmSize:")[1].split()[0]) * 1024 + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.argv[2:]:
    with open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.shards[0].tensors:
            assert sum(portion.nbytes for portion in tensor.portions(1 << 20)) == tensor.nbytes
            print(path, tensor.nbytes)
"""


def write_constant_vectors(path, rows, dim):
    """Vectors that are all the same, in one row group: a thousandth of their bytes."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * dim, np.float32)), dim)
    pq.write_table(pa.table({"a": column}), path, row_group_size=1 << 40)
    assert path.stat().st_size < 4 * rows * dim / 1000


# Files that stand for much more than they have, or whose rows lie far apart.
SPREAD = {
    "rows.parquet": lambda path: write_constant_vectors(path, 500_000, 64),
    "wide.parquet": lambda path: write_constant_vectors(path, 8, 1 << 22),
    "numbers.parquet": lambda path: pq.write_table(pa.table({"a": np.zeros(16_000_000)}), path, row_group_size=1 << 40),
    "expanded.pt": lambda path: torch.save({"a": torch.zeros(1).expand(4000, 4000)}, path),
    "tied.pt": lambda path: torch.save(dict.fromkeys(map(str, range(90)), torch.zeros(300_000)), path),
    "columns.pt": lambda path: torch.save({"a": torch.zeros(64, 500_000).t()}, path),
    "steps.pt": lambda path: torch.save({"a": torch.zeros(40_000_000)[::2].view(-1, 4)}, path),
    "old.pt": lambda path: torch.save({"a": torch.zeros(32_000_000)}, path, _use_new_zipfile_serialization=False),
    "columns.npy": lambda path: np.lib.format.open_memmap(path, "w+", "<f4", (500_000, 128), fortran_order=True),
    "columns.npz": lambda path: np.savez(path, a=np.zeros((128, 500_000), np.float32).T),
    "entry.safetensors": lambda path: write_sparse_table(path, "a", 1, 1 << 26),
}


def test_reading_takes_less_memory_than_what_is_read(tmp_path):
    for name, write in SPREAD.items():
        write(tmp_path / name)
    done = run_python(READ_WITHIN, 200_000_000, *(tmp_path / name for name in SPREAD))
    assert done.returncode == 0, done.stderr
    read = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(read) == len(SPREAD) + 89
    assert sum(read) > 800_000_000


# Runs one function after it has set a limit on this process, to so much more than it has.
LIMITED = """
import resource, sys
from pathlib import Path
import embpack, embpack.formats.safetensors

limit, more, function, *paths = sys.argv[1:]
status = Path("/proc/self/status").read_text()
now = {"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}.get(limit)
most = int(more) + (int(status.split(now)[1].split()[0]) * 1024 if now else 0)
resource.setrlimit(getattr(resource, limit), (most, most))
options = {"method": "asym"} if function == "quantize_file" else {}
returned = getattr(embpack, function)(*paths, **options)
if function == "load":
    print(sum(float(table[[0, len(table) - 1]].sum()) for table in returned.values()))
"""


def check_limited(*args):
    done = run_python(LIMITED, *args, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_file_larger_than_the_limit_of_memory_is_packed(table, tmp_path, limit):
    check_limited(limit, 120_000_000, "quantize_file", table, tmp_path / "packed.safetensors")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A table of 80 MB in FP8, 320 as it is packed, in sixty files."""
    folder, rows, dim = tmp_path_factory.mktemp("pieces"), 8192, 160
    weight_map = {}
    for i in range(60):
        size = rows * dim
        header = {f"emb.shard_{i}.weight": {"dtype": "F8_E4M3", "shape": [rows, dim], "data_offsets": [0, size]}}
        scale = {"dtype": "F32", "shape": [rows, 1], "data_offsets": [size, size + 4 * rows]}
        header[f"emb.shard_{i}.weight_scale"] = scale
        write_raw(folder / f"m-{i}.safetensors", header, size=size + 4 * rows)
        weight_map |= dict.fromkeys(header, f"m-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("limit", "more"), [("RLIMIT_DATA", 120_000_000), ("RLIMIT_NOFILE", 50)])
def test_pieces_in_many_files_are_packed_in_bounded_memory(pieces, tmp_path, limit, more):
    check_limited(limit, more, "quantize_file", pieces, tmp_path / "packed")
    assert len(embpack.load(tmp_path / "packed")["emb.weight"]) == 60 * 8192


def test_mapped_tables_do_not_count_as_data(packed):
    assert packed.stat().st_size > 50_000_000
    check_limited("RLIMIT_DATA", 20_000_000, "load", packed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A checkpoint in two hundred files, and a packed one in sixty."""
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (("plain", 200), ("few", 60)):
        (folder / name).mkdir()
        files = {f"m-{i}.safetensors": f"emb.{i}.weight" for i in range(count)}
        for file_name, tensor in files.items():
            write_sparse_table(folder / name / file_name, tensor, 16, 8)
        index = {"weight_map": {tensor: file_name for file_name, tensor in files.items()}}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    embpack.quantize_file(folder / "few", folder / "packed", method="asym")
    return folder


def test_many_shards_need_few_descriptors(shards, tmp_path):
    check_limited("RLIMIT_NOFILE", 50, "quantize_file", shards / "plain", tmp_path / "packed")
    check_limited("RLIMIT_NOFILE", 50, "dequantize_file", tmp_path / "packed", tmp_path / "unpacked")
    check_limited("RLIMIT_NOFILE", 100, "load", shards / "packed")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="maps need no descriptors")
def test_too_many_mapped_files(shards):
    done = run_python(LIMITED, "RLIMIT_NOFILE", 50, "load", shards / "packed")
    assert "cannot be mapped: Too many open files; each mapped file keeps a descriptor; allow more" in done.stderr

"""Plain checkpoints: what is written is what the formats' own libraries and our readers read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from test_reading import TORCH_DTYPES, random_bits, read_all, same_bits

from embpack.errors import MissingExtraError
from embpack.formats import FORMATS, OutFolder, OutShard, OutTensor, open_checkpoint, write_checkpoint
from embpack.formats.dtypes import ARRAY_DTYPES, NUMPY_DTYPES
from embpack.formats.safetensors import _MAX_HEADER_BYTES

SHAPES = [(), (0,), (0, 4), (3, 0), (1,), (7, 3), (5, 2, 3)]


def out_tensor(name, array, tag, n=2):
    """Let an array come in chunks of n, all in one buffer."""

    def chunks():
        if array.ndim == 0:
            yield array
            return
        room = np.empty((n, *array.shape[1:]), array.dtype)
        for start in range(0, len(array), n):
            chunk = array[start : start + n]
            room[: len(chunk)] = chunk
            yield room[: len(chunk)]
            room.view(np.uint8).fill(0xEE)

    return OutTensor(name, tag, array.shape, chunks)


def write(path, *tensors, **more):
    write_checkpoint(path, [OutShard(path.name, tensors, **more)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tag", sorted(set(ARRAY_DTYPES) - {"F4", "F6_E2M3", "F6_E3M2"}))
def test_safetensors(tmp_path, tag, shape):
    path = tmp_path / "a.safetensors"
    array, after = random_bits(tag, shape), random_bits("F64", (3,))
    write(path, out_tensor("a", array, tag), out_tensor("b", after, "F64"))
    found, dtype = read_all(path, "a")
    assert dtype == tag
    assert same_bits(found, array)
    assert same_bits(read_all(path, "b")[0], after)
    with safe_open(path, framework="np") as file:
        assert file.get_slice("a").get_dtype() == tag
        assert tuple(file.get_slice("a").get_shape()) == shape


def test_safetensors_of_types_smaller_than_a_byte(tmp_path):
    payload = np.arange(12, dtype=np.uint8)
    tensor = OutTensor("a", "F6_E2M3", (8, 2), lambda: iter([payload[:5], payload[5:]]))
    write(tmp_path / "a.safetensors", tensor)
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        [found] = checkpoint.shards[0].tensors
        assert (found.dtype, found.shape) == ("F6_E2M3", (8, 2))
        assert b"".join(chunk.tobytes() for chunk in found.chunks(3)) == payload.tobytes()


@pytest.mark.parametrize("name", ["a", "a.weight", "größe", '"quoted"\n'])
def test_safetensors_header(tmp_path, name):
    path = tmp_path / "a.safetensors"
    sums = []
    metadata = {"sum": "12.0", "größe": '{"k": "v"}'}

    def chunks():
        for _ in range(3):
            yield np.full(2, 2.0)
            sums.append(4.0)

    def make_metadata():
        return {**metadata, "sum": str(sum(sums))}

    write(
        path,
        OutTensor(name, "F64", (6,), chunks),
        metadata=make_metadata,
        metadata_room=len(json.dumps(metadata)),
    )
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    assert (8 + header_bytes) % 8 == 0
    with safe_open(path, framework="np") as file:
        assert file.metadata() == metadata
        assert np.array_equal(file.get_tensor(name), np.full(6, 2.0))


@pytest.mark.parametrize("length", range(20))
def test_safetensors_metadata_of_any_length_fit(tmp_path, length):
    path = tmp_path / "a.safetensors"
    metadata = {"k": "v" * length}
    tensor = out_tensor("a", np.arange(3.0), "F64")
    write(path, tensor, metadata=lambda: metadata, metadata_room=len(json.dumps(metadata)))
    with safe_open(path, framework="np") as file:
        assert file.metadata() == metadata


def test_safetensors_without_tensors(tmp_path):
    write(tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors") == {}


def test_safetensors_metadata_that_do_not_fit(tmp_path):
    metadata = {"k": "v" * 100}
    with pytest.raises(ValueError, match=r"a.safetensors: the metadata is 108 bytes, but room was kept for 50"):
        write(tmp_path / "a.safetensors", metadata=lambda: metadata, metadata_room=50)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_headers_that_no_reader_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("embpack.formats.safetensors._MAX_HEADER_BYTES", 80)
    write(tmp_path / "a.safetensors", out_tensor("a", np.arange(3.0), "F64"))
    with pytest.raises(
        ValueError, match=r"2 tensors take a header of .* bytes, but a safetensors file has at most 80;"
    ):
        write(tmp_path / "b.safetensors", *(out_tensor(name, np.arange(3.0), "F64") for name in "ab"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_safetensors_takes_headers_as_long_as_its_library_does(tmp_path):
    """The limit is the library's: a header that is one byte longer cannot be opened."""
    path = tmp_path / "a.safetensors"
    for more, opens in ((0, True), (1, False)):
        length = _MAX_HEADER_BYTES + more
        with path.open("wb") as file:
            file.write(length.to_bytes(8, "little") + b"{}")
            file.write(b" " * (length - 2))
        if opens:
            safe_open(path, framework="np")
        else:
            with pytest.raises(SafetensorError, match="header too large"):
                safe_open(path, framework="np")


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_that_are_no_text_are_refused_by_every_format(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    message = r"tensor 'caf\\udce9' has a name that is not Unicode, which no reader takes; rename it"
    with pytest.raises(ValueError, match=message):
        write(path, out_tensor("caf\udce9", np.arange(3.0), "F64"))
    assert list(tmp_path.iterdir()) == []


def test_safetensors_tensor_named_like_the_metadata(tmp_path):
    with pytest.raises(ValueError, match="a tensor cannot be named '__metadata__' in a safetensors file"):
        write(tmp_path / "a.safetensors", out_tensor("__metadata__", np.arange(3.0), "F64"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npy", ".npz", ".parquet"])
@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([np.zeros(2)], r"tensor 'a': its chunks are 16 bytes, but F64 of shape \[3\] takes 24"),
        ([np.zeros(2), np.zeros(2)], r"its chunks are at least 32 bytes, but F64 of shape \[3\] takes 24"),
        ([np.zeros(3, np.int64)], "tensor 'a': a chunk is int64, but F64 comes as float64"),
    ],
)
def test_chunks_that_are_not_what_was_promised(tmp_path, suffix, chunks, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / f"a{suffix}", OutTensor("a", "F64", (3,), lambda: iter(chunks)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tag", sorted(TORCH_DTYPES))
def test_torch(tmp_path, tag, shape, suffix):
    path = tmp_path / f"a{suffix}"
    array = random_bits(tag, shape)
    write(path, out_tensor("a", array, tag))
    state = torch.load(path, weights_only=True)
    assert type(state) is dict
    assert state["a"].dtype == TORCH_DTYPES[tag]
    assert tuple(state["a"].shape) == shape
    assert same_bits(read_all(path, "a")[0], array)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tag", sorted(NUMPY_DTYPES))
def test_npy_and_npz(tmp_path, tag, shape):
    array = random_bits(tag, shape)
    write(tmp_path / "a.npy", out_tensor("a", array, tag))
    write(tmp_path / "a.npz", out_tensor("a", array, tag), out_tensor("b/c.weight", array, tag))
    assert same_bits(np.load(tmp_path / "a.npy"), array)
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays) == ["a", "b/c.weight"]
        assert all(same_bits(found, array) for found in arrays.values())
    assert same_bits(read_all(tmp_path / "a.npz", "b/c.weight")[0], array)


@pytest.mark.parametrize("name", ["a\0b", "a" * 65532])
def test_npz_names_that_a_zip_file_cuts_or_cannot_have(tmp_path, name):
    with pytest.raises(ValueError, match=r"a.npz: tensor 'a.* has a name that an .npz file cannot have, with a NUL"):
        write(tmp_path / "a.npz", out_tensor(name, np.arange(3.0), "F64"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 2])
def test_npy_holds_one_tensor(tmp_path, count):
    tensors = [out_tensor(f"a{i}", np.arange(3.0), "F64") for i in range(count)]
    with pytest.raises(ValueError, match=f"an .npy file holds 1 tensor, but there are {count}; write .npz"):
        write(tmp_path / "a.npy", *tensors)


@pytest.mark.parametrize("rows", [0, 1, 20])
def test_parquet(tmp_path, rows, monkeypatch):
    # Row groups of 3 rows, which no chunk fits.
    monkeypatch.setattr("embpack.formats.parquet._GROUP_BYTES", 300)
    path = tmp_path / "a.parquet"
    arrays = {tag: random_bits(tag, (rows, 3)) for tag in ("F16", "F32", "F64")}
    arrays |= {f"1-D {tag}": random_bits(tag, (rows,)) for tag in sorted(set(NUMPY_DTYPES) - {"C64"})}
    tensors = [out_tensor(name, array, name.split()[-1], n) for n, (name, array) in enumerate(arrays.items(), start=1)]
    write(path, *tensors)
    for name, array in arrays.items():
        assert same_bits(read_all(path, name)[0], array)
    with pq.ParquetFile(path) as file:
        assert file.metadata.num_row_groups == -(-rows // 3)
        assert str(file.schema_arrow.field("F32").type).startswith("fixed_size_list<")


@pytest.mark.parametrize(("tag", "shape"), [("F32", ()), ("F32", (2, 2, 2)), ("I64", (2, 2)), ("F32", (2, 0))])
def test_parquet_shapes_that_are_no_columns(tmp_path, tag, shape):
    message = r"tensor 'a' is .* of shape .*; a column holds numbers \[N\] or vectors \[N, d\] of F16, F32, F64; write"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.parquet", out_tensor("a", random_bits(tag, shape), tag))


def test_parquet_columns_of_different_length(tmp_path):
    tensors = [out_tensor("a", np.arange(3.0), "F64"), out_tensor("b", np.arange(4.0), "F64")]
    with pytest.raises(ValueError, match="tensor 'a' has 3 rows and 'b' has 4, but columns are of one length"):
        write(tmp_path / "a.parquet", *tensors)


def test_parquet_without_columns(tmp_path):
    with pytest.raises(ValueError, match="there are no tensors, but a Parquet file has at least one column"):
        write(tmp_path / "a.parquet")


def test_parquet_chunks_are_rows(tmp_path):
    tensor = OutTensor("a", "F64", (2, 2), lambda: iter([np.zeros(4)]))
    with pytest.raises(ValueError, match=r"a chunk has shape \[4\], which is no part of \[2, 2\] along axis 0"):
        write(tmp_path / "a.parquet", tensor)


@pytest.mark.parametrize(
    ("suffix", "tag", "way_out"),
    [
        (".npy", "BF16", "write .safetensors or .pt"),
        (".npz", "BF16", "write .safetensors or .pt"),
        (".parquet", "BF16", "write .safetensors or .pt"),
        (".parquet", "C64", "write .safetensors or .pt"),
        (".npz", "F8_E4M3", "write .safetensors or .pt"),
        (".pt", "F4", "write .safetensors"),
    ],
)
def test_types_that_a_format_cannot_hold(tmp_path, suffix, tag, way_out):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match=f"{path}: tensor 'a' is {tag}, which it cannot hold; {way_out}"):
        write(path, out_tensor("a", random_bits(tag, (4, 2)), tag))
    assert list(tmp_path.iterdir()) == []


def test_shards(tmp_path):
    a, b, c = random_bits("F32", (5, 2)), random_bits("BF16", (3,)), random_bits("I64", ())
    shards = [
        OutShard("m-1.safetensors", (out_tensor("a", a, "F32"), out_tensor("b", b, "BF16"))),
        OutShard("sub/m-2.safetensors", (out_tensor("c", c, "I64"),), lambda: {"k": "v"}, 20),
    ]
    write_checkpoint(tmp_path / "out", shards, OutFolder("model.safetensors.index.json"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 40 + 6 + 8},
        "weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "sub/m-2.safetensors"},
    }
    for name, array in {"a": a, "b": b, "c": c}.items():
        assert same_bits(read_all(tmp_path / "out", name)[0], array)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert [shard.metadata for shard in checkpoint.shards] == [{}, {"k": "v"}]


def test_shards_do_not_replace_a_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError, match="is a folder that is not empty"):
        write_checkpoint(tmp_path, [OutShard("m.safetensors", ())], OutFolder("model.safetensors.index.json"))


def test_failure_in_a_shard_leaves_nothing(tmp_path):
    bad = OutTensor("b", "F64", (3,), lambda: iter([]))
    shards = [
        OutShard("m-1.safetensors", (out_tensor("a", np.arange(3.0), "F64"),)),
        OutShard("m-2.safetensors", (bad,)),
    ]
    with pytest.raises(ValueError, match="its chunks are 0 bytes"):
        write_checkpoint(tmp_path / "out", shards, OutFolder("model.safetensors.index.json"))
    assert list(tmp_path.iterdir()) == []


def test_several_shards_need_a_folder(tmp_path):
    shards = [OutShard("a", ()), OutShard("b", ())]
    with pytest.raises(ValueError, match="one file is to be written, but there are 2 shards; give a folder"):
        write_checkpoint(tmp_path / "a.safetensors", shards)


def test_names_that_are_there_twice(tmp_path):
    tensor = out_tensor("a", np.arange(3.0), "F64")
    with pytest.raises(ValueError, match="there is more than one tensor named 'a'; rename all but one"):
        write(tmp_path / "a.safetensors", tensor, tensor)


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"the end of its name says no format; what can be written: .safetensors, .pt"):
        write(tmp_path / "a.csv")


def test_a_format_that_is_only_read(tmp_path):
    with pytest.raises(ValueError, match=r"a.gguf: .gguf files are only read; what can be written: .safetensors, .pt"):
        write(tmp_path / "a.gguf", out_tensor("a", np.arange(3.0), "F64"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "package", "message"),
    [
        (".bin", "torch", r"writing .bin files needs PyTorch: pip install '.*torch.*'"),
        (".parquet", "pyarrow", r"writing .parquet files needs PyArrow: pip install '.*(pyarrow|parquet).*'"),
    ],
)
def test_missing_extra(tmp_path, hide_package, suffix, package, message):
    hide_package(package, "embpack.formats.torch", "embpack.formats.parquet")
    with pytest.raises(MissingExtraError, match=message):
        write(tmp_path / f"a{suffix}", out_tensor("a", np.arange(3.0), "F64"))
    assert list(tmp_path.iterdir()) == []


FILL_UP = """
import importlib, resource, sys
from pathlib import Path
import numpy as np
from embpack.formats import FORMATS, OutFolder, OutShard, OutTensor, write_checkpoint
array = np.random.default_rng(0).normal(size=(1000, 100))
tensor = OutTensor("a", "F64", array.shape, lambda: iter(np.split(array, 10)))
path = Path(sys.argv[1])
try:
    importlib.import_module(sys.argv[3])  # before there is a limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    write_checkpoint(path, [OutShard("a.safetensors", (tensor,))], OutFolder(sys.argv[2]) if sys.argv[2] else None)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "index_name", "module"),
    [
        ("a.safetensors", "", "embpack"),
        ("a.pt", "", "embpack.formats.torch"),
        ("a.npy", "", "embpack"),
        ("a.npz", "", "embpack"),
        ("a.parquet", "", "embpack.formats.parquet"),
        ("folder", "a.safetensors.index.json", "embpack"),
    ],
)
def test_no_space_left(tmp_path: Path, name: str, index_name: str, module: str):
    command = [sys.executable, "-c", FILL_UP, str(tmp_path / name), index_name, module]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {tmp_path / name}: the largest size allowed for a file is reached")
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []

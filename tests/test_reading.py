"""Other people's checkpoints: every format and type comes out bit for bit, damage is told in one message."""

import copy
import errno
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damaged import (
    FILES,
    f32_entry,
    safetensors_bytes,
    write_damaged,
    write_evil_array,
    write_evil_pickle,
    write_gguf,
    write_shards,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from embpack.errors import FormatError, MissingExtraError
from embpack.formats import FORMATS, INDEX_SUFFIX, SourceTensor, open_checkpoint
from embpack.formats.base import rechunk
from embpack.formats.dtypes import ARRAY_DTYPES, NUMPY_DTYPES
from embpack.formats.mapped import is_mapped

NUMPY_TAGS = sorted(NUMPY_DTYPES)
CHUNKS = [1, 2, 3, 7, 8, 1000]


def random_bits(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """Every bit pattern, NaN payloads and all; booleans are 0 or 1."""
    rng = np.random.default_rng(len(shape))
    if tag == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = ARRAY_DTYPES[tag]
    raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check_array(array):
    assert array.flags.c_contiguous
    assert array.flags.aligned
    assert array.dtype.isnative


def find_tensor(checkpoint, name):
    [tensor] = [t for shard in checkpoint.shards for t in shard.tensors if t.name == name]
    return tensor


def read_all(path, name, n=3):
    """Read a tensor in chunks of n, and check what a chunk must be."""
    with open_checkpoint(path) as checkpoint:
        tensor = find_tensor(checkpoint, name)
        chunks = read_chunks(tensor, n)
        for chunk in chunks:
            check_array(chunk)
        if tensor.shape:
            assert [len(chunk) for chunk in chunks[:-1]] == [n] * (len(chunks) - 1)
            array = np.concatenate([np.empty((0, *tensor.shape[1:]), ARRAY_DTYPES[tensor.dtype]), *chunks])
        else:
            [array] = chunks
        again = read_chunks(tensor, n)
        assert all(same_bits(a, b) for a, b in zip(chunks, again, strict=True))
        assert array.shape == tensor.shape
        assert array.nbytes == tensor.nbytes
        whole = tensor.read()
        check_array(whole)
        assert same_bits(whole, array)
        return np.array(array), tensor.dtype


def read_chunks(tensor, n, *rows):
    """Chunks, which the next ones may overwrite."""
    return [chunk.copy() for chunk in tensor.chunks(n, *rows)]


def resident_kib():
    """Memory that mapped files take."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def notes(path):
    with open_checkpoint(path) as checkpoint:
        return checkpoint.left_out


def names(path):
    with open_checkpoint(path) as checkpoint:
        return [tensor.name for shard in checkpoint.shards for tensor in shard.tensors]


@pytest.mark.parametrize("key", sorted(FILES))
def test_damaged_file(tmp_path, key):
    path, message = write_damaged(tmp_path, key)
    for read in (lambda tensor: list(tensor.chunks(3)), SourceTensor.read):
        with pytest.raises(FormatError, match=message) as caught, open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.shards[0].tensors:
                read(tensor)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_evil_pickle, write_evil_array])
def test_pickles_are_never_run(tmp_path, write):
    path = write(tmp_path, tmp_path / "witness")
    with pytest.raises(FormatError, match="pickles are never run"), open_checkpoint(path):
        pass
    assert not (tmp_path / "witness").exists()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.pt: no such file; what can be read: .safetensors, .pt, .pth, .bin"):
        open_checkpoint(tmp_path / "a.pt").__enter__()


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"a.csv: the end of its name says no format that is known; what can be read"):
        open_checkpoint(tmp_path / "a.csv").__enter__()


def test_suffix_in_capitals(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert names(tmp_path / "A.NPY") == ["A"]


@pytest.mark.parametrize(
    ("suffix", "package", "message"),
    [
        (".pt", "torch", r"reading .pt files needs PyTorch: pip install '.*torch.*'"),
        (".parquet", "pyarrow", r"reading .parquet files needs PyArrow: pip install '.*(pyarrow|parquet).*'"),
        (".gguf", "gguf", r"reading .gguf files needs gguf: pip install '.*gguf.*'"),
    ],
)
def test_missing_extra(tmp_path, hide_package, suffix, package, message):
    hide_package(package, "embpack.formats.torch", "embpack.formats.parquet", "embpack.formats.gguf")
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(MissingExtraError, match=message):
        open_checkpoint(tmp_path / f"a{suffix}").__enter__()


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_rechunk(lengths, n):
    buffer = np.empty((9, 2), np.int64)
    whole = np.arange(2 * sum(lengths)).reshape(-1, 2)

    def chunks():
        start = 0
        for length in lengths:
            buffer[:length] = whole[start : start + length]
            yield buffer[:length]
            start += length

    found = [chunk.copy() for chunk in rechunk(chunks(), n)]
    assert [len(chunk) for chunk in found[:-1]] == [n] * (len(found) - 1)
    assert np.array_equal(np.concatenate([whole[:0], *found]), whole)
    assert all(len(chunk) for chunk in found)


# Ranges of rows

ROWS, DIM = 20, 3
TABLE = np.random.default_rng(0).standard_normal((ROWS, DIM), np.float32)


def write_unaligned(path):
    header = {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": f32_entry([ROWS, DIM], start=1)}
    path.write_bytes(safetensors_bytes(header, b"x" + TABLE.tobytes()))


def write_groups(path):
    column = pa.FixedSizeListArray.from_arrays(pa.array(TABLE.reshape(-1)), DIM)
    pq.write_table(pa.table({"a": column}), path, row_group_size=7)


TENSOR = torch.from_numpy(TABLE)
# A name of a file, and what writes TABLE into it under the name a; each goes its own way through a reader.
# These suffixes are .pt's.
SHARDS_OF_TWO = {"m-1.safetensors": ["a"], "m-2.safetensors": ["b"]}
SAME_READERS = {".pth", ".bin", ".ckpt"}
SOURCES = {
    "aligned.safetensors": lambda path: save_file({"a": TABLE}, path),
    "unaligned.safetensors": write_unaligned,
    "rows/a.npy": lambda path: np.save(path, TABLE),
    "columns/a.npy": lambda path: np.save(path, np.asfortranarray(TABLE)),
    "swapped/a.npy": lambda path: np.save(path, TABLE.astype(">f4")),
    "stored.npz": lambda path: np.savez(path, a=TABLE),
    "deflated.npz": lambda path: np.savez_compressed(path, a=TABLE),
    "columns.npz": lambda path: np.savez_compressed(path, a=np.asfortranarray(TABLE)),
    "columns-stored.npz": lambda path: np.savez(path, a=np.asfortranarray(TABLE)),
    "mapped.pt": lambda path: torch.save({"a": TENSOR}, path),
    "columns.pt": lambda path: torch.save({"a": TENSOR.t().contiguous().t()}, path),
    "old.pt": lambda path: torch.save({"a": TENSOR}, path, _use_new_zipfile_serialization=False),
    "groups.parquet": write_groups,
    "numbers.gguf": lambda path: write_gguf(path, {"a": TABLE}),
}


def test_each_format_is_read_by_ranges():
    assert {Path(name).suffix for name in SOURCES} >= set(FORMATS) - SAME_READERS


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / request.param
    path.parent.mkdir(exist_ok=True)
    SOURCES[request.param](path)
    with open_checkpoint(path) as checkpoint:
        yield find_tensor(checkpoint, "a")


def check_range(tensor, start, stop, n):
    expected = TABLE[start:stop]
    rows = tensor.read(start, stop)
    check_array(rows)
    assert same_bits(rows, expected)
    chunks = read_chunks(tensor, n, start, stop)
    for chunk in chunks:
        check_array(chunk)
    assert [len(chunk) for chunk in chunks] == [min(n, len(expected) - at) for at in range(0, len(expected), n)]
    assert same_bits(np.concatenate([TABLE[:0], *chunks]), expected)


CHANGES = {
    "changed from [0-9]+ to [0-9]+ bytes": lambda path: os.truncate(path, path.stat().st_size // 2),
    "changed from [0-9]+ to 0 bytes": lambda path: os.truncate(path, 0),
    "written to": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "replaced by another file": lambda path: (
        shutil.copy(path, path.with_name("new")) and path.with_name("new").replace(path)
    ),
    "deleted or moved": lambda path: path.unlink(),
}


def read_while(path, change):
    """Read a tensor, and change its file after the first chunk."""
    with open_checkpoint(path) as checkpoint:
        chunks = find_tensor(checkpoint, "a").chunks(3)
        next(chunks)
        change()
        list(chunks)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", SOURCES)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, name, how):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    SOURCES[name](path)
    os.utime(path, (1, 1))  # the clock of a file system may stand still for some milliseconds
    message = f"{path}: was {how} while tensor 'a' was read; run again when nobody writes to it"
    with pytest.raises(FormatError, match=f"^{message}$"):
        read_while(path, lambda: CHANGES[how](path))


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_before_it_is_opened_again_is_refused(tmp_path, how):
    index = write_shards(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"}, SHARDS_OF_TWO)
    path = tmp_path / "m-2.safetensors"
    os.utime(path, (1, 1))
    with open_checkpoint(index) as checkpoint, pytest.raises(FormatError, match=f"m-2.safetensors: was {how} while"):
        assert find_tensor(checkpoint, "a").read().shape == (2,)
        CHANGES[how](path)
        find_tensor(checkpoint, "b").read()


@pytest.mark.parametrize("how", ["replaced by another file", "deleted or moved"])
@pytest.mark.parametrize("mapped", [True, False])
def test_what_was_opened_is_read_whole_whatever_lies_under_its_name(tmp_path, how, mapped):
    path = tmp_path / "a.safetensors"
    save_file({"a": TABLE}, path)
    with open_checkpoint(path) as checkpoint:
        CHANGES[how](path)
        assert same_bits(find_tensor(checkpoint, "a").whole(mapped=mapped), TABLE)


def test_an_error_of_a_file_that_did_not_change_is_told_as_it_is(tmp_path):
    path, message = write_damaged(tmp_path, "npz-checksum")
    with pytest.raises(FormatError, match=message):
        read_while(path, lambda: None)


def test_a_file_that_cannot_be_mapped_is_read_into_memory(tmp_path, monkeypatch):
    def refuse(descriptor, size):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("embpack.formats.source.map_file", refuse)
    path = tmp_path / "a.safetensors"
    save_file({"a": TABLE}, path)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.warns(
            RuntimeWarning, match=f"{path}: cannot be mapped here .No such device., so it is read into memory"
        ),
    ):
        rows = find_tensor(checkpoint, "a").whole(mapped=True)
    assert not is_mapped(rows)
    assert same_bits(rows, TABLE)


def count_open():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_more_files_are_open_than_are_read(tmp_path):
    index = write_shards(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"}, SHARDS_OF_TWO)
    before = count_open()
    with open_checkpoint(index) as checkpoint:
        assert count_open() == before
        chunks = find_tensor(checkpoint, "a").chunks(1)
        next(chunks)
        assert count_open() == before + 1
        del chunks
        assert count_open() == before


@pytest.mark.parametrize("name", ["a.safetensors", "a.npy", "a.npz"])
def test_no_permission_to_read(tmp_path, monkeypatch, name):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr("embpack.formats.source.os.open", refuse)
    with pytest.raises(PermissionError, match=f"no permission to read it; change its mode: '{tmp_path / name}'"):
        open_checkpoint(tmp_path / name).__enter__()


def test_no_permission_to_read_a_shard(tmp_path, monkeypatch):
    index, open_file = write_shards(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"}, SHARDS_OF_TWO), os.open

    def refuse(path, flags):
        if path == index:
            return open_file(path, flags)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("embpack.formats.source.os.open", refuse)
    with pytest.raises(PermissionError, match=r"no permission to read it; change its mode: .*m-1.safetensors"):
        open_checkpoint(index).__enter__()


@pytest.mark.parametrize("n", [1, 3, 100])
@pytest.mark.parametrize(
    ("start", "stop"),
    # Row groups end at 7 and 14.
    [(0, 0), (7, 7), (ROWS, ROWS), (0, 1), (ROWS - 1, ROWS), (0, 5), (7, 14), (6, 8), (3, 17), (13, ROWS), (0, ROWS)],
)
def test_range(source, start, stop, n):
    check_range(source, start, stop, n)


@given(st.integers(0, ROWS), st.integers(0, ROWS), st.integers(1, ROWS + 1))
def test_any_range(source, one, other, n):
    check_range(source, min(one, other), max(one, other), n)


def test_range_without_an_end(source):
    assert same_bits(source.read(4), TABLE[4:])
    assert same_bits(np.concatenate(read_chunks(source, 3, 4)), TABLE[4:])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, ROWS + 1), (ROWS + 1, ROWS + 1), (ROWS + 1, None)])
def test_range_that_is_not_there(source, start, stop):
    message = rf"tensor 'a' has no rows \[{start}, .*\), its shape is \[20, 3\]; give 0 <= start <= stop <= 20"
    with pytest.raises(ValueError, match=message):
        source.read(start, stop)
    with pytest.raises(ValueError, match=message):
        source.chunks(3, start, stop)


@pytest.mark.parametrize("n", [0, -1])
def test_chunks_of_no_rows(source, n):
    with pytest.raises(ValueError, match=f"tensor 'a' is to be read {n} rows at a time; give a positive number"):
        source.chunks(n)


def write_one_value(folder, suffix, value):
    path = folder / f"a{suffix}"
    if suffix == ".safetensors":
        save_file({"a": value}, path)
    elif suffix == ".pt":
        torch.save({"a": torch.from_numpy(value)}, path)
    elif suffix == ".npy":
        np.save(path, value)
    else:
        np.savez(path, a=value)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npy", ".npz"])
def test_ranges_of_one_value(tmp_path, suffix):
    value = np.array(2.5)
    with open_checkpoint(write_one_value(tmp_path, suffix, value)) as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        [chunk] = tensor.chunks(1)
        for found in (chunk, tensor.read(), tensor.read(0, 1)):
            assert same_bits(found, value)
        assert same_bits(tensor.read(0, 0), np.empty(0))
        assert list(tensor.chunks(1, 1)) == []
        with pytest.raises(ValueError, match=r"no rows \[0, 2\), its shape is \[\]; give 0 <= start <= stop <= 1"):
            tensor.read(0, 2)


def test_ranges_of_rows_without_values(tmp_path):
    save_file({"a": np.zeros((5, 0), np.float32)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert tensor.read(1, 4).shape == (3, 0)
        assert [chunk.shape for chunk in tensor.chunks(2, 1, 4)] == [(2, 0), (1, 0)]


@pytest.mark.parametrize(
    ("tag", "shape", "whole"), [("F4", (8, 4), 1), ("F4", (8, 3), 2), ("F6_E2M3", (8, 2), 2), ("F6_E3M2", (8, 1), 4)]
)
def test_ranges_of_types_smaller_than_a_byte(tmp_path, tag, shape, whole):
    bits = (4 if tag == "F4" else 6) * shape[1]
    payload = np.arange(8 * bits // 8, dtype=np.uint8)
    header = {"a": {"dtype": tag, "shape": shape, "data_offsets": [0, len(payload)]}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, payload.tobytes()))
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        for start, stop in itertools.combinations_with_replacement(range(9), 2):
            if start < stop and (start % whole or stop % whole):
                message = rf"tensor 'a' is {tag} .* rows \[{start}, {stop}\) begin or .*; give multiples of {whole}"
                with pytest.raises(ValueError, match=message):
                    tensor.read(start, stop)
            else:
                expected = payload[start * bits // 8 : stop * bits // 8]
                assert same_bits(tensor.read(start, stop), expected)
                assert b"".join(chunk.tobytes() for chunk in tensor.chunks(3, start, stop)) == expected.tobytes()


def test_ranges_of_no_rows_smaller_than_a_byte(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [0, 4], "data_offsets": [0, 0]}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b""))
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert same_bits(tensor.read(), np.empty(0, np.uint8))
        assert list(tensor.chunks(3)) == []


@pytest.mark.parametrize("mapped", [True, False])
def test_a_whole_tensor_is_a_view_of_the_mapped_file_or_memory_of_its_own(tmp_path, mapped):
    save_file({"a": TABLE}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        rows = find_tensor(checkpoint, "a").whole(mapped=mapped)
    assert is_mapped(rows) == mapped
    assert rows.flags.writeable != mapped
    assert same_bits(rows, TABLE)


def test_row_groups_outside_a_range_are_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    values = np.random.default_rng(0).normal(size=10_000)
    pq.write_table(pa.table({"a": values}), path, row_group_size=5_000, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[4:1000] = b"\xff" * 996
    path.write_bytes(raw)
    with open_checkpoint(path) as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert same_bits(tensor.read(5_000, 10_000), values[5_000:])
        with pytest.raises(FormatError, match="not a Parquet file, or damaged"):
            tensor.read(4_999, 10_000)


def test_pages_after_a_range_are_not_decoded(tmp_path):
    path = tmp_path / "a.parquet"
    values = np.random.default_rng(0).normal(size=200_000)
    pq.write_table(pa.table({"a": values}), path, use_dictionary=False, data_page_size=10_000)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(raw)
    with open_checkpoint(path) as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert same_bits(tensor.read(10, 20), values[10:20])
        assert same_bits(np.concatenate(read_chunks(tensor, 3, 10, 20)), values[10:20])
        with pytest.raises(FormatError, match="not a Parquet file, or damaged"):
            tensor.read()


def test_nulls_are_told_by_their_rows_in_the_file(tmp_path):
    column = pa.array([[1, 2], None, [3, 4], [5, 6], [7, None], [8, 9]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet", row_group_size=4)
    with open_checkpoint(tmp_path / "a.parquet") as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert np.array_equal(tensor.read(2, 4), [[3, 4], [5, 6]])
        with pytest.raises(ValueError, match="is null in row 1; drop"):
            tensor.read(1, 3)
        with pytest.raises(ValueError, match=r"is null at \[4, 1\]; drop"):
            tensor.read(2)


def test_deflated_rows_before_a_range_count_in_the_checksum(tmp_path):
    path = tmp_path / "a.npz"
    values = np.random.default_rng(0).normal(size=50_000)  # more than a stream looks ahead
    np.savez_compressed(path, a=values)
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo("a.npy").CRC.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(checksum, bytes(byte ^ 1 for byte in checksum)))
    with open_checkpoint(path) as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert same_bits(tensor.read(3, 9), values[3:9])
        with pytest.raises(FormatError, match=r"a.npy: not a zip file that can be read, or damaged: Bad CRC-32"):
            tensor.read(3)


# safetensors


@pytest.mark.parametrize("n", CHUNKS)
@pytest.mark.parametrize("tag", NUMPY_TAGS)
def test_safetensors_types(tmp_path, tag, n):
    array = random_bits(tag, (7, 3))
    save_file({"a": array}, tmp_path / "a.safetensors")
    found, dtype = read_all(tmp_path / "a.safetensors", "a", n)
    assert dtype == tag
    assert same_bits(found, array)


@pytest.mark.parametrize(
    ("tag", "numpy_dtype"),
    [("BF16", ml_dtypes.bfloat16), ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
)
def test_safetensors_types_that_numpy_lacks(tmp_path, tag, numpy_dtype):
    bits = random_bits(tag, (7, 3))
    torch_dtype = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[tag]
    tensor = torch.from_numpy(bits.copy()).view(torch_dtype)
    save_torch_file({"a": tensor}, tmp_path / "a.safetensors")
    found, dtype = read_all(tmp_path / "a.safetensors", "a")
    assert dtype == tag
    assert same_bits(found, bits)
    np.testing.assert_array_equal(found.view(numpy_dtype).astype(np.float32), tensor.to(torch.float32).numpy())


@pytest.mark.parametrize(("tag", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
@pytest.mark.parametrize("n", [1, 3, 100])
def test_types_smaller_than_a_byte_come_as_bytes(tmp_path, tag, bits, n):
    payload = bytes(range(8 * 4 * bits // 8))
    header = {"a": {"dtype": tag, "shape": [8, 4], "data_offsets": [0, len(payload)]}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, payload))
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        [tensor] = checkpoint.shards[0].tensors
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (tag, (8, 4), len(payload))
        assert b"".join(chunk.tobytes() for chunk in tensor.chunks(n)) == payload


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (1,), (5, 2, 3)])
def test_safetensors_shapes(tmp_path, shape):
    array = random_bits("F32", shape)
    save_file({"a": array, "b": np.ones(3)}, tmp_path / "a.safetensors")
    assert same_bits(read_all(tmp_path / "a.safetensors", "a")[0], array)


def test_safetensors_unaligned(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "b": f32_entry([5], start=3)}
    array = np.arange(5, dtype=np.float32)
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"abc" + array.tobytes()))
    assert same_bits(read_all(tmp_path / "a.safetensors", "b", 2)[0], array)


def test_safetensors_order_is_that_of_the_file_and_metadata_are_kept(tmp_path):
    header = {"z": f32_entry([2], 8), "a": f32_entry([2], 16), "m": f32_entry([2], 0), "__metadata__": {"k": "v"}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 24))
    with open_checkpoint(str(tmp_path / "a.safetensors")) as checkpoint:
        assert [tensor.name for tensor in checkpoint.shards[0].tensors] == ["m", "z", "a"]
        assert not any(tensor.is_vectors for tensor in checkpoint.shards[0].tensors)
        assert checkpoint.shards[0].metadata == {"k": "v"}
        assert checkpoint.shards[0].file_name == "a.safetensors"
        assert checkpoint.index_name is None
        assert checkpoint.path == tmp_path / "a.safetensors"


@pytest.mark.parametrize("start", [0, 10])
def test_a_file_that_is_read_in_chunks_is_not_mapped(tmp_path, start):
    mebibytes = 64
    save_file({"a": np.ones((mebibytes, 1 << 18), np.float32)}, tmp_path / "a.safetensors")

    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        before = resident_kib()
        most = 0
        for chunk in checkpoint.shards[0].tensors[0].chunks(4, start):
            assert chunk.sum() == chunk.size
            most = max(most, resident_kib() - before)
    assert most < 1024


HEADER = {
    "__metadata__": {"k": "v"},
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [8, 11]},
}


def change_header(path, value):
    """Headers of which one value, at any depth, is another."""

    def alter(part):
        yield value
        if isinstance(part, dict):
            for key in part:
                for altered in alter(part[key]):
                    yield {**part, key: altered}
                yield {name: item for name, item in part.items() if name != key}
        if isinstance(part, list):
            for i in range(len(part)):
                for altered in alter(part[i]):
                    yield [*part[:i], altered, *part[i + 1 :]]
            yield part[1:]
            yield [*part, value]

    for header in alter(HEADER):
        write_anew(path, safetensors_bytes(header, bytes(11)))
        yield header


def write_anew(path, content):
    """Write a file that was not there: file systems put a file that is overwritten on the disk at once."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def is_valid(path):
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False


def is_read(path):
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.shards[0].tensors:
                tensor.read()
            return True
    except FormatError as error:
        assert str(error).startswith(f"{path}: ")
        return False


VALUES = [
    None,
    True,
    0,
    1,
    2,
    8,
    11,
    12,
    -1,
    1.0,
    1 << 62,
    1 << 63,
    1 << 64,
    "F32",
    "F64",
    "x",
    [],
    [0],
    [1 << 62, 4],
    {},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_header_is_valid_where_the_library_says_so(tmp_path, value):
    path = tmp_path / "a.safetensors"
    for header in change_header(path, value):
        assert is_read(path) == is_valid(path), header


def test_any_byte_of_a_header_altered_is_judged_as_by_the_library(tmp_path):
    path = tmp_path / "a.safetensors"
    whole = safetensors_bytes(HEADER, bytes(11))
    for at, byte in itertools.product(range(len(whole) - 11), b'\x00 "0}]\x80'):
        write_anew(path, whole[:at] + bytes([byte]) + whole[at + 1 :])
        assert is_read(path) == is_valid(path), (at, byte)


@pytest.mark.parametrize(
    "text", [b'{"a": NaN}', b'{"\\ud800": {}}', b'{"__metadata__": {"k": "\\udc80"}}', b"\xff\xfe{\0}\0"]
)
def test_a_header_that_is_json_to_python_alone(tmp_path, text):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(text, b""))
    assert not is_valid(path)
    assert not is_read(path)


def test_a_name_that_is_not_unicode_is_what_is_said_to_be_wrong(tmp_path):
    header = b'{"emb\\udce9": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0"))
    with pytest.raises(FormatError, match=r"tensor 'emb\\udce9' has a name that is not Unicode; rename it"):
        names(tmp_path / "a.safetensors")


# shards


def test_shards(tmp_path):
    files = {"m-1.safetensors": ["a", "b"], "m-2.safetensors": ["c"]}
    weight_map = {"c": "m-2.safetensors", "b": "m-1.safetensors", "a": "m-1.safetensors"}
    index = write_shards(tmp_path, weight_map, files)
    for path in (index, tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == index
            assert checkpoint.index_name == index.name
            assert checkpoint.left_out == ()
            found = {shard.file_name: [tensor.name for tensor in shard.tensors] for shard in checkpoint.shards}
        assert found == files


def test_what_an_index_says_beside_is_noted(tmp_path):
    text = {"weight_map": {"a": "m.safetensors"}, "metadata": {"total_size": 8, "total_parameters": 2}}
    write_shards(tmp_path, json.dumps(text).encode(), {"m.safetensors": ["a"]})
    assert notes(tmp_path) == ("index metadata 'total_parameters'",)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map from tensors to files; not the index of a checkpoint"),
        (b"{", "not valid JSON: Expecting property name"),
        (b"[1]", "holds a JSON list, not an object"),
        (b'{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}', "'a' is there twice, and which"),
        ({"a": 3}, "weight_map puts 'a' into 3, which is not the name of a safetensors file"),
        ({"a": "a.pt"}, "weight_map puts 'a' into 'a.pt', which is not the name of a safetensors file"),
        ({"a": "../m.safetensors"}, "into '../m.safetensors', which is outside the index's folder"),
        ({"a": "/m.safetensors"}, "into '/m.safetensors', which is outside the index's folder"),
        ({"a": "s3://b/m.safetensors"}, "into 's3://b/m.safetensors', which is outside the index's folder"),
        ({"a": "x.safetensors"}, "into 'x.safetensors', but there is no such file in .*; download it too"),
        ({"x": "m-1.safetensors"}, "weight_map puts 'x' into m-1.safetensors, but it is in none"),
        (
            {"a": "m-2.safetensors", "c": "m-1.safetensors"},
            "weight_map puts 'a' into m-2.safetensors, but it is in m-1.safetensors; index and files are of different",
        ),
        (
            {"a": "m-1.safetensors", "b": "m-3.safetensors"},
            "tensor 'a' is both in m-1.safetensors and in m-3.safetensors",
        ),
    ],
)
def test_damaged_index(tmp_path, weight_map, message):
    files = {"m-1.safetensors": ["a"], "m-2.safetensors": ["c"], "m-3.safetensors": ["a", "b"]}
    index = write_shards(tmp_path, weight_map, files)
    with pytest.raises(FormatError, match=message) as caught:
        open_checkpoint(index).__enter__()
    assert str(caught.value).startswith(f"{index}: ")


def test_damaged_shard(tmp_path):
    index = write_shards(tmp_path, {"a": "m.safetensors"}, {"m.safetensors": ["a"]})
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"m.safetensors: the file has 0 bytes, a safetensors file at least 8"):
        open_checkpoint(index).__enter__()


def test_a_folder_of_torch_distributed(tmp_path):
    (tmp_path / "__0_0.distcp").touch()
    advice = (
        "__0_0.distcp is of a checkpoint of torch.distributed.checkpoint, but .metadata is missing, which says what is "
        "in such files"
    )
    with pytest.raises(
        FileNotFoundError,
        match=re.escape(
            f"{tmp_path}: no *.safetensors.index.json, no *.safetensors and no .metadata in this folder; {advice}"
        ),
    ):
        open_checkpoint(tmp_path).__enter__()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / '__0_0.distcp'}: {advice}")):
        open_checkpoint(tmp_path / "__0_0.distcp").__enter__()
    (tmp_path / ".metadata").touch()
    with pytest.raises(ValueError, match=re.escape(f"give their folder, {tmp_path}")):
        open_checkpoint(tmp_path / "__0_0.distcp").__enter__()
    with pytest.raises(FormatError, match=re.escape(f"{tmp_path / '.metadata'}: the file is empty, 0 bytes")):
        open_checkpoint(tmp_path).__enter__()


def test_an_index_of_files_of_pytorch(tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    advice = (
        "pytorch_model.bin.index.json is the index of PyTorch's .bin files; pack these one by one, or load the model"
    )
    for path, kind in ((tmp_path, FileNotFoundError), (index, ValueError)):
        with pytest.raises(kind, match=re.escape(advice)):
            open_checkpoint(path).__enter__()


def test_folder_without_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .metadata in this folder; it has no file to read"):
        open_checkpoint(tmp_path).__enter__()
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"in this folder; it has no file to read"):
        open_checkpoint(tmp_path).__enter__()
    (tmp_path / "model.npz").touch()
    with pytest.raises(FileNotFoundError, match=r"choose one of its files: model.npz$"):
        open_checkpoint(tmp_path).__enter__()


def test_folder_with_two_indices(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").touch()
    with pytest.raises(ValueError, match=r"2 indices in this folder; choose one: a.safetensors.index.json, b.safe"):
        open_checkpoint(tmp_path).__enter__()


# PyTorch

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


@pytest.mark.parametrize("shape", [(), (7, 3)])
@pytest.mark.parametrize("tag", sorted(TORCH_DTYPES))
def test_torch_types(tmp_path, tag, shape):
    array = random_bits(tag, shape)
    tensor = torch.from_numpy(array.copy()).view(TORCH_DTYPES[tag])
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        torch.save({"a": tensor}, tmp_path / f"a{suffix}")
        found, dtype = read_all(tmp_path / f"a{suffix}", "a")
        assert dtype == tag
        assert same_bits(found, array)


@pytest.mark.parametrize("n", CHUNKS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_views(tmp_path, n, is_zip):
    base = torch.randn(8, 8)
    state = {
        "columns": base.t(),
        "steps": base[::2, 1:],
        "tied": base,
        "parameter": torch.nn.Parameter(base[2:]),
        "conjugate": torch.randn(7, dtype=torch.complex64).conj(),
        "empty": torch.zeros(0, 3),
    }
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    for name, tensor in state.items():
        expected = tensor.detach().resolve_conj().numpy()
        assert same_bits(read_all(tmp_path / "a.pt", name, n)[0], np.ascontiguousarray(expected))


def test_torch_maps_and_releases(tmp_path):
    tensors = {"rows": torch.randn(60_000, 64), "columns": torch.randn(64, 60_000).t()}
    torch.save(tensors, tmp_path / "a.pt")

    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        before = resident_kib()
        for tensor in checkpoint.shards[0].tensors:
            for start, chunk in enumerate(tensor.chunks(10_000)):
                expected = tensors[tensor.name][start * 10_000 : (start + 1) * 10_000]
                assert np.array_equal(chunk, expected.numpy())
            # Each is 15 MiB.
            assert resident_kib() - before < 4 * 1024


def test_torch_state_dict_of_a_module(tmp_path):
    module = torch.nn.EmbeddingBag(5, 3)
    torch.save(module.state_dict(), tmp_path / "a.pt")
    assert same_bits(read_all(tmp_path / "a.pt", "weight")[0], module.weight.detach().numpy())
    assert notes(tmp_path / "a.pt") == ()


# Where training scripts put the state dict.
WRAPPERS = ["state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params"]


@pytest.mark.parametrize("key", WRAPPERS)
def test_torch_state_dict_in_a_checkpoint(tmp_path, key):
    beside = {"epoch": 3, "optimizer": {}, "best_acc1": torch.tensor(71.2), "pos_emb": torch.zeros(20, 4)}
    torch.save({**beside, key: {"a": torch.zeros(2)}}, tmp_path / "a.pt")
    assert names(tmp_path / "a.pt") == ["a"]
    assert notes(tmp_path / "a.pt") == (
        "entry 'epoch' (int)",
        "entry 'optimizer' (dict)",
        f"entry 'best_acc1' (tensor of shape []; outside {key!r}, which is read: save it by itself)",
        f"entry 'pos_emb' (tensor of shape [20, 4]; outside {key!r}, which is read: save it by itself)",
    )


def test_torch_dict_of_tensors_under_a_name_that_is_not_known(tmp_path):
    torch.save({"teacher": {"a": torch.zeros(2)}, "epoch": 3}, tmp_path / "a.pt")
    message = (
        r"holds dicts of tensors under 'teacher'; save the one that is meant by itself: "
        r"torch.save\(torch.load\(path, weights_only=True\)\['teacher'\], 'weights.pt'\)"
    )
    with pytest.raises(FormatError, match=message):
        names(tmp_path / "a.pt")
    torch.save({"teacher": {"a": torch.zeros(2)}, "b": torch.zeros(3)}, tmp_path / "a.pt")
    assert names(tmp_path / "a.pt") == ["b"]
    assert notes(tmp_path / "a.pt") == ("entry 'teacher' (dict with tensors; save it by itself)",)


class AttributeDict(dict):
    """Lightning's class for hyperparameters: a dict with an attribute for each item."""

    def __getattr__(self, name):
        return self[name]


def lightning_checkpoint(state):
    """What Lightning's Trainer.save_checkpoint writes, with objects that torch.load refuses."""
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_k_models": {}}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}}}],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(lr=0.1, folder=Path("data"), activation=torch.nn.ReLU, scale=np.float32(2)),
    }


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_torch_state_dict_beside_objects_of_any_class(tmp_path, protocol, is_zip):
    base = torch.randn(20, 4)
    state = OrderedDict(
        {
            "emb.weight": base,
            "emb.tied": base,
            "head.weight": torch.nn.Parameter(base.t()),
            "f8": base.to(torch.float8_e5m2),
        }
    )
    state._metadata = {"": {"version": 1}}
    kwargs = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save(lightning_checkpoint(state), tmp_path / "a.ckpt", **kwargs)
    for name in state:
        expected = np.ascontiguousarray(
            state[name].detach().view(torch.uint8 if name == "f8" else torch.float32).numpy()
        )
        assert same_bits(read_all(tmp_path / "a.ckpt", name)[0], expected)
    assert [note.split()[1] for note in notes(tmp_path / "a.ckpt")] == [
        *("'epoch'", "'pytorch-lightning_version'", "'loops'", "'callbacks'", "'optimizer_states'", "'hparams_name'"),
        "'hyper_parameters'",
    ]
    assert notes(tmp_path / "a.ckpt")[-1] == "entry 'hyper_parameters' (test_reading.AttributeDict object)"


def test_torch_state_dict_of_python_2(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "a.pt").read_bytes()
    # A dict {"a": x} becomes OrderedDict([["a", x]]), as Python 2 pickled it, and its string one of bytes.
    pair = raw[raw.index(b"X\x01\x00\x00\x00a") : raw.index(b"s.", raw.index(b"ctorch._utils"))]
    start = raw.index(b"}q\x00" + pair)
    old = b"ccollections\nOrderedDict\n(((U\x01a" + pair.removeprefix(b"X\x01\x00\x00\x00a") + b"lltR."
    (tmp_path / "a.pt").write_bytes(raw[:start] + old + raw[start + len(b"}q\x00" + pair + b"s.") :])
    assert same_bits(read_all(tmp_path / "a.pt", "a")[0], np.arange(3))


def test_torch_parameters_with_attributes(tmp_path):
    parameter = torch.nn.Parameter(TENSOR)
    parameter.tag = "user"
    tensor = TENSOR.clone()
    tensor.tag = "item"
    torch.save({"a": parameter, "b": tensor, "c": torch.nn.Buffer(TENSOR)}, tmp_path / "a.pt")
    for name in "abc":
        assert same_bits(read_all(tmp_path / "a.pt", name)[0], TABLE)


def test_torch_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"a": TENSOR}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert same_bits(read_all(tmp_path / "a.pt", "a")[0], TABLE)


def test_torch_from_a_big_endian_machine(tmp_path):
    torch.save({"a": TENSOR, "rows": TENSOR[::2].bfloat16()}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as saved, zipfile.ZipFile(tmp_path / "b.pt", "w") as swapped:
        for name in saved.namelist():
            raw = saved.read(name)
            if "/data/" in name:
                raw = np.frombuffer(raw, "<u4" if name.endswith("0") else "<u2").byteswap().tobytes()
            swapped.writestr(name, b"big" if name.endswith("byteorder") else raw)
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True)["a"], TENSOR)
    for name in ("a", "rows"):
        assert same_bits(read_all(tmp_path / "b.pt", name)[0], read_all(tmp_path / "a.pt", name)[0])


@given(st.data())
def test_torch_views_of_any_strides(data):
    """Of a storage that is larger than what is read at once: near values and far ones, in any order of dimensions."""
    storage = torch.arange(120_000, dtype=torch.int32)
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    strides = [data.draw(st.sampled_from([0, 1, 2, 3, 5, 25, 700, 6_000])) for _ in shape]
    view = storage.as_strided(shape, strides, data.draw(st.integers(0, 1000)))
    file = io.BytesIO()
    torch.save({"a": view, "whole": storage}, file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pt")
        path.write_bytes(file.getvalue())
        assert same_bits(read_all(path, "a", data.draw(st.integers(1, 6)))[0], np.ascontiguousarray(view.numpy()))


def test_torch_columns_of_a_large_table(tmp_path):
    table = torch.randn(50_000, 6)
    state = {"columns": table.t(), "steps": table[::7, 1:4], "plain": table.t().contiguous().t()}
    torch.save(state, tmp_path / "a.pt")
    for name, view in state.items():
        assert same_bits(read_all(tmp_path / "a.pt", name, 10_000)[0], np.ascontiguousarray(view.numpy()))


def test_torch_expanded_and_tied_tensors_may_be_larger_than_the_file(tmp_path):
    torch.save({"mask": torch.ones(1).expand(1000, 1000), "a": TENSOR, "b": TENSOR}, tmp_path / "a.pt")
    assert same_bits(read_all(tmp_path / "a.pt", "mask", 100)[0], np.ones((1000, 1000), np.float32))
    assert same_bits(read_all(tmp_path / "a.pt", "b")[0], TABLE)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Sparse CSR", "ignore:TypedStorage")
def test_torch_leaves_out_what_is_no_plain_tensor(tmp_path):
    state = {
        "a": torch.zeros(2),
        "epoch": 3,
        "nested": {"b": torch.zeros(2)},
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8),
        "meta": torch.empty(2, device="meta"),
        "complex": torch.zeros(2, dtype=torch.complex128),
    }
    torch.save(state, tmp_path / "a.pt")
    assert names(tmp_path / "a.pt") == ["a"]
    assert notes(tmp_path / "a.pt") == (
        "entry 'epoch' (int)",
        "entry 'nested' (dict with tensors; save it by itself)",
        "entry 'sparse' (sparse or nested tensor; save its .to_dense())",
        "entry 'csr' (sparse or nested tensor; save its .to_dense())",
        "entry 'quantized' (quantized tensor; save its .dequantize())",
        "entry 'meta' (tensor on the meta device, without values)",
        "entry 'complex' (tensor of complex128)",
    )


# NumPy


@pytest.mark.parametrize("n", CHUNKS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("tag", NUMPY_TAGS)
def test_npy_and_npz(tmp_path, tag, endian, order, n):
    array = random_bits(tag, (7, 3))
    stored = np.asarray(array.astype(array.dtype.newbyteorder(endian)), order=order)
    np.save(tmp_path / "a.npy", stored)
    np.savez(tmp_path / "stored.npz", a=stored)
    np.savez_compressed(tmp_path / "compressed.npz", a=stored)
    for name in ("a.npy", "stored.npz", "compressed.npz"):
        found, dtype = read_all(tmp_path / name, "a", n)
        assert dtype == tag
        assert same_bits(found, array)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (1,), (5, 2, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_shapes(tmp_path, shape, order):
    array = np.asarray(random_bits("F32", shape), order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", a=array)
    np.savez_compressed(tmp_path / "compressed.npz", a=array)
    for name in ("a.npy", "a.npz", "compressed.npz"):
        assert same_bits(read_all(tmp_path / name, "a", 2)[0], array)


@pytest.mark.parametrize("span_bytes", [1, 64, 1 << 16])
def test_columns_are_read_one_or_several_at_a_time(tmp_path, monkeypatch, span_bytes):
    monkeypatch.setattr("embpack.formats.stored._SPAN_BYTES", span_bytes)
    array = np.asfortranarray(random_bits("F32", (11, 5, 3)))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", a=array)
    for name, n in itertools.product(("a.npy", "a.npz"), (1, 4, 11)):
        assert same_bits(read_all(tmp_path / name, "a", n)[0], np.ascontiguousarray(array))


def test_a_compressed_array_in_fortran_order_is_in_memory_once(tmp_path, monkeypatch):
    array = np.zeros((1 << 20, 16), np.float32, order="F")
    np.savez_compressed(tmp_path / "a.npz", a=array)
    tracemalloc.start()
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert sum(chunk.nbytes for chunk in tensor.chunks(1 << 10)) == array.nbytes
        assert array.nbytes < tracemalloc.get_traced_memory()[1] < 1.1 * array.nbytes
        tracemalloc.stop()
        monkeypatch.setattr("embpack.formats.npy.MOST_WHOLE_BYTES", array.nbytes - 1)
        message = f"a.npz: a.npy: is compressed and in Fortran order, so that all of its {array.nbytes} bytes would be"
        with pytest.raises(FormatError, match=message):
            next(tensor.chunks(1))


def test_any_byte_of_a_header_of_numpy_altered(tmp_path):
    np.save(tmp_path / "a.npy", TABLE)
    np.savez(tmp_path / "b.npz", a=TABLE)
    for path, length in ((tmp_path / "a.npy", 128), (tmp_path / "b.npz", 200)):
        content = path.read_bytes()
        for at, byte in itertools.product(range(length), b"\x00\x01(['{9,\xff"):
            write_anew(path, content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                with open_checkpoint(path) as checkpoint:
                    for tensor in checkpoint.shards[0].tensors:
                        tensor.read()
            except FormatError as error:
                assert str(error).startswith(f"{path}: ")


PROMISES = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "lzma": zipfile.ZIP_LZMA}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("how", PROMISES)
def test_a_member_that_promises_gigabytes_takes_no_memory(tmp_path, how, order):
    header = io.BytesIO()
    # 3.9 GB, in the header and in the directory.
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": order == "F", "shape": (975_000_000 // 4, 4)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w", PROMISES[how]) as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(1000))
        archive.infolist()[0].file_size = len(header.getvalue()) + 3_900_000_000
    tracemalloc.start()
    with (
        pytest.raises(FormatError, match=r"a.npz: a.npy: ") as caught,
        open_checkpoint(tmp_path / "a.npz") as checkpoint,
    ):
        find_tensor(checkpoint, "a").read()
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    if how != "lzma":
        assert re.search(r"promises 3900000128 bytes, in [0-9]+ of a file of [0-9]+", str(caught.value))


def test_members_that_share_their_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", a=TABLE)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        [info] = archive.infolist()
        again = copy.copy(info)
        again.filename = "b.npy"
        archive.filelist.append(again)
        archive.NameToInfo["b.npy"] = again
        archive._didModify = True
    with pytest.raises(FormatError, match=r"a.npz: b.npy: lies where another member lies; the file is damaged"):
        open_checkpoint(tmp_path / "a.npz").__enter__()


def test_npy_holds_vectors(tmp_path):
    np.save(tmp_path / "words.npy", np.zeros((3, 2)))
    with open_checkpoint(tmp_path / "words.npy") as checkpoint:
        [tensor] = checkpoint.shards[0].tensors
    assert tensor.name == "words"
    assert tensor.is_vectors


def test_npy_with_a_long_header(tmp_path):
    array = np.arange(3.0)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    assert same_bits(read_all(tmp_path / "a.npy", "a")[0], array)


def test_npz_leaves_out_what_is_no_array_of_numbers(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(2), words=np.array(["x"]), objects=np.array([{}], object))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert names(tmp_path / "a.npz") == ["a"]
    assert notes(tmp_path / "a.npz") == (
        "array 'words' (of type <U1)",
        "array 'objects' (of Python objects, which take a pickle to read, and pickles are never run)",
        "member 'readme.txt' (not an array)",
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_with_a_name_twice(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("a.npy", archive.read("a.npy"))
    with pytest.raises(FormatError, match=r"'a.npy' is there twice, and which one is meant cannot be told"):
        open_checkpoint(tmp_path / "a.npz").__enter__()


def test_npz_arrays_may_be_read_in_turns(tmp_path):
    a, b = random_bits("F32", (9, 2)), random_bits("I64", (9,))
    np.savez_compressed(tmp_path / "a.npz", a=a, b=b)
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        pairs = list(zip(*(tensor.chunks(2) for tensor in checkpoint.shards[0].tensors), strict=True))
    assert same_bits(np.concatenate([pair[0] for pair in pairs]), a)
    assert same_bits(np.concatenate([pair[1] for pair in pairs]), b)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_and_npz_of_bfloat16(tmp_path, order):
    array = np.asarray(TABLE.astype(ml_dtypes.bfloat16), order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "stored.npz", a=array)
    np.savez_compressed(tmp_path / "compressed.npz", a=array, fp8=TABLE.astype(ml_dtypes.float8_e4m3fn))
    for name in ("a.npy", "stored.npz", "compressed.npz"):
        found, dtype = read_all(tmp_path / name, "a")
        assert dtype == "BF16"
        assert same_bits(found.view(ml_dtypes.bfloat16), np.ascontiguousarray(array))
    assert notes(tmp_path / "compressed.npz") == (
        "array 'fp8' (of type |V1, raw bytes, of which only bfloat16 is read; save it as .safetensors)",
    )


# Parquet


def vectors(array: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


@pytest.mark.parametrize("n", CHUNKS)
@pytest.mark.parametrize("tag", ["F16", "F32", "F64"])
def test_parquet_vectors(tmp_path, tag, n):
    array = random_bits(tag, (20, 3))
    pq.write_table(pa.table({"id": range(20), "a": vectors(array)}), tmp_path / "a.parquet", row_group_size=7)
    found, dtype = read_all(tmp_path / "a.parquet", "a", n)
    assert dtype == tag
    assert same_bits(found, array)
    with open_checkpoint(tmp_path / "a.parquet") as checkpoint:
        assert [(t.name, t.is_vectors) for t in checkpoint.shards[0].tensors] == [("id", False), ("a", True)]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("tag", sorted(set(NUMPY_TAGS) - {"C64"}))
def test_parquet_numbers(tmp_path, tag, statistics):
    array = random_bits(tag, (20,))
    table = pa.table({"a": pa.array(array)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7, write_statistics=statistics)
    found, dtype = read_all(tmp_path / "a.parquet", "a")
    assert dtype == tag
    assert same_bits(found, array)


@pytest.mark.parametrize("rows", [[[]] * 20, [None] * 20, [[1.0], [], None, [1.0, 2.0]] * 5])
def test_lists_of_one_value_on_average_are_left_out_where_some_are_empty(tmp_path, rows):
    vectors = pa.array([[1.0, 2.0]] * 20, pa.list_(pa.float32()))
    pq.write_table(pa.table({"emb": vectors, "rare": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    assert names(tmp_path / "a.parquet") == ["emb"]
    assert ["'rare'" in note and "some are null" in note for note in notes(tmp_path / "a.parquet")] == [True]


@pytest.mark.parametrize("statistics", [True, False])
def test_parquet_leaves_out_other_columns(tmp_path, statistics):
    table = pa.table(
        {
            "word": ["a", "b"],
            "list": [[1.0], [2.0, 3.0]],
            "large": pa.array([[1.0], [2.0, 3.0]], pa.large_list(pa.float32())),
            "integers": [[1], [2]],
            "nested": [[[1.0]], [[2.0]]],
            "ints": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
            "gaps": [1, None],
            "when": pa.array([1, 2], pa.date32()),
            "record": [{"x": 1}, {"x": 2}],
            "permuted": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 2, 3), np.float32).transpose(0, 2, 1)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=statistics)
    why = "of several lengths, or some are null; only vectors of one length are read"
    assert names(tmp_path / "a.parquet") == []
    assert [note.replace("item:", "element:") for note in notes(tmp_path / "a.parquet")] == [
        "column 'word' (string)",
        f"column 'list' (list<element: double>, {why})",
        f"column 'large' (large_list<element: float>, {why})",
        "column 'integers' (list<element: int64>)",
        "column 'nested' (list<element: list<element: double>>)",
        "column 'ints' (fixed_size_list<element: int8>[2])",
        "column 'gaps' (int64, with nulls)",
        "column 'when' (date32[day])",
        "column 'record' (struct<x: int64>)",
        "column 'permuted' (extension<arrow.fixed_shape_tensor[value_type=float, shape=[2,3], permutation=[1,0]]>)",
    ]


LISTS = {
    "list": lambda rows: pa.array(list(rows), pa.list_(pa.float32())),
    "large": lambda rows: pa.array(list(rows), pa.large_list(pa.float32())),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray,
}


@pytest.mark.parametrize("n", CHUNKS)
@pytest.mark.parametrize("kind", LISTS)
def test_parquet_lists_of_one_length(tmp_path, kind, n):
    array = np.random.default_rng(0).standard_normal((20, 3), np.float32)
    # Columns of the file before it are as many as their types have parts.
    record = pa.array([{"x": 1, "y": [{"z": "w"}], "m": [2.5, 3.5]}] * 20)
    columns = {"record": record, "a": LISTS[kind](array), "last": range(20)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=7)
    found, dtype = read_all(tmp_path / "a.parquet", "a", n)
    assert dtype == "F32"
    assert same_bits(found, array)
    with open_checkpoint(tmp_path / "a.parquet") as checkpoint:
        assert find_tensor(checkpoint, "a").is_vectors


def test_parquet_as_pandas_and_duckdb_write_vectors(tmp_path):
    # Lists, each an array of its own, and without Arrow's schema, which would say what kind of lists they are.
    array = np.random.default_rng(0).standard_normal((20, 16), np.float32)
    table = pa.table({"id": range(20), "a": pa.array(list(array))})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    assert same_bits(read_all(tmp_path / "a.parquet", "a")[0], array)
    pq.write_table(pa.table({"a": vectors(array)}), tmp_path / "b.parquet", store_schema=False)
    assert same_bits(read_all(tmp_path / "b.parquet", "a")[0], array)


def test_parquet_tensors_of_more_dimensions(tmp_path):
    array = np.random.default_rng(0).standard_normal((20, 2, 3), np.float32)
    pq.write_table(pa.table({"a": LISTS["tensor"](array)}), tmp_path / "a.parquet")
    assert same_bits(read_all(tmp_path / "a.parquet", "a")[0], array)
    with open_checkpoint(tmp_path / "a.parquet") as checkpoint:
        assert not find_tensor(checkpoint, "a").is_vectors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [[1, 2], [3], [4, 5, 6], [7, 8]],
            "has 1 values in row 1, and on average 2; only vectors of one length are read",
        ),
        ([[1, 2], [3, 4], None, [5, 6, 7]], "is null in row 2; drop such rows or fill them"),
        ([[1, 2], [3, None]], r"is null at \[1, 1\]; drop such rows or fill them"),
        ([[1, 2], [3, 4, 5], []], "has 3 values in row 1, and on average 2; only vectors"),
    ],
)
def test_parquet_lists_that_only_look_as_if_of_one_length(tmp_path, rows, message):
    pq.write_table(pa.table({"a": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet: column 'a' {message}"):
        read_all(tmp_path / "a.parquet", "a", 2)


def test_parquet_rows_that_are_too_long_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("embpack.formats.parquet.MOST_LIST_VALUES", 3)
    table = pa.table({"a": vectors(np.zeros((2, 4), np.float32)), "b": vectors(np.zeros((2, 3), np.float32))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert names(tmp_path / "a.parquet") == ["b"]
    [note] = notes(tmp_path / "a.parquet")
    assert note.endswith("[4], 4 values a row; at most 3 are read, a row is in memory whole)")


def test_parquet_names_with_dots(tmp_path):
    array = random_bits("F32", (4, 2))
    table = {"a": pa.array([0, 1, 2, 3]), "a.b": vectors(array), "a.c": [{"b": 1}] * 4}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert same_bits(read_all(tmp_path / "a.parquet", "a")[0], np.arange(4))
    assert same_bits(read_all(tmp_path / "a.parquet", "a.b")[0], array)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1, 2], [3, 4], [5, 6], None], r"column 'a' is null in row 3; drop such rows or fill them"),
        ([[1, 2], [3, 4], [5, None], [7, 8]], r"column 'a' is null at \[2, 1\]; drop such rows or fill them"),
    ],
)
def test_parquet_nulls_in_vectors(tmp_path, column, message):
    table = pa.table({"a": pa.array(column, pa.list_(pa.float32(), 2))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=f"a.parquet: {message}"):
        read_all(tmp_path / "a.parquet", "a", 2)


def test_parquet_without_rows(tmp_path):
    table = pa.table({"a": pa.array([], pa.list_(pa.float32(), 2)), "b": pa.array([], pa.int64())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet", "a")[0].shape == (0, 2)
    assert read_all(tmp_path / "a.parquet", "b")[0].shape == (0,)


def test_parquet_with_a_name_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FormatError, match="column 'a' is there twice; rename one"):
        open_checkpoint(tmp_path / "a.parquet").__enter__()


def test_parquet_pages_that_are_too_large_are_told(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": vectors(TABLE), "b": range(ROWS)}), path, use_dictionary=False, compression="none")
    assert same_bits(read_all(path, "a")[0], TABLE)
    monkeypatch.setattr("embpack.formats.parquet.MOST_PAGE_BYTES", TABLE.nbytes)
    with pytest.raises(FormatError, match=r"the page at byte 4 takes \d+ bytes, and at most 240 may be in memory"):
        read_all(path, "a")
    assert same_bits(read_all(path, "b")[0], np.arange(ROWS))


def test_parquet_with_a_damaged_footer(tmp_path):
    # Arrow opens some of these, and ends the process when it is asked of their columns.
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(50), "b": [[1.0]] * 50}), path, row_group_size=20)
    raw = path.read_bytes()
    refused = 0
    for at in range(len(raw) - 8 - int.from_bytes(raw[-8:-4], "little"), len(raw) - 8):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            with open_checkpoint(path) as checkpoint:
                for tensor in checkpoint.shards[0].tensors:
                    list(tensor.chunks(20))
        except ValueError as error:  # a FormatError, or a column that is another by now
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 100


def test_readers_are_reached(tmp_path):
    for suffix in (*FORMATS, INDEX_SUFFIX):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
        with pytest.raises(FormatError, match=f"a{suffix}: "):
            open_checkpoint(tmp_path / f"a{suffix}").__enter__()

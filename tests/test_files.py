"""save and load: round trips, what docs/format.md promises, and files that are not what they should be."""

import gc
import hashlib
import json
import mmap
import os
import re
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from checkpoints import (
    LENGTH_BYTES,
    Arrays,
    checksum_header,
    names_in,
    read_raw,
    run_python,
    write_raw,
    write_safetensors,
    write_torch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import embpack
from embpack import FormatError
from embpack.layouts import BITS, PARAM_BYTES
from embpack.packed_files import open_packed

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_table(rows=50, dim=24, dtype="float32", seed=0, **kwargs):
    weight = np.random.default_rng(seed).standard_normal((rows, dim)).astype(DTYPES[dtype])
    return embpack.quantize(weight, **kwargs)


@pytest.fixture
def saved(tmp_path):
    """A valid file with the tables "user" and "item"."""
    path = tmp_path / "tables.safetensors"
    embpack.save(path, {"user": make_table(), "item": make_table(7, 5, bits=8)})
    return path


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", PARAM_BYTES)
@pytest.mark.parametrize("bits", BITS)
def test_a_table_comes_back_whole(tmp_path, bits, param_dtype, dtype):
    table = make_table(dtype=dtype, bits=bits, param_dtype=param_dtype)
    embpack.save(tmp_path / "t.safetensors", {"user": table})
    loaded = embpack.load(tmp_path / "t.safetensors", verify=True)["user"]
    assert loaded.packed.tobytes() == table.packed.tobytes()
    assert loaded.row_format == table.row_format
    assert (loaded.dtype, loaded.method, loaded.loss) == (dtype, table.method, table.loss)
    assert loaded[[3, 0]].tobytes() == table[[3, 0]].tobytes()


def test_a_table_without_method_and_loss_comes_back_so(tmp_path):
    table = embpack.PackedTable.from_packed(make_table().packed, embedding_dim=24)
    embpack.save(tmp_path / "t.safetensors", {"adopted": table})
    loaded = embpack.load(tmp_path / "t.safetensors")["adopted"]
    assert (loaded.method, loaded.loss) == ("", None)


def test_tables_come_back_in_order_and_under_any_name(tmp_path):
    names = ["b", "a", "emb_bag.0.weight", 'quote"\\', "Wörter", "", "a/b", "[red]:smile:"]
    embpack.save(tmp_path / "t.safetensors", {name: make_table(3, seed=i) for i, name in enumerate(names)})
    loaded = embpack.load(tmp_path / "t.safetensors", verify=True)
    assert list(loaded) == names
    assert [table.packed.tobytes() for table in loaded.values()] == [
        make_table(3, seed=i).packed.tobytes() for i in range(len(names))
    ]


def test_loaded_tables_can_replace_their_own_file(saved):
    before = read_raw(saved)
    embpack.save(saved, embpack.load(saved))
    assert read_raw(saved) == before


# The file, as docs/format.md has it


def test_the_metadata_are_those_of_the_format(tmp_path):
    table = make_table(bits=4)
    embpack.save(tmp_path / "t.safetensors", {"user": table})
    raw = read_raw(tmp_path / "t.safetensors")
    assert set(raw.metadata) == {"embpack"}
    value = json.loads(raw.metadata["embpack"])
    assert value == {
        "version": 2,
        "tables": {
            "user": {
                "layout": "uniform",
                "bits": 4,
                "param_dtype": "float16",
                "num_embeddings": 50,
                "embedding_dim": 24,
                "dtype": "float32",
                "method": "optimal:effort=normal",
                "loss": table.loss,
                "checksum": "sha256:" + hashlib.sha256(raw.tensors["user"].payload).hexdigest(),
            }
        },
        "others": {},
        "checksum": checksum_header(value, {"user": {"dtype": "U8", "shape": [50, 16]}}),
    }


def test_the_checksum_of_a_header_is_that_of_the_format(tmp_path):
    """Worked out by hand, so that other programs know what to write."""
    path = tmp_path / "t.safetensors"
    packed = np.zeros((1, 5), np.uint8)
    embpack.save(path, {"Wörter": embpack.PackedTable.from_packed(packed, embedding_dim=2)})
    covered = (
        '{"others":{},"tables":{"W\\u00f6rter":{"bits":4,"checksum":"sha256:'
        + hashlib.sha256(bytes(5)).hexdigest()
        + '","dtype":"float32","embedding_dim":2,"layout":"uniform","loss":null,"method":"","num_embeddings":1,'
        '"param_dtype":"float16"}},"tensors":{"W\\u00f6rter":["U8",[1,5]]},"version":2}'
    )
    value = json.loads(read_raw(path).metadata["embpack"])
    assert value["checksum"] == "sha256:" + hashlib.sha256(covered.encode()).hexdigest()


def test_the_file_is_header_and_tensors_without_gaps(saved):
    raw = read_raw(saved)
    row_bytes = {"user": 24 // 2 + 4, "item": 5 + 8}
    assert {name: (t.dtype, t.shape) for name, t in raw.tensors.items()} == {
        "user": ("U8", (50, row_bytes["user"])),
        "item": ("U8", (7, row_bytes["item"])),
    }
    assert saved.stat().st_size == LENGTH_BYTES + raw.header_bytes + 50 * row_bytes["user"] + 7 * row_bytes["item"]


def test_any_safetensors_reader_opens_it(saved):
    expected = {name: table.packed for name, table in embpack.load(saved).items()}
    by_numpy = safetensors.numpy.load_file(saved)
    by_torch = safetensors.torch.load_file(saved)
    with safe_open(saved, framework="np") as file:
        by_safe_open = {name: file.get_tensor(name) for name in file.keys()}
    for name, packed in expected.items():
        assert by_numpy[name].tobytes() == packed.tobytes()
        assert by_torch[name].numpy().tobytes() == packed.tobytes()
        assert by_safe_open[name].tobytes() == packed.tobytes()


# Mapping


def base_of(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base


def test_loaded_bytes_are_the_mapped_file(saved):
    packed = embpack.load(saved)["user"].packed
    base = base_of(packed)
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        packed[0, 0] = 0


@pytest.mark.parametrize("then", ["replaced", "deleted"])
def test_loaded_tables_outlive_their_file(saved, then):
    expected = {name: table.dequantize() for name, table in embpack.load(saved).items()}
    loaded = embpack.load(saved)
    gc.collect()
    if then == "replaced":
        embpack.save(saved, {"user": make_table(seed=1), "item": make_table(7, 5, seed=1)})
    else:
        saved.unlink()
    for name, rows in expected.items():
        assert loaded[name].dequantize().tobytes() == rows.tobytes()


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"access": "memory"}], ids=str)
def test_a_file_that_is_replaced_while_it_is_loaded_is_one_of_both(tmp_path, options):
    path = tmp_path / "tables.safetensors"
    tables = [{"a": make_table(300, 16, seed=1), "b": make_table(seed=2)}, {"a": make_table(200, 32, seed=3)}]

    def replace():
        while not done.is_set():
            for each in tables:
                embpack.save(path, each)

    embpack.save(path, tables[0])
    done = threading.Event()
    writer = threading.Thread(target=replace)
    writer.start()
    try:
        loads = [embpack.load(path, **options) for _ in range(40)]
    finally:
        done.set()
        writer.join()
    expected = [{name: table.packed.tobytes() for name, table in each.items()} for each in tables]
    for loaded in loads:
        assert {name: table.packed.tobytes() for name, table in loaded.items()} in expected


def test_a_table_in_memory_is_not_mapped(saved):
    table = embpack.load(saved, access="memory")["user"]
    os.truncate(saved, 0)
    assert table.packed.tobytes() == make_table().packed.tobytes()


def test_opening_many_gigabytes_reads_none_of_them(tmp_path):
    """Resident memory, VmRSS of /proc/self/status, of a process before and after load and two lookups."""
    rows, row_bytes = 120_000_000, 36
    entry = {
        "layout": "uniform",
        "bits": 4,
        "param_dtype": "float16",
        "num_embeddings": rows,
        "embedding_dim": 64,
        "dtype": "float32",
        "method": "",
        "loss": None,
        "checksum": "sha256:",
    }
    header = {
        "__metadata__": {"embpack": json.dumps({"version": 1, "tables": {"user": entry}})},
        "user": {"dtype": "U8", "shape": [rows, row_bytes], "data_offsets": [0, rows * row_bytes]},
    }
    path = tmp_path / "large.safetensors"
    write_raw(path, header, size=rows * row_bytes)
    assert path.stat().st_size > 4_000_000_000
    code = """
import sys, embpack
def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024
before = resident()
table = embpack.load(sys.argv[1])["user"]
rows = table[[0, len(table) - 1]]
print(rows.shape, resident() - before)
"""
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr
    shape, growth = done.stdout.rsplit(maxsplit=1)
    assert shape == "(2, 64)"
    assert int(growth) < 20_000_000


# Damage


def error_of(path, **kwargs):
    with pytest.raises(FormatError) as caught:
        embpack.load(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda size, header: 0, "empty, 0 bytes"),
        (lambda size, header: 5, "has 5 bytes"),
        (lambda size, header: 8, "0 bytes are left for a header of"),
        (lambda size, header: 60, "52 bytes are left for a header of"),
        (lambda size, header: LENGTH_BYTES + header - 1, "truncated"),
        (lambda size, header: LENGTH_BYTES + header, "payload is 0 bytes, header promises 891; the file is truncated"),
        (lambda size, header: size - 1, "payload is 890 bytes, header promises 891; the file is truncated"),
    ],
    ids=["empty", "in length", "after length", "in header", "header's end", "no payload", "last byte"],
)
def test_a_truncated_file(saved, kept, message):
    os.truncate(saved, kept(saved.stat().st_size, read_raw(saved).header_bytes))
    assert message in error_of(saved)


def test_a_file_with_bytes_too_many(saved):
    with saved.open("ab") as file:
        file.write(b"more")
    assert "payload is 895 bytes, header promises 891" in error_of(saved)


@pytest.mark.parametrize("garbage", [b"\0" * 100, b"\xff" * 100, b"PK\x03\x04" * 30, b"text " * 30])
def test_garbage(tmp_path, garbage):
    (tmp_path / "g.safetensors").write_bytes(garbage)
    assert error_of(tmp_path / "g.safetensors")


@pytest.mark.parametrize("byte", [0, 399, 799])
def test_a_flipped_byte_is_found_by_verify(saved, byte):
    start = LENGTH_BYTES + read_raw(saved).header_bytes
    content = bytearray(saved.read_bytes())
    content[start + byte] ^= 1
    saved.write_bytes(content)
    tables = embpack.load(saved)
    assert tables["user"].dequantize().shape == (50, 24)
    assert "table 'user' was altered" in error_of(saved, verify=True)


def test_the_table_that_was_altered_is_named(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 0x80
    saved.write_bytes(content)
    assert "table 'item' was altered" in error_of(saved, verify=True)


def rewrite(path: Path, change) -> None:
    """Write a valid file again with other metadata.

    Args:
        change: called with the JSON value of our metadata; returns another one, or the text to put in its place.
    """
    content = path.read_bytes()
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES:start])
    value = change(json.loads(header["__metadata__"]["embpack"]))
    header["__metadata__"]["embpack"] = value if isinstance(value, str) else json.dumps(value)
    write_raw(path, header, content[start:])


def without(value, key):
    return {name: own for name, own in value.items() if name != key}


DAMAGED_METADATA = {
    "no JSON": (lambda value: "{", "'embpack' metadata is damaged"),
    "empty": (lambda value: "", "'embpack' metadata is damaged"),
    "nested too deep": (lambda value: "[" * 200_000, "'embpack' metadata is damaged"),
    "a list": (lambda value: [value], "'embpack' metadata is damaged"),
    "a number": (lambda value: 1, "'embpack' metadata is damaged"),
    "null": (lambda value: "null", "'embpack' metadata is damaged"),
    "no version": (lambda value: {"tables": value["tables"]}, "'embpack' metadata is damaged.*version"),
    "no tables": (lambda value: {"version": 1}, "'embpack' metadata is damaged.*tables"),
    "version 4": (lambda value: {**value, "version": 4}, "format version 4, .* reads versions 1 to 3; update embpack"),
    "version 1 with what is new": (
        lambda value: {**value, "version": 1},
        r"version 1 has \['tables', 'version'\], found \['checksum'",
    ),
    "no others": (
        lambda value: without(value, "others"),
        r"version 2 has \['checksum', 'others', .*, found \['checksum', 'tables'",
    ),
    "no checksum": (
        lambda value: without(value, "checksum"),
        r"version 2 has \['checksum', .*, found \['others', 'tables'",
    ),
    "others are a list": (lambda value: {**value, "others": []}, "others must be checksums by name"),
    "a checksum is a number": (lambda value: {**value, "others": {"a": 1}}, "others must be checksums by name"),
    "checksum is a number": (lambda value: {**value, "checksum": 1}, "its header was altered.* promises 1;"),
    "version 99": (lambda value: {**value, "version": 99}, "format version 99, .* update embpack"),
    "version 4 with other tables": (lambda value: {"version": 4, "tables": []}, "version 4, .* update embpack"),
    "version is text": (lambda value: {**value, "version": "1"}, "damaged \\(version is '1'\\)"),
    "version is true": (lambda value: {**value, "version": True}, "damaged \\(version is True\\)"),
    "version is null": (lambda value: {**value, "version": None}, "damaged \\(version is None\\)"),
    "tables are a list": (lambda value: {**value, "tables": []}, "damaged \\(tables are list\\)"),
}


@pytest.mark.parametrize("damage", DAMAGED_METADATA)
def test_damaged_metadata(saved, damage):
    change, message = DAMAGED_METADATA[damage]
    rewrite(saved, change)
    with pytest.raises(FormatError, match=message) as caught:
        embpack.load(saved)
    assert str(caught.value).startswith(f"{saved}: ")


FIELDS = {
    "bits": [0, 1, 3, 5, 16, -4, "4", 4.0, True, None, 2**64],
    "embedding_dim": [0, -24, 22, 25, 2**31, 2**64, 10**4299, "24", 24.0, None, [24]],
    "num_embeddings": [0, -1, 49, 51, 2**64, 50.0, "50", True, None],
    "layout": ["", "residual", None, 1, {}],
    "param_dtype": ["float64", "", None, 2, "float32"],
    "dtype": ["float64", "int8", "", None, []],
    "method": [None, 1, ["greedy"]],
    "loss": ["0.1", True, [], float("nan"), float("inf"), -0.1, 10**400],
    "checksum": [None, 1, ["sha256:"]],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in FIELDS.items() for value in values],
    ids=lambda value: str(value)[:20],
)
def test_a_field_that_cannot_be(saved, key, value):
    def change(metadata):
        metadata["tables"]["user"][key] = value
        return metadata

    rewrite(saved, change)
    message = error_of(saved)
    assert message.startswith(": table 'user': its metadata says") or "metadata promises U8" in message
    assert key in message or "promises" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry | {"extra": 1}, "does not have the fields that a table has"),
        (lambda entry: {k: v for k, v in entry.items() if k != "loss"}, "does not have the fields"),
        (lambda entry: [], "does not have the fields"),
        (lambda entry: None, "does not have the fields"),
    ],
    ids=["extra field", "missing field", "a list", "null"],
)
def test_an_entry_with_other_fields(saved, change, message):
    def change_entry(metadata):
        metadata["tables"]["user"] = change(metadata["tables"]["user"])
        return metadata

    rewrite(saved, change_entry)
    assert message in error_of(saved)


def test_a_table_that_is_not_in_the_file(saved):
    rewrite(saved, lambda value: {**value, "tables": {"other": value["tables"]["user"]}})
    assert ": table 'other' is in the metadata but not in the file" in error_of(saved)


@pytest.mark.parametrize(("dtype", "shape"), [("I8", [50, 16]), ("U8", [16, 50]), ("U8", [800]), ("F16", [50, 8])])
def test_a_tensor_that_is_no_packed_table(tmp_path, saved, dtype, shape):
    raw = read_raw(saved)
    header = {
        "__metadata__": raw.metadata,
        "user": {"dtype": dtype, "shape": shape, "data_offsets": [0, 800]},
        "item": {"dtype": "U8", "shape": [7, 13], "data_offsets": [800, 891]},
    }
    write_raw(saved, header, raw.tensors["user"].payload + raw.tensors["item"].payload)
    assert f"the metadata promises U8 [50, 16], the file has {dtype} {shape}" in error_of(saved)


DAMAGED_HEADERS = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "offsets are text": b'{"user":{"dtype":"U8","shape":[1],"data_offsets":["0","1"]}}',
    "offsets are endless": b'{"user":{"dtype":"U8","shape":[1],"data_offsets":[0,1e400]}}',
    "metadata is no text": b'{"__metadata__":{"embpack":{"version":1}}}',
    "not UTF-8": b'{"\xff":1}',
}


@pytest.mark.parametrize("header", DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS)
def test_a_damaged_header(tmp_path, header):
    write_raw(tmp_path / "header.safetensors", header)
    assert error_of(tmp_path / "header.safetensors")


def test_a_checkpoint_that_is_not_packed(tmp_path):
    path = write_safetensors(tmp_path, Arrays({"emb.weight": np.ones((4, 8), np.float32)}))
    assert "holds no packed tables (no 'embpack' metadata); pack it with: embpack quantize" in error_of(path)


def test_a_file_of_another_kind(tmp_path):
    path = write_torch(tmp_path, Arrays({"emb.weight": np.ones((4, 8), np.float32)}))
    assert "a file of packed tables ends in .safetensors; pack this one: embpack quantize" in error_of(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pt", "missing"])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        embpack.load(tmp_path / name)


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="index"):
        embpack.load(tmp_path)


# What a header says is covered by its checksum


@pytest.fixture
def checkpoint(tmp_path):
    """A packed checkpoint with tables of three kinds, two of them alike, and two other tensors."""
    rng = np.random.default_rng(0)
    tables = {f"{name}_emb": rng.standard_normal((20, 64)).astype(np.float32) for name in ("a", "b", "r", "k")}
    others = {"linear": rng.standard_normal((4, 6)).astype(np.float32), "bias": np.ones(8, np.int64)}
    source = write_safetensors(tmp_path, Arrays(tables, others), {"format": "pt"})
    variants = {"r_emb": embpack.Variant(rotate="hadamard"), "k_emb": embpack.Variant("kmeans")}
    embpack.quantize_file(source, tmp_path / "packed.safetensors", variants=variants)
    source.unlink()
    return tmp_path / "packed.safetensors"


def swap(mapping, one, other):
    mapping[one], mapping[other] = mapping[other], mapping[one]


# What becomes of the header and of the value of its metadata.
SAYS_OTHER_THINGS = {
    "rotation added": lambda header, value: value["tables"]["a_emb"].update(rotation="hadamard"),
    "rotation removed": lambda header, value: value["tables"]["r_emb"].pop("rotation"),
    "embedding_dim": lambda header, value: value["tables"]["a_emb"].update(embedding_dim=63),
    "codebook to uniform": lambda header, value: value["tables"]["k_emb"].update(layout="uniform", embedding_dim=120),
    "type of the weights": lambda header, value: value["tables"]["a_emb"].update(dtype="float16"),
    "loss": lambda header, value: value["tables"]["a_emb"].update(loss=0.5),
    "method": lambda header, value: value["tables"]["a_emb"].update(method="greedy"),
    "two tables swapped": lambda header, value: swap(value["tables"], "a_emb", "r_emb"),
    "checksums swapped": lambda header, value: swap(value["others"], "linear", "bias"),
    "entry removed": lambda header, value: value["tables"].pop("a_emb"),
    "entry moved": lambda header, value: value["others"].update(a_emb=value["tables"].pop("a_emb")["checksum"]),
    "shape of another tensor": lambda header, value: header["linear"].update(shape=[6, 4]),
    "type of another tensor": lambda header, value: header["bias"].update(dtype="U64"),
    "name of another tensor": lambda header, value: header.update(linear2=header.pop("linear")),
    "another tensor's checksum removed": lambda header, value: value["others"].pop("linear"),
    "a table renamed": lambda header, value: (
        header.update(c_emb=header.pop("a_emb")),
        value["tables"].update(c_emb=value["tables"].pop("a_emb")),
    ),
}


def change_header(path, change):
    """Write a packed file again with a header that says other things; change is given it and our metadata's value."""
    content = path.read_bytes()
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES:start])
    value = json.loads(header["__metadata__"]["embpack"])
    change(header, value)
    header["__metadata__"]["embpack"] = json.dumps(value)
    write_raw(path, header, content[start:])


@pytest.mark.parametrize("change", SAYS_OTHER_THINGS.values(), ids=SAYS_OTHER_THINGS)
def test_a_header_that_says_other_things_is_refused_without_verify(checkpoint, change):
    change_header(checkpoint, change)
    message = f"{checkpoint}: its header was altered, so what its bytes mean is unknown: the header is sha256:"
    with pytest.raises(FormatError, match=message):
        embpack.load(checkpoint)
    with pytest.raises(FormatError, match=message):
        embpack.dequantize_file(checkpoint, checkpoint.with_name("plain.safetensors"))
    assert names_in(checkpoint.parent) == {checkpoint.name}


def test_bytes_of_two_tables_swapped_are_found_by_verify(checkpoint):
    change_header(checkpoint, lambda header, value: swap(header, "a_emb", "b_emb"))
    embpack.load(checkpoint)
    assert "table 'a_emb' was altered" in error_of(checkpoint, verify=True)


@pytest.mark.parametrize("names", [{"x": ""}, {}])
def test_checksums_are_of_the_tensors_that_are_there(saved, names):
    """A header with a checksum that agrees, and others that do not."""

    def change(header, value):
        header["linear"] = {"dtype": "U8", "shape": [0], "data_offsets": [891, 891]}
        value["others"] = names
        value["checksum"] = checksum_header(value, {name: header[name] for name in ("user", "item", "linear")})

    change_header(saved, change)
    assert "others must have a checksum of 'linear', or not have it" in error_of(saved)


def alter_other(path):
    content = bytearray(path.read_bytes())
    content[content.index(read_raw(path).tensors["linear"].payload) + 5] ^= 1
    path.write_bytes(content)


def test_altered_bytes_of_another_tensor_are_found_where_it_is_read(checkpoint):
    alter_other(checkpoint)
    assert set(embpack.load(checkpoint, verify=True)) == {"a_emb", "b_emb", "r_emb", "k_emb"}
    message = f"{checkpoint}: tensor 'linear' was altered: its bytes are sha256:.*; copy it again"
    with open_packed(checkpoint) as packed, pytest.raises(FormatError, match=message):
        packed.verify()
    for suffix in (".safetensors", ".pt", ".npz"):
        with pytest.raises(FormatError, match=message):
            embpack.dequantize_file(checkpoint, checkpoint.with_name(f"plain{suffix}"))
    assert names_in(checkpoint.parent) == {checkpoint.name}


def test_a_file_that_another_program_wrote_again_is_read(checkpoint):
    """Its tensors in another order, other metadata beside ours."""
    before = {name: table.packed.tobytes() for name, table in embpack.load(checkpoint).items()}
    metadata = {"of": "another", **read_raw(checkpoint).metadata}
    safetensors.numpy.save_file(safetensors.numpy.load_file(checkpoint), checkpoint, metadata)
    with open_packed(checkpoint) as packed:
        packed.verify()
    assert {name: table.packed.tobytes() for name, table in embpack.load(checkpoint).items()} == before


def test_a_file_of_version_1_is_verified_with_what_it_has(checkpoint):
    def change(header, value):
        value.update(version=1)
        del value["others"], value["checksum"]

    change_header(checkpoint, change)
    alter_other(checkpoint)
    with open_packed(checkpoint) as packed:
        packed.verify()
    embpack.dequantize_file(checkpoint, checkpoint.with_name("plain.safetensors"))
    content = bytearray(checkpoint.read_bytes())
    content[content.index(read_raw(checkpoint).tensors["r_emb"].payload)] ^= 1
    checkpoint.write_bytes(content)
    with open_packed(checkpoint) as packed, pytest.raises(FormatError, match="table 'r_emb' was altered"):
        packed.verify()


# Damage of every kind: a file is either read or refused.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small valid file, and a place to damage it in."""
    folder = tmp_path_factory.mktemp("small")
    embpack.save(folder / "valid.safetensors", {"u": make_table(6, 5), "i": make_table(2, 3, bits=2)})
    return folder / "valid.safetensors"


def load_and_look_up(path):
    """Return the tables' names, or None where the file is refused as it should be."""
    try:
        tables = embpack.load(path)
    except FormatError as error:
        assert str(path) in str(error)
        return None
    for table in tables.values():
        table.dequantize()
        table.embedding_bag([[0, len(table) - 1]])
        repr(table)
    return list(tables)


@st.composite
def damages(draw):
    """Bytes to flip, as (where, how) with where a share of the file or of its header; and how much of it stays."""
    wheres = st.tuples(st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    return draw(st.lists(wheres, max_size=4)), draw(st.one_of(st.just(1.0), st.floats(0, 1)))


@settings(max_examples=600)
@given(damage=damages())
def test_flipped_and_truncated_anywhere(small, damage):
    flips, kept = damage
    content = bytearray(small.read_bytes())
    header_end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    for in_header, where, mask in flips:
        content[int(where * (header_end if in_header else len(content)))] ^= mask
    path = small.with_name("damaged.safetensors")
    path.write_bytes(content[: round(kept * len(content))])
    assert load_and_look_up(path) in (None, ["u", "i"])


def test_every_byte_of_the_header_flipped(small):
    content = small.read_bytes()
    header_end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    path = small.with_name("flipped.safetensors")
    says = json.loads(read_raw(small).metadata["embpack"])
    for at in range(header_end):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        # The last of a loss's 17 digits may be another one for the same number.
        assert load_and_look_up(path) is None or json.loads(read_raw(path).metadata["embpack"]) == says, at


def test_every_length_but_the_whole_is_refused(small):
    content = small.read_bytes()
    path = small.with_name("short.safetensors")
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert load_and_look_up(path) is None, length


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(key=st.sampled_from(list(FIELDS)), value=ANY_JSON)
def test_any_json_in_a_field(small, key, value):
    path = small.with_name("field.safetensors")
    shutil.copy(small, path)

    def change(metadata):
        metadata["tables"]["u"][key] = value
        return metadata

    rewrite(path, change)
    assert load_and_look_up(path) in (None, ["u", "i"])


@settings(max_examples=150)
@given(value=ANY_JSON)
def test_any_json_as_metadata(small, value):
    path = small.with_name("metadata.safetensors")
    shutil.copy(small, path)
    rewrite(path, lambda _: value)
    assert load_and_look_up(path) is None


# What save refuses


@pytest.mark.parametrize("name", ["tables", "tables.pt", "tables.npz", "tables.safetensors.tmp"])
def test_save_refuses_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"a file of packed tables ends in \.safetensors"):
        embpack.save(tmp_path / name, {"user": make_table()})
    assert names_in(tmp_path) == set()


def test_save_refuses_no_tables(tmp_path):
    with pytest.raises(ValueError, match="there are no tables to save"):
        embpack.save(tmp_path / "t.safetensors", {})
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (make_table(), 'tables is PackedTable; give tables by name: embpack.save(path, {"user": table})'),
        ([make_table()], "tables is list; give tables by name"),
        ({1: make_table()}, "a table's name is 1, not a string; give tables by name"),
        ({"user": np.zeros((4, 8))}, "table 'user' is ndarray; pack it first: embpack.quantize(weight)"),
    ],
)
def test_save_refuses_what_is_no_tables_by_name(tmp_path, tables, message):
    with pytest.raises(TypeError, match=re.escape(f"t.safetensors: {message}")):
        embpack.save(tmp_path / "t.safetensors", tables)
    assert names_in(tmp_path) == set()


def test_save_refuses_names_that_are_no_text(tmp_path):
    """A file of them could be opened by nobody."""
    with pytest.raises(ValueError, match=r"tensor 'caf\\udce9' has a name that is not Unicode, .* rename it"):
        embpack.save(tmp_path / "t.safetensors", {"caf\udce9": make_table()})
    odd = embpack.PackedTable(make_table().packed, make_table().row_format, method="\ud800")
    with pytest.raises(ValueError, match=r"its metadata says method is '\\ud800'"):
        embpack.save(tmp_path / "t.safetensors", {"user": odd})
    assert names_in(tmp_path) == set()


def test_save_refuses_a_table_without_rows(tmp_path):
    empty = embpack.PackedTable.from_packed(np.empty((0, 16), np.uint8), embedding_dim=24)
    with pytest.raises(ValueError, match="table 'user' has no rows; leave it out"):
        embpack.save(tmp_path / "t.safetensors", {"user": empty})
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("attributes", [{"loss": float("nan")}, {"loss": -1.0}, {"method": None}])
def test_save_refuses_what_load_would(tmp_path, attributes):
    table = make_table()
    odd = embpack.PackedTable(table.packed, table.row_format, **attributes)
    [(key, value)] = attributes.items()
    with pytest.raises(ValueError, match=f"table 'user': its metadata says {key} is {value!r}"):
        embpack.save(tmp_path / "t.safetensors", {"user": odd})
    assert names_in(tmp_path) == set()


def test_save_refuses_the_name_of_the_metadata(tmp_path):
    with pytest.raises(ValueError, match="__metadata__"):
        embpack.save(tmp_path / "t.safetensors", {"__metadata__": make_table()})
    assert names_in(tmp_path) == set()


def test_save_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        embpack.save(tmp_path / "missing" / "t.safetensors", {"user": make_table()})
    assert names_in(tmp_path) == set()


def test_save_into_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        embpack.save(tmp_path / "file" / "t.safetensors", {"user": make_table()})
    assert names_in(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_save_into_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="no permission to write"):
        embpack.save(tmp_path / "t.safetensors", {"user": make_table()})


@pytest.mark.parametrize("already_there", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, already_there):
    path = tmp_path / "t.safetensors"
    if already_there:
        embpack.save(path, {"user": make_table()})
    before = path.read_bytes() if already_there else None
    code = """
import resource, sys, numpy, embpack
table = embpack.quantize(numpy.zeros((20000, 64), numpy.float32), "asym")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    embpack.save(sys.argv[1], {"user": table})
except OSError as error:
    print(error)
"""
    done = run_python(code, path)
    assert f"cannot write {path}: the largest size allowed for a file is reached" in done.stdout, done.stderr
    assert names_in(tmp_path) == ({path.name} if already_there else set())
    assert not already_there or path.read_bytes() == before


# What lies beside


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("kmeans-cls:K=5", {".cluster": None}, r"its clusters must be U8 or U16 \[50\], the file has None"),
        ("kmeans-cls:K=5", {".cluster": np.zeros(50, np.int16)}, r"U8 or U16 \[50\], the file has \('I16', \(50,\)\)"),
        ("kmeans-cls:K=5", {".cluster": np.zeros((50, 1), np.uint8)}, r"the file has \('U8', \(50, 1\)\)"),
        ("kmeans-cls:K=5", {".codebook": None}, r"its codebooks must be F16 \[num_codebooks, 16\], the file has None"),
        ("kmeans-cls:K=5", {".codebook": np.zeros((5, 16), np.float32)}, r"F16 \[num_codebooks, 16\]"),
        ("kmeans-cls:K=5", {".codebook": np.zeros((0, 16), np.float16)}, r"the file has \('F16', \(0, 16\)\)"),
        ("trellis", {".codebook": np.zeros((2, 312), np.float32)}, r"its codebooks must be F32 \[1, 312\]"),
    ],
)
def test_arrays_beside_that_are_not_the_layouts_are_refused(tmp_path, method, change, message):
    path = tmp_path / "t.safetensors"
    embpack.save(path, {"user": make_table(method=method)})
    with safe_open(path, "numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    for suffix, array in change.items():
        tensors["user" + suffix] = array
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(left, path, metadata)
    with pytest.raises(FormatError, match=f"table 'user': .*{message}"):
        embpack.load(path)

"""GGUF files as a source: what gguf's own functions make of the same blocks, from the file to a packed table."""

import json
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from damaged import gguf_bytes, gguf_key, gguf_tensor, write_gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from test_reading import find_tensor, notes, random_bits, read_all, read_chunks, same_bits

import embpack
from embpack.formats import gguf as own
from embpack.formats import open_checkpoint
from embpack.formats.dtypes import NUMPY_DTYPES
from embpack.reference import normalized_l2_loss

PLAIN = ("F32", "F16", "F64", "I8", "I16", "I32", "I64")
NOT_UNPACKED = ("Q8_1", "Q8_K", "Q1_0")
BLOCKS = [kind.name for kind, (values, _) in GGML_QUANT_SIZES.items() if values > 1 and kind.name not in NOT_UNPACKED]
SHAPES = [(5,), (7, 3), (2, 7, 3), (2, 1, 7, 3)]


def random_blocks(name, shape, seed=0):
    """Any bytes, as a tensor of that shape has them; scales may be infinite or NaN."""
    kind = GGMLQuantizationType[name]
    values, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // values * num_bytes), np.uint8)
    return blocks, kind


def quantized(name, rows):
    kind = GGMLQuantizationType[name]
    return gguf.quantize(rows, kind), kind


def unpack(blocks, kind):
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, kind)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tag", PLAIN)
def test_plain_numbers(tmp_path, tag, shape):
    array = random_bits(tag, shape)
    write_gguf(tmp_path / "a.gguf", {"first": np.zeros(3, np.float32), "a": array, "last": np.ones(3, np.float32)})
    found, dtype = read_all(tmp_path / "a.gguf", "a")
    assert dtype == tag
    assert found.dtype == NUMPY_DTYPES[tag]
    assert same_bits(found, array)


def test_bfloat16(tmp_path):
    array = random_bits("BF16", (7, 3))
    write_gguf(tmp_path / "a.gguf", {"a": (array.view(np.uint8), GGMLQuantizationType.BF16)})
    found, dtype = read_all(tmp_path / "a.gguf", "a")
    assert dtype == "BF16"
    assert same_bits(found, array)


@pytest.mark.parametrize("n", [1, 3, 100])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_what_gguf_makes_of_them(tmp_path, monkeypatch, name, n):
    monkeypatch.setattr(own, "_VALUES_AT_A_TIME", 512)
    blocks, kind = random_blocks(name, (11, 768))
    write_gguf(tmp_path / "a.gguf", {"first": np.zeros(3, np.float32), "a": (blocks, kind)})
    expected = unpack(blocks, kind)
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        tensor = find_tensor(checkpoint, "a")
        assert (tensor.dtype, tensor.shape, tensor.stored_as) == ("F32", (11, 768), name)
        assert tensor.weight_dtype == "bfloat16"
        assert same_bits(tensor.read(), expected)
        for start, stop in ((0, 0), (0, 11), (2, 3), (4, 11)):
            chunks = read_chunks(tensor, n, start, stop)
            assert same_bits(np.concatenate([expected[:0], *chunks]), expected[start:stop])
        assert [part.read().tobytes() for part in tensor.parts] == [blocks.tobytes()]


def test_every_type_that_gguf_has_is_accounted_for():
    assert {*PLAIN, "BF16", *BLOCKS, *NOT_UNPACKED} == {kind.name for kind in GGML_QUANT_SIZES}
    assert not any(own._can_unpack(GGMLQuantizationType[name]) for name in NOT_UNPACKED)


def write_model(path, rng, table="Q8_0"):
    """As llama.cpp's converter writes a model; returns the values of its table."""
    rows = rng.standard_normal((200, 256), dtype=np.float32)
    layer = random_blocks("Q4_K", (16, 256))
    write_gguf(
        path,
        {
            "token_embd.weight": quantized(table, rows),
            "blk.0.attn_k.weight": layer,
            "blk.1.attn_k.weight": layer,
            "blk.0.ffn_gate_exps.weight": random_blocks("Q4_K", (2, 16, 256)),
            "blk.0.attn_norm.weight": rows[0],
            "position_embd.weight": rows[:20],
            "rope.weight": random_blocks("Q8_K", (2, 256)),
        },
    )
    return unpack(*quantized(table, rows))


LEFT_OUT = [
    "tensor 'blk.0.attn_k.weight' and 1 more (Q4_K, for which safetensors has no type; name does not say embedding)",
    "tensor 'blk.0.ffn_gate_exps.weight' (Q4_K blocks, 3-D, a table is 2-D)",
    "tensor 'rope.weight' (Q8_K blocks, which the installed gguf cannot unpack)",
    "metadata 'general.architecture' and 2 more (about the model)",
]


@pytest.mark.parametrize("table", ["Q8_0", "Q5_1", "Q4_0"])
def test_the_table_of_a_model_is_packed(tmp_path, rng, embpack_command, table):
    values = write_model(tmp_path / "a.gguf", rng, table)
    options = ["--exclude", "position*", "--method", "greedy", "--json"]
    code, out, _ = embpack_command("quantize", tmp_path / "a.gguf", tmp_path / "a.safetensors", *options)
    assert code == 0
    told = json.loads(out)
    assert told["left_out"] == LEFT_OUT
    assert [each["name"] for each in told["other_tensors"]] == ["blk.0.attn_norm.weight", "position_embd.weight"]
    [described] = told["tables"]
    stored = 200 * 256 // 32 * GGML_QUANT_SIZES[GGMLQuantizationType[table]][1]
    assert (described["weight_bytes"], described["dtype"]) == (stored, "bfloat16")
    assert told["totals"]["destination_bytes"] == (tmp_path / "a.safetensors").stat().st_size

    [packed] = embpack.load(tmp_path / "a.safetensors", verify=True).values()
    wanted = embpack.quantize(values, "greedy")
    np.testing.assert_array_equal(packed.packed, wanted.packed)
    np.testing.assert_allclose(described["loss"], normalized_l2_loss(values, wanted.dequantize()), rtol=1e-6)

    assert embpack_command("dequantize", tmp_path / "a.safetensors", tmp_path / "b.safetensors")[0] == 0
    names = ["token_embd.weight", "blk.0.attn_norm.weight", "position_embd.weight"]
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert [(tensor.name, tensor.dtype) for tensor in checkpoint.tensors] == [
            (names[0], "BF16"),
            (names[1], "F32"),
            (names[2], "F32"),
        ]
        assert same_bits(checkpoint.tensors[0].read(), wanted.dequantize("bfloat16"))


def test_a_dry_run_says_what_is_left_out(tmp_path, rng, embpack_command):
    write_model(tmp_path / "a.gguf", rng)
    code, told, _ = embpack_command("quantize", tmp_path / "a.gguf", "--include", "token_embd.weight", "--dry-run")
    assert code == 0
    assert [line.removeprefix("left out: ") for line in told.splitlines() if line.startswith("left out")] == LEFT_OUT
    assert "copied: blk.0.attn_norm.weight (1-D, a table is 2-D)" in told


def test_a_plan_keeps_its_size_without_what_is_left_out(tmp_path, rng):
    write_model(tmp_path / "a.gguf", rng)
    tables = {"include": ["token_embd.weight"], "exclude": ["position*"]}
    ways = [embpack.Variant("greedy", bits) for bits in (4, 8)]
    plan = embpack.plan(tmp_path / "a.gguf", **tables, variants=ways, max_bytes=70_000)
    report = embpack.quantize_file(tmp_path / "a.gguf", tmp_path / "a.safetensors", **tables, variants=plan.variants)
    assert report.file_bytes_after == (tmp_path / "a.safetensors").stat().st_size <= 70_000
    assert report.passed_through == ("blk.0.attn_norm.weight", "position_embd.weight")
    assert list(report.left_out) == LEFT_OUT


def test_rows_that_would_be_no_smaller_than_their_blocks_are_left_out(tmp_path, rng):
    write_gguf(
        tmp_path / "a.gguf",
        {"a_emb": quantized("Q4_0", np.ones((64, 32), np.float32)), "b_emb": rng.random((64, 32), np.float32)},
    )
    report = embpack.quantize_file(tmp_path / "a.gguf", tmp_path / "a.safetensors", method="greedy")
    assert [table.name for table in report.tables] == ["b_emb"]
    assert report.left_out[0] == (
        "tensor 'a_emb' (Q4_0, for which safetensors has no type; packed rows would be no smaller: 1,152 -> 1,280 "
        "bytes)"
    )


def test_values_that_are_infinite_are_named(tmp_path):
    blocks, kind = quantized("Q8_0", np.ones((40, 64), np.float32))
    blocks[31, 34:36] = [0, 0x7C]  # the scale of the second block
    write_gguf(tmp_path / "a.gguf", {"a_emb": (blocks, kind)})
    with pytest.raises(ValueError, match=r"a.gguf: a_emb\[31, 32\] is inf"):
        embpack.quantize_file(tmp_path / "a.gguf", tmp_path / "a.safetensors")


def test_nothing_to_pack(tmp_path, rng):
    write_gguf(
        tmp_path / "a.gguf",
        {"blk.0.attn_k.weight": random_blocks("Q4_K", (16, 256)), "cube": random_blocks("Q8_0", (2, 2, 32))},
    )
    message = (
        r"nothing to pack; name those that are tables with --include: blk.0.attn_k.weight "
        r"\(name does not say embedding\); left out: tensor 'cube' \(Q8_0 blocks, 3-D, a table is 2-D\), metadata "
        r"'general.architecture' and 2 more"
    )
    with pytest.raises(ValueError, match=message):
        embpack.quantize_file(tmp_path / "a.gguf", tmp_path / "a.safetensors")


def test_types_that_are_not_known_are_left_out(tmp_path):
    tensors = gguf_tensor(b"new", [32, 4], 99), gguf_tensor(b"a", [3], offset=64)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(*tensors, payload=bytes(76)))
    assert notes(tmp_path / "a.gguf") == ("tensor 'new' (type 99, which the installed gguf does not know)",)
    assert same_bits(read_all(tmp_path / "a.gguf", "a")[0], np.zeros(3, np.float32))


@pytest.mark.parametrize("version", [2, 3])
def test_headers(tmp_path, version):
    """Every type of value, another alignment, a tensor without dimensions, one without values, and a hole."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    keys = [gguf_key(f"k{kind}".encode(), kind, b"x" * size) for kind, size in sizes.items()]
    keys += [
        gguf_key(f"a{kind}".encode(), 9, struct.pack("<IQ", kind, 3) + b"x" * 3 * size) for kind, size in sizes.items()
    ]
    text = struct.pack("<Q", 2) + b"xy"
    keys += [gguf_key(b"text", 8, text), gguf_key(b"texts", 9, struct.pack("<IQ", 8, 3) + 3 * text)]
    keys += [gguf_key(b"none", 9, struct.pack("<IQ", 8, 0)), gguf_key(b"general.alignment", 4, struct.pack("<I", 64))]
    tensors = gguf_tensor(b"b", [2], offset=128), gguf_tensor(b"a", []), gguf_tensor(b"empty", [0, 4], offset=64)
    raw = gguf_bytes(*tensors, keys=tuple(keys), version=version)
    values = np.arange(34, dtype=np.float32)
    (tmp_path / "a.gguf").write_bytes(raw + bytes(-len(raw) % 64) + values.tobytes())
    assert same_bits(read_all(tmp_path / "a.gguf", "a")[0], values[0].reshape(()))
    assert same_bits(read_all(tmp_path / "a.gguf", "b")[0], values[32:])
    assert read_all(tmp_path / "a.gguf", "empty")[0].shape == (4, 0)


def test_a_header_that_is_too_long(tmp_path, monkeypatch):
    write_gguf(tmp_path / "a.gguf", {"a": np.zeros(3, np.float32)})
    monkeypatch.setattr(own, "MOST_HEADER_BYTES", 100)
    with pytest.raises(embpack.FormatError, match=r"a.gguf: its header has more than 100 bytes; the file is damaged"):
        notes(tmp_path / "a.gguf")


PACK = """
import resource, sys
import embpack
from embpack.formats import gguf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
embpack.quantize_file(sys.argv[1], sys.argv[2], method="greedy", include=["*"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_a_table(tmp_path):
    """Its values would take 250 MB."""
    blocks, kind = random_blocks("Q4_K", (250_000, 256))
    blocks.reshape(-1, 144)[:, 1:4:2] = 0x11  # scales that are small
    write_gguf(tmp_path / "a.gguf", {"a": (blocks, kind)})
    arguments = [sys.executable, "-c", PACK, tmp_path / "a.gguf", tmp_path / "a.safetensors"]
    grown = int(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert grown < 100_000

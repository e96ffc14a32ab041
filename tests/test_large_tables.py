"""Tables in pieces, FP8 and INT8: packed from the command line, looked up and unpacked, against NumPy."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from checkpoints import read_raw
from large_tables import DTYPES, MODELS, OTHERS, Stored, make_qwen_fp8, write_tensors

import embpack


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def published(request):
    return request.param()


def test_published_tables_are_packed_looked_up_and_unpacked(embpack_command, tmp_path, published):
    src, dst, plain = (tmp_path / f"{name}.safetensors" for name in ("model", "packed", "plain"))
    write_tensors(src, published.tensors)
    code, out, _ = embpack_command("quantize", src, "--dry-run", "--json")
    assert code == 0
    told = json.loads(out)
    code, _, err = embpack_command("quantize", src, dst)
    assert (code, err) == (0, "")
    assert told["totals"]["destination_bytes"] == dst.stat().st_size

    packed = embpack.load(dst)
    assert set(packed) == set(published.tables)
    for name, values in published.tables.items():
        expected = embpack.quantize(values)
        assert packed[name].loss == expected.loss  # against what the source means
        np.testing.assert_array_equal(packed[name].packed, expected.packed)
        np.testing.assert_array_equal(packed[name][[0, 300, len(values) - 1]], expected[[0, 300, len(values) - 1]])
        [own] = [table for table in told["tables"] if table["name"] == name]
        parts = [part for part in published.parts if part.startswith(name.removesuffix(".weight") + ".")]
        assert own["weight_bytes"] == sum(published.tensors[part].values.nbytes for part in parts)
        assert (own["dtype"], own["num_pieces"]) == (published.dtype, published.pieces)
        assert {"BF16": "bfloat16", "F32": "float32"}.get(own["stored_as"], own["stored_as"]) == published.stored_as

    code, _, err = embpack_command("dequantize", dst, plain)
    assert (code, err) == (0, "")
    before, after = read_raw(src).tensors, read_raw(plain).tensors
    others = set(published.tensors) - published.parts
    assert set(after) == others | set(published.tables)
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    tag = {"bfloat16": "BF16", "float32": "F32"}[published.dtype]
    for name in published.tables:
        assert after[name].dtype == tag
        assert after[name].payload == packed[name].dequantize(published.dtype).tobytes()


def test_a_dry_run_has_a_line_for_each_table(embpack_command, tmp_path, published):
    src = write_tensors(tmp_path / "model.safetensors", published.tensors)
    code, out, _ = embpack_command("quantize", src, "--dry-run")
    assert code == 0
    pieces = f", {published.pieces} pieces" if published.pieces > 1 else ""
    lines = [line for line in out.splitlines() if f"  {published.stored_as}{pieces}  " in line]
    assert len(lines) == len(published.tables)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tables_are_unpacked_to_a_type(embpack_command, tmp_path, dtype):
    model = make_qwen_fp8()
    src = write_tensors(tmp_path / "model.safetensors", model.tensors)
    dst, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
    embpack.quantize_file(src, dst)
    code, out, _ = embpack_command("dequantize", dst, plain, "--dtype", dtype, "--json")
    assert code == 0
    [(name, values)] = model.tables.items()
    [told] = json.loads(out)["tables"]
    size = 4 if dtype == "float32" else 2
    assert (told["dtype"], told["weight_bytes"]) == (dtype, size * values.size)
    assert read_raw(plain).tensors[name].payload == embpack.load(dst)[name].dequantize(dtype).tobytes()
    code, _, err = embpack_command("dequantize", dst, plain, "--dtype", "float64")
    assert code == 2 and "give one of float32, float16, bfloat16" in " ".join(err.split())
    with pytest.raises(ValueError, match="dtype is 'int8'; give one of float32, float16, bfloat16"):
        embpack.dequantize_file(dst, plain, dtype="int8")


@pytest.mark.parametrize("rotate", [None, "hadamard"])
@pytest.mark.parametrize(
    ("dtype", "code", "found"),
    [
        ("F8_E4M3", 0x7F, "nan"),
        ("F8_E4M3", 0xFF, "nan"),
        ("F8_E5M2", 0x7E, "nan"),
        ("F8_E5M2", 0xFC, "-inf"),
    ],
)
def test_codes_that_are_no_numbers_are_refused_by_row_and_column(tmp_path, dtype, code, found, rotate):
    values = np.zeros((100, 24), np.uint8)
    tensors = {f"e.ngram_embedding.shard_{i}.weight": Stored(dtype, values.copy()) for i in range(12)}
    tensors["e.ngram_embedding.shard_10.weight"].values[37, 21] = code
    tensors["e.ngram_embedding.weight_scale"] = Stored("F32", np.array([0.5], np.float32))
    src = write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=re.escape(f"ngram_embedding.weight[1037, 21] is {found}")):
        embpack.quantize_file(src, tmp_path / "packed.safetensors", rotate=rotate)
    assert not (tmp_path / "packed.safetensors").exists()


def test_scales_that_are_no_numbers_are_refused(tmp_path):
    exponents = np.full((100, 2), 120, np.uint8)
    exponents[7, 1], exponents[6, 1] = 255, 0  # 0 is 2^-127
    codes = np.full((100, 64), 3, DTYPES["F8_E4M3"])
    tensors = {"embed.weight": Stored("F8_E4M3", codes), "embed.scale": Stored("F8_E8M0", exponents)}
    src = write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=re.escape("embed.weight[7, 32] is nan")):
        embpack.quantize_file(src, tmp_path / "packed.safetensors")


CODES = Stored("F8_E4M3", np.ones((96, 64), DTYPES["F8_E4M3"]))
SCALE = Stored("F32", np.ones(1, np.float32))


def _ones(*shape, dtype="F32"):
    return Stored(dtype, np.ones(shape, DTYPES[dtype]))


FAULTS = {
    "no scale": (
        {"a.embed.weight": CODES},
        "it is F8_E4M3 with no scale: there must be one of a.embed.weight_scale, a.embed.scale, "
        "a.embed.weight_scale_inv, and there is nothing",
    ),
    "another scale": (
        {"a.embed.weight": _ones(96, 64, dtype="I8"), "a.embed.SCB": _ones(96)},
        "it is I8 with no scale: there must be one of a.embed.weight_scale, a.embed.scale, a.embed.weight_scale_inv, "
        "and there is 'a.embed.SCB' (F32, [96])",
    ),
    "a layer's scale": (
        {"a.embed.weight": CODES, "a.scale": SCALE, "a.embed.bias": SCALE},
        "with no scale: .* there is 'a.embed.bias' (F32, [1])",
    ),
    "several": (
        {"a.embed.weight": CODES, "a.embed.weight_scale": SCALE, "a.embed.scale": SCALE},
        "with more than one scale: .* there is 'a.embed.weight_scale' (F32, [1]), 'a.embed.scale' (F32, [1])",
    ),
    "of pieces and of all": (
        {"a.embed.shard_0.weight": CODES, "a.embed.weight_scale": SCALE, "a.embed.shard_0.weight_scale": SCALE},
        "with more than one scale",
    ),
    "blocks of rows": (
        {"a.embed.weight": CODES, "a.embed.weight_scale_inv": _ones(3, 2)},
        "its scale 'a.embed.weight_scale_inv' (F32, [3, 2]) does not fit 'a.embed.weight' (F8_E4M3, [96, 64])",
    ),
    "blocks that do not divide": (
        {"a.embed.weight": CODES, "a.embed.weight_scale": _ones(96, 3)},
        "'a.embed.weight_scale' (F32, [96, 3]) does not fit",
    ),
    "too few": ({"a.embed.weight": CODES, "a.embed.weight_scale": _ones(95)}, "(F32, [95]) does not fit"),
    "a type of scale": (
        {"a.embed.weight": CODES, "a.embed.weight_scale": _ones(96, 4, dtype="F8_E4M3")},
        "(F8_E4M3, [96, 4]) does not fit",
    ),
    "U8 for all": ({"a.embed.weight": CODES, "a.embed.scale": _ones(1, dtype="U8")}, "(U8, [1]) does not fit"),
    "zero points": (
        {
            "a.embed.weight": _ones(96, 64, dtype="I8"),
            "a.embed.weight_scale": SCALE,
            "a.embed.weight_zero_point": SCALE,
        },
        "its values are more than code x scale, for there is 'a.embed.weight_zero_point' (F32, [1])",
    ),
    "zero points of another name": (
        {"a.embed.weight": _ones(96, 64, dtype="I8"), "a.embed.scale": SCALE, "a.embed.zp": SCALE},
        "its values are more than code x scale, for there is 'a.embed.zp' (F32, [1])",
    ),
    "a piece of scales": (
        {f"a.embed.shard_{i}.weight": CODES for i in range(3)}
        | {f"a.embed.shard_{i}.weight_scale": SCALE for i in (0, 2)},
        "its piece 'a.embed.shard_1.weight' is F8_E4M3 without a scale",
    ),
    "scales of pieces that differ": (
        {f"a.embed.shard_{i}.weight": CODES for i in range(2)}
        | {"a.embed.shard_0.scale": _ones(96, 2), "a.embed.shard_1.scale": _ones(96, 4)},
        "its pieces differ: 'a.embed.shard_0.scale' (F32, [96, 2]), but 'a.embed.shard_1.scale' (F32, [96, 4])",
    ),
    "a missing piece": (
        {f"a.embed.shard_{i}.weight": _ones(96, 64) for i in (0, 1, 3, 10)},
        "its piece 'a.embed.shard_2.weight' is missing; 4 are there, the last is 'a.embed.shard_10.weight'",
    ),
    "no first piece": (
        {f"a.embed.shard_{i}.weight": _ones(96, 64) for i in (1, 2)},
        "its piece 'a.embed.shard_0.weight' is missing; 2 are there",
    ),
    "a piece twice": (
        {f"a.embed.shard_{i}.weight": _ones(96, 64) for i in ("0", "1", "01")},
        "its piece 1 is there twice",
    ),
    "a short piece": (
        {f"a.embed.shard_{i}.weight": _ones(96 - 4 * (i == 1), 64) for i in range(3)},
        "only its last piece may have fewer rows: 'a.embed.shard_0.weight' (F32, [96, 64]), but "
        "'a.embed.shard_1.weight' (F32, [92, 64])",
    ),
    "a long piece": (
        {f"a.embed.shard_{i}.weight": _ones(96 + i, 64) for i in range(2)},
        "only its last piece may have fewer rows",
    ),
    "pieces of two types": (
        {"a.embed.shard_0.weight": _ones(96, 64), "a.embed.shard_1.weight": _ones(96, 64, dtype="F16")},
        "its pieces differ: 'a.embed.shard_0.weight' (F32, [96, 64]), but 'a.embed.shard_1.weight' (F16, [96, 64])",
    ),
    "a piece that is no matrix": (
        {"a.embed.shard_0.weight": _ones(96, 64), "a.embed.shard_1.weight": _ones(2, 96, 64)},
        "its pieces differ: 'a.embed.shard_0.weight' (F32, [96, 64]), but 'a.embed.shard_1.weight' (F32, [2, 96, 64])",
    ),
    "pieces of two widths": (
        {"a.embed.shard_0.weight": _ones(96, 64), "a.embed.shard_1.weight": _ones(96, 32)},
        "its pieces differ",
    ),
    "a table of that name": (
        {"a.embed.weight": _ones(96, 64), "a.embed.shard_0.weight": _ones(96, 64)},
        "there is a tensor of that name, and 'a.embed.shard_0.weight', which would be a piece of it",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), FAULTS.values(), ids=FAULTS)
def test_tables_that_cannot_be_read_are_refused_by_name(embpack_command, tmp_path, tensors, message):
    src, dst = tmp_path / "model.safetensors", tmp_path / "packed.safetensors"
    write_tensors(src, {**tensors, **OTHERS, "item_emb.weight": _ones(100, 32)})
    code, _, err = embpack_command("quantize", src, dst)
    assert code == 1
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(
        rf"model\.safetensors: a\.embed\.weight: .*{pattern}.*; leave it as it is with --exclude a\.embed", err
    )
    assert not dst.exists()
    # What is no table is nobody's concern: all its parts are copied.
    code, _, err = embpack_command("quantize", src, dst, "--exclude", "a.embed.weight")
    assert (code, err) == (0, "")
    before, after = read_raw(src).tensors, read_raw(dst).tensors
    assert {name: each for name, each in after.items() if name in {*tensors, *OTHERS}} == {
        name: each for name, each in before.items() if name != "item_emb.weight"
    }


def test_other_encodings_are_left_out_with_a_reason(embpack_command, tmp_path):
    stem = "ple_embedding.ngram_embedding"
    nvfp4 = {f"{stem}.shard_{i}.weight": _ones(96, 80, dtype="U8") for i in range(3)}
    nvfp4 |= {f"{stem}.shard_{i}.weight_scale": _ones(96, 10, dtype="F8_E4M3") for i in range(3)}
    nvfp4[f"{stem}.weight_scale_2"] = SCALE
    src = write_tensors(tmp_path / "model.safetensors", {**nvfp4, **OTHERS})
    code, _, err = embpack_command("quantize", src, tmp_path / "packed.safetensors")
    assert code == 1 and "nothing to pack" in err
    src = write_tensors(tmp_path / "more.safetensors", {**nvfp4, "item_emb.weight": _ones(100, 32)})
    code, out, _ = embpack_command("quantize", src, "--dry-run")
    assert code == 0
    assert f"copied: {stem}.shard_0.weight and 2 more (U8: codes of an encoding that is not read)" in out
    code, _, err = embpack_command("quantize", src, "--dry-run", "--include", f"{stem}.weight")
    assert code == 1
    assert f"include '{stem}.weight' only matches {stem}.weight (U8: codes of an encoding that is not read)" in err


def test_globs_go_by_the_name_of_the_table(embpack_command, tmp_path):
    tensors = {f"lookup.shard_{i}.weight": CODES for i in range(3)} | {"lookup.weight_scale": SCALE}
    src = write_tensors(tmp_path / "model.safetensors", {**tensors, **OTHERS})
    dst = tmp_path / "packed.safetensors"
    code, _, err = embpack_command("quantize", src, dst)
    assert code == 1 and "name those that are tables with --include: lookup.weight (name does not" in err
    code, _, err = embpack_command("quantize", src, dst, "--include", "lookup.shard_0.weight")
    assert code == 1
    assert "include 'lookup.shard_0.weight' only matches parts of 'lookup.weight'; name that" in err
    code, _, err = embpack_command("quantize", src, dst, "--set", "lookup.weight_scale=asym")
    assert code == 1
    assert "'lookup.weight_scale', which is but a part of 'lookup.weight'; name that" in err
    # What is copied anyway may be excluded by any name.
    code, _, err = embpack_command("quantize", src, dst, "--include", "lookup.*", "--exclude", "*_scale_inv")
    assert (code, err) == (0, "")
    code, _, _ = embpack_command("quantize", src, dst, "--include", "look*", "--set", "lookup.weight=asym:bits=8")
    assert code == 0
    table = embpack.load(dst)["lookup.weight"]
    assert (table.row_format.bits, table.num_embeddings) == (8, 288)


def test_what_gets_no_smaller_is_copied_in_its_parts(tmp_path):
    """By the bytes of codes and scales: in float32 or bfloat16 it would get smaller."""
    codes = _ones(100, 4, dtype="I8")
    tensors = {"a_emb.weight": codes, "a_emb.scale": SCALE, "b_emb.weight": _ones(100, 32)}
    src = write_tensors(tmp_path / "model.safetensors", tensors)
    report = embpack.quantize_file(src, tmp_path / "packed.safetensors")
    assert report.passed_through == ("a_emb.weight", "a_emb.scale")
    assert read_raw(tmp_path / "packed.safetensors").tensors["a_emb.weight"].payload == codes.values.tobytes()


def test_pieces_over_several_files(embpack_command, tmp_path):
    model = make_qwen_fp8()
    folder = tmp_path / "model"
    folder.mkdir()
    names = sorted(model.tensors)
    weight_map = {}
    for number in range(4):
        file_name = f"model-{number + 1:05}-of-00004.safetensors"
        own = {name: model.tensors[name] for name in names[number::4]}
        write_tensors(folder / file_name, own)
        weight_map |= dict.fromkeys(own, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, _ = embpack_command("quantize", folder, "--dry-run", "--json")
    assert code == 0
    code, _, err = embpack_command("quantize", folder, tmp_path / "packed")
    assert (code, err) == (0, "")
    told = json.loads(out)["totals"]["destination_bytes"]
    assert told == sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    [(name, values)] = model.tables.items()
    np.testing.assert_array_equal(embpack.load(tmp_path / "packed")[name].packed, embpack.quantize(values).packed)
    code, _, err = embpack_command("dequantize", tmp_path / "packed", tmp_path / "plain")
    assert (code, err) == (0, "")


def test_a_file_all_of_whose_tensors_are_parts_elsewhere_is_not_written(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for i in range(3):
        write_tensors(folder / f"part-{i}.safetensors", {f"emb.shard_{i}.weight": _ones(100, 32)})
        weight_map[f"emb.shard_{i}.weight"] = f"part-{i}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    embpack.quantize_file(folder, tmp_path / "packed")
    assert [file.name for file in (tmp_path / "packed").glob("*.safetensors")] == ["model.embpack.safetensors"]
    assert embpack.load(tmp_path / "packed")["emb.weight"].num_embeddings == 300


def test_plans_count_the_bytes_of_codes_and_scales(embpack_command, tmp_path):
    model = make_qwen_fp8()
    src = write_tensors(tmp_path / "model.safetensors", model.tensors)
    [name] = model.tables
    plan_file, dst = tmp_path / "plan.json", tmp_path / "packed.safetensors"
    code, _, err = embpack_command("quantize", src, dst, "--auto", "--bits", "4", "--save-plan", plan_file)
    assert (code, err) == (0, "")
    packed = embpack.load(dst)[name]
    code, _, err = embpack_command("quantize", src, dst, "--plan", plan_file)
    assert (code, err) == (0, "")
    assert embpack.load(dst)[name].packed.tobytes() == packed.packed.tobytes()
    # No row of float32 parameters at 8 bits is smaller than codes of a byte.
    code, out, _ = embpack_command("compare", src, "--bits", "8", "--methods", "asym", "--json")
    assert code == 0
    report = json.loads(out)
    assert not any(result["is_smaller"] for result in report["results"]) and report["recommended"] is None


def test_values_are_rounded_once(rng):
    from embpack import _native, reference
    from embpack.formats.scaled import CODE_VALUES

    for rows, dim, blocks in ((1, 1, 1), (3, 160, 1), (17, 256, 8), (700, 96, 3), (0, 8, 2)):
        codes = rng.integers(0, 256, (rows, dim), np.uint8)
        scales = rng.standard_normal((rows, blocks)).astype(np.float32)
        for values in CODE_VALUES.values():
            out = np.empty((rows, dim), np.float32)
            _native.multiply_codes(codes, values, scales, out)
            np.testing.assert_array_equal(out, reference.multiply_codes(codes, values, scales))


def test_codes_stand_for_what_others_say():
    from embpack.formats.scaled import CODE_VALUES, EXPONENT_VALUES

    codes = np.arange(256, dtype=np.uint8)
    for dtype, values in {**CODE_VALUES, "F8_E8M0": EXPONENT_VALUES}.items():
        np.testing.assert_array_equal(values, codes.view(DTYPES[dtype]).astype(np.float32))
    assert EXPONENT_VALUES[0] == np.float32(2.0**-127) and np.isnan(EXPONENT_VALUES[255])
    assert ml_dtypes.finfo(DTYPES["F8_E4M3"]).max == np.nanmax(CODE_VALUES["F8_E4M3"]) == 448

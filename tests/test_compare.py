"""embpack.compare, the comparison of a checkpoint's tables, and its page."""

import dataclasses
import itertools
import re
import shlex
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import (
    Arrays,
    write_compressed_npz,
    write_npy,
    write_npz,
    write_parquet,
    write_safetensors,
    write_shards,
    write_torch,
)
from comparisons import compare_file, make_file, make_result, make_table_comparison
from hypothesis import given
from hypothesis import strategies as st

import embpack
from embpack import reference
from embpack.comparison.array import QUANTILES
from embpack.comparison.checkpoint import sum_tables
from embpack.comparison.front import find_front, name_variant
from embpack.comparison.variants import make_variants
from embpack.layouts import BITS, PARAM_BYTES
from embpack.methods import METHODS, Greedy
from embpack.readers import find_readers
from embpack.rotation import rotate
from embpack.rows import spread_rows
from embpack.variant import Variant

BF16 = ml_dtypes.bfloat16


def make_weight(rows=150, dim=24, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(dtype)


# What is compared


def quantize_as(weight, variant):
    return embpack.quantize(weight, variant.method, variant.bits, variant.param_dtype, rotate=variant.rotate)


def test_by_default_all_methods_some_at_other_bits_and_some_rotated():
    others = [("asym", 2), ("asym", 8), ("optimal", 2), ("optimal", 8), ("trellis", 2), ("trellis", 3), ("trellis", 6)]
    expected = [Variant(*way) for way in [(method, 4) for method in METHODS] + others]
    expected += [Variant(method, 4, rotate="hadamard") for method in ("optimal", "trellis")]
    weight = make_weight()
    results = embpack.compare(weight)
    assert [(result.method, result.bits, result.rotate) for result in results] == [
        (variant.method, variant.bits, variant.rotate) for variant in expected
    ]
    formats = [quantize_as(weight, variant).row_format for variant in expected]
    assert [(result.param_dtype, result.layout) for result in results] == [(f.param_dtype, f.layout) for f in formats]


def test_every_method_bits_param_dtype_and_rotation_that_is_asked_for():
    variants = make_variants(["asym", "greedy:b=100"], BITS, list(PARAM_BYTES), [None, "hadamard"])
    expected = itertools.product(["asym", "greedy:b=100"], BITS, PARAM_BYTES, [None, "hadamard"])
    assert {dataclasses.astuple(variant) for variant in variants} == set(expected)
    assert len(variants) == 24


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"methods": ["asym"]}, [("asym", 4, None)]),
        ({"methods": ["asym"], "bits": 8}, [("asym", 8, None)]),
        ({"methods": "asym"}, [("asym", 4, None)]),
        ({"methods": Greedy(b=100)}, [("greedy:b=100,r=0.16", 4, None)]),
        ({"methods": ["asym", "asym"], "bits": [4, 4]}, [("asym", 4, None)]),
        ({"methods": ["asym"], "param_dtype": "float32"}, [("asym", 4, "float32")]),
        ({"bits": 2}, [(method, 2, None) for method in METHODS]),
        ({"bits": [3, 3.5]}, [("trellis", 3, None), ("trellis", 3.5, None)]),
        ({"bits": 8}, [(method, 8, None) for method in METHODS if method != "trellis"]),
        ({"methods": [Greedy(), Greedy(b=100)]}, [("greedy", 4, None), ("greedy:b=100,r=0.16", 4, None)]),
    ],
)
def test_what_is_not_said_is_the_default(arguments, expected):
    assert [dataclasses.astuple(variant) for variant in make_variants(**arguments)] == [
        (*variant, None) for variant in expected
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["best"]}, "there is no method 'best'"),
        ({"methods": []}, "there is nothing to compare"),
        ({"bits": []}, "there is nothing to compare"),
        ({"param_dtype": []}, "there is nothing to compare"),
        ({"methods": ["asym"], "bits": 3}, "bits is 3; choose 2, 4 or 8"),
        ({"methods": ["trellis"], "bits": 8}, "bits is 8; the trellis layout has 2 to 7"),
        ({"bits": 1}, "bits is 1; choose 2, 4 or 8"),
        ({"rotate": "fourier"}, "rotation is 'fourier'; choose None or one of 'hadamard'"),
        ({"param_dtype": "float64"}, "param_dtype is 'float64'; choose"),
    ],
)
def test_what_cannot_be_compared(arguments, message):
    with pytest.raises(ValueError, match=message):
        embpack.compare(make_weight(), **arguments)


# What is measured


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_quantize(method, dtype):
    weight = make_weight(dtype=dtype)
    weight[7] = 0
    table = embpack.quantize(weight, method)
    (result,) = embpack.compare(weight, [method])
    errors = np.linalg.norm(weight.astype(np.float64) - table.dequantize(), axis=1)
    norms = np.linalg.norm(weight.astype(np.float64), axis=1)
    losses = np.divide(errors, norms, where=norms > 0, out=np.full(len(norms), -1.0))
    param_dtype = "float32" if method == "trellis" else "float16"
    assert (result.method, result.bits, result.param_dtype, result.layout) == (method, 4, param_dtype, table.layout)
    assert result.readers == find_readers(table.row_format)
    assert result.loss == table.loss
    assert result.bytes_per_row == table.nbytes / len(weight)
    assert result.share_of_float32 == table.nbytes / (4 * weight.size)
    assert result.worst_row == losses.argmax()
    assert result.worst_row_loss == pytest.approx(losses.max(), rel=1e-12)
    assert result.row_losses == pytest.approx(np.quantile(losses[norms > 0], QUANTILES), rel=1e-12)
    assert 0 < result.rows_per_second < np.inf
    assert 0 < result.lookups_per_second < np.inf


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("param_dtype", PARAM_BYTES)
def test_every_format(bits, param_dtype):
    weight = make_weight()
    (result,) = embpack.compare(weight, ["asym"], bits, param_dtype)
    table = embpack.quantize(weight, "asym", bits, param_dtype)
    assert (result.bits, result.param_dtype) == (bits, param_dtype)
    assert (result.loss, result.bytes_per_row) == (table.loss, table.row_bytes)


def test_losses_of_single_rows_are_those_of_the_reference():
    weight = make_weight(20)
    (result,) = embpack.compare(weight, ["asym"])
    row_format = embpack.quantize(weight, "asym").row_format
    packed = [reference.round_trip(x, x.min(), x.max(), row_format) for x in weight]
    losses = [np.linalg.norm(x - q) / np.linalg.norm(x) for x, q in zip(weight, packed, strict=True)]
    assert result.worst_row == np.argmax(losses)
    # Norms of 24 values in float32: up to 24 roundings each.
    assert result.worst_row_loss == pytest.approx(max(losses), rel=48 * 2**-24)


def test_rows_are_measured_in_parts_as_in_one(monkeypatch):
    weight = make_weight()
    whole = embpack.compare(weight, ["asym"])[0]
    monkeypatch.setattr("embpack.comparison.array.span_rows", lambda embedding_dim: 7)
    parts = embpack.compare(weight, ["asym"])[0]
    assert (parts.worst_row, parts.row_losses) == (whole.worst_row, whole.row_losses)


def test_torch_tensors_are_taken():
    weight = torch.from_numpy(make_weight())
    for tensor in (weight, weight.to(torch.bfloat16), weight.t().contiguous().t()):
        (result,) = embpack.compare(tensor, ["asym"])
        assert result.loss == embpack.quantize(tensor, "asym").loss


def test_tables_of_zeros_have_no_loss_in_any_way(tmp_path):
    zeros = np.zeros((40, 8), np.float32)
    comparison = compare_file(write_safetensors(tmp_path, Arrays({"a_emb": zeros, "b_emb": zeros.copy()})))
    assert {result.loss for result in comparison.overall} == {0}
    assert comparison.recommended.loss == 0


def test_a_table_of_zeros_has_no_loss():
    (result,) = embpack.compare(np.zeros((20, 8), np.float32), ["asym"])
    assert (result.loss, result.worst_row, result.worst_row_loss) == (0, 0, 0)
    assert result.row_losses == (0.0,) * len(QUANTILES)


def test_lookups_are_timed_on_one_thread(monkeypatch, restore_threads):
    embpack.set_num_threads(2)
    real, seen = embpack.PackedTable.embedding_bag, []

    def spy(table, indices, **options):
        seen.append((embpack.get_num_threads(), indices.shape, options))
        return real(table, indices, **options)

    monkeypatch.setattr(embpack.PackedTable, "embedding_bag", spy)
    embpack.compare(make_weight(), ["asym"])
    assert set(map(str, seen)) == {str((1, (1000, 20), {"mode": "sum"}))}
    assert embpack.get_num_threads() == 2


def test_the_weight_is_not_changed():
    weight = make_weight()
    before = weight.copy()
    embpack.compare(weight)
    assert np.array_equal(weight, before)


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        embpack.compare(make_weight(), ["asym"])[0].loss = 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(value):
    weight = make_weight()
    weight[33, 5] = value
    with pytest.raises(ValueError, match=rf"^weight\[33, 5\] is {value}; NaN and infinity cannot be packed"):
        embpack.compare(weight)


def test_what_a_method_does_not_support_is_left_out_with_a_warning():
    weight = make_weight()
    weight[0, 0] = 1e7
    with pytest.warns(UserWarning, match=r"left out asym at 4 bits with float16 parameters: .* overflows float16"):
        results = embpack.compare(weight, ["asym"], param_dtype=["float16", "float32"])
    assert [result.param_dtype for result in results] == ["float32"]


@pytest.mark.parametrize("bits", [3, 3.5])
def test_bits_that_only_one_of_the_methods_has_are_left_out_of_the_others(bits):
    with pytest.warns(UserWarning, match=rf"left out asym at {bits} bits: bits is {bits}; choose 2, 4 or 8"):
        results = embpack.compare(make_weight(), ["asym", "trellis"], [bits, 4])
    assert [(result.method, result.bits) for result in results] == [("asym", 4), ("trellis", bits), ("trellis", 4)]


def test_nothing_that_can_be_done_is_an_error():
    weight = make_weight()
    weight[0, 0] = 1e7
    with pytest.raises(
        ValueError, match=r"nothing asked for can be done; asym at 4 bits: weight\[0\] .* overflows float16"
    ):
        embpack.compare(weight, ["asym"])


@pytest.mark.parametrize("weight", [np.ones(3, np.float32), np.ones((0, 3), np.float32)])
def test_what_is_no_table(weight):
    with pytest.raises(ValueError, match="weight has shape"):
        embpack.compare(weight)


# Choosing


def is_beaten(result, by):
    no_worse = by.bytes_per_row <= result.bytes_per_row and by.loss <= result.loss
    return no_worse and (by.bytes_per_row, by.loss) != (result.bytes_per_row, result.loss)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), max_size=30))
def test_the_front_is_what_brute_force_finds(points):
    results = [make_result(float(24 * size), loss / 8, worst_row=i) for i, (size, loss) in enumerate(points)]
    smaller = [result for result in results if result.bytes_per_row < 256]
    best = [result for result in smaller if not any(is_beaten(result, by) for by in smaller)]
    first = {(result.bytes_per_row, result.loss): result for result in reversed(best)}
    assert find_front(results) == [first[place] for place in sorted(first)]


@pytest.mark.parametrize(
    ("src", "variant", "globs", "expected"),
    [
        (
            "model.pt",
            ("greedy", 4, "float16"),
            ((), ()),
            "model.pt model-greedy-4bit.safetensors --method greedy --bits 4 --param-dtype float16",
        ),
        (
            "a b/m.npy",
            ("greedy:b=1000,r=0.5", 8, "float16"),
            (("x*",), ("y z", "w")),
            "'a b/m.npy' 'a b/m-greedy-b=1000-r=0.5-8bit-float16.safetensors' --method greedy:b=1000,r=0.5 --bits 8 "
            "--param-dtype float16 --include 'x*' --exclude 'y z' --exclude w",
        ),
        ("m/model.safetensors.index.json", ("asym", 2, "float16"), ((), ()), None),
    ],
)
def test_commands_are_ready_for_a_shell(src, variant, globs, expected):
    method, bits, param_dtype = variant
    comparison = make_file(name=src, include=globs[0], exclude=globs[1])
    command = comparison.write_command(make_result(method=method, bits=bits, param_dtype=param_dtype))
    expected = expected or f"{src} m-asym-2bit --method asym --bits 2 --param-dtype float16"
    assert command == f"embpack quantize {expected}"


@pytest.mark.parametrize("write", [write_safetensors, write_shards, write_npy])
def test_the_recommended_command_gives_the_promised_loss(tmp_path, write):
    src = write(tmp_path, Arrays({"user emb": make_weight()}))
    comparison = compare_file(src)
    words = shlex.split(comparison.write_command(comparison.recommended))
    assert words[:3] == ["embpack", "quantize", str(src)]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    report = embpack.quantize_file(src, words[3], method=options["--method"], bits=int(options["--bits"]))
    assert report.tables[0].loss == comparison.recommended.loss
    assert report.tables[0].bytes_after == comparison.recommended.bytes_per_row * 150


def test_each_command_writes_a_file_of_its_own():
    variants = make_variants(["asym", "greedy", "greedy:b=100"], BITS, list(PARAM_BYTES), [None, "hadamard"])
    variants += make_variants(["trellis"], [2, 2.5, 4], rotate=[None, "hadamard"])
    results = [
        make_result(
            method=variant.spec,
            bits=variant.bits,
            param_dtype=variant.make_row_format(64).param_dtype,
            rotate=variant.rotate,
        )
        for variant in variants
    ]
    for name in ("model.safetensors", "m/model.safetensors.index.json"):
        comparison = make_file(*results, name=name)
        written = {shlex.split(comparison.write_command(result))[3] for result in results}
        assert len(written) == len(results) == 42


def test_names_tell_twins_apart():
    twins = [make_result(param_dtype="float16"), make_result(param_dtype="float32"), make_result(bits=8)]
    assert [name_variant(result, twins) for result in twins] == ["greedy, float16", "greedy, float32", "greedy"]


# Tables of a checkpoint


@given(st.integers(1, 10**12), st.integers(1, 200))
def test_rows_are_spread_evenly(num_embeddings, count):
    count = min(count, num_embeddings)
    rows = spread_rows(num_embeddings, count)
    parts = [range(i * num_embeddings // count, -(-(i + 1) * num_embeddings // count)) for i in range(count)]
    assert len(rows) == count
    assert all(int(row) in part for row, part in zip(rows, parts, strict=True))
    assert np.all(np.diff(rows) > 0)


def test_all_rows_are_all_rows():
    assert spread_rows(17, 17).tolist() == list(range(17))


@cache
def compare_sample(most_rows):
    weight = make_weight()
    rows = spread_rows(150, min(150, most_rows or 150))
    return weight, rows, embpack.compare(weight[rows])


@pytest.mark.parametrize("most_rows", [None, 1000, 40, 1])
@pytest.mark.parametrize(
    "write",
    [write_safetensors, write_shards, write_torch, write_npy, write_npz, write_compressed_npz, write_parquet],
)
def test_a_sample_is_compared_like_an_array(tmp_path, monkeypatch, write, most_rows):
    monkeypatch.setattr("embpack.comparison.checkpoint.chunk_rows", lambda embedding_dim: 32)
    weight, rows, expected = compare_sample(most_rows)
    src = write(tmp_path, Arrays({"user_emb": weight}))
    (table,) = compare_file(src, most_rows=most_rows).tables
    assert (table.num_embeddings, table.embedding_dim, table.rows_measured) == (150, 24, len(rows))
    assert table.square_norm == pytest.approx(np.square(weight[rows], dtype=np.float64).sum(), rel=1e-12)
    assert [result.loss for result in table.results] == [result.loss for result in expected]
    assert [result.row_losses for result in table.results] == [result.row_losses for result in expected]
    assert [result.worst_row for result in table.results] == [rows[result.worst_row] for result in expected]


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_types_of_checkpoints(tmp_path, dtype):
    weight = make_weight(dtype=dtype)
    (table,) = compare_file(write_safetensors(tmp_path, Arrays({"user_emb": weight}))).tables
    assert table.dtype == weight.dtype.name
    assert [result.loss for result in table.results] == [result.loss for result in embpack.compare(weight)]
    square = np.square(weight.astype(np.float64)).sum()
    assert table.square_norm == pytest.approx(square, rel=1e-12)


def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_table(tmp_path):
    weight = make_weight()
    weight[spread_rows(150, 40)[20], 3] = np.nan
    src = write_npy(tmp_path, Arrays({"vectors": weight}))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(src))}: vectors\[{spread_rows(150, 40)[20]}, 3\] is nan"):
        compare_file(src, most_rows=40)


def test_what_cannot_be_done_is_named_by_its_place_in_the_table(tmp_path):
    weight = make_weight()
    row = spread_rows(150, 40)[20]
    weight[row, 3] = 1e7
    src = write_npy(tmp_path, Arrays({"vectors": weight}))
    (table,) = compare_file(src, make_variants(["asym"], 4, ["float16", "float32"]), 40).tables
    (skipped,) = table.skipped
    assert skipped.variant == Variant("asym", 4, "float16")
    assert re.match(rf"vectors\[{row}\] has values from .* overflows float16", skipped.reason)


def test_a_rotation_that_gains_next_to_nothing_is_not_in_the_front():
    plain = make_result(36.0, 0.1)
    worth, idle = (make_result(36.0, loss, rotate="hadamard") for loss in (0.098, 0.0995))
    alone = make_result(36.0, 0.0979, rotate="hadamard", method="asym")
    assert find_front([plain, idle]) == [plain]
    assert find_front([plain, worth]) == [worth]
    assert find_front([plain, worth, alone]) == [alone]


def test_totals_are_those_of_all_rows_together(tmp_path):
    weights = {"a_emb": make_weight(150, 24, 0), "b_emb": 3 * make_weight(40, 8, 1), "c_emb": np.zeros((20, 4), "f4")}
    comparison = compare_file(write_safetensors(tmp_path, Arrays(weights)))
    assert [(total.method, total.bits) for total in comparison.overall] == [(v.method, v.bits) for v in make_variants()]
    for total in comparison.overall:
        tables = {name: quantize_as(weight, total.variant) for name, weight in weights.items()}
        # What is packed of rotated tables are rotated rows, and it is these whose errors are measured.
        packed = {name: rotate(weight) if total.variant.rotate else weight for name, weight in weights.items()}
        errors = [packed[name] - table.as_packed.dequantize().astype(np.float64) for name, table in tables.items()]
        square = sum(np.square(rows, dtype=np.float64).sum() for rows in packed.values())
        loss = np.sqrt(sum(np.square(error).sum() for error in errors) / square)
        # quantize rounds each error to float32.
        assert total.loss == pytest.approx(loss, rel=2**-24)
        assert total.bytes_per_row == sum(table.nbytes for table in tables.values()) / 210
        assert total.share_of_float32 == sum(table.nbytes for table in tables.values()) / (4 * (3600 + 320 + 80))
        results = {r.table: r for table in comparison.tables for r in table.results if r.variant == total.variant}
        worst = max(results.values(), key=lambda result: result.worst_row_loss)
        assert (total.worst_table, total.worst_row) == (worst.table, worst.worst_row)
        for rate in ("rows_per_second", "lookups_per_second"):
            seconds = sum(len(weights[name]) / getattr(result, rate) for name, result in results.items())
            assert getattr(total, rate) == pytest.approx(210 / seconds, rel=1e-9)


@pytest.mark.parametrize("method", ["trellis", "kmeans-cls:K=8", "kmeans", "optimal"])
def test_bytes_are_those_of_the_whole_table(tmp_path, method):
    """What all rows share counts once, however few rows are measured."""
    weight = make_weight(500, 24)
    src = write_safetensors(tmp_path, Arrays({"emb": weight}))
    (result,) = compare_file(src, make_variants([method]), most_rows=60).tables[0].results
    packed = embpack.quantize(weight, method)
    assert round(result.bytes_per_row * 500) == packed.nbytes
    assert result.share_of_float32 == pytest.approx(packed.nbytes / weight.nbytes)


def test_a_sample_stands_for_its_table_in_the_total():
    a = dataclasses.replace(
        make_table_comparison([make_result(36.0, 0.1)], "a", 1000), rows_measured=10, square_norm=2.0
    )
    b = dataclasses.replace(
        make_table_comparison([make_result(20.0, 0.3)], "b", 100), rows_measured=100, square_norm=50.0
    )
    (total,) = sum_tables([a, b])
    # 200 of a's squares, 50 of b's.
    assert total.loss == pytest.approx(np.sqrt((0.01 * 200 + 0.09 * 50) / 250), rel=1e-12)
    assert total.bytes_per_row == (36 * 1000 + 20 * 100) / 1100


def test_a_total_is_read_by_those_who_read_all_tables():
    readers = ("torch", "onnx"), ("fbgemm", "onnx")
    tables = [
        make_table_comparison([make_result(readers=each)], name) for each, name in zip(readers, "ab", strict=True)
    ]
    assert sum_tables(tables)[0].readers == ("onnx",)


def test_a_total_has_what_every_table_has():
    both = make_result(), make_result(method="asym")
    tables = make_table_comparison(both, "a"), make_table_comparison(both[:1], "b")
    assert [total.method for total in sum_tables(tables)] == ["greedy"]

"""PackedTable.linear: vectors times packed rows, against the reference and PyTorch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trellis_lookup import make_random

import embpack
from benchmarks import linear as benchmark
from benchmarks import products
from embpack import _native, reference
from embpack.errors import FormatError
from tests.conftest import use_isa

UNIFORM = [("asym", {"bits": bits}) for bits in (2, 4, 8)] + [("asym", {"bits": 4, "param_dtype": "float32"})]
OTHERS = [("kmeans", {"bits": 4}), ("kmeans-cls", {"bits": 4}), ("trellis", {}), ("trellis", {"bits": 3.5})]
ROTATED = [("asym", {"bits": 4, "rotate": "hadamard"}), ("trellis", {"rotate": "hadamard"})]
VARIANTS = UNIFORM + OTHERS + ROTATED
# Around a window of 64 bytes at each number of bits, and around sixteen lanes.
DIMS = (4, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
# From the codes, in groups of 4 and what is left; from unpacked rows, in panels of 16.
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)


def names(variant):
    method, options = variant
    return "-".join([method, *map(str, options.values())])


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=names)
# Rows that a few vectors are multiplied by as they are packed.
as_packed = pytest.mark.parametrize("variant", [("asym", {"bits": 8}), ("trellis", {})], ids=names)


@pytest.fixture(params=_native.available_isas())
def every_isa(request):
    yield from use_isa(request)


def pack(rng, variant, num_rows, d):
    method, options = variant
    return embpack.quantize(rng.standard_normal((num_rows, d), dtype=np.float32), method, **options)


def bound(table, vectors, bias=None):
    """How far float32 sums may be from the reference, [n, N]: the usual bound on a sum of d products, in any order.

    Each of d products and d additions is rounded, by at most 2^-24 of what has been added up. A uniform row's product
    is scale * sum(code * x) + bias * sum(x), with four roundings more; its terms are at most (|scale| * code + |bias|)
    * |x|, and |scale| * code is at most |value| + |bias|.

    A trellis-coded row's product is scale * sum(level * x) + sum(mean * x): level stands for code, and mean for bias;
    sum(mean * x) is of float64, and rounded once. A rotated row's vector is rotated, with log2(d) + 1 roundings of
    values whose size is the vector's. The reference, of rows rotated back, has those of a row. A bias is one more.
    """
    d = table.embedding_dim
    rows = table.as_packed.dequantize().astype(np.float64)
    levels = np.abs(rows)
    if table.layout == "uniform":
        params = table.packed[:, table.row_format.code_bytes :].view(table.row_format.form.param_type)
        levels = levels + 2 * np.abs(params[:, 1:].astype(np.float64))
    elif table.layout == "trellis":
        levels = levels + 2 * np.abs(table.codebooks[0, -d:].astype(np.float64))
    magnitudes = np.abs(vectors.astype(np.float64))
    roundings = d + 5
    products = magnitudes @ levels.T
    if table.rotation:
        lengths = np.linalg.norm(magnitudes, axis=1)[:, None] * np.linalg.norm(levels, axis=1)
        products, roundings = np.maximum(products, lengths), roundings + 2 * (np.log2(d) + 2)
    return roundings * 2.0**-24 * (products + (0 if bias is None else np.abs(bias))) + 1e-35


def check(table, vectors, bias=None):
    found = table.linear(vectors, bias)
    expected = reference.linear(vectors, table.dequantize(), bias)
    assert found.dtype == np.float32
    assert (np.abs(found.astype(np.float64) - expected) <= bound(table, vectors, bias)).all()
    return found


@every_variant
def test_kernel_is_the_reference_within_rounding(variant, every_isa, rng):
    for at, d in enumerate(DIMS):
        table = pack(rng, variant, 37 if variant[0] != "kmeans-cls" else 40, d)
        count = COUNTS[at % len(COUNTS)]
        vectors = rng.standard_normal((count, d), dtype=np.float32)
        check(table, vectors, rng.standard_normal(len(table), dtype=np.float32) if at % 2 else None)


# Stripes of 4,096 columns, of which the last may have no whole block; more rows than go through them together.
@pytest.mark.parametrize(("d", "num_rows"), [(4096, 5), (4097, 131), (4128, 3), (5120, 260), (10752, 130), (65536, 6)])
def test_wide_trellis_rows(d, num_rows, every_isa, rng):
    for bits, count in ((4, 1), (3.5, 3), (4, 8), (6.5, 5)):
        table = make_random(rng, d, bits, num_rows)
        vectors = rng.standard_normal((count, d), dtype=np.float32)
        found = check(table, vectors)
        _native.use_isa("portable")
        np.testing.assert_array_equal(found, table.linear(vectors))
        _native.use_isa(every_isa)


@pytest.mark.parametrize("count", COUNTS)
def test_every_number_of_vectors(count, every_isa, rng):
    for variant in (("asym", {}), ("asym", {"bits": 2}), ("trellis", {})):
        table = pack(rng, variant, 61, 100)
        check(table, rng.standard_normal((count, 100), dtype=np.float32))


@every_variant
def test_every_instruction_set_gives_the_same_bits(variant, rng):
    before = _native.isa()
    try:
        for d in (17, 100, 515):
            table = pack(rng, variant, 45, d)
            for count in (1, 3, 8, 19):
                vectors = rng.standard_normal((count, d), dtype=np.float32)
                found = []
                for name in _native.available_isas():
                    assert _native.use_isa(name)
                    found.append(table.linear(vectors))
                for other in found[1:]:
                    np.testing.assert_array_equal(found[0].view(np.uint32), other.view(np.uint32))
    finally:
        _native.use_isa(before)


@as_packed
@pytest.mark.parametrize("count", [1, 8, 20])
def test_number_of_threads_changes_no_bit(variant, count, rng, restore_threads):
    table = pack(rng, variant, 2500, 100)
    vectors = rng.standard_normal((count, 100), dtype=np.float32)
    embpack.set_num_threads(1)
    alone = table.linear(vectors)
    embpack.set_num_threads(3)
    np.testing.assert_array_equal(table.linear(vectors), alone)


@as_packed
def test_a_vector_gets_the_same_bits_alone_and_beside_others(variant, rng):
    table = pack(rng, variant, 50, 200)
    vectors = rng.standard_normal((8, 200), dtype=np.float32)
    together = table.linear(vectors)
    for count in (1, 2, 3, 5):
        np.testing.assert_array_equal(table.linear(vectors[:count]), together[:count])
    many = rng.standard_normal((40, 200), dtype=np.float32)
    np.testing.assert_array_equal(table.linear(many[:17]), table.linear(many)[:17])


@every_variant
@pytest.mark.parametrize("count", [1, 20])
def test_same_as_pytorchs_linear(variant, count, rng):
    table = pack(rng, variant, 40, 96)
    vectors = rng.standard_normal((count, 96), dtype=np.float32)
    bias = rng.standard_normal(40, dtype=np.float32)
    expected = torch.nn.functional.linear(*map(torch.from_numpy, (vectors, table.dequantize(), bias))).numpy()
    # Both are within the bound of the exact products.
    assert (np.abs(table.linear(vectors, bias) - expected) <= 2 * bound(table, vectors, bias)).all()


def test_hand_computed(every_isa):
    # Codes 0 .. 15 of one row, scale 0.5, bias -2, as FBGEMM packs them; x is 1, 2, 4 and so on: sums are exact.
    codes = np.arange(16, dtype=np.uint8)
    row = np.concatenate([codes[::2] | codes[1::2] << 4, np.array([0.5, -2], np.float16).view(np.uint8)])
    table = embpack.PackedTable.from_packed(row[None], embedding_dim=16)
    vector = 2.0 ** np.arange(16, dtype=np.float32)
    expected = 0.5 * (codes * vector).sum() - 2 * vector.sum()
    assert table.linear(vector).tolist() == [expected]
    assert table.linear(vector, [3]).tolist() == [expected + 3]


@given(
    d=st.integers(1, 150),
    num_rows=st.integers(1, 40),
    count=st.integers(1, 20),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_size(d, num_rows, count, bits, size, seed):
    rng = np.random.default_rng(seed)
    table = pack(rng, ("asym", {"bits": bits}), num_rows, d)
    check(table, (size * rng.standard_normal((count, d))).astype(np.float32))


@every_variant
@pytest.mark.parametrize("count", [1, 8, 20])
def test_what_is_no_number_comes_through_as_in_blas(variant, count, every_isa, rng):
    table = pack(rng, variant, 40, 64)
    vectors = rng.standard_normal((count, 64), dtype=np.float32)
    vectors[0, 5] = np.nan
    found = table.linear(vectors)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()
    vectors[0, 5] = np.inf
    found = table.as_packed.linear(vectors)  # a rotation spreads an infinity over columns with both signs
    with np.errstate(invalid="ignore"):
        expected = vectors @ table.as_packed.dequantize().T
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(found), np.isposinf(expected))
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))


@as_packed
@pytest.mark.parametrize("count", [1, 20])
def test_products_that_float32_cannot_hold_on_the_way(variant, count, every_isa, rng):
    # code * x and level * x are too large for float32, value * x is not. More rows than are unpacked at a time are so.
    method, options = variant
    weight = 1e-3 * rng.standard_normal((1500, 64)).astype(np.float32)
    table = embpack.quantize(weight, method, **options)
    vectors = np.full((count, 64), 1e38, np.float32)
    expected = reference.linear(vectors, table.dequantize())
    found = table.linear(vectors)
    assert np.isfinite(found).all()
    assert (np.abs(found - expected) <= bound(table, vectors)).all()


def test_a_bias_may_rule_rows_out(rng):
    table = pack(rng, ("asym", {}), 40, 64)
    bias = np.zeros(40, np.float32)
    bias[7] = -np.inf
    vectors = rng.standard_normal((2, 64), dtype=np.float32)
    found = table.linear(vectors, bias)
    assert (found[:, 7] == -np.inf).all()
    np.testing.assert_array_equal(np.delete(found, 7, 1), np.delete(table.linear(vectors), 7, 1))


def test_shapes_follow_the_input(rng):
    table = pack(rng, ("asym", {}), 30, 64)
    vectors = rng.standard_normal((2, 3, 64), dtype=np.float32)
    found = table.linear(vectors)
    assert found.shape == (2, 3, 30)
    np.testing.assert_array_equal(found[1, 2], table.linear(vectors[1, 2]))
    assert table.linear(vectors[0, 0]).shape == (30,)
    assert table.linear(np.empty((0, 64), np.float32)).shape == (0, 30)
    assert table.linear(np.empty((4, 0, 64), np.float32)).shape == (4, 0, 30)
    no_rows = replace(table, packed=table.packed[:0])
    assert no_rows.linear(vectors).shape == (2, 3, 0)


def test_input_may_lie_anyhow(rng):
    table = pack(rng, ("asym", {}), 30, 64)
    wide = rng.standard_normal((6, 128), dtype=np.float32)
    np.testing.assert_array_equal(table.linear(wide[::2, ::2]), table.linear(wide[::2, ::2].copy()))
    np.testing.assert_array_equal(table.linear(wide[:, :64].astype(">f4")), table.linear(wide[:, :64]))


def test_input_of_half_precision(rng):
    table = pack(rng, ("asym", {}), 30, 64)
    vectors = rng.standard_normal((3, 64), dtype=np.float32)
    half = vectors.astype(np.float16)
    np.testing.assert_array_equal(table.linear(half), table.linear(half.astype(np.float32)))
    bits = torch.from_numpy(vectors).bfloat16()
    np.testing.assert_array_equal(table.linear(bits.view(torch.uint16).numpy()), table.linear(bits.float().numpy()))
    np.testing.assert_array_equal(table.linear(half, half[0, :30]), table.linear(half, half[0, :30].astype(np.float32)))


@pytest.mark.parametrize(
    ("vectors", "bias", "error", "message"),
    [
        (np.zeros((2, 63), np.float32), None, ValueError, r"input has shape \[2, 63\]; its last axis must be 64 long"),
        (np.float32(1), None, ValueError, r"input has shape \[\]; its last axis must be 64 long"),
        (np.zeros((2, 64)), None, TypeError, "input is float64; it must be float32, float16 or bfloat16"),
        (np.zeros((2, 64), np.int64), None, TypeError, "input is int64"),
        (np.zeros(64, np.float32), np.zeros(29, np.float32), ValueError, r"bias has shape \[29\]; .* 30 long"),
        (np.zeros(64, np.float32), np.zeros((1, 30), np.float32), ValueError, r"bias has shape \[1, 30\]; .* \[30\]"),
        (np.zeros(64, np.float32), np.zeros(30), TypeError, "bias is float64"),
    ],
)
def test_what_cannot_be_multiplied_is_explained(vectors, bias, error, message, rng):
    table = pack(rng, ("asym", {}), 30, 64)
    with pytest.raises(error, match=message):
        table.linear(vectors, bias)


@pytest.mark.parametrize("count", [1, 20])
def test_a_row_without_codebook_is_told(count, rng):
    table = pack(rng, ("kmeans-cls", {"bits": 4}), 40, 64)
    clusters = table.clusters.copy()
    clusters[23] = len(table.codebooks)
    damaged = replace(table, clusters=clusters)
    with pytest.raises(FormatError, match=f"row 23 is of cluster {len(table.codebooks)}"):
        damaged.linear(np.zeros((count, 64), np.float32))


@pytest.mark.parametrize(
    ("vectors", "bias", "out", "message"),
    [
        ((2, 63), None, (2, 30), "input must have embedding_dim columns"),
        ((2, 64), 29, (2, 30), "bias must have one value for each row"),
        ((2, 64), None, (2, 29), "out has the wrong shape"),
        ((2, 64), None, (3, 30), "out has the wrong shape"),
    ],
)
def test_the_core_keeps_within_its_arrays(vectors, bias, out, message, rng):
    table = pack(rng, ("asym", {}), 30, 64)
    arrays = np.zeros(vectors, np.float32), None if bias is None else np.zeros(bias, np.float32)
    with pytest.raises(ValueError, match=message):
        _native.linear(table.native_view, *arrays, np.zeros(out, np.float32))


def test_the_benchmark_compares_answers_and_times_them(tmp_path, restore_threads, capsys):
    path = tmp_path / "figures.json"
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--quick", "--rounds", "1", "--dims", "100", "--vectors", "1", "64", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "busyness", "races"}
    races = report["races"]
    assert [(race["settings"]["table"], race["settings"]["vectors"]) for race in races] == [
        (table, count) for table in benchmark.TABLES for count in (1, 64)
    ]
    for race in races:
        ours, *others = race["standings"]
        assert ours["ratio"] is None and [other["name"] for other in others] == list(products.PEERS)
        assert all(other["ratio"]["median"] > 0 and other["isa"] for other in others)
    assert "trellis" in capsys.readouterr().out


def test_the_benchmark_refuses_other_products():
    ours = torch.tensor([[1.0, 2.0]])
    assert products.find_other_products(ours, ours + 1e-6) is None
    assert products.find_other_products(ours, ours + 1e-3) == "products of up to 2 are up to 0.001 apart"
    assert products.find_other_products(ours, (ours + 1e-3).bfloat16()) is None

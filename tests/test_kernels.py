"""Each instruction set's kernels against the NumPy reference and against each other, bit for bit."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from hard_rows import hard_rows, hard_table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import embpack
from embpack import _native, reference
from embpack.layouts import RowFormat
from embpack.methods import CodebookMethod, Method, Optimal, TableRange, parse_method
from embpack.methods.optimal import EFFORTS

BITS = [2, 4, 8]
PARAM_DTYPES = ["float16", "float32"]
# One below, at and above every width that a kernel treats as a whole.
SIZES = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
# Past 256 values, a float32 run of the loss ends within a row.
WIDE_SIZES = [257, 1030]
# Blocks have 32 rows, two vectors of 16.
ROW_COUNTS = [1, 15, 16, 17, 31, 32, 33, 64, 65]
UNIT_ROUNDOFF = 2.0**-24
# Methods that choose for each row by itself. A thousand steps take the reference minutes; the kernel is GREEDY's.
ROW_METHODS = [name for name, method in embpack.METHODS.items() if hasattr(method, "kernel")]
# Of these, rows may have one value, 8 bits, and float16 parameters.
NOT_TRELLIS = [name for name in embpack.METHODS if name != "trellis"]
FEWER_STEPS = {"greedy-opt": "greedy-opt:b=40"}
SPECS = [FEWER_STEPS.get(name, name) for name in ROW_METHODS]


def pairs_of(sizes: list[int]) -> list[tuple[int, int, str]]:
    """Sizes with bits and parameter types: any two of each meet, and all three do at one of two sizes in a row."""
    of_all = product(enumerate(sizes), enumerate(BITS))
    return [(size, bits, PARAM_DTYPES[(i + j) % 2]) for (i, size), (j, bits) in of_all]


@dataclass(frozen=True)
class Expected:
    rows: np.ndarray
    method: Method
    packed: np.ndarray
    dequantized: np.ndarray
    loss: float


@cache
def expected(spec: str, embedding_dim: int, bits: int, param_dtype: str) -> Expected:
    """What the reference makes of the hard rows; slow, so once for all instruction sets."""
    rows = hard_table(embedding_dim, bits, param_dtype)
    method = parse_method(spec)
    if isinstance(method, TableRange) and method.needs_bounds:
        method = TableRange(float(rows.min()), float(rows.max()))
    row_format = RowFormat(embedding_dim, bits, param_dtype, method.layout)
    quantize = reference.quantize_by_codebooks if isinstance(method, CodebookMethod) else reference.quantize
    packed = quantize(rows, method, row_format)
    dequantized = reference.dequantize(packed, row_format)
    return Expected(rows, method, packed, dequantized, reference.normalized_l2_loss(rows, dequantized))


def differing_rows(got: np.ndarray, wanted: np.ndarray, embedding_dim: int, bits: int, param_dtype: str) -> list[str]:
    """The kinds of the hard rows that differ."""
    kinds = hard_rows(embedding_dim, bits, param_dtype)
    return [kind for kind, a, b in zip(kinds, got, wanted, strict=True) if a.tobytes() != b.tobytes()]


def assert_loss_close(loss: float, wanted: float, num_values: int) -> None:
    """The measured loss within what its arithmetic can lose.

    Both sums are of squares, so that relative errors of terms carry over to sums. An error is rounded once when
    it is subtracted, hence twice in its square, and a square goes through at most 16 roundings in float32 before
    float64 takes over: at most 18 for the errors, 16 for the values, and the root halves their sum, 17. Squares
    below the float32 subnormals are lost, 2^-150 each, where a row's norm is at least 2^-82 (encode-inl.h).
    """
    assert abs(loss**2 - wanted**2) <= 36 * UNIT_ROUNDOFF * wanted**2 + num_values * 2.0**-68


def skip_minutes_of_kmeans(method: str, embedding_dim: int, bits: int) -> None:
    if method == "kmeans" and bits == 8 and embedding_dim > 300:
        pytest.skip("256 clusters of a row of 1030 values: a minute")


def check_against_reference(spec: str, embedding_dim: int, bits: int, param_dtype: str) -> None:
    wanted = expected(spec, embedding_dim, bits, param_dtype)
    table = embpack.quantize(wanted.rows, spec, bits, param_dtype)
    axes = (embedding_dim, bits, param_dtype)
    assert differing_rows(table.packed, wanted.packed, *axes) == []
    assert differing_rows(table.dequantize(), wanted.dequantized, *axes) == []
    assert_loss_close(table.loss, wanted.loss, wanted.rows.size)


@pytest.mark.parametrize(("embedding_dim", "bits", "param_dtype"), pairs_of(SIZES))
@pytest.mark.parametrize("method", SPECS)
def test_kernels_do_what_the_reference_does(isa, method, embedding_dim, bits, param_dtype):
    check_against_reference(method, embedding_dim, bits, param_dtype)


@pytest.mark.parametrize(("bits", "param_dtype"), [(2, "float16"), (4, "float16"), (8, "float32")])
@pytest.mark.parametrize("embedding_dim", WIDE_SIZES)
@pytest.mark.parametrize("method", SPECS)
def test_kernels_do_what_the_reference_does_in_wide_rows(isa, method, embedding_dim, bits, param_dtype):
    skip_minutes_of_kmeans(method, embedding_dim, bits)
    check_against_reference(method, embedding_dim, bits, param_dtype)


@cache
def make_error_weights(kind: str, embedding_dim: int, num_rows: int) -> np.ndarray:
    """Weights of very different sizes, some of them zero."""
    rng = np.random.default_rng(embedding_dim)
    weights = rng.gamma(0.5, size=(num_rows, embedding_dim)) * (rng.random((num_rows, embedding_dim)) > 0.2)
    return (weights[1:2] if kind == "columns" else weights).astype(np.float32)


@cache
def expected_by_weights(effort: str, kind: str, embedding_dim: int, bits: int, param_dtype: str) -> np.ndarray:
    rows, method = hard_table(embedding_dim, bits, param_dtype), Optimal(effort)
    row_format = RowFormat(embedding_dim, bits, param_dtype)
    weights = np.ones_like(rows) if kind == "none" else make_error_weights(kind, embedding_dim, len(rows))
    weights = np.broadcast_to(weights, rows.shape)
    ranges = [method.search(x, row_format, None if kind == "none" else w) for x, w in zip(rows, weights, strict=True)]
    return np.stack([reference.pack_row(x, *ends, row_format) for x, ends in zip(rows, ranges, strict=True)])


@pytest.mark.parametrize(("embedding_dim", "bits", "param_dtype"), pairs_of([1, 2, 7, 16, 33]))
@pytest.mark.parametrize("kind", ["none", "columns", "values"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_optimal_does_what_the_reference_does_for_weighted_errors(isa, effort, kind, embedding_dim, bits, param_dtype):
    axes = (embedding_dim, bits, param_dtype)
    rows = hard_table(*axes)
    weights = None if kind == "none" else make_error_weights(kind, embedding_dim, len(rows))
    if effort == "exact" and bits == 8:
        with pytest.raises(ValueError, match="effort 'exact' is for 2 and 4 bits"):
            embpack.quantize(rows, Optimal(effort), bits, param_dtype, error_weights=weights)
        return
    table = embpack.quantize(rows, Optimal(effort), bits, param_dtype, error_weights=weights)
    assert differing_rows(table.packed, expected_by_weights(effort, kind, *axes), *axes) == []


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("embedding_dim", [5, 33])
@pytest.mark.parametrize(
    "spec",
    [
        "table:xmin=-0.5,xmax=0.75",
        "table:xmin=0.1,xmax=0.1",
        "greedy:b=1",
        "greedy:b=2,r=0.9",
        "greedy:b=60,r=0.5",
        "greedy:b=200,r=0.001",
        "greedy:b=30,r=0.99999999",
        "greedy-paper:b=60,r=0.5",
        "greedy-paper:b=37,r=0.3",
        "optimal:effort=fast",
    ],
)
def test_parameters_are_honoured(isa, spec, embedding_dim, bits):
    check_against_reference(spec, embedding_dim, bits, "float16")


@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["asym", "greedy"])
@pytest.mark.filterwarnings("ignore:weight. 1 of its rows come back no better than zeros")
def test_loss_of_each_kind_of_row(isa, method, bits, param_dtype):
    """On its own, where rows a million times as large do not hide it."""
    wanted = expected(method, 33, bits, param_dtype)
    for row, dequantized in zip(wanted.rows, wanted.dequantized, strict=True):
        loss = embpack.quantize(row[None], method, bits, param_dtype).loss
        assert_loss_close(loss, reference.normalized_l2_loss(row, dequantized), row.size)


@settings(max_examples=150)
@given(st.data())
def test_any_rows_pack_as_in_the_reference(isa, data):
    bits = data.draw(st.sampled_from(BITS))
    param_dtype = data.draw(st.sampled_from(PARAM_DTYPES))
    # Differences up to the largest float32 or float16 scale; + 0 turns -0 into 0.
    largest = 1.5e38 if param_dtype == "float32" else 6e4
    largest = float(np.float32(largest))
    shape = st.tuples(st.integers(1, 4), st.integers(1, 36))
    rows = data.draw(arrays(np.float32, shape, elements=st.floats(-largest, largest, width=32))) + np.float32(0)
    method = data.draw(st.sampled_from(["asym", "sym", "greedy:b=20", "greedy-paper:b=20"]))
    row_format = RowFormat(rows.shape[1], bits, param_dtype)
    packed = reference.quantize(rows, parse_method(method), row_format)
    table = embpack.quantize(rows, method, bits, param_dtype)
    np.testing.assert_array_equal(table.packed, packed)
    np.testing.assert_array_equal(table.dequantize(), reference.dequantize(packed, row_format))


BY_ROWS = ["table:xmin=-2,xmax=2" if spec == "table" else spec for spec in SPECS]


@pytest.mark.parametrize(
    ("method", "num_rows", "bits"),
    [(BY_ROWS[i], ROW_COUNTS[j], BITS[(i + j) % 3]) for i in range(len(BY_ROWS)) for j in range(len(ROW_COUNTS))],
)
def test_a_row_packs_the_same_whatever_its_place(isa, rng, method, num_rows, bits):
    """Alone, and in every lane of full and partial blocks."""
    rows = rng.standard_normal((num_rows, 21), np.float32)
    together = embpack.quantize(rows, method, bits)
    alone = np.concatenate([embpack.quantize(row[None], method, bits).packed for row in rows])
    np.testing.assert_array_equal(together.packed, alone)
    dequantized = together.dequantize()
    np.testing.assert_array_equal(dequantized, reference.dequantize(alone, together.row_format))
    assert_loss_close(together.loss, reference.normalized_l2_loss(rows, dequantized), rows.size)


def results_by_isa(compute) -> dict[str, object]:
    before = _native.isa()
    try:
        return {name: compute() for name in _native.available_isas() if _native.use_isa(name)}
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize(("embedding_dim", "bits", "param_dtype"), pairs_of([1, 7, 16, 33, 129, 300, 1030]))
@pytest.mark.parametrize("method", [FEWER_STEPS.get(name, name) for name in NOT_TRELLIS])
def test_all_isas_agree_to_the_bit(method, embedding_dim, bits, param_dtype):
    skip_minutes_of_kmeans(method, embedding_dim, bits)
    check_that_isas_agree(hard_table(embedding_dim, bits, param_dtype), method, bits, param_dtype)


@pytest.mark.parametrize(
    ("embedding_dim", "bits"),
    [*product([4, 7, 16, 33, 129], [2, 3.5, 4, 7]), (300, 3.5), (300, 7), (1030, 2), (1030, 4)],
)
def test_all_isas_agree_about_trellis_coded_rows(rng, embedding_dim, bits):
    num_rows = 70 if embedding_dim < 300 else 21  # packed twice: a block of 32 and a part of one
    check_that_isas_agree(rng.laplace(size=(num_rows, embedding_dim)).astype(np.float32), "trellis", bits, "float32")


def check_that_isas_agree(table: np.ndarray, method: str, bits: float, param_dtype: str) -> None:
    """To the bit, in packing, in looking up and in pooling."""
    rows = np.concatenate([table] * 2)
    indices, offsets = np.arange(len(rows) - 1, -1, -1), [0, 1, 1, 7, 40]
    weights = np.random.default_rng(0).standard_normal(len(rows), np.float32)

    def compute():
        table = embpack.quantize(rows, method, bits, param_dtype)
        pooled = [table.embedding_bag(indices, offsets, mode).tobytes() for mode in ("sum", "mean", "max")]
        weighted = table.embedding_bag(indices, offsets, "sum", weights).tobytes()
        return table.packed.tobytes(), table.loss, table[indices].tobytes(), *pooled, weighted

    results = results_by_isa(compute)
    assert {name: result == results["portable"] for name, result in results.items()} == dict.fromkeys(results, True)


@pytest.mark.parametrize(("bits", "param_dtype"), [(2, "float16"), (4, "float16"), (8, "float16"), (8, "float32")])
@pytest.mark.parametrize("embedding_dim", [1, 17, 64])
def test_all_isas_read_any_bytes_alike(rng, embedding_dim, bits, param_dtype):
    """Bytes from elsewhere: any scale and bias, also subnormal, negative, infinite and NaN."""
    row_bytes = RowFormat(embedding_dim, bits, param_dtype).row_bytes
    packed = rng.integers(0, 256, (500, row_bytes), np.uint8)
    table = embpack.PackedTable.from_packed(packed, embedding_dim, bits, param_dtype)
    indices = rng.integers(0, 500, (100, 5))

    def compute():
        return [table.dequantize(), *(table.embedding_bag(indices, mode=mode) for mode in ("sum", "mean", "max"))]

    results = results_by_isa(compute)
    for result in results.values():
        for got, wanted in zip(result, results["portable"], strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("embedding_dim", [*SIZES, 257])
@pytest.mark.parametrize("mode", ["sum", "weighted", "mean", "max"])
def test_pooling_does_what_the_reference_does(isa, rng, mode, embedding_dim, bits):
    table = embpack.quantize(rng.standard_normal((50, embedding_dim), np.float32), "asym", bits)
    lengths = [1, 0, 2, 3, 16, 17, 0]
    indices = rng.integers(0, 50, sum(lengths))
    offsets = np.cumsum([0, *lengths[:-1]])
    weights = rng.standard_normal(len(indices), np.float32) if mode == "weighted" else None
    mode = "sum" if mode == "weighted" else mode
    padding_idx = int(indices[2])

    def bags(values):
        return np.split(values, offsets[1:])

    wanted = reference.embedding_bag(
        table.dequantize(), bags(indices), mode, None if weights is None else bags(weights), padding_idx
    )
    got = table.embedding_bag(indices, offsets, mode, weights, padding_idx=padding_idx)
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("embedding_dim", SIZES)
def test_packed_bytes_may_start_anywhere(isa, rng, embedding_dim):
    packed = embpack.quantize(rng.standard_normal((40, embedding_dim), np.float32)).packed
    wanted = embpack.PackedTable.from_packed(packed, embedding_dim).dequantize()
    for start in (1, 2, 3, 5, 13):
        buffer = np.empty(start + packed.size, np.uint8)
        unaligned = buffer[start:].reshape(packed.shape)
        unaligned[:] = packed
        table = embpack.PackedTable.from_packed(unaligned, embedding_dim)
        np.testing.assert_array_equal(table.dequantize(), wanted)
        pooled = table.embedding_bag(np.arange(40)[:, None], mode="sum")
        np.testing.assert_array_equal(pooled, wanted)


def test_rows_may_lie_unaligned(isa, rng):
    rows = rng.standard_normal((40, 33), np.float32)
    unaligned = np.empty(rows.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(rows.shape)
    unaligned[:] = rows
    assert not unaligned.flags.aligned
    np.testing.assert_array_equal(embpack.quantize(unaligned).packed, embpack.quantize(rows).packed)


def all_finite_halves(dtype) -> np.ndarray:
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    return values[np.isfinite(values.astype(np.float32))]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_widens_exactly(isa, dtype):
    """A row of one value is stored as its bias; with float32 parameters, nothing is lost."""
    values = all_finite_halves(dtype)
    table = embpack.quantize(values[:, None], "asym", param_dtype="float32")
    np.testing.assert_array_equal(table.dequantize()[:, 0], values.astype(np.float32))
    assert table.loss == 0


def test_every_float16_parameter_reads_exactly(isa):
    bias = all_finite_halves(np.float16)
    packed = np.zeros((len(bias), 5), np.uint8)
    packed[:, 3:] = bias.view(np.uint8).reshape(-1, 2)
    table = embpack.PackedTable.from_packed(packed, 1)
    np.testing.assert_array_equal(table.dequantize()[:, 0], bias.astype(np.float32))


def test_every_float16_rounding_is_that_of_numpy(isa):
    """Biases at, beside and between all neighbouring float16, with the ties."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate([halves[1:], between, np.nextafter(between, 0), np.nextafter(between, np.float32(np.inf))])
    values = np.concatenate([values, -values])
    table = embpack.quantize(values[:, None], "asym")
    np.testing.assert_array_equal(table.packed[:, 3:].copy().view(np.float16)[:, 0], values.astype(np.float16))


@pytest.mark.parametrize(
    ("method", "embedding_dim"),
    [*product(NOT_TRELLIS, [1, 15, 16, 17, 33, 64]), *product(["trellis"], [4, 15, 16, 17, 33, 64])],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_packs_as_its_float32_values(isa, rng, dtype, method, embedding_dim):
    rows = rng.standard_normal((67, embedding_dim), np.float32)
    halves = rows.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    check_half_precision(halves, halves.astype(np.float32), dtype, method)


@pytest.mark.parametrize("method", embpack.METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_of_pytorch_packs_as_its_float32_values(rng, dtype, method):
    halves = torch.from_numpy(rng.standard_normal((67, 33), np.float32)).to(getattr(torch, dtype))
    check_half_precision(halves, halves.float().numpy(), dtype, method)


def check_half_precision(halves, wide: np.ndarray, dtype: str, method: str) -> None:
    table, wanted = embpack.quantize(halves, method), embpack.quantize(wide, method)
    np.testing.assert_array_equal(table.packed, wanted.packed)
    assert table.loss == wanted.loss
    assert table.dtype == dtype


def far_apart(rows, dtype):
    """The same rows, every other one and every third column of something larger."""
    large = np.zeros((2 * rows.shape[0], 3 * rows.shape[1]), dtype)
    view = large[::2, ::3]
    view[:] = rows
    return view


LAYINGS = {
    "transposed": lambda rows: np.asfortranarray(rows),
    "strided": lambda rows: far_apart(rows, rows.dtype),
    "upside down": lambda rows: np.ascontiguousarray(rows[::-1])[::-1],
    "mirrored": lambda rows: np.ascontiguousarray(rows[:, ::-1])[:, ::-1],
    "columns of more": lambda rows: np.concatenate([rows, rows], axis=1)[:, : rows.shape[1]],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("laying", LAYINGS)
@pytest.mark.parametrize("method", ["greedy", "table"])
def test_rows_need_not_be_contiguous(rng, method, laying, dtype):
    rows = rng.standard_normal((35, 19), np.float32).astype(dtype)
    laid = LAYINGS[laying](rows)
    assert not laid.flags.c_contiguous
    table, wanted = embpack.quantize(laid, method), embpack.quantize(rows, method)
    np.testing.assert_array_equal(table.packed, wanted.packed)
    assert table.loss == wanted.loss


def test_quantize_leaves_its_input_alone(isa, rng):
    rows = rng.standard_normal((33, 17), np.float32)
    before = rows.copy()
    for method in embpack.METHODS:
        embpack.quantize(rows, method)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("method", ["greedy:b=200000,r=0.999999", "greedy-paper:b=200000,r=0.999999"])
@pytest.mark.parametrize("centre", [1000.0, 1.0, -3e4])
def test_steps_too_small_to_move_the_range_end(isa, rng, method, centre):
    """A range of a few float32 spacings cannot shrink by 5e-6 of itself: at most b moves, then its ends."""
    spacing = np.spacing(np.float32(abs(centre)))
    rows = (centre + spacing * rng.integers(0, 4, (1, 3))).astype(np.float32)
    table = embpack.quantize(rows, method, param_dtype="float32")
    np.testing.assert_array_equal(table.packed, embpack.quantize(rows, "asym", param_dtype="float32").packed)

"""The NumPy reference against bytes worked out by hand and against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embpack import reference
from embpack.arithmetic import F32, fma
from embpack.layouts import RowFormat
from embpack.layouts.codes import pack_codes, unpack_codes
from embpack.methods import Asym, GreedyPaper, Sym, TableRange

# Rows and what they pack to: codes, then scale and bias. Worked out by hand, and read off PyTorch 2.13 and
# FBGEMM 1.8; 0x3c00 is 1 and 0x0000 is 0 in float16, 0x3f800000 is 1 in float32.
GOLDEN_ROWS = {
    "4 bits, 0 to 15": (range(16), 4, None, "1032547698badcfe 003c 0000"),
    "2 bits": ([0, 1, 2, 3, 3, 2, 1, 0], 2, None, "e41b 003c 0000"),
    "8 bits": ([0, 1, 2, 255], 8, None, "000102ff 0000803f 00000000"),
    "8 bits, float16 parameters": ([0, 1, 2, 255], 8, "float16", "000102ff 003c 0000"),
    "4 bits, float32 parameters": (range(16), 4, "float32", "1032547698badcfe 0000803f 00000000"),
    # scale 2 / 15 = 0.13330078125 in float16 (0x3044), bias -1 (0xbc00).
    "signed": ([-1, -0.5, 0, 0.5, 1, 0.25, -0.75, 0.9], 4, None, "40b89fe2 4430 00bc"),
    "constant, exact in float16: scale 1": ([2.5] * 8, 4, None, "00000000 003c 0041"),
    # float16(.1) lies 2.4e-5 below .1; a 15th of that is the subnormal 27 * 2^-24 (0x001b).
    "constant, rounded down: subnormal scale": ([0.1] * 8, 4, None, "ffffffff 1b00 662e"),
    # float16(.3) lies above .3, so the range and with it the scale are negative.
    "constant, rounded up: negative scale": ([0.3] * 8, 4, None, "ffffffff 3780 cd34"),
    "constant at 8 bits: scale 0": ([2.5] * 4, 8, None, "00000000 00000000 00002040"),
    "4 bits, odd: the last byte padded with zeros": (range(0, 16, 5), 4, None, "50fa 003c 0000"),
    "4 bits, three values": ([0, 7, 15], 4, None, "700f 003c 0000"),
    "2 bits, five values": ([0, 1, 2, 3, 3], 2, None, "e403 003c 0000"),
    "one value": ([1], 4, None, "00 003c 003c"),
    # (x - 0) / 1 = .5, 1.5, 2.5 round to the even codes 0, 2, 2.
    "ties go to even": ([0, 0.5, 1.5, 2.5, 3.5, 15], 4, None, "0022f4 003c 0000"),
    # A range of 1e-7 has a scale below half of the smallest float16: it is stored as 1, and all codes are 0.
    "scale vanishes in float16": ([1, 1.0000001], 4, None, "00 003c 003c"),
}


def row_format(values, bits, param_dtype):
    return RowFormat(len(values), bits, param_dtype or ("float32" if bits == 8 else "float16"))


@pytest.mark.parametrize("name", GOLDEN_ROWS)
def test_asym_packs_by_hand(name):
    values, bits, param_dtype, expected = GOLDEN_ROWS[name]
    weight = np.array([values], F32)
    packed = reference.quantize(weight, Asym(), row_format(values, bits, param_dtype))
    assert packed.tobytes().hex() == expected.replace(" ", "")


def test_greedy_paper_packs_what_pytorch_does():
    weight = np.array([[-1, -0.5, 0, 0.5, 1, 0.25, -0.75, 0.9]], F32)
    packed = reference.quantize(weight, GreedyPaper(), RowFormat(8))
    assert packed.tobytes().hex() == "40b79fe23f30ecbb"


def test_sym_packs_by_hand():
    # Range -1 to 1: scale 2 / 15 (0x3044), bias -1 (0xbc00); 0 is 7.5 codes up, and 1 / .1333 rounds to 7.50.
    packed = reference.quantize(np.array([[0, 1, -0.2, 0.6]], F32), Sym(), RowFormat(4))
    assert packed.tobytes().hex() == "f8c6443000bc"


def test_table_clips_by_hand():
    packed = reference.quantize(np.array([[-3, 0, 7, 99]], F32), TableRange(0, 15), RowFormat(4))
    assert packed.tobytes().hex() == "00f7003c0000"


@pytest.mark.parametrize("name", GOLDEN_ROWS)
def test_dequantize_is_scale_times_code_plus_bias(name):
    values, bits, param_dtype, hex_bytes = GOLDEN_ROWS[name]
    fmt = row_format(values, bits, param_dtype)
    packed = np.frombuffer(bytes.fromhex(hex_bytes.replace(" ", "")), np.uint8)[None]
    params = packed[0, fmt.code_bytes :].copy().view("<f2" if fmt.has_f16_params else "<f4")
    per_byte = 8 // bits
    codes = [int(packed[0, j // per_byte]) >> (j % per_byte * bits) & (2**bits - 1) for j in range(len(values))]
    # With float16 or small integer parameters scale * code + bias fits in float64, so one rounding is left.
    expected = F32([float(params[0]) * code + float(params[1]) for code in codes])
    np.testing.assert_array_equal(reference.dequantize(packed, fmt), expected[None])


def test_dequantize_gives_back_what_lies_on_the_grid():
    packed = reference.quantize(np.arange(16, dtype=F32)[None], Asym(), RowFormat(16))
    np.testing.assert_array_equal(reference.dequantize(packed, RowFormat(16)), np.arange(16, dtype=F32)[None])


@given(st.data())
def test_unpack_codes_undoes_pack_codes(data):
    bits = data.draw(st.sampled_from([2, 4, 8]))
    embedding_dim = data.draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=embedding_dim, max_size=embedding_dim)
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=3)), np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (len(codes), RowFormat(embedding_dim, bits).code_bytes)
    np.testing.assert_array_equal(unpack_codes(packed, embedding_dim, bits), codes)
    # As one little-endian number, a row is the sum of its codes, code j worth 2^(j * bits); padding adds nothing.
    for row_bytes, row_codes in zip(packed, codes, strict=True):
        total = sum(int(code) << (j * bits) for j, code in enumerate(row_codes))
        assert int.from_bytes(row_bytes.tobytes(), "little") == total


def round_to_float32(exact: Fraction) -> np.float32:
    """The float32 nearest to an exact number, ties to even, found by comparing with neighbours."""
    with np.errstate(over="ignore"):
        guess = F32(float(exact))
    below, above = np.nextafter(guess, F32(-np.inf)), np.nextafter(guess, F32(np.inf))
    candidates = [c for c in (below, guess, above) if np.isfinite(c)]
    distance = {float(c): abs(Fraction(float(c)) - exact) for c in candidates}
    nearest = min(distance.values())
    winners = [c for c in candidates if distance[float(c)] == nearest]
    return next(c for c in winners if len(winners) == 1 or c.view(np.uint32) % 2 == 0)


def exact_fma(a, b, c) -> np.float32:
    return round_to_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


# Sums of products stay far below the largest float32.
finite = st.floats(-(2.0**60), 2.0**60, width=32)


@given(finite, finite, finite)
@example(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60)  # the product is half way; the addend breaks the tie upwards
@example(1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60))  # and downwards, which float64 cannot see
@example(1 + 2.0**-12, 1 + 2.0**-12, 0.0)  # a real tie goes to even
@example(1 + 3 * 2.0**-12, 1 + 2.0**-12, -(2.0**-60))
@example(2.0**-75, 2.0**-75, 2.0**-149)  # half of the smallest subnormal is added to it
@example(2.0**-75, 2.0**-75, 0.0)  # a product beyond float32 that rounds to zero
@example(3.0, 1 / 3, -1.0)  # cancellation leaves only the product's rounding
@example(-1.0, 1.0, 1.0)
def test_fma_rounds_once(a, b, c):
    a, b, c = F32(a), F32(b), F32(c)
    assert fma(a, b, c) == exact_fma(a, b, c)


def test_fma_escapes_double_rounding():
    """(2^12 + 1)^2 lies half way between two float32, and 2^-40 more decides; but float64 has no room for it."""
    a, b, c = F32(2**12 + 1), F32(2**12 + 1), F32(2.0**-40)
    rounded_twice = F32(np.float64(a) * np.float64(b) + np.float64(c))
    assert rounded_twice != exact_fma(a, b, c)
    assert fma(a, b, c) == exact_fma(a, b, c)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_by_hand(mode):
    rows = np.array([[1, -1], [2, 4], [3, -9]], F32)
    bags = [np.array([0, 1, 1]), np.array([], np.int64), np.array([2])]
    expected = {
        "sum": [[5, 7], [0, 0], [3, -9]],
        "mean": [[5 / 3, 7 / 3], [0, 0], [3, -9]],
        "max": [[2, 4], [0, 0], [3, -9]],
    }[mode]
    np.testing.assert_array_equal(reference.embedding_bag(rows, bags, mode), F32(expected))


@pytest.mark.parametrize(("mode", "expected"), [("sum", [-2, -3]), ("mean", [-1, -1.5]), ("max", [-1, -1])])
def test_embedding_bag_leaves_padding_out(mode, expected):
    rows = np.array([[-1, -1], [50, 50], [-1, -2]], F32)
    bags = [np.array([0, 1, 2, 1]), np.array([1, 1])]
    pooled = reference.embedding_bag(rows, bags, mode, padding_idx=1)
    np.testing.assert_array_equal(pooled, F32([expected, [0, 0]]))


def test_embedding_bag_weighs_with_one_rounding():
    # -(1 + 2^-12), then (1 + 2^-12) * (1 + 2^-12) more: 2^-12 + 2^-24, which rounding the product would lose.
    rows = np.array([[1], [1 + 2.0**-12]], F32)
    weights = [np.array([-(1 + 2.0**-12), 1 + 2.0**-12], F32)]
    pooled = reference.embedding_bag(rows, [np.array([0, 1])], "sum", weights)
    np.testing.assert_array_equal(pooled, F32([[2.0**-12 + 2.0**-24]]))


BEYOND = F32([65503, 65519, 65520, -1e6, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1.00390625, 1.01171875])


def test_values_that_a_type_cannot_hold():
    """Finite ones become its largest; ties go to even."""
    halves = reference.embedding_bag(BEYOND[None], [np.array([0])], "sum", dtype="float16")[0]
    np.testing.assert_array_equal(
        halves[:9], np.float16([65504, 65504, 65504, -65504, np.inf, -np.inf, np.nan, 65504, -65504])
    )
    bits = reference.embedding_bag(BEYOND[None], [np.array([0])], "sum", dtype="bfloat16")[0]
    assert [hex(value) for value in bits[[3, 4, 5, 7, 8, 9, 10]]] == [
        *("0xc974", "0x7f80", "0xff80", "0x7f7f", "0xff7f"),  # -1e6, infinities, the largest
        *("0x3f80", "0x3f82"),  # half way from 1 to the next, and from that to the one after it
    ]
    assert np.isnan((bits[6].astype(np.uint32) << np.uint32(16)).view(F32))


def test_normalized_l2_loss_by_hand():
    assert reference.normalized_l2_loss(F32([[3, 4]]), F32([[3, 3]])) == 0.2
    assert reference.normalized_l2_loss(F32([[0, 0]]), F32([[0, 0]])) == 0

"""The peers of benchmarks.loss that are computed by formulas: by hand, and against those whose formulas they are."""

import numpy as np
import pytest

from benchmarks.losses import list_trellis, make_tables
from benchmarks.peers import exllamav3_loss, fp8_loss, gguf_loss, mlx_loss, vllm_loss
from embpack.layouts import RowFormat

# Of N(0, 1), d = 160: bytes a row and normalized l2 loss, as measured by somebody else by the same formulas.
KNOWN = {
    ("vLLM", "nf4"): (84, 0.0909),
    ("gguf", "Q4_0"): (90, 0.0862),
    ("gguf", "Q4_1"): (100, 0.0783),
    ("FP8", "E4M3, one scale"): (160, 0.0264),
    ("FP8", "E4M3, a scale a row"): (162, 0.0259),
}
BY_FORMULA = [
    *(own for peer in (vllm_loss, gguf_loss, mlx_loss, fp8_loss, exllamav3_loss) for own in peer.QUANTIZERS),
]


@pytest.mark.parametrize("way", KNOWN, ids=str)
def test_bytes_and_losses_are_those_that_are_known(way):
    [quantizer] = [own for own in BY_FORMULA if (own.library, own.method) == way]
    [(_, weight)] = make_tables(["normal"], [160], 500)
    restored = quantizer.restore(weight)
    row_bytes, loss = KNOWN[way]
    assert restored.nbytes // 500 == row_bytes
    assert np.linalg.norm(restored.values - weight) / np.linalg.norm(weight) == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("quantizer", BY_FORMULA, ids=lambda own: f"{own.library} {own.method}")
def test_zeros_stay_zeros(quantizer):
    restored = quantizer.restore(np.zeros((2, 64), np.float32))
    np.testing.assert_allclose(restored.values, 0, atol=1e-6)


def test_a_block_by_hand():
    """A byte has a value in its low bits and the one sixteen further in its high bits."""
    block = np.zeros((1, 32), np.float32)
    block[0, [0, 16, 31]] = [-16, 14, 2]
    packed = gguf_loss.pack_q4_0(block)
    assert packed.tobytes() == np.float16(2).tobytes() + bytes([0xF0, *[0x88] * 14, 0x98])
    np.testing.assert_array_equal(gguf_loss.unpack_q4_0(packed), block)
    packed = gguf_loss.pack_q4_1(block)
    assert packed.tobytes() == np.float16([2, -16]).tobytes() + bytes([0xF0, *[0x88] * 14, 0x98])
    packed = gguf_loss.pack_iq4_nl(gguf_loss.LEVELS[None, [*range(16)] * 2] / 8)
    assert packed.tobytes() == np.float16(1 / 8).tobytes() + bytes(0x11 * code for code in range(16))


@pytest.mark.parametrize("factor", [1, 1e-3, 300])
def test_blocks_are_those_of_gguf(rng, factor):
    gguf = pytest.importorskip("gguf")
    weight = np.concatenate([rng.standard_normal((500, 64)), rng.laplace(size=(500, 64)), np.zeros((1, 64))])
    blocks = (weight * factor).astype(np.float32).reshape(-1, 32)
    kinds = gguf.GGMLQuantizationType
    for kind, pack, unpack in [
        (kinds.Q4_0, gguf_loss.pack_q4_0, gguf_loss.unpack_q4_0),
        (kinds.Q4_1, gguf_loss.pack_q4_1, gguf_loss.unpack_q4_1),
        (kinds.IQ4_NL, gguf_loss.pack_iq4_nl, gguf_loss.unpack_iq4_nl),
    ]:
        packed = pack(blocks)
        if kind != kinds.IQ4_NL:  # which it has no packer for
            np.testing.assert_array_equal(packed, gguf.quantize(blocks, kind))
        np.testing.assert_array_equal(unpack(packed), gguf.dequantize(packed, kind))


def test_the_search_of_iq4_nl_finds_what_few_scales_can(rng):
    """Within 4 % of the best of very many scales, and worse if errors do not count alike."""
    blocks = rng.standard_normal((300, 32), np.float32)
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best = np.full(300, np.inf)
    for inverse in np.concatenate([np.arange(-150, -80, 0.25), np.arange(80, 150, 0.25)]):
        scales = peaks / inverse
        nearest = np.abs(blocks[:, :, None] - scales[:, :, None] * gguf_loss.LEVELS).min(axis=2)
        best = np.minimum(best, np.square(nearest, dtype=np.float64).sum(axis=1))
    alike, by_squares = (
        np.square(gguf_loss.unpack_iq4_nl(gguf_loss.pack_iq4_nl(blocks, by_squares)) - blocks).sum()
        for by_squares in (False, True)
    )
    assert best.sum() < alike < by_squares
    assert np.sqrt(alike / best.sum()) < 1.04


def test_groups_by_hand():
    """Even numbers up to 30 are exact, in either direction."""
    group = 2 * np.arange(32, dtype=np.float32)[None] % 32
    for sign in (1, -1):
        restored = mlx_loss.restore(32, sign * group)
        np.testing.assert_array_equal(restored.values, sign * group)
        assert restored.nbytes == 20


@pytest.mark.parametrize("group", [32, 64])
def test_groups_are_those_of_mlx(rng, group):
    mx = pytest.importorskip("mlx.core")
    weight = rng.standard_normal((500, 64)).astype(np.float16)
    codes, *params = mx.quantize(mx.array(weight), group_size=group, bits=4)
    theirs = mx.dequantize(codes, *(param.astype(mx.float32) for param in params), group_size=group, bits=4)
    np.testing.assert_array_equal(mlx_loss.restore(group, weight.astype(np.float32)).values, np.array(theirs))


def test_levels_of_rows_are_the_best_for_their_scale(rng):
    weight = rng.standard_normal((20, 64), np.float32)
    values = vllm_loss.restore(weight).values
    for row, restored in zip(weight, values, strict=True):
        scales = np.sqrt(np.mean(np.square(row))) * np.float32(vllm_loss.FACTORS)
        tried = scales.astype(np.float16).astype(np.float32)[:, None] * vllm_loss.LEVELS
        nearest = np.abs(row[:, None, None] - tried).min(axis=2)
        assert np.square(restored - row).sum() == pytest.approx(np.square(nearest).sum(axis=0).min(), rel=1e-5)


def test_fp8_is_rounded_as_by_ml_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    ties = (every[1:] + every[:-1]) / 2
    values = np.concatenate([every, ties, *(rng.standard_normal(1000) * size for size in (1e-3, 1, 150))])
    values = np.clip(values, -448, 448).astype(np.float32)
    wanted = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(fp8_loss.round_to_e4m3(values), wanted)
    np.testing.assert_array_equal(fp8_loss.round_to_e4m3(np.float32([-1e6, 500])), [-448, 448])


def test_the_mean_is_of_the_whole_table(rng):
    """And of rows that are not packed."""
    weight = rng.standard_normal((400, 32)).astype(np.float32)
    weight[4:] += 100
    restored = exllamav3_loss.QUANTIZERS[0].restore(weight)
    assert restored.values.shape == (4, 32)
    assert restored.nbytes == 4 * 10 + 64 * 4 // 400
    packed_alone = exllamav3_loss.QUANTIZERS[0].restore(weight[:4])
    assert np.linalg.norm(restored.values[0] - weight[0]) > 5 * np.linalg.norm(packed_alone.values - weight[:1])


@pytest.mark.parametrize("d", [64, 100, 160, 384])
def test_trellis_coded_rows_have_the_bytes_of_others(d):
    """As many as are whole, no more; none where others have too few, and one of 7 bits for all that have more."""
    sizes = [d / 4 + 3.5, d / 2 + 2, d / 2 + 9.25, d + 1, d + 2]
    found = [own.restore.args[2]["bits"] for own in list_trellis(sizes, d)]
    row_bytes = [RowFormat(d, bits, "float32", "trellis").row_bytes for bits in found]
    assert row_bytes == [d // 2 + 2, d // 2 + 9, -(-7 * d // 8) + 4]

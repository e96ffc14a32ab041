"""PyTorch and FBGEMM: the same bytes from the same rows, and each reads what the other packed."""

import warnings

import numpy as np
import pytest
import torch
from hard_rows import KINDS, hard_table

import embpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what FBGEMM says while it is imported is not ours
    fbgemm_gpu = pytest.importorskip("fbgemm_gpu")

UNIT_ROUNDOFF = 2.0**-24
SMALLEST = 2.0**-149  # a float32 that rounds to a subnormal is off by at most half of this

torch_pack = {
    2: torch.ops.quantized.embedding_bag_2bit_prepack,
    4: torch.ops.quantized.embedding_bag_4bit_prepack,
    8: torch.ops.quantized.embedding_bag_byte_prepack,
}
torch_pool = {
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
    8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
}

# PyTorch packs whole bytes only, FBGEMM's operators whole 16-bit words.
TORCH_DIMS = {2: [4, 8, 12, 16, 60, 64, 68, 128, 260], 4: [2, 4, 6, 8, 14, 16, 18, 30, 64, 66, 128, 258]}
TORCH_DIMS[8] = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 129, 257]
FBGEMM_DIMS = {2: [8, 16, 24, 64, 72, 136], 4: [4, 8, 12, 16, 20, 64, 68, 132], 8: [2, 4, 6, 16, 18, 64, 66, 130]}
BITS_AND_TORCH_DIMS = [(bits, d) for bits, dims in TORCH_DIMS.items() for d in dims]
BITS_AND_FBGEMM_DIMS = [(bits, d) for bits, dims in FBGEMM_DIMS.items() for d in dims]


def random_rows(rng, embedding_dim, scales=(1e-8, 1e-5, 1e-3, 1e-2, 0.1, 1, 10, 1e3, 1e4), rows_each=20):
    """Normal rows at every scale, with the hard ones after them."""
    normal = rng.standard_normal((len(scales), rows_each, embedding_dim)) * np.array(scales)[:, None, None]
    return np.concatenate([normal.reshape(-1, embedding_dim).astype(np.float32), hard_table(embedding_dim)])


def searchable(rows, b=200):
    """The rows that PyTorch's search comes to an end on: it never returns where a step does not move an end."""
    step = (rows.max(axis=1) - rows.min(axis=1)) / np.float32(b)
    return rows[(step == 0) | (step >= np.spacing(np.abs(rows).max(axis=1)))]


def assert_same_rows(packed, wanted, rows):
    """Equal bytes; if not, shows the first row that differs."""
    wanted = wanted.numpy()
    assert packed.shape == wanted.shape
    differing = np.flatnonzero((packed != wanted).any(axis=1))
    assert differing.size == 0, (len(differing), rows[differing[0]], packed[differing[0]], wanted[differing[0]])


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_TORCH_DIMS)
def test_asym_packs_the_bytes_of_pytorch(isa, rng, bits, embedding_dim):
    rows = random_rows(rng, embedding_dim)
    packed = embpack.quantize(rows, "asym", bits).packed
    assert_same_rows(packed, torch_pack[bits](torch.from_numpy(rows)), rows)


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_FBGEMM_DIMS)
def test_asym_packs_the_bytes_of_fbgemm_with_float16_parameters(isa, rng, bits, embedding_dim):
    rows = random_rows(rng, embedding_dim)
    packed = embpack.quantize(rows, "asym", bits, "float16").packed
    op = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf
    assert_same_rows(packed, op(torch.from_numpy(rows), bits), rows)


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_FBGEMM_DIMS)
def test_asym_packs_the_bytes_of_fbgemm_from_float16(isa, rng, bits, embedding_dim):
    halves = random_rows(rng, embedding_dim).astype(np.float16) + np.float16(0)  # -0 becomes 0
    packed = embpack.quantize(halves, "asym", bits, "float16").packed
    wanted = torch.ops.fbgemm.HalfToFusedNBitRowwiseQuantizedSBHalf(torch.from_numpy(halves), bits)
    assert_same_rows(packed, wanted, halves)


@pytest.mark.parametrize("embedding_dim", TORCH_DIMS[8])
def test_asym_packs_the_bytes_of_fbgemm_at_8_bits(isa, rng, embedding_dim):
    rows = random_rows(rng, embedding_dim, scales=(1e-30, 1e-8, 1e-3, 1, 1e3, 1e8, 1e30))
    packed = embpack.quantize(rows, "asym", 8).packed
    assert_same_rows(packed, torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(torch.from_numpy(rows)), rows)


@pytest.mark.parametrize(
    ("bits", "embedding_dim"),
    [*((2, d) for d in TORCH_DIMS[2]), *((4, d) for d in [*TORCH_DIMS[4], 256, 1024, 2048])],
)
def test_greedy_paper_packs_the_bytes_of_pytorchs_optimized_prepack(isa, rng, bits, embedding_dim):
    rows_each = 20 if embedding_dim < 256 else 3
    rows = searchable(random_rows(rng, embedding_dim, rows_each=rows_each))
    rows = np.concatenate([rows, rng.standard_t(3, (rows_each, embedding_dim)).astype(np.float32)])
    packed = embpack.quantize(rows, "greedy-paper", bits).packed
    assert_same_rows(packed, torch_pack[bits](torch.from_numpy(rows), True), rows)


@pytest.mark.parametrize(("b", "r"), [(20, 0.16), (200, 0.5), (100, 0.9), (1000, 0.05)])
def test_greedy_paper_takes_pytorchs_bins_and_ratio(isa, rng, b, r):
    rows = searchable(random_rows(rng, 64, rows_each=5), b)
    packed = embpack.quantize(rows, f"greedy-paper:b={b},r={r}").packed
    assert_same_rows(packed, torch_pack[4](torch.from_numpy(rows), True, b, r), rows)


def mirrored(rng, shape):
    half = rng.standard_normal((shape[0], shape[1] // 2))
    return np.concatenate([half, -half[:, ::-1]], axis=1)


# Rows whose losses are close to each other or whose values are close to the middle of two levels: where a search that
# computed a loss a little differently would take another path.
CLOSE_CALLS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "mirrored": mirrored,
    "few values": lambda rng, shape: rng.choice([-1.5, -1, -0.25, 0.125, 1, 2], shape),
    "integers": lambda rng, shape: rng.integers(-20, 21, shape),
    "half steps": lambda rng, shape: np.clip(rng.integers(-1, 31, shape) / 2, 0, 15),
    "bfloat16": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape)).bfloat16().double().numpy(),
    "of 8 bits": lambda rng, shape: np.rint(rng.standard_normal(shape) * 40) * 0.01,
    "nearly constant": lambda rng, shape: 0.5 + 1e-4 * rng.standard_normal(shape),
    "wide": lambda rng, shape: (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))).clip(-6e4, 6e4),
    "off centre": lambda rng, shape: 40 + rng.standard_normal(shape),
    "one side": lambda rng, shape: np.abs(rng.standard_normal(shape)),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("embedding_dim", [8, 16, 64, 132, 512])
@pytest.mark.parametrize("kind", CLOSE_CALLS)
def test_greedy_paper_takes_pytorchs_path_at_close_calls(isa, rng, kind, embedding_dim, bits):
    rows = CLOSE_CALLS[kind](rng, (32_000 // embedding_dim, embedding_dim)).astype(np.float32)
    rows = searchable(rows)
    packed = embpack.quantize(rows, "greedy-paper", bits).packed
    assert_same_rows(packed, torch_pack[bits](torch.from_numpy(rows), True), rows)


DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "small": lambda rng, shape: 1e-3 * rng.standard_normal(shape),
    "large": lambda rng, shape: 1e3 * rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-0.05, 0.05, shape),
    "student t": lambda rng, shape: rng.standard_t(2, shape).clip(-1e4, 1e4),
    "exponential": lambda rng, shape: rng.exponential(1, shape),
    "off centre": lambda rng, shape: 3 + 0.1 * rng.standard_normal(shape),
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.uniform(size=shape) < 0.1),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("embedding_dim", "num_rows"),
    [(4, 500), (8, 500), (16, 400), (32, 300), (64, 300), (128, 150), (256, 100), (512, 40), (1024, 20), (2048, 10)],
)
def test_no_row_loses_more_by_greedy_than_by_pytorch(rng, embedding_dim, num_rows, distribution, bits):
    rows = DISTRIBUTIONS[distribution](rng, (num_rows, embedding_dim)).astype(np.float32)
    pytorchs = embpack.PackedTable.from_packed(torch_pack[bits](torch.from_numpy(rows), True), embedding_dim, bits)
    loss, pytorchs_loss = (
        np.linalg.norm(rows.astype(np.float64) - table.dequantize(), axis=1)
        for table in (embpack.quantize(rows, "greedy", bits), pytorchs)
    )
    # Both losses are exact but for float64, and GREEDY leaves PyTorch's range only for one that is surely better.
    assert np.all(loss <= pytorchs_loss * (1 + 1e-12))


def make_bags(rng, num_rows):
    """Bags of many sizes, empty ones among them; int64 indices and where each bag starts."""
    lengths = np.concatenate([[0, 1, 2, 3, 5, 17, 200, 0], rng.integers(0, 40, 30), [0]])
    return rng.integers(0, num_rows, lengths.sum()), np.concatenate([[0], np.cumsum(lengths[:-1])])


def pooling_bound(table, indices, offsets, weights=None):
    """How far PyTorch's pooled sums may be from ours, float64 [bags, embedding_dim].

    Let u be the unit roundoff, n the rows of a bag and M the sum of the magnitudes |w| (|scale| code + |bias|),
    which bounds every partial sum. Ours rounds each level, at most u M altogether, and each of n additions, at
    most u M each: (n + 1) u M. PyTorch's acc = fma(w * scale, code, acc + w * bias) rounds both products, at most
    u M altogether, and adds twice a row: (2 n + 1) u M. Together (3 n + 2) u M; one u M more covers the terms in
    u^2, as n u is far below 1. Roundings to subnormals are off by half the smallest one each instead, a product's
    up to 255 times, the largest code. The magnitudes are read off rounded levels, which 1e-6 makes up for.
    """
    fmt = table.row_format
    params = np.ascontiguousarray(table.packed[:, fmt.code_bytes :]).view("<f2" if fmt.has_f16_params else "<f4")
    bias = params[:, 1:].astype(np.float64)
    dequantized = table.dequantize().astype(np.float64)
    magnitudes = np.abs(dequantized - bias) + np.abs(bias)
    weight = np.ones(len(indices)) if weights is None else np.abs(weights.astype(np.float64))
    terms = weight[:, None] * magnitudes[indices]
    sizes = np.diff(np.append(offsets, len(indices)))
    sums = np.stack([terms[start : start + size].sum(axis=0) for start, size in zip(offsets, sizes, strict=True)])
    roundings = (3 * sizes + 3)[:, None]
    return roundings * (UNIT_ROUNDOFF * sums * (1 + 1e-6) + 256 * SMALLEST)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("bits", "embedding_dim"), [(2, 4), (2, 64), (4, 2), (4, 64), (4, 130), (8, 1), (8, 64)])
def test_pytorch_pools_our_rows_as_we_do(isa, rng, bits, embedding_dim, weighted):
    table = embpack.quantize(random_rows(rng, embedding_dim), "greedy", bits)
    indices, offsets = make_bags(rng, table.num_embeddings)
    weights = rng.standard_normal(len(indices), np.float32) if weighted else None
    ours = table.embedding_bag(indices, offsets, "sum", weights)
    pytorchs = torch_pool[bits](
        torch.from_numpy(table.packed),
        torch.from_numpy(indices),
        torch.from_numpy(offsets),
        per_sample_weights=None if weights is None else torch.from_numpy(weights),
    ).numpy()
    assert np.all(np.abs(ours.astype(np.float64) - pytorchs) <= pooling_bound(table, indices, offsets, weights))


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_TORCH_DIMS)
def test_pytorch_reads_our_rows_exactly(isa, rng, bits, embedding_dim):
    """A bag of one row rounds nothing: 0 + bias is bias, and fma(scale, code, bias) is the level."""
    table = embpack.quantize(random_rows(rng, embedding_dim), "greedy", bits)
    indices = torch.arange(table.num_embeddings)
    pytorchs = torch_pool[bits](torch.from_numpy(table.packed), indices, indices)
    np.testing.assert_array_equal(table.dequantize(), pytorchs.numpy())


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_TORCH_DIMS)
def test_we_read_pytorchs_rows_exactly(isa, rng, bits, embedding_dim):
    packed = torch_pack[bits](torch.from_numpy(random_rows(rng, embedding_dim)))
    table = embpack.PackedTable.from_packed(packed, embedding_dim, bits)
    assert table.packed.ctypes.data == packed.data_ptr()  # adopted, not copied
    indices = torch.arange(len(packed))
    np.testing.assert_array_equal(table.dequantize(), torch_pool[bits](packed, indices, indices).numpy())


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_FBGEMM_DIMS)
def test_fbgemm_dequantizes_our_rows_exactly(isa, rng, bits, embedding_dim):
    """With float16 parameters scale * code is exact, so a product and a sum round as one fma does."""
    table = embpack.quantize(random_rows(rng, embedding_dim), "greedy", bits, "float16")
    fbgemms = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(torch.from_numpy(table.packed), bits)
    np.testing.assert_array_equal(table.dequantize(), fbgemms.numpy())


@pytest.mark.parametrize("embedding_dim", [1, 7, 16, 65])
def test_fbgemm_dequantizes_our_8_bit_rows(isa, rng, embedding_dim):
    table = embpack.quantize(random_rows(rng, embedding_dim), "asym", 8)
    fbgemms = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(torch.from_numpy(table.packed)).numpy()
    scale = np.ascontiguousarray(table.packed[:, embedding_dim:]).view("<f4")[:, :1].astype(np.float64)
    # Rounding scale * code costs u of it, which is a level less its bias; each of the two sums then u of a level.
    levels = np.abs(table.dequantize().astype(np.float64))
    bound = UNIT_ROUNDOFF * (1 + 1e-6) * (np.abs(scale) * 255 + 2 * levels) + SMALLEST
    assert np.all(np.abs(table.dequantize().astype(np.float64) - fbgemms) <= bound)


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("offset_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_pytorch_and_we_take_the_same_indices_and_offsets(rng, index_dtype, offset_dtype, include_last_offset):
    table = embpack.quantize(rng.standard_normal((60, 16), np.float32))
    indices, offsets = make_bags(rng, 60)
    if include_last_offset:
        offsets = np.append(offsets, len(indices))
    indices, offsets = indices.astype(index_dtype), offsets.astype(offset_dtype)
    ours = table.embedding_bag(indices, offsets, "sum", include_last_offset=include_last_offset)
    pytorchs = torch_pool[4](
        torch.from_numpy(table.packed),
        torch.from_numpy(indices),
        torch.from_numpy(offsets),
        include_last_offset=include_last_offset,
    ).numpy()
    starts = offsets[:-1] if include_last_offset else offsets
    assert np.all(np.abs(ours.astype(np.float64) - pytorchs) <= pooling_bound(table, indices, starts))


def float_embedding_bag(table, indices, offsets, mode, weights=None, **options):
    """torch.nn.functional.embedding_bag on the dequantized table."""
    return torch.nn.functional.embedding_bag(
        torch.from_numpy(np.asarray(indices)),
        torch.from_numpy(table.dequantize()),
        None if offsets is None else torch.from_numpy(np.asarray(offsets)),
        mode=mode,
        per_sample_weights=None if weights is None else torch.from_numpy(weights),
        **options,
    ).numpy()


def float_pooling_bound(table, indices, offsets, mode, weights=None):
    """How far F.embedding_bag may be from ours: both pool the same float32 levels.

    A sum of n products in any order rounds each product and each addition at most once, 2 n u M for each side,
    with M the sum of magnitudes. A mean divides by n and rounds up to twice more (PyTorch may multiply with
    1 / n): 2 u M / n. A maximum rounds nothing.
    """
    magnitudes = np.abs(table.dequantize().astype(np.float64))[indices]
    if weights is not None:
        magnitudes *= np.abs(weights.astype(np.float64))[:, None]
    sizes = np.diff(np.append(offsets, len(indices)))
    sums = np.stack([magnitudes[start : start + n].sum(axis=0) for start, n in zip(offsets, sizes, strict=True)])
    roundings = {"sum": 4 * sizes, "mean": 4 + 4 * sizes, "max": 0 * sizes}[mode][:, None]
    return roundings * UNIT_ROUNDOFF * sums / (np.maximum(sizes, 1)[:, None] if mode == "mean" else 1)


BAG_MODES = ["sum", "weighted", "mean", "max"]


@pytest.mark.parametrize("padding", [None, 7, -3, "everything"])
@pytest.mark.parametrize("mode", BAG_MODES)
@pytest.mark.parametrize(("bits", "embedding_dim"), [(2, 9), (4, 32), (8, 65)])
def test_embedding_bag_is_that_of_pytorch(isa, rng, bits, embedding_dim, mode, padding):
    table = embpack.quantize(rng.standard_normal((12, embedding_dim), np.float32), "asym", bits)
    indices, offsets = make_bags(rng, 12)
    padding_idx = padding
    if padding == "everything":
        padding_idx, indices = 4, np.full_like(indices, 4)
    weights = rng.standard_normal(len(indices), np.float32) if mode == "weighted" else None
    mode = "sum" if mode == "weighted" else mode
    ours = table.embedding_bag(indices, offsets, mode, weights, padding_idx=padding_idx)
    pytorchs = float_embedding_bag(table, indices, offsets, mode, weights, padding_idx=padding_idx)
    # With padding a bag has fewer rows than the bound counts, and a mean divides by fewer: by one at least.
    bound = float_pooling_bound(table, indices, offsets, "sum" if padding and mode == "mean" else mode, weights)
    bound += 2 * UNIT_ROUNDOFF * np.abs(ours) if padding and mode == "mean" else 0
    assert np.all(np.abs(ours.astype(np.float64) - pytorchs) <= bound)


@pytest.mark.parametrize("mode", BAG_MODES)
def test_2d_indices_are_pytorchs(rng, mode):
    table = embpack.quantize(rng.standard_normal((12, 20), np.float32))
    indices = rng.integers(0, 12, (9, 6))
    weights = rng.standard_normal((9, 6), np.float32) if mode == "weighted" else None
    mode = "sum" if mode == "weighted" else mode
    ours = table.embedding_bag(indices, mode=mode, per_sample_weights=weights)
    pytorchs = float_embedding_bag(table, indices, None, mode, weights)
    flat_weights = None if weights is None else weights.reshape(-1)
    bound = float_pooling_bound(table, indices.reshape(-1), np.arange(0, 54, 6), mode, flat_weights)
    assert np.all(np.abs(ours.astype(np.float64) - pytorchs) <= bound)


@pytest.mark.parametrize("offset_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_include_last_offset_is_pytorchs(rng, index_dtype, offset_dtype):
    table = embpack.quantize(rng.standard_normal((12, 20), np.float32))
    indices = rng.integers(0, 12, 30).astype(index_dtype)
    offsets = np.array([0, 0, 4, 20, 30], offset_dtype)
    ours = table.embedding_bag(indices, offsets, "sum", include_last_offset=True)
    pytorchs = float_embedding_bag(table, indices, offsets, "sum", include_last_offset=True)
    bound = float_pooling_bound(table, indices, offsets[:-1], "sum")
    assert np.all(np.abs(ours.astype(np.float64) - pytorchs) <= bound)


def test_indices_after_the_last_offset_have_no_one_meaning_to_pytorch():
    """So we refuse them, as its 4-bit operator does."""
    table = embpack.quantize(np.float32([[0, 15], [15, 0], [15, 0], [0, 15]]), "asym")
    indices, offsets = np.array([0, 1, 2, 3]), np.array([0, 3])
    floats = {
        mode: float_embedding_bag(table, indices, offsets, mode, include_last_offset=True)
        for mode in ("sum", "mean", "max")
    }
    np.testing.assert_array_equal(floats["sum"], [[30, 15]])
    np.testing.assert_array_equal(floats["mean"], [[7.5, 3.75]])  # of four rows, though it adds three
    np.testing.assert_array_equal(floats["max"], [[15, 15]])
    padded = float_embedding_bag(table, indices, offsets, "sum", include_last_offset=True, padding_idx=0)
    np.testing.assert_array_equal(padded, [[30, 15]])  # the last row too
    packed, *tensors = map(torch.from_numpy, (table.packed, indices, offsets))
    with pytest.raises(RuntimeError, match="the last offset value should be the size of the indices tensor"):
        torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(packed, *tensors, include_last_offset=True)
    with pytest.raises(ValueError, match=r"offsets\[1\], where the last bag ends, is 3, but there are 4 indices"):
        table.embedding_bag(indices, offsets, include_last_offset=True)


def test_the_default_mode_is_pytorchs(rng):
    table = embpack.quantize(rng.standard_normal((12, 20), np.float32))
    indices = np.array([[1, 2, 3]])
    wanted = torch.nn.functional.embedding_bag(torch.from_numpy(indices), torch.from_numpy(table.dequantize())).numpy()
    bound = float_pooling_bound(table, indices[0], np.array([0]), "mean")
    assert np.all(np.abs(table.embedding_bag(indices).astype(np.float64) - wanted) <= bound)


def test_the_hard_rows_fit_float16():
    """Or the peers would be compared on rows that nobody can pack."""
    table = hard_table(64)
    assert len(table) == len(KINDS)
    assert np.abs(table).max() < 65504

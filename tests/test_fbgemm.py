"""FBGEMM's table-batched embeddings made of our tables and read back, with FBGEMM itself running."""

import copy
import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hard_rows import hard_table

import embpack
from embpack.layouts.codes import unpack_codes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what FBGEMM says while it is imported is not ours
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    from embpack import fbgemm

from test_peers import UNIT_ROUNDOFF, pooling_bound, random_rows, torch_pool  # after FBGEMM: it is skipped without

FBGEMM_PACK = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf
FBGEMM_UNPACK = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat
FBGEMM_UNPACK_8 = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat
BITS = (2, 4, 8)
# What a table-batched embedding can have: whole bytes of codes.
BITS_AND_DIMS = [(2, 4), (2, 12), (2, 64), (2, 260), (4, 2), (4, 6), (4, 16), (4, 64), (4, 130), (4, 512)]
BITS_AND_DIMS += [(8, 1), (8, 7), (8, 64), (8, 129)]


def pack(rows, bits, method="greedy"):
    return embpack.quantize(rows, method, bits, "float16")


def random_bags(rng, sizes, bags=40):
    """Indices feature after feature and where the bags start and end; sizes are the rows of each feature's table."""
    lengths = rng.integers(0, 30, (len(sizes), bags))
    lengths[:, :3] = [0, 1, 200]
    indices = np.concatenate([rng.integers(0, size, n.sum()) for size, n in zip(sizes, lengths, strict=True)])
    return indices, np.concatenate([[0], np.cumsum(lengths)])


def run(module, indices, offsets, weights=None):
    tensors = [torch.from_numpy(np.array(array)) for array in (indices, offsets)]
    return module(*tensors, None if weights is None else torch.from_numpy(weights))


def fbgemm_sums(table, indices, offsets):
    """FBGEMM's sums by NumPy: fma(scale, code, sum + bias) row by row.

    scale * code has at most 11 + 8 significant bits, so float32 holds it and its fma is a sum. (Of subnormal scales
    too: they are multiples of 2^-24.)
    """
    code_bytes = table.row_format.code_bytes
    codes = unpack_codes(table.packed[:, :code_bytes], table.embedding_dim, table.bits).astype(np.float32)
    params = np.ascontiguousarray(table.packed[:, code_bytes:]).view(np.float16).astype(np.float32)
    scale, bias = params[:, :1], params[:, 1:]
    sums = np.zeros((len(offsets) - 1, table.embedding_dim), np.float32)
    for bag, (start, end) in enumerate(itertools.pairwise(offsets)):
        for index in indices[start:end]:
            sums[bag] = scale[index] * codes[index] + (sums[bag] + bias[index])
    return sums


# Fused rows: the uniform layout as it is.


@pytest.mark.parametrize(
    ("bits", "param_dtype", "pack_rows", "unpack_rows"),
    [
        *(
            (bits, "float16", lambda w, b=bits: FBGEMM_PACK(w, b), lambda f, b=bits: FBGEMM_UNPACK(f, b))
            for bits in BITS
        ),
        (8, "float32", torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized, FBGEMM_UNPACK_8),
    ],
)
def test_fused_rows_share_memory_both_ways(rng, bits, param_dtype, pack_rows, unpack_rows):
    fused = pack_rows(torch.from_numpy(rng.integers(-9, 9, (20, 16)).astype(np.float32)))
    table = embpack.PackedTable.from_packed(fused, 16, bits, param_dtype)
    before = table.dequantize()
    fused[3] = fused[4]  # FBGEMM's side writes, ours sees it
    np.testing.assert_array_equal(table[3], before[4])
    back = torch.from_numpy(table.packed)
    assert back.data_ptr() == fused.data_ptr()
    table.packed[5] = table.packed[6]
    restored = unpack_rows(fused).numpy()
    np.testing.assert_array_equal(restored[5], restored[6])
    # Float32 parameters: FBGEMM rounds scale * code too, at most 17, and each side its value, at most 9.
    atol = 0 if param_dtype == "float16" else (17 + 2 * 9) * UNIT_ROUNDOFF
    np.testing.assert_allclose(restored, table.dequantize(), rtol=0, atol=atol)


# to_tbe


@pytest.mark.parametrize("row_alignment", [1, 4, 16])
@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_DIMS)
def test_round_trip_is_byte_for_byte(rng, bits, embedding_dim, row_alignment):
    table = pack(random_rows(rng, embedding_dim, rows_each=3), bits)
    module = fbgemm.to_tbe([table], row_alignment=row_alignment)
    (rows, _), *_ = module.split_embedding_weights(split_scale_shifts=False)
    assert rows.shape[1] == -(-table.row_bytes // row_alignment) * row_alignment
    (back,) = fbgemm.from_tbe(module)
    np.testing.assert_array_equal(back.packed, table.packed)
    assert back.row_format == table.row_format
    assert not np.shares_memory(back.packed, table.packed)


def test_rows_lie_as_fbgemm_has_them():
    """Its example: 0 .. 15 are codes 10 32 .. fe, scale 1 and bias 0, which stand in front."""
    table = embpack.quantize(np.arange(16, dtype=np.float32)[None], "asym")
    module = fbgemm.to_tbe([table], row_alignment=16)
    assert module.weights_host[:16].numpy().tobytes().hex() == "003c00001032547698badcfe00000000"


@pytest.mark.parametrize(("bits", "embedding_dim"), BITS_AND_DIMS)
def test_fbgemm_reads_each_row_exactly(rng, bits, embedding_dim):
    """Constant rows, negative and subnormal scales among them: a bag of one row rounds nothing."""
    table = pack(np.concatenate([hard_table(embedding_dim, bits), random_rows(rng, embedding_dim)]), bits)
    params = np.ascontiguousarray(table.packed[:, table.row_format.code_bytes :]).view(np.float16)
    scales = params[:, 0].astype(np.float32)
    assert (scales < 0).any() and ((scales != 0) & (np.abs(scales) < 2.0**-14)).any()
    every = np.arange(table.num_embeddings)
    pooled = run(fbgemm.to_tbe([table]), every, np.arange(table.num_embeddings + 1))
    np.testing.assert_array_equal(pooled.numpy(), table.dequantize())


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("bits", "embedding_dim"), [(2, 4), (2, 64), (4, 2), (4, 64), (4, 130), (4, 512)])
def test_sums_are_bit_for_bit_those_of_pytorchs_operator(rng, bits, embedding_dim, weighted, index_dtype):
    table = pack(random_rows(rng, embedding_dim, rows_each=5), bits)
    indices, offsets = (array.astype(index_dtype) for array in random_bags(rng, [len(table)]))
    weights = rng.standard_normal(len(indices), np.float32) if weighted else None
    pytorchs = torch_pool[bits](
        torch.from_numpy(table.packed),
        torch.from_numpy(indices),
        torch.from_numpy(offsets),
        per_sample_weights=None if weights is None else torch.from_numpy(weights),
        include_last_offset=True,
    )
    pooled = run(fbgemm.to_tbe([table]), indices, offsets, weights)
    np.testing.assert_array_equal(pooled.numpy(), pytorchs.numpy())


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize(("bits", "embedding_dim"), [(2, 8), (4, 64), (8, 7), (8, 64)])
def test_sums_and_means_are_those_of_the_arithmetic(rng, bits, embedding_dim, mode):
    rows = rng.standard_normal((50, embedding_dim), np.float32)
    table = pack(np.concatenate([rows, hard_table(embedding_dim, bits)[:10]]), bits, "asym")
    indices, offsets = random_bags(rng, [50])
    wanted = fbgemm_sums(table, indices, offsets)
    if mode == "mean":
        wanted *= (np.float32(1) / np.maximum(np.diff(offsets), 1).astype(np.float32))[:, None]
    np.testing.assert_array_equal(run(fbgemm.to_tbe([table], mode), indices, offsets).numpy(), wanted)


@pytest.mark.parametrize("mode", ["sum", "weighted", "mean"])
def test_features_of_mixed_bits_pool_as_a_table_group_does(rng, mode):
    tables = [pack(random_rows(rng, d, rows_each=4), bits) for bits, d in [(4, 64), (2, 8), (8, 5), (4, 6)]]
    table_of = [1, 0, 3, 2, 0]
    pooling = "mean" if mode == "mean" else "sum"
    module = fbgemm.to_tbe(tables, pooling, table_of)
    group = embpack.TableGroup(tables, table_of, pooling)
    indices, offsets = random_bags(rng, [len(tables[table]) for table in table_of])
    weights = rng.standard_normal(len(indices), np.float32) if mode == "weighted" else None
    ours = group.embedding_bag(indices, offsets, per_sample_weights=weights).astype(np.float64)
    theirs = run(module, indices, offsets, weights).numpy()
    assert theirs.dtype == np.float32
    assert theirs.shape == ours.shape
    assert np.all(np.abs(ours - theirs) <= group_bound(tables, table_of, indices, offsets, pooling, weights))
    for back, table in zip(fbgemm.from_tbe(module), tables, strict=True):
        np.testing.assert_array_equal(back.packed, table.packed)


def group_bound(tables, table_of, indices, offsets, pooling, weights=None):
    """How far FBGEMM's pooled values may be from TableGroup's: pooling_bound of each feature.

    A mean divides both sums by n. Ours rounds the quotient, theirs 1 / n and the product: 3 u of a sum over n, which
    pooling_bound's magnitudes bound; 4 u cover the terms in u^2 too.
    """
    bags = (len(offsets) - 1) // len(table_of)
    bounds = []
    for feature, number in enumerate(table_of):
        starts = offsets[feature * bags : (feature + 1) * bags + 1]
        used = slice(starts[0], starts[-1])
        feature_weights = None if weights is None else weights[used]
        bound = pooling_bound(tables[number], indices[used], starts[:-1] - starts[0], feature_weights)
        if pooling == "mean":
            sizes = np.diff(starts)[:, None]
            # pooling_bound is (3 n + 3) u times the magnitudes: 4 u of them, one more for what is subnormal.
            bound = (bound + bound * 4 / (3 * sizes + 3)) / np.maximum(sizes, 1) + 2.0**-149
        bounds.append(bound)
    return np.concatenate(bounds, axis=1)


@pytest.mark.parametrize("output_dtype", ["float16", "bfloat16"])
def test_output_dtypes(rng, output_dtype):
    table = pack(rng.standard_normal((30, 16), np.float32), 4)
    indices, offsets = random_bags(rng, [30])
    exact = run(fbgemm.to_tbe([table]), indices, offsets)
    rounded = run(fbgemm.to_tbe([table], output_dtype=output_dtype), indices, offsets)
    assert rounded.dtype == getattr(torch, output_dtype)
    if output_dtype == "float16":
        assert torch.equal(rounded, exact.half())
    else:
        assert torch.all((rounded.float() - exact).abs() <= exact.abs() * 2.0**-8)


def test_float16_values_of_fbgemm_are_infinite_where_ours_are_its_largest():
    """The highest level lies at 65536."""
    table = embpack.quantize(np.float32([[-65504, 65504, 0, 100]]), "asym")
    indices, offsets = np.array([0]), np.array([0, 1])
    assert run(fbgemm.to_tbe([table], output_dtype="float16"), indices, offsets)[0, 1] == torch.inf
    assert embpack.TableGroup([table]).embedding_bag(indices, offsets, dtype="float16")[0, 1] == 65504


def test_mapped_tables_are_taken_without_a_warning(tmp_path, rng):
    table = pack(rng.standard_normal((30, 16), np.float32), 4)
    embpack.save(tmp_path / "tables.safetensors", {"t": table})
    (back,) = fbgemm.from_tbe(fbgemm.to_tbe([embpack.load(tmp_path / "tables.safetensors")["t"]]))
    np.testing.assert_array_equal(back.packed, table.packed)


def test_a_table_without_rows(rng):
    table = pack(rng.standard_normal((30, 16), np.float32), 4)
    none = embpack.PackedTable(table.packed[:0], table.row_format)
    module = fbgemm.to_tbe([none, table])
    pooled = run(module, np.array([7]), np.array([0, 0, 1])).numpy()
    np.testing.assert_array_equal(pooled[0], np.concatenate([np.zeros(16), table[7]]))
    assert [len(back) for back in fbgemm.from_tbe(module)] == [0, 30]


def test_a_bad_index_is_an_error_and_left_as_it_is(rng):
    module = fbgemm.to_tbe([pack(rng.standard_normal((30, 16), np.float32), 4)])
    indices = torch.tensor([3, 30])
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        module(indices, torch.tensor([0, 2]))
    assert indices.tolist() == [3, 30]


def test_fbgemms_own_bounds_check_rewrites_the_callers_indices(rng):
    """What the docstring warns of."""
    table = pack(rng.standard_normal((30, 16), np.float32), 4)
    module = fbgemm.to_tbe([table], bounds_check_mode=BoundsCheckMode.IGNORE)
    indices = torch.tensor([30])
    np.testing.assert_array_equal(module(indices, torch.tensor([0, 1])).numpy()[0], table[0])
    assert indices.tolist() == [0]


def refused(rng, **options):
    options = {"method": "greedy", "bits": 4, "param_dtype": "float16", "dim": 16} | options
    dim = options.pop("dim")
    return embpack.quantize(rng.standard_normal((20, dim), np.float32), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kmeans"}, r"tables\[1\] has rows of the codebook layout.*'greedy' or 'asym'"),
        ({"method": "kmeans-cls"}, r"tables\[1\] has rows of the clustered layout.*'greedy' or 'asym'"),
        ({"bits": 8, "param_dtype": None}, r"tables\[1\] has float32 parameters.*param_dtype='float16'"),
        ({"param_dtype": "float32"}, r"tables\[1\] has float32 parameters.*param_dtype='float16'"),
        ({"dim": 15}, r"tables\[1\] has embedding_dim 15, but FBGEMM takes multiples of 2 at 4 bits; append columns"),
        ({"dim": 6, "bits": 2}, r"tables\[1\] has embedding_dim 6, .* multiples of 4 at 2 bits"),
    ],
)
def test_tables_that_fbgemm_cannot_hold_are_refused(rng, options, message):
    with pytest.raises(ValueError, match=message):
        fbgemm.to_tbe([refused(rng), refused(rng, **options)])


def test_what_is_no_packed_table_is_refused(rng):
    with pytest.raises(TypeError, match=r"tables\[1\] is ndarray, not PackedTable; pack it first"):
        fbgemm.to_tbe([refused(rng), np.zeros((20, 16), np.float32)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'; choose one of sum, mean"),
        ({"output_dtype": "int8"}, "output_dtype is 'int8'; choose one of float32, float16, bfloat16"),
        ({"row_alignment": 0}, "row_alignment is 0; it must be at least 1"),
        ({"table_of": [0, 2, 1]}, r"table_of\[1\] is 2, but there are 2 tables \(valid: 0 to 1\)"),
        ({"table_of": [-1, 0, 1]}, r"table_of\[0\] is -1, but there are 2 tables"),
        ({"table_of": [0, 0]}, r"no feature reads tables\[1\]"),
        ({"tables": []}, "there are no tables; give at least one"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(rng, arguments, message):
    with pytest.raises(ValueError, match=message):
        fbgemm.to_tbe(**{"tables": [refused(rng), refused(rng)], **arguments})


# from_tbe


def fbgemms_own(weights_type=SparseType.INT4, rows=20, dim=16, **options):
    spec = ("users", rows, dim, weights_type, EmbeddingLocation.HOST)
    return IntNBitTableBatchedEmbeddingBagsCodegen([spec], device="cpu", **options)


@pytest.mark.parametrize("reverse_qparam", [False, True])
@pytest.mark.parametrize(("bits", "weights_type"), [(2, SparseType.INT2), (4, SparseType.INT4), (8, SparseType.INT8)])
def test_tables_that_fbgemm_quantized_are_read(rng, bits, weights_type, reverse_qparam):
    """At any alignment, and with scale and bias at either end of a row."""
    fused = FBGEMM_PACK(torch.from_numpy(rng.standard_normal((20, 16), np.float32)), bits)
    module = fbgemms_own(
        weights_type, weight_lists=[(fused[:, :-4], fused[:, -4:])], row_alignment=16, reverse_qparam=reverse_qparam
    )
    module.weight_initialized = True
    (table,) = fbgemm.from_tbe(module)
    np.testing.assert_array_equal(table.packed, fused.numpy())
    assert (table.bits, table.dtype, table.method, table.loss) == (bits, "float32", "", None)


def test_random_weights_are_read_as_fbgemm_pools_them():
    """Every byte of a row may be anything."""
    torch.manual_seed(2019)
    module = fbgemms_own(output_dtype=SparseType.FP32, pooling_mode=PoolingMode.SUM)
    module.fill_random_weights()
    (table,) = fbgemm.from_tbe(module)
    pooled = module(torch.arange(20), torch.arange(21)).numpy()
    np.testing.assert_array_equal(pooled, table.dequantize())


def test_a_copied_module_is_read(rng):
    table = refused(rng)
    (back,) = fbgemm.from_tbe(copy.deepcopy(fbgemm.to_tbe([table])))
    np.testing.assert_array_equal(back.packed, table.packed)


class Subclass(IntNBitTableBatchedEmbeddingBagsCodegen):
    """As FBGEMM's KVEmbeddingInference is one, with its rows elsewhere."""


def pruned():
    module = fbgemms_own()
    module.initialize_weights()
    module.set_index_remappings_array([torch.arange(20, dtype=torch.int32)])
    return module


def wide_params():
    module = fbgemms_own(scale_bias_size_in_bytes=8)
    module.initialize_weights()
    return module


def of_floats():
    module = fbgemms_own(SparseType.FP16)
    module.initialize_weights()
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.EmbeddingBag(3, 4), TypeError, "module is an EmbeddingBag; from_tbe reads FBGEMM's IntNBit"),
        (
            lambda: Subclass([("", 20, 16, SparseType.INT4, EmbeddingLocation.HOST)], device="cpu"),
            TypeError,
            "module is a Subclass",
        ),
        (fbgemms_own, ValueError, "module has no weights yet; call its initialize_weights"),
        (of_floats, ValueError, r"table 0 \('users'\) is fp16, not packed; pack its weights with embpack.quantize"),
        (wide_params, ValueError, "module keeps 8 bytes of scale and bias a row, not the 4"),
        (pruned, ValueError, "module has pruned rows"),
    ],
)
def test_modules_that_cannot_be_read_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        fbgemm.from_tbe(make())


# The package


@pytest.mark.parametrize("package", ["torch", "fbgemm_gpu"])
def test_a_missing_package_names_the_extra(package):
    """In a process of its own: FBGEMM's operators register once."""
    code = f"import sys; sys.modules[{package!r}] = None\nimport embpack.fbgemm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    error = embpack.MissingExtraError("embpack.fbgemm", "FBGEMM", "fbgemm")
    assert done.stderr.splitlines()[-1] == f"embpack.errors.MissingExtraError: {error}"


def test_the_bound_is_not_vacuous(rng):
    """One code more or less moves a sum by a scale, a thousand times what the bound allows."""
    table = refused(rng)
    scales = np.ascontiguousarray(table.packed[:3, -4:-2]).view(np.float16)
    bound = group_bound([table], [0], np.array([0, 1, 2]), np.array([0, 3]), "sum")
    assert np.all(bound < scales.min() / 1000)

import importlib
import os

import numpy as np
import pytest
from hard_rows import hard_rows

import embpack
from embpack.errors import MissingExtraError
from embpack.layouts import PARAM_BYTES, RowFormat
from embpack.layouts.codes import pack_codes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from embpack.onnx import OPSET, build_bags, build_gather, export, files, graph  # noqa: E402

METHODS = {"uniform": "greedy", "codebook": "kmeans", "clustered": "kmeans-cls"}
DIMS = (1, 5, 16, 33, 64)
OFFSETS = np.array([0, 0, 3, 20, 20, 70, 77, 77])
NUM_INDICES = 77
EMPTY_BAGS = [0, 3, 6, 7]
# Nodes and names of the largest model; the rest of a file is the table.
MODEL_BYTES = 7500

every_format = pytest.mark.parametrize(
    ("layout", "bits", "param_dtype"),
    [(layout, bits, dtype) for layout in METHODS for bits in (2, 4, 8) for dtype in PARAM_BYTES],
)


def hard_table(layout, bits, param_dtype, embedding_dim):
    """Packs rows that are hard to get right, negative zeros and subnormals among them."""
    weight = np.stack(list(hard_rows(embedding_dim, bits, param_dtype).values()))
    weight[np.random.default_rng(1).random(weight.shape) < 0.1] = -0.0
    return embpack.quantize(weight, METHODS[layout], bits=bits, param_dtype=param_dtype)


def make_table(scale, bias, codes, bits, param_dtype):
    """Lays out uniform rows by hand: scale and bias [N], codes [N, d]."""
    params = np.stack([scale, bias], axis=1).astype("<f2" if param_dtype == "float16" else "<f4")
    packed = np.concatenate([pack_codes(codes, bits), params.view(np.uint8)], axis=1)
    return embpack.PackedTable(packed, RowFormat(codes.shape[1], bits, param_dtype))


def open_model(path):
    """Opens a model as most users do, default options and all."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path, **inputs):
    (values,) = open_model(path).run(None, inputs)
    return values


def assert_same_bits(ours, theirs):
    """Zeros differ by their sign; only of NaN any bits will do."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all()


@pytest.mark.parametrize("embedding_dim", DIMS)
@every_format
def test_gather(tmp_path, rng, layout, bits, param_dtype, embedding_dim):
    table = hard_table(layout, bits, param_dtype, embedding_dim)
    path = tmp_path / "table.onnx"
    export(table, path, indices_ndim=3)
    onnx.checker.check_model(path, full_check=True)
    assert table.nbytes < path.stat().st_size < table.nbytes + MODEL_BYTES
    indices = rng.permutation(np.resize(np.arange(len(table)), 72)).reshape(2, 3, 12)
    assert_same_bits(run(path, indices=indices), table[indices])
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.onnx"]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("embedding_dim", DIMS)
@every_format
def test_bags(tmp_path, rng, layout, bits, param_dtype, embedding_dim, mode):
    table = hard_table(layout, bits, param_dtype, embedding_dim)
    path = tmp_path / "table.onnx"
    export(table, path, mode=mode)
    onnx.checker.check_model(path, full_check=True)
    assert path.stat().st_size < table.nbytes + MODEL_BYTES
    indices = rng.integers(0, len(table), NUM_INDICES)
    pooled = run(path, indices=indices, offsets=OFFSETS)
    assert not pooled[EMPTY_BAGS].any()
    if mode == "max":  # of 0 and -0 either is the largest
        np.testing.assert_array_equal(pooled, table.embedding_bag(indices, OFFSETS, mode))
    else:
        assert_same_bits(pooled, table.embedding_bag(indices, OFFSETS, mode))


@pytest.mark.parametrize("embedding_dim", DIMS)
@every_format
def test_weighted_bags(tmp_path, rng, layout, bits, param_dtype, embedding_dim):
    weight = rng.standard_normal((40, embedding_dim), dtype=np.float32)
    table = embpack.quantize(weight, METHODS[layout], bits=bits, param_dtype=param_dtype)
    path = tmp_path / "table.onnx"
    export(table, path, mode="sum", per_sample_weights=True)
    onnx.checker.check_model(path, full_check=True)
    indices = rng.integers(0, len(table), NUM_INDICES)
    weights = rng.standard_normal(NUM_INDICES, dtype=np.float32)
    inputs = {"indices": indices, "offsets": OFFSETS}
    pooled = run(path, **inputs, per_sample_weights=weights)
    products = table[indices].astype(np.float64) * weights[:, None]
    embpack_pooled = table.embedding_bag(**inputs, mode="sum", per_sample_weights=weights)
    for bag, ours, rows in zip(pooled, embpack_pooled, np.split(products, OFFSETS[1:]), strict=True):
        # A product is rounded once, and each of n - 1 additions: at most n roundings of each term (Higham 2002, 3.1).
        bound = 1.01 * len(rows) * 2.0**-24 * np.abs(rows).sum(axis=0)
        assert (np.abs(bag - rows.sum(axis=0)) <= bound).all()
        assert (np.abs(ours - rows.sum(axis=0)) <= bound).all()


def test_long_bags_are_added_in_index_order(tmp_path, rng):
    """By many threads too: they must not share a bag."""
    table = embpack.quantize(rng.standard_normal((1000, 64), dtype=np.float32))
    export(table, tmp_path / "table.onnx", mode="sum")
    indices = rng.integers(0, 1000, 40_000)
    offsets = np.sort(rng.integers(0, 40_000, 30))
    offsets[0] = 0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 8
    session = onnxruntime.InferenceSession(str(tmp_path / "table.onnx"), options, providers=["CPUExecutionProvider"])
    (pooled,) = session.run(None, {"indices": indices, "offsets": offsets})
    assert_same_bits(pooled, table.embedding_bag(indices, offsets, "sum"))


@pytest.mark.parametrize("indices_ndim", [0, 1, 2, 4])
def test_indices_of_any_number_of_dimensions(tmp_path, indices_ndim):
    table = hard_table("uniform", 4, "float16", 5)
    export(table, tmp_path / "table.onnx", indices_ndim=indices_ndim)
    shape = (2, 1, 3, 2)[:indices_ndim]
    indices = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    assert_same_bits(run(tmp_path / "table.onnx", indices=indices), table[indices])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("layout", METHODS)
def test_no_indices(tmp_path, layout, shape):
    table = hard_table(layout, 4, "float16", 5)
    export(table, tmp_path / "table.onnx", indices_ndim=len(shape))
    assert run(tmp_path / "table.onnx", indices=np.zeros(shape, np.int64)).shape == (*shape, 5)


@pytest.mark.parametrize("num_bags", [0, 1, 100])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_without_indices(tmp_path, mode, num_bags):
    table = hard_table("uniform", 4, "float16", 5)
    export(table, tmp_path / "table.onnx", mode=mode)
    pooled = run(tmp_path / "table.onnx", indices=np.zeros(0, np.int64), offsets=np.zeros(num_bags, np.int64))
    assert_same_bits(pooled, np.zeros((num_bags, 5), np.float32))


def test_indices_before_the_first_bag_are_in_none(tmp_path):
    table = hard_table("uniform", 4, "float16", 5)
    export(table, tmp_path / "table.onnx", mode="sum")
    pooled = run(tmp_path / "table.onnx", indices=np.array([3, 4, 5]), offsets=np.array([1, 2]))
    assert_same_bits(pooled, table[[4, 5]])


def test_negative_indices_count_from_the_end(tmp_path):
    table = hard_table("uniform", 4, "float16", 5)
    export(table, tmp_path / "table.onnx")
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.array([-1])), table[[len(table) - 1]])


def test_indices_out_of_range_are_refused(tmp_path):
    table = hard_table("uniform", 4, "float16", 5)
    export(table, tmp_path / "table.onnx")
    session = open_model(tmp_path / "table.onnx")
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.run(None, {"indices": np.array([len(table)])})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_float16_parameter(tmp_path, rng, bits):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    codes = rng.integers(0, 1 << bits, (len(every), 8), dtype=np.uint8)
    codes[:, 0] = 0
    table = make_table(every, rng.permutation(every), codes, bits, "float16")
    export(table, tmp_path / "table.onnx")
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.arange(len(table))), table.dequantize())


def random_float32(rng, n):
    """Any float32, subnormal, infinite and NaN ones too."""
    return rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)


def any_exponent(rng, n):
    return rng.integers(-60, 60, n, dtype=np.int32)


def scattered(rng, n):
    scale, bias = rng.standard_normal((2, n), dtype=np.float32)
    return scale, np.ldexp(bias, any_exponent(rng, n))


def halfway(rng, n):
    """Odd products of 25 bits or more, and a bias too small for float64 to see beside them."""
    scale = np.ldexp((rng.integers(1 << 22, 1 << 24, n) | 1).astype(np.float32), any_exponent(rng, n))
    return scale, scale * (rng.standard_normal(n) * 1e-25).astype(np.float32)


def subnormal(rng, n):
    scale, bias = rng.integers(-(1 << 24), 1 << 24, (2, n)).astype(np.float32) * np.float32(2.0**-149)
    return scale, bias


def nearly_overflowing(rng, n):
    scale = np.ldexp(rng.integers(1 << 15, 1 << 24, n).astype(np.float32), np.int32(103))
    return scale, rng.standard_normal(n, dtype=np.float32)


FLOAT32_PARAMS = {
    "any bits": lambda rng, n: (random_float32(rng, n), random_float32(rng, n)),
    "scattered": scattered,
    "halfway": halfway,
    "subnormal": subnormal,
    "nearly overflowing": nearly_overflowing,
}


@pytest.mark.parametrize("kind", FLOAT32_PARAMS)
def test_float32_parameters_are_rounded_once(tmp_path, rng, kind):
    with np.errstate(invalid="ignore"):
        scale, bias = FLOAT32_PARAMS[kind](rng, 30_000)
    codes = rng.integers(0, 256, (len(scale), 8), dtype=np.uint8)
    table = make_table(scale, bias, codes, 8, "float32")
    export(table, tmp_path / "table.onnx")
    expected = table.dequantize()
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.arange(len(table))), expected)
    with np.errstate(all="ignore"):
        twice = (scale[:, None].astype(np.float64) * codes + bias[:, None].astype(np.float64)).astype(np.float32)
    differs = (twice != expected) & ~np.isnan(expected)
    assert differs.any() == (kind != "subnormal"), "the plain float64 sum would do: the test shows nothing"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_that_are_exact_in_float64_take_fewer_nodes(tmp_path, rng, monkeypatch, bits):
    """Scales and biases as far apart as can be, and one step farther."""
    monkeypatch.setattr(graph, "_CHUNK_ROWS", 1000)
    mantissas = rng.integers(1 << 23, 1 << 24, (2, 3000)).astype(np.float32) * rng.choice([-1, 1], (2, 3000))
    mantissas = mantissas.astype(np.float32)
    codes = rng.integers(0, 1 << bits, (3000, 8), dtype=np.uint8)
    shifts = rng.choice([-28 + bits, 28], 3000).astype(np.int32)
    for farther in (0, 1):
        shifts[-1] += farther
        table = make_table(mantissas[0], np.ldexp(mantissas[1], shifts), codes, bits, "float32")
        export(table, tmp_path / "table.onnx")
        assert_same_bits(run(tmp_path / "table.onnx", indices=np.arange(len(table))), table.dequantize())
        assert has_op(tmp_path / "table.onnx", "Sign") == farther
        shifts[-1] = 28


def has_op(path, name):
    return name in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("method", ["greedy", "asym"])
def test_packed_weights_have_exact_sums(tmp_path, rng, method):
    table = embpack.quantize(rng.standard_normal((1000, 64), dtype=np.float32), method, bits=8)
    export(table, tmp_path / "table.onnx")
    assert not has_op(tmp_path / "table.onnx", "Sign")


def test_rows_of_one_value_or_without_bias_have_exact_sums():
    params = np.array([[0, 1e-30], [1e30, 0], [0, 0], [1, 1]], np.float32)
    assert graph.have_exact_sums(params, 8)
    assert graph.have_exact_sums(params[:0], 8)
    assert not graph.have_exact_sums(np.array([[1e30, 1]], np.float32), 8)


def test_rounding_at_the_largest_float32(tmp_path):
    """31 * 1082401 is 2^25 - 1: half way from the largest float32 to infinity, which the bias stays below."""
    scale, bias = np.array([1082401 * 2.0**103]), np.array([-1e-30])
    table = make_table(scale, bias, np.full((1, 3), 31, np.uint8), 8, "float32")
    export(table, tmp_path / "table.onnx")
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.array([0])), np.full((1, 3), np.finfo(np.float32).max))


def test_more_than_256_clusters(tmp_path, rng):
    codebooks = np.sort(rng.standard_normal((300, 16)), axis=1).astype(np.float16)
    packed = rng.integers(0, 256, (1000, 8), dtype=np.uint8)
    clusters = rng.integers(0, 300, 1000).astype(np.uint16)
    row_format = RowFormat(16, layout="clustered")
    table = embpack.PackedTable(packed, row_format, clusters=clusters, codebooks=codebooks)
    export(table, tmp_path / "table.onnx")
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.arange(1000)), table.dequantize())


def test_a_table_mapped_from_a_file(tmp_path):
    table = hard_table("uniform", 4, "float16", 33)
    embpack.save(tmp_path / "table.safetensors", {"a": table})
    export(embpack.load(tmp_path / "table.safetensors")["a"], tmp_path / "table.onnx")
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.arange(len(table))), table.dequantize())


@every_format
def test_a_large_table_lies_beside_its_model(tmp_path, monkeypatch, layout, bits, param_dtype):
    table = hard_table(layout, bits, param_dtype, 33)
    monkeypatch.setattr(files, "EXTERNAL_BYTES", table.nbytes - 1)
    monkeypatch.setattr(files, "_CHUNK_BYTES", 64)
    export(table, tmp_path / "table.onnx")
    onnx.checker.check_model(tmp_path / "table.onnx", full_check=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["table.onnx", "table.onnx.data"]
    assert (tmp_path / "table.onnx").stat().st_size < MODEL_BYTES
    assert_same_bits(run(tmp_path / "table.onnx", indices=np.arange(len(table))), table.dequantize())


def test_a_table_of_just_the_limit_is_in_the_model(tmp_path, monkeypatch):
    table = hard_table("uniform", 4, "float16", 33)
    monkeypatch.setattr(files, "EXTERNAL_BYTES", table.nbytes)
    export(table, tmp_path / "table.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.onnx"]


@pytest.mark.parametrize("external_bytes", [0, 1 << 30])
def test_a_failure_leaves_the_old_model(tmp_path, monkeypatch, external_bytes):
    def fail(*arguments):
        raise OSError("no more")

    (tmp_path / "table.onnx").write_bytes(b"old")
    monkeypatch.setattr(files, "EXTERNAL_BYTES", external_bytes)
    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", fail)
    with pytest.raises(OSError, match="no more"):
        export(hard_table("uniform", 4, "float16", 33), tmp_path / "table.onnx", force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.onnx"]
    assert (tmp_path / "table.onnx").read_bytes() == b"old"


def test_standard_operators_alone(tmp_path):
    table = hard_table("uniform", 8, "float32", 33)
    export(table, os.fspath(tmp_path / "table.onnx"), mode="mean")
    model = onnx.load(tmp_path / "table.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert model.ir_version == 8
    assert (model.producer_name, model.producer_version) == ("embpack", embpack.__version__)
    assert model.graph.doc_string == repr(table)


def test_two_tables_in_a_graph(rng):
    """What an exporter does: parts of a larger graph, with names of their own."""
    tables = [hard_table("uniform", 4, "float16", 33), hard_table("codebook", 2, "float32", 5)]
    parts = [
        build_gather(tables[0], "users", "user_values", prefix="user."),
        build_bags(tables[1], "sum", ("items", "starts", None), "item_values", prefix="item."),
    ]
    helper = onnx.helper
    initializers = {
        name: array for part in parts for name, array in (*part.initializers.items(), *part.constants.items())
    }
    both = helper.make_graph(
        [node for part in parts for node in part.nodes],
        "two tables",
        [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [name]) for name in ("users", "items", "starts")],
        [
            helper.make_tensor_value_info("user_values", onnx.TensorProto.FLOAT, ["users", 33]),
            helper.make_tensor_value_info("item_values", onnx.TensorProto.FLOAT, ["starts", 5]),
        ],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in initializers.items()],
    )
    model = helper.make_model(both, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    users, items, starts = rng.integers(0, 20, 9), rng.integers(0, 20, 12), np.array([0, 5, 5])
    user_values, item_values = session.run(None, {"users": users, "items": items, "starts": starts})
    assert_same_bits(user_values, tables[0][users])
    assert_same_bits(item_values, tables[1].embedding_bag(items, starts, "sum"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "mode is 'median'; choose one of sum, mean, max"),
        ({"mode": "sum", "dtype": "float64"}, "dtype is 'float64'; choose one of float32, float16, bfloat16"),
        ({"mode": "sum", "padding_idx": 99}, "padding_idx is 99, but the table has 23 rows"),
        ({"mode": "max", "inputs": ("a", None, "b")}, "per_sample_weights go with mode 'sum' only, not 'max'"),
    ],
)
def test_bags_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        build_bags(hard_table("uniform", 4, "float16", 5), **options)


def test_rows_of_a_type_that_there_is_not():
    with pytest.raises(ValueError, match="dtype is 'float64'; choose one of float32, float16, bfloat16"):
        build_gather(hard_table("uniform", 4, "float16", 5), dtype="float64")


def test_the_tables_bytes_are_not_copied():
    table = hard_table("uniform", 4, "float16", 33)
    part = build_gather(table)
    assert len(part.initializers) == 2
    assert all(np.shares_memory(array, table.packed) for array in part.initializers.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "median"}, "mode is 'median'; choose one of sum, mean, max, or None for single rows"),
        ({"per_sample_weights": True}, "per_sample_weights go with mode 'sum' only, not None"),
        ({"mode": "mean", "per_sample_weights": True}, "per_sample_weights go with mode 'sum' only, not 'mean'"),
        ({"mode": "sum", "indices_ndim": 2}, "indices_ndim is 2, but with mode 'sum' indices are 1-D, with offsets"),
        ({"indices_ndim": -1}, "indices_ndim is -1; it must be 0 or more"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(hard_table("uniform", 4, "float16", 5), tmp_path / "table.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_is_not_packed(tmp_path):
    with pytest.raises(
        TypeError, match=r"table is ndarray, not PackedTable; pack it first: embpack.quantize\(weight\)"
    ):
        export(np.zeros((3, 4), np.float32), tmp_path / "table.onnx")


def test_weights_for_whether_there_are_some(tmp_path):
    with pytest.raises(TypeError, match="per_sample_weights is ndarray; it is True or False, and the weights them"):
        export(hard_table("uniform", 4, "float16", 5), tmp_path / "a.onnx", mode="sum", per_sample_weights=np.ones(3))


def test_another_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"table.safetensors: the name of an ONNX model ends in .onnx"):
        export(hard_table("uniform", 4, "float16", 5), tmp_path / "table.safetensors")


def test_a_table_without_rows(tmp_path):
    table = embpack.PackedTable(np.zeros((0, 12), np.uint8), RowFormat(16))
    with pytest.raises(ValueError, match=r"table.onnx: the table has no rows; there is nothing to look up"):
        export(table, tmp_path / "table.onnx")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        export(hard_table("uniform", 4, "float16", 5), tmp_path / "none" / "table.onnx")


def test_missing_extra(hide_package):
    modules = [f"embpack.onnx{name}" for name in ("", ".bags", ".files", ".graph", ".models")]
    hide_package("onnx", *modules)
    with pytest.raises(MissingExtraError, match=r"embpack.onnx needs ONNX: pip install '.*onnx.*'"):
        importlib.import_module("embpack.onnx")

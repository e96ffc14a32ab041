import json
import pickle

import numpy as np
import pytest

import embpack
from embpack import _native, reference, rotation
from embpack.cli import app
from embpack.errors import FormatError
from embpack.layouts import RowFormat

DIMS = [*range(1, 131), 384, 1000]
METHODS = ["asym", "optimal:effort=fast", "kmeans-lloyd", "kmeans-cls:K=5"]


@pytest.fixture(params=METHODS)
def table(request, rng):
    weight = rng.laplace(size=(300, 50)).astype(np.float32)
    return embpack.quantize(weight, request.param, rotate="hadamard")


def bag_arguments(rng, num_rows):
    lengths = np.array([0, 1, 20, 3, 0, 700, 2, 0])
    return rng.integers(0, num_rows, lengths.sum()), np.cumsum([0, *lengths[:-1]])


# The transform


def test_hadamard_by_hand():
    rows = np.array([[1, 2, 3, 4, 5, 6, 7]], np.float32)
    # Signs + + + - + + -, then blocks of 4, 2 and 1.
    wanted = [(1 + 2 + 3 - 4) / 2, (1 - 2 + 3 + 4) / 2, (1 + 2 - 3 + 4) / 2, (1 - 2 - 3 - 4) / 2]
    wanted += [(5 + 6) * np.float32(0.5**0.5), (5 - 6) * np.float32(0.5**0.5), -7]
    np.testing.assert_array_equal(reference.rotate(rows), np.array([wanted], np.float32))


def test_blocks_are_the_binary_digits():
    assert reference.rotation_blocks(50) == [slice(0, 32), slice(32, 48), slice(48, 50)]


def test_constant_rows_have_no_outlier():
    for digits in range(1, 11):
        largest = np.abs(reference.rotate(np.ones((1, 1 << digits), np.float32))).max()
        assert largest <= 1.42


@pytest.mark.parametrize("embedding_dim", DIMS)
def test_kernels_are_the_reference_to_the_bit(isa, rng, embedding_dim):
    rows = rng.standard_normal((3, embedding_dim), dtype=np.float32)
    rows[1] *= np.float32(1e-39)  # subnormal
    rotated = rotation.rotate(rows)
    assert rotated.tobytes() == reference.rotate(rows).tobytes()
    back = rotation.rotate_back(rotated)
    assert back.tobytes() == reference.rotate_back(rotated).tobytes()
    # Each value goes through 2 * log2(n) additions and two factors, each of which is off by 2^-24 at most.
    bound = (2 * embedding_dim.bit_length() + 4) * 2.0**-24 * np.linalg.norm(rows, axis=1, keepdims=True) + 1e-44
    assert (np.abs(back - rows) <= bound).all()


@pytest.mark.parametrize("embedding_dim", DIMS)
def test_matrix_is_orthogonal(rng, embedding_dim):
    matrix = rotation.matrix(embedding_dim).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(embedding_dim), atol=1e-6)
    rows = rng.standard_normal((2, embedding_dim), dtype=np.float32)
    np.testing.assert_allclose(rotation.rotate(rows), rows @ matrix, atol=1e-5)
    np.testing.assert_allclose(rotation.rotate_back(rows), rows @ matrix.T, atol=1e-5)


def test_rotate_takes_any_shape_and_type(rng):
    values = rng.standard_normal((2, 3, 20), dtype=np.float32)
    rows = rotation.rotate(values.reshape(6, 20))
    np.testing.assert_array_equal(rotation.rotate(values), rows.reshape(2, 3, 20))
    np.testing.assert_array_equal(rotation.rotate(values[0, 0]), rows[0])
    half = values.astype(np.float16)
    np.testing.assert_array_equal(rotation.rotate(half), rotation.rotate(half.astype(np.float32)))
    np.testing.assert_array_equal(
        rotation.rotate(values.transpose(1, 0, 2)), rotation.rotate(values).transpose(1, 0, 2)
    )
    assert rotation.rotate(np.zeros((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize("values", [np.zeros((3, 0), np.float32), np.float32(1)])
def test_rotate_refuses_values_without_columns(values):
    with pytest.raises(ValueError, match="need columns"):
        rotation.rotate(values)


def test_threads_make_no_difference(rng, restore_threads):
    weight = rng.standard_normal((5000, 40), dtype=np.float32)
    made = []
    for count in (1, 3):
        embpack.set_num_threads(count)
        table = embpack.quantize(weight, "asym", rotate="hadamard")
        made.append((table.packed.tobytes(), table.loss, table.dequantize().tobytes()))
    assert made[0] == made[1]


# Tables


def test_quantize_packs_rotated_rows(rng):
    weight = rng.laplace(size=(100, 50)).astype(np.float32)
    table = embpack.quantize(weight, "greedy", rotate="hadamard")
    plain = embpack.quantize(reference.rotate(weight), "greedy")
    assert table.rotation == "hadamard"
    assert plain.rotation is None
    assert table.packed.tobytes() == plain.packed.tobytes()
    assert table.loss == plain.loss
    assert "rotation='hadamard'" in repr(table)
    # The loss is the same in either basis.
    np.testing.assert_allclose(reference.normalized_l2_loss(weight, table.dequantize()), table.loss, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_of_any_type(rng, dtype):
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(rng.laplace(size=(40, 24)).astype(np.float32)).to(getattr(torch, dtype))
    table = embpack.quantize(weight, "asym", rotate="hadamard")
    wanted = embpack.quantize(rotation.rotate(weight.float().numpy()), "asym")
    assert table.dtype == dtype
    assert table.packed.tobytes() == wanted.packed.tobytes()


def test_gather(isa, table, rng):
    rows = reference.dequantize(table.packed, table.row_format, table.clusters, table.codebooks)
    assert table.dequantize().tobytes() == rows.tobytes()
    indices = rng.integers(0, 300, (40, 7))
    assert table[indices].tobytes() == rows[indices].tobytes()
    assert table[3].tobytes() == rows[3].tobytes()
    assert table.gather(indices, "float16").tobytes() == rows[indices].astype(np.float16).tobytes()
    narrow = (rows[indices].view(np.uint32) + (0x7FFF + (rows[indices].view(np.uint32) >> 16 & 1))) >> 16
    np.testing.assert_array_equal(table.gather(indices, "bfloat16"), narrow)


def test_gather_without_rotating_back(table):
    rows = reference.dequantize(table.packed, table.as_packed.row_format, table.clusters, table.codebooks)
    assert table.gather([5, 6], rotate_back=False).tobytes() == rows[[5, 6]].tobytes()
    np.testing.assert_array_equal(rotation.rotate_back(rows), table.dequantize())
    plain = embpack.quantize(rows, "asym")
    np.testing.assert_array_equal(plain.gather([5], rotate_back=False), plain[[5]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("mode", ["sum", "weighted", "mean", "max"])
def test_bags(isa, table, rng, mode, padding_idx, dtype):
    indices, offsets = bag_arguments(rng, 300)
    indices[2:9] = 7
    weights = rng.standard_normal(len(indices), dtype=np.float32) if mode == "weighted" else None
    bags, of_bags = np.split(indices, offsets[1:]), None if weights is None else np.split(weights, offsets[1:])
    how = "sum" if mode == "weighted" else mode
    if mode == "max":
        wanted = reference.embedding_bag(table.dequantize(), bags, how, None, padding_idx)
    else:
        wanted = reference.rotate_back(
            reference.embedding_bag(table.as_packed.dequantize(), bags, how, of_bags, padding_idx)
        )
    got = table.embedding_bag(indices, offsets, how, weights, padding_idx=padding_idx, dtype=dtype)
    if dtype == "float32":
        assert got.tobytes() == wanted.tobytes()
    elif dtype == "float16":
        np.testing.assert_array_equal(got, wanted.astype(np.float16))
    else:
        bits = wanted.view(np.uint32)
        np.testing.assert_array_equal(got, (bits + (0x7FFF + (bits >> 16 & 1))) >> 16)
    pooled = reference.embedding_bag(table.dequantize(), bags, how, of_bags, padding_idx)
    np.testing.assert_allclose(wanted, pooled, rtol=1e-4, atol=1e-3)
    assert not np.signbit(wanted[0]).any()  # an empty bag


def test_bags_without_rotating_back(table, rng):
    indices, offsets = bag_arguments(rng, 300)
    pooled = table.embedding_bag(indices, offsets, "sum", rotate_back=False)
    np.testing.assert_array_equal(pooled, table.as_packed.embedding_bag(indices, offsets, "sum"))
    layer = rng.standard_normal((50, 9), dtype=np.float32)
    folded = rotation.matrix(50).T @ layer
    wanted = table.embedding_bag(indices, offsets, "sum") @ layer
    np.testing.assert_allclose(pooled @ folded, wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_group_of_rotated_and_other_tables(isa, rng, dtype):
    tables = [
        embpack.quantize(rng.laplace(size=(60, dim)).astype(np.float32), "asym", rotate=rotate)
        for dim, rotate in ((10, None), (24, "hadamard"), (33, "hadamard"))
    ]
    table_of, modes = [0, 1, 2, 1], ["sum", "mean", "sum", "max"]
    bags = rng.integers(0, 60, (4, 6, 5))
    group = embpack.TableGroup(tables, table_of, modes)
    pooled = group.embedding_bag(bags.reshape(-1), lengths=[5] * 24, dtype=dtype)
    parts = [
        tables[table].embedding_bag(own, None, mode, dtype=dtype)
        for table, own, mode in zip(table_of, bags, modes, strict=True)
    ]
    np.testing.assert_array_equal(pooled, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_index_out_of_range_is_named(table, mode):
    with pytest.raises(IndexError, match=r"indices\[401\] is 300"):
        table.embedding_bag([0] * 401 + [300], [0, 5, 400], mode)
    with pytest.raises(IndexError, match=r"indices\[2\] is -1"):
        table.gather([0, 1, -1])


def test_pickle_and_copy(table):
    table.gather([1], rotate_back=False)
    for again in (pickle.loads(pickle.dumps(table)), table.copy()):
        assert again.rotation == "hadamard"
        np.testing.assert_array_equal(again.dequantize(), table.dequantize())
    assert len(pickle.dumps(table)) < 1.5 * table.nbytes + 2000


# What it is for


def test_heavy_tails_lose_less(rng):
    weight = rng.laplace(size=(4000, 64)).astype(np.float32)
    plain, rotated = (embpack.quantize(weight, "greedy", rotate=rotate).loss for rotate in (None, "hadamard"))
    assert rotated < 0.85 * plain


def test_normal_rows_lose_the_same(rng):
    weight = rng.standard_normal((4000, 64), dtype=np.float32)
    plain, rotated = (embpack.quantize(weight, "greedy", rotate=rotate).loss for rotate in (None, "hadamard"))
    assert abs(rotated - plain) < 0.01 * plain


# Errors


def test_unknown_rotation():
    weight = np.ones((20, 4), np.float32)
    with pytest.raises(ValueError, match="rotation is 'fourier'; choose None or one of 'hadamard'"):
        embpack.quantize(weight, rotate="fourier")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["asym", "table", "kmeans-cls:K=2"])
def test_what_is_not_finite_is_named(method, value):
    weight = np.ones((40, 20), np.float32)
    weight[33, 11] = value
    with pytest.raises(ValueError, match=r"weight\[33, 11\] is (nan|inf)"):
        embpack.quantize(weight, method, rotate="hadamard")


def test_rows_that_become_infinite():
    weight = np.ones((20, 64), np.float32)
    weight[9] = 3e38 * reference.rotation_signs(64)
    with pytest.raises(ValueError, match=r"weight\[9\] has values from -3e\+38 to 3e\+38, which become infinite"):
        embpack.quantize(weight, "asym", rotate="hadamard")


def test_error_weights_are_of_rows(rng):
    weight = rng.standard_normal((40, 16), dtype=np.float32)
    with pytest.raises(ValueError, match="error_weights have 16 columns"):
        embpack.quantize(weight, error_weights=np.ones(16), rotate="hadamard")
    of_rows = rng.random((40, 1))
    table = embpack.quantize(weight, error_weights=of_rows, rotate="hadamard")
    errors = np.square(weight - table.dequantize()).sum(axis=1, dtype=np.float64)
    squares = np.square(weight).sum(axis=1, dtype=np.float64)
    loss = np.sqrt((errors @ of_rows[:, 0]) / (squares @ of_rows[:, 0]))
    np.testing.assert_allclose(table.loss, loss, rtol=1e-5)


def test_row_format_as_text():
    row_format = RowFormat(64, rotation="hadamard")
    assert str(row_format) == "uniform:64:4:float16:hadamard"
    assert RowFormat.parse(str(row_format)) == row_format


def test_native_arguments_are_checked():
    with pytest.raises(ValueError, match="columns"):
        _native.rotate(np.zeros((2, 0), np.float32), back=False)
    with pytest.raises(TypeError):
        _native.rotate(np.zeros((2, 4), np.float64), back=False)


# Files


def edit_entries(path, change):
    """Call a function with the tables' entries of a file, and write what it makes of them."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    value = json.loads(header["__metadata__"]["embpack"])
    change(value["tables"])
    header["__metadata__"]["embpack"] = json.dumps(value)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_save_and_load(tmp_path, table):
    path = tmp_path / "tables.safetensors"
    plain = embpack.quantize(np.ones((20, 4), np.float32), "asym")
    embpack.save(path, {"user": table, "item": plain})
    loaded = embpack.load(path, verify=True)
    assert loaded["user"].rotation == "hadamard"
    assert loaded["item"].rotation is None
    np.testing.assert_array_equal(loaded["user"].dequantize(), table.dequantize())

    def look(tables):
        assert tables["user"]["rotation"] == "hadamard"
        assert "rotation" not in tables["item"]  # what older readers can read

    edit_entries(path, look)


@pytest.mark.parametrize(
    ("rotation", "message"), [("fourier", "this embpack knows hadamard; update embpack"), (None, "rotation is None")]
)
def test_file_with_another_rotation_is_refused(tmp_path, table, rotation, message):
    path = tmp_path / "tables.safetensors"
    embpack.save(path, {"user": table})
    edit_entries(path, lambda tables: tables["user"].update(rotation=rotation))
    with pytest.raises(FormatError, match=message):
        embpack.load(path)


@pytest.mark.parametrize("method", ["asym", "table", "kmeans-cls:K=5"])
def test_files_are_packed_as_arrays(tmp_path, rng, method):
    weight = rng.laplace(size=(9000, 50)).astype(np.float16)
    np.savez(tmp_path / "model.npz", user_embedding=weight)
    packed = tmp_path / "packed.safetensors"
    report = embpack.quantize_file(tmp_path / "model.npz", packed, method=method, rotate="hadamard")
    table, wanted = embpack.load(packed)["user_embedding"], embpack.quantize(weight, method, rotate="hadamard")
    assert table.rotation == "hadamard"
    assert table.packed.tobytes() == wanted.packed.tobytes()
    assert report.tables[0].loss == table.loss == wanted.loss
    embpack.dequantize_file(packed, tmp_path / "again.npz")
    restored = np.load(tmp_path / "again.npz")["user_embedding"]
    np.testing.assert_array_equal(restored, wanted.gather(np.arange(9000), "float16"))


def test_command_line(tmp_path, rng):
    from typer.testing import CliRunner

    np.save(tmp_path / "user.npy", rng.laplace(size=(100, 24)).astype(np.float32))
    src, packed, again = (str(tmp_path / name) for name in ("user.npy", "packed.safetensors", "again.npy"))
    run = CliRunner().invoke
    assert run(app, ["quantize", src, packed, "--rotate", "hadamard", "--include", "*"]).exit_code == 0
    shown = json.loads(run(app, ["inspect", packed, "--json"]).output)
    (entry,) = shown["tables"]
    assert entry["rotation"] == "hadamard"
    assert "hadamard" in run(app, ["inspect", packed], env={"COLUMNS": "200"}).output
    assert run(app, ["dequantize", packed, again]).exit_code == 0
    (table,) = embpack.load(packed).values()
    np.testing.assert_array_equal(np.load(again), table.dequantize())
    refused = run(app, ["quantize", src, packed, "--rotate", "fourier"])
    assert refused.exit_code == 2


# Other systems


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
def test_onnx_rotates_back(tmp_path, rng, mode, dtype):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from embpack.onnx import export, export_model
    from embpack.torch import PackedEmbedding, PackedEmbeddingBag

    table = embpack.quantize(rng.laplace(size=(300, 50)).astype(np.float32), "asym", rotate="hadamard")
    indices, offsets = bag_arguments(rng, 300)
    inputs = {"indices": indices} if mode is None else {"indices": indices, "offsets": offsets}
    wanted = table.gather(indices, dtype) if mode is None else table.embedding_bag(indices, offsets, mode, dtype=dtype)
    module = PackedEmbedding.from_table(table) if mode is None else PackedEmbeddingBag.from_table(table, mode=mode)
    export_model(
        module.to(getattr(torch, dtype)).eval(), tuple(map(torch.from_numpy, inputs.values())), tmp_path / "model.onnx"
    )
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [own.name for own in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, inputs.values(), strict=True)))
    np.testing.assert_allclose(found, wanted, rtol=1e-2 if dtype == "float16" else 1e-4, atol=1e-3)
    if dtype == "float32":
        export(table, tmp_path / "table.onnx", mode=mode)
        session = runtime.InferenceSession(str(tmp_path / "table.onnx"), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, inputs)[0], wanted, rtol=1e-4, atol=1e-3)


def test_fbgemm_refuses_what_it_would_not_undo(rng):
    pytest.importorskip("fbgemm_gpu")
    from embpack.fbgemm import to_tbe

    table = embpack.quantize(rng.laplace(size=(20, 8)).astype(np.float32), rotate="hadamard")
    with pytest.raises(ValueError, match=r"tables\[0\] has rotation 'hadamard', which FBGEMM would not undo"):
        to_tbe([table])
    to_tbe([table.as_packed])

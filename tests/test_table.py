"""PackedTable: looking up and pooling, and what it says to arguments that are wrong."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import embpack
from embpack import PackedTable, reference
from embpack.layouts import RowFormat

N, D = 12, 5


@pytest.fixture
def table(rng):
    return embpack.quantize(rng.standard_normal((N, D), np.float32))


@pytest.fixture
def rows(table):
    return reference.dequantize(table.packed, table.row_format)


def message_of(error, function, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# What a table says of itself.


def test_attributes(table):
    assert table.shape == (N, D)
    assert (table.num_embeddings, table.embedding_dim, len(table)) == (N, D, N)
    assert (table.bits, table.layout, table.row_bytes, table.nbytes) == (4, "uniform", 7, N * 7)
    assert table.packed.shape == (N, 7)
    assert (table.dtype, table.method) == ("float32", "optimal:effort=normal")


def test_repr_says_what_it_is(table):
    assert repr(table) == (
        "PackedTable(12 x 5, uniform, 4 bits, float16 parameters, 84 bytes, method='optimal:effort=normal', "
        f"loss={table.loss:.5f})"
    )
    adopted = PackedTable.from_packed(table.packed, D)
    assert repr(adopted) == "PackedTable(12 x 5, uniform, 4 bits, float16 parameters, 84 bytes)"
    assert adopted.loss is None


# Looking rows up.

INDICES = {
    "an int": 3,
    "a NumPy int": np.int64(3),
    "0-d": np.array(3),
    "0-d int32": np.array(3, np.int32),
    "a list": [0, 11, 3],
    "a list of lists": [[0, 1], [2, 2], [11, 0]],
    "an empty list": [],
    "an empty list in a list": [[]],
    "empty": np.empty(0, np.int64),
    "empty 3-D": np.empty((2, 0, 3), np.int32),
    "int32": np.array([5, 5, 5], np.int32),
    "int64": np.array([11, 0], np.int64),
    "4-D": np.arange(8).reshape(1, 2, 4, 1),
    "reversed": np.arange(N)[::-1],
    "transposed": np.arange(N).reshape(3, 4).T,
    "strided": np.arange(N, dtype=np.int32)[::3],
    "torch int32": torch.tensor([[1, 2]], dtype=torch.int32),
    "torch int64": torch.tensor([4, 4]),
    "torch 0-d": torch.tensor(4),
    "torch empty": torch.empty(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", INDICES)
def test_looking_up_indices_of_any_shape(isa, table, rows, kind):
    indices = np.asarray(INDICES[kind]).astype(np.int64)
    got = table[INDICES[kind]]
    assert got.dtype == np.float32
    assert got.shape == (*indices.shape, D)
    np.testing.assert_array_equal(got, rows[indices])


def test_many_rows_are_looked_up_in_pieces(isa, table, rows, rng):
    """Kernels get 256 rows at a time."""
    for count in (255, 256, 257, 513, 20_000):
        indices = rng.integers(0, N, count)
        np.testing.assert_array_equal(table[indices], rows[indices])


def test_dequantizing_a_long_table(isa, rng):
    weight = rng.standard_normal((1000, 3), np.float32)
    table = embpack.quantize(weight, "asym")
    np.testing.assert_array_equal(table.dequantize(), reference.dequantize(table.packed, table.row_format))


NOBODYS = [
    (12, "indices[0] is 12"),
    ([0, 11, 2**62], f"indices[2] is {2**62}"),
    ([[0, 1], [2, -(2**63)]], f"indices[3] is {-(2**63)}"),
    (np.array([3, 50], np.int32), "indices[1] is 50"),
    (np.array([3, 200], np.uint8), "indices[1] is 200"),
    (np.array([3, -100], np.int8), "indices[1] is -100"),
    (np.array([0, 2**64 - 1], np.uint64), f"indices[1] is {2**64 - 1}"),
    (2**63, f"indices[0] is {2**63}"),
    (torch.tensor([1, 200], dtype=torch.uint8), "indices[1] is 200"),
]


@pytest.mark.parametrize(("indices", "message"), NOBODYS)
def test_an_index_out_of_range_is_named(isa, table, indices, message):
    message += ", but the table has 12 rows (valid: 0 to 11)"
    assert message_of(IndexError, table.__getitem__, indices) == message
    assert message_of(IndexError, table.gather, indices) == message
    flat = np.asarray(indices).reshape(-1)
    assert message_of(IndexError, table.embedding_bag, flat, [0]) == message
    assert message_of(IndexError, embpack.TableGroup([table]).embedding_bag, flat, [0, len(flat)]).endswith(message)


def test_only_keys_count_from_the_end(table):
    for look_up in (table.gather, lambda indices: table.embedding_bag(indices, [0])):
        assert message_of(IndexError, look_up, [3, -1]) == (
            "indices[1] is -1, but the table has 12 rows (valid: 0 to 11)"
        )
    assert message_of(IndexError, table.__getitem__, [-1, -13]).startswith("indices[1] is -13, but")


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16", "uint32", "uint64", ">i2", ">u8"])
def test_integers_of_any_type(isa, table, rows, dtype):
    indices, offsets = np.array([3, 0, 11, 3], dtype), np.array([0, 3, 4], dtype)
    np.testing.assert_array_equal(table[indices], rows[[3, 0, 11, 3]])
    np.testing.assert_array_equal(table.gather(indices[0]), rows[3])
    wanted = table.embedding_bag([3, 0, 11, 3], [0, 3, 4], include_last_offset=True)
    np.testing.assert_array_equal(table.embedding_bag(indices, offsets, include_last_offset=True), wanted)
    group = embpack.TableGroup([table], modes="mean")
    np.testing.assert_array_equal(group.embedding_bag(indices, offsets), wanted)
    np.testing.assert_array_equal(group.embedding_bag(indices, lengths=np.array([3, 1], dtype)), wanted)


def test_offsets_beyond_int64_are_named(table):
    offsets = np.array([0, 2**64 - 1], np.uint64)
    message = f"offsets[1] is {2**64 - 1}, but there are 2 indices; no offset may be larger"
    assert message_of(ValueError, table.embedding_bag, [1, 2], offsets) == message
    assert message_of(ValueError, embpack.TableGroup([table]).embedding_bag, [1, 2], offsets) == message


@pytest.mark.parametrize(
    ("indices", "name"),
    [
        (1.0, "float64"),
        (np.array([1.0], np.float32), "float32"),
        (np.empty(0), "float64"),
        (torch.tensor([1.0]), "float32"),
        ("3", "<U1"),
        (2**64, "object"),
    ],
)
def test_indices_of_another_type_are_refused(table, indices, name):
    for look_up in (table.__getitem__, table.gather):
        assert message_of(TypeError, look_up, indices) == f"indices are {name}; they must be integers"


@pytest.mark.parametrize("indices", [True, [True] * N, slice(0, 2)])
def test_only_keys_may_choose_rows_otherwise(table, indices):
    assert message_of(TypeError, table.gather, indices).endswith("; they must be integers")


KEYS = {
    "the last row": -1,
    "a NumPy integer": np.int8(-12),
    "from the end": [[-1, 3], [0, -12]],
    "int8 from the end": np.array([-1, 11], np.int8),
    "tensor from the end": torch.tensor([-2, 4]),
    "a slice": slice(2, 7),
    "a slice with steps": slice(None, None, -5),
    "a slice beyond the end": slice(8, 99),
    "a slice of NumPy integers": slice(np.int64(1), np.uint8(4)),
    "an empty slice": slice(5, 5),
    "all": slice(None),
    "dots": ...,
    "nothing": (),
    "a mask": np.arange(N) % 3 == 0,
    "a mask as a list": [row > 8 for row in range(N)],
    "a mask as a tensor": torch.arange(N) < 2,
    "a value": (3, 4),
    "a value from the end": (-1, np.int64(-5)),
    "one key in a tuple": ([3, 4],),
    "dots last": (3, ...),
    "a column": (slice(None), 2),
    "a column by dots": (..., -1),
    "dots and both": (..., 3, 2),
    "columns of a row": (3, slice(1, 3)),
    "columns by a list": (slice(2, 9, 3), [0, -1]),
    "columns by a mask": ([1, 2], np.arange(D) == 1),
    "a part": (slice(1, 3), slice(None, None, 2)),
    "values": ([0, 5, 2], [1, 1, -1]),
    "values of a row": (4, [[0, 1], [2, 3]]),
    "values that are broadcast": ([[0], [11]], [1, 4, 2]),
    "one axis by a mask": (np.arange(N) > 9, 1),
    "unsigned columns": ([1, 2], np.array([3, 0], np.uint64)),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_mean_what_they_mean_to_numpy(table, rows, kind):
    key = KEYS[kind]
    found, wanted = table[key], rows[_as_numpy(key)]
    np.testing.assert_array_equal(found, wanted)
    assert (found.dtype, found.shape) == (np.float32, wanted.shape)


def _as_numpy(key):
    return key.numpy() if isinstance(key, torch.Tensor) else key


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (None, TypeError, "None is no key of a table; add the axis to what it returns"),
        ((3, None), TypeError, "None is no key of a table; add the axis to what it returns"),
        ((1, 2, 3), IndexError, "there are 3 keys; a table has two axes: rows and columns"),
        ((..., 2, ...), IndexError, "there are 3 keys; a table has two axes: rows and columns"),
        ([True, False], IndexError, "a mask for indices has shape [2]; it must be [12]"),
        (np.ones((N, D), bool), IndexError, "a mask for indices has shape [12, 5]; it must be [12]"),
        (True, IndexError, "a mask for indices has shape []; it must be [12]"),
        ((3, [True]), IndexError, "a mask for columns has shape [1]; it must be [5]"),
        ((12, 0), IndexError, "indices[0] is 12, but the table has 12 rows (valid: 0 to 11)"),
        ((0, 5), IndexError, "columns[0] is 5, but the table has 5 columns (valid: 0 to 4)"),
        ((slice(None), [0, -6]), IndexError, "columns[1] is -6, but the table has 5 columns (valid: 0 to 4)"),
        ((0, np.uint64(2**63 + 1)), IndexError, "columns[0] is 9223372036854775809, but the table has 5 columns"),
        ((0, 1.0), TypeError, "columns are float64; they must be integers"),
        (([0, 1, 2], [0, 1]), IndexError, "the keys of rows and columns do not go together: shape mismatch: "),
        ([[1, 2], [3]], ValueError, "indices make no array: "),
    ],
)
def test_keys_that_are_none(table, key, error, message):
    assert message_of(error, table.__getitem__, key).startswith(message)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(table, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch: nested tensors of the strided layout are deprecated
        nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=layout)
    message = "indices are a nested tensor; give its values(), and its offsets() with include_last_offset=True"
    for look_up in (table.__getitem__, table.gather, table.embedding_bag, embpack.TableGroup([table]).embedding_bag):
        assert message_of(TypeError, look_up, nested) == message
    if layout == torch.jagged:
        found = table.embedding_bag(nested.values(), nested.offsets(), include_last_offset=True)
        np.testing.assert_array_equal(found, table.embedding_bag([1, 2, 3], [0, 2]))


# As an array.


class Counting(PackedTable):
    """Counts how often it is unpacked."""

    calls = 0

    def _gather(self, *arguments):
        type(self).calls += 1
        return super()._gather(*arguments)


def test_an_array_of_a_table_is_unpacked_at_once(table, rows):
    counting = Counting(table.packed, table.row_format)
    np.testing.assert_array_equal(np.asarray(counting), rows)
    assert Counting.calls == 1
    assert np.asarray(table).dtype == np.float32
    np.testing.assert_array_equal(np.array(table), rows)
    np.testing.assert_array_equal(np.add(table, 1), rows + 1)
    np.testing.assert_array_equal(np.array(table, copy=True), rows)
    np.testing.assert_array_equal(torch.as_tensor(np.asarray(table)).numpy(), rows)


def test_an_array_of_a_table_that_is_no_copy_cannot_be(table):
    message = message_of(ValueError, np.asarray, table, copy=False)
    assert message == "rows are packed: an array of them is a copy; leave out copy=False"


@pytest.mark.parametrize("dtype", ["float64", "float32", ">f4", "float16", "int64"])
def test_an_array_of_a_table_of_a_type(dtype):
    table = embpack.quantize(np.float16([[-65504, 65504, 0, 100]]))
    wanted = np.clip(table.dequantize(), -65504, 65504) if dtype == "float16" else table.dequantize()
    found = np.asarray(table, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted.astype(dtype))


def test_an_array_of_a_table_as_bfloat16(table):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    np.testing.assert_array_equal(np.asarray(table, bfloat16), table.dequantize().astype(bfloat16))


def test_iterating_unpacks_some_rows_at_a_time(rng):
    table = embpack.quantize(rng.standard_normal((600, 3), np.float32), "asym")
    np.testing.assert_array_equal(list(table), table.dequantize())
    np.testing.assert_array_equal(list(reversed(table)), table.dequantize()[::-1])
    np.testing.assert_array_equal(next(iter(table)), table[0])
    assert list(PackedTable.from_packed(np.empty((0, 7), np.uint8), D)) == []


@pytest.mark.parametrize("dtype", [">i4", ">i8", "<i4", "<i8"])
def test_indices_offsets_and_weights_of_any_byte_order(table, rows, dtype):
    indices = np.array([[3, 0], [11, 3]], dtype)
    np.testing.assert_array_equal(table[indices], rows[indices.astype(np.int64)])
    assert table[indices[0, 0]].shape == (D,)
    weights = np.array([1, 2, -3, 4], dtype.replace("i8", "f4").replace("i4", "f4"))
    found = table.embedding_bag(indices.reshape(-1), np.array([0, 3], dtype), "sum", weights)
    wanted = table.embedding_bag([3, 0, 11, 3], [0, 3], "sum", weights.astype(np.float32))
    np.testing.assert_array_equal(found, wanted)


# Adopting bytes.


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
def test_any_finite_scale_and_bias_read_exactly(isa, rng, bits, param_dtype):
    """Negative and subnormal ones too, which constant rows have."""
    row_format = RowFormat(D, bits, param_dtype)
    smallest = 2.0**-24 if param_dtype == "float16" else 2.0**-149
    parameters = np.array([0, 1, -1, 0.1, -0.3, smallest, -smallest, 27 * smallest, -60000, 2.0**-14])
    scale_and_bias = np.stack(np.meshgrid(parameters, parameters), axis=-1).reshape(-1, 2)
    stored = scale_and_bias.astype("<f2" if row_format.has_f16_params else "<f4")
    codes = rng.integers(0, 256, (len(stored), row_format.code_bytes), np.uint8)
    packed = np.concatenate([codes, stored.view(np.uint8)], axis=1)
    table = PackedTable.from_packed(packed, D, bits, param_dtype)
    wanted = reference.dequantize(packed, row_format)
    np.testing.assert_array_equal(table.dequantize(), wanted)
    indices = rng.integers(0, len(packed), 50)
    np.testing.assert_array_equal(table[indices], wanted[indices])


def test_adopting_does_not_copy(table):
    assert np.shares_memory(PackedTable.from_packed(table.packed, D).packed, table.packed)
    tensor = torch.from_numpy(table.packed.copy())
    assert PackedTable.from_packed(tensor, D).packed.ctypes.data == tensor.data_ptr()


def test_read_only_bytes_are_read(isa, table, rows):
    packed = np.frombuffer(table.packed.tobytes(), np.uint8).reshape(table.packed.shape)
    assert not packed.flags.writeable
    np.testing.assert_array_equal(PackedTable.from_packed(packed, D).dequantize(), rows)


def test_a_table_without_rows():
    table = PackedTable.from_packed(np.empty((0, 7), np.uint8), D)
    assert table.dequantize().shape == (0, D)
    assert table[[]].shape == (0, D)
    np.testing.assert_array_equal(table.embedding_bag([], [0, 0]), np.zeros((2, D)))
    assert "but the table has 0 rows" in message_of(IndexError, table.__getitem__, 0)


@pytest.mark.parametrize(
    ("embedding_dim", "bits", "param_dtype", "message"),
    [
        (7, 4, None, "packed has 7 bytes a row, but embedding_dim 7 at 4 bits with float16 parameters takes 8"),
        (2, 4, None, "packed has 7 bytes a row, but embedding_dim 2 at 4 bits with float16 parameters takes 5"),
        (D, 8, None, "packed has 7 bytes a row, but embedding_dim 5 at 8 bits with float32 parameters takes 13"),
        (D, 2, None, "packed has 7 bytes a row, but embedding_dim 5 at 2 bits with float16 parameters takes 6"),
        (D, 4, "float32", "packed has 7 bytes a row, but embedding_dim 5 at 4 bits with float32 parameters takes 11"),
        (0, 4, None, "embedding_dim is 0; a row needs at least one value"),
        (-1, 4, None, "embedding_dim is -1; a row needs at least one value"),
        (D, 6, None, "bits is 6; choose 2, 4 or 8"),
        (D, 4, "float64", "param_dtype is 'float64'; choose 'float16' or 'float32'"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(table, embedding_dim, bits, param_dtype, message):
    assert message_of(ValueError, PackedTable.from_packed, table.packed, embedding_dim, bits, param_dtype) == message


@pytest.mark.parametrize(
    ("packed", "found"),
    [
        (np.zeros((3, 7), np.int8), "int8 of shape [3, 7]"),
        (np.zeros(7, np.uint8), "uint8 of shape [7]"),
        (np.zeros((3, 1, 7), np.uint8), "uint8 of shape [3, 1, 7]"),
        (np.zeros((3, 14), np.uint8)[:, ::2], "uint8 of shape [3, 7]"),
        (np.zeros((6, 7), np.uint8)[::2], "uint8 of shape [3, 7]"),
    ],
)
def test_packed_must_be_contiguous_rows_of_bytes(packed, found):
    assert message_of(ValueError, PackedTable.from_packed, packed, D) == (
        f"packed is {found}; it must be C-contiguous uint8 [num_embeddings, row_bytes]"
    )


# Pooling.


def test_bags_by_hand(isa):
    table = embpack.quantize(np.float32([[0, 15, 3], [15, 0, 1], [1, 15, 0]]), "asym")
    np.testing.assert_array_equal(table.dequantize(), [[0, 15, 3], [15, 0, 1], [1, 15, 0]])
    indices, offsets = [0, 1, 2, 2], [0, 3, 3]
    expected = {
        "sum": [[16, 30, 4], [0, 0, 0], [1, 15, 0]],
        "mean": [[16 / 3, 10, 4 / 3], [0, 0, 0], [1, 15, 0]],
        "max": [[15, 15, 3], [0, 0, 0], [1, 15, 0]],
    }
    for mode, wanted in expected.items():
        np.testing.assert_array_equal(table.embedding_bag(indices, offsets, mode), np.float32(wanted))
    np.testing.assert_array_equal(table.embedding_bag(indices, offsets), np.float32(expected["mean"]))
    weighted = table.embedding_bag(indices, offsets, "sum", np.float32([1, -1, 2, 0.5]))
    np.testing.assert_array_equal(weighted, np.float32([[-13, 45, 2], [0, 0, 0], [0.5, 7.5, 0]]))
    np.testing.assert_array_equal(table.embedding_bag([[0, 1], [2, 2]], mode="sum"), [[15, 15, 4], [2, 30, 0]])


def test_the_maximum_of_negative_rows_is_negative(isa):
    table = embpack.quantize(np.float32([[-3, -18], [-17, -2]]), "asym")
    np.testing.assert_array_equal(table.embedding_bag([[0, 1]], mode="max"), [[-3, -2]])


def draw_bags(data, num_rows, embedding_dim, bits):
    """A table of any bytes with finite parameters, indices, and where bags start."""
    row_format = RowFormat(embedding_dim, bits, data.draw(st.sampled_from(["float16", "float32"])))
    codes = data.draw(arrays(np.uint8, (num_rows, row_format.code_bytes)))
    largest = 6e4 if row_format.has_f16_params else 1e30
    width = 16 if row_format.has_f16_params else 32
    largest = float(np.array(largest, f"f{width // 8}"))
    params = data.draw(arrays(f"<f{width // 8}", (num_rows, 2), elements=st.floats(-largest, largest, width=width)))
    packed = np.concatenate([codes, params.view(np.uint8)], axis=1)
    indices = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=30)), np.int64)
    starts = sorted(data.draw(st.lists(st.integers(0, len(indices)), max_size=5)))
    table = PackedTable.from_packed(packed, embedding_dim, bits, row_format.param_dtype)
    return table, indices, np.array([0, *starts])


@settings(max_examples=120)
@given(st.data(), st.integers(1, 6), st.integers(1, 40), st.sampled_from([2, 4, 8]))
def test_any_bags_pool_as_in_the_reference(isa, data, num_rows, embedding_dim, bits):
    table, indices, offsets = draw_bags(data, num_rows, embedding_dim, bits)
    rows = reference.dequantize(table.packed, table.row_format)
    bags = np.split(indices, offsets[1:])
    mode = data.draw(st.sampled_from(["sum", "mean", "max"]))
    padding_idx = data.draw(st.none() | st.integers(0, num_rows - 1))
    got = table.embedding_bag(indices, offsets, mode, padding_idx=padding_idx)
    np.testing.assert_array_equal(got, reference.embedding_bag(rows, bags, mode, padding_idx=padding_idx))


@settings(max_examples=120)
@given(st.data(), st.integers(1, 6), st.integers(1, 40), st.sampled_from([2, 4, 8]))
def test_any_weighted_bags_pool_as_in_the_reference(isa, data, num_rows, embedding_dim, bits):
    table, indices, offsets = draw_bags(data, num_rows, embedding_dim, bits)
    rows = reference.dequantize(table.packed, table.row_format)
    finite = st.floats(-1000, 1000, width=32)
    weights = data.draw(arrays(np.float32, len(indices), elements=finite))
    got = table.embedding_bag(indices, offsets, "sum", weights)
    wanted = reference.embedding_bag(rows, np.split(indices, offsets[1:]), "sum", np.split(weights, offsets[1:]))
    np.testing.assert_array_equal(got, wanted)


BAG_INDICES = {
    "lists": ([3, 1, 4, 1], [0, 2]),
    "int32": (np.array([3, 1, 4, 1], np.int32), np.array([0, 2], np.int32)),
    "int32 and int64": (np.array([3, 1, 4, 1], np.int32), np.array([0, 2], np.int64)),
    "int64 and int32": (np.array([3, 1, 4, 1], np.int64), np.array([0, 2], np.int32)),
    "torch": (torch.tensor([3, 1, 4, 1]), torch.tensor([0, 2], dtype=torch.int32)),
    "strided": (np.array([3, 0, 1, 0, 4, 0, 1, 0])[::2], np.array([0, 9, 2, 9])[::2]),
}


@pytest.mark.parametrize("kind", BAG_INDICES)
def test_indices_and_offsets_of_any_kind(table, rows, kind):
    indices, offsets = BAG_INDICES[kind]
    wanted = np.stack([rows[3] + rows[1], rows[4] + rows[1]])
    np.testing.assert_array_equal(table.embedding_bag(indices, offsets, "sum"), wanted)


@pytest.mark.parametrize(
    "weights",
    [np.float32([2, 9, -1, 9])[::2], torch.tensor([2.0, -1.0], requires_grad=True), [2.0, -1.0], (2, -1)],
    ids=["strided", "torch", "list", "integers"],
)
def test_weights_of_any_kind(table, rows, weights):
    wanted = reference.embedding_bag(rows, [np.array([3, 1])], "sum", [np.float32([2, -1])])
    np.testing.assert_array_equal(table.embedding_bag([3, 1], [0], "sum", weights), wanted)


def test_bags_without_indices_or_offsets(isa, table):
    np.testing.assert_array_equal(table.embedding_bag([], [0, 0, 0]), np.zeros((3, D)))
    assert table.embedding_bag([], []).shape == (0, D)
    assert table.embedding_bag(np.empty((0, 4), np.int64)).shape == (0, D)
    np.testing.assert_array_equal(table.embedding_bag(np.empty((2, 0), np.int64)), np.zeros((2, D)))
    np.testing.assert_array_equal(table.embedding_bag([], [0], include_last_offset=True), np.empty((0, D)))


@pytest.mark.parametrize("padding_idx", [3, -9, np.int64(3), np.uint8(3), np.array(-9), torch.tensor(3)])
def test_padding_is_left_out_of_the_count_too(isa, table, rows, padding_idx):
    got = table.embedding_bag([[3, 1], [3, 3]], mode="mean", padding_idx=padding_idx)
    np.testing.assert_array_equal(got, [rows[1], np.zeros(D)])


def test_bags_are_contiguous_float32(table):
    got = table.embedding_bag([[0, 1]])
    assert got.dtype == np.float32
    assert got.flags.c_contiguous


ONES = np.ones(3, np.float32)
BAG_ERRORS = {
    "mode": (
        ValueError,
        {"mode": "prod"},
        "mode is 'prod'; choose one of sum, mean, max",
    ),
    "index": (
        IndexError,
        {"indices": [0, 12, 1]},
        "indices[1] is 12, but the table has 12 rows (valid: 0 to 11)",
    ),
    "negative index": (
        IndexError,
        {"indices": [0, 1, -1]},
        "indices[2] is -1, but the table has 12 rows (valid: 0 to 11)",
    ),
    "indices in no bag": (
        ValueError,
        {"offsets": [0, 2, 2], "include_last_offset": True},
        "offsets[2], where the last bag ends, is 2, but there are 3 indices; each must be in a bag",
    ),
    "indices and no bag": (
        ValueError,
        {"offsets": [0], "include_last_offset": True},
        "offsets[0], where the last bag ends, is 0, but there are 3 indices; each must be in a bag",
    ),
    "indices and no offsets": (
        ValueError,
        {"offsets": []},
        "offsets are empty, but there are 3 indices; each must be in a bag",
    ),
    "index type": (
        TypeError,
        {"indices": [0.0, 1.0, 2.0]},
        "indices are float64; they must be integers",
    ),
    "offset type": (
        TypeError,
        {"offsets": np.array([0.0])},
        "offsets are float64; they must be integers",
    ),
    "bags of lists": (
        ValueError,
        {"indices": [[0, 1], [2]], "offsets": None},
        "indices make no array: setting an array element with a sequence. The requested array has an inhomogeneous "
        "shape after 1 dimensions. The detected shape was (2,) + inhomogeneous part.; bags of different sizes are 1-D "
        "indices and offsets",
    ),
    "3-D": (
        ValueError,
        {"indices": [[[0]]], "offsets": None},
        "indices have 3 dimensions; a bag takes 1-D with offsets, or 2-D",
    ),
    "0-d": (
        ValueError,
        {"indices": 0},
        "indices have 0 dimensions; a bag takes 1-D with offsets, or 2-D",
    ),
    "2-D with offsets": (
        ValueError,
        {"indices": [[0, 1, 2]]},
        "offsets are for 1-D indices; each row of 2-D indices is a bag by itself",
    ),
    "1-D without offsets": (
        ValueError,
        {"offsets": None},
        "1-D indices need offsets: where each bag starts; 2-D ones have a bag a row",
    ),
    "2-D offsets": (
        ValueError,
        {"offsets": [[0]]},
        "offsets have 2 dimensions; they must be 1-D",
    ),
    "no last offset": (
        ValueError,
        {"offsets": [], "include_last_offset": True},
        "offsets are empty; with include_last_offset they end with where the last bag ends",
    ),
    "first offset": (
        ValueError,
        {"offsets": [1, 2]},
        "offsets[0] is 1; the first bag must start at 0",
    ),
    "decreasing offsets": (
        ValueError,
        {"offsets": [0, 2, 1]},
        "offsets[2] is 1, less than offsets[1], 2; offsets cannot decrease",
    ),
    "offset beyond": (
        ValueError,
        {"offsets": [0, 4]},
        "offsets[1] is 4, but there are 3 indices; no offset may be larger",
    ),
    "weights with mean": (
        ValueError,
        {"per_sample_weights": ONES, "mode": "mean"},
        "per_sample_weights go with mode 'sum' only, not 'mean'",
    ),
    "weights with max": (
        ValueError,
        {"per_sample_weights": ONES, "mode": "max"},
        "per_sample_weights go with mode 'sum' only, not 'max'",
    ),
    "weight type": (
        TypeError,
        {"per_sample_weights": np.ones(3)},
        "per_sample_weights are float64; they must be float32",
    ),
    "weight type of a tensor": (
        TypeError,
        {"per_sample_weights": torch.ones(3, dtype=torch.bfloat16)},
        "per_sample_weights are torch.bfloat16; they must be torch.float32",
    ),
    "weights that are no numbers": (
        TypeError,
        {"per_sample_weights": ["1", "1", "1"]},
        "per_sample_weights are <U1; they must be float32",
    ),
    "weight shape": (
        ValueError,
        {"per_sample_weights": ONES[:2]},
        "per_sample_weights have shape [2], indices [3]; they must agree",
    ),
    "padding_idx": (
        ValueError,
        {"padding_idx": 12},
        "padding_idx is 12, but the table has 12 rows",
    ),
    "padding_idx type": (
        TypeError,
        {"padding_idx": 1.0},
        "padding_idx is 1.0; it must be an integer, the number of a row",
    ),
    "padding_idx of several": (
        TypeError,
        {"padding_idx": [1, 2]},
        "padding_idx is [1, 2]; it must be an integer, the number of a row",
    ),
    "negative padding_idx": (
        ValueError,
        {"padding_idx": -13},
        "padding_idx is -13, but the table has 12 rows",
    ),
}


@pytest.mark.parametrize("what", BAG_ERRORS)
def test_embedding_bag_says_what_is_wrong(table, what):
    error, arguments, message = BAG_ERRORS[what]
    arguments = {"indices": [0, 1, 2], "offsets": [0], "mode": "sum"} | arguments
    assert message_of(error, table.embedding_bag, **arguments) == message


def test_a_dtype_that_no_weights_have_is_refused(table):
    message = message_of(ValueError, PackedTable, table.packed, table.row_format, "float64")
    assert message == "dtype is 'float64'; the weights were one of float32, float16, bfloat16"


@pytest.mark.parametrize(
    "row_format", [RowFormat(64), RowFormat(3, 8, "float32", "codebook"), RowFormat(1, 2, layout="clustered")]
)
def test_a_row_format_is_what_its_text_says(row_format):
    assert RowFormat.parse(str(row_format)) == row_format
    assert str(RowFormat(64)) == "uniform:64:4:float16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:64:4", "row format is 'uniform:64:4'; it has layout, embedding_dim, bits and param_dtype"),
        ("uniform:64:4:float16:", "row format is"),
        ("uniform:-1:4:float16", "row format is"),
        ("uniform:64:3:float16", "bits is 3"),
        ("packed:64:4:float16", "layout is 'packed'"),
        ("uniform:64:4:int8", "param_dtype is 'int8'"),
    ],
)
def test_a_text_that_is_no_row_format_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        RowFormat.parse(text)

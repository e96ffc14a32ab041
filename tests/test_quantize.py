"""quantize: what it makes of input that is no table."""

import ml_dtypes
import numpy as np
import pytest
import torch

import embpack.torch
from embpack import chunks
from embpack.layouts import RowFormat

NOT_FINITE = [np.nan, np.inf, -np.inf]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two spans of 32 rows at embedding_dim 20, so that small tables have several."""
    monkeypatch.setattr(chunks, "SPAN_VALUES", 32 * 20)
    monkeypatch.setattr(chunks, "SPANS_OF_AN_ARRAY", 2)
    assert chunks.span_rows(20) == 32


def message_of(error, weight, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        embpack.quantize(weight, *args, **kwargs)
    return str(caught.value)


# The ends of the table, of blocks of 32 rows, of vectors of 16 columns, and within chunks of 64 rows.
PLACES = [(0, 0), (0, 19), (31, 16), (32, 15), (63, 3), (64, 0), (130, 7), (159, 19), (160, 0), (164, 19)]


@pytest.mark.parametrize("method", ["asym", "greedy", "table"])
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(("row", "column"), PLACES)
def test_a_value_that_is_not_finite_is_named(isa, small_chunks, row, column, value, method):
    weight = np.ones((165, 20), np.float32)
    weight[row, column] = value
    assert message_of(ValueError, weight, method) == (
        f"weight[{row}, {column}] is {value}; NaN and infinity cannot be packed, replace them first"
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_half_that_is_not_finite_is_named(isa, small_chunks, dtype, value):
    weight = np.ones((165, 20), dtype)
    weight[164, 18] = value
    assert message_of(ValueError, weight).startswith(f"weight[164, 18] is {value}; ")


def test_a_value_in_a_later_chunk_of_real_size_is_named():
    # Not contiguous, so that each chunk is copied and chunks are those of files.
    weight = np.ones((520, 1 << 14), np.float32)[:, ::2]
    assert chunks.chunk_rows(1 << 13) == 512
    weight[519, 1000] = np.nan
    assert message_of(ValueError, weight, "asym").startswith("weight[519, 1000] is nan; ")


def test_of_several_faults_the_first_row_is_named(isa, restore_threads):
    embpack.set_num_threads(3)
    weight = np.ones((5000, 64), np.float32)
    weight[4000, 1] = np.inf
    weight[777, 5] = np.nan
    weight[777, 9] = np.inf
    weight[1500, 0] = 1e30
    assert message_of(ValueError, weight).startswith("weight[777, 5] is nan; ")


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        ([70000, 80000], "70000 to 80000"),
        ([-70000, 0], "-70000 to 0"),
        ([-65520, 0], "-65520 to 0"),
        ([0, 15 * 65520.0], "0 to 982800"),
    ],
)
def test_overflow_of_float16_names_the_row_and_the_way_out(isa, small_chunks, values, bounds):
    weight = np.tile(np.float32([0, 1]), (165, 10))
    weight[129] = np.tile(np.float32(values), 10)
    assert message_of(ValueError, weight, "asym") == (
        f"weight[129] has values from {bounds}: its scale or bias overflows float16 (largest: 65504); "
        "use param_dtype='float32'"
    )
    assert embpack.quantize(weight, "asym", param_dtype="float32").loss < 0.05


@pytest.mark.parametrize(
    ("values", "scale", "bias"), [([-65519, 0], 65504 / 15, -65504), ([0, 15 * 65519.0], 65504, 0)]
)
def test_up_to_65519_rounds_to_the_largest_float16(isa, values, scale, bias):
    packed = embpack.quantize(np.float32([values]), "asym").packed
    np.testing.assert_array_equal(packed[0, 1:].copy().view("<f2"), np.float16([scale, bias]))


def test_overflow_of_float32_says_to_rescale(isa):
    weight = np.float32([[0, 1], [-3e38, 3e38]])
    assert message_of(ValueError, weight, "asym", param_dtype="float32") == (
        "weight[1] has values from -3e+38 to 3e+38: its scale overflows float32; rescale the table"
    )


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_a_table_is_2d(shape):
    assert message_of(ValueError, np.ones(shape, np.float32)) == (
        f"weight has shape {list(shape)}, but a table is 2-D: [num_embeddings, embedding_dim]"
    )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_a_table_has_rows_and_columns(shape):
    assert message_of(ValueError, np.ones(shape, np.float32)) == (
        f"weight has shape {list(shape)}; a table needs at least one row and one column"
    )


@pytest.mark.parametrize("dtype", ["float64", "int32", "int8", "uint8", "uint16"])
def test_another_type_says_how_to_convert(dtype):
    assert message_of(TypeError, np.ones((2, 3), dtype)) == (
        f"weight is {dtype}, but a table is float32, float16 or bfloat16; convert it with weight.astype(numpy.float32)"
    )


@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_a_type_that_is_no_real_number_is_refused(dtype):
    assert message_of(TypeError, np.ones((2, 3), dtype)) == (
        f"weight is {dtype}, but a table is float32, float16 or bfloat16"
    )


def test_float64_from_torch_and_lists_is_refused():
    assert message_of(TypeError, torch.ones(2, 3, dtype=torch.float64)).startswith("weight is float64, but")
    assert message_of(TypeError, [[1.0, 2.0]]).startswith("weight is float64, but")


@pytest.mark.parametrize("dtype", [">f4", ">f2"])
def test_big_endian_values_pack_as_their_native_ones(rng, dtype):
    rows = rng.standard_normal((5, 7)).astype(dtype)
    native = rows.astype(rows.dtype.newbyteorder("="))
    np.testing.assert_array_equal(embpack.quantize(rows).packed, embpack.quantize(native).packed)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16, -4])
def test_other_bits_are_refused(bits):
    weight = np.ones((2, 3), np.float32)
    assert message_of(ValueError, weight, bits=bits) == f"bits is {bits}; choose 2, 4 or 8"


def test_another_param_dtype_is_refused():
    weight = np.ones((2, 3), np.float32)
    assert message_of(ValueError, weight, param_dtype="bfloat16") == (
        "param_dtype is 'bfloat16'; choose 'float16' or 'float32'"
    )


def test_an_unknown_method_is_refused():
    assert message_of(ValueError, np.ones((2, 3), np.float32), "best").startswith("there is no method 'best'; choose")


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"^layout is 'spiral'; choose one of uniform, codebook, clustered, trellis$"):
        RowFormat(4, layout="spiral")


def test_defaults_are_optimal_at_4_bits_with_float16_parameters(rng):
    rows = rng.standard_normal((9, 10), np.float32)
    table = embpack.quantize(rows)
    assert table.method == "optimal:effort=normal"
    assert table.row_format == RowFormat(10, 4, "float16")
    assert table.dtype == "float32"
    np.testing.assert_array_equal(table.packed, embpack.quantize(rows, "optimal", 4, "float16").packed)


@pytest.mark.parametrize(("bits", "param_dtype"), [(2, "float16"), (4, "float16"), (8, "float32")])
def test_default_parameters_are_pytorchs(bits, param_dtype):
    assert embpack.quantize(np.ones((2, 3), np.float32), bits=bits).row_format.param_dtype == param_dtype


@pytest.mark.parametrize("method", embpack.METHODS)
def test_chunks_change_nothing(rng, small_chunks, monkeypatch, method):
    rows = rng.standard_normal((165, 20), np.float32)
    in_chunks = embpack.quantize(rows, method)
    monkeypatch.undo()
    whole = embpack.quantize(rows, method)
    np.testing.assert_array_equal(in_chunks.packed, whole.packed)
    # The same sums of blocks, added up in another order in float64.
    assert in_chunks.loss == pytest.approx(whole.loss, rel=1e-14)


def test_spans_have_whole_blocks_and_chunks_whole_spans():
    for embedding_dim in (1, 3, 64, 1000, 1 << 22, 1 << 23):
        span = chunks.span_rows(embedding_dim)
        assert span % 32 == 0
        assert span > 0
        assert chunks.chunk_rows(embedding_dim) % span == 0


def test_a_parameter_that_requires_grad_packs(rng):
    rows = rng.standard_normal((6, 5), np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(rows))
    np.testing.assert_array_equal(embpack.quantize(parameter).packed, embpack.quantize(rows).packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_transposed_tensor_packs(rng, dtype):
    tensor = torch.from_numpy(rng.standard_normal((6, 40), np.float32)).to(dtype).T
    assert not tensor.is_contiguous()
    table = embpack.quantize(tensor)
    np.testing.assert_array_equal(table.packed, embpack.quantize(tensor.contiguous()).packed)
    assert table.shape == (40, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": 3}, "method is 3; give a name, such as 'optimal', or a Method"),
        ({"method": None}, "method is None; give a name, such as 'optimal', or a Method"),
        ({"bits": "4"}, "bits is '4'; choose 2, 4 or 8"),
        ({"bits": None}, "bits is None; choose 2, 4 or 8"),
        ({"bits": 4.0}, "bits is 4.0; choose 2, 4 or 8"),
        ({"method": "trellis", "bits": "4"}, "bits is '4'; give a number from 2 to 7"),
        ({"method": "trellis", "bits": None}, "bits is None; give a number from 2 to 7"),
    ],
)
def test_an_argument_of_another_type_is_named(arguments, message):
    assert message_of(TypeError, np.ones((20, 8), np.float32), **arguments) == message
    with pytest.raises(TypeError, match=message):
        embpack.torch.quantize_(torch.nn.Sequential(torch.nn.Embedding(20, 8)), **arguments)


def test_a_param_dtype_of_another_type_is_named():
    message = "param_dtype is ['float32']; choose 'float16' or 'float32'"
    assert message_of(ValueError, np.ones((20, 8), np.float32), param_dtype=["float32"]) == message

"""Lookup: every layout, type and mode against PyTorch and the float32 rows, tables of any size, and many at once."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embpack
from embpack import reference
from embpack.formats.mapped import is_mapped
from embpack.layouts import RowFormat
from embpack.packed_files import Access
from embpack.rows import narrow, widen

METHODS = {"uniform": "asym", "codebook": "kmeans-lloyd", "clustered": "kmeans-cls:K=3"}
# One less, exactly and one more than the kernels take at a time, and the widths of most models.
DIMS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 256, 300, 512, 520)


def make_table(rng, embedding_dim, layout="uniform", bits=4, param_dtype="float16", num_embeddings=40):
    weight = rng.standard_normal((num_embeddings, embedding_dim), np.float32)
    return embpack.quantize(weight, METHODS[layout], bits, param_dtype)


def pool_in_order(rows, indices, offsets, weights=None, padding=None, mode="sum"):
    """Bags of float32 rows, one after another, as the kernels add them."""
    out = np.zeros((len(offsets), rows.shape[1]), np.float32)
    ends = [*offsets[1:], len(indices)]
    for bag, (start, end) in enumerate(zip(offsets, ends, strict=True)):
        used = [i for i in range(start, end) if indices[i] != padding]
        if not used:
            continue
        terms = rows[np.asarray(indices)[used]]
        if mode == "max":
            out[bag] = np.max(terms, axis=0)
        elif weights is None:
            out[bag] = np.add.accumulate(terms, axis=0)[-1]
        else:
            for weight, term in zip(np.asarray(weights)[used], terms, strict=True):
                # float64 holds the product of two float32 exactly: this rounds as a fused multiply-add nearly does.
                out[bag] = (out[bag] + term.astype(np.float64) * np.float64(weight)).astype(np.float32)
        if mode == "mean":
            out[bag] /= np.float32(len(terms))
    return out


@pytest.mark.parametrize("embedding_dim", DIMS)
@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_width_gathers_and_pools(isa, rng, embedding_dim, layout, bits):
    for param_dtype in ("float16", "float32"):
        table = make_table(rng, embedding_dim, layout, bits, param_dtype)
        rows = table.dequantize()
        check_lookups(table, rows, rng.integers(0, len(table), 600))


def check_lookups(table, rows, indices):
    """Gathered and pooled rows are these, whatever the type of indices; 600 of them."""
    np.testing.assert_array_equal(table[indices], rows[indices])
    offsets = np.array([0, 0, 1, 20, 330, 600, 600])  # empty, single, short, longer than a window, last empty
    for mode in ("sum", "mean", "max"):
        wanted = pool_in_order(rows, indices, offsets, mode=mode)
        np.testing.assert_array_equal(table.embedding_bag(indices, offsets, mode), wanted)
        small = table.embedding_bag(indices.astype(np.int32), offsets.astype(np.int32), mode)
        np.testing.assert_array_equal(small, wanted)
        padded = table.embedding_bag(indices, offsets, mode, padding_idx=int(indices[0]))
        np.testing.assert_array_equal(padded, pool_in_order(rows, indices, offsets, padding=indices[0], mode=mode))


@pytest.mark.parametrize("layout", METHODS)
def test_instruction_sets_agree_on_weighted_bags(isa, layout):
    rng = np.random.default_rng(3)
    table = make_table(rng, 100, layout)
    indices, weights = rng.integers(0, len(table), 150), rng.standard_normal(150).astype(np.float32)
    offsets = np.array([0, 3, 100])
    found = table.embedding_bag(indices, offsets, "sum", weights)
    # n fused multiply-adds round n times, each by at most half a unit of the partial sum.
    magnitude = pool_in_order(np.abs(table.dequantize()), indices, offsets, np.abs(weights))
    bound = 150 * 2.0**-24 * magnitude
    assert (np.abs(found - pool_in_order(table.dequantize(), indices, offsets, weights)) <= bound).all()
    from embpack import _native

    _native.use_isa("portable")
    np.testing.assert_array_equal(found, table.embedding_bag(indices, offsets, "sum", weights))


@st.composite
def bags(draw):
    sizes = draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))
    seed, dim = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 70))
    rng = np.random.default_rng(seed)
    table = make_table(rng, dim, draw(st.sampled_from(list(METHODS))), draw(st.sampled_from([2, 4, 8])))
    offsets = np.cumsum([0, *sizes[:-1]])
    return table, rng.integers(0, len(table), sum(sizes)), offsets, rng.standard_normal(sum(sizes)).astype(np.float32)


@given(bags(), st.sampled_from(["sum", "mean", "max"]), st.booleans(), st.booleans())
def test_any_bags_are_those_of_pytorch(isa, case, mode, has_weights, has_padding):
    torch = pytest.importorskip("torch")
    table, indices, offsets, weights = case
    has_weights &= mode == "sum"
    padding = int(indices[0]) if has_padding and len(indices) else None
    found = table.embedding_bag(indices, offsets, mode, weights if has_weights else None, padding_idx=padding)
    tensors = (torch.from_numpy(array) for array in (indices, table.dequantize(), offsets))
    wanted = torch.nn.functional.embedding_bag(
        *tensors,
        mode=mode,
        per_sample_weights=torch.from_numpy(weights) if has_weights else None,
        padding_idx=padding,
    )
    # Both sum n terms in float32, in their own order: each is off by at most (n + 1) half units of the sum of sizes.
    sizes = np.abs(weights) if has_weights else None
    magnitude = pool_in_order(np.abs(table.dequantize()), indices, offsets, sizes, padding)
    bound = 0 if mode == "max" else 2 * (len(indices) + 1) * 2.0**-24 * magnitude
    assert (np.abs(found - wanted.numpy()) <= bound).all()


def test_the_mean_is_not_the_sum(isa, rng):
    table = make_table(rng, 64)
    indices = np.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(
        table.embedding_bag(indices, mode="mean"), table.embedding_bag(indices, mode="sum") / 4
    )


def test_sums_are_pytorchs_where_nothing_rounds(isa, rng):
    """Rows of small integers: scale 1, bias -8, so that every order of operations gives the same."""
    torch = pytest.importorskip("torch")
    weight = rng.integers(-8, 8, (50, 64)).astype(np.float32)
    weight[:, 0], weight[:, 1] = -8, 7
    table = embpack.quantize(weight, "asym")
    indices, offsets = rng.integers(0, 50, 400), np.arange(0, 400, 20)
    tensors = (torch.from_numpy(array) for array in (table.packed, indices, offsets))
    wanted = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(*tensors)
    np.testing.assert_array_equal(table.embedding_bag(indices, offsets, "sum"), wanted.numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_are_near_pytorchs_where_they_round(isa, rng, bits):
    """PyTorch adds bias first and then fma(scale, code, sum): two roundings a row, of sums of at most `magnitude`."""
    torch = pytest.importorskip("torch")
    table = make_table(rng, 96, bits=bits, param_dtype="float16" if bits == 4 else "float32")
    indices, offsets = rng.integers(0, len(table), 400), np.arange(0, 400, 20)
    operator = {4: "embedding_bag_4bit_rowwise_offsets", 8: "embedding_bag_byte_rowwise_offsets"}[bits]
    tensors = (torch.from_numpy(array) for array in (table.packed, indices, offsets))
    wanted = getattr(torch.ops.quantized, operator)(*tensors).numpy()
    params = table.packed[:, table.row_format.code_bytes :].view(table.row_format.param_dtype).astype(np.float32)
    largest = np.abs(params[:, 0]) * (2**bits - 1) + np.abs(params[:, 1])
    bound = (2 + 2) * 20 * 2.0**-24 * np.array([largest[bag].sum() for bag in indices.reshape(-1, 20)])
    assert (np.abs(table.embedding_bag(indices, offsets, "sum") - wanted) <= bound[:, None]).all()


def as_bfloat16(values):
    """Bits of float32 values rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize("embedding_dim", [5, 64, 300])
def test_narrow_outputs_are_the_rounded_float32(isa, rng, layout, embedding_dim):
    table = make_table(rng, embedding_dim, layout)
    indices, offsets = rng.integers(0, len(table), 100), np.array([0, 10, 10, 90])
    for look_up in (
        lambda dtype: table.gather(indices, dtype),
        lambda dtype: table.embedding_bag(indices, offsets, "mean", dtype=dtype),
    ):
        wide = look_up("float32")
        np.testing.assert_array_equal(look_up("float16"), wide.astype(np.float16))
        np.testing.assert_array_equal(look_up("bfloat16"), as_bfloat16(wide))


# The widest float16 row: with 15 steps of 8736, its highest level lies at 65536.
WIDEST = np.float16([-65504, 65504, 0, 100, -100, 5, 6, 7])


@pytest.mark.parametrize("rotate", [None, "hadamard"])
@pytest.mark.parametrize("method", ["asym", "optimal", "kmeans", "kmeans-cls:K=3", "trellis"])
def test_finite_weights_have_finite_values(isa, method, rotate):
    table = embpack.quantize(np.tile(WIDEST, (20, 1)), method, rotate=rotate, **_room(method, rotate))
    indices = np.arange(20).reshape(4, 5)
    for dtype in ("float16", "bfloat16"):
        rows = reference.dequantize(*_parts(table), dtype=dtype)
        assert np.isfinite(widen(rows) if dtype == "bfloat16" else rows).all()
        np.testing.assert_array_equal(table.dequantize(dtype), rows)
        np.testing.assert_array_equal(table.gather(indices, dtype), rows[indices])
        for mode in ("sum", "mean", "max"):
            pooled = table.embedding_bag(indices, mode=mode)
            np.testing.assert_array_equal(table.embedding_bag(indices, mode=mode, dtype=dtype), narrow(pooled, dtype))
            group = embpack.TableGroup([table], modes=mode)
            found = group.embedding_bag(indices.reshape(-1), lengths=[5] * 4, dtype=dtype)
            np.testing.assert_array_equal(found, narrow(pooled, dtype))
    if method == "asym" and rotate is None:
        assert [table[0, 1], table.gather(0, "float16")[1]] == [65536, 65504]
        np.testing.assert_array_equal(
            table.embedding_bag([[0, 0]], mode="sum", dtype="float16")[0, :3], np.float16([-65504, 65504, -8704])
        )


def _room(method, rotate):
    """Rotated rows have sums of these values, which float16 parameters cannot hold."""
    return {"param_dtype": "float32"} if rotate and method != "trellis" else {}


def _parts(table):
    return table.packed, table.row_format, table.clusters, table.codebooks


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_any_values_leave_as_in_the_reference(isa, rng, bits, dtype):
    """Parameters of any bits: infinities and NaN stay, and float32 sums that overflow are infinite."""
    row_format = RowFormat(37, bits, "float32")
    table = embpack.PackedTable(rng.integers(0, 256, (500, row_format.row_bytes), np.uint8), row_format)
    rows = reference.dequantize(table.packed, row_format, dtype=dtype)
    assert_same_values(table.dequantize(dtype), rows)
    pooled = table.embedding_bag(np.arange(500).reshape(-1, 4), mode="sum")
    assert np.isinf(pooled).any() and np.isnan(pooled).any() and (np.abs(pooled[np.isfinite(pooled)]) > 65504).any()
    found = table.embedding_bag(np.arange(500).reshape(-1, 4), mode="sum", dtype=dtype)
    assert_same_values(found, narrow(pooled, dtype))


def assert_same_values(found, wanted):
    """NaN has many bits."""
    found, wanted = (widen(values) for values in (found, wanted))
    np.testing.assert_array_equal(found, wanted)


def test_bfloat16_keeps_infinity_and_nan(isa):
    packed = np.zeros((3, 6), np.uint8)
    packed[:, 2:].view(np.float16)[:] = [[0, np.inf], [0, np.nan], [0, 65504]]
    values = embpack.PackedTable.from_packed(packed, 4).gather([0, 1, 2], "bfloat16")
    wide = (values.astype(np.uint32) << 16).view(np.float32)
    assert np.isinf(wide[0]).all() and np.isnan(wide[1]).all() and (wide[2] == 65536).all()


def test_an_unknown_dtype_is_refused(rng):
    with pytest.raises(ValueError, match="dtype is 'float64'; choose one of float32, float16, bfloat16"):
        make_table(rng, 4).gather([0], "float64")


def test_rows_past_four_gibibytes(isa, tmp_path):
    """A sparse file: only its last rows are ever written or read."""
    row_format = RowFormat(64)
    num_rows = 2**32 // row_format.row_bytes + 1000
    packed = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=(num_rows, row_format.row_bytes))
    last = make_table(np.random.default_rng(1), 64)
    packed[-len(last) :] = last.packed
    table = embpack.PackedTable(packed, row_format)
    assert table.nbytes > 2**32
    indices = np.arange(num_rows - len(last), num_rows)
    np.testing.assert_array_equal(table[indices], last.dequantize())
    np.testing.assert_array_equal(
        table.embedding_bag(indices, [0, 5], "sum"), last.embedding_bag(np.arange(len(last)), [0, 5], "sum")
    )


@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize("access", get_args(Access))
def test_loaded_tables_look_up_alike(rng, tmp_path, layout, access):
    table = make_table(rng, 20, layout)
    embpack.save(tmp_path / "t.safetensors", {"t": table})
    loaded = embpack.load(tmp_path / "t.safetensors", access=access)["t"]
    np.testing.assert_array_equal(loaded.dequantize(), table.dequantize())
    if access != "disk":
        assert is_mapped(loaded.packed) is (access == "mapped")
        assert loaded.packed.flags.writeable is (access == "memory")


def test_a_table_that_was_used_can_be_pickled(rng):
    table = make_table(rng, 20)
    rows = table.dequantize()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(table)).dequantize(), rows)


def test_a_data_loader_worker_looks_up(rng):
    data = pytest.importorskip("torch.utils.data")
    table = make_table(rng, 24, num_embeddings=3000)
    table.embedding_bag(np.arange(3000).reshape(-1, 20), mode="sum")  # The parent has used its threads.

    class Pooled(data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return table.embedding_bag(np.arange(3000).reshape(-1, 20) // (i + 1), mode="sum")

    loader = data.DataLoader(Pooled(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for i, found in enumerate(loader):
        np.testing.assert_array_equal(found.numpy(), Pooled()[i])


# --- TableGroup

GROUP_DIMS = (16, 5, 100)


@pytest.fixture
def tables(rng):
    return [make_table(rng, d, layout) for d, layout in zip(GROUP_DIMS, METHODS, strict=True)]


def make_bags(rng, features, batch, num_embeddings=40):
    lengths = rng.integers(0, 12, features * batch)
    return rng.integers(0, num_embeddings, lengths.sum()), lengths, np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_group_is_its_tables_side_by_side(isa, rng, restore_threads, tables, threads, dtype):
    embpack.set_num_threads(threads)
    table_of, modes = [2, 0, 1, 0], ["sum", "mean", "max", "sum"]
    group = embpack.TableGroup(tables, table_of, modes)
    batch = 300
    indices, lengths, offsets = make_bags(rng, 4, batch)
    found = group.embedding_bag(indices, offsets, dtype=dtype)
    wanted = [
        tables[table].embedding_bag(
            indices[offsets[f * batch] : offsets[(f + 1) * batch]],
            offsets[f * batch : (f + 1) * batch] - offsets[f * batch],
            mode,
            dtype=dtype,
        )
        for f, (table, mode) in enumerate(zip(table_of, modes, strict=True))
    ]
    np.testing.assert_array_equal(found, np.concatenate(wanted, axis=1))
    assert found.shape == (batch, sum(group.embedding_dims)) and found.flags.c_contiguous
    narrow = group.embedding_bag(indices.astype(np.int32), lengths=lengths.astype(np.int32), dtype=dtype)
    np.testing.assert_array_equal(narrow, found)


def test_a_group_with_weights(isa, rng, tables):
    group = embpack.TableGroup(tables)
    indices, _, offsets = make_bags(rng, 3, 10)
    weights = rng.standard_normal(len(indices)).astype(np.float32)
    found = group.embedding_bag(indices, offsets, per_sample_weights=weights)
    first = tables[0].embedding_bag(indices[: offsets[10]], offsets[:10], "sum", weights[: offsets[10]])
    np.testing.assert_array_equal(found[:, :16], first)


def test_a_group_of_one_and_a_batch_of_none(tables):
    group = embpack.TableGroup(tables[:1])
    assert group.embedding_bag(np.zeros(0, np.int64), np.zeros(1, np.int64)).shape == (0, 16)
    assert repr(group) == "TableGroup(1 tables, 1 features, 16 values)"


GROUP_ERRORS = {
    "index": (IndexError, {"indices": [1, 2, 40], "lengths": [1, 1, 1]}, "feature 2, table 2: indices[2] is 40"),
    "negative": (IndexError, {"indices": [-1, 2, 40], "lengths": [1, 1, 1]}, "feature 0, table 0: indices[0] is -1"),
    "both": (ValueError, {"indices": [1], "lengths": [1, 0, 0], "offsets": [0, 1, 1, 1]}, "give either"),
    "neither": (ValueError, {"indices": [1]}, "give either"),
    "lengths": (
        ValueError,
        {"indices": [1], "lengths": [1, 0]},
        "there are 2 bags; 3 features take a multiple of 3",
    ),
    "offsets": (
        ValueError,
        {"indices": [1], "offsets": [0, 1, 1]},
        "there are 2 bags, the last of 3 offsets being an end; 3 features take a multiple of 3",
    ),
    "no offsets": (ValueError, {"indices": [], "offsets": []}, "offsets are empty; with include_last_offset they end"),
    "sum": (ValueError, {"indices": [1, 2], "lengths": [1, 0, 0]}, "lengths add up to 1, but there are 2 indices"),
    "end": (ValueError, {"indices": [1, 2], "offsets": [0, 1, 1, 1]}, "offsets[3], where the last bag ends, is 1, but"),
    "sign": (ValueError, {"indices": [1], "lengths": [2, -1, 0]}, "lengths must be 1-D and not negative"),
    "order": (ValueError, {"indices": [1], "offsets": [0, 1, 0, 1]}, "offsets[2] is 0, less than offsets[1], 1"),
    "start": (ValueError, {"indices": [1], "offsets": [1, 1, 1, 1]}, "offsets[0] is 1; the first bag must start at 0"),
    "type": (TypeError, {"indices": [1.5], "lengths": [1, 0, 0]}, "indices are float64"),
    "shape": (ValueError, {"indices": [[1]], "lengths": [1, 0, 0]}, "indices have 2 dimensions"),
    "weights": (
        ValueError,
        {"indices": [1], "lengths": [1, 0, 0], "per_sample_weights": np.ones(2, np.float32)},
        "per_sample_weights have shape [2], indices [1]",
    ),
}


def test_a_group_says_which_feature_takes_no_weights(tables):
    group = embpack.TableGroup(tables, modes=["sum", "mean", "max"])
    weights = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="per_sample_weights go with mode 'sum' only, and feature 1 has mode 'mean'"):
        group.embedding_bag([1], lengths=[1, 0, 0], per_sample_weights=weights)


@pytest.mark.parametrize("what", GROUP_ERRORS)
def test_a_group_says_what_is_wrong(tables, what):
    error, arguments, message = GROUP_ERRORS[what]
    with pytest.raises(error) as caught:
        embpack.TableGroup(tables).embedding_bag(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "the group has no feature"),
        (([0, 3],), "table_of[1] is 3, but the group has 3 tables (valid: 0 to 2)"),
        (([0, 1], ["sum"]), "there are 1 modes for 2 features"),
        (([0], "middle"), "modes[0] is 'middle'; choose one of sum, mean, max"),
    ],
)
def test_a_group_that_cannot_be(tables, arguments, message):
    with pytest.raises(ValueError) as caught:
        embpack.TableGroup(tables, *arguments)
    assert message in str(caught.value)


def test_damaged_clusters_are_named(isa, rng):
    table = make_table(rng, 8, "clustered")
    table.clusters[7] = 200
    for look_up in (lambda: table[[3, 7]], lambda: table.embedding_bag([3, 7], [0]), lambda: table.dequantize()):
        with pytest.raises(embpack.FormatError, match="row 7 is of cluster 200, but the table has 3 codebooks"):
            look_up()
    with pytest.raises(embpack.FormatError, match="feature 0, table 0: row 7 is of cluster 200"):
        embpack.TableGroup([table]).embedding_bag([3, 7], [0, 2])


@pytest.mark.parametrize("bad", [40, -1, 2**62, -(2**62)])
@pytest.mark.parametrize("position", [0, 63, 64, 130, 199])
def test_the_first_index_out_of_range_is_named_wherever_it_is(isa, rng, restore_threads, bad, position):
    embpack.set_num_threads(3)
    table = make_table(rng, 64)
    indices = rng.integers(0, 40, (10, 20))
    indices.reshape(-1)[position] = bad
    indices.reshape(-1)[-1] = -5 if position < 199 else bad
    for look_up in (table.gather, table.embedding_bag):
        with pytest.raises(IndexError, match=rf"indices\[{position}\] is {bad}, but the table has 40 rows"):
            look_up(indices)


COPIES = {"pickle": lambda group: pickle.loads(pickle.dumps(group)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", COPIES)
def test_a_group_can_be_pickled_and_copied(rng, tmp_path, tables, way):
    embpack.save(tmp_path / "tables.safetensors", {"mapped": tables[0]})
    mapped = embpack.load(tmp_path / "tables.safetensors")["mapped"]
    group = embpack.TableGroup([mapped, *tables[1:]], [2, 0, 1, 0], ["sum", "mean", "max", "sum"])
    indices, lengths, _ = make_bags(rng, 4, 10)
    wanted = group.embedding_bag(indices, lengths=lengths)
    again = COPIES[way](group)
    assert (again.table_of, again.modes, repr(again)) == (group.table_of, group.modes, repr(group))
    np.testing.assert_array_equal(again.embedding_bag(indices, lengths=lengths), wanted)
    for one, other in zip(again.tables, group.tables, strict=True):
        assert np.shares_memory(one.packed, other.packed) == (way == "copy")
    (tmp_path / "tables.safetensors").write_bytes(b"")  # what was pickled or copied has bytes of its own
    if way != "copy":
        np.testing.assert_array_equal(again.embedding_bag(indices, lengths=lengths), wanted)


def test_a_group_takes_packed_tables_only(tables):
    with pytest.raises(TypeError, match=r"tables\[1\] is .*; it must be an embpack.PackedTable"):
        embpack.TableGroup([tables[0], np.zeros((4, 4), np.float32)])


class NamedGroup(embpack.TableGroup):
    """A group that is made in another way than its class."""

    def __init__(self, tables: dict[str, embpack.PackedTable]) -> None:
        super().__init__(list(tables.values()))
        self.names = list(tables)


@pytest.mark.parametrize("way", COPIES)
def test_a_subclass_of_a_group_can_be_pickled_and_copied(rng, tables, way):
    group = NamedGroup({f"table {number}": table for number, table in enumerate(tables)})
    again = COPIES[way](group)
    assert (type(again), again.names) == (NamedGroup, group.names)
    indices, lengths, _ = make_bags(rng, len(tables), 10)
    wanted = group.embedding_bag(indices, lengths=lengths)
    np.testing.assert_array_equal(again.embedding_bag(indices, lengths=lengths), wanted)


def test_a_group_goes_to_a_process_that_is_spawned(rng, tables):
    group = embpack.TableGroup(tables)
    indices, _, offsets = make_bags(rng, 3, 10)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(group.embedding_bag, indices, offsets).result()
    np.testing.assert_array_equal(found, group.embedding_bag(indices, offsets))


def pool_in_child(queue, group, indices, offsets):
    queue.put(group.embedding_bag(indices, offsets))


def test_a_group_works_after_fork_and_from_several_threads(rng, restore_threads, tables):
    embpack.set_num_threads(2)
    group = embpack.TableGroup(tables)
    indices, _, offsets = make_bags(rng, 3, 2000)
    wanted = group.embedding_bag(indices, offsets)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=pool_in_child, args=(queue, group, indices, offsets))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), wanted)
    child.join()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: group.embedding_bag(indices, offsets), range(8)):
            np.testing.assert_array_equal(found, wanted)

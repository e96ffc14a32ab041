"""PackedTable.update: rows packed as the table's are, in its place, while others look them up."""

import copy
import os
import pickle
import re
import threading
import warnings

import numpy as np
import pytest
import torch
from hard_rows import hard_rows

import embpack
from embpack import PackedTable, TableGroup, reference, updating
from embpack.layouts import RowFormat
from embpack.methods import METHODS, measure_loss
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, PackedLinear
from embpack.updating import assign, assign_reference, find_misfits, pack_like

N, D = 200, 20
SHARED = {"trellis", "kmeans-cls", "table"}


def message_of(error, function, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def weight(rng):
    return rng.standard_normal((N, D), np.float32)


@pytest.fixture
def rows(rng):
    return rng.standard_normal((7, D), np.float32)


INDICES = [3, 199, 0, 41, 40, 77, 120]

# Every method, at the bits that it has.
WAYS = [
    (name, bits, rotate)
    for name, method in METHODS.items()
    for bits in ((2, 3.5, 4, 6) if method.layout == "trellis" else (2, 4, 8))
    for rotate in (None, "hadamard")
]


# What rows become.


@pytest.mark.parametrize(("method", "bits", "rotate"), [way for way in WAYS if way[0] not in SHARED])
def test_rows_become_what_packing_the_whole_table_makes_of_them(method, bits, rotate, weight, rows):
    table = embpack.quantize(weight, method, bits, rotate=rotate)
    table.update(INDICES, rows)
    weight[INDICES] = rows
    assert table.packed.tobytes() == embpack.quantize(weight, method, bits, rotate=rotate).packed.tobytes()


@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("method", ["optimal", "greedy:b=100,r=0.5", "kmeans"])
def test_hard_rows_become_what_packing_the_whole_table_makes_of_them(method, param_dtype, weight):
    rows = np.stack([*hard_rows(D, 4, param_dtype).values()])
    table = embpack.quantize(weight, method, param_dtype=param_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are too small
        table.update(np.arange(len(rows)), rows)
        weight[: len(rows)] = rows
        wanted = embpack.quantize(weight, method, param_dtype=param_dtype)
    assert table.packed.tobytes() == wanted.packed.tobytes()


@pytest.mark.parametrize(("method", "bits", "rotate"), [way for way in WAYS if way[0] in ("trellis", "table")])
def test_the_same_values_become_the_same_bytes(method, bits, rotate, weight):
    table = embpack.quantize(weight, method, bits, rotate=rotate)
    before = table.copy()
    table.update(np.arange(0, N, 3), weight[::3], warn_share=1)
    assert table.packed.tobytes() == before.packed.tobytes()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_rows_of_clusters_get_the_codebook_with_the_least_error(bits, rotate, weight):
    table = embpack.quantize(weight, "kmeans-cls:K=9", bits, rotate=rotate)
    before = table.as_packed.dequantize()
    x = embpack.rotation.rotate(weight) if rotate else weight
    table.update(np.arange(N), weight, warn_share=1)
    after = table.as_packed.dequantize()
    errors = np.stack([np.square(x[..., None] - book.astype(np.float64)).min(-1).sum(-1) for book in table.codebooks])
    assert (table.clusters == errors.argmin(axis=0)).mean() > 0.99  # but for errors that rounding makes the same
    found = np.square(after.astype(np.float64) - x).sum(axis=1)
    np.testing.assert_allclose(found, errors.min(axis=0), rtol=1e-5)
    assert (found <= np.square(before.astype(np.float64) - x).sum(axis=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("embedding_dim", [1, 2, 15, 64, 129])
def test_assigned_codebooks_are_the_references(bits, embedding_dim, rng):
    rows = rng.standard_normal((60, embedding_dim)).astype(np.float32)
    codebooks = np.sort(rng.standard_normal((37, 2**bits)).astype(np.float16).astype(np.float32))
    rows[:5] = codebooks[:5, :1]  # ties of values, and with levels
    rows[5:10] = (codebooks[5:10, :1] + codebooks[5:10, 1:2]) * 0.5
    codebooks[30:] = codebooks[:7]
    codebooks[20, 1] = np.nan
    assert assign(rows, codebooks).tolist() == assign_reference(rows, codebooks).tolist()


def test_of_equal_codebooks_the_first_is_taken(rng):
    codebooks = np.sort(rng.standard_normal((3, 4)).astype(np.float32))
    codebooks = codebooks[[2, 1, 0, 1, 2, 0]]
    found = assign(rng.standard_normal((50, 8)).astype(np.float32), codebooks)
    assert set(found) <= {0, 1, 2}
    assert assign(np.zeros((0, 8), np.float32), codebooks).shape == (0,)


def test_a_damaged_codebook_is_not_taken(rng):
    codebooks = np.sort(rng.standard_normal((3, 4)).astype(np.float32))
    codebooks[0] = np.nan
    assert set(assign(rng.standard_normal((50, 8)).astype(np.float32), codebooks)) <= {1, 2}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_rows_of_every_type(dtype, library, weight, rows):
    as_torch = torch.from_numpy(rows).to(getattr(torch, dtype))
    given = as_torch
    if library == "numpy":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        given = rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    table = embpack.quantize(weight)
    table.update(INDICES, given)
    weight[INDICES] = as_torch.float().numpy()
    assert table.packed.tobytes() == embpack.quantize(weight).packed.tobytes()


def test_rows_in_any_order_of_memory(weight, rows):
    table, wanted = embpack.quantize(weight), embpack.quantize(weight)
    wanted.update(INDICES, rows)
    table.update(torch.tensor(INDICES, dtype=torch.int32), np.asfortranarray(rows))
    assert table.packed.tobytes() == wanted.packed.tobytes()


def test_of_an_index_that_is_named_twice_the_last_row_counts(weight, rows):
    table, wanted = embpack.quantize(weight), embpack.quantize(weight)
    report = table.update([5, 9, 5, 1, 9, 5, 2], rows)
    wanted.update([5, 1, 9, 2], rows[[5, 3, 4, 6]])
    assert report.num_rows == 4
    assert table.packed.tobytes() == wanted.packed.tobytes()
    assert report.loss == wanted.update([1, 2, 5, 9], rows[[3, 6, 5, 4]]).loss


def test_no_rows(weight):
    table = embpack.quantize(weight)
    before, loss = table.packed.tobytes(), table.loss
    assert table.update([], np.empty((0, D), np.float32)) == updating.UpdateReport(0, 0.0, 0)
    assert (table.packed.tobytes(), table.loss) == (before, loss)


def test_tables_of_many_chunks(rng):
    weight = rng.standard_normal((70_001, 64), np.float32)
    table = embpack.quantize(np.zeros_like(weight), "asym")
    table.update(np.arange(len(weight)), weight)
    wanted = embpack.quantize(weight, "asym")
    assert table.packed.tobytes() == wanted.packed.tobytes()
    assert table.loss == wanted.loss


# What is known of the table afterwards.


def test_loss_is_that_of_what_the_table_holds_or_unknown(weight, rows):
    table = embpack.quantize(weight, rotate="hadamard")
    rotated = table.as_packed
    report = table.update(INDICES, rows)
    assert report.num_rows == 7
    error = np.linalg.norm(rows - table.gather(INDICES)) / np.linalg.norm(rows)
    assert report.loss == pytest.approx(error, rel=1e-5)
    assert (table.loss, rotated.loss, table.as_packed.loss) == (None, None, None)
    assert "loss" not in repr(table)
    weight[INDICES] = rows
    table.update(np.arange(N), weight)
    assert table.loss == rotated.loss == embpack.quantize(weight, rotate="hadamard").loss
    rotated.update([0], embpack.rotation.rotate(rows[:1]))
    assert (table.loss, rotated.loss) == (None, None)


def test_a_saved_table_says_that_its_loss_is_unknown(weight, rows, tmp_path):
    table = embpack.quantize(weight)
    table.update(INDICES, rows)
    embpack.save(tmp_path / "t.safetensors", {"t": table})
    loaded = embpack.load(tmp_path / "t.safetensors", access="memory")["t"]
    assert loaded.loss is None
    assert loaded.packed.tobytes() == table.packed.tobytes()
    loaded.update(INDICES, rows)  # of a file in memory, too


def test_copies_and_pickles(weight, rows):
    table = embpack.quantize(weight, "kmeans-cls:K=5", rotate="hadamard")
    table.gather([0]), table.as_packed.gather([0])
    own = [table.copy(), copy.deepcopy(table), pickle.loads(pickle.dumps(table.as_packed))]
    shallow = copy.copy(table)
    table.update(INDICES, rows, warn_share=1)
    wanted = table.gather(INDICES).tobytes()
    assert shallow.gather(INDICES).tobytes() == wanted
    for each in own:
        assert each.gather(INDICES).tobytes() != wanted
        assert each.loss is not None
        each.update(INDICES, rows, warn_share=1)
    assert own[0].gather(INDICES).tobytes() == own[1].gather(INDICES).tobytes() == wanted


# Who sees the change.


def test_lookups_of_all_kinds_see_it(weight, rows):
    for method in ("optimal", "kmeans-cls:K=5", "trellis"):
        table = embpack.quantize(weight, method, rotate="hadamard")
        group = TableGroup([table, embpack.quantize(weight)])
        vectors = rows[:2]
        for function in (table.gather, table.as_packed.gather):
            function(INDICES)
        table.linear(vectors), group.embedding_bag([3, 3], lengths=[1, 1])
        table.update(INDICES, rows, warn_share=1)
        anew = PackedTable(table.packed, table.row_format, clusters=table.clusters, codebooks=table.codebooks)
        assert table.gather(INDICES).tobytes() == anew.gather(INDICES).tobytes()
        assert table.as_packed.gather(INDICES).tobytes() == anew.as_packed.gather(INDICES).tobytes()
        assert table.linear(vectors).tobytes() == anew.linear(vectors).tobytes()
        assert group.embedding_bag([3, 3], lengths=[1, 1])[:, :D].tobytes() == anew.gather([3]).tobytes()
        group.tables[0].update([3], rows[:1], warn_share=1)
        assert group.embedding_bag([3, 3], lengths=[1, 1])[:, :D].tobytes() == anew.gather([3]).tobytes()
        assert table.gather([3]).tobytes() == anew.gather([3]).tobytes()


def test_clusters_that_are_not_contiguous_are_seen(weight, rows):
    packed = embpack.quantize(weight, "kmeans-cls:K=5")
    wide = np.stack([packed.clusters, packed.clusters], axis=1)
    table = PackedTable(packed.packed, packed.row_format, clusters=wide[:, 0], codebooks=packed.codebooks)
    table.gather([0])
    table.update(INDICES, rows, warn_share=1)
    wanted = reference.dequantize(table.packed, table.row_format, table.clusters, table.codebooks)
    assert table.dequantize().tobytes() == wanted.tobytes()


def test_clusters_have_numbers_that_their_type_holds(weight, rows):
    codebooks = np.sort(np.random.default_rng(0).standard_normal((300, 16)), axis=1).astype(np.float16)
    row_format = RowFormat(D, 4, "float16", "clustered")
    for dtype in (np.uint8, "<u2"):
        table = PackedTable(
            np.zeros((N, row_format.row_bytes), np.uint8),
            row_format,
            clusters=np.zeros(N, dtype),
            codebooks=codebooks,
        )
        table.update(INDICES, rows, warn_share=1)
        found = pack_like(row_format, "", codebooks[: np.iinfo(table.clusters.dtype).max + 1], rows)
        assert (table.clusters[INDICES] == found.clusters).all()
        assert np.isfinite(table.gather(INDICES)).all()


# Rows that do not fit.


@pytest.mark.parametrize("method", ["trellis", "kmeans-cls:K=20"])
def test_rows_that_the_shared_values_do_not_fit_are_counted_and_warned_of(method, rng):
    weight = rng.standard_normal((4000, 32), np.float32)
    table = embpack.quantize(weight, method)
    others = rng.standard_normal((1000, 32), np.float32)
    assert table.update(np.arange(1000), others).num_misfits == 0
    others[:30] *= 100
    with pytest.warns(
        UserWarning, match=r"30 of the 1,000 rows that changed do not fit .*; pack the table anew"
    ) as told:
        report = table.update(np.arange(1000), others)
    assert told[0].filename == __file__
    assert report.num_misfits == 30
    assert table.update(np.arange(1000), others, warn_share=0.03).num_misfits == 30
    with pytest.warns(UserWarning, match="30 of the 1,000"):
        table.update(np.arange(1000), others, warn_share=0)


def test_methods_that_share_nothing_have_no_misfits(weight, rows):
    assert embpack.quantize(weight).update(INDICES, rows * 1000).num_misfits == 0


def test_values_beyond_the_range_of_the_table_do_not_fit(weight, rows):
    table = embpack.quantize(weight, "table")
    assert table.update(INDICES, rows).num_misfits == 0
    with pytest.warns(UserWarning, match="7 of the 7"):
        table.update(INDICES, rows * 10)


@pytest.mark.parametrize("embedding_dim", [8, 16, 64])
@pytest.mark.parametrize("bits", [2, 3.5, 4, 6])
def test_a_trellis_table_has_few_misfits_of_its_own(embedding_dim, bits, rng):
    normal = rng.standard_normal((2000, embedding_dim))
    sizes = np.exp(rng.standard_normal((2000, 1)))
    for weight in (normal, normal * sizes, rng.standard_t(3, normal.shape), normal + 3 * normal[0]):
        table = embpack.quantize(weight.astype(np.float32), "trellis", bits)
        report = table.update(np.arange(2000), weight.astype(np.float32))
        assert report.num_misfits <= 0.01 * 2000


def test_rows_of_one_value_fit(rng):
    weight = rng.standard_normal((1000, 16), np.float32) + 2
    table = embpack.quantize(weight, "trellis")
    assert table.update(np.arange(100), np.zeros((100, 16), np.float32)).num_misfits == 0


def test_misfits_by_hand():
    x = np.array([[0, 1, 2, 3]] * 3, np.float32)
    # Of 2 bits a grid has steps of 1: 4/12 of four values. Trellis-coded rows of 5 bytes have 7 bits a value: 3/127.
    for layout, limit in (("clustered", 25 * 4 / 12), ("trellis", 4 * 4 / 12 * (3 / 127) ** 2)):
        row_format = RowFormat(4, 2, "float32", layout)
        decoded = x + np.sqrt([[0], [limit * 0.999], [limit * 1.001]]) * [1, 0, 0, 0]
        assert find_misfits(x, decoded.astype(np.float32), row_format).tolist() == [False, False, True]


def test_rows_too_small_for_float16_are_warned_of(weight):
    table = embpack.quantize(weight)
    with pytest.warns(UserWarning, match="2 of its rows come back no better than zeros"):
        table.update([0, 1], (np.full((2, D), 1e-9) * np.arange(D)).astype(np.float32))


# What is refused, and leaves the table as it was.


@pytest.mark.parametrize("method", ["optimal", "kmeans", "trellis", "kmeans-cls:K=3"])
@pytest.mark.parametrize("rotate", [None, "hadamard"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_and_named(method, rotate, value, weight, rows):
    table = embpack.quantize(weight, method, rotate=rotate)
    before, loss = table.copy(), table.loss
    rows[4, 2] = value
    assert message_of(ValueError, table.update, INDICES, rows) == (
        f"table[40, 2] is {value}; NaN and infinity cannot be packed, replace them first"
    )
    assert table.packed.tobytes() == before.packed.tobytes()
    assert table.loss == loss
    if table.clusters is not None:
        assert table.clusters.tobytes() == before.clusters.tobytes()


def test_rows_that_overflow_are_named(weight, rows):
    rows[1] *= 1e6
    table = embpack.quantize(weight)
    assert message_of(ValueError, table.update, INDICES, rows).startswith("table[199] has values from ")
    assert (table.packed == embpack.quantize(weight).packed).all()
    rows[1] = 3e38
    table = embpack.quantize(weight, param_dtype="float32", rotate="hadamard")
    assert "table[199] has values from 3e+38 to 3e+38, which become infinite when they are rotated" in message_of(
        ValueError, table.update, INDICES, rows
    )
    rows[1] = 1e19
    table = embpack.quantize(weight, "trellis")
    assert message_of(ValueError, table.update, INDICES, rows).startswith(
        "table[199]: a value is 1e+19 from its column's mean; 'trellis' takes at most 1e+18"
    )


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 200], IndexError, "indices[1] is 200, but the table has 200 rows (valid: 0 to 199)"),
        ([-1, 0], IndexError, "indices[0] is -1, but the table has 200 rows (valid: 0 to 199)"),
        (np.array([2**64 - 1, 0], np.uint64), IndexError, "indices[0] is 18446744073709551615, but the table"),
        ([[0, 1]], ValueError, "indices have 2 dimensions; they must be 1-D, one for each row"),
        (3, ValueError, "indices have 0 dimensions"),
        ([0.0, 1.0], TypeError, "indices are float64; they must be integers"),
        ([0, 1, 2], ValueError, "rows have shape [2, 20]; for these indices and this table they must be [3, 20]"),
        ([], ValueError, "rows have shape [2, 20]; for these indices and this table they must be [0, 20]"),
    ],
)
def test_wrong_indices(indices, error, message, weight):
    table = embpack.quantize(weight)
    assert message_of(error, table.update, indices, np.zeros((2, D), np.float32)).startswith(message)


def test_wrong_rows(weight):
    table = embpack.quantize(weight)
    assert message_of(TypeError, table.update, [0], np.zeros((1, D))).startswith("rows: weight is float64")
    assert "rows have shape [1, 19]" in message_of(ValueError, table.update, [0], np.zeros((1, D - 1), np.float32))
    assert "rows have shape [20]" in message_of(ValueError, table.update, [0], np.zeros(D, np.float32))


def test_a_mapped_table_is_refused_with_the_ways_out(weight, rows, tmp_path):
    path = tmp_path / "t.safetensors"
    embpack.save(path, {"t": embpack.quantize(weight)})
    table = embpack.load(path)["t"]
    assert re.search(
        r"mapped from a file.*access=\"memory\".*table\.copy\(\).*embpack update",
        message_of(ValueError, table.update, INDICES, rows),
    )
    private = torch.from_numpy(table.packed.view()) if table.packed.flags.writeable else None
    assert private is None or "mapped" in message_of(
        ValueError, PackedTable(private.numpy(), table.row_format).update, INDICES, rows
    )
    own = table.copy()
    own.update(INDICES, rows)
    assert own.packed.tobytes() != table.packed.tobytes()
    disk = embpack.load(path, access="disk")["t"]
    assert re.search(r"access=\"memory\".*embpack update", message_of(ValueError, disk.update, INDICES, rows))


def test_memory_that_is_read_only_is_refused(weight, rows):
    table = embpack.quantize(weight)
    fixed = PackedTable(np.frombuffer(table.packed.tobytes(), np.uint8).reshape(table.packed.shape), table.row_format)
    assert message_of(ValueError, fixed.update, INDICES, rows, method="optimal") == (
        "the table's memory is read-only; update table.copy()"
    )


def test_a_table_of_an_unknown_method_needs_one_named(weight, rows):
    packed = embpack.quantize(weight)
    table = PackedTable.from_packed(packed.packed.copy(), D)
    message = message_of(ValueError, table.update, INDICES, rows)
    assert message.startswith("table: which method packed its uniform rows is unknown; name one of asym, ")
    assert "makes codebook rows, but the table has uniform ones" in message_of(
        ValueError, table.update, INDICES, rows, method="kmeans"
    )
    assert "needs the table's range" in message_of(ValueError, table.update, INDICES, rows, method="table")
    assert "there is no method 'best'" in message_of(ValueError, table.update, INDICES, rows, method="best")
    table.update(INDICES, rows, method="optimal")
    packed.update(INDICES, rows)
    assert table.packed.tobytes() == packed.packed.tobytes()
    assert table.method == ""


def test_another_method_than_the_tables_is_refused(weight, rows):
    table = embpack.quantize(weight)
    assert message_of(ValueError, table.update, INDICES, rows, method="asym") == (
        "method is 'asym', but 'optimal:effort=normal' packed the table; leave method out"
    )
    table.update(INDICES, rows, method="optimal")


# Threads.


@pytest.mark.parametrize("method", ["optimal", "trellis", "kmeans-cls:K=300"])
def test_threads_see_rows_whole_before_or_after(method, rng, restore_threads):
    embpack.set_num_threads(2)
    count = 300 if method.startswith("kmeans") else 1500  # whose search takes long
    first, second = rng.standard_normal((2, count, 33), np.float32)
    table = embpack.quantize(first, method, rotate="hadamard")
    table.update(np.arange(count), second, warn_share=1)
    after = table.gather(np.arange(count)).view(np.uint32)
    table.update(np.arange(count), first, warn_share=1)
    before = table.gather(np.arange(count)).view(np.uint32)
    group, is_done, wrong, reads = TableGroup([table]), threading.Event(), [], [0, 0]

    def look_up(number):
        own = np.random.default_rng(number)
        while not is_done.is_set():
            rows = own.integers(0, count, int(own.choice([1, 20, 5000])))
            if number % 2:
                found = group.embedding_bag(rows, lengths=np.ones(len(rows), np.int64))
            else:
                found = table.gather(rows)
            bits = found.view(np.uint32)
            is_old, is_new = (bits == before[rows]).all(axis=1), (bits == after[rows]).all(axis=1)
            reads[0] += int(is_old.sum())
            reads[1] += int(is_new.sum())
            if not (is_old | is_new).all():
                wrong.append(rows[~(is_old | is_new)])

    threads = [threading.Thread(target=look_up, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        for values in (second, first):
            table.update(np.arange(count), values, warn_share=1)
    is_done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(reads) > 0


def test_a_fork_while_another_thread_updates_works(weight):
    table, is_done = embpack.quantize(weight), threading.Event()

    def update():
        while not is_done.is_set():
            table.update(np.arange(N), weight)

    thread = threading.Thread(target=update)
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks while threads run
        for _ in range(20):
            child = os.fork()
            if not child:
                table.update([0], weight[:1])
                os._exit(0 if table.gather([0]).shape == (1, D) else 1)
            assert os.waitpid(child, 0)[1] == 0
    is_done.set()
    thread.join()


def test_sums_are_those_of_the_packer(weight):
    table = embpack.quantize(weight, "trellis", 3.5, rotate="hadamard")
    update = pack_like(table.row_format, table.method, table.codebooks, weight)
    assert measure_loss(update.sums) == table.loss
    assert update.clusters is None
    assert update.packed.tobytes() == table.packed.tobytes()


def test_names_of_rows(weight):
    table = embpack.quantize(weight)
    weight[3, 1] = np.nan
    call = (table.row_format, table.method, None, weight)
    assert message_of(ValueError, pack_like, *call).startswith("rows[3, 1] is nan")
    numbers = np.arange(N) * 10
    assert message_of(ValueError, pack_like, *call, "table 'user'", numbers).startswith("table 'user'[30, 1] is nan")


# Modules of PyTorch.


@pytest.mark.parametrize("method", ["optimal", "kmeans", "trellis", "kmeans-cls:K=5"])
def test_modules_see_it(method, weight, rows):
    table = embpack.quantize(weight, method)
    wanted = table.copy()
    wanted.update(INDICES, rows, warn_share=1)
    values, indices, vectors = wanted.gather(INDICES), torch.tensor(INDICES), torch.from_numpy(rows)
    products = wanted.linear(rows)
    makers = {
        "embedding": lambda own: PackedEmbedding.from_table(own),
        "bag": lambda own: PackedEmbeddingBag.from_table(own),
        "linear": lambda own: PackedLinear.from_table(own),
    }
    for name, make in makers.items():
        module = make(table.copy())
        collection = PackedEmbeddingBagCollection({"t": module}) if name == "bag" else None

        def look_up(module=module, collection=collection, name=name):
            if name == "linear":
                return module(vectors)
            if collection is None:
                return module(indices)
            assert collection(indices[:, None]).equal(module(indices[:, None]))
            return module(indices[:, None])

        before, other = look_up(), copy.deepcopy(module)
        report = module.table.update(INDICES, rows, method=method, warn_share=1)
        assert report.num_rows == 7
        assert look_up().numpy().tobytes() == (products if name == "linear" else values).tobytes()
        assert not before.equal(look_up())
        assert module.state_dict()["packed"].numpy().tobytes() == wanted.packed.tobytes()
        if wanted.clusters is not None:
            assert module.state_dict()["clusters"].numpy().tobytes() == wanted.clusters.tobytes()
        assert other.table.packed.tobytes() == table.packed.tobytes()


def test_tables_of_a_collection_change_through_it(weight, rows):
    bags = {name: PackedEmbeddingBag.from_table(embpack.quantize(weight)) for name in ("a", "b")}
    collection = PackedEmbeddingBagCollection(bags)
    indices = torch.tensor(2 * INDICES)[:, None]
    before = collection(indices)
    collection.tables["b"].update(INDICES, rows, method="optimal")
    after = collection(indices)
    assert after[:, :D].equal(before[:, :D])
    assert after[:, D:].equal(bags["b"](torch.tensor(INDICES)[:, None]))
    assert not after[:, D:].equal(before[:, D:])


def test_tied_layers_see_it(weight, rows):
    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(weight))
    model.head = torch.nn.Linear(D, N, bias=False)
    model.head.weight = model.embedding.weight
    embpack.torch.quantize_(model, tied="share")
    model.embedding.table.update(INDICES, rows, method="optimal")
    looked_up = model.embedding(torch.arange(N))
    assert looked_up[INDICES].numpy().tobytes() == embpack.quantize(rows).dequantize().tobytes()
    torch.testing.assert_close(model.head(torch.from_numpy(rows)), torch.from_numpy(rows) @ looked_up.T)


def test_modules_that_return_other_types_see_it(weight, rows):
    module = PackedEmbedding.from_table(embpack.quantize(weight)).half()
    module.table.update(INDICES, torch.from_numpy(rows).half(), method="optimal")
    wanted = embpack.quantize(rows.astype(np.float16)).dequantize("float16")
    assert module(torch.tensor(INDICES)).numpy().tobytes() == wanted.tobytes()


def test_modules_whose_rows_are_elsewhere_are_refused(weight, rows, tmp_path):
    path = tmp_path / "t.safetensors"
    embpack.save(path, {"t": embpack.quantize(weight)})
    for access, message in (("mapped", "mapped from a file"), ("disk", "stay on the disk")):
        module = PackedEmbedding.from_table(embpack.load(path, access=access)["t"])
        assert message in message_of(ValueError, module.table.update, INDICES, rows, method="optimal")
    moved = PackedEmbedding.from_table(embpack.quantize(weight)).to("meta")
    assert message_of(ValueError, lambda: moved.table) == (
        "the rows are on meta; a table has them in memory: module.cpu().table"
    )

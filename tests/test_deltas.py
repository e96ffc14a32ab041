"""Rows that changed, read from files: where they go, which write is the last, their values; and bad ones refused."""

import re

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embpack import FormatError
from embpack.deltas import ColumnNames, LastWrites, last_writes, open_deltas
from embpack.deltas.opening import list_dumps, parse_delta


def write_dump(path, tables, step=None, **options):
    """Write a delta as TorchEasyRec does: rows of one table after those of the other, lists of any length."""
    columns = {
        "table_fqn": pa.array([name for name, (ids, _) in tables.items() for _ in ids], pa.string()),
        "key_id": pa.array([int(each) for ids, _ in tables.values() for each in ids], pa.int64()),
        "embedding": pa.array(
            [row for _, rows in tables.values() for row in rows],
            options.pop("lists", pa.list_(pa.from_numpy_dtype(next(iter(tables.values()))[1].dtype))),
        ),
    }
    if step is not None:
        columns["global_step"] = pa.array([step] * len(columns["key_id"]), pa.int64())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read_all(delta, dims):
    """Read all of a delta: by table its ids, steps and values."""
    keys = list(delta.iter_keys())
    found = {}
    for name in {each.table for each in keys}:
        own = [each for each in keys if each.table == name]
        positions, ids, steps = (np.concatenate([getattr(each, part) for each in own]) for part in PARTS)
        rows = []
        for batch in delta.iter_rows(positions, 12):
            some = positions[(positions >= batch.start) & (positions < batch.stop)]
            if len(some):
                rows.append(np.array(batch.take(some, dims[name])))
        found[name] = ids.tolist(), steps.tolist(), np.concatenate(rows)
    return found


PARTS = ("positions", "ids", "steps")


@pytest.fixture
def values(rng):
    return {name: (rng.integers(0, 50, n), rng.standard_normal((n, d), np.float32)) for name, n, d in TABLES}


TABLES = [("user", 30, 8), ("item", 20, 5)]
DIMS = {"user": 8, "item": 5}


@pytest.mark.parametrize("options", [{}, {"row_group_size": 7}, {"use_dictionary": False, "data_page_size": 1}])
def test_parquet_of_several_tables_is_read(tmp_path, values, options):
    path = write_dump(tmp_path / "d.parquet", values, 40, **options)
    with open_deltas([path]) as [delta]:
        assert delta.has_steps and delta.num_rows == 50
        found = read_all(delta, DIMS)
    for name, (ids, rows) in values.items():
        assert found[name][0] == ids.tolist() and found[name][1] == [40] * len(ids)
        np.testing.assert_array_equal(found[name][2], rows)


def test_lists_whose_lengths_are_right_on_average_alone_are_told_apart(tmp_path, rng):
    tables = {
        name: (np.arange(4), rng.standard_normal((4, d), np.float32)) for name, d in (("a", 5), ("user", 8), ("b", 11))
    }
    with open_deltas([write_dump(tmp_path / "d.parquet", tables)]) as [delta]:
        [batch] = delta.iter_rows(np.arange(4, 8), 12)
        [whole] = delta.iter_rows(np.arange(12), 12)
        for rows in (batch, whole):
            np.testing.assert_array_equal(rows.take(np.arange(4, 8), 8), tables["user"][1])


@pytest.mark.parametrize("lists", [pa.list_(pa.float32(), 8), pa.large_list(pa.float32()), pa.list_(pa.float16())])
def test_lists_of_other_types_are_read(tmp_path, rng, lists):
    ids, rows = np.arange(9), rng.standard_normal((9, 8)).astype(np.float16)
    path = write_dump(tmp_path / "d.parquet", {"user": (ids, rows)}, lists=lists, row_group_size=4)
    with open_deltas([path]) as [delta]:
        np.testing.assert_array_equal(read_all(delta, DIMS)["user"][2].astype(np.float16), rows)


def test_columns_have_other_names(tmp_path, rng):
    rows = rng.standard_normal((3, 8), np.float32)
    columns = {
        "t": pa.array(["user"] * 3).dictionary_encode(),
        "i": np.arange(3, dtype=np.uint8),
        "v": list(rows),
        "s": [1, 2, 3],
    }
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    with open_deltas([tmp_path / "d.parquet"], ColumnNames("t", "i", "v", "s")) as [delta]:
        ids, steps, found = read_all(delta, DIMS)["user"]
    assert ids == [0, 1, 2] and steps == [1, 2, 3]
    np.testing.assert_array_equal(found, rows)


def test_row_groups_without_wanted_rows_are_not_read(tmp_path, values):
    path = write_dump(tmp_path / "d.parquet", values, row_group_size=5)
    with open_deltas([path]) as [delta]:
        spans = [(batch.start, batch.stop) for batch in delta.iter_rows(np.array([6, 8, 31]), 12)]
    assert spans == [(6, 9), (31, 32)]


def test_an_empty_file_is_a_delta(tmp_path):
    path = write_dump(tmp_path / "d.parquet", {"user": (np.empty(0, int), np.empty((0, 8), np.float32))})
    with open_deltas([path]) as [delta]:
        assert delta.num_rows == 0 and not list(delta.iter_keys())


def test_files_of_hours_without_changes_are_deltas(tmp_path):
    pq.write_table(
        pa.table({name: pa.nulls(0) for name in ("table_fqn", "key_id", "embedding")}), tmp_path / "d.parquet"
    )
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "empty.npz", indices=np.array([]), rows=np.empty((0, 8), np.float32))
    with open_deltas([tmp_path / name for name in ("d.parquet", "none.npz", "empty.npz")]) as deltas:
        assert not any(len(keys.ids) for delta in deltas for keys in delta.iter_keys())


def test_arrays_are_read(tmp_path, values):
    arrays = {
        f"{name}.{part}": array
        for name, pair in values.items()
        for part, array in zip(("indices", "rows"), pair, strict=True)
    }
    np.savez(tmp_path / "d.npz", **arrays)
    ids, rows = values["user"]
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    np.save(tmp_path / "rows.npy", rows.astype(ml_dtypes.bfloat16))
    with open_deltas([tmp_path / "d.npz", f"user={tmp_path}/ids.npy,{tmp_path}/rows.npy"]) as [*archive, pair]:
        for delta, (name, (ids, rows)) in zip(archive, values.items(), strict=True):
            [(found_ids, _, found)] = [read_all(delta, DIMS)[name]]
            assert found_ids == ids.tolist()
            np.testing.assert_array_equal(found, rows)
        ids, _, found = read_all(pair, DIMS)["user"]
        assert ids == values["user"][0].tolist() and found.dtype == np.uint16  # bfloat16
        np.testing.assert_array_equal(found, values["user"][1].astype(ml_dtypes.bfloat16).view(np.uint16))


def test_a_name_of_files_is_taken_apart_where_files_are(tmp_path):
    for name in ("a=b.npz", "c,d.npy", "e.npy"):
        (tmp_path / name).touch()
    assert parse_delta(tmp_path / "a=b.npz") == (None, (tmp_path / "a=b.npz",))
    assert parse_delta(f"t=1={tmp_path}/a=b.npz") == ("t=1", (tmp_path / "a=b.npz",))
    assert parse_delta(f"t={tmp_path}/c,d.npy,{tmp_path}/e.npy") == ("t", (tmp_path / "c,d.npy", tmp_path / "e.npy"))
    assert parse_delta(f"{tmp_path}/c,d.npy,{tmp_path}/e.npy") == (None, (tmp_path / "c,d.npy", tmp_path / "e.npy"))


def test_dumps_come_by_step_and_rank(tmp_path, values):
    for name in ("step_9/x_step_9_rank_{}_of_2.parquet", "step_10/x_step_10_rank_{}_of_2.parquet"):
        for rank in (1, 0):
            write_dump(tmp_path / name.format(rank), values)
    write_dump(tmp_path / "x_step_2.parquet", values)
    (tmp_path / "step_10" / "x_step_10_rank_1_of_2.parquet.rank1.tmp").touch()
    (tmp_path / "notes.txt").touch()
    found = [path.name for path in list_dumps(tmp_path)]
    assert found == [
        "x_step_2.parquet",
        *("x_step_9_rank_0_of_2.parquet", "x_step_9_rank_1_of_2.parquet"),
        *("x_step_10_rank_0_of_2.parquet", "x_step_10_rank_1_of_2.parquet"),
    ]
    assert [path.name for path in list_dumps(tmp_path / "step_9")] == found[1:3]


@pytest.mark.parametrize("least", [1, 7, 1 << 20])
def test_the_last_write_of_each_id_is_found(monkeypatch, rng, least):
    monkeypatch.setattr(last_writes, "_LEAST_WAITING", least)
    ids, steps = rng.integers(0, 40, 500), rng.integers(0, 6, 500)
    writes, wanted = LastWrites(), {}
    for start in range(0, 500, 13):
        some = slice(start, min(start + 13, 500))
        writes.add(ids[some], steps[some], np.arange(500)[some])
    for row in range(500):
        last = wanted.get(ids[row], row)
        wanted[ids[row]] = row if steps[row] >= steps[last] else last
    rows, found = writes.finish()
    assert writes.num_added == 500
    assert dict(zip(found.tolist(), rows.tolist(), strict=True)) == wanted
    assert (np.diff(rows) > 0).all()


# Bad input.


def open_all(given, names=None):
    with open_deltas(given, names or ColumnNames()) as deltas:
        for delta in deltas:
            for keys in delta.iter_keys():
                for batch in delta.iter_rows(keys.positions, 12):
                    some = keys.positions[(keys.positions >= batch.start) & (keys.positions < batch.stop)]
                    batch.take(some, 8)


def refused(given, message, kind=ValueError, names=None):
    with pytest.raises(kind, match=re.escape(message)):
        open_all(given, names)


def test_what_is_no_list_is_refused(tmp_path):
    refused("d.parquet", "give a list of them: ['d.parquet']", TypeError)
    refused([], "there are no deltas")


def test_a_missing_file_is_named(tmp_path):
    refused([f"user={tmp_path}/d.npz"], f"user={tmp_path}/d.npz: no such file; give DELTA.parquet", FileNotFoundError)


def test_a_format_that_is_no_deltas_is_refused(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones(3))
    refused([tmp_path / "rows.npy"], "rows.npy: no delta ends in '.npy' alone; give DELTA.parquet")


def test_a_pair_of_other_files_is_refused(tmp_path):
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, x=1)
    refused([f"{tmp_path}/a.npz,{tmp_path}/b.npz"], "two files with a comma between are IDS.npy,ROWS.npy")


def test_a_pair_in_the_wrong_order_is_refused(tmp_path):
    np.save(tmp_path / "i.npy", np.arange(3))
    np.save(tmp_path / "r.npy", np.ones((3, 8), np.float32))
    refused([f"{tmp_path}/r.npy,{tmp_path}/i.npy"], "r.npy is F32 [3, 8]; ids are integers, in one dimension")


def test_rows_of_another_type_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", indices=np.arange(3), rows=np.ones((3, 8)))
    refused([tmp_path / "d.npz"], "d.npz: 'rows' is F64 [3, 8]; rows are [n, d] of float32")


def test_numbers_of_ids_and_rows_that_differ_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", indices=np.arange(4), rows=np.ones((3, 8), np.float32))
    refused([tmp_path / "d.npz"], "'indices' has 4 ids, but", ValueError)


def test_an_array_of_another_name_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", ids=np.arange(3), rows=np.ones((3, 8), np.float32))
    refused([tmp_path / "d.npz"], "array 'ids' is not called TABLE.indices or TABLE.rows", FormatError)


def test_an_array_alone_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", **{"user.rows": np.ones((3, 8), np.float32)})
    refused([tmp_path / "d.npz"], "has no array 'user.indices' beside 'user.rows'", FormatError)


def test_an_array_that_is_not_read_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", indices=np.arange(3), rows=np.ones((3, 8), np.float32), names=np.array(["a"]))
    refused([tmp_path / "d.npz"], "array 'names' (of type <U1) is neither ids nor rows; leave it out", FormatError)


def test_a_table_given_twice_is_refused(tmp_path, values):
    path = write_dump(tmp_path / "d.parquet", values)
    refused([f"user={path}"], "names its tables itself, such as 'column table_fqn'; leave user= out")
    np.savez(tmp_path / "d.npz", **{"user.indices": np.arange(3), "user.rows": np.ones((3, 8), np.float32)})
    refused([f"user={tmp_path}/d.npz"], "names its tables itself, such as 'user'; leave user= out")


def test_a_missing_column_is_named(tmp_path, values):
    path = write_dump(tmp_path / "d.parquet", values)
    refused([path], "has no column 'row'; nearest: ", FormatError, ColumnNames(rows="row"))
    refused([path], "has no column 'when'; nearest: ", FormatError, ColumnNames(step="when"))


def test_a_column_of_another_type_is_refused(tmp_path):
    pq.write_table(pa.table({"key_id": [1.5], "embedding": [[1.0]]}), tmp_path / "d.parquet")
    refused(
        [tmp_path / "d.parquet"], "column 'key_id' is double; tables are strings, ids and steps integers", FormatError
    )
    pq.write_table(pa.table({"key_id": [1], "embedding": [[1.0]]}), tmp_path / "d.parquet")
    refused([tmp_path / "d.parquet"], "convert its values before they are written", FormatError)


@pytest.mark.parametrize("column", ["table_fqn", "key_id", "embedding", "global_step"])
def test_a_null_is_refused(tmp_path, column):
    columns = {
        "table_fqn": ["user", "user"],
        "key_id": [1, 2],
        "embedding": pa.array([np.ones(8, np.float32)] * 2, pa.list_(pa.float32())),
        "global_step": [1, 1],
    }
    table = pa.table(columns)
    nulls = pa.nulls(1, table[column].type)
    at = table.column_names.index(column)
    table = table.set_column(at, column, pa.concat_arrays([table[column].chunk(0).slice(0, 1), nulls]))
    pq.write_table(table, tmp_path / "d.parquet")
    refused([tmp_path / "d.parquet"], f"d.parquet: column '{column}' is null in row 1; drop such rows or fill them")


def test_a_null_value_is_refused(tmp_path):
    rows = pa.array([[1.0] * 8, [1.0] * 7 + [None]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"key_id": [1, 2], "embedding": rows}), tmp_path / "d.parquet")
    refused([tmp_path / "d.parquet"], "column 'embedding' in row 1 has a value that is null")


def test_a_row_of_another_length_is_refused(tmp_path):
    rows = pa.array([[1.0] * 8, [1.0] * 7], pa.list_(pa.float32()))
    pq.write_table(pa.table({"key_id": [1, 2], "embedding": rows}), tmp_path / "d.parquet")
    refused([tmp_path / "d.parquet"], "column 'embedding' in row 1 has 7 values, but rows of this table have 8")


def test_a_row_of_bytes_of_another_length_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", indices=np.arange(3), rows=np.ones((3, 8), np.uint8))
    refused(
        [tmp_path / "d.npz"], "'rows'[0] has 8 bytes, but a row of uint8 of this table has 12: 8 codes, scale and bias"
    )


def test_rows_with_steps_beside_rows_without_are_refused(tmp_path, values):
    first, second = write_dump(tmp_path / "a.parquet", values, 3), write_dump(tmp_path / "b.parquet", values)
    refused([second, first], "a.parquet: column 'embedding' has steps that say when rows were written, but")


def test_a_missing_rank_is_named(tmp_path, values):
    write_dump(tmp_path / "step_3" / "x_step_3_rank_1_of_2.parquet", values)
    refused([tmp_path], "of step 3 the file of rank 0 of 2 is missing", FileNotFoundError)


def test_a_folder_without_dumps_is_refused(tmp_path):
    refused([tmp_path], "no *_step_*.parquet in this folder or its step_* folders", FileNotFoundError)


@pytest.mark.parametrize("cut", [10, 400])
def test_a_damaged_file_is_refused(tmp_path, values, cut):
    path = write_dump(tmp_path / "d.parquet", values)
    path.write_bytes(path.read_bytes()[:-cut])
    refused([path], "not a Parquet file, or damaged", FormatError)


def test_a_file_that_changes_between_readings_is_refused(tmp_path, values):
    path = write_dump(tmp_path / "d.parquet", values)
    with open_deltas([path]) as [delta]:
        list(delta.iter_keys())
        write_dump(path, values, 3)
        with pytest.raises(FormatError, match="run again when nobody writes to it"):
            list(delta.iter_rows(np.arange(50), 12))


def test_parquet_needs_pyarrow(tmp_path, values, hide_package):
    path = write_dump(tmp_path / "d.parquet", values)
    hide_package("pyarrow", "embpack.deltas.parquet", "embpack.formats.parquet")
    with pytest.raises(ImportError, match=r"reading .parquet files needs PyArrow: pip install '.*(pyarrow|parquet).*'"):
        open_all([path])


def test_a_long_name_of_many_rows_is_in_memory_once(tmp_path):
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), pa.array(["x" * 1_000_000]))
    columns = {"table_fqn": names, "key_id": range(3000), "embedding": pa.array([[0.0]] * 3000, pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet", store_schema=False, dictionary_pagesize_limit=1 << 24)
    before = pa.total_allocated_bytes()
    with open_deltas([tmp_path / "d.parquet"]) as [delta]:
        [keys] = delta.iter_keys()
        assert pa.default_memory_pool().max_memory() - before < 1 << 30
    assert len(keys.table) == 1_000_000 and len(keys.ids) == 3000


def test_more_values_than_rows_can_have_are_refused_before_they_are_read(tmp_path):
    # All zeros, of a kilobyte, and gigabytes in memory if there were a few more.
    lists = pa.ListArray.from_arrays(pa.array([0, *[5_000_000] * 9], pa.int32()), np.zeros(5_000_000, np.float32))
    pq.write_table(pa.table({"key_id": range(9), "embedding": lists}), tmp_path / "d.parquet")
    refused([tmp_path / "d.parquet"], "values in 9 rows, but rows of its tables have at most 12", FormatError)

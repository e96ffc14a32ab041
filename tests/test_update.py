"""Packed files whose rows change: the new bytes, what stays, the report; and that a file is old or new, whole."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Arrays, read_raw, run_python, write_safetensors
from golden.make import PACKED
from test_deltas import write_dump

import embpack
from embpack import FormatError, file_updates, rewriting, update_file
from embpack.formats import copying
from embpack.methods import METHODS
from embpack.packed_folder import list_own

ROWS, DIM = 10_000, 24
USER, ITEM = "user_emb.weight", "item_emb.weight"
METHODS_OF_LAYOUTS = ["asym", "kmeans", "kmeans-cls", "trellis", "optimal", "table"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(22)
    arrays = {
        "bottom.weight": rng.standard_normal((3, 5), np.float32),
        USER: rng.standard_normal((ROWS, DIM), np.float32),
        ITEM: rng.standard_normal((300, 16), np.float32),
    }
    return write_safetensors(tmp_path_factory.mktemp("source"), Arrays(arrays))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, source):
    """Pack the source by a method into a file, or a folder with the table in pieces, once."""
    folder = tmp_path_factory.mktemp("packed")

    def pack(kind, method="asym", **options):
        path = folder / f"{method}{''.join(map(str, options.values()))}{kind}"
        if not path.exists():
            size = None if kind else "100 kB"
            embpack.quantize_file(source, path, method=method, max_shard_size=size, **options)
        return path

    return pack


@pytest.fixture
def old(tmp_path, packed):
    """A copy of what is packed, which may be replaced."""

    def copy(kind, method="asym", **options):
        made, path = packed(kind, method, **options), tmp_path / f"old{kind}"
        return Path(shutil.copytree(made, path) if made.is_dir() else shutil.copyfile(made, path))

    return copy


@pytest.fixture
def delta(tmp_path, rng):
    """Ids, some of which are there twice, rows, and the file that has them."""
    ids, rows = rng.integers(0, ROWS, 700), rng.standard_normal((700, DIM), np.float32)
    np.savez(tmp_path / "delta.npz", **{"user_emb.indices": ids, "user_emb.rows": rows})
    return ids, rows, tmp_path / "delta.npz"


def bytes_of(path, name=USER):
    table = embpack.load(path, verify=True)[name]
    return [np.array(part).tobytes() for part in (table.packed, *table.beside)]


def updated(path, ids, rows, name=USER):
    """The bytes of a table of a file, in which rows were changed in memory."""
    table = embpack.load(path, access="memory")[name]
    table.update(ids, rows, warn_share=1)
    return [part.tobytes() for part in (table.packed, *table.beside)]


KINDS = [".safetensors", ""]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS_OF_LAYOUTS)
def test_rows_are_those_of_a_table_that_is_updated_in_memory(old, delta, kind, method):
    ids, rows, path = delta
    packed = old(kind, method)
    wanted, tables = updated(packed, ids, rows), set(embpack.load(packed)) - {USER}
    others = [bytes_of(packed, name) for name in tables]
    plain = {name: tensor.read() for name, tensor in others_of(packed).items()}
    report = update_file(packed, [path], warn_share=1)
    assert bytes_of(packed) == wanted and [bytes_of(packed, name) for name in tables] == others
    assert all(np.array_equal(tensor.read(), plain[name]) for name, tensor in others_of(packed).items())
    [table] = report.tables
    num_changed = len(np.unique(ids))
    assert (table.name, table.ids_seen, table.rows_changed, table.duplicates) == (
        USER,
        700,
        num_changed,
        700 - num_changed,
    )
    verify(packed)


def others_of(path):
    with embpack.packed_files.open_packed(path) as checkpoint:
        return checkpoint.others


def verify(path):
    with embpack.packed_files.open_packed(path) as checkpoint:
        checkpoint.verify()


@pytest.mark.parametrize("rotate", ["hadamard"])
def test_rows_are_rotated_as_the_table_is(old, delta, rotate):
    ids, rows, path = delta
    packed = old(".safetensors", rotate=rotate)
    wanted = updated(packed, ids, rows)
    update_file(packed, [path])
    assert bytes_of(packed) == wanted


def test_every_layout_is_updated():
    assert {METHODS[name].layout for name in METHODS_OF_LAYOUTS} == {method.layout for method in METHODS.values()}


def test_the_last_step_wins_whatever_the_order(tmp_path, old, rng):
    packed = old(".safetensors")
    rows = rng.standard_normal((3, DIM), np.float32)
    late = write_dump(tmp_path / "late.parquet", {USER: ([5, 7], rows[:2])}, 20)
    early = write_dump(tmp_path / "early.parquet", {"user_emb": ([5, 9], rows[1:])}, 10)
    wanted = updated(packed, [5, 7, 9], rows)
    for deltas in ([late, early], [early, late]):
        again = tmp_path / "again.safetensors"
        update_file(packed, deltas, again)
        assert bytes_of(again) == wanted


def test_without_steps_the_last_delta_wins(tmp_path, old, rng):
    packed = old(".safetensors")
    rows = rng.standard_normal((2, DIM), np.float32)
    for number, row in enumerate(rows):
        np.savez(tmp_path / f"{number}.npz", **{f"{USER}.indices": [5], f"{USER}.rows": [row]})
    wanted = updated(packed, [5], rows[1:])
    update_file(packed, [tmp_path / "0.npz", tmp_path / "1.npz"])
    assert bytes_of(packed) == wanted


def test_dumps_of_torch_easy_rec_are_applied(tmp_path, old, rng):
    """Several tables in a file, lists of their own length, several ranks, and a rank that has nothing."""
    packed, folder = old(""), tmp_path / "delta_embedding_dump"
    user, item = rng.standard_normal((4, DIM), np.float32), rng.standard_normal((3, 16), np.float32)
    name = "step_{0}/delta_embedding_step_{0}_rank_{1}_of_2.parquet"
    write_dump(folder / name.format(5, 0), {"user_emb": ([1, 2], user[:2]), "item_emb": ([7], item[:1])}, 5)
    write_dump(folder / name.format(5, 1), {"user_emb": (np.empty(0, int), user[:0])}, 5)
    write_dump(folder / name.format(40, 0), {"item_emb": ([7, 8], item[1:])}, 40)
    write_dump(folder / name.format(40, 1), {"user_emb": ([2, 9999], user[2:])}, 40)
    wanted = updated(packed, [1, 2, 9999], user[[0, 2, 3]]), updated(packed, [7, 8], item[1:], ITEM)
    report = update_file(packed, [folder])
    assert (bytes_of(packed), bytes_of(packed, ITEM)) == wanted
    assert [(table.name, table.rows_changed, table.duplicates) for table in report.tables] == [
        (ITEM, 2, 1),
        (USER, 3, 1),
    ]


def int8_rows(rows):
    fbgemm = pytest.importorskip("fbgemm_gpu") and torch.ops.fbgemm
    return fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(torch.from_numpy(rows), 8).numpy()


def test_rows_of_fbgemm_are_taken_as_they_are_where_the_table_has_such(tmp_path, old, rng):
    packed = old(".safetensors", "optimal", bits=8, param_dtype="float16")
    rows = int8_rows(rng.standard_normal((5, DIM), np.float32))
    path = write_dump(tmp_path / "d.parquet", {USER: (np.arange(5) * 7, rows)})
    [table] = update_file(packed, [path]).tables
    assert np.array_equal(embpack.load(packed)[USER].packed[:35:7], rows)
    assert table.loss_changed == 0


def test_rows_of_fbgemm_are_packed_anew_where_it_has_others(tmp_path, old, rng):
    packed = old(".safetensors")
    rows = int8_rows(rng.standard_normal((5, DIM), np.float32))
    values = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(torch.from_numpy(rows), 8).numpy()
    np.savez(tmp_path / "d.npz", **{f"{USER}.indices": np.arange(5), f"{USER}.rows": rows})
    wanted = updated(packed, np.arange(5), values)
    update_file(packed, [tmp_path / "d.npz"])
    assert bytes_of(packed) == wanted


def test_a_file_of_one_table_needs_no_name(tmp_path, rng):
    rows = rng.standard_normal((3, 8), np.float32)
    embpack.save(tmp_path / "one.safetensors", {"t": embpack.quantize(rng.standard_normal((50, 8), np.float32))})
    np.save(tmp_path / "i.npy", [4, 2, 4])
    np.save(tmp_path / "r.npy", rows)
    wanted = updated(tmp_path / "one.safetensors", [2, 4], rows[1:], "t")
    update_file(tmp_path / "one.safetensors", [f"{tmp_path}/i.npy,{tmp_path}/r.npy"])
    assert bytes_of(tmp_path / "one.safetensors", "t") == wanted


# What stays, and what is honest.


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_the_old_file_mapped_goes_on_with_it(old, delta, kind):
    packed = old(kind)
    mapped = embpack.load(packed)[USER]
    before = np.array(mapped.packed)
    update_file(packed, [delta[2]])
    assert np.array_equal(mapped.packed, before) and bytes_of(packed) != [before.tobytes()]


def test_mode_and_header_stay(old, delta):
    packed = old(".safetensors")
    packed.chmod(0o640)
    before = packed.stat()
    update_file(packed, [delta[2]])
    after = packed.stat()
    assert (after.st_mode, after.st_size) == (before.st_mode, before.st_size) and after.st_ino != before.st_ino


def test_a_link_stays_a_link(tmp_path, old, delta):
    packed = old(".safetensors")
    (tmp_path / "link.safetensors").symlink_to(packed)
    update_file(tmp_path / "link.safetensors", [delta[2]])
    assert (tmp_path / "link.safetensors").is_symlink() and embpack.load(packed)[USER].loss is None


def test_files_without_changes_are_the_old_ones(tmp_path, old, rng):
    packed = old("")
    (packed / "notes").mkdir()
    (packed / "notes" / "mine.txt").write_text("kept")
    (packed / "link").symlink_to("notes/mine.txt")
    np.savez(tmp_path / "d.npz", **{f"{USER}.indices": [0], f"{USER}.rows": np.ones((1, DIM), np.float32)})
    before = {path.name: path.lstat().st_ino for path in packed.iterdir()}
    report = update_file(packed, [tmp_path / "d.npz"])
    changed = {path.name for path in packed.iterdir() if path.lstat().st_ino != before[path.name]}
    assert changed == {*report.files, "model.embpack.safetensors.index.json", "notes"} and len(report.files) == 1
    assert (packed / "notes" / "mine.txt").read_text() == (packed / "link").read_text() == "kept"
    assert report.files[0] in list_own(packed)
    verify(packed)


@pytest.mark.parametrize("kind", KINDS)
def test_another_file_is_written(tmp_path, old, delta, kind):
    packed, new = old(kind), tmp_path / f"new{kind}"
    before, wanted = bytes_of(packed), updated(packed, *delta[:2])
    for _ in range(2):  # what embpack wrote is replaced
        update_file(packed, [delta[2]], new)
    assert bytes_of(packed) == before and bytes_of(new) == wanted
    verify(new)


def test_an_updated_folder_is_replaced_by_the_next_run(old, delta, source):
    packed = old("")
    update_file(packed, [delta[2]])
    embpack.quantize_file(source, packed, method="asym", max_shard_size="100 kB")
    assert embpack.load(packed, verify=True)[USER].loss is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_unknown_unless_all_rows_change(tmp_path, old, rng, kind):
    packed = old(kind)
    before = embpack.load(packed)[USER].loss
    rows = rng.standard_normal((ROWS, DIM), np.float32)
    for count in (ROWS - 1, ROWS):
        np.savez(tmp_path / "d.npz", **{f"{USER}.indices": np.arange(count), f"{USER}.rows": rows[:count]})
        [table] = update_file(packed, [tmp_path / "d.npz"]).tables
        assert table.loss_before == before
        before = table.loss_after
        assert before == (embpack.load(packed)[USER].loss if count == ROWS else None)
    assert table.loss_after == pytest.approx(embpack.quantize(rows, "asym").loss, rel=1e-12)
    assert table.loss_changed == pytest.approx(table.loss_after, rel=1e-12)


def test_a_piece_that_changes_whole_has_a_loss_of_its_own(tmp_path, old, rng):
    packed, rows = old(""), rng.standard_normal((4096, DIM), np.float32)
    np.savez(tmp_path / "d.npz", **{f"{USER}.indices": np.arange(4096), f"{USER}.rows": rows})
    [table] = update_file(packed, [tmp_path / "d.npz"]).tables
    weight = embpack.load(packed)[USER]
    assert table.loss_after == weight.loss is not None


def test_a_loss_of_zero_leaves_room_for_none(tmp_path):
    path = tmp_path / "zeros.safetensors"
    embpack.save(path, {"t": embpack.quantize(np.zeros((20, 8), np.float32), "asym")})
    np.savez(tmp_path / "d.npz", indices=[3], rows=np.ones((1, 8), np.float32))
    before = path.stat().st_size
    update_file(path, [tmp_path / "d.npz"])
    assert embpack.load(path, verify=True)["t"].loss is None and path.stat().st_size == before
    np.savez(tmp_path / "d.npz", indices=np.arange(20), rows=np.random.default_rng(0).random((20, 8), np.float32))
    update_file(path, [tmp_path / "d.npz"])
    assert embpack.load(path, verify=True)["t"].loss > 0 and path.stat().st_size == before


def test_rows_that_do_not_fit_are_counted_and_warned_of(tmp_path, old, rng):
    packed = old(".safetensors", "trellis")
    rows = 1e-4 * rng.standard_normal((40, DIM), np.float32)
    np.savez(tmp_path / "d.npz", **{f"{USER}.indices": np.arange(40), f"{USER}.rows": rows})
    [table] = update_file(packed, [tmp_path / "d.npz"], tmp_path / "a.safetensors").tables
    assert table.num_misfits > 20
    assert table.warning == (
        f"{table.num_misfits} of the 40 rows that changed do not fit what the table's rows share, and lose many times "
        "what they would by a grid of their own; pack the table anew"
    )
    [table] = update_file(packed, [tmp_path / "d.npz"], tmp_path / "a.safetensors", warn_share=1).tables
    assert table.warning is None


def test_a_dry_run_says_what_would_change(old, delta):
    packed = old(".safetensors")
    before = packed.read_bytes()
    report = update_file(packed, [delta[2]], dry_run=True)
    [table] = report.tables
    assert (table.rows_changed, table.num_misfits, table.loss_changed, table.loss_after) == (
        len(np.unique(delta[0])),
        *(None, None, None),
    )
    assert packed.read_bytes() == before


def test_deltas_without_rows_change_nothing(tmp_path, old):
    packed = old(".safetensors")
    np.savez(
        tmp_path / "d.npz", **{f"{USER}.indices": np.empty(0, int), f"{USER}.rows": np.empty((0, DIM), np.float32)}
    )
    before = packed.stat()
    assert update_file(packed, [tmp_path / "d.npz"]).tables == ()
    assert packed.stat().st_ino == before.st_ino
    update_file(packed, [tmp_path / "d.npz"], tmp_path / "new.safetensors")
    assert bytes_of(tmp_path / "new.safetensors") == bytes_of(packed)


def test_progress_comes_to_the_total(old, delta):
    packed, told = old(""), {}

    def progress(name, rows):
        told[name] = told.get(name, 0) + rows

    with file_updates.open_update(packed, [delta[2]], embpack.deltas.ColumnNames()) as update:
        totals = update.totals
        update.write(None, progress=progress)
    assert told == totals == {USER: len(np.unique(delta[0])) + ROWS}


# Ways to write.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["asym", "kmeans-cls"])
@pytest.mark.parametrize("way", ["flushed", "shared", "flushed and shared", "through memory", "one thread"])
def test_bytes_do_not_depend_on_how_they_are_written(old, delta, monkeypatch, restore_threads, kind, method, way):
    def share(source, target):
        copying.copy_bytes(source, target, 0, os.fstat(source).st_size)
        return True

    packed = old(kind, method)
    wanted = updated(packed, *delta[:2])
    monkeypatch.setattr(rewriting, "_PORTION_BYTES", 5000)
    if "flushed" in way:
        monkeypatch.setattr(rewriting, "MOST_WAITING_BYTES", 1000)
        monkeypatch.setattr("embpack.deltas.arrays._CHUNK_VALUES", 100 * DIM)
    if "shared" in way:
        monkeypatch.setattr(rewriting, "share_bytes", share)
    if way == "through memory":
        monkeypatch.delattr(os, "copy_file_range")
    if way == "one thread":
        embpack.set_num_threads(1)
    update_file(packed, [delta[2]])
    assert bytes_of(packed) == wanted
    verify(packed)


def test_links_that_a_file_system_lacks_are_copies(tmp_path, old, delta, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    packed, wanted = old(""), None
    wanted = updated(packed, *delta[:2])
    monkeypatch.setattr(os, "link", refuse)
    update_file(packed, [delta[2]])
    assert bytes_of(packed) == wanted
    verify(packed)


# Bad input and faults: nothing is written.


def refused(packed, deltas, message, kind=ValueError, **options):
    before = {path: path.read_bytes() for path in packed.parent.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=re.escape(message)):
        update_file(packed, deltas, **options)
    assert before == {path: path.read_bytes() for path in packed.parent.rglob("*") if path.is_file()}


def write_rows(path, ids, rows, name=USER):
    np.savez(path, **{f"{name}.indices": ids, f"{name}.rows": rows})
    return path


@pytest.mark.parametrize("wrong", [ROWS, -1, 2**63 + 5])
def test_an_id_out_of_range_is_named(tmp_path, old, wrong):
    ids = np.array([1, 2, wrong], np.uint64 if wrong > 2**62 else np.int64)
    path = write_rows(tmp_path / "d.npz", ids, np.ones((3, DIM), np.float32))
    message = f"{path}: '{USER}.indices'[2] is {wrong}, but table '{USER}' has {ROWS} rows (valid: 0 to {ROWS - 1})"
    refused(old(".safetensors"), [path], message, IndexError)


def test_an_id_out_of_range_is_named_in_parquet(tmp_path, old):
    path = write_dump(tmp_path / "d.parquet", {"item_emb": ([300], np.ones((1, 16), np.float32))})
    message = f"{path}: column 'key_id' in row 0 is 300, but table '{ITEM}' has 300 rows (valid: 0 to 299)"
    refused(old(""), [path], message, IndexError)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(tmp_path, old, value):
    rows = np.ones((4, DIM), np.float32)
    rows[2, 5] = value
    path = write_rows(tmp_path / "d.npz", [9, 8, 7, 6], rows)
    message = f"{path}: '{USER}.rows'[2] is {value} in column 5 of the row for id 7; NaN and infinity cannot be packed"
    refused(old(".safetensors"), [path], message)
    path = write_dump(tmp_path / "d.parquet", {USER: ([9, 8, 7, 6], rows)})
    refused(old(".safetensors"), [path], f"{path}: column 'embedding' in row 2 is {value} in column 5")


def test_parameters_of_bytes_that_are_not_finite_are_named(tmp_path, old):
    rows = np.full((1, DIM + 4), 255, np.uint8)
    refused(old(".safetensors"), [write_rows(tmp_path / "d.npz", [9], rows)], "is nan in column 0 of the row for id 9")


def test_a_row_that_overflows_is_named(tmp_path, old):
    rows = np.ones((2, DIM), np.float32)
    rows[1, 0] = 1e30
    path = write_rows(tmp_path / "d.npz", [3, 4], rows)
    packed = old(".safetensors")
    refused(packed, [path], f"{packed}: {USER}[4] has values from 1 to 1e+30: its scale or bias overflows float16")


def test_rows_of_another_width_are_refused(tmp_path, old):
    path = write_rows(tmp_path / "d.npz", [3], np.ones((1, 8), np.float32))
    refused(old(".safetensors"), [path], f"'{USER}.rows'[0] has 8 values, but rows of this table have {DIM}")


def test_an_unknown_table_is_named_with_the_nearest(tmp_path, old):
    path, packed = write_rows(tmp_path / "d.npz", [3], np.ones((1, 8), np.float32), "usr_emb"), old(".safetensors")
    message = f"{path}: 'usr_emb.rows': {packed} has no table 'usr_emb'; nearest: {USER}, {ITEM}"
    refused(packed, [path], message)


def test_a_name_of_two_tables_is_refused(tmp_path):
    table = embpack.quantize(np.ones((20, 8), np.float32))
    embpack.save(tmp_path / "p.safetensors", {"a": table, "a.weight.weight": table})
    path = write_rows(tmp_path / "d.npz", [3], np.ones((1, 8), np.float32), "a.weight")
    refused(tmp_path / "p.safetensors", [path], "has two tables that 'a.weight' may mean: a.weight.weight, a")


def test_rows_of_no_table_are_refused(tmp_path, old):
    np.savez(tmp_path / "d.npz", indices=[3], rows=np.ones((1, 8), np.float32))
    message = (
        "which table its rows are of is not said, and {} has 2: item_emb.weight, user_emb.weight; put the name in front"
    )
    packed = old(".safetensors")
    refused(packed, [tmp_path / "d.npz"], message.format(packed))


def test_a_table_that_no_method_is_known_of_needs_one(tmp_path, rng):
    made = embpack.quantize(rng.standard_normal((20, 8), np.float32), "asym")
    path = tmp_path / "p.safetensors"
    embpack.save(path, {"t": embpack.PackedTable.from_packed(made.packed, 8)})
    np.savez(tmp_path / "d.npz", indices=[3], rows=np.ones((1, 8), np.float32))
    refused(path, [tmp_path / "d.npz"], "which method packed its uniform rows is unknown; name one of")
    update_file(path, [tmp_path / "d.npz"], method="asym")
    assert np.allclose(embpack.load(path)["t"].dequantize()[3], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_altered_bytes_get_no_new_checksum(old, delta, kind):
    packed = old(kind)
    path = sorted(packed.glob("*-of-*"))[1] if packed.is_dir() else packed
    raw = read_raw(path)
    content = bytearray(path.read_bytes())
    name = next(name for name in raw.tensors if name.startswith(USER))
    content[content.index(raw.tensors[name].payload[:64]) + 3] ^= 1
    path.write_bytes(content)
    refused(packed, [delta[2]], f"{path}: table {name!r} was altered: its bytes are sha256:", FormatError)


def test_a_file_that_is_replaced_meanwhile_is_left_alone(old, delta, monkeypatch):
    packed = old(".safetensors")
    pack = file_updates.pack_changes

    def replace_first(*args, **options):
        shutil.copyfile(packed, packed.with_name("other"))
        packed.with_name("other").rename(packed)
        pack(*args, **options)

    monkeypatch.setattr(file_updates, "pack_changes", replace_first)
    with pytest.raises(FormatError, match="was replaced by another file while it was read; run again"):
        update_file(packed, [delta[2]])
    assert embpack.load(packed)[USER].loss is not None


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_updates_at_the_same_time_one_is_refused(tmp_path, old, delta, monkeypatch, kind):
    packed, second = old(kind), tmp_path / "second.npz"
    np.savez(second, **{"user_emb.indices": np.arange(9), "user_emb.rows": np.ones((9, DIM), np.float32)})
    refuse_changed = file_updates._refuse_changed

    def update_now(files):
        refuse_changed(files)  # from here on nothing of the file is looked at
        with pytest.raises(FileExistsError, match="is being updated by another process; run again when it is done"):
            update_file(packed, [second])

    monkeypatch.setattr(file_updates, "_refuse_changed", update_now)
    before = updated(packed, *delta[:2])
    update_file(packed, [delta[2]])
    assert bytes_of(packed) == before


def test_a_file_that_is_put_into_the_folder_meanwhile_is_not_lost(old, delta, monkeypatch):
    packed = old("")
    pack = file_updates.pack_changes

    def put_first(*args, **options):
        (packed / "new.txt").write_text("new")
        pack(*args, **options)

    monkeypatch.setattr(file_updates, "pack_changes", put_first)
    with pytest.raises(FileExistsError, match=r"nothing says that embpack wrote new\.txt"):
        update_file(packed, [delta[2]])
    assert embpack.load(packed)[USER].loss is not None and (packed / "new.txt").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_file(old, delta, monkeypatch, kind):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    packed = old(kind)
    monkeypatch.setattr(rewriting, "write_all", fail)
    message = f"cannot write {packed}: the disk is full, after"
    refused(packed, [delta[2]], message, OSError)


def test_a_full_disk_is_heard_of_where_rows_are_written_one_by_one(old, delta):
    """By a limit on the size of files, which the system keeps."""
    program = f"""
import resource, signal, embpack
from embpack import rewriting
rewriting.MOST_WAITING_BYTES = 1
rewriting.copy_bytes = lambda *_: None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
embpack.update_file({str(old(".safetensors"))!r}, [{str(delta[2])!r}])
"""
    done = run_python(program)
    assert done.returncode == 1 and "the largest size allowed for a file is reached" in done.stderr


def test_what_is_not_ours_is_not_replaced(tmp_path, old, delta):
    (tmp_path / "new.safetensors").write_bytes(b"mine")
    packed = old(".safetensors")
    refused(
        packed,
        [delta[2]],
        "is there already, and nothing says that embpack wrote it",
        FileExistsError,
        out=tmp_path / "new.safetensors",
    )
    update_file(packed, [delta[2]], tmp_path / "new.safetensors", force=True)
    assert bytes_of(tmp_path / "new.safetensors") == updated(packed, *delta[:2])


def test_the_new_one_is_of_the_same_kind(tmp_path, old, delta):
    refused(old(".safetensors"), [delta[2]], "so the new one ends in .safetensors", out=tmp_path / "new")
    refused(old(""), [delta[2]], "so the new one is, too; leave .safetensors out", out=tmp_path / "new.safetensors")


def test_one_of_several_files_is_refused(tmp_path, old, delta):
    """Its index would not know it any more."""
    packed = old("")
    shard = next(path for path in sorted(packed.glob("*-of-*")) if ITEM in read_raw(path).tensors)
    path = write_rows(tmp_path / "d.npz", [3], np.ones((1, 16), np.float32), ITEM)
    index = packed / "model.embpack.safetensors.index.json"
    refused(shard, [path], f"{shard}: is one of the files of {index}, which has a checksum of it; give that index")
    update_file(index, [path])
    verify(packed)


def test_what_is_not_packed_is_refused(source, delta):
    with pytest.raises(FormatError, match="holds no packed tables"):
        update_file(source, [delta[2]])


def test_uris_are_refused(embpack_command, old, delta):
    remote = "memory://models/model.safetensors"
    packed = old("")
    for arguments in ([remote, delta[2]], [packed, delta[2], "--out", remote]):
        code, _, err = embpack_command("update", *arguments)
        assert code == 1 and f"{remote}: only files of this machine are updated; copy it here" in err
    with pytest.raises(ValueError, match=r"^s3://models/d\.npz: deltas are files of this machine; copy it here"):
        update_file(packed, ["s3://models/d.npz"])


def test_a_file_of_version_1_is_refused(tmp_path):
    path = tmp_path / "v1.safetensors"
    shutil.copyfile(next(path for path in sorted(PACKED.iterdir()) if is_version_1(path)), path)
    [name, *_] = embpack.load(path)
    dim = embpack.load(path)[name].embedding_dim
    np.save(tmp_path / "i.npy", [0])
    np.save(tmp_path / "r.npy", np.ones((1, dim), np.float32))
    refused(path, [f"{name}={tmp_path}/i.npy,{tmp_path}/r.npy"], "format version 1 has no checksums of all that it has")


def is_version_1(path):
    return path.suffix == ".safetensors" and json.loads(read_raw(path).metadata["embpack"])["version"] == 1


# The command.


def test_the_command_prints_what_changed(embpack_command, old, delta):
    packed = old(".safetensors")
    code, out, err = embpack_command("update", packed, delta[2])
    assert (code, err) == (0, "")
    num_changed = len(np.unique(delta[0]))
    assert f"Updated {packed}" in out and USER in out and f"{num_changed} rows of 1 file in" in out
    assert re.search(rf"10,000 +{num_changed} +\S+ % +700 +{700 - num_changed} +0 +0\.\d+ +0\.\d+ +unknown", out)


def test_the_command_says_what_would_change(embpack_command, old, delta):
    packed = old("")
    before = bytes_of(packed)
    code, out, _ = embpack_command("update", packed, delta[2], "--dry-run")
    assert code == 0 and "rows of 3 files would change; nothing was written" in out and bytes_of(packed) == before


def test_the_command_has_options_for_all(embpack_command, tmp_path, old, rng):
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed, rows = old(".safetensors"), rng.standard_normal((2, DIM), np.float32)
    columns = {"table": [USER, USER], "row": [5, 5], "values": list(rows), "time": [2, 1]}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    wanted = updated(packed, [5], rows[:1])
    names = ["--table-column", "table", "--id-column", "row", "--row-column", "values", "--step-column", "time"]
    new = tmp_path / "new.safetensors"
    code, _, err = embpack_command("update", packed, tmp_path / "d.parquet", *names, "--out", new, "--threads", 1)
    assert (code, err) == (0, "") and bytes_of(new) == wanted


def test_the_command_warns(embpack_command, tmp_path, old, rng):
    packed = old(".safetensors", "trellis")
    path = write_rows(tmp_path / "d.npz", [1, 2], 1e-4 * rng.standard_normal((2, DIM), np.float32))
    _, out, _ = embpack_command("update", packed, path)
    assert "rows that changed do not fit what the table's rows share" in out


def test_the_command_fails_with_one_line(embpack_command, tmp_path, old):
    path = write_rows(tmp_path / "d.npz", [ROWS], np.ones((1, DIM), np.float32))
    code, out, err = embpack_command("update", old(".safetensors"), path)
    assert (code, out) == (1, "") and err.startswith("error: ") and f"is {ROWS}, but table" in err

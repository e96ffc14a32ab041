"""Packing by workers: the bytes of one process, whoever packs which range, in any order, twice, and after a death."""

import errno
import json
import pickle
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Arrays, names_in, write_parquet, write_safetensors, write_shards
from here import Here, Shared
from large_tables import make_qwen_fp8, make_torchrec, write_tensors

import embpack
from embpack.chunks import span_rows
from embpack.errors import EngineError, FormatError, LossLimitError
from embpack.formats.paths import as_path
from embpack.resuming import RECORD_NAME

UNFINISHED = ".packed.embpack-unfinished"


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    """Ranges of a span, so that tables of a test have several."""
    monkeypatch.setattr("embpack.ranges.chunk_rows", span_rows)
    monkeypatch.setattr("embpack.ranges._RANGE_VALUES", 1)


def make_arrays():
    rng = np.random.default_rng(5)
    tables = {
        "user_emb.weight": rng.standard_normal((50_000, 16), np.float32),
        "item_emb.weight": rng.standard_normal((9_000, 32)).astype(np.float16),
        "tag_emb.weight": rng.standard_normal((40, 8), np.float32),
    }
    return Arrays(tables, {"top.weight": np.ones((4, 4), np.float32)})


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("source"), make_arrays())


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pack_twice(src, folder, engine=None, **options):
    """Pack in this process and by workers, and compare; returns the engine."""
    engine, rows = engine or Here(), []
    report = embpack.quantize_file(src, folder / "whole", **options)
    own = embpack.quantize_file(
        src, folder / "packed", engine=engine, progress=lambda name, count: rows.append(count), **options
    )
    assert read_tree(folder / "packed") == read_tree(folder / "whole")
    assert sum(rows) == sum(table.num_embeddings for table in report.tables)
    for table, other in zip(own.tables, report.tables, strict=True):
        assert (table.name, table.loss, table.square_norm, table.method, table.warning, table.bytes_after) == (
            other.name,
            other.loss,
            other.square_norm,
            other.method,
            other.warning,
            other.bytes_after,
        )
    return engine


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "asym", "bits": 8},
        {"method": "trellis", "bits": 3.5},
        {"method": "trellis", "max_shard_size": "120 kB"},
        {"method": "kmeans-cls:K=30", "max_shard_size": "120 kB"},
        {"method": "kmeans", "bits": 2},
        {"method": "greedy", "rotate": "hadamard", "max_shard_size": "50 kB"},
    ],
)
def test_the_bytes_are_those_of_one_process(src, tmp_path, options):
    engine = pack_twice(src, tmp_path, **options)
    assert engine.started.count("pack_range") > 5
    # What trellis-coded rows share takes more bytes than the smallest table.
    assert engine.started.count("fit_table") == (2 if options.get("method") == "trellis" else 3)


@pytest.mark.parametrize("seed", range(5))
def test_tasks_may_be_done_in_any_order_and_twice(src, tmp_path, seed):
    pack_twice(src, tmp_path, Here(seed), method="asym", max_shard_size="100 kB")


def test_shards_a_parquet_file_and_fp8_in_pieces(tmp_path):
    vectors = Arrays({"emb.weight": make_arrays().tables["user_emb.weight"]})
    for name, make, arrays in (("shards", write_shards, make_arrays()), ("parquet", write_parquet, vectors)):
        (tmp_path / name).mkdir()
        pack_twice(make(tmp_path / name, arrays), tmp_path / name, method="asym")
    for number, published in enumerate((make_qwen_fp8(), make_torchrec())):
        (tmp_path / str(number)).mkdir()
        src = write_tensors(tmp_path / str(number) / "model.safetensors", published.tensors)
        pack_twice(src, tmp_path / str(number), method="asym")


def test_variants_of_tables(src, tmp_path):
    variants = {"user*": embpack.Variant("trellis", 3), "item*": embpack.Variant("asym", 8)}
    pack_twice(src, tmp_path, variants=variants)


def test_what_a_killed_worker_leaves_of_a_file_is_in_no_folder(src, tmp_path, monkeypatch):
    def leave(file, shown, shard):
        Path(file.name).with_name("left").write_bytes(b"half a file")
        write(file, shown, shard)

    write = embpack.ranges.write_safetensors
    monkeypatch.setattr("embpack.ranges.write_safetensors", leave)
    pack_twice(src, tmp_path, method="asym", max_shard_size="100 kB")
    assert not (tmp_path / UNFINISHED).exists()


class Kept(dict):
    """Tasks by their numbers, of which those that were submitted are remembered."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def __setitem__(self, task, text):
        self.texts.append(text)
        super().__setitem__(task, text)


class Dies(Here):
    """Raises an error once so many tasks are done."""

    def __init__(self, tasks, error):
        super().__init__()
        self.left, self.error = tasks, error

    def next_done(self):
        if not self.left:
            self.tasks.clear()
            raise self.error
        self.left -= 1
        return super().next_done()


def die(src, dst, tasks, error=None, **options):
    error = error or KeyboardInterrupt()
    with pytest.raises(type(error)) as caught:
        embpack.quantize_file(src, dst, engine=Dies(tasks, error), **options)
    return caught.value


@pytest.mark.parametrize("options", [{"method": "trellis"}, {"method": "asym", "max_shard_size": "100 kB"}])
@pytest.mark.parametrize("tasks", [4, 6, 8])
def test_parts_that_are_done_are_not_made_again(src, tmp_path, options, tasks):
    embpack.quantize_file(src, tmp_path / "whole", **options)
    error = die(src, tmp_path / "packed", tasks, **options)
    [work] = [path for path in tmp_path.iterdir() if path.name == UNFINISHED]
    record = json.loads((work / RECORD_NAME).read_text())
    whole = {number for number, name in enumerate(record["run"]["files"]) if name in record["files"]}
    known = [json.loads(path.read_text()) for path in work.glob("parts-*/*") if path.suffix == ".json"]
    left = [part for part in known if part["file"] not in whole]
    files = len(whole)
    assert f"{files} of " in error.__notes__[0] and "--resume" in error.__notes__[0]
    engine = Here()
    embpack.quantize_file(src, tmp_path / "packed", engine=engine, resume=True, **options)
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "whole")
    assert names_in(tmp_path) == {"whole", "packed"}
    fresh = Here()
    embpack.quantize_file(src, tmp_path / "other", engine=fresh, **options)
    # A file is of one range with these options, or there is just one file.
    made, again = (each.started.count("pack_range") for each in (fresh, engine))
    assert made - again == len(left) + files > 0
    assert fresh.started.count("assemble_file") - engine.started.count("assemble_file") == files


def test_one_process_goes_on_where_workers_were_and_the_other_way_round(src, tmp_path, monkeypatch):
    options = {"method": "asym", "max_shard_size": "100 kB"}
    embpack.quantize_file(src, tmp_path / "whole", **options)
    die(src, tmp_path / "packed", 9, **options)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **options)
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "whole")
    assert names_in(tmp_path) == {"whole", "packed"}


def test_parts_of_an_earlier_run_are_removed_with_a_warning(src, tmp_path):
    die(src, tmp_path / "packed", 5, method="asym")
    with pytest.warns(UserWarning, match=r"0 of 1 files, and \d+ ranges of rows of others, done, which are removed"):
        embpack.quantize_file(src, tmp_path / "packed", method="asym")
    assert names_in(tmp_path) == {"packed"}


def write_other(tmp_path):
    arrays = make_arrays()
    for table in arrays.tables.values():
        table *= 2
    (tmp_path / "other").mkdir()
    return write_safetensors(tmp_path / "other", arrays)


@pytest.mark.parametrize("store", ["", "memory:/"])
def test_a_worker_that_was_given_up_puts_nothing_among_parts_of_a_later_run(tmp_path, store):
    src = write_safetensors(tmp_path, make_arrays())
    dst, dead = f"{store}{tmp_path}/packed", Dies(6, KeyboardInterrupt())
    left = []
    dead.tasks = Kept(left)
    with pytest.raises(KeyboardInterrupt):
        embpack.quantize_file(src, dst, method="asym", engine=dead)
    other = write_other(tmp_path)
    embpack.quantize_file(other, tmp_path / "whole", method="asym")
    with pytest.warns(UserWarning, match="which are removed"):
        die(other, dst, 6, method="asym")
    for text in left:
        function, args = pickle.loads(text)
        with suppress(OSError):
            function(*(pickle.loads(each.text) if isinstance(each, Shared) else each for each in args))
    embpack.quantize_file(other, dst, method="asym", engine=Here(), resume=True)
    assert (
        as_path(f"{dst}/model.embpack.safetensors").read_bytes()
        == (tmp_path / "whole" / "model.embpack.safetensors").read_bytes()
    )


def test_many_tables_of_a_file_take_no_time_of_each_other(tmp_path, monkeypatch):
    def compare(self, other):
        raise AssertionError("pieces are told apart by what they are of")

    monkeypatch.setattr("embpack.shard_writer.PieceWriter.__eq__", compare)
    tables = {f"emb.{i}.weight": np.ones((20, 8), np.float32) * i for i in range(1, 30)}
    pack_twice(write_safetensors(tmp_path, Arrays(tables, {})), tmp_path, method="asym")


def test_other_options_are_refused(src, tmp_path):
    die(src, tmp_path / "packed", 5, method="asym")
    with pytest.raises(ValueError, match="cannot be resumed, for table"):
        embpack.quantize_file(src, tmp_path / "packed", method="sym", engine=Here(), resume=True)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"start": 0}', '{"file": 0, "sums": [[1, 2, 3, 4, 5]]}'])
def test_a_part_of_which_nothing_is_known_is_made_again(src, tmp_path, text):
    embpack.quantize_file(src, tmp_path / "whole", method="asym")
    die(src, tmp_path / "packed", 7, method="asym")
    known = [path for path in tmp_path.glob(f"{UNFINISHED}/parts-*/*") if path.suffix == ".json"]
    known[0].write_text(text)
    engine = Here()
    embpack.quantize_file(src, tmp_path / "packed", method="asym", engine=engine, resume=True)
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "whole") and names_in(tmp_path) == {"whole", "packed"}
    assert engine.started.count("pack_range") == 7 - (len(known) - 1)


class Damages(Here):
    """Alters a part before its file is assembled."""

    def __init__(self, folder, how, times=1):
        super().__init__()
        self.folder, self.how, self.times = folder, how, times

    def submit(self, function, *args, memory):
        if function.__name__ == "assemble_file" and self.times:
            self.times -= 1
            self.how(sorted(self.folder.glob(f"{UNFINISHED}/parts-*/*[0-9]"))[1])
        return super().submit(function, *args, memory=memory)


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("how", [flip, cut, lambda path: path.unlink()])
def test_a_damaged_part_is_packed_again(src, tmp_path, how):
    engine = pack_twice(src, tmp_path, Damages(tmp_path, how), method="kmeans-cls:K=20")
    assert engine.started.count("assemble_file") == 2


def test_a_part_that_stays_damaged_ends_the_run(src, tmp_path):
    with pytest.raises(FormatError, match=r"is not the part that was written \(its bytes are others\)"):
        embpack.quantize_file(src, tmp_path / "packed", method="asym", engine=Damages(tmp_path, flip, 2))
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda sources, mark, token: ([(sources[0][0].with_name("gone"), 1, 1)], mark, token), "gone: No such file"),
        (lambda sources, mark, token: ([(sources[0][0], 1, 1)], mark, token), "is another file there"),
        (lambda sources, mark, token: (sources, mark, "other"), "parts-[0-9a-f]{16} is another folder there"),
        (lambda sources, mark, token: (sources, mark.with_name("gone"), token), "parts-[0-9a-f]{16}: No such file"),
    ],
)
def test_a_machine_that_does_not_see_the_paths_is_named_before_work_begins(src, tmp_path, find, message):
    engine = Here()
    engine.machines["far"] = lambda function, args: function(*find(*args))
    with pytest.raises(
        EngineError, match=rf"packed: some machines do not see .*\(far: .*{message}.*on storage that all"
    ):
        embpack.quantize_file(src, tmp_path / "packed", method="asym", engine=engine)
    assert names_in(tmp_path) == set() and not engine.started


def test_a_faulty_row_is_named(tmp_path):
    arrays = make_arrays()
    arrays.tables["user_emb.weight"][40_001, 3] = np.nan
    src = write_safetensors(tmp_path, arrays)
    with pytest.raises(ValueError, match=r"user_emb.weight\[40001, 3\] is nan"):
        embpack.quantize_file(src, tmp_path / "packed", method="asym", engine=Here())
    assert names_in(tmp_path) == {src.name}


def test_a_loss_that_is_too_large_leaves_nothing(src, tmp_path):
    with pytest.raises(LossLimitError, match="user_emb"):
        embpack.quantize_file(src, tmp_path / "packed", method="asym", max_loss=1e-3, engine=Here())
    assert names_in(tmp_path) == set()


def test_a_full_disk_keeps_what_is_done(src, tmp_path):
    error = die(src, tmp_path / "packed", 6, OSError(errno.ENOSPC, "No space left on device"), method="asym")
    assert "the disk is full" in str(error) and "--resume" in str(error)
    assert names_in(tmp_path) == {UNFINISHED}


def test_workers_write_folders(src, tmp_path):
    with pytest.raises(ValueError, match=r"workers write the files of a folder; leave \.safetensors out"):
        embpack.quantize_file(src, tmp_path / "packed.safetensors", engine=Here())


def test_the_driver_holds_little_of_a_part(src, tmp_path, monkeypatch):
    kept = []

    def keep(self, name, part):
        kept.append(part)

    monkeypatch.setattr("embpack.resuming.Unfinished.keep_part", keep)
    with warnings.catch_warnings():
        embpack.quantize_file(src, tmp_path / "packed", method="asym", engine=Here())
    assert kept and all(len(part.sums) <= 3 for part in kept)


@pytest.mark.parametrize("options", [{"method": "asym", "max_shard_size": "100 kB"}, {"method": "kmeans-cls:K=20"}])
def test_a_destination_behind_a_uri(src, tmp_path, options):
    pytest.importorskip("upath")
    place = f"memory://distribution/{tmp_path.name}"
    embpack.quantize_file(src, tmp_path / "whole", **options)
    die(src, f"{place}/packed", 6, **options)
    engine = Here()
    embpack.quantize_file(src, f"{place}/packed", engine=engine, resume=True, **options)
    files = as_path(place).fs.find(as_path(place).path)
    found = {name.partition("/packed/")[2]: as_path(f"memory:/{name}").read_bytes() for name in files}
    assert found == read_tree(tmp_path / "whole")
    assert engine.started.count("pack_range") < (17 if "max_shard_size" in options else 7)

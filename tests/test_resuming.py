"""Runs that were interrupted, and go on: same bytes, and nothing that is not the same run's."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import Arrays, names_in, write_safetensors, write_shards

import embpack
from embpack.formats import safetensors
from embpack.methods.trellis_search import fit
from embpack.resuming import RECORD_NAME

OPTIONS = {"method": "trellis", "max_shard_size": "110 kB"}
UNFINISHED = ".packed.embpack-unfinished"


def make_arrays():
    rng = np.random.default_rng(3)
    tables = {
        "user_emb.weight": rng.standard_normal((13_000, 16), np.float32),
        "item_emb.weight": rng.standard_normal((9_000, 16)).astype(np.float16),
    }
    return Arrays(tables, {"top.weight": np.ones((4, 4), np.float32)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source, and what a run makes of it that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    src = write_safetensors(folder, make_arrays())
    report = embpack.quantize_file(src, folder / "packed", **OPTIONS)
    return src, report, read_tree(folder / "packed")


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stopped:
    """Has a run end after so many files are written, in the next one, by an error."""

    def __init__(self, monkeypatch, files, error):
        self.left, self.error, self.write = files, error, safetensors.write_safetensors
        monkeypatch.setattr("embpack.formats.sharded.write_safetensors", self)
        self.undo = monkeypatch.undo

    def __call__(self, file, path, shard):
        if not self.left:
            file.write(b"part of a file")
            raise self.error
        self.left -= 1
        self.write(file, path, shard)


def interrupt(monkeypatch, src, dst, files=3, error=None, **options):
    stopped = Stopped(monkeypatch, files, error or KeyboardInterrupt())
    with pytest.raises(type(stopped.error)) as caught:
        embpack.quantize_file(src, dst, **{**OPTIONS, **options})
    stopped.undo()
    return caught.value


def count_files(monkeypatch):
    """Count the files that are written from now on."""
    written, write = [], safetensors.write_safetensors

    def counted(file, path, shard):
        written.append(path.name)
        write(file, path, shard)

    monkeypatch.setattr("embpack.formats.sharded.write_safetensors", counted)
    return written


@pytest.mark.parametrize("files", [1, 3, 4])
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        RuntimeError("stopped by progress"),
    ],
)
def test_a_run_that_was_interrupted_goes_on(whole, tmp_path, monkeypatch, files, error):
    src, report, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed", files, error)
    assert names_in(tmp_path) == {UNFINISHED}
    written, rows = count_files(monkeypatch), []
    again = embpack.quantize_file(
        src, tmp_path / "packed", resume=True, progress=lambda name, count: rows.append(count), **OPTIONS
    )
    assert read_tree(tmp_path / "packed") == expected and names_in(tmp_path) == {"packed"}
    assert len(written) == sum(name.endswith(".safetensors") for name in expected) - files
    assert sum(rows) == 22_000
    for table, other in zip(again.tables, report.tables, strict=True):
        assert (table.loss, table.square_norm, table.method, table.warning, table.bytes_after) == (
            other.loss,
            other.square_norm,
            other.method,
            other.warning,
            other.bytes_after,
        )


def test_a_run_that_is_interrupted_again_and_again_goes_on(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed", 2)
    interrupt(monkeypatch, src, tmp_path / "packed", 1, resume=True)
    interrupt(monkeypatch, src, tmp_path / "packed", 0, resume=True)
    written = count_files(monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected
    assert len(written) == sum(name.endswith(".safetensors") for name in expected) - 3


def test_a_folder_of_shards_goes_on(tmp_path, monkeypatch):
    src = write_shards(tmp_path, make_arrays())
    (src / "config.json").write_text("{}")
    embpack.quantize_file(src, tmp_path / "whole", method="asym")
    interrupt(monkeypatch, src, tmp_path / "packed", 1, method="asym", max_shard_size=None)
    embpack.quantize_file(src, tmp_path / "packed", method="asym", resume=True)
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "whole")


def alter_record(path, **known):
    """Have what is known of a file be something else."""
    record = path.parents[1] / RECORD_NAME
    value = json.loads(record.read_text())
    value["files"][path.name].update(known)
    record.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-5] + b"\x01" + path.read_bytes()[-4:]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"loss', b'"lost', 1)),
        lambda path: path.write_bytes(path.read_bytes().replace(b"   ", b"  \t", 1)),
        lambda path: alter_record(path, header=None),
        lambda path: alter_record(path, pieces=[]),
        lambda path: alter_record(path, pieces={"user_emb.weight.piece_0": {"sums": [[10**400] * 4], "seconds": 0}}),
    ],
)
def test_a_file_that_is_not_as_it_was_is_made_again(whole, tmp_path, monkeypatch, damage):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed")
    damaged = sorted((tmp_path / UNFINISHED / "new").glob("*.safetensors"))[1]
    before = read_tree(tmp_path / UNFINISHED)
    damage(damaged)
    assert read_tree(tmp_path / UNFINISHED) != before
    written = count_files(monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected and damaged.name in written


def change_source(src):
    arrays = make_arrays()
    arrays.others["top.weight"] = arrays.others["top.weight"] * 2
    write_safetensors(src.parent, arrays)


def lengthen_source(src):
    arrays = make_arrays()
    arrays.others["more.weight"] = np.zeros((2, 2), np.float32)
    write_safetensors(src.parent, arrays)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            None,
            {"method": "asym"},
            r"table 'user_emb.weight' was trellis in trellis:16:4:float32 and is to be asym in ",
        ),
        (None, {"bits": 3}, r"was trellis in trellis:16:4:float32 and is to be trellis in trellis:16:3:float32"),
        (None, {"exclude": ["item*"]}, r"table 'item_emb.weight' was trellis in .* and is to be copied as it is"),
        (None, {"max_shard_size": "70 kB"}, r"the files get other tensors: max_shard_size .* is another"),
        (None, {"max_shard_size": None}, r"the files get other tensors: max_shard_size .* is another"),
        (lambda src: os.utime(src), {}, r"source 'model.safetensors' was written to since"),
        (change_source, {}, r"source 'model.safetensors' was written to since"),
        (lengthen_source, {}, r"source 'model.safetensors' had \d+ bytes and has \d+"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, monkeypatch, change, options, message):
    src = write_safetensors(tmp_path, make_arrays())
    interrupt(monkeypatch, src, tmp_path / "packed")
    before = read_tree(tmp_path / UNFINISHED)
    if change is not None:
        change(src)
    with pytest.raises(ValueError, match=f"packed: cannot be resumed, for .*{message}.*to begin anew"):
        embpack.quantize_file(src, tmp_path / "packed", resume=True, **{**OPTIONS, **options})
    assert {**before} == {name: read_tree(tmp_path / UNFINISHED)[name] for name in before}
    assert not (tmp_path / "packed").exists()


def test_codebooks_that_come_out_otherwise_are_refused(whole, tmp_path, monkeypatch):
    """Learned with another NumPy, or on another CPU, they may: nothing could load a table of both."""
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed", files=2)
    with monkeypatch.context() as elsewhere:

        def fit_otherwise(*arguments):
            parameters = fit(*arguments)
            return replace(parameters, mean=np.nextafter(parameters.mean, np.float32(9)))

        elsewhere.setattr("embpack.methods.trellis.fit", fit_otherwise)
        with pytest.raises(OSError, match=r"user_emb.weight: cannot be resumed here, for trellis.* to other codebooks"):
            embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    written = count_files(monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected and len(written) == 3


def test_another_version_is_refused(whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, whole[0], tmp_path / "packed")
    monkeypatch.setattr(embpack, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"cannot be resumed, for embpack was [\d.]+ and is 9.9; give what"):
        embpack.quantize_file(whole[0], tmp_path / "packed", resume=True, **OPTIONS)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "run": {}, "files": {}}', "[" * 9999]
)
def test_a_damaged_record_is_refused(whole, tmp_path, monkeypatch, text):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed")
    (tmp_path / UNFINISHED / RECORD_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{RECORD_NAME}: is damaged, so nothing can be resumed; leave out --resume"):
        embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    embpack.quantize_file(src, tmp_path / "packed", **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected and names_in(tmp_path) == {"packed"}


def test_without_resume_a_run_begins_anew_and_says_what_is_lost(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed")
    count = sum(name.endswith(".safetensors") for name in expected)
    message = f"packed: an earlier run was interrupted with 3 of {count} files done, which are removed; --resume"
    written = count_files(monkeypatch)
    with pytest.warns(UserWarning, match=message):
        embpack.quantize_file(src, tmp_path / "packed", **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected and len(written) == count


def test_nothing_of_an_earlier_run_gets_into_the_folder(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    for resume in (False, True):
        interrupt(monkeypatch, src, tmp_path / "packed")
        new = tmp_path / UNFINISHED / "new"
        (new / "of_another" / "folder").mkdir(parents=True)
        (new / "of_another" / "file").write_text("old")
        (new / "link").symlink_to(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            embpack.quantize_file(src, tmp_path / "packed", resume=resume, **OPTIONS)
        names = {path.relative_to(tmp_path / "packed").as_posix() for path in (tmp_path / "packed").rglob("*")}
        assert read_tree(tmp_path / "packed") == expected and names == set(expected)
        shutil.rmtree(tmp_path / "packed")


def test_with_nothing_to_resume_a_run_says_so_and_begins(whole, tmp_path):
    with pytest.warns(UserWarning, match="packed: there is nothing to resume, so packing begins"):
        embpack.quantize_file(whole[0], tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == whole[2]


def test_an_error_that_no_next_run_is_without_leaves_nothing(whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, whole[0], tmp_path / "packed", error=ValueError("a value is NaN"))
    assert names_in(tmp_path) == set()


def test_a_file_that_cannot_be_read_now_is_not_made_again(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed", 3)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("embpack.resuming.open_checkpoint", fail)
        with pytest.raises(OSError, match="Input/output error"):
            embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    written = count_files(monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected
    assert len(written) == sum(name.endswith(".safetensors") for name in expected) - 3


def test_an_interruption_before_a_file_is_whole_leaves_nothing(whole, tmp_path, monkeypatch):
    error = interrupt(monkeypatch, whole[0], tmp_path / "packed", files=0)
    assert names_in(tmp_path) == set() and not hasattr(error, "__notes__")


def test_one_file_cannot_be_resumed(embpack_command, whole, tmp_path):
    code, _, err = embpack_command("quantize", whole[0], tmp_path / "packed.safetensors", "--resume")
    assert code == 1 and "one file cannot be resumed, only a folder of files; leave .safetensors out" in err
    assert names_in(tmp_path) == set()


def test_other_runs_leave_what_can_be_resumed(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed")
    embpack.quantize_file(src, tmp_path / "other", method="asym")
    embpack.quantize_file(src, tmp_path / "other.safetensors", method="asym")
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected


def test_what_is_to_be_replaced_stays_until_the_end(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    embpack.quantize_file(src, tmp_path / "packed", method="asym")
    before = read_tree(tmp_path / "packed")
    interrupt(monkeypatch, src, tmp_path / "packed")
    assert read_tree(tmp_path / "packed") == before
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected and names_in(tmp_path) == {"packed"}


def test_a_folder_that_stays_where_it_is_goes_on(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    (tmp_path / "packed").mkdir()
    interrupt(monkeypatch, src, tmp_path / "packed")
    assert names_in(tmp_path / "packed") == {UNFINISHED}
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected


def test_a_folder_that_got_a_file_since_is_gone_on_with(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README\.md; choose another name, or write into it with --force"):
        embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    written = count_files(monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, force=True, **OPTIONS)
    assert len(written) == sum(name.endswith(".safetensors") for name in expected) - 3
    assert read_tree(tmp_path / "packed") == {**expected, "README.md": b"mine"}
    assert names_in(tmp_path) == {"packed"} and UNFINISHED not in names_in(tmp_path / "packed")


def test_a_run_goes_on_outside_of_the_folder_that_it_began_in(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    embpack.quantize_file(src, tmp_path / "packed", method="asym")
    with monkeypatch.context() as inside:
        inside.chdir(tmp_path / "packed")
        with pytest.raises(KeyboardInterrupt):
            Stopped(inside, 3, KeyboardInterrupt())
            embpack.quantize_file(src, ".", **OPTIONS)
    written = count_files(monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert len(written) == sum(name.endswith(".safetensors") for name in expected) - 3
    assert read_tree(tmp_path / "packed") == expected and names_in(tmp_path) == {"packed"}


def test_a_run_that_is_not_over_is_left_alone(whole, tmp_path, monkeypatch):
    src, _, expected = whole

    def run_another(name, rows):
        with pytest.raises(FileExistsError, match="packed is being written by another process"):
            embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)

    embpack.quantize_file(src, tmp_path / "packed", progress=run_another, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected


def test_too_little_space_is_refused_at_once(whole, tmp_path, monkeypatch):
    src = whole[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=200_000))
    for name in ("packed", "packed.safetensors"):
        size = OPTIONS["max_shard_size"] if name == "packed" else None
        with pytest.raises(OSError, match=rf"cannot write .*{name}: it takes at least \d+ bytes, but 200000 bytes are"):
            embpack.quantize_file(src, tmp_path / name, method="trellis", max_shard_size=size)
    assert names_in(tmp_path) == set()


def test_less_space_is_needed_for_what_is_left(whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed", files=len(expected) - 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=120_000))
    embpack.quantize_file(src, tmp_path / "packed", resume=True, **OPTIONS)
    assert read_tree(tmp_path / "packed") == expected


# On the command line


def run_slowly(src, dst, *options):
    """Start the command; its second table takes a while."""
    return subprocess.Popen(
        [sys.executable, "-m", "embpack", "quantize", src, dst, "--max-shard-size", "110 kB", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_ctrl_c_says_what_is_done_and_how_to_go_on(tmp_path):
    rng = np.random.default_rng(0)
    tables = {f"emb.{i}.weight": rng.standard_normal((4096, 32), np.float32) for i in range(40)}
    src = write_safetensors(tmp_path, Arrays(tables))
    process = run_slowly(src, tmp_path / "packed", "--method", "trellis")
    record = tmp_path / UNFINISHED / RECORD_NAME
    while not record.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = len(json.loads(record.read_text())["files"])
    assert re.search(rf"packed: {done} of \d+ files are done, and --resume \(in Python resume=True\) goes on", err)


def test_a_full_disk_says_what_is_done_and_how_to_go_on(whole, tmp_path, monkeypatch):
    error = interrupt(
        monkeypatch, whole[0], tmp_path / "packed", error=OSError(errno.ENOSPC, "No space left on device")
    )
    assert re.search(
        r"the disk is full, .*; 3 of \d+ files are done, and --resume .* goes on, make space or", str(error)
    )


def test_the_command_goes_on(embpack_command, whole, tmp_path, monkeypatch):
    src, _, expected = whole
    interrupt(monkeypatch, src, tmp_path / "packed")
    options = ["--method", "trellis", "--max-shard-size", OPTIONS["max_shard_size"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert embpack_command("quantize", src, tmp_path / "packed", *options, "--resume")[0] == 0
    assert read_tree(tmp_path / "packed") == expected

"""What may be replaced: what embpack wrote, and with force anything, but never files of others in a folder."""

import hashlib
import json
import signal
import stat
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import Arrays, names_in, run_python, write_safetensors, write_shards

import embpack
from embpack import onnx as embpack_onnx
from embpack.convert import check_destination
from embpack.formats import new_folder as folders
from embpack.formats import open_checkpoint, sharded

TABLE = embpack.quantize(np.random.default_rng(0).standard_normal((40, 16), dtype=np.float32), "asym")
ALREADY = "is there already, and nothing says that embpack wrote it; choose another name, or replace it with --force"


def make_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return Arrays({f"{name}_emb": rng.standard_normal((40, 16), dtype=np.float32) for name in "abc"})


def save(path, **options):
    embpack.save(path, {"a": TABLE}, **options)


def quantize(path, **options):
    embpack.quantize_file(path.parent / "model.safetensors", path, method="asym", **options)


def dequantize(path, **options):
    embpack.dequantize_file(path.parent / "packed.safetensors", path, **options)


def export(path, **options):
    embpack_onnx.export(TABLE, path, **options)


WRITERS = [(save, ".safetensors"), (quantize, ".safetensors"), (dequantize, ".npz"), (export, ".onnx")]


@pytest.fixture
def folder(tmp_path):
    """Has a checkpoint and the same packed."""
    write_safetensors(tmp_path, make_arrays())
    quantize(tmp_path / "packed.safetensors")
    return tmp_path


# Files


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_file_of_others_is_replaced_only_with_force(folder, write, suffix):
    path = folder / f"out{suffix}"
    np.savez(folder / "other.npz", a=np.ones(3))
    path.write_bytes((folder / "other.npz").read_bytes())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=f"{path} {ALREADY} \\(in Python force=True\\)"):
        write(path)
    assert path.read_bytes() == before
    write(path, force=True)
    assert path.read_bytes() != before
    assert not [name for name in names_in(folder) if name.startswith(".")]


@pytest.mark.parametrize("name", ["model.safetensors", "packed.safetensors"])
def test_a_folder_that_is_not_there_is_no_way_to_another_file(folder, name):
    """A text may say what "missing/.." means; the system says that there is nothing."""
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    path = folder / "missing" / ".." / name
    for write in (
        lambda: save(path, force=True),
        lambda: embpack.quantize_file(folder / "model.safetensors", path, method="asym", force=True),
        lambda: embpack.dequantize_file(folder / "packed.safetensors", path, force=True),
        lambda: export(path.with_suffix(".onnx"), force=True),
    ):
        with pytest.raises(FileNotFoundError, match="missing"):
            write()
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == before


@pytest.mark.parametrize(("write", "suffix"), [each for each in WRITERS if each[0] is not dequantize])
def test_what_embpack_wrote_is_replaced(folder, write, suffix):
    path = folder / f"out{suffix}"
    write(path)
    first = path.stat().st_ino
    write(path)
    assert path.stat().st_ino != first


def test_a_plain_checkpoint_is_replaced_only_with_force_whoever_wrote_it(folder):
    dequantize(folder / "plain.npz")
    with pytest.raises(FileExistsError, match=ALREADY):
        dequantize(folder / "plain.npz")
    with pytest.raises(FileExistsError, match=ALREADY):
        save(folder / "model.safetensors")
    dequantize(folder / "plain.npz", force=True)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_an_empty_file_has_nothing_to_lose(folder, write, suffix):
    (folder / f"out{suffix}").touch()
    write(folder / f"out{suffix}")
    assert (folder / f"out{suffix}").stat().st_size


def test_a_float_checkpoint_is_not_taken_for_a_packed_one(folder):
    float_checkpoint = (folder / "model.safetensors").read_bytes()
    for path in (folder / "other.safetensors", folder / "link.safetensors"):
        (folder / "other.safetensors").write_bytes(float_checkpoint)
        if path.name.startswith("link"):
            path.symlink_to("other.safetensors")
        with pytest.raises(FileExistsError, match=ALREADY):
            quantize(path)
    assert (folder / "other.safetensors").read_bytes() == float_checkpoint


def test_a_packed_file_that_is_cut_is_not_known(folder):
    path = folder / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileExistsError, match=ALREADY):
        quantize(path)


def test_values_beside_an_onnx_model_are_the_models(folder, monkeypatch):
    monkeypatch.setattr("embpack.onnx.files.EXTERNAL_BYTES", 0)
    path = folder / "a.onnx"
    (folder / "a.onnx.data").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"a\.onnx\.data is there already"):
        export(path)
    assert (folder / "a.onnx.data").read_bytes() == b"precious" and not path.exists()
    export(path, force=True)
    export(path)
    assert onnx.load(path).producer_name == "embpack"


def test_a_destination_is_refused_before_anything_is_read(folder):
    (folder / "out.safetensors").write_bytes(b"precious")
    told = []
    with pytest.raises(FileExistsError, match=ALREADY):
        embpack.quantize_file(
            folder / "model.safetensors", folder / "out.safetensors", progress=lambda *_: told.append(1)
        )
    message = f"cannot write {folder}/no/out.safetensors: the folder {folder}/no does not exist; create it first"
    with pytest.raises(FileNotFoundError, match=message):
        embpack.quantize_file(
            folder / "model.safetensors", folder / "no" / "out.safetensors", progress=lambda *_: told.append(1)
        )
    assert not told
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        (folder / "folder.safetensors").mkdir()
        with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file in it"):
            check_destination(checkpoint, folder / "folder.safetensors", force=True)
        check_destination(checkpoint, folder / "new.safetensors")
    assert not [name for name in names_in(folder) if name.startswith((".", "new"))]


def test_the_command_line_takes_force(embpack_command, folder):
    path, page = folder / "out.safetensors", folder / "page.html"
    commands = (
        ("quantize", folder / "model.safetensors", path),
        ("dequantize", folder / "packed.safetensors", path),
        ("compare", folder / "model.safetensors", "--methods", "asym", "--html", page),
    )
    for command in commands:
        for file in (path, page):
            file.write_bytes(b"precious")
        code, _, err = embpack_command(*command)
        assert code == 1 and ALREADY in err
        assert path.read_bytes() == page.read_bytes() == b"precious"
        code, _, err = embpack_command(*command, "--force")
        assert (code, err) == (0, "")
    assert embpack_command(*commands[2])[0] == 0  # its own page


# Folders


@pytest.fixture
def source(tmp_path):
    return write_shards(tmp_path, make_arrays())


def pack_into(path, source, **options):
    return embpack.quantize_file(source, path, method="asym", **options)


def read_all(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_packed_folder_is_replaced_whole(tmp_path, source, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    path = tmp_path / "packed"
    pack_into(path, source)
    path.chmod(0o750)
    first = path.stat()
    mapped = embpack.load(path)
    rows = {name: table[[3, 5]] for name, table in mapped.items()}
    (source / "config.json").write_text("{}")
    pack_into(path, source, bits=8)
    assert set(read_all(path)) >= {"config.json", "embpack.json", "model.embpack.safetensors.index.json"}
    assert {table.bits for table in embpack.load(path, verify=True).values()} == {8}
    # Who has the old one open goes on.
    assert all(np.array_equal(table[[3, 5]], rows[name]) for name, table in mapped.items())
    assert (path.stat().st_ino == first.st_ino) is not exchanges
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    # What the next run does not write is gone.
    (source / "config.json").unlink()
    pack_into(path, source)
    assert "config.json" not in read_all(path)
    assert names_in(tmp_path) == {source.name, "packed"}


def test_the_folder_is_there_at_every_moment(tmp_path, source):
    path, done, seen = tmp_path / "packed", threading.Event(), []
    pack_into(path, source)

    def look():
        while not done.is_set():
            seen.append((path / "model.embpack.safetensors.index.json").exists())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for bits in (2, 4, 8, 4):
            pack_into(path, source, bits=bits)
    finally:
        done.set()
        looking.join()
    assert seen and all(seen)


@pytest.mark.parametrize("exchanges", [True, False])
def test_files_of_others_keep_a_folder_from_being_replaced(tmp_path, source, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    path = tmp_path / "packed"
    (source / "config.json").write_text("{}")
    pack_into(path, source)
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("precious")
    before = read_all(path)
    message = "is a folder that is not empty, and nothing says that embpack wrote notes/mine.txt; choose another name"
    with pytest.raises(FileExistsError, match=message):
        pack_into(path, source, bits=8)
    assert read_all(path) == before
    (source / "config.json").unlink()
    pack_into(path, source, bits=8, force=True)
    after = read_all(path)
    assert after["notes/mine.txt"] == b"precious" and "config.json" not in after
    assert {table.bits for table in embpack.load(path, verify=True).values()} == {8}
    assert names_in(tmp_path) == {source.name, "packed"}


@pytest.mark.parametrize("change", ["edited", "float", "link", "no list"])
def test_a_file_that_somebody_has_changed_is_not_embpacks_any_more(tmp_path, source, change):
    path = tmp_path / "packed"
    (source / "config.json").write_text("{}")
    pack_into(path, source)
    [shard] = [file for file in path.glob("*.safetensors") if "00001" in file.name]
    changed = {"edited": path / "config.json", "float": shard, "link": shard, "no list": shard}[change]
    if change == "edited":
        changed.write_text('{"mine": 1}')
    elif change == "float":
        changed.write_bytes((source / changed.name).read_bytes())
    elif change == "link":
        changed.rename(tmp_path / "elsewhere")
        changed.symlink_to(tmp_path / "elsewhere")
    else:
        (path / "embpack.json").write_text("[]")
    before = read_all(path)
    with pytest.raises(FileExistsError, match=f"nothing says that embpack wrote .*{changed.name}"):
        pack_into(path, source, bits=8)
    assert read_all(path) == before


def test_a_folder_of_a_users_is_not_emptied_by_force(tmp_path, source):
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "chapter.tex").write_text("precious")
    (home / ".profile").write_text("precious")
    with pytest.raises(FileExistsError, match=r"nothing says that embpack wrote .profile, thesis/chapter.tex"):
        pack_into(home, source)
    pack_into(home, source, force=True)
    assert (home / "thesis" / "chapter.tex").read_text() == (home / ".profile").read_text() == "precious"
    assert set(embpack.load(home)) == set(make_arrays().tables)


def test_a_list_names_no_file_outside_its_folder(tmp_path, source, monkeypatch):
    path, outside = tmp_path / "packed", tmp_path / "outside.txt"
    outside.write_text("precious")
    pack_into(path, source)
    listed = json.loads((path / "embpack.json").read_text())
    digest = "sha256:" + hashlib.sha256(b"precious").hexdigest()
    listed["files"] |= {"../outside.txt": digest, str(outside): digest, "up/outside.txt": digest}
    (path / "embpack.json").write_text(json.dumps(listed))
    (path / "up").symlink_to("..")
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    pack_into(path, source, force=True)
    assert outside.read_text() == "precious" and (path / "up").is_symlink()


def test_the_folder_where_this_process_works_stays(tmp_path, source, monkeypatch):
    path = tmp_path / "packed"
    pack_into(path, source)
    monkeypatch.chdir(path)
    pack_into(path, source, bits=8)
    assert Path().stat().st_ino == path.stat().st_ino
    assert {table.bits for table in embpack.load(".").values()} == {8}


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path, source, monkeypatch, exchanges, failure):
    path = tmp_path / "packed"
    pack_into(path, source)
    before = read_all(path)

    def fail(*_):
        raise failure("now")

    if exchanges:
        with pytest.raises(failure):
            embpack.quantize_file(source, path, bits=8, progress=fail)
    else:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        monkeypatch.setattr(folders, "sync", lambda inner: fail() if inner == path else None)
        with pytest.raises(failure):
            pack_into(path, source, bits=8)
    assert read_all(path) == before
    # Of whole files a run with --resume makes use.
    kept = {".packed.embpack-unfinished"} if failure is KeyboardInterrupt and not exchanges else set()
    assert names_in(tmp_path) == {source.name, "packed"} | kept


KILLED = """
import os, signal, sys, embpack
from embpack.formats import temporary
temporary._remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)
embpack.quantize_file(sys.argv[1], sys.argv[2], bits=8, method="asym")
"""


def test_a_kill_after_the_exchange_leaves_the_new_folder_and_what_the_next_run_removes(tmp_path, source):
    path = tmp_path / "packed"
    pack_into(path, source)
    done = run_python(KILLED, source, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {table.bits for table in embpack.load(path, verify=True).values()} == {8}
    [left] = names_in(tmp_path) - {source.name, "packed"}
    assert left.startswith(".embpack-")
    pack_into(path, source)
    assert names_in(tmp_path) == {source.name, "packed"}


def test_a_folder_that_is_replaced_while_it_is_opened_is_refused(tmp_path, source, monkeypatch):
    path = tmp_path / "packed"
    pack_into(path, source)
    read_shard = sharded._read_shard

    def replace_meanwhile(shard, name):
        monkeypatch.setattr(sharded, "_read_shard", read_shard)
        first = read_shard(shard, name)
        pack_into(path, source, bits=8)
        return first

    monkeypatch.setattr(sharded, "_read_shard", replace_meanwhile)
    with pytest.raises(embpack.FormatError, match="was replaced by another file"), open_checkpoint(path):
        pytest.fail("it has files of both")
    assert {table.bits for table in embpack.load(path).values()} == {8}


def test_a_file_where_a_folder_is_to_be_is_refused_with_force_too(tmp_path, source):
    (tmp_path / "packed").write_text("precious")
    with pytest.raises(FileExistsError, match="is a file, but a folder is to be written"):
        pack_into(tmp_path / "packed", source, force=True)


def test_a_plain_folder_is_written_over_with_force_only(tmp_path, source):
    pack_into(tmp_path / "packed", source)
    embpack.dequantize_file(tmp_path / "packed", tmp_path / "plain")
    with pytest.raises(FileExistsError, match="is a folder that is not empty"):
        embpack.dequantize_file(tmp_path / "packed", tmp_path / "plain")
    embpack.dequantize_file(tmp_path / "packed", tmp_path / "plain", force=True)
    assert names_in(tmp_path / "plain") == names_in(source)

"""Files and folders are there whole or not at all, whatever goes wrong."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from embpack.formats.atomic import new_file
from embpack.formats.new_folder import new_folder

WRITE_LOTS = "with new_file(path) as file:\n    for _ in range(64): file.write(bytes(1 << 16))"
WRITE_LOTS_IN_FOLDER = (
    "with new_folder(path, 'index') as folder, (folder / 'a').open('wb') as file:\n"
    "    for _ in range(64): file.write(bytes(1 << 16))"
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".") and path.suffix == ".tmp"]


def script(body: str, path: Path) -> list[str]:
    lines = [
        "from pathlib import Path",
        "from embpack.formats.atomic import new_file",
        "from embpack.formats.new_folder import new_folder",
        f"path = Path({str(path)!r})",
        "try:",
        *(f"    {line}" for line in body.splitlines()),
        "except OSError as error:",
        "    print(error.errno, type(error).__name__, error)",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


def run_on_mount(mount: Path, options: str, body: str, prepare: str = "true") -> str:
    """Run a body that writes mount/out, in a mount namespace of its own where mount is a tmpfs."""
    mount.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", str(mount)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting in a namespace of one's own is not allowed here")
    setup = f'mount -t tmpfs -o size=1m tmpfs "{mount}" && {prepare} && mount -o remount,{options} "{mount}"'
    shell = f'{setup} && "$@" && ls -A "{mount}"'
    command = [*enter, "sh", "-ec", shell, "sh", *script(body, mount / "out")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_file_appears_whole(tmp_path):
    path = tmp_path / "out"
    with new_file(path) as file:
        file.write(b"abc")
        file.seek(0)
        file.write(b"A")
        assert not path.exists()
        assert len(temporaries(tmp_path)) == 1
    assert path.read_bytes() == b"Abc"
    assert names(tmp_path) == ["out"]


def test_file_takes_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_file("out") as file:
        file.write(b"abc")
    assert (tmp_path / "out").read_bytes() == b"abc"


def test_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with new_file(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"
        assert reader.read() == b"old"


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_no_other(tmp_path, failure):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)), new_file(path) as file:
        file.write(b"new")
        raise failure
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_modes_honour_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_file(tmp_path / "file"):
            pass
        with new_folder(tmp_path / "folder", "index"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_folder_appears_whole(tmp_path):
    path = tmp_path / "out"
    with new_folder(path, "index") as folder:
        (folder / "a").write_bytes(b"abc")
        (folder / "b").mkdir()
        (folder / "b" / "c").write_bytes(b"def")
        assert not path.exists()
    assert (path / "a").read_bytes() == b"abc"
    assert (path / "b" / "c").read_bytes() == b"def"
    assert names(tmp_path) == ["out"]


def test_folder_may_exist_if_it_is_empty(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with new_folder(path, "index") as folder:
        (folder / "a").touch()
    assert names(path) == ["a"]


def test_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with (
        pytest.raises(
            FileExistsError,
            match="is a folder that is not empty, and nothing says that embpack wrote a; choose another",
        ),
        new_folder(tmp_path, "index"),
    ):
        pass


def test_folder_that_fills_meanwhile_is_refused(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(FileExistsError, match="not empty"), new_folder(path, "index") as folder:
        (folder / "a").touch()
        path.mkdir()
        (path / "b").touch()
    assert names(path) == ["b"]
    assert temporaries(tmp_path) == []


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with (
        pytest.raises(FileExistsError, match="is a file, but a folder is to be"),
        new_folder(tmp_path / "out", "index"),
    ):
        pass


def test_failure_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out", "index") as folder:
        (folder / "a").touch()
        raise ValueError("no")
    assert names(tmp_path) == []


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match="is a folder; give the name of a file in it"),
        new_file(tmp_path),
    ):
        pass


@pytest.mark.parametrize("new", [new_file, partial(new_folder, last="index")])
def test_missing_parent(tmp_path, new):
    path = tmp_path / "missing" / "out"
    message = f"cannot write {path}: the folder {path.parent} does not exist; create it first"
    with pytest.raises(FileNotFoundError) as caught, new(path):
        pass
    assert str(caught.value) == message
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("new", [new_file, partial(new_folder, last="index")])
def test_parent_is_a_file(tmp_path, new):
    (tmp_path / "a").touch()
    with (
        pytest.raises(NotADirectoryError, match="a is not a folder; choose another place"),
        new(tmp_path / "a" / "b"),
    ):
        pass


@pytest.mark.parametrize("new", [new_file, partial(new_folder, last="index")])
def test_unwritable_parent(tmp_path, new):
    folder = tmp_path / "closed"
    folder.mkdir()
    # Root may write anywhere; be nobody for a moment. That user must get as far as the folder.
    as_root = os.geteuid() == 0
    for parent in [folder, *folder.parents[:4]]:
        if as_root:
            parent.chmod(parent.stat().st_mode | 0o055)
    folder.chmod(0o555)
    if as_root:
        os.seteuid(65534)
    try:
        with (
            pytest.raises(PermissionError, match=f"no permission to write in {folder}; change its permissions"),
            new(folder / "out"),
        ):
            pass
    finally:
        if as_root:
            os.seteuid(0)


def test_name_that_is_too_long_keeps_its_own_error(tmp_path):
    with pytest.raises(OSError, match="File name too long"), new_file(tmp_path / ("a" * 300)):
        pass


def test_read_only_file_system(tmp_path):
    said = run_on_mount(tmp_path / "disk", "ro", WRITE_LOTS)
    assert said == (
        f"{errno.EROFS} OSError cannot write {tmp_path}/disk/out: {tmp_path}/disk is on a read-only file "
        "system; choose another folder\n"
    )


@pytest.mark.parametrize("body", [WRITE_LOTS, WRITE_LOTS_IN_FOLDER], ids=["file", "folder"])
def test_disk_full(tmp_path, body):
    said = run_on_mount(tmp_path / "disk", "rw", body)
    assert said == (
        f"{errno.ENOSPC} OSError cannot write {tmp_path}/disk/out: the disk is full, after {1 << 20} bytes and "
        f"with 0 bytes free in {tmp_path}/disk; nothing was kept, make space or choose another folder\n"
    )


def test_disk_full_keeps_the_old_file(tmp_path):
    said = run_on_mount(tmp_path / "disk", "rw", WRITE_LOTS, prepare=f"echo old > '{tmp_path}/disk/out'")
    assert "the disk is full" in said
    assert said.splitlines()[1:] == ["out"]


def test_file_size_limit(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
    said = subprocess.run(
        script(limit + WRITE_LOTS, tmp_path / "out"), check=True, capture_output=True, text=True
    ).stdout
    assert said.startswith(f"{errno.EFBIG} OSError cannot write {tmp_path}/out: the largest size")
    assert "after 100000 bytes" in said
    assert names(tmp_path) == []


@contextmanager
def waiting_process(body, path):
    """A process that has begun to write and waits; it ends once it is sent a line, or is killed."""
    waiting = body.replace("range(64)", "range(1)") + "; file.flush(); print('written', flush=True); input()"
    with subprocess.Popen(script(waiting, path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        yield process


@pytest.mark.parametrize("body", [WRITE_LOTS, WRITE_LOTS_IN_FOLDER], ids=["file", "folder"])
def test_kill_leaves_no_output_and_the_next_run_removes_the_rest(tmp_path, body):
    path = tmp_path / "out"
    with waiting_process(body, path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    assert len(temporaries(tmp_path)) == len(names(tmp_path)) == 1
    with new_file(tmp_path / "another") as file:
        file.write(b"the next attempt")
    assert names(tmp_path) == ["another"]


def test_after_a_kill_the_same_folder_can_be_written_at_once(tmp_path):
    for path in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with waiting_process(WRITE_LOTS_IN_FOLDER, path) as process:
            process.kill()
            process.wait()
        with new_folder(path, "index") as folder:
            (folder / "index").touch()
        assert names(path) == ["index"]
    assert sorted(names(tmp_path)) == ["new", "there"]


@pytest.mark.parametrize("body", [WRITE_LOTS, WRITE_LOTS_IN_FOLDER], ids=["file", "folder"])
def test_what_another_process_writes_stays(tmp_path, body):
    path = tmp_path / "out"
    with waiting_process(body, path) as process:
        [temporary] = temporaries(tmp_path)
        with new_file(tmp_path / "another"), new_folder(tmp_path / "others", "index"):
            assert temporary in temporaries(tmp_path)
        assert temporaries(tmp_path) == [temporary]
        process.communicate(b"\n")
        assert process.returncode == 0
    assert sorted(names(tmp_path)) == ["another", "others", "out"]


DAY = 24 * 3600


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(".embpack-abcd_012.tmp", id="from before there were locks"),
        pytest.param(".embpack-01234567-0123456789abcdef.tmp", id="from another machine"),
        pytest.param(".embpack-00000000-0123456789abcdef.tmp", id="where there are no locks"),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_no_lock_tells_of_is_removed_after_a_day(tmp_path, name, is_folder):
    temporary = tmp_path / name
    written = [temporary, temporary / "a"] if is_folder else [temporary]
    if is_folder:
        temporary.mkdir()
    written[-1].touch()

    def write_after(seconds):
        for inner in reversed(written):
            os.utime(inner, (time.time() - seconds,) * 2)
        with new_file(tmp_path / "out"):
            pass
        return temporary.exists()

    assert write_after(DAY - 60)
    if is_folder:
        os.utime(temporary, (0, 0))
        assert write_after(0)
    assert not write_after(DAY + 60)


def test_what_embpack_did_not_write_stays(tmp_path):
    (tmp_path / "data").write_bytes(b"precious")
    (tmp_path / ".embpack-abcdefgh.tmp").symlink_to("data")
    os.mkfifo(tmp_path / ".embpack-abcdefgi.tmp")
    others = [".embpack-notes.tmp", ".embpack-ABCDEFGH.tmp", "x.embpack-abcdefgh.tmp", ".embpack-abcdefgh.tmp.gz"]
    for name in others:
        (tmp_path / name).touch()
    for inner in tmp_path.iterdir():
        os.utime(inner, (0, 0), follow_symlinks=False)
    before = names(tmp_path)
    with new_file(tmp_path / "out"):
        pass
    assert sorted(names(tmp_path)) == sorted([*before, "out"])


def test_where_there_are_no_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with new_file(tmp_path / "out"), new_folder(tmp_path / "folder", "index"):
        assert len(temporaries(tmp_path)) == 2
        assert all(temporary.name.startswith(".embpack-00000000-") for temporary in temporaries(tmp_path))
        with new_file(tmp_path / "another"):
            pass
        assert len(temporaries(tmp_path)) == 2
    assert sorted(names(tmp_path)) == ["another", "folder", "out"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_another_process_writes_is_refused_at_the_start(tmp_path, exists):
    path = tmp_path / "out"
    if exists:
        path.mkdir()
    message = r"out is being written by another process \(.*tmp\); wait for it, or choose another name"
    with waiting_process(WRITE_LOTS_IN_FOLDER, path) as process:
        with pytest.raises(FileExistsError, match=message), new_folder(path, "index"):
            pytest.fail("it was not refused")
        process.communicate(b"\n")
        assert process.returncode == 0
    assert names(path) == ["a"]


# Places


def enter(path):
    os.chdir(path)
    return Path()


def link_to(path):
    path.with_name("link").symlink_to(path.name)
    return path.with_name("link")


@pytest.mark.parametrize("name_it", [lambda path: path, enter, link_to], ids=["itself", "dot", "link"])
def test_an_empty_folder_stays_and_is_filled(tmp_path, monkeypatch, name_it):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out"
    path.mkdir(mode=0o700)
    before = path.stat()
    with new_folder(name_it(path), "index") as folder:
        (folder / "index").write_bytes(b"abc")
        (folder / "b").mkdir()
        (folder / "b" / "c").write_bytes(b"def")
        assert temporaries(path) == [folder.parent] == list(path.iterdir())
    assert sorted(names(path)) == ["b", "index"]
    assert (path / "b" / "c").read_bytes() == b"def"
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    assert set(names(tmp_path)) <= {"out", "link"}


def test_the_index_gets_its_name_last(tmp_path, monkeypatch):
    seen, rename = [], Path.rename

    def watch(path, target):
        seen.append(sorted(name for name in names(tmp_path) if not name.startswith(".")))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watch)
    with new_folder(tmp_path, "b") as folder:
        for name in "abc":
            (folder / name).touch()
    assert seen == [[], ["a"], ["a", "c"]]
    assert sorted(names(tmp_path)) == ["a", "b", "c"]


def test_a_failure_among_the_names_takes_all_back(tmp_path, monkeypatch):
    rename = Path.rename

    def fail_once(path, target):
        if path.name == "c":
            monkeypatch.setattr(Path, "rename", rename)
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path, "index") as folder:
        for name in ("a", "c", "index"):
            (folder / name).touch()
    assert names(tmp_path) == []


def test_a_failure_leaves_an_empty_folder_empty(tmp_path):
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path, "index") as folder:
        (folder / "a").touch()
        raise ValueError("no")
    assert names(tmp_path) == []


def test_where_a_file_system_is_mounted(tmp_path):
    body = "with new_folder(path.parent, 'index') as folder: (folder / 'index').touch()"
    assert run_on_mount(tmp_path / "disk", "rw", body) == "index\n"


def test_a_file_that_is_mounted_is_refused_at_the_start(tmp_path):
    name = f"{tmp_path}/disk/out"
    mounted = f"touch '{name}' '{tmp_path}/disk/from' && mount --bind '{tmp_path}/disk/from' '{name}'"
    said = run_on_mount(tmp_path / "disk", "rw", "with new_file(path): print('begun')", prepare=mounted)
    assert said.splitlines()[0].endswith(
        f"{name} is mounted by itself and cannot be replaced; mount its folder, or name another file"
    )


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o444])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "out"
    path.touch()
    path.chmod(mode)
    with new_file(path) as file:
        [temporary] = temporaries(tmp_path)
        assert stat.S_IMODE(temporary.stat().st_mode) == mode
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")
def test_a_file_keeps_its_owner_and_others_do_not_gain_by_its_group(tmp_path):
    path = tmp_path / "out"
    path.touch()
    path.chmod(0o640)
    os.chown(path, 65534, 65534)
    with new_file(path):
        pass
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640

    # One who is not of the file's group cannot give it to that: what the group might do, another one may not.
    os.chown(path, 1, 1)
    for folder in tmp_path.parents[:4]:
        folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    os.seteuid(65534)
    try:
        with new_file(path):
            pass
    finally:
        os.seteuid(0)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, os.getegid())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "blob", tmp_path / "out"
    target.write_bytes(b"old")
    link.symlink_to("store/blob")
    with new_file(link) as file:
        assert len(temporaries(target.parent)) == 1
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == link.read_bytes() == b"new"
    assert (names(tmp_path / "store"), sorted(names(tmp_path))) == (["blob"], ["out", "store"])


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "out").symlink_to("blob")
    with new_file(tmp_path / "out") as file:
        file.write(b"new")
    assert (tmp_path / "blob").read_bytes() == b"new"
    (tmp_path / "folder").symlink_to("shards")
    with new_folder(tmp_path / "folder", "index") as folder:
        (folder / "index").touch()
    assert names(tmp_path / "shards") == ["index"]
    (tmp_path / "far").symlink_to("missing/blob")
    message = f"cannot write {tmp_path}/far: the folder {tmp_path}/missing does not exist; create it first"
    with pytest.raises(FileNotFoundError, match=message), new_file(tmp_path / "far"):
        pass


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with (
            pytest.raises(
                FileExistsError, match=f"{path} is a device, a pipe or a socket, which is not to be replaced"
            ),
            new_file(path),
        ):
            pass

"""Files and folders are there whole or not at all, whatever goes wrong."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from embpack.formats.atomic import new_file, new_folder

WRITE_LOTS = "with new_file(path) as file:\n    for _ in range(64): file.write(bytes(1 << 16))"
WRITE_LOTS_IN_FOLDER = (
    "with new_folder(path) as folder, (folder / 'a').open('wb') as file:\n"
    "    for _ in range(64): file.write(bytes(1 << 16))"
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".") and path.suffix == ".tmp"]


def script(body: str, path: Path) -> list[str]:
    lines = [
        "from pathlib import Path",
        "from embpack.formats.atomic import new_file, new_folder",
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
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_folder_appears_whole(tmp_path):
    path = tmp_path / "out"
    with new_folder(path) as folder:
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
    with new_folder(path) as folder:
        (folder / "a").touch()
    assert names(path) == ["a"]


def test_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with (
        pytest.raises(FileExistsError, match="is a folder that is not empty; remove it or choose another name"),
        new_folder(tmp_path),
    ):
        pass


def test_folder_that_fills_meanwhile_is_refused(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(FileExistsError, match="not empty"), new_folder(path) as folder:
        (folder / "a").touch()
        path.mkdir()
        (path / "b").touch()
    assert names(path) == ["b"]
    assert temporaries(tmp_path) == []


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with (
        pytest.raises(FileExistsError, match="is a file, but a folder is to be"),
        new_folder(tmp_path / "out"),
    ):
        pass


def test_failure_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
        raise ValueError("no")
    assert names(tmp_path) == []


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match="is a folder; give the name of a file in it"),
        new_file(tmp_path),
    ):
        pass


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_missing_parent(tmp_path, new):
    path = tmp_path / "missing" / "out"
    message = f"cannot write {path}: the folder {path.parent} does not exist; create it first"
    with pytest.raises(FileNotFoundError) as caught, new(path):
        pass
    assert str(caught.value) == message
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_parent_is_a_file(tmp_path, new):
    (tmp_path / "a").touch()
    with (
        pytest.raises(NotADirectoryError, match="a is not a folder; choose another place"),
        new(tmp_path / "a" / "b"),
    ):
        pass


@pytest.mark.parametrize("new", [new_file, new_folder])
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


@pytest.mark.parametrize("body", [WRITE_LOTS, WRITE_LOTS_IN_FOLDER], ids=["file", "folder"])
def test_kill_leaves_no_output(tmp_path, body):
    path = tmp_path / "out"
    waiting = body + "; file.flush(); print('written', flush=True); input()"
    waiting = waiting.replace("for _ in range(64): file", "for _ in range(1): file")
    with subprocess.Popen(script(waiting, path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    assert temporaries(tmp_path) == list(tmp_path.iterdir())
    with new_file(path) as file:
        file.write(b"the next attempt")
    assert path.read_bytes() == b"the next attempt"

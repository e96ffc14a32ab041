"""Files and folders that are being written: their owner holds a lock, and what others left behind is removed.

A folder whose writing can be resumed has a name of its own, and stays until the next run into the same destination.
"""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# ".embpack-MACHINE-KEY.tmp". The first embpack wrote ".embpack-XXXXXXXX.tmp", and held no lock.
_NAME = re.compile(r"\.embpack-(?:([0-9a-f]{8})-[0-9a-f]{16}|[a-z0-9_]{8})\.tmp")
_UNFINISHED = ".embpack-unfinished"
# In place of the machine, where there is no lock.
_NOT_LOCKED = "00000000"
# For how long nothing must have been written where a lock cannot tell whether the owner is alive.
_IDLE_SECONDS = 24 * 3600


def is_temporary(name: str) -> bool:
    """Whether a file or folder of such a name is one that embpack writes."""
    return _NAME.fullmatch(name) is not None or (name.startswith(".") and name.endswith(_UNFINISHED))


@contextmanager
def temporary_file(folder: Path, mode: int) -> Iterator[tuple[Path, int]]:
    """Make a file to write into; what earlier processes left in the folder when they were killed is removed first.

    Args:
        folder: where to make it.
        mode: of the file, before the umask.

    Yields:
        Its path, under which it is removed at the end if it is still there, and a descriptor, open for writing.
    """

    def make(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    with _locked(folder, secrets.token_hex(8), make) as made:
        yield made


@contextmanager
def temporary_folder(folder: Path, destination: Path | None = None, mode: int = 0o777) -> Iterator[Path]:
    """Make a folder to write into; what earlier processes left in the outer one when they were killed is removed first.

    Args:
        folder: where to make it.
        destination: what is to become of it: one process at a time has a temporary folder for a destination.
        mode: of the folder, before the umask.

    Yields:
        Its path, under which it is removed at the end if it is still there.

    Raises:
        FileExistsError: another process has one for this destination.
    """

    def make(path: Path) -> int:
        path.mkdir(mode)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    key = secrets.token_hex(8) if destination is None else _hash(os.fsencode(destination.name), 16)
    with _locked(folder, key, make) as (path, _):
        yield path


@contextmanager
def unfinished_folder(
    folder: Path, destination: Path, is_kept: Callable[[BaseException], bool], mode: int = 0o777
) -> Iterator[Path]:
    """Make a folder to write into that stays after a kill, or take the one that stayed; remove_stale leaves it alone.

    Args:
        folder: where to make it.
        destination: what is to become of it: one process at a time has a folder for a destination.
        is_kept: of an exception, whether it stays after that, too.
        mode: of the folder, before the umask.

    Yields:
        Its path, ".DESTINATION.embpack-unfinished", under which it is removed at the end if it is still there.

    Raises:
        FileExistsError: another process has one for this destination, or something else has its name.
    """
    remove_stale(folder)
    path = unfinished_path(folder, destination)
    descriptor = _open_locked(path, mode)
    keep = False
    try:
        yield path
    except BaseException as error:
        keep = is_kept(error)
        raise
    finally:
        if not keep and _is_at(path, descriptor):
            # Should this process be killed now, any next run removes the rest.
            stale = folder / f".embpack-{_machine()}-{secrets.token_hex(8)}.tmp"
            path.rename(stale)
            _remove(stale)
        os.close(descriptor)


def unfinished_path(folder: Path, destination: Path) -> Path:
    """Where unfinished_folder makes a folder in another."""
    return folder / f".{destination.name}{_UNFINISHED}"


def _open_locked(path: Path, mode: int) -> int:
    """Make a folder unless it is there, and hold a lock on it, where the file system has locks."""
    while True:
        with suppress(FileExistsError):
            path.mkdir(mode)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (NotADirectoryError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError):
                continue  # another process has just removed it
            raise FileExistsError(error.errno, error.strerror, str(path)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(error.errno, error.strerror, str(path)) from error
        except OSError:
            pass
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, key: str, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """Make a temporary and hold a lock on it, which ends with this process however that ends."""
    remove_stale(folder)
    path, descriptor = _make_locked(folder, key, make)
    try:
        yield path, descriptor
    finally:
        # A process that came later may have its own there by now.
        if _is_at(path, descriptor):
            _remove(path)
        os.close(descriptor)


def _make_locked(folder: Path, key: str, make: Callable[[Path], int]) -> tuple[Path, int]:
    machine = _machine()
    while True:
        path = folder / f".embpack-{machine}-{key}.tmp"
        try:
            descriptor = make(path)
        except FileExistsError:
            if _remove_if_stale(path):
                continue
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # not every file system has locks
            if machine != _NOT_LOCKED:
                _remove(path)
                machine = _NOT_LOCKED
        # Another process may have taken it for stale before it was locked.
        if _is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove temporaries of processes that are gone, as far as that can be told and is allowed."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:  # who writes there hears of it
        return
    for name in names:
        _remove_if_stale(folder / name)


def _remove_if_stale(path: Path) -> bool:
    """Remove a temporary if its process is gone; returns whether it is not there any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not _is_stale(path, descriptor):
            return False
        _remove(path)
        return not os.path.lexists(path)
    finally:
        os.close(descriptor)


def _is_stale(path: Path, descriptor: int) -> bool:
    found = os.fstat(descriptor)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return False
    try:
        # Shared, for which a descriptor for reading is enough on network file systems, too.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        is_told = False
    else:
        # A lock of another machine may be unknown here, and the first embpack held none.
        match = _NAME.fullmatch(path.name)
        is_told = match is not None and match[1] == _machine()
    return is_told or time.time() - _last_written(path) > _IDLE_SECONDS


def _last_written(path: Path) -> float:
    """When a file, or anything in a folder, was last written to."""
    with suppress(OSError):
        return max(inner.lstat().st_mtime for inner in [path, *path.rglob("*")])
    return time.time()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to what a descriptor is of."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """Name the system whose processes know each other's locks: containers on one kernel share it."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        identity = socket.gethostname().encode()
    return _hash(identity, 8)


def _hash(value: bytes, digits: int) -> str:
    return hashlib.sha256(value).hexdigest()[:digits]

"""New files and folders that are there whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the largest size allowed for a file is reached",
}
_NO_PLACE = {
    errno.ENOENT: "the folder {folder} does not exist; create it first",
    errno.ENOTDIR: "{folder} is not a folder; choose another place",
    errno.EACCES: "no permission to write in {folder}; change its permissions or choose another folder",
    errno.EPERM: "no permission to write in {folder}; change its permissions or choose another folder",
    errno.EROFS: "{folder} is on a read-only file system; choose another folder",
}


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is complete and on disk.

    Args:
        path: of the file; one that exists is replaced, in one step, when the block ends without an exception.

    Yields:
        The file, open for writing and seekable. It lies beside path, named ".*.tmp", until then; an exception
        removes it, after a kill it may stay.

    Raises:
        OSError: the folder is missing or cannot be written, path is a folder, or there is no space; errno
            says which, and the message what to do.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    temporary = _name_temporary(path)
    with _explained_place(path):
        file = temporary.open("xb")
    with _removed_on_failure(temporary, path):
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder that appears under its name only when all that is in it is complete and on disk.

    Args:
        path: of the folder; may exist if it is empty.

    Yields:
        The folder to write into. It lies beside path, named ".*.tmp", until the block ends; an exception
        removes it, after a kill it may stay.

    Raises:
        FileExistsError: path is a file, or a folder that is not empty.
        OSError: the parent folder is missing or cannot be written, or there is no space; errno says which,
            and the message what to do.
    """
    path = Path(path).absolute()
    _refuse_occupied(path)
    temporary = _name_temporary(path)
    with _explained_place(path):
        temporary.mkdir()
    with _removed_on_failure(temporary, path):
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            _sync(written)
        _refuse_occupied(path)
        temporary.replace(path)
        _sync(path.parent)


def _name_temporary(path: Path) -> Path:
    """Choose a free name beside path.

    mktemp only names; whoever creates it demands that it is new. mkstemp would give mode 0600, whatever the
    umask.
    """
    return Path(tempfile.mktemp(prefix=".embpack-", suffix=".tmp", dir=path.parent))


def _refuse_occupied(path: Path) -> None:
    if path.is_dir():
        if any(path.iterdir()):
            raise FileExistsError(f"{path} is a folder that is not empty; remove it or choose another name")
    elif path.exists():
        raise FileExistsError(f"{path} is a file, but a folder is to be written; choose another name")


@contextmanager
def _removed_on_failure(temporary: Path, path: Path) -> Iterator[None]:
    """Remove what is half written, and say how far it came if space ran out."""
    try:
        yield
    except BaseException as error:
        explained = _explain_space(error, path, temporary)
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if explained is not None:
            raise explained from error
        raise


@contextmanager
def _explained_place(path: Path) -> Iterator[None]:
    """Say why nothing can be created beside path."""
    try:
        yield
    except OSError as error:
        reason = _NO_PLACE.get(error.errno or 0)
        if reason is None:
            raise
        raise _reword(error, f"cannot write {path}: {reason.format(folder=path.parent)}") from error


def _explain_space(error: BaseException, path: Path, temporary: Path) -> OSError | None:
    """Say how much was written when space ran out; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _NO_SPACE:
        return None
    files = temporary.rglob("*") if temporary.is_dir() else [temporary]
    written = sum(file.stat().st_size for file in files if file.is_file())
    free = shutil.disk_usage(path.parent).free
    return _reword(
        error,
        f"cannot write {path}: {_NO_SPACE[error.errno]}, after {written} bytes and with {free} bytes free in "
        f"{path.parent}; nothing was kept, make space or choose another folder",
    )


def _reword(error: OSError, message: str) -> OSError:
    """Make an error of the same type and errno whose message stands alone."""
    reworded = type(error)(message)
    reworded.errno = error.errno
    return reworded


def _sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""New files that are there whole or not at all, and why nothing can be written; folders are in new_folder.py."""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from embpack.formats.paths import as_path, is_remote
from embpack.formats.remote import check_writable, explained, put, put_bytes, remove
from embpack.formats.temporary import temporary_file

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


def anything(path: Path) -> bool:
    """Say of any file that it may be replaced."""
    return True


@contextmanager
def new_file(path: str | os.PathLike[str], may_replace: Callable[[Path], bool] = anything) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is complete and on disk.

    Args:
        path: of the file; one that exists is replaced, in one step, when the block ends without an exception. The new
            one keeps its mode, and its owner and group where that is allowed. Of a symbolic link the target is
            written.
        may_replace: asked of a file that exists and is not empty, before anything is written.

    Yields:
        The file, open for writing and seekable. It lies beside path, named ".embpack-*.tmp", until then; an exception
        removes it. After a kill it stays until the next file is written into that folder.

    Raises:
        FileExistsError: path is a file that may not be replaced.
        OSError: the folder is missing or cannot be written, path is a folder, a device or a pipe, or there is no space;
            errno says which, and the message what to do.
    """
    path = as_path(path).absolute()
    if is_remote(path):
        with explained(path, "cannot be written"):
            refuse_other(path, may_replace)
        with new_object(path) as made:
            yield made
        return
    target = follow(path)
    refuse_other(path, may_replace)
    with ExitStack() as stack:
        with explained_place(path, target.parent):
            replaced = _find_replaced(path, target)
            # One that replaces another gets its mode only once it has its group.
            mode = 0o666 if replaced is None else 0o600
            temporary, descriptor = stack.enter_context(temporary_file(target.parent, mode))
        if replaced is not None:
            keep_owner_and_mode(descriptor, replaced)
        with explained_space(path, temporary):
            # A descriptor of its own, so that the lock is held until the file has its name.
            with os.fdopen(os.dup(descriptor), "wb") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
            temporary.replace(target)
            sync(target.parent)


def follow(path: Path) -> Path:
    """Follow links to where a file or folder is to be written.

    Raises:
        FileNotFoundError: a folder on the way is missing: "missing/../file" is no file, whatever there is beside.
    """
    with explained_place(path, path.parent):
        os.path.realpath(path.parent, strict=True)
    return Path(os.path.realpath(path))


def check_new(path: Path) -> None:
    """Raise what new_file, and new_folder for one that is not there, would before anything is written."""
    if is_remote(path):
        check_writable(path)
        return
    path = path.absolute()
    target = follow(path)
    with explained_place(path, target.parent):
        _find_replaced(path, target)
        with temporary_file(target.parent, 0o600):
            pass


def check_space(path: Path, sizes: Collection[int], folder: Path | None = None) -> None:
    """Raise OSError unless there is space for files where they are written, one after the other.

    Args:
        path: of the file, or of the folder that gets them. Behind a URI each is first made whole on this machine, and
            then removed.
        sizes: of the files, in bytes.
        folder: where they are written; None if it is the one that path is in.
    """
    num_bytes = sum(sizes)
    if is_remote(path):
        num_bytes, folder = max(sizes, default=0), Path(tempfile.gettempdir())
    elif folder is None:
        folder = next(place for place in path.absolute().parents if place.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"cannot write {path}: it takes at least {num_bytes} bytes, but {free} bytes are free in {folder}; make "
            "space or choose another folder"
        )


@contextmanager
def new_object(path: Path) -> Iterator[BinaryIO]:
    """Write what is to lie behind a URI: it is made on this machine, in the folder for temporary files, and put whole.

    Raises:
        OSError: it cannot be put there, or there is no space.
    """
    with temporary_file(Path(tempfile.gettempdir()), 0o600) as (temporary, descriptor):
        with explained_space(path, temporary, lambda: "set TMPDIR to a folder with more"):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                yield file
        put(temporary, path)


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Write a new file of a folder that is being written; behind a URI it is there once it is whole.

    Raises:
        FileExistsError: there is one already.
        OSError: it cannot be written.
    """
    if is_remote(path):
        with new_object(path) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        yield file


def replace_text(path: Path, text: str) -> None:
    """Write a small file of text, in place of what is there, whole or not at all, and have it on the disk."""
    if is_remote(path):
        put_bytes(text.encode(), path)
        return
    new = path.with_suffix(".new")
    new.write_text(text)
    sync(new)
    new.replace(path)
    sync(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    if is_remote(path):
        remove(path)
    else:
        path.unlink(missing_ok=True)


def refuse_other(path: Path, may_replace: Callable[[Path], bool]) -> None:
    """Raise FileExistsError if there is a file that is not empty and may not be replaced."""
    if path.is_file() and path.stat().st_size and not may_replace(path):
        raise FileExistsError(
            f"{path} is there already, and nothing says that embpack wrote it; choose another name, or replace it with "
            "--force (in Python force=True)"
        )


def _find_replaced(path: Path, target: Path) -> os.stat_result | None:
    """Look at the file that is to be replaced; None if there is none."""
    try:
        replaced = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(replaced.st_mode):
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    if not stat.S_ISREG(replaced.st_mode):
        raise FileExistsError(f"{path} is a device, a pipe or a socket, which is not to be replaced; name a file")
    if is_mounted(target):
        raise FileExistsError(
            f"{path} is mounted by itself and cannot be replaced; mount its folder, or name another file"
        )
    return replaced


def is_mounted(target: Path) -> bool:
    """Whether something is mounted where a file is, as containers have single files."""
    escaped = re.sub(r"[ \t\n\\]", lambda found: f"\\{ord(found[0]):03o}", str(target))
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(line.split(maxsplit=5)[4:5] == [escaped] for line in lines)


def keep_owner_and_mode(descriptor: int, replaced: os.stat_result) -> None:
    """Give a new file the owner, group and mode of the one that it replaces, as far as that is allowed."""
    mode = stat.S_IMODE(replaced.st_mode)
    made = os.fstat(descriptor)
    if made.st_gid != replaced.st_gid:
        try:
            os.fchown(descriptor, -1, replaced.st_gid)
        except OSError:
            # Its group is another one, which may do what all others may.
            mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    with suppress(OSError):
        os.fchown(descriptor, replaced.st_uid, -1)
    with suppress(OSError):  # some file systems have no modes
        os.fchmod(descriptor, mode)


@contextmanager
def explained_space(
    path: Path, temporary: Path, say_kept: Callable[[], str] = lambda: "nothing was kept"
) -> Iterator[None]:
    """Say how far it came if space ran out, and what of it was kept."""
    try:
        yield
    except OSError as error:
        explained = _explain_space(error, path, temporary, say_kept())
        if explained is None:
            raise
        raise explained from error


@contextmanager
def explained_place(path: Path, folder: Path) -> Iterator[None]:
    """Say why nothing can be created in a folder."""
    try:
        yield
    except OSError as error:
        reason = _NO_PLACE.get(error.errno or 0)
        if reason is None:
            raise
        raise reword(error, f"cannot write {path}: {reason.format(folder=folder)}") from error


def _explain_space(error: OSError, path: Path, temporary: Path, kept: str) -> OSError | None:
    """Say how much was written when space ran out; None for any other error."""
    if error.errno not in _NO_SPACE:
        return None
    files = temporary.rglob("*") if temporary.is_dir() else [temporary]
    written = sum(file.stat().st_size for file in files if file.is_file())
    free = shutil.disk_usage(temporary.parent).free
    return reword(
        error,
        f"cannot write {path}: {_NO_SPACE[error.errno]}, after {written} bytes and with {free} bytes free in "
        f"{temporary.parent}; {kept}, make space or choose another folder",
    )


def reword(error: OSError, message: str) -> OSError:
    """Make an error of the same type and errno whose message stands alone."""
    reworded = type(error)(message)
    reworded.errno = error.errno
    return reworded


def sync(path: Path) -> None:
    """Have the system put a file's bytes, or a folder's names, on disk; behind a URI they are kept as they are put."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""New folders that are there whole or not at all, in place of old ones too."""

import ctypes
import errno
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Protocol

from embpack.formats.atomic import (
    explained_place,
    explained_space,
    follow,
    is_mounted,
    keep_owner_and_mode,
    reword,
    sync,
)
from embpack.formats.paths import as_path, is_remote
from embpack.formats.remote import copy, explained, for_each, list_objects, remove
from embpack.formats.temporary import is_temporary, temporary_folder, unfinished_folder, unfinished_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Where two names cannot be exchanged: an old kernel, a file system that does not know how, a mount point.
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBUSY, errno.EXDEV}
_MOST_NAMED = 5

ListOwn = Callable[[Path], Collection[str]]
"""Lists the files of a folder that may be replaced and removed, by their paths in it; of a file its own name."""


class Keeper(Protocol):
    """Keeps the whole files of a folder that is being written, should writing it be interrupted."""

    def start(self, work: Path) -> None:
        """Take the folder to write into, which may have files of an earlier run in "new"; remove all that is no use."""

    def reuse(self, number: int, path: Path) -> bool:
        """Whether a file, by its number and path, is there and whole."""

    def keep(self, number: int, path: Path) -> None:
        """Write down that a file is whole, and on the disk."""

    def is_kept(self, error: BaseException) -> bool:
        """Whether files stay after an exception."""

    def say_kept(self) -> str:
        """Say what stays, and what to do with it, for the message of an error."""


def nothing(path: Path) -> tuple[str, ...]:
    """Say of any file or folder that nothing of it may be replaced."""
    return ()


def iter_files(folder: Path) -> Iterator[str]:
    """Name all that is in a folder and no folder, links too, but for what is being written, by paths in it."""
    if is_remote(folder):
        yield from (name for name in list_objects(folder) if not is_temporary(name.partition("/")[0]))
        return
    for inside, folders, files in os.walk(folder):
        here = Path(inside)
        folders[:] = [name for name in folders if here != folder or not is_temporary(name)]
        links = [name for name in folders if (here / name).is_symlink()]
        found = [name for name in (*files, *links) if here != folder or not is_temporary(name)]
        yield from ((here / name).relative_to(folder).as_posix() for name in found)


@contextmanager
def new_folder(
    path: str | os.PathLike[str],
    last: str,
    list_own: ListOwn = nothing,
    *,
    force: bool = False,
    keeper: Keeper | None = None,
) -> Iterator[Path]:
    """Write a folder that appears under its name only when all that is in it is complete and on disk.

    One that exists is replaced in one step: the two exchange their names. It stays where it is, with its mode and
    owner, if it is empty, where a file system is mounted, where this process works, in a folder that cannot be written,
    on a file system that cannot exchange names, or if it has files of others, which stay with it. Then its files are
    replaced one after the other, without a pause.

    Args:
        path: of the folder. Of a symbolic link the target is written.
        last: path in it of the file that gets its name after all others, and loses it first: an index, without which
            nobody reads them.
        list_own: lists the files of an existing folder that are to be replaced.
        force: write there though it has other files. Those that have the name of a new one are replaced.
        keeper: of files that are whole, if writing the folder is interrupted; None if all is to be done at once.

    Yields:
        The folder to write into, in ".embpack-*.tmp" beside path, or in it if it stays where it is. An exception
        removes it, and leaves an existing folder as it was. After a kill it stays until the next run into that folder.
        With a keeper it is in ".NAME.embpack-unfinished", and there may be files in it that this keeper has left.

    Raises:
        FileExistsError: path is a file, a folder with other files and no force, or being written by another process.
        OSError: the parent folder is missing or cannot be written, or there is no space; errno says which,
            and the message what to do.
    """
    path = as_path(path).absolute()
    if is_remote(path):
        with new_remote_folder(path, last, list_own, force=force, keeper=keeper) as new:
            yield new
        return
    target = follow(path)
    has_others = refuse_others(path, list_own, force=force)
    place = target if has_others or _must_stay(target) else target.parent
    with ExitStack() as stack:
        with explained_place(path, place), _explained_other(path):
            if keeper is None:
                temporary = stack.enter_context(temporary_folder(place, target))
            else:
                work = _find_unfinished(target, place)
                place = target if work == target else place
                temporary = stack.enter_context(unfinished_folder(work, target, keeper.is_kept))
        with explained_space(path, temporary, *() if keeper is None else (keeper.say_kept,)):
            if keeper is not None:
                keeper.start(temporary)
            new = temporary / "new"
            new.mkdir(exist_ok=keeper is not None)
            yield new
            for written in [*new.rglob("*"), new]:
                sync(written)
            has_others = refuse_others(path, list_own, force=force)
            if not target.is_dir():
                new.rename(target)
            elif place == target or has_others or not _exchange(path, new, target):
                _replace_files(target, temporary, last, list_own(target))
            sync(place)


@contextmanager
def new_remote_folder(
    path: Path, last: str, list_own: ListOwn, *, force: bool, keeper: Keeper | None
) -> Iterator[Path]:
    """Do what new_folder does behind a URI, where nothing can be renamed, and no folder be replaced in one step.

    Files are put beside the folder, in ".NAME.embpack-unfinished/new". When all are there they are copied, where they
    lie: the last one is removed first and copied last, so that readers find the old files, none, or the new ones.
    Nothing keeps two runs into one folder apart.
    """
    work, is_kept = unfinished_path(path.parent, path), False
    try:
        with explained(path, "cannot be written"):
            refuse_others(path, list_own, force=force)
        if keeper is None:
            remove_others(work, set())
        else:
            keeper.start(work)
        yield work / "new"
        with explained(path, "cannot be written"):
            own = list_own(path)
            refuse_others(path, lambda folder: own, force=force)
            _publish(path, work / "new", last, own)
    except BaseException as error:
        is_kept = keeper is not None and keeper.is_kept(error)
        if keeper is not None and is_kept and isinstance(error, OSError):
            error.add_note(f"{path}: {keeper.say_kept()}")
        raise
    finally:
        if not is_kept:
            with suppress(OSError):  # the next run does it
                remove_others(work, set())


def _publish(path: Path, new: Path, last: str, own: Collection[str]) -> None:
    """Copy files into a folder, in place of its own; if that cannot be done to its end, neither stay there."""
    names = list_objects(new)
    remove(path / last)
    try:
        for_each(lambda name: copy(new / name, path / name), [name for name in names if name != last])
        for_each(lambda name: remove(path / name), sorted(set(own) - {*names, last}))
        copy(new / last, path / last)
    except BaseException as error:
        with suppress(OSError):
            for_each(lambda name: remove(path / name), sorted({*names, *own}))
        if own:
            error.add_note(f"{path}: the files of the earlier packing were being replaced, and are gone")
        raise


def remove_others(work: Path, kept: Collection[str]) -> None:
    """Remove all files of a folder that is being written, but for some, by their paths in it; and empty folders."""
    if is_remote(work):
        for_each(lambda name: remove(work / name), [name for name in list_objects(work) if name not in kept])
        return
    for path in sorted(work.rglob("*"), reverse=True):  # what is in a folder before that
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it is not empty
                path.rmdir()
        elif path.relative_to(work).as_posix() not in kept:
            path.unlink()


def refuse_others(path: Path, list_own: ListOwn, *, force: bool = False) -> bool:
    """Return whether the folder that is to be replaced has files that are not to be.

    Raises:
        FileExistsError: path is a file, or there are such files and no force.
    """
    if not path.is_dir():
        if path.exists():
            raise FileExistsError(f"{path} is a file, but a folder is to be written; choose another name")
        return False
    own = list_own(path)
    others = list(islice((name for name in iter_files(path) if name not in own), _MOST_NAMED + 1))
    if others and not force:
        more = " and more" if len(others) > _MOST_NAMED else ""
        raise FileExistsError(
            f"{path} is a folder that is not empty, and nothing says that embpack wrote "
            f"{', '.join(others[:_MOST_NAMED])}{more}; choose another name, or write into it with --force (in Python "
            "force=True), which keeps files of other names"
        )
    return bool(others)


def _must_stay(target: Path) -> bool:
    """Whether an existing folder has to stay where it is, and only what is in it can be replaced."""
    if not target.is_dir():
        return False
    is_empty = next(iter_files(target), None) is None
    if is_empty or is_mounted(target) or os.path.samestat(target.stat(), Path().stat()):
        return True
    return not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=True)


def _find_unfinished(target: Path, place: Path) -> Path:
    """Find the folder where an earlier run has left its files; place if none has.

    What place is may have changed since: somebody made the folder, put a file into it, or works in it.
    """
    other = target.parent if place == target else target
    if unfinished_path(place, target).is_dir() or not unfinished_path(other, target).is_dir():
        return place
    is_near = other.stat().st_dev == place.stat().st_dev  # files cannot be renamed over to another file system
    return other if is_near and os.access(other, os.W_OK | os.X_OK, effective_ids=True) else place


def _exchange(path: Path, new: Path, target: Path) -> bool:
    """Have two folders exchange their names in one step, and the new one get the mode and owner of the old one.

    Returns:
        Whether the system can.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    try:
        keep_owner_and_mode(descriptor, target.stat())
    finally:
        os.close(descriptor)
    if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(path))


def _replace_files(target: Path, temporary: Path, last: str, own: Collection[str]) -> None:
    """Take old files out of a folder and give new ones their names in it; the last one first, and last of all.

    An exception takes all back.
    """
    new, old = temporary / "new", temporary / "old"
    names = sorted(iter_files(new), key=lambda name: (name == last, name))
    there = {name for name in {*own, *names} if _is_file_or_link(target / name)}
    gone = sorted(there, key=lambda name: (name != last, name))
    moves = [(target / name, old / name) for name in gone]
    moves += [(new / name, target / name) for name in names]
    folders = {parent for name in (*gone, *names) for parent in Path(name).parents if parent.name}
    try:
        for source, destination in moves:
            if source == new / last:
                sync(target)
            destination.parent.mkdir(parents=True, exist_ok=True)
            source.rename(destination)
    except BaseException:
        for source, destination in reversed(moves):
            if os.path.lexists(destination) and not os.path.lexists(source):
                source.parent.mkdir(parents=True, exist_ok=True)
                destination.rename(source)
        raise
    finally:
        for folder in sorted(folders, reverse=True):  # inner ones first
            with suppress(OSError):  # it is not empty
                (target / folder).rmdir()


def _is_file_or_link(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_dir())


@contextmanager
def _explained_other(path: Path) -> Iterator[None]:
    """Say that another process writes a folder."""
    try:
        yield
    except FileExistsError as error:
        message = f"{path} is being written by another process ({error.filename}); wait for it, or choose another name"
        raise reword(error, message) from error

"""Where what becomes of a checkpoint is written: what is there before, and what its files are called."""

from collections.abc import Callable
from pathlib import Path

from embpack.formats import FORMATS, Checkpoint, Shard
from embpack.formats.atomic import check_new, refuse_other
from embpack.formats.new_folder import ListOwn, refuse_others
from embpack.formats.paths import is_remote, is_same
from embpack.formats.remote import explained


def check_place(checkpoint: Checkpoint, dst: Path, list_own: ListOwn, *, as_folder: bool, force: bool) -> None:
    """Raise what writing what becomes of a checkpoint, a folder or a file, would of the place, before it is read."""
    with explained(dst, "cannot be written"):
        _check_place(checkpoint, dst, list_own, as_folder=as_folder, force=force)


def _check_place(checkpoint: Checkpoint, dst: Path, list_own: ListOwn, *, as_folder: bool, force: bool) -> None:
    if is_remote(dst) and not dst.name:
        raise ValueError(f"{dst}: names a bucket alone; give the name of a file or folder in it")
    if checkpoint.is_folder and dst.suffix.lower() in {*FORMATS, ".json"}:
        what = f"{checkpoint.path} is sharded" if checkpoint.folder is None else f"{checkpoint.folder} is a folder"
        raise ValueError(f"{dst}: {what}, so the destination is a folder; leave {dst.suffix} out")
    sources = [checkpoint.path, checkpoint.folder, checkpoint.path.parent if checkpoint.is_folder else None]
    if any(source is not None and is_same(dst, source) for source in sources):
        raise ValueError(f"{dst}: the destination is the source; choose another name")
    if as_folder and dst.exists():
        refuse_others(dst.absolute(), list_own, force=force)
        if is_remote(dst):
            check_new(dst)
    else:
        refuse_other(dst, lambda existing: force or existing.name in list_own(existing))
        check_new(dst)


def name_file(checkpoint: Checkpoint, shard: Shard, dst: Path, rename: Callable[[str], str]) -> str:
    """Name the file that a shard becomes: a folder's by its path in that."""
    if not checkpoint.is_folder:
        return dst.name
    # Nobody opens a shard but by the index.
    name = shard.file_name if checkpoint.index_name else rename(shard.file_name)
    return (checkpoint.place / name).as_posix()


def name_index(checkpoint: Checkpoint, rename: Callable[[str], str]) -> str | None:
    """Name the index that a folder gets, by its path in that; None if it gets none."""
    return checkpoint.index_name and (checkpoint.place / rename(checkpoint.index_name)).as_posix()


def name_cut(checkpoint: Checkpoint, count: int, rename: Callable[[str], str]) -> tuple[list[str], str | None]:
    """Name so many files that a checkpoint is cut into, and their index, by their paths in the folder.

    One file keeps the name that it has in a folder without an index, and has none.
    """
    usual = "model.safetensors"
    if count == 1:
        name = checkpoint.path.name if checkpoint.is_folder and checkpoint.index_name is None else usual
        return [(checkpoint.place / rename(name)).as_posix()], None
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    paths = [(checkpoint.place / name).as_posix() for name in names]
    return paths, (checkpoint.place / rename(f"{usual}.index.json")).as_posix()

"""Packed files whose tables change: some rows are packed anew, all other bytes stay."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embpack.changes import Change, WriteRows, pack_changes, read_changes
from embpack.deltas import ColumnNames, Delta, open_deltas
from embpack.files import (
    METADATA_KEY,
    TableEntry,
    check_bytes,
    digest_tensors,
    format_checksum,
    is_packed,
    make_metadata,
)
from embpack.formats import INDEX_SUFFIX, Checkpoint, Shard, SourceTensor, open_checkpoint
from embpack.formats.atomic import keep_owner_and_mode, new_file
from embpack.formats.copying import copy_bytes, write_all
from embpack.formats.new_folder import iter_files, new_folder
from embpack.formats.paths import as_path, is_remote
from embpack.formats.safetensors import replace_metadata
from embpack.kept import forget_rows
from embpack.methods import measure_loss
from embpack.methods.base import find_warning
from embpack.packed_files import PackedCheckpoint, PackedFile, TablePiece, check_packed, describe_files, find_loss
from embpack.packed_folder import list_own
from embpack.rewriting import NewFile, NewFiles, source_of, stored_of
from embpack.shard_writer import Progress, no_progress
from embpack.updating import warn_of_misfits

WARN_SHARE = 0.01
"""The share of the changed rows of a table that may not fit what its rows share, before there is a warning."""


@dataclass(frozen=True)
class TableUpdate:
    """What updating one table came to, or would come to.

    Attributes:
        name: of the table.
        num_embeddings: rows.
        embedding_dim: values of a row.
        method: that packed it.
        ids_seen: rows that the deltas have of it.
        rows_changed: rows of it that they change.
        num_misfits: changed rows that do not fit what the table's rows share (embpack.updating); None if none were
            packed.
        loss_before: normalized l2 loss of the table before; None where unknown.
        loss_changed: that of the changed rows; None if none were packed.
        loss_after: that of the table; None where it is unknown, as where some of its rows were packed long ago.
        warning: what to know of it and to do about it; None if there is nothing.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    method: str
    ids_seen: int
    rows_changed: int
    num_misfits: int | None
    loss_before: float | None
    loss_changed: float | None
    loss_after: float | None
    warning: str | None = None

    @property
    def duplicates(self) -> int:
        """Rows of the deltas that later ones overwrite."""
        return self.ids_seen - self.rows_changed


@dataclass(frozen=True)
class FileUpdateReport:
    """What updating files came to.

    Attributes:
        tables: those that change, in the order of the files.
        files: that change, by their names in the folder, or the name of the file.
        seconds: all in all.
    """

    tables: tuple[TableUpdate, ...]
    files: tuple[str, ...]
    seconds: float


def update_file(
    path: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    table_column: str | None = None,
    id_column: str = "key_id",
    row_column: str = "embedding",
    step_column: str | None = None,
    method: str | None = None,
    warn_share: float = WARN_SHARE,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> FileUpdateReport:
    """Change rows of packed tables in their file, which is replaced by a new one, whole or not at all.

    Rows are packed as the table was: by its method, with its rotation and what its rows share. All other bytes stay.
    Processes that have the old file mapped go on with it. Its checksums are compared meanwhile. Memory is bounded
    however large files and deltas are, but for 24 bytes for each row that changes.

    Args:
        path: what quantize_file or save wrote: a file, a folder, or an index.
        deltas: the new rows, each a file: .parquet with columns for table, id and row; .npz with arrays TABLE.indices
            and TABLE.rows; "IDS.npy,ROWS.npy"; or a folder into which TorchEasyRec dumps such Parquet files. Where a
            delta does not name the table, "TABLE=" before it does, and a file with but one table needs none. Rows are
            float32, float16 or bfloat16, or uint8 [embedding_dim + 4] as FBGEMM quantizes them: codes, then scale and
            bias as float16. A table may be named with or without ".weight".
        out: the new file or folder; None replaces the old one. In a new folder files without changes are links to the
            old ones.
        table_column: of Parquet files, names of tables; None is "table_fqn", if there is one.
        id_column: numbers of rows.
        row_column: lists of values.
        step_column: when a row was written; None is "global_step", if there is one. Of several rows for one id that of
            the largest step counts, and of those, or where there are no steps, the last in the order of the deltas.
        method: that packs rows of tables of which no file says it, such as those of PackedTable.from_packed.
        warn_share: a table is warned of if more than this share of its changed rows do not fit what its rows share.
        dry_run: read the ids alone, and write nothing.
        force: replace what is at out though embpack did not write it.
        progress: called with a table's name and a number of rows: as they are packed, and as the table's are checked.

    Raises:
        FileExistsError: there is something at out that embpack did not write, and no force; or another process is
            updating path.
        FileNotFoundError: there is no such file, or a rank's is missing.
        FormatError: a file is damaged, its bytes were altered, or it was changed meanwhile.
        IndexError: an id is out of range; named with its file and place.
        ValueError: no table, or more than one, has the name that a delta says; a row has another number of values, or
            NaN or infinity; the deltas are none of the above; path is one of several files that belong together; a
            path is a URI.
        OSError: the new file cannot be written.
    """
    names = ColumnNames(table_column, id_column, row_column, step_column)
    with open_update(path, deltas, names) as update:
        if dry_run:
            return update.foresee()
        return update.write(out, method=method, warn_share=warn_share, force=force, progress=progress)


@contextmanager
def open_update(
    path: str | os.PathLike[str], deltas: Sequence[str | os.PathLike[str]], names: ColumnNames
) -> Iterator["FileUpdate"]:
    """Do what update_file does up to where it writes: open the files, and read which rows change."""
    started = time.perf_counter()
    with open_checkpoint(as_local(path)) as checkpoint, open_deltas(deltas, names) as opened:
        packed = check_packed(checkpoint)
        changes = read_changes(opened, packed.tables, checkpoint.path)
        yield FileUpdate(checkpoint, packed, opened, changes, started)


@dataclass(frozen=True)
class FileUpdate:
    """Rows of packed files that are to change; the files are open.

    Attributes:
        checkpoint: the files.
        packed: what is in them.
        deltas: the new rows.
        changes: by table.
        started: when the work began.
    """

    checkpoint: Checkpoint
    packed: PackedCheckpoint
    deltas: Sequence[Delta]
    changes: Sequence[Change]
    started: float

    @property
    def totals(self) -> dict[str, int]:
        """How many rows write tells its progress of, by table."""
        return {
            change.table.name: len(change.ids) + sum(piece.entry.num_embeddings for piece in change.pieces.values())
            for change in self.changes
        }

    @property
    def files(self) -> list[tuple[Shard, PackedFile]]:
        """Those that change."""
        found = {id(piece.file) for change in self.changes for piece in change.pieces.values()}
        pairs = zip(self.checkpoint.shards, self.packed.files, strict=True)
        return [(shard, file) for shard, file in pairs if id(file) in found]

    @property
    def folder(self) -> Path | None:
        """The folder that is replaced, or becomes another; None if it is one file."""
        if not self.checkpoint.is_folder:
            return None
        return self.checkpoint.path.parent if self.checkpoint.folder is None else self.checkpoint.folder

    def foresee(self) -> FileUpdateReport:
        """Say what would change; nothing is packed."""
        return self._report([_report(change) for change in self.changes])

    def write(
        self,
        out: str | os.PathLike[str] | None,
        *,
        method: str | None = None,
        warn_share: float = WARN_SHARE,
        force: bool = False,
        progress: Progress = no_progress,
    ) -> FileUpdateReport:
        """Pack the rows, and write the new files; as update_file says."""
        for _, file in self.files:
            if file.contents.others is None:
                raise ValueError(
                    f"{file.path}: format version 1 has no checksums of all that it has, which an update would need; "
                    "write the file anew: embpack.save(path, embpack.load(path))"
                )
        target = None if out is None else as_local(out)
        if target is None and not self.changes:
            return self.foresee()
        pack = partial(
            pack_changes, self.deltas, self.changes, self.checkpoint.path, method=method or "", progress=progress
        )
        if self.folder is None:
            entries = self._write_file(target, pack, force=force, progress=progress)
        else:
            entries = self._write_folder(self.folder, target, pack, force=force, progress=progress)
        return self._report([_report(change, entries, warn_share) for change in self.changes])

    def _report(self, tables: Sequence[TableUpdate]) -> FileUpdateReport:
        return FileUpdateReport(
            tables=tuple(tables),
            files=tuple(shard.file_name for shard, _ in self.files),
            seconds=time.perf_counter() - self.started,
        )

    def _write_file(
        self, out: Path | None, pack: Callable[[WriteRows], None], *, force: bool, progress: Progress
    ) -> dict[str, TableEntry]:
        """Write the new file, and return the entries of its tables that changed."""
        source = self.checkpoint.path
        target = out or source
        if target.suffix != ".safetensors":
            raise ValueError(f"{target}: {source} is a file of packed tables, so the new one ends in .safetensors")
        is_same = target.exists() and target.samefile(source)
        if is_same:
            refuse_shard(source)
        [(shard, file)] = self.files or [(self.checkpoint.shards[0], self.packed.files[0])]
        with ExitStack() as stack:
            if is_same:
                stack.enter_context(_alone(source))
            opened = stack.enter_context(new_file(target, lambda existing: force or is_same or is_packed(existing)))
            descriptor = opened.fileno()
            new = self._make_new(file, lambda: nullcontext(descriptor))
            pack(NewFiles([new]).add)
            entries = self._finish(new, shard, descriptor, progress)
            if is_same:
                _refuse_changed([file])
        return entries

    def _write_folder(
        self,
        folder: Path,
        out: Path | None,
        pack: Callable[[WriteRows], None],
        *,
        force: bool,
        progress: Progress,
    ) -> dict[str, TableEntry]:
        """Write the new folder, and return the entries of its tables that changed."""
        target = out or folder
        if target.suffix == ".safetensors":
            raise ValueError(f"{target}: {folder} is a folder, so the new one is, too; leave {target.suffix} out")
        is_same = target.exists() and target.samefile(folder)
        names = set(iter_files(folder))
        place = self.checkpoint.path.parent.relative_to(folder)
        last = place / (self.checkpoint.index_name or self.checkpoint.shards[0].file_name)
        # What is put into the folder meanwhile is not ours to remove.
        may_replace = (lambda _: names) if is_same else list_own
        changed = {(place / shard.file_name).as_posix(): (shard, file) for shard, file in self.files}
        with ExitStack() as stack:
            if is_same:
                stack.enter_context(_alone(self.checkpoint.path))
            new = stack.enter_context(new_folder(target, last.as_posix(), may_replace, force=force))
            for name in names - set(changed):
                _place(folder / name, new / name, is_same=is_same)
            made = {}
            for name, (_, file) in changed.items():
                with _create(new / name, file.path):
                    made[name] = self._make_new(file, partial(_open, new / name))
            pack(NewFiles([*made.values()]).add)
            entries = {}
            for name, (shard, _) in changed.items():
                with _open(new / name) as descriptor:
                    entries.update(self._finish(made[name], shard, descriptor, progress))
            if METADATA_KEY in self.checkpoint.index_metadata and changed:
                self._write_index(folder, place, new)
            if is_same:
                _refuse_changed([file for _, file in changed.values()])
        return entries

    def _write_index(self, folder: Path, place: Path, new: Path) -> None:
        """Write the index anew, which has checksums of headers."""
        assert self.checkpoint.index_name is not None
        name = (place / self.checkpoint.index_name).as_posix()
        names = [(place / shard.file_name).as_posix() for shard in self.checkpoint.shards]
        index = json.loads((folder / name).read_bytes())
        index["metadata"].update(describe_files(names, name, new))
        (new / name).unlink()  # the link to the old one
        with _create(new / name, folder / name) as descriptor, os.fdopen(os.dup(descriptor), "w") as file:
            file.write(json.dumps(index, indent=2) + "\n")

    def _make_new(self, file: PackedFile, open_new: Callable[[], AbstractContextManager[int]]) -> NewFile:
        pieces = [piece for change in self.changes for piece in change.pieces.values() if piece.file is file]
        return NewFile(file, pieces, open_new)

    def _finish(self, new: NewFile, shard: Shard, descriptor: int, progress: Progress) -> dict[str, TableEntry]:
        """Write the rest of a file, with its header; returns the entries that changed."""
        own = {
            piece.name: (change, number)
            for change in self.changes
            for number, piece in change.pieces.items()
            if piece.file is new.file
        }
        checksums = new.finish({name: partial(progress, change.table.name) for name, (change, _) in own.items()})
        entries = {name: change.renew(number, checksums[name]) for name, (change, number) in own.items()}
        tables, others = {**new.file.contents.tables, **entries}, dict(new.file.contents.others or {})
        for change, number in own.values():
            piece = change.pieces[number]
            if piece.kept is not None:
                others[piece.kept.name] = _forget_rows(piece, piece.kept, change.ids, others, descriptor)
        metadata = make_metadata(tables, others, shard.tensors, is_compact=True)
        replace_metadata(descriptor, new.file.path, {**shard.metadata, **metadata})
        return entries


def _forget_rows(
    piece: TablePiece, kept: SourceTensor, ids: NDArray[np.int64], checksums: Mapping[str, str], descriptor: int
) -> str:
    """Write that it is not known of which source's rows the new ones are; returns the checksum of what is kept."""
    check_bytes(piece.file.path, f"tensor {kept.name!r}", digest_tensors([kept]), checksums[kept.name])
    own = ids[(ids >= piece.first_row) & (ids < piece.end_row)] - piece.first_row
    known = forget_rows(kept.read(), piece.entry.embedding_dim, own)
    write_all(descriptor, known.reshape(-1).data, stored_of(kept).offset)
    return format_checksum(hashlib.sha256(known.data))


def _report(
    change: Change, entries: Mapping[str, TableEntry] | None = None, warn_share: float = WARN_SHARE
) -> TableUpdate:
    """Say what a change came to; without entries, those of what was written, nothing was packed."""
    table, sums = change.table, [span for own in change.sums.values() for span in own]
    is_done = entries is not None
    renewed = [entries.get(piece.name, piece.entry) for piece in table.pieces] if entries is not None else []
    return TableUpdate(
        name=table.name,
        num_embeddings=table.entry.num_embeddings,
        embedding_dim=table.entry.embedding_dim,
        method=table.entry.method,
        ids_seen=change.ids_seen,
        rows_changed=len(change.ids),
        num_misfits=change.num_misfits if is_done else None,
        loss_before=table.entry.loss,
        loss_changed=measure_loss(sums) if is_done else None,
        loss_after=find_loss(renewed) if is_done else None,
        warning=warn_of_misfits(change.num_misfits, len(change.ids), warn_share) or find_warning(sums),
    )


def as_local(path: str | os.PathLike[str]) -> Path:
    """Make a path of this machine of what a user gives.

    Raises:
        ValueError: it is a URI.
    """
    found = as_path(path)
    if is_remote(found):
        raise ValueError(f"{path}: only files of this machine are updated; copy it here, and the new one back")
    return found


def refuse_shard(path: Path) -> None:
    """Raise ValueError if an index beside a file has the checksum of its header: by itself it must not change."""
    for index in path.parent.glob(f"*{INDEX_SUFFIX}"):
        try:
            headers = json.loads(index.read_bytes())["metadata"][METADATA_KEY]["headers"]
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            continue
        if path.name in headers:
            raise ValueError(f"{path}: is one of the files of {index}, which has a checksum of it; give that index")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other updates of a file or folder out until the new one has its name, where the file system has locks.

    One that has opened the old file before, and comes after, hears of it by _refuse_changed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"{path} is being updated by another process; run again when it is done") from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _refuse_changed(files: Sequence[PackedFile]) -> None:
    """Raise FormatError if a file was changed meanwhile: what another update made of it would be lost."""
    for file in files:
        source = source_of(file)
        with source:
            source.check()


@contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _create(path: Path, like: Path) -> Iterator[int]:
    """Make a file with the mode and the owner of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        keep_owner_and_mode(descriptor, like.stat())
        yield descriptor
    finally:
        os.close(descriptor)


def _place(source: Path, target: Path, *, is_same: bool) -> None:
    """Put a file that does not change into the new folder: a link to it where nobody writes into it, or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_same or is_packed(source):
        try:
            os.link(source if is_same else source.resolve(), target, follow_symlinks=False)
        except OSError:  # another file system, or one without such links
            pass
        else:
            return
    with source.open("rb") as opened, _create(target, source) as descriptor:
        copy_bytes(opened.fileno(), descriptor, 0, source.stat().st_size)

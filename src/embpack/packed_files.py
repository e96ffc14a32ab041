"""Packed files that are open, and their tables: each in one piece, or in several over the files of a folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

from numpy.typing import NDArray

from embpack.disk import DiskRows, DiskTable
from embpack.errors import FormatError
from embpack.files import (
    METADATA_KEY,
    Contents,
    TableEntry,
    check_bytes,
    digest_tensors,
    name_piece,
    read_contents,
    split_shard,
)
from embpack.formats import INDEX_SUFFIX, Checkpoint, Shard, SourceTensor, open_checkpoint
from embpack.formats.joined import join_arrays
from embpack.formats.paths import as_path, is_remote
from embpack.formats.remote import explained, refuse_access
from embpack.kept import SUFFIX, is_kept
from embpack.lookups import Table
from embpack.methods.base import join_losses
from embpack.pages import use_huge_pages
from embpack.table import PackedTable

Access = Literal["mapped", "memory", "disk"]
"""Where rows are when they are looked up: in the mapped file, all in memory of this process, or on the disk."""


@dataclass(frozen=True)
class PackedFile:
    """One file of ours, checked, which can be read until the block of open_packed ends.

    Attributes:
        contents: what it says of itself.
        parts: the tensors of each table, or piece of one, its packed rows first.
        others: its other tensors, by name.
        kept: what it keeps of the source's rows (embpack.kept), by the names of the tables, or pieces, that have it.
    """

    path: Path
    contents: Contents
    parts: dict[str, list[SourceTensor]]
    others: dict[str, SourceTensor]
    kept: dict[str, SourceTensor]

    def verify(self, name: str) -> None:
        """Read a table, or a piece of one, through and compare its checksum.

        Raises:
            FormatError: the bytes are not those that were written.
        """
        promised = self.contents.tables[name].checksum
        check_bytes(self.path, f"table {name!r}", digest_tensors(self.parts[name]), promised)

    def verify_others(self) -> None:
        """Do the same for all tensors that are no table's, where there are checksums of them."""
        tensors = self.others | {tensor.name: tensor for tensor in self.kept.values()}
        for name, promised in (self.contents.others or {}).items():
            check_bytes(self.path, f"tensor {name!r}", digest_tensors([tensors[name]]), promised)


@dataclass(frozen=True)
class TablePiece:
    """Rows of a table that lie in one file.

    Attributes:
        file: which has them.
        name: of the tensor with the packed rows.
        first_row: of the table, where it begins.
    """

    file: PackedFile
    name: str
    first_row: int

    @property
    def entry(self) -> TableEntry:
        """What the file says of it."""
        return self.file.contents.tables[self.name]

    @property
    def parts(self) -> list[SourceTensor]:
        """Its tensors, packed rows first."""
        return self.file.parts[self.name]

    @property
    def kept(self) -> SourceTensor | None:
        """What its file keeps of the source's rows; None if nothing."""
        return self.file.kept.get(self.name)

    @property
    def end_row(self) -> int:
        """Row of the table that follows its last."""
        return self.first_row + self.entry.num_embeddings


@dataclass(frozen=True)
class StoredTable:
    """A table in files of ours, which can be read until the block of open_packed ends.

    Attributes:
        entry: what the files say of the whole of it; of a table in several pieces there is no checksum: "".
        pieces: in the order of their rows, which follow each other; just one, in most files.
    """

    name: str
    entry: TableEntry
    pieces: tuple[TablePiece, ...]

    @property
    def keeps_checksums(self) -> bool:
        """Whether its files keep checksums of the rows that it was made of."""
        return all(piece.kept is not None for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of its packed rows and of what lies beside them, in all pieces."""
        return sum(part.nbytes for piece in self.pieces for part in piece.parts)

    def verify(self) -> None:
        """Read it through and compare the checksums of all pieces.

        Raises:
            FormatError: the bytes are not those that were written.
        """
        for piece in self.pieces:
            piece.file.verify(piece.name)

    @overload
    def open(self, access: Literal["mapped", "memory"] = "mapped") -> PackedTable: ...

    @overload
    def open(self, access: Access) -> Table: ...

    def open(self, access: Access = "mapped") -> Table:
        """Return the table.

        Args:
            access: as load takes it.

        Raises:
            FormatError: a file was changed, or the arrays beside the rows are not what they should be.
        """
        entry = self.entry
        by_row = [[piece.parts[at] for piece in self.pieces] for at in range(self._num_by_row)]
        make: Any = DiskTable if access == "disk" else PackedTable
        parts: list[Any]
        if access == "disk":
            parts = [*map(DiskRows, by_row), *self.read_shared()]
        else:
            mapped = access == "mapped"
            parts = [*(join_arrays(each, mapped=mapped) for each in by_row), *self.read_shared(mapped=mapped)]
            if not mapped:
                use_huge_pages(*parts)
        beside = {spec.name: part for spec, part in zip(entry.beside, parts[1:], strict=True)}
        try:
            table: Table = make(parts[0], entry.row_format, entry.dtype, entry.method, entry.loss, **beside)
        except ValueError as error:
            raise FormatError(f"{self.pieces[0].file.path}: table {self.name!r}: {error}") from None
        return table

    def read_shared(self, *, mapped: bool = False) -> list[NDArray[Any]]:
        """Return the arrays that all rows share, one or none; each piece has them.

        Raises:
            FormatError: they are not the same in all pieces.
        """
        first, *others = self.pieces
        shared = [part.whole(mapped=mapped) for part in first.parts[self._num_by_row :]]
        for piece in others:
            for array, part in zip(shared, piece.parts[self._num_by_row :], strict=True):
                own = part.whole(mapped=False)
                if (own.dtype, own.shape) != (array.dtype, array.shape) or own.tobytes() != array.tobytes():
                    raise FormatError(
                        f"{piece.file.path}: {part.name!r} is not as in {first.file.path}, but pieces of a table share "
                        "it; the files are of different runs"
                    )
        return shared

    @property
    def _num_by_row(self) -> int:
        """How many of its parts have an entry for each row: its packed rows, and what lies beside them."""
        return 1 + (self.entry.row_format.form.by_row(self.entry.num_embeddings) is not None)


@dataclass(frozen=True)
class PackedCheckpoint:
    """A file of ours, or those of a folder, which can be read until the block of open_packed ends.

    Attributes:
        files: just one where there is no index.
        tables: by name, in the order of the files.
    """

    files: tuple[PackedFile, ...]
    tables: dict[str, StoredTable]

    @property
    def others(self) -> dict[str, SourceTensor]:
        """All tensors that are no table's, by name."""
        return {name: tensor for file in self.files for name, tensor in file.others.items()}

    def verify(self) -> None:
        """Read everything through and compare all checksums that there are.

        Raises:
            FormatError: the bytes are not those that were written.
        """
        for table in self.tables.values():
            table.verify()
            table.read_shared()
        for file in self.files:
            file.verify_others()


@contextmanager
def open_packed(path: str | Path) -> Iterator[PackedCheckpoint]:
    """Open a file of ours, or those of a folder.

    A file that is replaced or deleted from then on is read as it was; shards, opened one at a time, must stay.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: it is damaged, truncated, not ours, or of a future version; or a table lacks a piece.
    """
    path = as_path(path)
    with explained(path):
        is_other = path.is_file() and not path.name.endswith((".safetensors", INDEX_SUFFIX))
    if is_other:
        raise FormatError(f"{path}: a file of packed tables ends in .safetensors; pack this one: embpack quantize")
    with open_checkpoint(path) as checkpoint:
        yield check_packed(checkpoint)


def check_packed(checkpoint: Checkpoint) -> PackedCheckpoint:
    """Do what open_packed does with a checkpoint that is open."""
    files = tuple(check_file(checkpoint.path.parent / shard.file_name, shard) for shard in checkpoint.shards)
    pieces: dict[str, list[TablePiece]] = {}
    for file in files:
        for name, entry in file.contents.tables.items():
            table, first_row = (name, 0) if entry.piece is None else (entry.piece.table, entry.piece.first_row)
            pieces.setdefault(table, []).append(TablePiece(file, name, first_row))
    tables = {name: _join(checkpoint.path, name, own, files) for name, own in pieces.items()}
    # Last, for what is said above says more of what is wrong.
    if METADATA_KEY in checkpoint.index_metadata:
        found = {shard.file_name: file.contents.checksum for shard, file in zip(checkpoint.shards, files, strict=True)}
        _check_index(checkpoint.path, checkpoint.index_metadata[METADATA_KEY], found)
    return PackedCheckpoint(files, tables)


def describe_files(names: Sequence[str], index_name: str, folder: Path) -> dict[str, Any]:
    """Make what the index of a table in pieces says of its files, which are written: the checksums of their headers.

    Args:
        names: of the files, by their paths in the folder.
        index_name: of the index, likewise.
        folder: where they are now.
    """
    checksums = {}
    for name in names:
        with open_checkpoint(folder / name) as checkpoint:
            [shard] = checkpoint.shards
            where = Path(name).relative_to(Path(index_name).parent).as_posix()
            checksums[where] = read_contents(folder / name, shard).checksum
    return {METADATA_KEY: {"headers": checksums}}


def _check_index(path: Path, said: Any, found: Mapping[str, str | None]) -> None:
    """Compare the headers of files with those that their index was written with."""
    listed = said.get("headers") if isinstance(said, dict) else None
    if not isinstance(listed, dict):
        raise FormatError(f"{path}: what it says of its files is damaged; copy the folder again")
    for name, checksum in found.items():
        if listed.get(name) != checksum:
            raise FormatError(
                f"{path}: {name} is not the file that this index was written with, so its rows may be of another "
                "packing; copy the folder whole"
            )


def check_file(path: Path, shard: Shard) -> PackedFile:
    """Check a file of a checkpoint by itself.

    Raises:
        FormatError: as read_contents.
    """
    contents = read_contents(path, shard)
    parts, others = split_shard(shard, contents.tables)
    by_name = {tensor.name: tensor for tensor in others}
    kept = {}
    for name, entry in contents.tables.items() if contents.others is not None else ():
        tensor = by_name.get(name + SUFFIX)
        if tensor is not None and is_kept(tensor, entry.num_embeddings, entry.embedding_dim):
            kept[name] = by_name.pop(tensor.name)
    return PackedFile(path, contents, parts, by_name, kept)


def _join(path: Path, name: str, pieces: Sequence[TablePiece], files: Sequence[PackedFile]) -> StoredTable:
    """Put a table together of all its pieces."""
    [first, *others] = pieces = sorted(pieces, key=lambda piece: piece.first_row)
    if first.entry.piece is None and not others:
        return StoredTable(name, first.entry, (first,))
    where = f"{path}: table {name!r}"
    if any(piece.entry.piece is None for piece in pieces) or any(name in file.others for file in files):
        raise FormatError(f"{where} is there in pieces and as a tensor of its own, and which one is meant is unknown")
    num_embeddings, described = _describe(first)
    end_row = 0
    for number, piece in enumerate(pieces):
        if _describe(piece) != (num_embeddings, described):
            raise FormatError(
                f"{where}: {piece.name!r} is {_describe(piece)}, but {first.name!r} is {_describe(first)}; the files "
                "are of different runs"
            )
        if piece.first_row > end_row:
            raise _explain_missing(where, number, end_row, piece.first_row, files)
        if piece.first_row < end_row or piece.name != name_piece(name, number):
            raise FormatError(f"{where}: {piece.name!r} has rows from {piece.first_row} on, which others have, too")
        end_row = piece.end_row
    if end_row < num_embeddings:
        raise _explain_missing(where, len(pieces), end_row, num_embeddings, files)
    loss = find_loss([piece.entry for piece in pieces])
    entry = replace(first.entry, num_embeddings=num_embeddings, loss=loss, checksum="", piece=None)
    return StoredTable(name, entry, tuple(pieces))


def find_loss(entries: Sequence[TableEntry]) -> float | None:
    """Find the loss of a table from the entries of all its pieces; None if it is unknown of any."""
    if entries[0].piece is None:
        return entries[0].loss
    known = [(each.loss, each.piece.square_norm) for each in entries if each.piece and each.loss is not None]
    losses = [(loss, square) for loss, square in known if square is not None]
    return join_losses(losses) if len(losses) == len(entries) else None


def _describe(piece: TablePiece) -> tuple[int, tuple[str, ...]]:
    """What all pieces of a table have in common: rows of the whole, and in words what they are."""
    entry = piece.entry
    assert entry.piece is not None  # of a table in pieces
    beside = (part.dtype for part in piece.parts[1:])
    return entry.piece.num_embeddings, (str(entry.row_format), entry.dtype, entry.method, *beside)


def _explain_missing(where: str, number: int, start: int, stop: int, files: Sequence[PackedFile]) -> FormatError:
    """Say which rows are missing, and where to get them."""
    there = {file.path.name for file in files}
    numbered = re.fullmatch(r"(.*-)([0-9]{5})-of-([0-9]{5})\.safetensors", files[0].path.name)
    advice = "open the folder that has all files of the table"
    if numbered is not None:
        names = (f"{numbered[1]}{k:05}-of-{numbered[3]}.safetensors" for k in range(1, int(numbered[3]) + 1))
        missing = next((name for name in names if name not in there), None)
        if missing is not None and (files[0].path.parent / missing).is_file():
            advice = f"{missing} is there, too: open the folder, or its index"
        elif missing is not None:
            advice = f"download {missing}"
    return FormatError(f"{where}: piece_{number} (rows {start} to {stop}) is missing: {advice}")


@overload
def load(
    path: str | Path, *, verify: bool = False, access: Literal["mapped", "memory"] = "mapped"
) -> dict[str, PackedTable]: ...


@overload
def load(path: str | Path, *, verify: bool = False, access: Literal["disk"]) -> dict[str, DiskTable]: ...


def load(path: str | Path, *, verify: bool = False, access: Access = "mapped") -> Any:
    """Open the tables of a file without reading them: rows are read when they are looked up.

    Args:
        path: a file written by save or quantize_file; of several files their folder or index. Or its URI, "s3://...",
            for access "memory".
        verify: read the tables through once and compare their checksums. That of the header is always compared; other
            tensors are not read, embpack inspect --verify and dequantize do that.
        access: where rows are when they are looked up. "mapped": in the file, whose pages are read then, one after the
            other; "memory": everything is read now, into memory of this process, in huge pages. Rows are then looked up
            as fast the first time as later, and the file is no longer needed. But processes that serve the same file no
            longer share its memory, and all of it has to fit (docs/kernels.md has figures). "disk": the rows of a
            lookup are read when it is made, many at a time: for tables that are larger than memory (docs/disk.md).

    Returns:
        Name to table, a DiskTable if access is "disk", a PackedTable otherwise; a table in pieces is one table. Mapped
        bytes are read-only; they live as long as the tables do,
        also when the file is replaced, as save does it, or deleted. But never write into a file that is mapped: that
        changes the tables, and if it is made shorter, the process ends (SIGBUS) when it looks up a row that is gone; a
        check before each lookup could not prevent it. Replace such files, or load them with another access. Where the
        file system allows no maps, or a piece of a table does not begin at a page of its file, it is read into memory,
        with a RuntimeWarning. Before Python 3.13 a mapped file keeps a descriptor open, one with a piece of a table
        does not.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version, says of its bytes what was not
            written, lacks a piece of a table, or was changed while it was read; with verify, a table's bytes were
            altered.
        OSError: the file cannot be read, or too many files are open.
        ValueError: there is no such access, or path is a URI and access not "memory".
    """
    path = as_path(path)
    check_access(access, path)
    tables = {}
    with open_packed(path) as checkpoint:
        for name, table in checkpoint.tables.items():
            if verify:
                table.verify()
            tables[name] = table.open(access)
    return tables


def check_access(access: str, path: Path) -> None:
    """Raise ValueError if there is no such way to have rows, or none of what is under a path."""
    if access not in get_args(Access):
        raise ValueError(f"access is {access!r}; choose one of {', '.join(get_args(Access))}")
    if is_remote(path) and access != "memory":
        refuse_access(path, access)

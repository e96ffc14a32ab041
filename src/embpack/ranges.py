"""Ranges of rows: what is packed at a time, by whichever process, and files that are put together of them.

A range is packed into a part, a file of its own: its packed rows, after them its entries of the array that lies beside
them by row, if there is one, and what is kept of the source's rows, if that is. A file beside it, whose name ends in
.json, says what is known of it. Everything here may be done twice, at the same time, and comes to the same bytes.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.errors import FormatError
from embpack.formats.atomic import explained_place, new_object, remove_file, sync
from embpack.formats.base import as_bytes
from embpack.formats.new_folder import iter_files
from embpack.formats.paths import is_remote
from embpack.formats.remote import for_each
from embpack.formats.safetensors import write_safetensors
from embpack.formats.source import SourceFile, make_source
from embpack.kept import RANGE, count_ranges
from embpack.methods import Packer
from embpack.methods.base import Sums, condense
from embpack.packing import PackedRows
from embpack.rules import Decision
from embpack.shard_writer import DonePiece, PieceWriter, ShardWriter, TableWriter, no_progress

# Some seconds of work, most of the time, of which little is lost where a worker dies.
_RANGE_VALUES = 1 << 24
_PORTION_BYTES = 1 << 24
_KNOWN = ".json"
_READ_AT_A_TIME = 16


@dataclass(frozen=True)
class Part:
    """A range of rows that is packed.

    Attributes:
        file: that it is for, by its number.
        start, stop: rows of the table.
        sums: few, which come to what those of all its spans come to.
        num_bytes: of its file.
        checksum: CRC-32 of them: damage is by chance, and SHA-256 takes three times as long.
        packer: a checksum of what its rows were packed by.
        seconds: spent reading, packing and writing it.
        reused_rows: that were copied from what an earlier run has packed.
    """

    file: int
    start: int
    stop: int
    sums: Sequence[Sums]
    num_bytes: int
    checksum: int
    packer: str
    seconds: float
    reused_rows: int = 0


def name_part(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a part lies in a folder, and what is known of it."""
    return folder / name, folder / f"{name}{_KNOWN}"


def read_parts(folder: Path) -> dict[str, Part]:
    """Read what is known of the parts in a folder that are there, by their names."""
    there = set(iter_files(folder))
    names = sorted(name for name in there if f"{name}{_KNOWN}" in there)
    with ThreadPoolExecutor(_READ_AT_A_TIME) as pool:
        found = pool.map(_read_known, (name_part(folder, name)[1] for name in names))
        return {name: part for name, part in zip(names, found, strict=True) if part is not None}


def _read_known(path: Path) -> Part | None:
    with suppress(ValueError, TypeError, LookupError, AttributeError, OSError):
        value = json.loads(path.read_bytes())
        return Part(**{**value, "sums": [Sums(*sums) for sums in value["sums"]]})
    return None


def remove_parts(folder: Path, names: Sequence[str]) -> None:
    """Remove parts that are of no use any more."""
    for_each(remove_file, [path for name in names for path in name_part(folder, name)])


class DamagedPartError(FormatError):
    """A part is not what was written.

    Attributes:
        name: of its file.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.args, self.name = (message, name), name  # so that it goes from process to process


def list_ranges(piece: PieceWriter) -> list[tuple[int, int]]:
    """Cut the rows of a piece into ranges, which begin where chunks of it do: losses are summed alike then."""
    step = chunk_rows(piece.table.row_format.embedding_dim)
    step *= max(1, _RANGE_VALUES // (step * piece.table.row_format.embedding_dim))
    end = piece.first_row + piece.num_rows
    return [(start, min(start + step, end)) for start in range(piece.first_row, end, step)]


def fit_table(decision: Decision) -> Packer:
    """Find what the rows of a table share, for which all of it may have to be read."""
    return TableWriter(decision).fit()


def checksum_packer(packer: Packer) -> str:
    """Checksum what rows are packed by, as metadata has checksums."""
    return f"sha256:{packer.digest().hex()}"


def pack_range(
    table: tuple[Decision, Packer], file_number: int, start: int, stop: int, folder: Path, name: str
) -> Part:
    """Pack rows [start, stop) of a table into a part of a folder, which appears whole or not at all.

    Args:
        table: and its packer.
        file_number: of the file that it is for.
        start: the first of its rows in the table.
        stop: the row after its last.
        folder: of the parts.
        name: of the part.

    Raises:
        ValueError: as Packer.pack.
        OSError: it cannot be written.
    """
    started = time.perf_counter()
    decision, packer = table
    path, known = name_part(folder, name)
    checksum, sums, num_bytes, reused_rows = 0, list[Sums](), 0, 0
    by_row, ranges = list[NDArray[Any]](), list[NDArray[Any]]()
    with _new_file(path, folder, lasting=False) as file:

        def write(array: NDArray[Any]) -> int:
            nonlocal checksum
            data = as_bytes(array)
            checksum = crc32(data, checksum)
            return file.write(data)

        for rows in TableWriter(decision, packer=packer).pack_rows(start, stop):
            num_bytes += write(rows.packed)
            sums = condense([*sums, *rows.sums])
            if rows.by_row is not None:
                by_row.append(rows.by_row)
            if rows.ranges is not None:
                ranges.append(rows.ranges)
            reused_rows += rows.reused
        num_bytes += sum(map(write, (*by_row, *ranges)))
    seconds = time.perf_counter() - started
    part = Part(
        file_number,
        start,
        stop,
        condense(sums, 1),
        num_bytes,
        checksum,
        checksum_packer(packer),
        seconds,
        reused_rows,
    )
    with _new_file(known, folder, lasting=False) as file:
        file.write(json.dumps(asdict(part)).encode())
    return part


def assemble_file(
    writer: ShardWriter, path: Path, shown: Path, room: Path, parts: Mapping[str, Sequence[tuple[Path, Part]]]
) -> dict[str, DonePiece] | DamagedPartError:
    """Make a file of a packed checkpoint of its parts, and copy the tensors that are no tables.

    Args:
        writer: of the file; its tables know their packers.
        path: of the file, which appears whole or not at all.
        shown: what errors call it.
        room: a folder where it is written until it is whole: what a worker leaves that dies is no file beside it.
        parts: of each piece, by its name, in the order of their rows.

    Returns:
        What is known of each piece, by its name; or the error of a part that is not what was written.

    Raises:
        OSError: it cannot be written.
    """
    for piece in writer.pieces:
        piece.read_rows = _PartReader(piece, parts[piece.name])
    try:
        with _new_file(path, room, lasting=True) as file:
            write_safetensors(file, shown, writer.out_shard(path.name))
    except DamagedPartError as error:
        return error
    done = {piece.name: piece.done for piece in writer.pieces if piece.done is not None}
    return {name: replace(each, seconds=sum(part.seconds for _, part in parts[name])) for name, each in done.items()}


def see_paths(sources: Sequence[tuple[Path, int, int]], mark: Path, token: str) -> str | None:
    """Say what of source files and of a destination cannot be seen from here; None if all is as it should be.

    Args:
        sources: of each file its path, its bytes, and when it was last modified, in nanoseconds.
        mark: a file that was written beside what is to be written.
        token: what is in it.
    """
    for path, size, modified_ns in sources:
        try:
            with make_source(path) as source:
                found = source.size, source.modified_ns
        except OSError as error:
            return f"{path}: {error.strerror or error}"
        if found != (size, modified_ns):
            return f"{path} is another file there"
    try:
        if mark.read_text() != token:
            return f"{mark.parent} is another folder there"
        probe = mark.with_name(f"{mark.name}.{secrets.token_hex(8)}")
        with _new_file(probe, probe.parent, lasting=False):
            pass
        remove_file(probe)
    except OSError as error:
        return f"{mark.parent}: {error.strerror or error}"
    return None


def without_progress(writer: ShardWriter) -> ShardWriter:
    """Make what assemble_file takes, which can be sent to another process."""
    tables = {id(piece.table): replace(piece.table, progress=no_progress, pieces=[]) for piece in writer.pieces}
    return replace(
        writer,
        tensors=tuple(
            replace(tensor, table=tables[id(tensor.table)]) if isinstance(tensor, PieceWriter) else tensor
            for tensor in writer.tensors
        ),
    )


@dataclass(frozen=True)
class _PartReader:
    """Reads the packed rows of a piece from its parts."""

    piece: PieceWriter
    parts: Sequence[tuple[Path, Part]]

    def __call__(self) -> Iterator[PackedRows]:
        """Yield packed rows, in order, and the sums of a part with its last ones.

        Raises:
            DamagedPartError: a part is not what was written.
        """
        row_format = self.piece.table.row_format
        by_row = row_format.form.by_row(self.piece.num_rows)
        step = max(1, _PORTION_BYTES // row_format.row_bytes)
        room = np.empty((step, row_format.row_bytes), np.uint8)
        for path, part in self.parts:
            checksum = 0
            entry = None if by_row is None else self.piece.spec_of(by_row.name).dtype
            with _opened(path, part) as source:
                position = 0
                for start in range(part.start, part.stop, step):
                    count = min(step, part.stop - start)
                    packed = room[:count]
                    source.read_into(position, packed)
                    position += packed.nbytes
                    checksum = crc32(packed.data, checksum)
                    if start + count < part.stop:
                        yield PackedRows(packed, [])
                own = None if entry is None else np.empty(part.stop - part.start, entry)
                count = count_ranges(part.stop - part.start, row_format.embedding_dim)
                ranges = None if self.piece.kept_name is None else np.empty(count, RANGE)
                for beside in (own, ranges):
                    if beside is not None:
                        source.read_into(position, beside)
                        checksum = crc32(as_bytes(beside), checksum)
                        position += beside.nbytes
            if checksum != part.checksum:
                raise _explain_damage(path, "its bytes are others")
            yield PackedRows(packed, part.sums, own, ranges, part.reused_rows)


@contextmanager
def _opened(path: Path, part: Part) -> Iterator[SourceFile]:
    source = make_source(path)
    try:
        stack = ExitStack()
        stack.enter_context(source)
    except FileNotFoundError:
        raise _explain_damage(path, "it is gone") from None
    with stack:
        if source.size != part.num_bytes:
            raise _explain_damage(path, f"it has {source.size} bytes, not {part.num_bytes}")
        yield source


def _explain_damage(path: Path, why: str) -> DamagedPartError:
    return DamagedPartError(f"{path}: is not the part that was written ({why})", path.name)


@contextmanager
def _new_file(path: Path, room: Path, *, lasting: bool) -> Iterator[BinaryIO]:
    """Write a file that is there whole or not at all, though others may write the same one at the same time.

    Both folders are there: a worker that was given up, and works on, must not make one that all others are done with.

    Args:
        path: of the file.
        room: a folder of the same file system, where it is written.
        lasting: have it outlast a machine that loses its power. A part need not: who reads it sees what it lacks.
    """
    if is_remote(path):
        with new_object(path) as file:
            yield file
        return
    temporary = room / f"{path.name}.{secrets.token_hex(8)}.new"
    with explained_place(path, path.parent):
        new = temporary.open("xb")
    try:
        with new as file:
            yield file
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if lasting:
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise

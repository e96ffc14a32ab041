"""Ranges of rows: what is packed at a time, by whichever process, and files that are put together of them.

A range is packed into a part, a file of its own: its packed rows, after them its entries of the array that lies beside
them by row, if there is one, and what is kept of the source's rows, if that is. Everything here may be done twice, at
the same time, and comes to the same bytes.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.errors import FormatError
from embpack.files import format_checksum
from embpack.formats.atomic import explained_place, sync
from embpack.formats.base import as_bytes
from embpack.formats.safetensors import write_safetensors
from embpack.kept import RANGE, count_ranges
from embpack.methods import Packer
from embpack.methods.base import Sums, condense
from embpack.rules import Decision
from embpack.shard_writer import DonePiece, PackedRows, PieceWriter, ShardWriter, TableWriter, no_progress

# Some seconds of work, most of the time, of which little is lost where a worker dies.
_RANGE_VALUES = 1 << 24
_PORTION_BYTES = 1 << 24


@dataclass(frozen=True)
class Part:
    """A range of rows that is packed.

    Attributes:
        start, stop: rows of the table.
        sums: few, which come to what those of all its spans come to.
        num_bytes: of its file.
        checksum: of them.
        seconds: spent reading, packing and writing it.
        reused_rows: that were copied from what an earlier run has packed.
    """

    start: int
    stop: int
    sums: Sequence[Sums]
    num_bytes: int
    checksum: str
    seconds: float
    reused_rows: int = 0


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


def pack_range(decision: Decision, packer: Packer, start: int, stop: int, path: Path) -> Part:
    """Pack rows [start, stop) of a table into a part, which appears whole or not at all.

    Raises:
        ValueError: as Packer.pack.
        OSError: it cannot be written.
    """
    started = time.perf_counter()
    table = TableWriter(decision, packer=packer)
    digest, sums, num_bytes, reused_rows = hashlib.sha256(), list[Sums](), 0, 0
    by_row, ranges = list[NDArray[Any]](), list[NDArray[Any]]()
    with _new_file(path) as file:

        def write(array: NDArray[Any]) -> int:
            data = as_bytes(array)
            digest.update(data)
            return file.write(data)

        for rows in table.pack_rows(start, stop):
            num_bytes += write(rows.packed)
            sums = condense([*sums, *rows.sums])
            if rows.by_row is not None:
                by_row.append(rows.by_row)
            if rows.ranges is not None:
                ranges.append(rows.ranges)
            reused_rows += rows.reused
        num_bytes += sum(map(write, (*by_row, *ranges)))
    seconds = time.perf_counter() - started
    return Part(start, stop, condense(sums, 1), num_bytes, format_checksum(digest), seconds, reused_rows)


def assemble_file(
    writer: ShardWriter, path: Path, shown: Path, parts: Mapping[str, Sequence[tuple[Path, Part]]]
) -> dict[str, DonePiece] | DamagedPartError:
    """Make a file of a packed checkpoint of its parts, and copy the tensors that are no tables.

    Args:
        writer: of the file; its tables know their packers.
        path: of the file, which appears whole or not at all.
        shown: what errors call it.
        parts: of each piece, by its name, in the order of their rows.

    Returns:
        What is known of each piece, by its name; or the error of a part that is not what was written.

    Raises:
        OSError: it cannot be written.
    """
    for piece in writer.pieces:
        piece.read_rows = _PartReader(piece, parts[piece.name])
    try:
        with _new_file(path) as file:
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
            found = path.stat()
        except OSError as error:
            return f"{path}: {error.strerror}"
        if (found.st_size, found.st_mtime_ns) != (size, modified_ns):
            return f"{path} is another file there"
    try:
        if mark.read_text() != token:
            return f"{mark.parent} is another folder there"
        probe = mark.with_name(f"{mark.name}.{secrets.token_hex(8)}")
        with _new_file(probe):
            pass
        probe.unlink()
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
        for path, part in self.parts:
            digest = hashlib.sha256()
            entry = None if by_row is None else self.piece.spec_of(by_row.name).dtype
            with _open_part(path, part) as file:
                for start in range(part.start, part.stop, step):
                    count = min(step, part.stop - start)
                    packed = _read(file, path, (count, row_format.row_bytes), np.dtype(np.uint8))
                    digest.update(packed.data)
                    if start + count < part.stop:
                        yield PackedRows(packed, [])
                own = None if entry is None else _read(file, path, (part.stop - part.start,), entry)
                ranges = None
                if self.piece.kept_name is not None:
                    count = count_ranges(part.stop - part.start, row_format.embedding_dim)
                    ranges = _read(file, path, (count,), RANGE)
                for beside in (own, ranges):
                    if beside is not None:
                        digest.update(as_bytes(beside))
            if format_checksum(digest) != part.checksum:
                raise _explain_damage(path, "its bytes are others")
            yield PackedRows(packed, part.sums, own, ranges, part.reused_rows)


def _open_part(path: Path, part: Part) -> BinaryIO:
    try:
        if path.stat().st_size == part.num_bytes:
            return path.open("rb")
    except FileNotFoundError:
        raise _explain_damage(path, "it is gone") from None
    raise _explain_damage(path, f"it has {path.stat().st_size} bytes, not {part.num_bytes}")


def _read(file: BinaryIO, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    out = np.empty(shape, dtype)
    if file.readinto(as_bytes(out)) != out.nbytes:  # type: ignore[attr-defined]
        raise _explain_damage(path, "it is shorter than it was")
    return out


def _explain_damage(path: Path, why: str) -> DamagedPartError:
    return DamagedPartError(f"{path}: is not the part that was written ({why})", path.name)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is there whole or not at all, though others may write the same one at the same time."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    with explained_place(path, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise

"""Rows that an earlier run has packed already: ranges whose source is the same are copied from its file.

What a range of rows becomes depends on these rows and on the packer alone, so the bytes are those of packing all. Of
the earlier file all is checked: its header and what it keeps (embpack.kept) when it is opened, and a range's packed
rows when they are copied.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack
from embpack.chunks import chunk_rows, span_rows
from embpack.errors import FormatError
from embpack.files import check_bytes, digest_tensors
from embpack.formats import SourceTensor
from embpack.formats.source import SourceFile
from embpack.kept import RANGE, as_ranges, as_sums, checksum, describe_packer, read_version, set_sums
from embpack.methods import Packer
from embpack.methods.base import OnRows
from embpack.packed_files import PackedCheckpoint, StoredTable, TablePiece, open_packed
from embpack.packing import PackedRows
from embpack.rotation import rotate_chunks
from embpack.rules import Decision
from embpack.threads import get_num_threads


@dataclass(frozen=True)
class OldPiece:
    """Rows of a table that an earlier run has packed into one file.

    Attributes:
        first_row, end_row: of the table.
        packed: the packed rows.
        by_row: what lies beside them by row; None if nothing does.
        kept: what the file keeps of them.
    """

    first_row: int
    end_row: int
    packed: SourceTensor
    by_row: SourceTensor | None
    kept: SourceTensor

    @property
    def place(self) -> str:
        """The file and the tensor, for messages."""
        file = "" if self.packed.source is None else f"{self.packed.source.path}: "
        return f"{file}table {self.packed.name!r}"


@dataclass(frozen=True)
class OldTable:
    """What an earlier run has made of a table; it can be pickled, as a decision can.

    Attributes:
        method: that packed it.
        pieces: in the order of their rows; none if nothing of it can be used.
        anew: why not, in words.
    """

    method: str = ""
    pieces: tuple[OldPiece, ...] = ()
    anew: str | None = None

    def explain(self, packer: Packer) -> str | None:
        """Say why nothing of it can be used for a table that is packed by a packer; None if ranges can."""
        if self.anew is not None:
            return self.anew
        if packer.spec != self.method:
            return f"it was packed by {self.method} and is to be by {packer.spec}"
        wanted = describe_packer(packer)
        for piece in self.pieces:
            [entry] = piece.kept.read(0, 1)
            version = read_version(entry)
            if version != embpack.__version__:
                return f"it was packed by embpack {version}, this is {embpack.__version__}"
            if not np.array_equal(entry, wanted):
                return (
                    f"what all its rows share, which {packer.method.name} finds in the whole table, is not what it was"
                )
        return None

    def read_ranges(self, start: int, ranges: NDArray[Any], span: int) -> None:
        """Fill in what is kept of the ranges of so many rows from row start on; others stay zeros."""
        stop = start + len(ranges) * span
        for piece in self._find(start, stop):
            if (piece.first_row - start) % span == 0:
                first, last = max(start, piece.first_row), min(stop, piece.end_row)
                at = 1 + (first - piece.first_row) // span
                own = as_ranges(piece.kept.read(at, at + -(-(last - first) // span)))
                ranges[(first - start) // span :][: len(own)] = own

    def read_rows(self, start: int, packed: NDArray[np.uint8], by_row: NDArray[Any] | None) -> None:
        """Read packed rows from row start on, and what lies beside them by row."""
        stop = start + len(packed)
        for piece in self._find(start, stop):
            first, last = max(start, piece.first_row), min(stop, piece.end_row)
            there = slice(first - piece.first_row, last - piece.first_row)
            here = slice(first - start, last - start)
            packed[here] = piece.packed.read(there.start, there.stop)
            if by_row is not None and piece.by_row is not None:
                by_row[here] = piece.by_row.read(there.start, there.stop)

    def place_of(self, row: int) -> str:
        """Where a row is, for messages."""
        return self._find(row, row + 1)[0].place

    def _find(self, start: int, stop: int) -> list[OldPiece]:
        return [piece for piece in self.pieces if piece.first_row < stop and start < piece.end_row]


FindOld = Callable[[Sequence[Decision]], list[Decision]]
"""Adds to what was decided on tables what an earlier run has made of them, and that checksums are kept again."""


@contextmanager
def open_old(since: str | Path | None) -> Iterator[FindOld]:
    """Open what an earlier run wrote, for as long as rows may be copied from it; None if nothing is to be.

    Raises:
        FileNotFoundError: there is nothing at since.
        FormatError: embpack has not written it, or it is damaged; what is kept is looked at when tables are found.
    """
    if since is None:
        yield list
        return
    with open_packed(since) as packed:
        if not any(table.keeps_checksums for table in packed.tables.values()):
            warnings.warn(
                f"{since}: keeps no checksums of what it was packed from, so all rows are packed; the new file keeps "
                "them, as with --keep-checksums (in Python keep_checksums=True)",
                stacklevel=4,
            )
        yield partial(_find_old, packed)


def _find_old(packed: PackedCheckpoint, decisions: Sequence[Decision]) -> list[Decision]:
    return [
        replace(each, keeps_checksums=True, old=_find_table(packed.tables.get(each.tensor.name), each))
        if each.variant
        else each
        for each in decisions
    ]


def list_old_sources(decisions: Sequence[Decision]) -> list[SourceFile]:
    """List the files of an earlier run that rows may be copied from."""
    pieces = (piece for each in decisions if each.old is not None for piece in each.old.pieces)
    return list({source.path: source for piece in pieces if (source := piece.packed.source) is not None}.values())


def _find_table(table: StoredTable | None, decision: Decision) -> OldTable:
    if table is None:
        return OldTable(anew="it was not packed before")
    entry, row_format = table.entry, decision.row_format
    if entry.row_format != row_format:
        return OldTable(anew=f"its rows were {entry.row_format} and are to be {row_format}")
    if entry.dtype != decision.dtype:
        return OldTable(anew=f"its values were {entry.dtype} and are {decision.dtype}")
    if not table.keeps_checksums:
        return OldTable(anew="no checksums of its source were kept")
    return OldTable(entry.method, tuple(map(_open_piece, table.pieces)))


def _open_piece(piece: TablePiece) -> OldPiece:
    kept = piece.kept
    assert kept is not None and piece.file.contents.others is not None  # it is there, and so is its checksum
    check_bytes(piece.file.path, f"tensor {kept.name!r}", digest_tensors([kept]), piece.file.contents.others[kept.name])
    packed, *beside = piece.parts
    has_by_row = piece.entry.row_format.form.by_row(piece.entry.num_embeddings) is not None
    return OldPiece(piece.first_row, piece.end_row, packed, beside[0] if has_by_row else None, kept)


def pack_ranges(decision: Decision, packer: Packer, start: int, stop: int, on_rows: OnRows) -> Iterator[PackedRows]:
    """Pack rows [start, stop) of a table but for those that can be copied, and find what is to be kept of them.

    Args:
        decision: to pack it.
        packer: of the table.
        start: the first row, where a chunk of a table or of a piece begins.
        stop: the row after the last, where one ends.
        on_rows: as Packer.pack takes it.

    Raises:
        FormatError: rows that were to be copied were altered.
        ValueError: as Packer.pack.
    """
    dim, old = packer.row_format.embedding_dim, _find_usable(decision, packer)
    with ThreadPoolExecutor(get_num_threads()) as pool:
        for rows in decision.tensor.chunks(chunk_rows(dim), start, stop):
            chunk = _Chunk(rows, start, span_rows(dim), old, pool)
            yield chunk.pack(packer, decision.place, on_rows)
            start += len(rows)


def count_unchanged(decision: Decision, packer: Packer, start: int, stop: int) -> int:
    """Count the rows of those that pack_ranges would pack that can be copied; the source is read for it."""
    dim, old = packer.row_format.embedding_dim, _find_usable(decision, packer)
    if old is None:
        return 0
    count = 0
    with ThreadPoolExecutor(get_num_threads()) as pool:
        for rows in decision.tensor.chunks(chunk_rows(dim), start, stop):
            count += _Chunk(rows, start, span_rows(dim), old, pool).count_known()
            start += len(rows)
    return count


def _find_usable(decision: Decision, packer: Packer) -> OldTable | None:
    return None if decision.old is None or decision.old.explain(packer) is not None else decision.old


@dataclass(frozen=True)
class _Chunk:
    """Rows of a source, of which the first is row start of the table, in ranges of span rows.

    Attributes:
        old: what an earlier run has made of the table, if it can be used.
        pool: threads that checksum ranges.
    """

    rows: NDArray[Any]
    start: int
    span: int
    old: OldTable | None
    pool: ThreadPoolExecutor

    def pack(self, packer: Packer, name: str, on_rows: OnRows) -> PackedRows:
        """Pack them, but for those that are copied."""
        packed = np.empty((len(self.rows), packer.row_format.row_bytes), np.uint8)
        by_row = packer.make_by_row(len(self.rows))
        sources, before = self._checksum(self.rows), self._read_before()
        is_known = self._compare(sources, before)
        ranges = np.where(is_known, before, np.zeros_like(before))
        ranges["source"] = sources
        for known, numbers in groupby(range(len(ranges)), is_known.__getitem__):
            own = list(numbers)
            run = slice(self._rows_of(own[0]).start, self._rows_of(own[-1]).stop)
            beside = None if by_row is None else by_row[run]
            if known and self.old is not None:
                self.old.read_rows(self.start + run.start, packed[run], beside)
                on_rows(run.stop - run.start)
            else:
                [rows] = rotate_chunks([self.rows[run]], packer.row_format.rotation, name, self.start + run.start)
                sums = packer.pack(rows, packed[run], self.start + run.start, on_rows, beside)
                set_sums(ranges[own[0] : own[-1] + 1], sums)
        ranges["packed"] = self._checksum(packed, by_row)
        self._check_copied(ranges, before, is_known)
        return PackedRows(packed, as_sums(ranges), by_row, ranges, self._count(is_known))

    def count_known(self) -> int:
        """Count the rows of them that can be copied."""
        return self._count(self._compare(self._checksum(self.rows), self._read_before()))

    def _rows_of(self, number: int) -> slice:
        """Which of the rows a range has."""
        return slice(number * self.span, min((number + 1) * self.span, len(self.rows)))

    def _checksum(self, *arrays: NDArray[Any] | None) -> NDArray[np.uint8]:
        """Checksum arrays with an entry for each row by ranges, [n, 16]."""

        def checksum_range(number: int) -> NDArray[np.uint8]:
            own = self._rows_of(number)
            return checksum(*(None if array is None else array[own] for array in arrays))

        return np.stack(list(self.pool.map(checksum_range, range(-(-len(self.rows) // self.span)))))

    def _read_before(self) -> NDArray[Any]:
        """Read what was kept of the ranges, an array of RANGE [n]; zeros where nothing was."""
        ranges = np.zeros(-(-len(self.rows) // self.span), RANGE)
        if self.old is not None:
            self.old.read_ranges(self.start, ranges, self.span)
        return ranges

    def _compare(self, sources: NDArray[np.uint8], before: NDArray[Any]) -> NDArray[np.bool_]:
        """Say of each range whether its rows are what they were; a range of other rows has another checksum."""
        same: NDArray[np.bool_] = (sources == before["source"]).all(axis=1) & before["source"].any(axis=1)
        return same

    def _check_copied(self, ranges: NDArray[Any], before: NDArray[Any], is_known: NDArray[np.bool_]) -> None:
        """Refuse packed rows that were copied and are not what was written."""
        wrong = np.flatnonzero(is_known & (ranges["packed"] != before["packed"]).any(axis=1))
        if len(wrong) and self.old is not None:
            own = self._rows_of(int(wrong[0]))
            first, last = self.start + own.start, self.start + own.stop
            raise FormatError(
                f"{self.old.place_of(first)}: rows {first} to {last - 1} were altered since they were packed, so they "
                "cannot be used again; pack all rows: leave out --since (in Python since)"
            )

    def _count(self, is_known: NDArray[np.bool_]) -> int:
        return sum((own := self._rows_of(int(number))).stop - own.start for number in np.flatnonzero(is_known))

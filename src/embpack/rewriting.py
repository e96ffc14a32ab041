"""Packed files written anew with other rows in some places, and what checksums they then have."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.files import check_bytes, format_checksum
from embpack.formats import SourceTensor
from embpack.formats.copying import copy_bytes, read_all, share_bytes, write_all
from embpack.formats.source import SourceFile
from embpack.formats.stored import StoredArray, iter_slices
from embpack.packed_files import PackedFile, TablePiece
from embpack.threads import get_num_threads
from embpack.updating import Update

Integers = NDArray[np.int64]

MOST_WAITING_BYTES = 1 << 27
"""Packed rows that wait in memory until files are read through for their checksums; may be set."""

_PORTION_BYTES = 1 << 22
_SYNCED_PORTIONS = 16
# What is hashed at a time stays in a core's cache.
_BLOCK_BYTES = 1 << 17


class NewFile:
    """A packed file that is written anew.

    Rows wait in memory and are put in while the old file is read through, for which each byte is moved once. Too many
    rows for that go into a copy of the file before.

    Args:
        file: as it is.
        pieces: of tables in it that change.
        open_new: opens the new file to read and to write, empty at first.
    """

    def __init__(
        self, file: PackedFile, pieces: Sequence[TablePiece], open_new: Callable[[], AbstractContextManager[int]]
    ) -> None:
        self.file, self._pieces, self._open_new = file, pieces, open_new
        self._source = source_of(file)
        self._waiting: dict[str, list[tuple[Integers, NDArray[np.uint8]]]] = {}
        self._is_copied = self._is_written = False

    def add(self, piece: TablePiece, rows: Integers, update: Update) -> int:
        """Take packed rows of a piece, by their numbers in it, ascending; returns how many bytes wait for that."""
        num_bytes = 0
        for part, array in zip(piece.parts, (update.packed, update.clusters), strict=False):
            if array is not None:
                entries = np.ascontiguousarray(array, stored_of(part).dtype).reshape(len(rows), -1).view(np.uint8)
                self._waiting.setdefault(part.name, []).append((rows, entries))
                num_bytes += entries.nbytes + rows.nbytes
        return num_bytes

    def flush(self) -> None:
        """Write the rows that wait, if any do, into a copy of the file."""
        if not self._waiting:
            return
        with self._open_new() as new, self._source:
            self._copy(new, whole=True)
            for part in (part for piece in self._pieces for part in piece.parts):
                stored = stored_of(part)
                for rows, entries in self._waiting.pop(part.name, ()):
                    code = _native.write_file_rows(new, stored.offset, stored.shape[0], rows, entries)
                    if code:
                        raise OSError(code, os.strerror(code), str(self.file.path))
        self._is_written = True

    def finish(self, progress: Mapping[str, Callable[[int], None]]) -> dict[str, str]:
        """Write all of it but the header, and compare the checksums of what was there.

        Bytes that were altered must not get a checksum that says that they are as they should be.

        Args:
            progress: by the name of a piece, is told how many more of its rows are done.

        Returns:
            The new checksums, by the names of pieces.

        Raises:
            FormatError: the old bytes were altered, or the file was changed.
            OSError: there is no space.
        """
        with self._open_new() as new, self._source:
            self._copy(new, whole=False)
            return {piece.name: self._finish_piece(piece, new, progress[piece.name]) for piece in self._pieces}

    def _copy(self, new: int, *, whole: bool) -> None:
        """Copy the old file: all of it where that takes no time, or if whole, else but what changes."""
        if self._is_copied:
            return
        old, end = self._source.descriptor, 0
        self._is_copied = share_bytes(old, new)
        if not self._is_copied:
            parts = [] if whole else [part for piece in self._pieces for part in piece.parts]
            for offset, num_bytes in sorted((stored_of(part).offset, part.nbytes) for part in parts):
                copy_bytes(old, new, end, offset)
                end = offset + num_bytes
            copy_bytes(old, new, end, self._source.size)
            self._is_copied = whole

    def _finish_piece(self, piece: TablePiece, new: int, progress: Callable[[int], None]) -> str:
        before, after = hashlib.sha256(), hashlib.sha256()
        started, synced = list[Future[None]](), list[Future[None]]()
        with ThreadPoolExecutor(min(2, get_num_threads())) as pool, ThreadPoolExecutor(1) as syncing:
            for number, part in enumerate(piece.parts):
                for turn, (offset, old, changed, count) in enumerate(self._iter_portions(part, new)):
                    jobs = [partial(_add, before, old), partial(_add, after, changed)]
                    if not self._is_copied or changed is not old:
                        jobs.append(partial(write_all, new, changed.data, offset))
                    # One portion is worked on while the next is read.
                    _wait(started)
                    started = [pool.submit(job) for job in jobs]
                    # The disk works meanwhile, too: at the end there is little that it has to be waited for.
                    if turn % _SYNCED_PORTIONS == _SYNCED_PORTIONS - 1:
                        synced.append(syncing.submit(os.fsync, new))
                    progress(0 if number else count)
            _wait([*started, *synced])
        check_bytes(self.file.path, f"table {piece.name!r}", before, piece.entry.checksum)
        return format_checksum(after)

    def _iter_portions(
        self, part: SourceTensor, new: int
    ) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8], int]]:
        """Yield bytes of a tensor: where they lie, old and new ones, and how many entries; those before stay."""
        stored = stored_of(part)
        entry_bytes = part.nbytes // stored.shape[0]
        step = max(1, _PORTION_BYTES // entry_bytes)
        rooms = [np.empty((min(step, stored.shape[0]), entry_bytes), np.uint8) for _ in range(4)]
        waiting = self._waiting.pop(part.name, [])
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in waiting)])
        entries = np.concatenate([np.empty((0, entry_bytes), np.uint8), *(entries for _, entries in waiting)])
        order = np.argsort(rows)
        rows = rows[order]
        for turn, some in enumerate(iter_slices(0, stored.shape[0], step)):
            old, changed = (room[: some.stop - some.start] for room in rooms[turn % 2 * 2 :][:2])
            offset = stored.offset + some.start * entry_bytes
            self._source.read_into(offset, old)
            own = slice(*np.searchsorted(rows, [some.start, some.stop]))
            if self._is_written:
                read_all(new, changed.reshape(-1).data, offset)
            elif own.start < own.stop:
                changed[...] = old
            else:
                changed = old
            changed[rows[own] - some.start] = entries[order[own]]
            yield offset, old.reshape(-1), changed.reshape(-1), some.stop - some.start


class NewFiles:
    """Those that are written anew together.

    Args:
        files: by what they are now.
    """

    def __init__(self, files: Sequence[NewFile]) -> None:
        self._files = {id(new.file): new for new in files}
        self._num_waiting = 0

    def add(self, piece: TablePiece, rows: Integers, update: Update) -> None:
        """Do what NewFile.add does, and write what waits where it has become too much."""
        self._num_waiting += self._files[id(piece.file)].add(piece, rows, update)
        if self._num_waiting > MOST_WAITING_BYTES:
            self._num_waiting = 0
            for new in self._files.values():
                new.flush()


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def _add(digest: "hashlib._Hash", values: NDArray[np.uint8]) -> None:
    for some in iter_slices(0, len(values), _BLOCK_BYTES):
        digest.update(values[some].data)


def source_of(file: PackedFile) -> SourceFile:
    """The file that a packed file's tensors are read from."""
    [first, *_] = next(iter(file.parts.values()))
    assert first.source is not None  # it is a file's
    return first.source


def stored_of(part: SourceTensor) -> StoredArray:
    """Where a tensor of a packed file lies."""
    assert part.stored is not None  # as in all safetensors files
    return part.stored

"""A packed checkpoint that workers make: the driver hands out ranges of rows, and holds none itself."""

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embpack.chunks import chunk_rows
from embpack.engines import Engine, Workers
from embpack.errors import EngineError
from embpack.formats.atomic import create, remove_file
from embpack.formats.paths import is_remote
from embpack.formats.source import SourceFile
from embpack.methods import Packer
from embpack.ranges import (
    DamagedPartError,
    Part,
    assemble_file,
    checksum_packer,
    fit_table,
    list_ranges,
    pack_range,
    remove_parts,
    see_paths,
    without_progress,
)
from embpack.resuming import Unfinished
from embpack.shard_writer import DonePiece, PieceWriter, ShardWriter, TableWriter

# Of a task, beside what is in memory anyway: this many times the values of a chunk, as float32; of one that finds what
# a table shares, also this many times what it samples; and of one that makes a file, what lies beside rows in it twice.
_CHUNKS, _SAMPLES, _BESIDE, _LEAST_BYTES = 8, 4, 2, 64 << 20
# Tasks that wait for each that runs, so that no worker does.
_WAITING = 3

Done = Callable[[Any], None]


@dataclass
class Distribution:
    """Makes the files of a packed folder by workers.

    Attributes:
        engine: has the workers.
        writers: of the files.
        shown: what errors call each file.
        keeper: writes down what is done.
        sources: that tables are read from.
    """

    engine: Engine
    writers: Sequence[ShardWriter]
    shown: Sequence[Path]
    keeper: Unfinished
    sources: Sequence[SourceFile]

    def make_files(self, made: Mapping[int, Path]) -> Iterator[int]:
        """Make files, by their numbers and where they are to lie; yields numbers as files are whole."""
        if not made:
            return
        for folder in {path.parent for path in made.values() if not is_remote(path)}:
            folder.mkdir(parents=True, exist_ok=True)
        with self.engine.connect() as workers:
            self._check_paths(workers)
            yield from _Run(self, workers, made).run()

    def _check_paths(self, workers: Workers) -> None:
        """See to it that every machine reads the source, and writes where parts lie.

        Raises:
            EngineError: one does not; says which, and what it found.
        """
        token = secrets.token_hex(16)
        mark = self.keeper.parts_folder / f"{token}.mark"
        with create(mark) as file:
            file.write(token.encode())
        try:
            sources = [(source.path.absolute(), source.size, source.modified_ns) for source in self.sources]
            found = workers.run_everywhere(see_paths, sources, mark.absolute(), token)
        finally:
            remove_file(mark)
        faults = [f"{machine}: {fault}" for machine, fault in found.items() if fault is not None]
        if faults:
            raise EngineError(
                f"{self.keeper.dst}: some machines do not see source or destination as this one ({'; '.join(faults)}); "
                "give paths on storage that all of them have mounted at the same place"
            )


@dataclass
class _Run:
    """What is to be done, is being done, and is done.

    Attributes:
        waiting: tasks to submit, in order: of each a function, arguments, its memory, and what is told of its result.
        running: what is told of the results of tasks that were submitted, by the task.
        parts: of each piece, by id: parts that are there, by their first rows.
        missing: of each file, by its number, how many parts are not there.
        places: of each piece, by id: the numbers of its file and of its place in that.
        tables: of each table, by id, how it and its packer were sent to the workers.
        repaired: names of parts that were packed again.
        finished: numbers of files that are whole, and not yielded yet.
    """

    distribution: Distribution
    workers: Workers
    made: Mapping[int, Path]
    waiting: deque[tuple[Callable[..., Any], tuple[Any, ...], int, Done]] = field(default_factory=deque)
    running: dict[Any, Done] = field(default_factory=dict)
    parts: dict[int, dict[int, Part]] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    tables: dict[int, Any] = field(default_factory=dict)
    repaired: set[str] = field(default_factory=set)
    finished: deque[int] = field(default_factory=deque)

    def run(self) -> Iterator[int]:
        """Do everything; yields the numbers of files as they are whole."""
        self._begin()
        while self.waiting or self.running:
            while self.waiting and len(self.running) < (1 + _WAITING) * self.workers.count:
                function, args, memory, done = self.waiting.popleft()
                self.running[self.workers.submit(function, *args, memory=memory)] = done
            task, result = self.workers.next_done()
            self.running.pop(task)(result)
            while self.finished:
                number = self.finished.popleft()
                yield number
                # By now it is written down that the file is whole.
                names = [
                    self._name(piece, start)
                    for piece in self._writer(number).pieces
                    for start in self.parts.pop(id(piece))
                ]
                self._drop(names)

    def _begin(self) -> None:
        """Have all tables fitted, in the order of the files, and files without tables made."""
        tables: dict[int, list[tuple[int, PieceWriter]]] = {}
        for number in self.made:
            pieces = self._writer(number).pieces
            for place, piece in enumerate(pieces):
                tables.setdefault(id(piece.table), []).append((number, piece))
                self.parts[id(piece)] = {}
                self.places[id(piece)] = number, place
            self.missing[number] = sum(len(list_ranges(piece)) for piece in pieces)
            if not pieces:
                self._assemble(number)
        for own in tables.values():
            table = own[0][1].table
            self.waiting.append((fit_table, (table.decision,), bound_fitting(table), partial(self._cut, table, own)))

    def _cut(self, table: TableWriter, pieces: Sequence[tuple[int, PieceWriter]], packer: Packer) -> None:
        """Have the ranges of a table packed that are not there."""
        table.packer = packer
        for array in packer.beside().values():
            table.check_shared(array)
        self.tables[id(table)] = self.workers.share((table.decision, packer))
        of_packer = checksum_packer(packer)
        for number, piece in pieces:
            for start, stop in list_ranges(piece):
                name = self._name(piece, start)
                known = self.distribution.keeper.find_part(name, of_packer)
                if known is not None and (known.start, known.stop) == (start, stop):
                    self._take(number, piece, known)
                else:
                    self._pack(number, piece, start, stop)

    def _pack(self, number: int, piece: PieceWriter, start: int, stop: int) -> None:
        name = self._name(piece, start)

        def done(part: Part) -> None:
            self.distribution.keeper.keep_part(name, part)
            self._take(number, piece, part)

        args = (self.tables[id(piece.table)], number, start, stop, self.distribution.keeper.parts_folder, name)
        self.waiting.append((pack_range, args, bound_packing(piece.table), done))

    def _take(self, number: int, piece: PieceWriter, part: Part) -> None:
        """Take a part that is there; with the last one of a file have that made."""
        self.parts[id(piece)][part.start] = part
        self.missing[number] -= 1
        if self._name(piece, part.start) not in self.repaired:
            piece.table.progress(piece.table.decision.tensor.name, part.stop - part.start)
        if not self.missing[number]:
            self._assemble(number)

    def _assemble(self, number: int) -> None:
        writer, folder = self._writer(number), self.distribution.keeper.parts_folder
        parts = {
            piece.name: [
                (folder / self._name(piece, start), part) for start, part in sorted(self.parts[id(piece)].items())
            ]
            for piece in writer.pieces
        }
        args = (without_progress(writer), self.made[number], self.distribution.shown[number], folder, parts)
        # Before what is left of other files: its parts take space.
        self.waiting.appendleft((assemble_file, args, bound_assembling(writer), partial(self._finish, number)))

    def _finish(self, number: int, done: Mapping[str, DonePiece] | DamagedPartError) -> None:
        if isinstance(done, DamagedPartError):
            self._repair(number, done)
            return
        for piece in self._writer(number).pieces:
            piece.done = done[piece.name]
        self.finished.append(number)

    def _repair(self, number: int, error: DamagedPartError) -> None:
        """Have a part packed again, once."""
        if error.name in self.repaired:
            raise error
        self.repaired.add(error.name)
        self.distribution.keeper.drop_parts([error.name])
        for piece in self._writer(number).pieces:
            for start, part in self.parts[id(piece)].items():
                if self._name(piece, start) == error.name:
                    del self.parts[id(piece)][start]
                    self.missing[number] += 1
                    self._pack(number, piece, start, part.stop)
                    return

    def _drop(self, names: Sequence[str]) -> None:
        """Have parts removed, which take space: before anything else."""
        self.distribution.keeper.drop_parts(names)
        args = (self.distribution.keeper.parts_folder, names)
        self.waiting.appendleft((remove_parts, args, _LEAST_BYTES, lambda done: None))

    def _writer(self, number: int) -> ShardWriter:
        return self.distribution.writers[number]

    def _name(self, piece: PieceWriter, start: int) -> str:
        """Name the file of a part."""
        number, place = self.places[id(piece)]
        return f"{number:05}-{place:05}-{start}"


def bound_packing(table: TableWriter) -> int:
    """Bytes that pack_range takes at most, beside what a worker has anyway."""
    values = chunk_rows(table.row_format.embedding_dim) * table.row_format.embedding_dim
    return max(_LEAST_BYTES, _CHUNKS * values * np.dtype(np.float32).itemsize)


def bound_fitting(table: TableWriter) -> int:
    """Bytes that fit_table takes at most, beside what a worker has anyway."""
    num_embeddings, embedding_dim = table.decision.tensor.shape
    sampled = table.method.sample_rows(num_embeddings, table.row_format) * embedding_dim
    return bound_packing(table) + _SAMPLES * sampled * np.dtype(np.float32).itemsize


def bound_assembling(writer: ShardWriter) -> int:
    """Bytes that assemble_file takes at most, beside what a worker has anyway."""
    return _LEAST_BYTES + _BESIDE * max((spec.nbytes for piece in writer.pieces for spec in piece.specs), default=0)

"""Shards of packed tables: each is packed while it is being written, and what is known only then is kept."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import chunk_rows
from embpack.files import PIECE_ALIGNMENT, PieceEntry, TableEntry, format_checksum, make_metadata, name_piece
from embpack.formats import OutShard, OutTensor, SourceTensor
from embpack.formats.base import as_bytes
from embpack.formats.dtypes import name_dtype
from embpack.kept import SUFFIX, find_shape, join_kept
from embpack.layouts import ArraySpec, RowFormat
from embpack.methods import Method, Packer, measure_loss
from embpack.methods.base import Sums, condense, find_warning
from embpack.packing import PackedRows, iter_packed
from embpack.rotation import rotate_chunks
from embpack.rules import Decision
from embpack.unchanged import pack_ranges

# Told of rows as they are done: the table's name and how many more.
Progress = Callable[[str, int], None]


def no_progress(name: str, rows: int) -> None:
    """Tell nobody."""


# As long as any.
_NO_CHECKSUM = format_checksum(hashlib.sha256())
_LONGEST = -1.2345678901234567e-300


@dataclass(frozen=True)
class TableReport:
    """What packing one table came to.

    Attributes:
        bytes_before, bytes_after: of its weights and of its packed rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X||.
        square_norm: sum of the squares of its values.
        seconds: spent reading, packing and writing it.
        warning: what to know of it and to do about it, such as rows that are lost; None if there is nothing.
        reused_rows: that were copied from what an earlier run has packed; None if nothing was to be.
        packed_anew: why none could be, in words; None if some could, or nothing was to be.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    dtype: str
    method: str
    bytes_before: int
    bytes_after: int
    loss: float
    square_norm: float
    seconds: float
    warning: str | None = None
    reused_rows: int | None = None
    packed_anew: str | None = None

    @property
    def rows_per_second(self) -> float:
        """Rows read, packed and written a second."""
        return self.num_embeddings / self.seconds


@dataclass
class TableWriter:
    """Packs one table, whole or in pieces, each while it is being written.

    Attributes:
        decision: to pack it.
        progress: is told of packed rows, several times a second.
        pieces: that are to be written, in the order of their rows.
        packer: made when the first rows are packed, and dropped with the last ones.
        shared: digest of the array that all rows share, once it is known.
    """

    decision: Decision
    progress: Progress = no_progress
    pieces: list["PieceWriter"] = field(default_factory=list)
    packer: Packer | None = None
    shared: bytes | None = None

    def whole(self) -> "PieceWriter":
        """Have it written in one piece."""
        self.pieces = [PieceWriter(self, 0, self.decision.tensor.shape[0])]
        return self.pieces[0]

    def cut(self, rows: int) -> "list[PieceWriter]":
        """Have it written in pieces of so many rows, but for the last; a multiple of PIECE_ROWS."""
        num_embeddings = self.decision.tensor.shape[0]
        self.pieces = [
            PieceWriter(self, first_row, min(rows, num_embeddings - first_row), number)
            for number, first_row in enumerate(range(0, num_embeddings, rows))
        ]
        return self.pieces

    @property
    def method(self) -> Method:
        """What packs it."""
        assert self.decision.variant is not None  # it is packed
        return self.decision.variant.parsed_method

    @property
    def row_format(self) -> RowFormat:
        """Of its packed rows."""
        assert self.decision.row_format is not None  # it is packed
        return self.decision.row_format

    @property
    def report(self) -> TableReport | None:
        """What packing it came to; None before all of it is written."""
        done = [piece.done for piece in self.pieces if piece.done is not None]
        if len(done) < len(self.pieces):
            return None
        decision, entry = self.decision, done[0].entry
        sums = [span for piece in done for span in piece.sums]
        return TableReport(
            name=decision.tensor.name,
            num_embeddings=decision.tensor.shape[0],
            embedding_dim=entry.embedding_dim,
            dtype=entry.dtype,
            method=entry.method,
            bytes_before=decision.bytes_before,
            bytes_after=sum(piece.nbytes for piece in self.pieces),
            loss=measure_loss(sums),
            square_norm=math.fsum(span.square for span in sums),
            seconds=math.fsum(piece.seconds for piece in done),
            warning=find_warning(sums),
            reused_rows=None if decision.old is None else sum(piece.reused_rows for piece in done),
            packed_anew=done[0].packed_anew,
        )

    def fit(self) -> Packer:
        """Return the packer, for which the whole table may have to be read."""
        if self.packer is None:
            rows, place = self.decision.tensor.shape[0], self.decision.place
            self.packer = self.method.fit(partial(self.read, 0, rows), rows, self.row_format, place)
        return self.packer

    def check_shared(self, array: NDArray[Any]) -> None:
        """See to it that all pieces share the same array.

        Raises:
            OSError: it is not that of pieces that an earlier run has packed; another error would have these removed.
        """
        own = hashlib.sha256(as_bytes(array)).digest()
        if self.shared not in (None, own):
            raise OSError(
                f"{self.decision.place}: cannot be resumed here, for {self.method.spec} comes to other codebooks than "
                "in the run before, as with another version of NumPy; go on with that one, "
                "or leave out --resume (in Python resume=True) to begin anew"
            )
        self.shared = own

    def pack_rows(self, start: int, stop: int) -> Iterator[PackedRows]:
        """Pack rows [start, stop)."""
        packer, done = self.fit(), 0
        on_rows = partial(self.progress, self.decision.tensor.name)
        if self.decision.keeps_checksums:
            yield from pack_ranges(self.decision, packer, start, stop, on_rows)
            return
        by_row = packer.make_by_row(stop - start)
        for packed, own in iter_packed(packer, self.read(start, stop), start, on_rows, by_row):
            yield PackedRows(packed, own, None if by_row is None else by_row[done : done + len(packed)])
            done += len(packed)

    def read(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Read rows [start, stop) in chunks, as they are to be packed."""
        chunks = self.decision.tensor.chunks(chunk_rows(self.row_format.embedding_dim), start, stop)
        return rotate_chunks(chunks, self.row_format.rotation, self.decision.place, start)


@dataclass(frozen=True)
class DonePiece:
    """What packing a table, or a piece of one, came to.

    Attributes:
        entry: what its file says of it.
        sums: few, which come to what those of all its spans come to.
        seconds: spent reading, packing and writing it.
        reused_rows, packed_anew: as TableReport has them.
    """

    entry: TableEntry
    sums: Sequence[Sums]
    seconds: float
    reused_rows: int = 0
    packed_anew: str | None = None


@dataclass
class PieceWriter:
    """Rows of a table that are packed into one file, and what is known of them only then.

    Attributes:
        table: which has them.
        first_row: of the table.
        num_rows: how many.
        number: of the piece; None if it is the whole table.
        beside: the arrays beside the rows, by name; there once the rows are packed.
        kept: what is kept of the source's rows, if that is to be; there by then, too.
        done: there once the rows are packed.
        read_rows: what yields its packed rows, if they are not packed while it is being written.
    """

    table: TableWriter
    first_row: int
    num_rows: int
    number: int | None = None
    beside: dict[str, NDArray[Any]] = field(default_factory=dict)
    kept: NDArray[np.uint8] | None = None
    done: DonePiece | None = None
    read_rows: Callable[[], Iterator[PackedRows]] | None = None

    @property
    def name(self) -> str:
        """Of the tensor with its packed rows."""
        name = self.table.decision.tensor.name
        return name if self.number is None else name_piece(name, self.number)

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """What lies beside its rows."""
        row_format = self.table.row_format
        num_codebooks = self.table.method.num_codebooks(self.table.decision.tensor.shape[0], row_format)
        return row_format.form.beside(self.num_rows, num_codebooks)

    @property
    def nbytes(self) -> int:
        """Bytes of its packed rows and of what lies beside them."""
        return self.num_rows * self.table.row_format.row_bytes + sum(spec.nbytes for spec in self.specs)

    @property
    def kept_name(self) -> str | None:
        """Of the tensor with what is kept of the source's rows; None if nothing is."""
        return self.name + SUFFIX if self.table.decision.keeps_checksums else None

    @property
    def kept_bytes(self) -> int:
        """Bytes of that tensor."""
        return math.prod(self._kept_shape) if self.kept_name else 0

    @property
    def _kept_shape(self) -> tuple[int, int]:
        return find_shape(self.num_rows, self.table.row_format.embedding_dim)

    def out_tensors(self, keep_checksum: Callable[[str, "hashlib._Hash"], None]) -> list[OutTensor]:
        """Make the tensors that the output has of it.

        Args:
            keep_checksum: is given the name and the digest of the one that is not the table's.
        """
        out = [OutTensor(self.name, "U8", (self.num_rows, self.table.row_format.row_bytes), self._pack)]
        for spec in self.specs:
            dtype = name_dtype(spec.dtype)
            assert dtype is not None
            out.append(OutTensor(self.name + spec.suffix, dtype, spec.known_shape, partial(self._read, spec.name)))
        if self.kept_name is not None:
            read = partial(self._read_kept, partial(keep_checksum, self.kept_name))
            out.append(OutTensor(self.kept_name, "U8", self._kept_shape, read))
        return out

    @property
    def longest_entry(self) -> TableEntry:
        """An entry at least as long as its own, with floats of as many digits as they can have."""
        return self._make_entry(self.table.method.longest_spec, _LONGEST, _LONGEST, _NO_CHECKSUM)

    def spec_of(self, name: str) -> ArraySpec:
        """What an array beside the rows is, by its name."""
        return next(spec for spec in self.specs if spec.name == name)

    def _pack(self) -> Iterator[NDArray[np.uint8]]:
        started = time.perf_counter()
        packer = self.table.fit()
        shared = packer.beside()
        for array in shared.values():
            self.table.check_shared(array)
        by_row, ranges, reused_rows = list[NDArray[Any]](), list[NDArray[Any]](), 0
        digest, sums = hashlib.sha256(), list[Sums]()
        read = self.read_rows or partial(self.table.pack_rows, self.first_row, self.first_row + self.num_rows)
        for rows in read():
            digest.update(rows.packed.data)
            sums = condense([*sums, *rows.sums])
            if rows.by_row is not None:
                by_row.append(rows.by_row)
            if rows.ranges is not None:
                ranges.append(rows.ranges)
            reused_rows += rows.reused
            yield rows.packed
        for spec in self.specs:
            self.beside[spec.name] = shared[spec.name] if spec.name in shared else np.concatenate(by_row)
            digest.update(as_bytes(self.beside[spec.name]))
        square_norm = math.fsum(span.square for span in sums)
        entry = self._make_entry(packer.spec, measure_loss(sums), square_norm, format_checksum(digest))
        if ranges:
            self.kept = join_kept(packer, ranges)
        old = self.table.decision.old
        packed_anew = None if old is None else old.explain(packer)
        self.done = DonePiece(entry, sums, time.perf_counter() - started, reused_rows, packed_anew)
        if all(piece.done for piece in self.table.pieces):
            self.table.packer = None

    def _read(self, name: str) -> Iterator[NDArray[Any]]:
        yield self.beside.pop(name)

    def _read_kept(self, finish: Callable[["hashlib._Hash"], None]) -> Iterator[NDArray[Any]]:
        assert self.kept is not None  # its rows are written before
        yield self.kept
        finish(hashlib.sha256(self.kept.data))
        self.kept = None

    def _make_entry(self, method: str, loss: float, square_norm: float, checksum: str) -> TableEntry:
        tensor, piece = self.table.decision.tensor, None
        if self.number is not None:
            piece = PieceEntry(tensor.name, self.first_row, tensor.shape[0], square_norm)
        return TableEntry.make(
            self.table.row_format,
            num_embeddings=self.num_rows,
            dtype=self.table.decision.dtype,
            method=method,
            loss=loss,
            checksum=checksum,
            piece=piece,
        )


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard.

    Attributes:
        tensors: what it has, in order: tables to pack, or pieces of them, and tensors to copy.
        source_metadata: of the shard that is read.
    """

    tensors: tuple[PieceWriter | SourceTensor, ...]
    source_metadata: dict[str, str]

    def out_shard(self, file_name: str) -> OutShard:
        """Make what the output has of the shard."""
        out: list[OutTensor] = []
        others: dict[str, str] = {}
        for tensor in self.tensors:
            if isinstance(tensor, PieceWriter):
                if tensor.kept_name is not None:
                    others[tensor.kept_name] = _NO_CHECKSUM
                out += tensor.out_tensors(partial(_keep_checksum, others))
            else:
                others[tensor.name] = _NO_CHECKSUM
                out.append(copy_tensor(tensor, partial(_keep_checksum, others, tensor.name)))
        _check_names(out)
        longest = self._make_metadata({piece.name: piece.longest_entry for piece in self.pieces}, others, out)
        return OutShard(
            file_name,
            tuple(out),
            lambda: self._make_metadata(
                {piece.name: piece.done.entry for piece in self.pieces if piece.done}, others, out
            ),
            len(json.dumps(longest)),
            PIECE_ALIGNMENT if self.has_pieces else 8,
        )

    @property
    def pieces(self) -> list[PieceWriter]:
        """The tables that it has, whole or some rows of them, in order."""
        return [tensor for tensor in self.tensors if isinstance(tensor, PieceWriter)]

    @property
    def has_pieces(self) -> bool:
        """Whether a table lies in it and in other files."""
        return any(piece.number is not None for piece in self.pieces)

    def _make_metadata(
        self, entries: Mapping[str, TableEntry], others: Mapping[str, str], out: Sequence[OutTensor]
    ) -> dict[str, str]:
        return {**self.source_metadata, **make_metadata(entries, others, out)}


def _keep_checksum(others: dict[str, str], name: str, digest: "hashlib._Hash") -> None:
    others[name] = format_checksum(digest)


def _check_names(tensors: Sequence[OutTensor]) -> None:
    """Refuse tensors of the checkpoint that are called what a table's clusters or codebooks would be."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(
                f"tensor {tensor.name!r} would be there twice: what lies beside a table needs that name; rename it"
            )
        seen.add(tensor.name)


def copy_tensor(tensor: SourceTensor, finish: Callable[["hashlib._Hash"], None]) -> OutTensor:
    """Pass a tensor through, a few megabytes at a time; finish is given the digest of its bytes at their end."""

    def chunks() -> Iterator[NDArray[Any]]:
        digest = hashlib.sha256()
        for portion in tensor.portions():
            digest.update(as_bytes(portion))
            yield portion
        finish(digest)

    return OutTensor(tensor.name, tensor.dtype, tensor.shape, chunks)

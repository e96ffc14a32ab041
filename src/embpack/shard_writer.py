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
from embpack.files import TableEntry, format_checksum, make_metadata
from embpack.formats import OutShard, OutTensor, SourceTensor
from embpack.formats.base import as_bytes
from embpack.formats.dtypes import name_dtype
from embpack.layouts import RowFormat
from embpack.methods import Method, measure_loss
from embpack.methods.base import Sums, find_warning
from embpack.packing import iter_packed
from embpack.rotation import rotate_chunks
from embpack.rules import Decision

# Told of rows as they are done: the table's name and how many more.
Progress = Callable[[str, int], None]

# As long as any.
_NO_CHECKSUM = format_checksum(hashlib.sha256())


@dataclass(frozen=True)
class TableReport:
    """What packing one table came to.

    Attributes:
        bytes_before, bytes_after: of its weights and of its packed rows.
        loss: normalized l2 loss ||X - Q(X)|| / ||X||.
        square_norm: sum of the squares of its values.
        seconds: spent reading, packing and writing it.
        warning: what to know of it and to do about it, such as rows that are lost; None if there is nothing.
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

    @property
    def rows_per_second(self) -> float:
        """Rows read, packed and written a second."""
        return self.num_embeddings / self.seconds


@dataclass
class TableWriter:
    """Packs one table while it is being written, and keeps what is known of it only then.

    Attributes:
        decision: to pack it.
        progress: is told of packed rows, several times a second.
        beside: the arrays beside its rows, by name; there once it is fitted, before any row is written.
        entry, report: there once its rows are written.
    """

    decision: Decision
    progress: Progress
    beside: dict[str, NDArray[Any]] = field(default_factory=dict)
    entry: TableEntry | None = None
    report: TableReport | None = None

    def out_tensors(self) -> list[OutTensor]:
        """Make the tensors that the output has of the table."""
        tensor, row_format = self.decision.tensor, self._row_format
        out = [OutTensor(tensor.name, "U8", (tensor.shape[0], row_format.row_bytes), self._pack)]
        for spec in self.decision.beside:
            dtype = name_dtype(spec.dtype)
            assert dtype is not None
            out.append(OutTensor(tensor.name + spec.suffix, dtype, spec.known_shape, partial(self._read, spec.name)))
        return out

    @property
    def longest_entry(self) -> TableEntry:
        """An entry at least as long as the table's, with floats of as many digits as they can have."""
        return self._make_entry(self._method.longest_spec, -1.2345678901234567e-300, _NO_CHECKSUM)

    @property
    def _method(self) -> Method:
        assert self.decision.variant is not None  # it is packed
        return self.decision.variant.parsed_method

    @property
    def _row_format(self) -> RowFormat:
        assert self.decision.row_format is not None  # it is packed
        return self.decision.row_format

    def _pack(self) -> Iterator[NDArray[np.uint8]]:
        started = time.perf_counter()
        tensor, row_format, place = self.decision.tensor, self._row_format, self.decision.place
        read = partial(_read_rows, tensor, row_format, place)
        packer = self._method.fit(read, tensor.shape[0], row_format, place)
        self.beside |= packer.beside()
        digest, sums = hashlib.sha256(), list[Sums]()
        for packed, own in iter_packed(packer, read(), on_rows=partial(self.progress, tensor.name)):
            digest.update(packed.data)
            sums += own
            yield packed
        for array in self.beside.values():
            digest.update(as_bytes(array))
        loss = measure_loss(sums)
        self.entry = self._make_entry(packer.spec, loss, format_checksum(digest))
        square_norm = math.fsum(span.square for span in sums)
        self.report = self._make_report(
            self.entry, loss, square_norm, time.perf_counter() - started, find_warning(sums)
        )

    def _read(self, name: str) -> Iterator[NDArray[Any]]:
        yield self.beside[name]

    def _make_entry(self, method: str, loss: float, checksum: str) -> TableEntry:
        return TableEntry.make(
            self._row_format,
            num_embeddings=self.decision.tensor.shape[0],
            dtype=self.decision.dtype,
            method=method,
            loss=loss,
            checksum=checksum,
        )

    def _make_report(
        self, entry: TableEntry, loss: float, square_norm: float, seconds: float, warning: str | None
    ) -> TableReport:
        return TableReport(
            name=self.decision.tensor.name,
            num_embeddings=entry.num_embeddings,
            embedding_dim=entry.embedding_dim,
            dtype=entry.dtype,
            method=entry.method,
            bytes_before=self.decision.bytes_before,
            bytes_after=self.decision.bytes_after,
            loss=loss,
            square_norm=square_norm,
            seconds=seconds,
            warning=warning,
        )


def _read_rows(tensor: SourceTensor, row_format: RowFormat, place: str) -> Iterator[NDArray[Any]]:
    """Read a table in chunks, as they are to be packed."""
    return rotate_chunks(tensor.chunks(chunk_rows(row_format.embedding_dim)), row_format.rotation, place)


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard.

    Attributes:
        tensors: what it has, in order: tables to pack, and tensors to copy.
        source_metadata: of the shard that is read.
    """

    tensors: tuple[TableWriter | SourceTensor, ...]
    source_metadata: dict[str, str]

    def out_shard(self, file_name: str) -> OutShard:
        """Make what the output has of the shard."""
        out: list[OutTensor] = []
        others: dict[str, str] = {}
        for tensor in self.tensors:
            if isinstance(tensor, TableWriter):
                out += tensor.out_tensors()
            else:
                others[tensor.name] = _NO_CHECKSUM
                out.append(copy_tensor(tensor, partial(_keep_checksum, others, tensor.name)))
        _check_names(out)
        longest = self._make_metadata([table.longest_entry for table in self.tables], others, out)
        return OutShard(file_name, tuple(out), lambda: self._metadata(others, out), len(json.dumps(longest)))

    @property
    def tables(self) -> list[TableWriter]:
        """The tables, in order."""
        return [tensor for tensor in self.tensors if isinstance(tensor, TableWriter)]

    def _metadata(self, others: Mapping[str, str], out: Sequence[OutTensor]) -> dict[str, str]:
        return self._make_metadata([table.entry for table in self.tables if table.entry is not None], others, out)

    def _make_metadata(
        self, entries: Sequence[TableEntry], others: Mapping[str, str], out: Sequence[OutTensor]
    ) -> dict[str, str]:
        names = [table.decision.tensor.name for table in self.tables]
        tables = dict(zip(names, entries, strict=True))
        return {**self.source_metadata, **make_metadata(tables, others, out)}


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
        for piece in tensor.pieces():
            digest.update(as_bytes(piece))
            yield piece
        finish(digest)

    return OutTensor(tensor.name, tensor.dtype, tensor.shape, chunks)

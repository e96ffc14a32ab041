"""GGUF files, llama.cpp's: tensors of plain numbers, and of blocks of small integers with their scales.

The header is read here, within limits: gguf's own reader maps the file, and believes what its counts say.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import Checkpoint, Shard, SourceTensor, name_first, refuse_repeated
from embpack.formats.dtypes import ARRAY_DTYPES
from embpack.formats.source import SourceFile, make_source
from embpack.formats.stored import StoredArray, iter_slices

MOST_HEADER_BYTES = 100_000_000
"""Bytes of a header at most; the vocabularies of the largest tokenizers take a tenth."""

MOST_ENTRIES = 1 << 18
"""Tensors of a file at most, and keys of its metadata; models have some thousands."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_MOST_DIMENSIONS = 4
# Of NumPy's arrays, whatever their type.
_MOST_VALUES = 1 << 59
_UINT32, _STRING, _ARRAY = 4, 8, 9
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, _UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Types of ggml that safetensors has, too.
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
# Values that are unpacked at a time: enough for NumPy's calls to cost little, few enough for memory to stay small.
_VALUES_AT_A_TIME = 1 << 17


@dataclass(frozen=True)
class _Entry:
    """What the header says of a tensor.

    Attributes:
        kind: the number of its type.
        begin: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int


@contextmanager
def open_gguf(path: Path) -> Iterator[Checkpoint]:
    """Open a GGUF file: plain numbers as they are, tables of blocks as the float32 values that they stand for.

    Raises:
        FormatError: it is not one, or damaged.
    """
    source = make_source(path)
    with source:
        keys, entries = _read_header(source)
        tensors, left_out, end = list[SourceTensor](), dict[str, list[str]](), 0
        for entry in sorted(entries, key=lambda entry: entry.begin):
            made, end = _make_tensor(source, entry, end)
            if isinstance(made, SourceTensor):
                tensors.append(made)
            else:
                left_out.setdefault(made, []).append(entry.name)
        notes = [f"tensor {name_first(names)} ({reason})" for reason, names in left_out.items()]
        if keys:
            notes.append(f"metadata {name_first(keys)} (about the model)")
        yield Checkpoint(path, (Shard(path.name, source.size, tuple(tensors)),), left_out=tuple(notes))


class _Header:
    """The bytes of a header, one after the other; no more of them are read than there may be."""

    def __init__(self, source: SourceFile) -> None:
        self.path, self.position = source.path, 0
        self._size, self._file = source.size, source.reader()

    def read(self, count: int) -> bytes:
        """Read some bytes."""
        self._check(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        """Leave some bytes out."""
        self._check(count)
        self._file.seek(self.position)

    def _check(self, count: int) -> None:
        self.position += count
        if self.position > self._size:
            raise FormatError(
                f"{self.path}: its header goes on past its {self._size} bytes; the file is truncated or damaged, copy "
                "it again"
            )
        if self.position > MOST_HEADER_BYTES:
            raise FormatError(
                f"{self.path}: its header has more than {MOST_HEADER_BYTES} bytes; the file is damaged, copy it again"
            )

    def read_number(self, num_bytes: int) -> int:
        """Read an unsigned integer."""
        return int.from_bytes(self.read(num_bytes), "little")

    def read_count(self, what: str) -> int:
        """Read how many tensors or keys there are."""
        count = self.read_number(8)
        if count > MOST_ENTRIES:
            raise FormatError(
                f"{self.path}: its header promises {count} {what}, and at most {MOST_ENTRIES} are read; the file is "
                "damaged, copy it again"
            )
        return count

    def read_name(self) -> str:
        """Read a string that must be text."""
        raw = self.read(self.read_number(8))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: a name in its header is not UTF-8: {raw!r:.100}") from None

    def skip_value(self, kind: int) -> None:
        """Leave a value of the metadata out."""
        count = 1
        if kind == _ARRAY:
            kind, count = self.read_number(4), self.read_number(8)
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.read_number(8))
        elif kind in _VALUE_BYTES:
            self.skip(count * _VALUE_BYTES[kind])
        else:
            raise FormatError(
                f"{self.path}: its header has a value of type {kind} before byte {self.position}, which it may not; "
                "the file is damaged, copy it again"
            )


def _read_header(source: SourceFile) -> tuple[list[str], list[_Entry]]:
    """Read a header: the keys of its metadata, and what it says of tensors, not compared with the file yet."""
    header = _Header(source)
    _check_version(header)
    num_tensors, num_keys = header.read_count("tensors"), header.read_count("keys")
    keys, alignment = [], _ALIGNMENT
    for _ in range(num_keys):
        keys.append(header.read_name())
        kind = header.read_number(4)
        if keys[-1] == _ALIGNMENT_KEY:
            alignment = _read_alignment(header, kind)
        else:
            header.skip_value(kind)
    entries = [_read_entry(header) for _ in range(num_tensors)]
    refuse_repeated(source.path, keys, "key ")
    refuse_repeated(source.path, (entry.name for entry in entries), "tensor ")
    start = -(-header.position // alignment) * alignment
    for entry in entries:
        if entry.begin % alignment:
            raise FormatError(
                f"{source.path}: tensor {entry.name!r} begins at byte {entry.begin} of the values, which is no "
                f"multiple of {alignment}; the file is damaged, copy it again"
            )
    return keys, [_Entry(entry.name, entry.shape, entry.kind, start + entry.begin) for entry in entries]


def _check_version(header: _Header) -> None:
    if header.read(len(_MAGIC)) != _MAGIC:
        raise FormatError(f"{header.path}: not a GGUF file: it does not begin with {_MAGIC.decode()}")
    version = header.read_number(4)
    if version and not version & 0xFFFF:
        raise FormatError(f"{header.path}: its byte order is big-endian; convert it with: gguf-convert-endian")
    if version not in _VERSIONS:
        raise FormatError(f"{header.path}: GGUF of version {version}; what is read: versions 2 and 3")


def _read_alignment(header: _Header, kind: int) -> int:
    alignment = header.read_number(4) if kind == _UINT32 else 0
    if alignment.bit_count() != 1:
        raise FormatError(f"{header.path}: {_ALIGNMENT_KEY} is no power of 2; the file is damaged, copy it again")
    return alignment


def _read_entry(header: _Header) -> _Entry:
    name, num_dimensions = header.read_name(), header.read_number(4)
    if num_dimensions > _MOST_DIMENSIONS:
        raise FormatError(
            f"{header.path}: tensor {name!r} has {num_dimensions} dimensions, and at most {_MOST_DIMENSIONS} are "
            "allowed; the file is damaged, copy it again"
        )
    # The one that lies together in memory is first.
    shape = tuple(reversed([header.read_number(8) for _ in range(num_dimensions)]))
    if math.prod(max(size, 1) for size in shape) > _MOST_VALUES:
        raise FormatError(f"{header.path}: tensor {name!r} has shape {list(shape)}; the file is damaged, copy it again")
    return _Entry(name, shape, header.read_number(4), header.read_number(8))


def _make_tensor(source: SourceFile, entry: _Entry, after: int) -> tuple[SourceTensor | str, int]:
    """Make a tensor, whose bytes must follow those before it, and must be there.

    Args:
        source: the file.
        entry: what its header says.
        after: the byte that follows the tensor before it.

    Returns:
        The tensor, or why it cannot be carried over; and the byte that follows it.
    """
    where = f"{source.path}: tensor {entry.name!r}"
    if entry.begin < after:
        raise FormatError(
            f"{where} begins at byte {entry.begin}, but what is before it ends at {after}; the file is damaged, copy "
            "it again"
        )
    try:
        kind = GGMLQuantizationType(entry.kind)
    except ValueError:
        return f"type {entry.kind}, which the installed gguf does not know", after
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    width = entry.shape[-1] if entry.shape else 1
    if width % block_values:
        raise FormatError(
            f"{where} has rows of {width} values, which are no whole blocks of {kind.name}, of {block_values}; the "
            "file is damaged, copy it again"
        )
    num_blocks = math.prod(entry.shape) // block_values
    end = entry.begin + num_blocks * block_bytes
    if end > source.size:
        raise FormatError(
            f"{where} ends at byte {end}, the file at {source.size}; it is truncated or damaged, copy it again"
        )
    if kind.name in _PLAIN:
        stored = StoredArray(source, entry.begin, entry.shape, ARRAY_DTYPES[kind.name].newbyteorder("<"))
        return SourceTensor(entry.name, entry.shape, kind.name, stored.iter_rows, source, stored=stored), end
    if len(entry.shape) != 2:
        return f"{kind.name} blocks, {len(entry.shape)}-D, a table is 2-D", end
    if not _can_unpack(kind):
        return f"{kind.name} blocks, which the installed gguf cannot unpack", end
    return _make_table(source, entry, kind), end


@cache
def _can_unpack(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _make_table(source: SourceFile, entry: _Entry, kind: GGMLQuantizationType) -> SourceTensor:
    """Make a table of blocks; its part is their bytes.

    Its values are to be unpacked to bfloat16: they can be larger than any of float16, a scale of which is multiplied by
    integers of up to eight bits; and models of such files are bfloat16, mostly.
    """
    rows, width = entry.shape
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    blocks_of_row = width // block_values
    packed = StoredArray(source, entry.begin, (rows, blocks_of_row * block_bytes), np.dtype(np.uint8))
    part = SourceTensor(entry.name, packed.shape, "U8", packed.iter_rows, source, stored=packed)
    blocks = StoredArray(source, entry.begin, (rows * blocks_of_row, block_bytes), np.dtype(np.uint8))
    read = _Blocks(blocks, kind, width).iter_rows
    return SourceTensor(
        entry.name,
        entry.shape,
        "F32",
        read,
        source,
        parts=(part,),
        weight_dtype="bfloat16",
        stored_as=kind.name,
        can_be_copied=False,
    )


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a table, which are unpacked as they are read; each row has whole ones."""

    stored: StoredArray
    kind: GGMLQuantizationType
    width: int

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time; the next ones overwrite them."""
        block_values = GGML_QUANT_SIZES[self.kind][0]
        blocks_of_row, at_a_time = self.width // block_values, _VALUES_AT_A_TIME // block_values
        room = np.empty((min(n, stop - start), self.width), np.float32)
        for rows in iter_slices(start, stop, n):
            out = room[: rows.stop - rows.start]
            values, done = out.reshape(-1, block_values), 0
            for blocks in self.stored.iter_rows(rows.start * blocks_of_row, rows.stop * blocks_of_row, at_a_time):
                # As one row: gguf unpacks sixteen at a time. A scale that is infinite or NaN is told by whoever packs.
                with np.errstate(all="ignore"):
                    unpacked = dequantize(blocks.reshape(1, -1), self.kind)
                values[done : done + len(blocks)] = unpacked.reshape(-1, block_values)
                done += len(blocks)
            yield out

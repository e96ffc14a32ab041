"""Arrays that NumPy saves: .npy, and .npz, whose members are .npy files."""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import (
    Checkpoint,
    OutShard,
    OutTensor,
    Shard,
    SourceTensor,
    as_bytes,
    iter_checked,
    refuse_dtypes,
    refuse_repeated,
)
from embpack.formats.dtypes import NUMPY_DTYPES, name_dtype
from embpack.formats.source import SourceFile, make_source
from embpack.formats.stored import StoredArray, StridedArray, as_native, iter_slices

MOST_WHOLE_BYTES = 1 << 30
"""Bytes of an array in Fortran order that is compressed, and so must be in memory whole; may be set."""

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# Of a member of a zip file, before its name.
_MEMBER_HEADER_BYTES = 30
# Bytes that can come of a compressed one, where there is a limit: in deflate 258 of two bits.
_MOST_RATIOS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
_BLOCK_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 16
# Of a member of a zip file.
_MAX_NAME_BYTES = (1 << 16) - 1
_WAYS_OUT = "write .safetensors or .pt"


@dataclass(frozen=True)
class _Header:
    """What an .npy file says of its array.

    Attributes:
        is_fortran: columns lie together, not rows.
        tag: the safetensors name of its type; None if it has none.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    bytes_before: int
    tag: str | None

    @property
    def payload(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def place(self, source: SourceFile, offset: int) -> StoredArray | StridedArray:
        """Say where the array lies in a file."""
        make = StridedArray.in_fortran_order if self.is_fortran else StoredArray
        return make(source, offset, self.shape, self.dtype)


@contextmanager
def open_npy(path: Path) -> Iterator[Checkpoint]:
    """Open an .npy file: one tensor, named like the file.

    Raises:
        FormatError: it is not one, is damaged, or its values are not numbers.
    """
    source = make_source(path)
    with source:
        header = _read_header(source.reader(), str(path))
        _check_size(str(path), header, source.size)
        if header.tag is None:
            raise FormatError(f"{path}: the array is {_describe(header.dtype)}; only arrays of numbers are read")
        stored = header.place(source, header.bytes_before)
        tensor = SourceTensor(path.stem, header.shape, header.tag, stored.iter_rows, source, is_vectors=True)
        yield Checkpoint(path, (Shard(path.name, source.size, (tensor,)),))


@contextmanager
def open_npz(path: Path) -> Iterator[Checkpoint]:
    """Open an .npz file, whose arrays are read, and decompressed, as a stream.

    The rows of an array in Fortran order cannot be had from a stream: if it is compressed, it is read whole, and
    refused if it has more than MOST_WHOLE_BYTES.

    Raises:
        FormatError: it is not one, or damaged.
    """
    source = make_source(path)
    with source:
        archive = _Archive(source)
        members = archive.opened.infolist()
        _check_members(path, members, source.size)
        found = [_open_member(source, archive, info) for info in members]
        refuse_repeated(path, [info.filename for info in members])
        tensors = tuple(item for item in found if isinstance(item, SourceTensor))
        left_out = tuple(item for item in found if isinstance(item, str))
        yield Checkpoint(path, (Shard(path.name, source.size, tensors),), left_out=left_out)


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse members that promise more than the file can hold, before anything is made room for."""
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        where = f"{path}: {info.filename}"
        if info.header_offset < end:
            raise FormatError(f"{where}: lies where another member lies; the file is damaged")
        end = info.header_offset + _MEMBER_HEADER_BYTES + info.compress_size
        most = info.compress_size * _MOST_RATIOS.get(info.compress_type, math.inf)
        if end > size or info.file_size > most:
            raise FormatError(
                f"{where}: promises {info.file_size} bytes, in {info.compress_size} of a file of {size}; it is "
                "truncated or damaged, copy it again"
            )


class _Archive:
    """A zip file, whose directory is read once, when it is first wanted in a process; the source is open then."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source

    @cached_property
    def opened(self) -> zipfile.ZipFile:
        """What reads members.

        Raises:
            FormatError: it is none, or damaged.
        """
        with _explain_damage(str(self._source.path)):
            return zipfile.ZipFile(self._source.reader())

    def __reduce__(self) -> tuple[type["_Archive"], tuple[SourceFile]]:
        return _Archive, (self._source,)


def _open_member(source: SourceFile, archive: _Archive, info: zipfile.ZipInfo) -> SourceTensor | str:
    """Return an array, or a note on why it is left out."""
    if not info.filename.endswith(".npy"):
        return f"member {info.filename!r} (not an array)"
    where, name = f"{source.path}: {info.filename}", info.filename.removesuffix(".npy")
    with _explain_damage(where), archive.opened.open(info) as stream:
        header = _read_header(stream, where)
    _check_size(where, header, info.file_size)
    if header.tag is None:
        return f"array {name!r} ({_describe(header.dtype)})"
    member = _Member(where, source, archive, info, header)
    return SourceTensor(name, header.shape, header.tag, member.iter_rows, source)


def _describe(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        return "of Python objects, which take a pickle to read, and pickles are never run"
    if dtype.kind == "V" and dtype.names is None:
        return f"of type {dtype}, raw bytes, of which only bfloat16 is read; save it as .safetensors"
    return f"of type {dtype}"


def _read_header(file: IO[bytes], where: str) -> _Header:
    # A longer one that is wanted is not read: of a compressed file it might be gigabytes.
    start = io.BytesIO(file.read(_MOST_HEADER_BYTES))
    try:
        version = npy.read_magic(start)
        if version not in _HEADERS:  # (3, 0) is for field names in other alphabets
            raise FormatError(f"{where}: .npy version {version[0]}.{version[1]} holds no plain array of numbers")
        shape, is_fortran, dtype = _HEADERS[version](start)
    except FormatError:
        raise
    except Exception as error:  # whatever parsing garbage may raise
        cause = " ".join(str(error).split())
        raise FormatError(f"{where}: not an .npy file, or damaged: {cause:.200}") from error
    if any(length < 0 for length in shape):
        raise FormatError(f"{where}: the header has shape {list(shape)}; the file is damaged")
    tag = None if dtype.hasobject else name_dtype(dtype)
    # NumPy reads both as raw bytes: bfloat16, as ml_dtypes and JAX save it, and raw bytes.
    if dtype == "V2" and b"'<V2'" in start.getvalue()[: start.tell()]:
        dtype, tag = np.dtype(np.uint16), "BF16"
    return _Header(shape, dtype, is_fortran and len(shape) > 1, start.tell(), tag)


def _check_size(where: str, header: _Header, size: int) -> None:
    payload = size - header.bytes_before
    if not header.dtype.hasobject and payload != header.payload:
        verdict = "it is truncated, copy it again" if payload < header.payload else "is it several arrays?"
        raise FormatError(f"{where}: payload is {payload} bytes, header promises {header.payload}; {verdict}")


@contextmanager
def _explain_damage(where: str) -> Iterator[None]:
    try:
        yield
    except FormatError:
        raise
    # RuntimeError: encrypted, or compressed in a way that is not known here. The last two: a damaged directory.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeDecodeError, struct.error) as error:
        raise FormatError(f"{where}: not a zip file that can be read, or damaged: {error}") from error


@dataclass(frozen=True)
class _Member:
    """An array of an .npz file; where: what errors call it."""

    where: str
    source: SourceFile
    archive: _Archive
    info: zipfile.ZipInfo
    header: _Header

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows from a stream, which compares the checksum if it is read from its start to its end."""
        with _explain_damage(self.where), self.archive.opened.open(self.info) as stream:
            if self.header.is_fortran and self.info.compress_type == zipfile.ZIP_STORED:
                if stop - start == self.header.shape[0]:
                    _read_through(stream)
                yield from self.header.place(self.source, self._find_array()).iter_rows(start, stop, n)
                return
            stream.read(self.header.bytes_before)
            read = self._iter_whole if self.header.is_fortran else self._iter_stream
            yield from read(stream, start, stop, n)
            # At its end the stream checks the sum of all bytes.
            stream.read(1)

    def _find_array(self) -> int:
        """Return where the array begins in the file, if nothing is compressed."""
        at = self.info.header_offset
        lengths = np.frombuffer(self.source.read(at + 26, 4), "<u2")
        return at + _MEMBER_HEADER_BYTES + int(lengths.sum()) + self.header.bytes_before

    def _iter_whole(self, stream: IO[bytes], start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        payload = self.header.payload
        if payload > MOST_WHOLE_BYTES:
            raise FormatError(
                f"{self.where}: is compressed and in Fortran order, so that all of its {payload} bytes would be in "
                f"memory, and at most {MOST_WHOLE_BYTES} may be (embpack.formats.npy.MOST_WHOLE_BYTES); save it in C "
                "order, numpy.ascontiguousarray(array), or with numpy.savez"
            )
        whole = np.empty(payload, np.uint8)
        for block in iter_slices(0, payload, _BLOCK_BYTES):
            size = block.stop - block.start
            whole[block] = np.frombuffer(_read_exactly(stream, size, self.where), np.uint8)
        array = whole.view(self.header.dtype).reshape(self.header.shape, order="F")
        for rows in iter_slices(start, stop, n):
            yield as_native(np.array(array[rows], order="C"))

    def _iter_stream(self, stream: IO[bytes], start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        row_shape = self.header.shape[1:]
        row_bytes = math.prod(row_shape) * self.header.dtype.itemsize
        if start:
            # Jumps where nothing is compressed, and gives up the checksum; else decompresses what lies before.
            stream.seek(start * row_bytes, io.SEEK_CUR)
        for rows in iter_slices(start, stop, n):
            count = rows.stop - rows.start
            shape = (count, *row_shape) if self.header.shape else ()
            array = np.frombuffer(_read_exactly(stream, count * row_bytes, self.where), self.header.dtype)
            yield np.asarray(array.reshape(shape), array.dtype.newbyteorder("="))


def _read_through(stream: IO[bytes]) -> None:
    """Read a stream to its end, where it compares its checksum."""
    while stream.read(_BLOCK_BYTES):
        pass


def _read_exactly(stream: IO[bytes], size: int, where: str) -> bytes:
    raw = stream.read(size)
    if len(raw) != size:
        raise FormatError(f"{where}: ends {size - len(raw)} bytes early; the file is truncated, copy it again")
    return raw


def write_npy(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write the only tensor of a shard.

    Raises:
        ValueError: there is not exactly one, or NumPy has no such type.
    """
    if len(shard.tensors) != 1:
        raise ValueError(f"{path}: an .npy file holds 1 tensor, but there are {len(shard.tensors)}; write .npz")
    refuse_dtypes(path, shard, NUMPY_DTYPES, _WAYS_OUT)
    _write_array(file, shard.tensors[0])


def write_npz(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write an uncompressed .npz file.

    Raises:
        ValueError: NumPy has no such type, or a zip file no such name.
    """
    refuse_dtypes(path, shard, NUMPY_DTYPES, _WAYS_OUT)
    for tensor in shard.tensors:
        if "\0" in tensor.name or len(f"{tensor.name}.npy".encode()) > _MAX_NAME_BYTES:
            raise ValueError(
                f"{path}: tensor {tensor.name!r:.80} has a name that an .npz file cannot have, with a NUL in it or of "
                f"more than {_MAX_NAME_BYTES} bytes; {_WAYS_OUT}"
            )
    with zipfile.ZipFile(file, "w") as archive:
        for tensor in shard.tensors:
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as member:
                _write_array(member, tensor)


def _write_array(file: IO[bytes], tensor: OutTensor) -> None:
    descr = npy.dtype_to_descr(NUMPY_DTYPES[tensor.dtype])
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": tensor.shape})
    for chunk in iter_checked(tensor):
        file.write(as_bytes(chunk))

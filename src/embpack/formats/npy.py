"""Arrays that NumPy saves: .npy, and .npz, whose members are .npy files."""

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    iter_slices,
    refuse_dtypes,
    refuse_repeated,
)
from embpack.formats.dtypes import NUMPY_DTYPES, name_dtype
from embpack.formats.mapped import FileMap, MappedArray

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# Of a member of a zip file.
_MAX_NAME_BYTES = (1 << 16) - 1
_WAYS_OUT = "write .safetensors or .pt"


@dataclass(frozen=True)
class _Header:
    """What an .npy file says of its array; is_fortran: columns lie together, not rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    bytes_before: int

    @property
    def payload(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def tag(self) -> str | None:
        return None if self.dtype.hasobject else name_dtype(self.dtype)


@contextmanager
def open_npy(path: Path) -> Iterator[Checkpoint]:
    """Map an .npy file: one tensor, named like the file.

    Raises:
        FormatError: it is not one, is damaged, or its values are not numbers.
    """
    with path.open("rb") as file:
        header = _read_header(file, str(path))
    _check_size(str(path), header, path.stat().st_size)
    if header.tag is None:
        raise FormatError(f"{path}: the array is {_describe(header.dtype)}; only arrays of numbers are read")
    read = partial(_iter_npy, FileMap(path), header)
    tensor = SourceTensor(path.stem, header.shape, header.tag, read, is_vectors=True)
    yield Checkpoint(path, (Shard(path.name, (tensor,)),))


@contextmanager
def open_npz(path: Path) -> Iterator[Checkpoint]:
    """Open an .npz file, whose arrays are read, and decompressed, as a stream.

    An array of two or more dimensions in Fortran order is read whole: its rows cannot be had from a stream.

    Raises:
        FormatError: it is not one, or damaged.
    """
    with _explain_damage(str(path)), zipfile.ZipFile(path) as archive:
        pass
    with zipfile.ZipFile(path) as archive:
        found = [_open_member(path, archive, info) for info in archive.infolist()]
        refuse_repeated(path, archive.namelist())
        tensors = tuple(item for item in found if isinstance(item, SourceTensor))
        left_out = tuple(item for item in found if isinstance(item, str))
        yield Checkpoint(path, (Shard(path.name, tensors),), left_out=left_out)


def _open_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> SourceTensor | str:
    """Return an array, or a note on why it is left out."""
    if not info.filename.endswith(".npy"):
        return f"member {info.filename!r} (not an array)"
    where, name = f"{path}: {info.filename}", info.filename.removesuffix(".npy")
    with _explain_damage(where), archive.open(info) as stream:
        header = _read_header(stream, where)
    _check_size(where, header, info.file_size)
    if header.tag is None:
        return f"array {name!r} ({_describe(header.dtype)})"
    return SourceTensor(name, header.shape, header.tag, _Member(where, archive, info, header).iter_rows)


def _describe(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        return "of Python objects, which take a pickle to read, and pickles are never run"
    if dtype.kind == "V" and dtype.names is None:
        return f"of type {dtype}, raw bytes; save bfloat16 as .safetensors"
    return f"of type {dtype}"


def _read_header(file: IO[bytes], where: str) -> _Header:
    try:
        version = npy.read_magic(file)
        if version not in _HEADERS:  # (3, 0) is for field names in other alphabets
            raise FormatError(f"{where}: .npy version {version[0]}.{version[1]} holds no plain array of numbers")
        shape, is_fortran, dtype = _HEADERS[version](file)
    except FormatError:
        raise
    except (ValueError, EOFError) as error:
        raise FormatError(f"{where}: not an .npy file, or damaged: {error}") from error
    if any(length < 0 for length in shape):
        raise FormatError(f"{where}: the header has shape {list(shape)}; the file is damaged")
    return _Header(shape, dtype, is_fortran and len(shape) > 1, file.tell())


def _check_size(where: str, header: _Header, size: int) -> None:
    payload = size - header.bytes_before
    if not header.dtype.hasobject and payload != header.payload:
        verdict = "it is truncated, copy it again" if payload < header.payload else "is it several arrays?"
        raise FormatError(f"{where}: payload is {payload} bytes, header promises {header.payload}; {verdict}")


def _as_native(array: NDArray[Any]) -> NDArray[Any]:
    """Make an array C-contiguous and of the machine's byte order; a copy only where it is not."""
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def _iter_npy(mapped: FileMap, header: _Header, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    if not header.is_fortran:
        array = MappedArray(mapped, header.bytes_before, header.shape, header.dtype)
        yield from map(_as_native, array.iter_rows(start, stop, n))
        return
    columns = mapped.view(header.bytes_before, header.shape[::-1], header.dtype).T
    for rows in iter_slices(start, stop, n):
        yield np.require(_as_native(columns[rows]), requirements="A")
        mapped.release(0, header.bytes_before + header.payload)


@contextmanager
def _explain_damage(where: str) -> Iterator[None]:
    try:
        yield
    except FormatError:
        raise
    # RuntimeError: encrypted, or compressed in a way that is not known here.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise FormatError(f"{where}: not a zip file that can be read, or damaged: {error}") from error


@dataclass(frozen=True)
class _Member:
    """An array of an .npz file; where: what errors call it."""

    where: str
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    header: _Header

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows from a stream, which compares the checksum if it is read from its start to its end."""
        with _explain_damage(self.where), self.archive.open(self.info) as stream:
            stream.read(self.header.bytes_before)
            is_whole = self.header.is_fortran or not self.header.shape
            read = self._iter_whole if is_whole else self._iter_stream
            yield from map(_as_native, read(stream, start, stop, n))
            # At its end the stream checks the sum of all bytes.
            stream.read(1)

    def _iter_whole(self, stream: IO[bytes], start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        whole = np.frombuffer(_read_exactly(stream, self.header.payload, self.where), self.header.dtype)
        array = whole.reshape(self.header.shape, order="F")
        if not array.shape:
            yield array
            return
        for rows in iter_slices(start, stop, n):
            yield array[rows]

    def _iter_stream(self, stream: IO[bytes], start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        row_shape = self.header.shape[1:]
        row_bytes = math.prod(row_shape) * self.header.dtype.itemsize
        if start:
            # Jumps where nothing is compressed, and gives up the checksum; else decompresses what lies before.
            stream.seek(start * row_bytes, io.SEEK_CUR)
        for rows in iter_slices(start, stop, n):
            count = rows.stop - rows.start
            raw = _read_exactly(stream, count * row_bytes, self.where)
            yield np.frombuffer(raw, self.header.dtype).reshape(count, *row_shape)


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

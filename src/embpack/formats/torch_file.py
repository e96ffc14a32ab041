"""Files of torch.save: what they hold, and where the values of their tensors lie.

Since PyTorch 1.6 these are zip files; before, pickles with the values after them. PyTorch's own reader is not used:
with weights_only it refuses pickles of protocol 4, and any file that holds an object of another class beside tensors.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embpack.errors import FormatError
from embpack.formats.base import find_repeated
from embpack.formats.pickled import Named, Outside, PickleError, read_pickle
from embpack.formats.source import SourceFile, SourcePart

ITEM_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8", "qint8", "quint8", "quint4x2", "quint2x4"), 1),
    **dict.fromkeys(("int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "float32", "qint32"), 4),
    **dict.fromkeys(("int64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of a value, by PyTorch's name of its type."""

_STORAGES = {
    "BoolStorage": "bool",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}

ADVICE = "save the weights alone with torch.save(model.state_dict(), path)"
"""What to do about a file that holds something else."""

_SAVE_AGAIN = "write it again with torch.save(torch.load(path, weights_only=True), path)"
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# The first pickle of a file of before PyTorch 1.6, and what is before each storage.
_MAGIC = 0x1950A86A20F9469CFC6C
_COUNT_BYTES = 8
# All pickles of a file: they take a few hundred bytes a tensor.
MOST_PICKLE_BYTES = 1 << 26


@dataclass(frozen=True)
class Storage:
    """A run of values, of which tensors are views.

    Attributes:
        dtype: PyTorch's type of its values, "float32".
        offset: where it begins in the file.
        nbytes: of all its values.
        checksum: CRC-32 of its bytes; None if the file does not have it.
    """

    dtype: str
    offset: int
    nbytes: int
    checksum: int | None = None


@dataclass(frozen=True)
class SavedFile:
    """What a file holds.

    Attributes:
        path: what errors call it.
        value: as read_pickle gives it.
        byte_order: of all values, "<" or ">".
        find_storage: returns the storage that an Outside of the value means, None if it is none; raises FormatError
            where the file does not have all of it.
    """

    path: Path | str
    value: Any
    byte_order: str
    find_storage: Callable[[Outside], Storage | None]


def read_saved(source: SourceFile | SourcePart) -> SavedFile:
    """Read what an open file of torch.save holds, or a part of a file, but for the values of its tensors.

    Raises:
        FormatError: it is not one, is damaged, or was compressed by another program.
    """
    if source.read(0, len(_ZIP_MAGIC)) == _ZIP_MAGIC:
        archive = _Archive(source)
        return SavedFile(source.path, archive.read_value(), archive.read_byte_order(), archive.find_storage)
    if source.read(257, 5) == b"ustar":
        raise FormatError(
            f"{source.path}: a tar file, as PyTorch wrote before 0.1.10; save it again with a later PyTorch"
        )
    return _read_stream(source)


def _parse_id(outside: Outside) -> tuple[str, str, int] | None:
    """Return a storage's key, the type of its values and its bytes; None if it is no storage."""
    match outside.key:
        # The device does not matter. Before PyTorch 0.4 a storage could be a view of another, which comes last.
        case ("storage", Named(name=name), str(key), str(), int(count), *rest) if name in _STORAGES and not any(rest):
            return key, _STORAGES[name], count * ITEM_BYTES[_STORAGES[name]]
    return None


class _Archive:
    """A zip file of torch.save: its members lie in one folder, data.pkl and each storage's bytes."""

    def __init__(self, source: SourceFile | SourcePart) -> None:
        self._source = source
        try:
            with zipfile.ZipFile(source.reader()) as archive:
                members = archive.infolist()
        # NotImplementedError: it says that a later version of the format is needed.
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise self._refuse(
                f"begins as a zip file, but its directory cannot be read ({error}); copy it again"
            ) from error
        folder = members[0].filename.partition("/")[0] if members else ""
        names = [member.filename.removeprefix(f"{folder}/") for member in members]
        repeated = find_repeated(names)
        if repeated is not None:
            raise self._refuse(f"{repeated!r} is in it twice, and which one is meant cannot be told")
        self._members = dict(zip(names, members, strict=True))
        # PyTorch can be told to leave out checksums, and then all are 0.
        self._has_checksums = any(member.CRC for member in members)
        self._check_kind()

    def _refuse(self, what: str) -> FormatError:
        return FormatError(f"{self._source.path}: {what}")

    def _check_kind(self) -> None:
        if "constants.pkl" in self._members:
            raise self._refuse(
                f"holds a TorchScript module, not a state dict; open it with torch.jit.load and {ADVICE}"
            )
        if "data.pkl" not in self._members:
            raise self._refuse("a zip file, but not one of torch.save: it has no data.pkl")
        for name, member in self._members.items():
            if member.flag_bits & 1:
                raise self._refuse(f"{name} in it is encrypted; {_SAVE_AGAIN}")
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise self._refuse(f"{name} in it was compressed, which torch.save never does; {_SAVE_AGAIN}")

    def read_value(self) -> Any:
        try:
            return read_pickle(io.BytesIO(self._read("data.pkl")))
        except PickleError as error:
            raise self._refuse(f"not a file of torch.save, or damaged: {error}") from error

    def read_byte_order(self) -> str:
        if "byteorder" not in self._members:  # files of PyTorch before 2.1, which wrote nothing else
            return "<"
        name = self._read("byteorder")
        if name not in (b"little", b"big"):
            raise self._refuse(
                f"its byte order is {name[:20]!r}, not little or big; the file is damaged, copy it again"
            )
        return "<" if name == b"little" else ">"

    def find_storage(self, outside: Outside) -> Storage | None:
        parsed = _parse_id(outside)
        if parsed is None:
            return None
        key, dtype, nbytes = parsed
        name = f"data/{key}"
        if name not in self._members:
            raise self._refuse(
                f"it has no {name}, where values of tensors are to be; the file is damaged, copy it again"
            )
        size = self._members[name].file_size
        if size != nbytes:
            raise self._refuse(
                f"{name} has {size} bytes, its pickle promises {nbytes}; the file is damaged, copy it again"
            )
        return Storage(dtype, self._find(name), nbytes, self._members[name].CRC if self._has_checksums else None)

    def _read(self, name: str) -> bytes:
        size = self._members[name].file_size
        if size > MOST_PICKLE_BYTES:
            raise self._refuse(f"{name} in it has {size} bytes, and at most {MOST_PICKLE_BYTES} are read; {ADVICE}")
        raw = self._source.read(self._find(name), size)
        if self._has_checksums and zlib.crc32(raw) != self._members[name].CRC:
            raise self._refuse(
                f"the bytes of {name} do not agree with its checksum; the file is damaged, copy it again"
            )
        return raw

    def _find(self, name: str) -> int:
        """Return where a member's bytes begin, which only the header in front of them says."""
        member = self._members[name]
        is_inside = 0 <= member.header_offset < self._source.size
        header = self._source.read(member.header_offset, _LOCAL_HEADER.size) if is_inside else b""
        if len(header) == _LOCAL_HEADER.size and header.startswith(_ZIP_MAGIC):
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            start = member.header_offset + len(header) + int(name_bytes) + int(extra_bytes)
            if start + member.file_size <= self._source.size:
                return start
        raise self._refuse(f"{name} is not where its directory says; the file is damaged, copy it again")


class _Start:
    """The beginning of a file, of which pickles may be so much and no more."""

    def __init__(self, source: SourceFile | SourcePart) -> None:
        self._file = source.reader()

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        if self.tell() + size > MOST_PICKLE_BYTES:
            raise ValueError(f"its pickles take more than {MOST_PICKLE_BYTES} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._file.readline(max(0, MOST_PICKLE_BYTES - self.tell()))


def _read_stream(source: SourceFile | SourcePart) -> SavedFile:
    """Read a file of before PyTorch 1.6, which torch.save still writes if asked to: five pickles, then all values."""
    file = _Start(source)
    outside: list[Outside] = []
    try:
        magic = read_pickle(file)
        if magic != _MAGIC:
            raise FormatError(f"{source.path}: a pickle, but not one of torch.save; pickles are never run, so {ADVICE}")
        _version, _system, value, keys = (
            read_pickle(file),
            read_pickle(file),
            read_pickle(file, outside),
            read_pickle(file),
        )
    except PickleError as error:
        raise FormatError(f"{source.path}: not a file of torch.save, or damaged: {error}") from error
    found = {parsed[0]: parsed for parsed in map(_parse_id, outside) if parsed}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in found for key in keys):
        raise FormatError(
            f"{source.path}: its list of storages is not that of its pickle; the file is damaged, copy it again"
        )
    storages = dict(_iter_storages(source, file.tell(), [found[key] for key in keys]))
    # Values are little-endian on every machine.
    return SavedFile(source.path, value, "<", lambda wanted: _look_up(storages, wanted))


def _iter_storages(
    source: SourceFile | SourcePart, start: int, wanted: list[tuple[str, str, int]]
) -> Iterator[tuple[str, Storage]]:
    """Yield storages by key, as they lie one after another, each after the number of its values."""
    for key, dtype, nbytes in wanted:
        count = int.from_bytes(source.read(start, _COUNT_BYTES), "little")
        start += _COUNT_BYTES
        if count * ITEM_BYTES[dtype] != nbytes or start + nbytes > source.size:
            raise FormatError(
                f"{source.path}: the {nbytes} bytes of storage {key!r} are not all there; it is truncated or damaged, "
                "copy it again"
            )
        yield key, Storage(dtype, start, nbytes)
        start += nbytes


def _look_up(storages: dict[str, Storage], wanted: Outside) -> Storage | None:
    parsed = _parse_id(wanted)
    return storages.get(parsed[0]) if parsed else None

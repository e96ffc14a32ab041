"""What the footer of a Parquet file says of its columns, and the headers of their pages of them.

Arrow ends the process where some of this is damaged (ParquetFile.metadata's column() throws where C++ must not), so it
is read here. All is in Thrift's compact protocol, of the structure that parquet.thrift has:
https://github.com/apache/parquet-format
"""

from dataclasses import dataclass
from typing import Any

from embpack.errors import FormatError
from embpack.formats.source import SourceFile

_TAIL_BYTES = 8  # the footer's length and "PAR1"
# Of a page: most are short, and Arrow reads none that are longer.
_HEADER_BYTES = (1 << 10, 1 << 24)
_MOST_DEPTH = 16
_MOST_SHIFT = 63  # of integers of 64 bits

# Thrift's numbers of types.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _, _STRUCT = range(1, 13)


@dataclass(frozen=True)
class ColumnChunk:
    """A column of a row group.

    Attributes:
        num_rows: of the row group.
        num_values: numbers in it, nulls and empty lists counted, too.
        null_count: of these; None where the file does not say.
        start, stop: where its pages lie in the file.
    """

    num_rows: int
    num_values: int
    null_count: int | None
    start: int
    stop: int


def read_columns(source: SourceFile) -> dict[str, list[ColumnChunk]]:
    """Read what a file's footer says: by the name of a column, the chunks of all that it is made of.

    Raises:
        FormatError: it is damaged.
    """
    size = int.from_bytes(source.read(source.size - _TAIL_BYTES, 4), "little")
    try:
        footer = _Compact(source.read(source.size - _TAIL_BYTES - size, size)).read_struct()
        columns: dict[str, list[ColumnChunk]] = {}
        for group in footer[4]:
            for chunk in group[1]:
                about = chunk[3]
                name = about[3][0].decode()
                null_count = about.get(12, {}).get(3)
                # The dictionary is the first page, if there is one.
                start = min(int(about[9]), int(about.get(11) or about[9]))
                stop = start + int(about[7])
                found = ColumnChunk(int(group[3]), int(about[5]), null_count, start, stop)
                columns.setdefault(name, []).append(found)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{source.path}: its footer does not say what its columns are; it is damaged") from error
    return columns


def refuse_large_pages(source: SourceFile, chunk: ColumnChunk, most_bytes: int) -> None:
    """Raise FormatError if a page of a column takes more than so many bytes, for Arrow makes room for what it says.

    Where a page's header is damaged it stops: Arrow will say so, if it comes to that page.
    """
    at = chunk.start
    while 0 <= at < min(chunk.stop, source.size):
        found = _read_page_header(source, at)
        if found is None:
            return
        size, uncompressed, compressed = found
        most = max(uncompressed, compressed)
        if most > most_bytes:
            raise FormatError(
                f"{source.path}: the page at byte {at} takes {most} bytes, and at most {most_bytes} may be in memory "
                "(embpack.formats.parquet.MOST_PAGE_BYTES); the file is damaged, or is to be written with smaller pages"
            )
        at += size + max(0, compressed)


def _read_page_header(source: SourceFile, at: int) -> tuple[int, int, int] | None:
    """Return the bytes of a page's header, and what it says that the page takes uncompressed and compressed."""
    for room in _HEADER_BYTES:
        reader = _Compact(source.read(at, room))
        try:
            header = reader.read_struct()
            return reader.position, int(header[2]), int(header[3])
        except (LookupError, TypeError, ValueError):  # longer, or damaged
            continue
    return None


class _Compact:
    """Values in Thrift's compact protocol: structures are dicts by the number of a field."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.position = 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MOST_DEPTH:
            raise ValueError
        fields: dict[int, Any] = {}
        number = 0
        while head := self._read_byte():
            step, kind = divmod(head, 16)
            number = number + step if step else self._read_signed()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._read(kind, depth)
        return fields

    def _read(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):  # booleans of a list have a byte each
            return self._read_byte()
        if kind in (_I16, _I32, _I64):
            return self._read_signed()
        if kind in (_DOUBLE, _BINARY):
            return self._take(8 if kind == _DOUBLE else self._read_varint())
        if kind in (_LIST, _SET):
            return self._read_list(depth)
        if kind == _STRUCT:
            return self.read_struct(depth + 1)
        raise ValueError(f"type {kind}")  # maps: Parquet has none

    def _read_list(self, depth: int) -> list[Any]:
        length, kind = divmod(self._read_byte(), 16)
        if length == 15:  # the length comes by itself
            length = self._read_varint()
        if length > len(self._raw):
            raise ValueError
        return [self._read(kind, depth + 1) for _ in range(length)]

    def _take(self, size: int) -> bytes:
        taken = self._raw[self.position : self.position + size]
        if len(taken) != size:
            raise ValueError
        self.position += size
        return taken

    def _read_byte(self) -> int:
        return self._take(1)[0]

    def _read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._read_byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > _MOST_SHIFT:
                raise ValueError

    def _read_signed(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)

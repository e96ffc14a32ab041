"""Files that are read: through one descriptor, and refused if they change meanwhile."""

import errno
import io
import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.errors import FormatError
from embpack.formats.mapped import map_file, was_refused
from embpack.formats.paths import is_remote


class State(NamedTuple):
    """What a file is known by, and by what it is seen to have changed.

    Device and inode are None where they are not known: they are this machine's, and the file may be opened on others.
    Version is what an object store says beside size and time; "" for a file.
    """

    device: int | None
    inode: int | None
    size: int
    modified_ns: int
    version: str = ""

    @classmethod
    def of(cls, stat: os.stat_result) -> "State":
        """Make that of a file of this machine."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    @property
    def anywhere(self) -> "State":
        """What is the same on every machine that sees the file."""
        return self._replace(device=None, inode=None)


class SourceFile:
    """A file whose bytes are all read through one descriptor, and which must stay what it was when first opened.

    It is open while a ``with`` block of it runs; blocks may lie within each other and overlap. Between blocks it has
    no descriptor, so that a checkpoint of many files needs one at a time. When it is opened again, it must be the same
    file, unchanged: device, inode, size and time of modification. A file that is written to through a shared mapping
    keeps its time for a while, and such a change may not be seen.

    It can be pickled, and opened by another process on any machine that sees the file under the same path. There it
    must have the size and the time of modification that it had here.

    Attributes:
        path: what errors call it.
        is_far: whether reading takes so long that it pays to begin with it sooner.
        reader_bytes: that reader reads at a time.
    """

    is_far = False
    reader_bytes = 1 << 16

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._blocks = 0
        self._seen: State | None = None
        self._map: mmap.mmap | None = None
        self._for_rows: _native.DiskFile | None = None

    def __enter__(self) -> "SourceFile":
        """Open it, unless it is open.

        Raises:
            FormatError: it was opened before and is another file by now, or was changed.
            OSError: there is no such file, or it cannot be read.
        """
        if not self._blocks:
            self._open()
        self._blocks += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks -= 1
        if not self._blocks:
            self._close()

    def __getstate__(self) -> dict[str, Any]:
        fresh = type(self)(self.path.absolute())
        fresh._seen = self._seen and self._seen.anywhere
        return vars(fresh)

    def __del__(self) -> None:
        # A block may be within a generator that nobody runs to its end.
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            if self._seen is not None:
                raise FormatError(self._describe_change()) from error
            if isinstance(error, PermissionError):
                advice = "no permission to read it; change its mode"
                raise PermissionError(error.errno, advice, str(self.path)) from None
            raise
        state = State.of(os.fstat(descriptor))
        if self._seen is None or self._seen == state.anywhere:
            self._seen = state
        elif state != self._seen:
            os.close(descriptor)
            raise FormatError(self._describe_change())
        self._descriptor = descriptor

    @property
    def size(self) -> int:
        """Bytes that the file had when it was first opened."""
        assert self._seen is not None  # it was opened
        return self._seen.size

    @property
    def modified_ns(self) -> int:
        """When it was last modified, by then."""
        assert self._seen is not None  # it was opened
        return self._seen.modified_ns

    @property
    def version(self) -> str:
        """What an object store told versions of it apart by, then; "" for a file."""
        assert self._seen is not None  # it was opened
        return self._seen.version

    @property
    def descriptor(self) -> int:
        """The open file's number, for libraries that take one; it belongs to the ``with`` block."""
        assert self._descriptor is not None  # it is open
        return self._descriptor

    def read_into(self, offset: int, out: NDArray[Any]) -> None:
        """Fill a C-contiguous array with the bytes from an offset on; several threads may read at once.

        Raises:
            FormatError: the file ends before.
            OSError: the bytes cannot be read.
        """
        view = out.reshape(-1).view(np.uint8).data
        while len(view):
            count = self._read_some(offset, view)
            if not count:
                raise FormatError(
                    f"{self.path}: ends at {offset} bytes, and {len(view)} more were to be read; it is truncated, copy "
                    "it again"
                )
            view, offset = view[count:], offset + count

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes from an offset on, as many as there are up to num_bytes; none are made room for but those."""
        room = np.empty(max(0, min(num_bytes, self.size - offset)), np.uint8)
        self.read_into(offset, room)
        return room.tobytes()

    def reader(self) -> BinaryIO:
        """Return a file object with a position of its own, which reads through the descriptor while that is open."""
        return self.part(0, self.size).reader()

    def part(self, offset: int, num_bytes: int, name: str = "") -> "SourcePart":
        """Return some of its bytes, which are there; name: what errors call them, after the file."""
        return SourcePart(self, f"{self.path}: {name}" if name else str(self.path), offset, num_bytes)

    def map(self) -> mmap.mmap | None:
        """Map the open file, once; None, and a warning, where that is not allowed.

        Raises:
            OSError: too many files are open.
        """
        if self._map is None:
            try:
                self._map = map_file(self.descriptor, self.size)
            except OSError as error:
                if was_refused(error):
                    self.warn_of_reading(f"cannot be mapped here ({error.strerror})")
                    return None
                advice = "each mapped file keeps a descriptor; allow more (ulimit -n), or load with access='memory'"
                raise OSError(error.errno, f"cannot be mapped: {error.strerror}; {advice}", str(self.path)) from None
        return self._map

    def open_for_rows(self) -> _native.DiskFile:
        """Return it as what reads a few rows here and there, the same each time, and is open as long as that lives.

        Raises:
            FormatError: it was opened before and is another file by now, or was changed.
            OSError: too many files are open.
        """
        if self._for_rows is None:
            try:
                with self:
                    self._for_rows = _native.DiskFile(self.descriptor)
            except OSError as error:
                advice = "each file whose rows stay on the disk keeps a descriptor; allow more (ulimit -n)"
                raise OSError(error.errno, f"{error.strerror}; {advice}", str(self.path)) from None
        return self._for_rows

    def warn_of_reading(self, reason: str) -> None:
        """Warn that it is read into memory, not mapped, and why."""
        warnings.warn(f"{self.path}: {reason}, so it is read into memory", RuntimeWarning, stacklevel=3)

    def _read_some(self, offset: int, view: memoryview) -> int:
        try:
            return os.preadv(self.descriptor, [view], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    @contextmanager
    def unchanged(self, what: str, *, by_name: bool = True) -> Iterator[None]:
        """Keep it open, and refuse what was read in the block if the file was changed before or meanwhile.

        Args:
            what: is being read, "tensor 'a'", for the error.
            by_name: the file under its path must still be the same, too; else a file that was replaced or deleted may
                be read to its end.

        Raises:
            FormatError: it was changed; also in place of an error that the block raises then.
        """
        with self:
            self.check(what, by_name=by_name)
            try:
                yield
            except Exception as error:
                if self._has_changed(by_name=by_name):
                    raise FormatError(self._describe_change(what)) from error
                raise
            self.check(what, by_name=by_name)

    def check(self, what: str = "", *, by_name: bool = True) -> None:
        """Raise FormatError if the open file is not what it was when first opened; arguments as of unchanged."""
        if self._has_changed(by_name=by_name):
            raise FormatError(self._describe_change(what))

    def _has_changed(self, *, by_name: bool) -> bool:
        if State.of(os.fstat(self.descriptor)) != self._seen:
            return True
        return by_name and self._state_by_name() != self._seen

    def _state_by_name(self) -> State | None:
        try:
            return State.of(self.path.stat())
        except OSError:
            return None

    def _describe_change(self, what: str = "") -> str:
        now, seen = self._state_by_name(), self._seen
        assert seen is not None  # it was opened
        if now is None:
            change = "deleted or moved"
        elif seen.device is not None and now[:2] != seen[:2]:
            change = "replaced by another file"
        elif now.size != seen.size:
            change = f"changed from {seen.size} to {now.size} bytes"
        else:
            change = "written to"
        during = f"{what} was read" if what else "it was read"
        return f"{self.path}: was {change} while {during}; run again when nobody writes to it"


def make_source(path: Path) -> SourceFile:
    """Make a source of what lies under a path, of this machine or a URI; it is opened by whoever reads it."""
    if not is_remote(path):
        return SourceFile(path)
    from embpack.formats.remote_source import RemoteFile

    return RemoteFile(path)


@dataclass(frozen=True)
class SourcePart:
    """Bytes of a source that are read as if they were a file, and no others.

    Attributes:
        source: the file, open while they are read.
        path: what errors call them.
        offset: of the first in the file.
        size: how many they are.
    """

    source: SourceFile
    path: str
    offset: int
    size: int

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes from an offset on, as many as there are up to num_bytes."""
        return self.source.read(self.offset + offset, min(num_bytes, self.size - offset))

    def reader(self) -> BinaryIO:
        """Return a file object with a position of its own, which reads while the source is open."""
        return io.BufferedReader(_Reader(self), self.source.reader_bytes)


class _Reader(io.RawIOBase):
    """The bytes of a part as they come, for libraries that take a file object."""

    def __init__(self, part: SourcePart) -> None:
        self._part = part
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._part.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "seeking before the beginning", self._part.path)
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        left, source = max(0, self._part.size - self._position), self._part.source
        wanted = bool(left and len(view))
        count = source._read_some(self._part.offset + self._position, view[:left]) if wanted else 0
        if wanted and not count:
            source.check()
        self._position += count
        return count

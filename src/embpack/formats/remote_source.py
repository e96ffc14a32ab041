"""Files behind a URI that are read: ranges of them, and refused if they change meanwhile."""

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.formats.remote import find, for_each, read_range, refuse_access
from embpack.formats.source import SourceFile, State
from embpack.formats.stored import iter_slices

# Of one request. What is longer is several at a time: of one connection S3 gives some 80 MB/s.
_REQUEST_BYTES = 1 << 22


class RemoteFile(SourceFile):
    """A file behind a URI. It has no descriptor: each read is a request for a range of it.

    What it is known by is its size, its time of modification and what the store has to tell versions apart.
    """

    is_far = True
    # A request takes some tens of milliseconds, whatever it is for.
    reader_bytes = _REQUEST_BYTES

    def _open(self) -> None:
        # Whoever opens it again looks at it when all is read.
        if self._seen is None:
            self._seen = self._find_state()

    def _close(self) -> None:
        pass

    def read_into(self, offset: int, out: NDArray[Any]) -> None:
        """Do what SourceFile.read_into does, a few MB at a request, and several requests at a time."""
        raw = out.reshape(-1).view(np.uint8)
        if len(raw) <= _REQUEST_BYTES:
            super().read_into(offset, raw)
            return

        def read(part: slice) -> None:
            super(RemoteFile, self).read_into(offset + part.start, raw[part])

        for_each(read, iter_slices(0, len(raw), _REQUEST_BYTES))

    def _read_some(self, offset: int, view: memoryview) -> int:
        stop = min(offset + min(len(view), _REQUEST_BYTES), self.size)
        if offset >= stop:
            return 0
        raw = read_range(self.path, offset, stop)
        view[: len(raw)] = raw
        return len(raw)

    def _has_changed(self, *, by_name: bool) -> bool:
        return self._state_by_name() != self._seen

    def _state_by_name(self) -> State | None:
        try:
            return self._find_state()
        except FileNotFoundError:
            return None

    def _find_state(self) -> State:
        return State(None, None, *find(self.path))

    def map(self) -> mmap.mmap | None:
        """Refuse to be mapped.

        Raises:
            ValueError: always.
        """
        refuse_access(self.path, "mapped")

    def open_for_rows(self) -> _native.DiskFile:
        """Refuse to be opened for rows.

        Raises:
            ValueError: always.
        """
        refuse_access(self.path, "disk")

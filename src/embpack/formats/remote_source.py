"""Files behind a URI that are read: ranges of them, and refused if they change meanwhile."""

import mmap

from embpack import _native
from embpack.formats.remote import find, read_range, refuse_access
from embpack.formats.source import SourceFile, State

# Of one request.
_REQUEST_BYTES = 1 << 24


class RemoteFile(SourceFile):
    """A file behind a URI. It has no descriptor: each read is a request for a range of it.

    What it is known by is its size, its time of modification and what the store has to tell versions apart.
    """

    # A request takes some 20 ms, in which as many bytes come as this, or so.
    reader_bytes = 1 << 22

    def _open(self) -> None:
        # Whoever opens it again looks at it when all is read.
        if self._seen is None:
            self._seen = self._find_state()

    def _close(self) -> None:
        pass

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

"""The file that rows are looked up from: what is in it, what of it is in the page cache, and how it is read barely."""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compiled import load_compiled
from embpack.files import TableEntry, make_metadata
from embpack.formats import OutShard, OutTensor, write_checkpoint
from embpack.layouts import RowFormat
from embpack.packed_files import open_packed

TABLE = "table"
_CHUNK_BYTES = 1 << 26


class TableFile:
    """A packed file of one table of random codes.

    Attributes:
        path: of the file.
        row_format: of its rows.
        offset: of the table's first row in the file.
        num_embeddings: rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_packed(path) as checkpoint:
            [part] = checkpoint.tables[TABLE].pieces[0].parts
            self.row_format = checkpoint.tables[TABLE].entry.row_format
            assert part.stored is not None
            self.offset, self.num_embeddings = part.stored.offset, part.shape[0]

    def empty_cache(self) -> None:
        """Have nothing of it in the page cache; no map of it may be open.

        Raises:
            RuntimeError: some of it still is there.
        """
        with self._open() as descriptor:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        cached = self.measure_cached()
        if cached > 0.001:
            raise RuntimeError(
                f"{self.path}: {100 * cached:.1f} % of it stays in the page cache; another process uses it"
            )

    def fill_cache(self) -> None:
        """Have all of it in the page cache.

        Raises:
            RuntimeError: there is too little memory for that.
        """
        for _ in range(5):
            with self._open() as descriptor:
                for start in range(0, self.path.stat().st_size, _CHUNK_BYTES):
                    os.pread(descriptor, _CHUNK_BYTES, start)
            cached = self.measure_cached()
            if cached > 0.999:
                return
        raise RuntimeError(f"{self.path}: only {100 * cached:.1f} % of it stays in the page cache; take fewer --gb")

    def measure_cached(self) -> float:
        """The share of its pages that is in the page cache."""
        with self._open() as descriptor, mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE) as mapped:
            pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            mincore = ctypes.CDLL(None, use_errno=True).mincore
            mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
            if mincore(view.ctypes.data, len(mapped), pages.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore fails")
            del view
            return float((pages & 1).mean())

    @contextmanager
    def _open(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def write_table(folder: Path, gigabytes: float, embedding_dim: int) -> Iterator[TableFile]:
    """Write a file of random codes, in units of 1e9 bytes, and remove it in the end."""
    row_format = RowFormat(embedding_dim)
    rows = int(gigabytes * 1e9) // row_format.row_bytes
    at_a_time = _CHUNK_BYTES // row_format.row_bytes

    def make_chunks() -> Iterator[NDArray[Any]]:
        random = np.random.default_rng(0)
        for start in range(0, rows, at_a_time):
            chunk = random.integers(0, 256, (min(at_a_time, rows - start), row_format.row_bytes), np.uint8)
            chunk[:, row_format.code_bytes :].view("<f2")[:] = 0.01, 0  # scale and bias
            yield chunk

    tensor = OutTensor(TABLE, "U8", (rows, row_format.row_bytes), make_chunks)
    entry = TableEntry.make(
        row_format, num_embeddings=rows, dtype="float32", method="", loss=None, checksum="sha256:not measured"
    )
    metadata = make_metadata({TABLE: entry}, {}, [tensor])
    with TemporaryDirectory(prefix="embpack-benchmark-", dir=folder) as own:
        path = Path(own) / "table.safetensors"
        write_checkpoint(path, [OutShard(path.name, (tensor,), lambda: metadata, 1 << 12)])
        yield TableFile(path)


def compile_bare_loop(file: TableFile) -> Callable[[NDArray[np.int64]], NDArray[np.uint8]]:
    """Make what reads rows of a file by parallel pread and nothing else, [L] to uint8 [L, row_bytes].

    Raises:
        OSError: there is no compiler, or it fails.
    """
    function = load_compiled("read_rows.cpp").read_rows
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    descriptor = os.open(file.path, os.O_RDONLY)  # for as long as the process lives
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    row_bytes = file.row_format.row_bytes

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        offsets, out = file.offset + rows * row_bytes, np.empty((len(rows), row_bytes), np.uint8)
        failed = function(descriptor, offsets.ctypes.data, len(rows), row_bytes, out.ctypes.data)
        if failed:
            raise OSError(f"{file.path}: {failed} rows cannot be read")
        return out

    return read


def describe_disk(folder: Path) -> str:
    """Say what is known of the disk that a folder is on: its device, how much of it is read ahead, its queue."""
    number = folder.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    queue = next((each / "queue" for each in (device, device.parent) if (each / "queue").is_dir()), None)
    if queue is None:
        return "unknown"
    settings = {name: (queue / name).read_text().strip() for name in ("rotational", "read_ahead_kb", "nr_requests")}
    return f"{device.name}, " + ", ".join(f"{name} {value}" for name, value in settings.items())

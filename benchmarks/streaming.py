"""How much memory embpack.quantize_file takes for a table larger than what it may hold.

The work is done by a process of its own, whose /proc/PID/status is read every 20 ms.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

SAMPLE_SECONDS = 0.02
_CHUNK_BYTES = 1 << 26
_PAGES = ("RssAnon", "RssFile", "VmHWM")

# Prints the seconds that the call took.
_WORKER = """
import sys, time
import embpack
source, target, method = sys.argv[1:]
start = time.perf_counter()
embpack.quantize_file(source, target, method=method)
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class MemoryUse:
    """What a streaming run took.

    Attributes:
        peak_anonymous_bytes: memory that only the process can give back: what bounds it.
        peak_mapped_bytes: pages of files, which the kernel takes back when it needs them.
        peak_resident_bytes: both together, at their highest.
    """

    method: str
    embedding_dim: int
    table_bytes: int
    rows_per_second: float
    peak_anonymous_bytes: int
    peak_mapped_bytes: int
    peak_resident_bytes: int


@contextmanager
def table_file(num_embeddings: int, embedding_dim: int) -> Iterator[Path]:
    """Write a safetensors file of one float32 table, normal values repeated, and remove it in the end."""
    table_bytes = num_embeddings * embedding_dim * 4
    entry = {"dtype": "F32", "shape": [num_embeddings, embedding_dim], "data_offsets": [0, table_bytes]}
    header = json.dumps({"embedding.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    chunk = np.random.default_rng(0).standard_normal(_CHUNK_BYTES // 4, dtype=np.float32).tobytes()
    with TemporaryDirectory(prefix="embpack-benchmark-") as folder:
        path = Path(folder) / "table.safetensors"
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, table_bytes, _CHUNK_BYTES):
                file.write(chunk[: table_bytes - start])
        yield path


def measure_streaming(method: str, gigabytes: float, embedding_dim: int = 64) -> MemoryUse:
    """Quantize a float32 table file with embpack.quantize_file and watch its memory.

    Args:
        method: a name in embpack.METHODS.
        gigabytes: of the table, in units of 2**30 bytes.
        embedding_dim: values a row.

    Raises:
        RuntimeError: quantize_file failed; with what it wrote to stderr.
    """
    num_embeddings = max(1, int(gigabytes * 2**30) // (4 * embedding_dim))
    with table_file(num_embeddings, embedding_dim) as source:
        return watch_packing(source, method, (num_embeddings, embedding_dim), num_embeddings * embedding_dim * 4)


def watch_packing(source: Path, method: str, shape: tuple[int, int], table_bytes: int) -> MemoryUse:
    """Quantize a file of one table with embpack.quantize_file and watch its memory.

    Raises:
        RuntimeError: quantize_file failed; with what it wrote to stderr.
    """
    command = [sys.executable, "-c", _WORKER, str(source), str(source.with_name("packed.safetensors")), method]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peaks = _watch(worker)
    output, complaint = worker.communicate()
    if worker.returncode:
        raise RuntimeError(f"embpack.quantize_file failed: {complaint.strip()}")
    rate = shape[0] / float(output)
    return MemoryUse(method, shape[1], table_bytes, rate, peaks["RssAnon"], peaks["RssFile"], peaks["VmHWM"])


def _watch(worker: subprocess.Popen[str]) -> dict[str, int]:
    """Return the largest value of each kind of memory until the process ends, in bytes."""
    peaks = dict.fromkeys(_PAGES, 0)
    while worker.poll() is None:
        for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(SAMPLE_SECONDS)
    return peaks

"""A table of FP8 in pieces, as large language models have them: memory and rate of packing it, and what reading costs.

The file is written to $TMPDIR and removed in the end; a process of its own packs it. What reading codes costs is timed
beside packing, both on one thread and in turns, on what is worked on at a time.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.harness import describe_machine
from benchmarks.report import print_machine
from benchmarks.streaming import MemoryUse, watch_packing
from embpack import _native, quantize
from embpack.chunks import chunk_rows
from embpack.cli import show
from embpack.formats.scaled import CODE_VALUES
from embpack.methods import DEFAULT_METHOD
from embpack.threads import get_num_threads, set_num_threads

_STEM = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding"


@contextmanager
def write_pieces(num_pieces: int, piece_rows: int, embedding_dim: int) -> Iterator[Path]:
    """Write a safetensors file of one table in FP8 with one scale, normal values repeated, and remove it in the end."""
    rng = np.random.default_rng(0)
    # Codes of rising magnitude are rising numbers: those below 120 are finite, and a sign is the first bit.
    piece = rng.integers(0, 120, (piece_rows, embedding_dim), np.uint8)
    piece |= rng.integers(0, 2, piece.shape, np.uint8) << 7
    header = {f"{_STEM}.weight_scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for number in range(num_pieces):
        offsets = [4 + number * piece.nbytes, 4 + (number + 1) * piece.nbytes]
        header[f"{_STEM}.shard_{number}.weight"] = {
            "dtype": "F8_E4M3",
            "shape": list(piece.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    with TemporaryDirectory(prefix="embpack-benchmark-") as folder:
        path = Path(folder) / "table.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + np.float32(0.001).tobytes())
            for _ in range(num_pieces):
                file.write(piece.data)
        yield path


def measure_reading(embedding_dim: int, blocks: int, rounds: int) -> float:
    """Time making values of codes by packing them, as a share of its time, on one thread: the median of some rounds."""
    rows = chunk_rows(embedding_dim)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 120, (rows, embedding_dim), np.uint8)
    scales = rng.random((rows, blocks), np.float32)
    values = np.empty((rows, embedding_dim), np.float32)
    threads = get_num_threads()
    set_num_threads(1)
    shares = []
    for _ in range(rounds):
        read = _time(lambda: _native.multiply_codes(codes, CODE_VALUES["F8_E4M3"], scales, values))
        shares.append(read / _time(lambda: quantize(values)))
    set_num_threads(threads)
    return statistics.median(shares)


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_tables", description=__doc__)
    parser.add_argument("--gb", type=float, default=20.0, metavar="GB", help="of the table (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=160, metavar="D", help="values a row (default: %(default)s)")
    parser.add_argument("--pieces", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--method", default=DEFAULT_METHOD, help="that packs it (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of timing (default: %(default)s)")
    options = parser.parse_args(arguments)
    print_machine(describe_machine(("embpack", "numpy")), {})
    for blocks in sorted({1, options.dim // math.gcd(options.dim, 32)}):
        share = measure_reading(options.dim, blocks, options.rounds)
        show.output.print(
            f"values of codes, scales a row {blocks}: {share:.1%} of the time of packing them by {DEFAULT_METHOD}"
        )
    piece_rows = max(1, int(options.gb * 2**30 / options.pieces / options.dim))
    shape = options.pieces * piece_rows, options.dim
    with write_pieces(options.pieces, piece_rows, options.dim) as source:
        use = watch_packing(source, options.method, shape, shape[0] * shape[1])
    _print_use(use, options.pieces)


def _print_use(use: MemoryUse, num_pieces: int) -> None:
    show.output.print(
        f"{use.table_bytes / 2**30:.2f} GB of FP8 in {num_pieces} pieces by {use.method}: {use.rows_per_second:,.0f} "
        f"rows/s, at most {use.peak_anonymous_bytes / 2**20:.0f} MB of memory"
    )


if __name__ == "__main__":
    main()

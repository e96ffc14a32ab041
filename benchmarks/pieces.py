"""Lookups of a table in pieces, by those of the same table in one piece."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import embpack
from benchmarks.harness import Contestant, Timing, Workload, describe_machine, race
from embpack.cli import show
from embpack.files import PIECE_ROWS

DIM, NUM_PIECES, BATCH, BAG_SIZE = 16, 128, 4096, 20
TABLE = "user_embedding.weight"


def write_checkpoints(folder: Path, num_pieces: int) -> list[Path]:
    """Pack a table into so many pieces, and into one."""
    weight = np.random.default_rng(0).standard_normal((num_pieces * PIECE_ROWS, DIM), np.float32)
    source, whole, pieces = folder / "source.safetensors", folder / "whole.safetensors", folder / "pieces"
    save_file({TABLE: weight}, source)
    embpack.quantize_file(source, whole, method="asym")
    # Nothing but the least piece has so few bytes.
    embpack.quantize_file(source, pieces, method="asym", max_shard_size=1)
    return [pieces, whole]


def find_difference(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> str | None:
    """Say that answers differ, if they do."""
    return None if ours.tobytes() == theirs.tobytes() else "other bits"


def main(arguments: Sequence[str] | None = None) -> None:
    """Race both, gathering and pooling, and print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__)
    parser.add_argument("--pieces", type=int, default=NUM_PIECES, metavar="N", help=f"(default: {NUM_PIECES})")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of both in turns (default: 15)")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    show.output.print(f"{machine['cpu']}, {machine['isa']}")
    with TemporaryDirectory() as name:
        paths = write_checkpoints(Path(name), options.pieces)
        tables = [embpack.load(path)[TABLE] for path in paths]
        indices = np.random.default_rng(1).integers(0, len(tables[0]), BATCH * BAG_SIZE)
        offsets = np.arange(0, len(indices), BAG_SIZE)
        for what, calls in (
            ("gather", [partial(table.gather, indices) for table in tables]),
            ("bags of 20", [partial(table.embedding_bag, indices, offsets) for table in tables]),
        ):
            ours, other = (
                Contestant(name, call, len(indices), lambda: embpack.set_num_threads(1))
                for name, call in zip(("pieces", "whole"), calls, strict=True)
            )
            workload = Workload({"what": what}, ours, [other], find_difference)
            ratio = race(workload, Timing(options.rounds, 0.1))[1].ratio
            assert ratio is not None  # of the other one
            show.output.print(
                f"{what}: {options.pieces} pieces by one, {len(tables[0]):,} x {DIM}, {tables[0].nbytes:,} bytes: "
                f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            )


if __name__ == "__main__":
    main()

"""How long packing a checkpoint will take: a few rows are packed, and their time is multiplied."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embpack.chunks import SPANS_OF_A_FILE, span_rows
from embpack.convert import count_file_bytes
from embpack.formats import Checkpoint, SourceTensor
from embpack.formats.base import as_bytes
from embpack.packing import iter_packed
from embpack.rules import Decision
from embpack.shard_writer import TableWriter

# For how long each way to pack is timed, and all of them together, at least.
_SECONDS, _MOST_SECONDS = 0.2, 2.0
# Of a tensor that is copied.
_COPIED_BYTES = 1 << 26


@dataclass(frozen=True)
class Expectation:
    """What packing a checkpoint will come to.

    Attributes:
        file_bytes: of the files with tensors, to the byte.
        seconds: as estimate_seconds returns them.
    """

    file_bytes: int
    seconds: float | None


def expect(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    dst: Path | None,
    max_shard_size: int | str | None,
    *,
    from_bytes: int = 0,
) -> Expectation:
    """Say what packing a checkpoint will come to; from so many bytes of source on also how long it takes.

    Args:
        checkpoint: which is open.
        decisions: on all of its tensors.
        dst: as count_file_bytes takes it.
        max_shard_size: as quantize_file takes it.
        from_bytes: bytes of tensors.
    """
    is_timed = sum(each.tensor.nbytes for each in decisions) >= from_bytes
    file_bytes = count_file_bytes(checkpoint, decisions, dst, max_shard_size)
    return Expectation(file_bytes, estimate_seconds(decisions) if is_timed else None)


def estimate_seconds(decisions: Sequence[Decision]) -> float | None:
    """Estimate how long pack_checkpoint reads, packs and hashes; what a slow disk adds to that is not known.

    Tables of one width that are packed in one way take as long, by row, as the first rows of the largest of them: these
    are packed by as many threads as all rows will be.

    Args:
        decisions: on all tensors of a checkpoint, which is open.

    Returns:
        Seconds; None if rows that are looked at cannot be packed.
    """
    ways: dict[tuple[object, ...], list[Decision]] = {}
    for each in decisions:
        if each.variant:
            ways.setdefault((each.variant, each.tensor.shape[1], each.tensor.stored_as, each.dtype), []).append(each)
    seconds = 0.0
    try:
        for own in ways.values():
            largest = max(own, key=lambda each: each.tensor.shape[0])
            rows = sum(each.tensor.shape[0] for each in own)
            seconds += rows * _time_row(largest, min(_SECONDS, _MOST_SECONDS / len(ways)))
    except ValueError:
        return None
    return seconds + _time_copies([each.tensor for each in decisions if each.variant is None])


def _time_row(decision: Decision, seconds: float) -> float:
    """Measure the seconds that a row of a table takes."""
    table, num_embeddings = TableWriter(decision), decision.tensor.shape[0]
    step = span_rows(decision.tensor.shape[1])
    rows = 0
    while True:
        rows = min(max(step, 2 * rows), SPANS_OF_A_FILE * step, num_embeddings)
        taken = _time_rows(table, rows)
        if taken >= seconds or rows in (SPANS_OF_A_FILE * step, num_embeddings):
            return taken / rows


def _time_rows(table: TableWriter, count: int) -> float:
    """Measure the seconds that the first rows of a table take, without what takes as long for any number of rows."""
    passes = 0.0

    def read() -> Iterator[NDArray[Any]]:
        nonlocal passes
        started = time.perf_counter()
        yield from table.read(0, count)
        passes += time.perf_counter() - started

    packer = table.method.fit(read, count, table.row_format, table.decision.place)
    started, digest = time.perf_counter(), hashlib.sha256()
    for packed, _ in iter_packed(packer, table.read(0, count)):
        digest.update(packed.data)
    return passes + time.perf_counter() - started


def _time_copies(tensors: Sequence[SourceTensor]) -> float:
    """Estimate the seconds in which tensors are read and hashed."""
    total = sum(tensor.nbytes for tensor in tensors)
    if not total:
        return 0.0
    started, digest, done = time.perf_counter(), hashlib.sha256(), 0
    for piece in max(tensors, key=lambda tensor: tensor.nbytes).pieces():
        digest.update(as_bytes(piece))
        done += piece.nbytes
        if done >= _COPIED_BYTES:
            break
    return total * (time.perf_counter() - started) / done

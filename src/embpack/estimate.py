"""How long packing a checkpoint will take: a few rows are packed, and their time is multiplied."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import chunk_rows, span_rows
from embpack.convert import count_file_bytes
from embpack.formats import Checkpoint, SourceTensor
from embpack.formats.base import as_bytes
from embpack.methods import Packer
from embpack.rules import Decision
from embpack.shard_writer import TableWriter
from embpack.threads import get_num_threads

# For how long rows are packed at least, if there are so many, and from when on the first ones are enough.
_SECONDS, _MOST_SECONDS = 0.2, 1.0
# Of a tensor that is copied.
_COPIED_BYTES = 1 << 26

_Value = TypeVar("_Value")


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
    workers: int | None = None,
) -> Expectation:
    """Say what packing a checkpoint will come to; from so many bytes of source on also how long it takes.

    Args:
        checkpoint: which is open.
        decisions: on all of its tensors.
        dst: as count_file_bytes takes it.
        max_shard_size: as quantize_file takes it.
        from_bytes: bytes of tensors.
        workers: so many pack, in a thread each; None are the threads of this process.
    """
    is_timed = sum(each.tensor.nbytes for each in decisions) >= from_bytes
    file_bytes = count_file_bytes(checkpoint, decisions, dst, max_shard_size)
    seconds = estimate_seconds(decisions) if is_timed else None
    if seconds is not None and workers is not None:
        seconds *= get_num_threads() / workers
    return Expectation(file_bytes, seconds)


def estimate_seconds(decisions: Sequence[Decision]) -> float | None:
    """Estimate how long pack_checkpoint reads and packs; what a slow disk adds to that is not known.

    Of tables of one width that are packed in one way, the first rows of the largest are packed, by as many threads as
    all rows will be.

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
            timing = _time_table(max(own, key=lambda each: each.tensor.shape[0]))
            seconds += sum(timing.estimate(each) for each in own)
    except ValueError:
        return None
    return seconds + _time_copies([each.tensor for each in decisions if each.variant is None and not each.is_left_out])


@dataclass(frozen=True)
class _Timing:
    """How long some rows of a table take.

    Attributes:
        by_learned_row: seconds that each row takes of those that the method learns from.
        by_row: seconds that each row takes.
    """

    by_learned_row: float
    by_row: float

    def estimate(self, decision: Decision) -> float:
        table, rows = TableWriter(decision), decision.tensor.shape[0]
        return self.by_learned_row * table.method.sample_rows(rows, table.row_format) + self.by_row * rows


def _time_table(decision: Decision) -> _Timing:
    """Fit a table to its first chunk, and pack some rows of that."""
    table, num_embeddings = TableWriter(decision), decision.tensor.shape[0]
    count = min(chunk_rows(decision.tensor.shape[1]), num_embeddings)
    [rows] = (chunk.copy() for chunk in table.read(0, count))
    start = min(count, num_embeddings - count)
    reading, _ = _time(lambda: list(table.read(start, start + count)))
    passes = 0.0

    def read() -> Iterator[NDArray[Any]]:
        nonlocal passes
        started = time.perf_counter()
        yield rows
        passes += reading + time.perf_counter() - started

    method = table.method.for_part(num_embeddings, table.row_format)
    fitting, packer = _time(lambda: method.fit(read, count, table.row_format, decision.place))
    learned = max(1, method.sample_rows(count, table.row_format))
    return _Timing(max(0.0, fitting - passes) / learned, (passes + reading) / count + _time_row(packer, rows))


def _time_row(packer: Packer, rows: NDArray[Any]) -> float:
    """Measure the seconds in which a row is packed: those of the first rows, or the mean of those after them."""
    step = span_rows(rows.shape[1])
    packed = np.empty((min(step, len(rows)), packer.row_format.row_bytes), np.uint8)
    seconds, done = 0.0, 0
    for start in range(0, len(rows), step):
        own = rows[start : start + step]
        taken, _ = _time(partial(packer.pack, own, packed[: len(own)], start))
        if start == step:  # the call before, the first one, has started threads
            seconds, done = 0.0, 0
        seconds, done = seconds + taken, done + len(own)
        if (start and seconds >= _SECONDS) or taken >= _MOST_SECONDS:
            break
    return seconds / done


def _time(call: Callable[[], _Value]) -> tuple[float, _Value]:
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def _time_copies(tensors: Sequence[SourceTensor]) -> float:
    """Estimate the seconds in which tensors are read and hashed."""
    total = sum(tensor.nbytes for tensor in tensors)
    if not total:
        return 0.0
    started, digest, done = time.perf_counter(), hashlib.sha256(), 0
    for portion in max(tensors, key=lambda tensor: tensor.nbytes).portions():
        digest.update(as_bytes(portion))
        done += portion.nbytes
        if done >= _COPIED_BYTES:
            break
    return total * (time.perf_counter() - started) / done

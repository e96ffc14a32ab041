"""Bytes spread over tables: one way to pack each, for the least sum of errors or the fewest bytes."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Sums of choices that are kept after each table. Models of few tables never have more; others lose next to nothing.
MOST_SUMS = 1 << 14


def choose(
    options: Sequence[tuple[Sequence[int], Sequence[float]]],
    max_bytes: int | None,
    max_error: float | None,
    most_sums: int = MOST_SUMS,
) -> list[int] | None:
    """Choose one option of each table: the least sum of errors within max_bytes, or of bytes within max_error.

    Sums of one option of each of the first tables, without those that another beats, are extended table by table.

    Args:
        options: of each table, bytes and errors of its options.
        max_bytes: the largest sum of bytes; None if max_error is given.
        max_error: the largest sum of errors; None if max_bytes is given.
        most_sums: that are kept after each table, evenly spread.

    Returns:
        The number of each table's option; None if the limit cannot be kept.
    """
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for own_sizes, own_errors in options:
        all_sizes = np.add.outer(sizes, np.asarray(own_sizes, np.int64)).reshape(-1)
        all_errors = np.add.outer(errors, np.asarray(own_errors, float)).reshape(-1)
        order = np.lexsort((all_errors, all_sizes))
        best = np.minimum.accumulate(all_errors[order])
        kept = order[np.append(True, all_errors[order][1:] < best[:-1])]
        if len(kept) > most_sums:
            kept = kept[np.linspace(0, len(kept) - 1, most_sums).round().astype(np.int64)]
        sizes, errors = all_sizes[kept], all_errors[kept]
        steps.append((kept // len(own_sizes), kept % len(own_sizes)))
    # By rising bytes, and falling errors.
    most_bytes, most_error = (math.inf if limit is None else limit for limit in (max_bytes, max_error))
    fits = np.flatnonzero((sizes <= most_bytes) & (errors <= most_error))
    if not len(fits):
        return None
    at = int(fits[-1] if max_bytes is not None else fits[0])
    chosen = []
    for before, option in reversed(steps):
        chosen.append(int(option[at]))
        at = int(before[at])
    return chosen[::-1]

"""Which row of all deltas is the last one that was written for each row of a table."""

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_LEAST_WAITING = 1 << 20


class LastWrites:
    """Remembers for each id of a table which write is the last: that of the largest step, of those the one added last.

    It takes 24 bytes for an id, some times that while it sorts them, however often ids are written.

    Attributes:
        num_added: writes so far.
    """

    def __init__(self) -> None:
        self.num_added = 0
        self._sorted = np.empty((3, 0), np.int64)  # ids, steps and rows, by ids
        self._waiting: list[Integers] = []
        self._num_waiting = 0

    def add(self, ids: Integers, steps: Integers, rows: Integers) -> None:
        """Add writes, int64 [n] each: rows of the table, steps, and the numbers of rows of all deltas, ascending."""
        self._waiting.append(np.stack([ids, steps, rows]))
        self._num_waiting += len(ids)
        self.num_added += len(ids)
        # So that each is sorted a few times only, however many there are.
        if self._num_waiting >= max(_LEAST_WAITING, self._sorted.shape[1]):
            self._sort()

    def finish(self) -> tuple[Integers, Integers]:
        """Return the rows of all deltas that are last writes, ascending, and the ids that they are for."""
        self._sort()
        ids, _, rows = self._sorted
        order = np.argsort(rows)
        return rows[order], ids[order]

    def _sort(self) -> None:
        ids, steps, rows = writes = np.concatenate([self._sorted, *self._waiting], axis=1)
        order = np.lexsort((rows, steps, ids))
        is_last = np.append(ids[order][1:] != ids[order][:-1], np.ones(len(ids[:1]), bool))
        self._sorted, self._waiting, self._num_waiting = writes[:, order[is_last]], [], 0

"""Rounds of choosing and measuring: what may be chosen is measured on more rows, and then it is chosen again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embpack.comparison.front import ABOUT
from embpack.layouts import RowFormat
from embpack.planning.candidates import LEVELS, Candidate, Candidates
from embpack.planning.spread import MOST_SUMS, choose

# Larger losses mean no limit, and their squares might overflow.
_MOST_LOSS = 1e9
# Sums of choices that are kept while most is estimated.
_FEW_SUMS = 1 << 10


@dataclass(frozen=True)
class Choice:
    """What was chosen for a table, among the ways that no other beats, by rising bytes."""

    front: Sequence[Candidate]
    at: int

    @property
    def candidate(self) -> Candidate:
        """The way that was chosen."""
        return self.front[self.at]

    @property
    def better(self) -> Candidate | None:
        """The next way, which takes more bytes and loses less; None if there is none."""
        return self.front[self.at + 1] if self.at + 1 < len(self.front) else None


@dataclass(frozen=True)
class Rounds:
    """Chooses a way to pack for each table.

    Attributes:
        tables: measured on the first level.
        max_bytes: of the sum of their file_bytes; None for no limit.
        max_loss: normalized l2 loss of all tables; None for no limit.
    """

    tables: Sequence[Candidates]
    max_bytes: int | None
    max_loss: float | None

    @property
    def square(self) -> float:
        """Sum of the squares of all values, as often as their rows count."""
        return math.fsum(table.weight * table.square_norm for table in self.tables)

    def sum_errors(self, choices: Sequence[Choice]) -> float:
        """Sum the squared errors, as often as rows count."""
        return math.fsum(table.error(choice.candidate) for table, choice in zip(self.tables, choices, strict=True))

    def measure_loss(self, choices: Sequence[Choice]) -> float:
        """Normalized l2 loss of all tables."""
        return math.sqrt(self.sum_errors(choices) / self.square) if self.square else 0.0

    def settle(self) -> tuple[list[Choice], bool]:
        """Choose and measure in turns, until what is chosen, and what may be instead, is measured well enough.

        Returns:
            The choices, and whether they keep the limit; if none do, those with the fewest bytes or the least error.
        """
        for most_sums in (_FEW_SUMS, MOST_SUMS):
            chosen = self._choose(most_sums)
            # A list, for all tables are measured in each round.
            while any([_measure_more(*each) for each in zip(self.tables, chosen[0], strict=True)]):
                chosen = self._choose(most_sums)
        return chosen

    def _choose(self, most_sums: int) -> tuple[list[Choice], bool]:
        fronts = [table.find_front() for table in self.tables]
        if self.max_bytes is None and self.max_loss is None:
            return [
                Choice(front, _choose_alone(table, front)) for table, front in zip(self.tables, fronts, strict=True)
            ], True
        options = [
            ([each.file_bytes for each in front], [table.error(each) for each in front])
            for table, front in zip(self.tables, fronts, strict=True)
        ]
        most_loss = None if self.max_loss is None else min(self.max_loss, _MOST_LOSS)
        most_error = None if most_loss is None else most_loss * most_loss * self.square
        best = choose(options, self.max_bytes, most_error, most_sums)
        if best is not None:
            return [Choice(front, i) for front, i in zip(fronts, best, strict=True)], True
        return [Choice(front, 0 if self.max_loss is None else len(front) - 1) for front in fronts], False


def _choose_alone(table: Candidates, front: Sequence[Candidate]) -> int:
    """The least loss in about the bytes of uniform rows at 4 bits; the fewest bytes if nothing is that small."""
    most = ABOUT * RowFormat(table.embedding_dim).row_bytes * table.num_embeddings
    return max((i for i, each in enumerate(front) if each.num_bytes <= most), default=0)


def _measure_more(table: Candidates, choice: Choice) -> bool:
    """Measure the choice on its next level, and what may be chosen instead on the second; whether anything was left."""
    chosen = choice.candidate
    near = [*choice.front[max(choice.at - 1, 0) : choice.at + 2], *table.find_rivals(chosen)]
    wanted = {each.variant: (each, 1) for each in near}
    wanted[chosen.variant] = chosen, min(chosen.level + 1, len(LEVELS) - 1)
    lacking = [(each, level) for each, level in wanted.values() if each.level < level]
    for each, level in lacking:
        table.measure(each, level)
    return bool(lacking)

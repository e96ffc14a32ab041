"""The ways to pack one table, measured on as few of its rows as will do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from embpack.comparison.array import Sample, name_place
from embpack.comparison.checkpoint import read_sample
from embpack.comparison.front import find_front
from embpack.packing import pack
from embpack.planning.budget import Budget
from embpack.rows import spread_rows
from embpack.rules import Decision, explain_growth
from embpack.variant import Variant

# Rows that a table's squares are summed over, evenly spread.
SAMPLE_ROWS = 20_000
# Values that a way is measured on, roughly, level by level: all ways on the first, what may be chosen on the second,
# what is chosen on the last. And the fewest rows: of wide ones there would be too few to find what columns share.
LEVELS = (1 << 13, 1 << 16, 1 << 19)
FEWEST_ROWS = (64, 256, 1024)
# A way that takes no more bytes may lose less than it seems to by so much, as long as it is measured on few rows.
_DOUBT = 1.05


def count_rows(num_embeddings: int, embedding_dim: int, level: int) -> int:
    """Count the rows that a table is measured on."""
    return min(num_embeddings, SAMPLE_ROWS, max(FEWEST_ROWS[level], LEVELS[level] // embedding_dim))


@dataclass(frozen=True)
class Candidate:
    """One way to pack a table.

    Attributes:
        num_bytes: of the packed table.
        file_bytes: what it adds to the file, descriptions included.
        bytes_per_row: num_bytes by the table's rows.
        is_smaller: whether num_bytes are fewer than those of the weights.
        losses: normalized l2 loss on each level that it was measured on.
        loss: that on the last level, an estimate until it is measured there.
    """

    variant: Variant
    num_bytes: int
    file_bytes: int
    bytes_per_row: float
    is_smaller: bool
    losses: tuple[float, ...] = ()
    loss: float = math.nan

    @classmethod
    def make(cls, decision: Decision, variant: Variant, budget: Budget) -> "Candidate":
        """Make one that is not measured.

        Raises:
            TypeError, ValueError: there are no such rows.
        """
        rows, dim = decision.tensor.shape
        variant = replace(variant, method=variant.spec, param_dtype=variant.make_row_format(dim).param_dtype)
        num_bytes = variant.count_bytes(rows, dim)
        file_bytes = budget.count_table(replace(decision, variant=variant))
        is_smaller = explain_growth(decision.bytes_before, variant, rows, dim) is None
        return cls(variant, num_bytes, file_bytes, num_bytes / rows, is_smaller)

    @property
    def level(self) -> int:
        """The last that it was measured on; -1 if on none."""
        return len(self.losses) - 1

    def estimate(self, growth: Sequence[float]) -> "Candidate":
        """Estimate the loss on the last level, given by what factor losses grow to each level but the first."""
        return replace(self, loss=self.losses[-1] * math.prod(growth[self.level :]))


@dataclass(eq=False)
class Candidates:
    """The ways to pack one table, at least one of them measured on the first level.

    Attributes:
        decision: on a tensor that is a table.
        weight: how often a row's error counts.
        sample: the rows of the last level.
        square_norm: sum of the squares of all values of the table, estimated.
        progress: called with the table's name and how many rows were packed.
        ways: those that were measured, by what they are.
    """

    decision: Decision
    weight: float
    sample: Sample
    square_norm: float
    progress: Callable[[str, int], None]
    ways: dict[Variant, Candidate] = field(default_factory=dict)

    @classmethod
    def read(cls, decision: Decision, weight: float, progress: Callable[[str, int], None]) -> "Candidates":
        """Read a sample of a table.

        Raises:
            FormatError: the source is damaged.
            ValueError: a value that was looked at is NaN or infinite.
        """
        rows, dim = decision.tensor.shape
        sample = read_sample(decision, SAMPLE_ROWS)
        values = sample.rows
        square = float(np.einsum("ij,ij->", values, values, dtype=np.float64))
        few = _thin(sample, count_rows(rows, dim, len(LEVELS) - 1))
        return cls(decision, weight, few, square * rows / len(values), progress)

    @property
    def name(self) -> str:
        """Of the table."""
        return self.decision.tensor.name

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.decision.tensor.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Values of a row."""
        return self.decision.tensor.shape[1]

    def start(self, variants: Sequence[Variant], budget: Budget) -> None:
        """Measure the ways on the first level.

        Those are left out that cannot pack the table's rows, and those that take no fewer bytes than its weights; if
        all others do, the smallest is measured.

        Raises:
            ValueError: none can.
        """
        made, refusals = [], []
        for variant in variants:
            try:
                made.append(Candidate.make(self.decision, variant, budget))
            except ValueError as error:
                refusals.append(f"{variant}: {error}")
        made.sort(key=lambda each: (not each.is_smaller, each.num_bytes))
        for each in made:
            if each.is_smaller or not self.ways:
                try:
                    self.measure(each, 0)
                except ValueError as error:
                    refusals.append(f"{each.variant}: {error}")
        if not self.ways:
            raise ValueError(f"{self.decision.place}: nothing asked for can be done; {refusals[0]}")

    def measure(self, candidate: Candidate, level: int) -> None:
        """Measure a way on a level and those before it; one that cannot pack these rows is left out from then on.

        Raises:
            ValueError: it cannot, and no other is left.
        """
        self.ways.pop(candidate.variant, None)
        losses = candidate.losses
        for finer in range(len(losses), level + 1):
            is_new = not finer or self._rows(finer) > self._rows(finer - 1)
            try:
                losses += (self._pack(candidate.variant, finer) if is_new else losses[-1],)
            except ValueError:
                if self.ways:
                    return
                raise
        self.ways[candidate.variant] = replace(candidate, losses=losses)

    def _pack(self, variant: Variant, level: int) -> float:
        few = _thin(self.sample, self._rows(level))
        try:
            table, _ = pack(few.rows, variant)
        except ValueError as error:
            raise ValueError(name_place(str(error), few)) from None
        finally:
            self.progress(self.name, len(few.rows))
        assert table.loss is not None  # packing measures it
        return table.loss

    def error(self, candidate: Candidate) -> float:
        """Squared error of the table in one of the ways, as often as its rows count."""
        return self.weight * candidate.loss**2 * self.square_norm

    def _rows(self, level: int) -> int:
        return count_rows(self.num_embeddings, self.embedding_dim, level)

    def find_front(self) -> list[Candidate]:
        """Find the ways that no other beats, by rising bytes; just the smallest if none is smaller than the weights."""
        every = self._estimate_all()
        return find_front(every) or [min(every, key=lambda each: each.num_bytes)]

    def find_rivals(self, chosen: Candidate) -> list[Candidate]:
        """Find the ways that may be better than one that seems to be, which few rows cannot tell."""
        every = self._estimate_all()
        return [each for each in every if each.num_bytes <= chosen.num_bytes and each.loss < _DOUBT * chosen.loss]

    def _estimate_all(self) -> list[Candidate]:
        """Estimate all losses: few rows are easier to fit than many, by a factor that ways have in common."""
        growth = []
        for level in range(1, len(LEVELS)):
            both = [own.losses for own in self.ways.values() if own.level >= level and own.losses[level - 1]]
            changes = [math.log(own[level] / own[level - 1]) for own in both if own[level]]
            growth.append(math.exp(sum(changes) / len(changes)) if changes else 1.0)
        return [own.estimate(growth) for own in self.ways.values()]


def _thin(sample: Sample, count: int) -> Sample:
    """Leave some rows of a sample, evenly spread."""
    if count >= len(sample.rows):
        return sample
    kept = spread_rows(len(sample.rows), count)
    return replace(sample, rows=sample.rows[kept], numbers=sample.numbers[kept])

"""The ways to pack one table, measured on as few of its rows as will do."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from embpack.arithmetic import exp2, interpolate, log2, sum_along, sum_squares
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
LEVELS = (1 << 13, 1 << 15, 1 << 19)
FEWEST_ROWS = (64, 256, 1024)
# Of ways that differ in bits alone, if they are more than so many, every so many are measured on the first level.
_STRIDE = 3
# Losses are not taken for smaller between two that were measured.
_LEAST_LOSS = 1e-30
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


@dataclass(eq=False)
class Candidates:
    """The ways to pack one table.

    Attributes:
        decision: on a tensor that is a table.
        weight: how often a row's error counts.
        progress: called with the table's name and how many rows were packed.
        ways: those that there are, by what they are and by rising bytes, without those that cannot pack the rows.
        refusals: why there are no others.
        sample: the rows of the last level; there once it is read.
        square_norm: sum of the squares of all values of the table, estimated by more rows.
    """

    decision: Decision
    weight: float
    progress: Callable[[str, int], None]
    ways: dict[Variant, Candidate]
    refusals: list[str] = field(default_factory=list)
    sample: Sample | None = None
    square_norm: float = math.nan

    @classmethod
    def make(
        cls,
        decision: Decision,
        weight: float,
        variants: Sequence[Variant],
        budget: Budget,
        progress: Callable[[str, int], None],
    ) -> "Candidates":
        """List the ways that take fewer bytes than the weights, or if there are none the smallest, and read nothing.

        Raises:
            ValueError: there is no way.
        """
        made, refusals = [], []
        for variant in variants:
            try:
                made.append(Candidate.make(decision, variant, budget))
            except ValueError as error:
                refusals.append(f"{variant}: {error}")
        made.sort(key=lambda each: (not each.is_smaller, each.num_bytes))
        kept = [each for each in made if each.is_smaller] or made[:1]
        if not kept:
            raise _explain_none(decision, refusals)
        return cls(decision, weight, progress, {each.variant: each for each in kept}, refusals)

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

    @property
    def least_file_bytes(self) -> int:
        """The fewest bytes that it can add to a file."""
        return next(iter(self.ways.values())).file_bytes

    def start(self) -> None:
        """Read a sample, and measure ways on the first level: so many that the losses of all others lie between.

        Raises:
            FormatError: the source is damaged.
            ValueError: a value that was looked at is NaN or infinite; or no way can pack the rows.
        """
        sample = read_sample(self.decision, SAMPLE_ROWS)
        self.square_norm = sum_squares(sample.rows) * self.num_embeddings / len(sample.rows)
        self.sample = _thin(sample, self._rows(len(LEVELS) - 1))
        for own in _group(self.ways):
            few = pick_first(own)
            for each in few:
                self.measure(self.ways[each], 0)
            is_refused = any(each not in self.ways for each in few)
            for each in own if is_refused else ():
                if each not in few:
                    self.measure(self.ways[each], 0)

    def measure(self, candidate: Candidate, level: int) -> None:
        """Measure a way on a level and those before it; one that cannot pack these rows is left out from then on.

        Raises:
            ValueError: it was the last one.
        """
        losses = candidate.losses
        for finer in range(len(losses), level + 1):
            is_new = not finer or self._rows(finer) > self._rows(finer - 1)
            try:
                losses += (self._pack(candidate.variant, finer) if is_new else losses[-1],)
            except ValueError as error:
                self.refusals.append(f"{candidate.variant}: {error}")
                self.ways.pop(candidate.variant, None)
                if not self.ways:
                    raise _explain_none(self.decision, self.refusals) from None
                return
        self.ways[candidate.variant] = replace(candidate, losses=losses)

    def _pack(self, variant: Variant, level: int) -> float:
        assert self.sample is not None  # it has started
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
        return self.weight * candidate.loss * candidate.loss * self.square_norm

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
        """Estimate all losses on the last level.

        Few rows are easier to fit than many, by a factor that ways have in common. What was not measured lies between
        those with fewer and with more bits: from one to the next, losses fall by about the same factor for each bit.
        """
        growth = self._find_growth()
        every = []
        for own in _group(self.ways):
            ways = [self.ways[each] for each in own]
            known = {
                each.variant.bits: each.losses[-1] * math.prod(growth[each.level :]) for each in ways if each.losses
            }
            if len(known) < len(ways):
                bits = [each.variant.bits for each in ways]
                logs = log2([max(loss, _LEAST_LOSS) for loss in known.values()])
                between = exp2(interpolate(bits, np.array(list(known), float), logs))
                known = dict(zip(bits, between.tolist(), strict=True)) | known
            every += [replace(each, loss=known[each.variant.bits]) for each in ways]
        return every

    def _find_growth(self) -> list[float]:
        """Find by what factor losses grow to each level but the first."""
        growth = []
        for level in range(1, len(LEVELS)):
            both = [own.losses for own in self.ways.values() if own.level >= level and own.losses[level - 1]]
            changes = [own[level] / own[level - 1] for own in both if own[level]]
            growth.append(float(exp2(sum_along(log2(changes)) / len(changes))) if changes else 1.0)
        return growth


def _group(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Group ways that differ in bits alone, by rising bits."""
    groups: dict[Variant, list[Variant]] = {}
    for each in variants:
        groups.setdefault(replace(each, bits=0), []).append(each)
    return [sorted(own, key=lambda each: each.bits) for own in groups.values()]


def pick_first(variants: Iterable[Variant]) -> list[Variant]:
    """Pick the ways that are measured on the first level, so that all others lie between two of them."""
    few: list[Variant] = []
    for own in _group(variants):
        few += own if len(own) <= _STRIDE else dict.fromkeys([*own[::_STRIDE], own[-1]])
    return few


def _explain_none(decision: Decision, refusals: Sequence[str]) -> ValueError:
    return ValueError(f"{decision.place}: nothing asked for can be done; {refusals[0]}")


def _thin(sample: Sample, count: int) -> Sample:
    """Leave some rows of a sample, evenly spread."""
    if count >= len(sample.rows):
        return sample
    kept = spread_rows(len(sample.rows), count)
    return replace(sample, rows=sample.rows[kept], numbers=sample.numbers[kept])

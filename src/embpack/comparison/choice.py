"""Which of the ways that were measured to take, and why: by who must read the rows, and what counts most."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from embpack.comparison.array import Comparison
from embpack.comparison.front import ABOUT, find_front
from embpack.layouts import RowFormat
from embpack.methods import DEFAULT_METHOD
from embpack.readers import READER_TITLES, check_reader
from embpack.variant import Variant

# What may count most, and what of it is recommended; see recommend.
PREFERENCES = ("loss", "size", "speed")
# Lookups within a tenth of the fastest count as fast: so far apart are measurements of the same.
_ABOUT_AS_FAST = 0.9
# What quantize does if nobody says how, and what most others do.
_DEFAULT_BYTES = "about the bytes of uniform rows of 4 bits"
_DEFAULT, _PEER = (Variant(method, 4, "float16") for method in (DEFAULT_METHOD, "asym"))


@dataclass(frozen=True)
class Recommendation:
    """A way to pack, and why it is recommended.

    Attributes:
        result: one of those that were measured.
        reason: for the user to read, with figures against what quantize does by default.
    """

    result: Comparison
    reason: str


def recommend(
    results: Sequence[Comparison],
    readers: Sequence[str] = (),
    prefer: str = "loss",
    *,
    default_bytes: float | None = None,
) -> Recommendation | None:
    """Recommend one of the ways that compare has measured on a table.

    Args:
        results: of compare.
        readers: who must be able to read the rows as they are, beside embpack: names in embpack.readers.READERS.
        prefer: what counts most. "loss": the least loss in about the bytes of quantize's default, uniform rows of 4
            bits. "size": the fewest bytes with no more loss than that default has. "speed": the fastest lookups in
            about those bytes with about that loss at most. If nothing that was measured is so, what comes nearest.
        default_bytes: bytes a row of quantize's default; None works them out from the results of one table.

    Returns:
        None if nothing is smaller than the weights and read by all readers.

    Raises:
        ValueError: there is no such reader or preference.
    """
    for reader in readers:
        check_reader(reader)
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer is {prefer!r}; choose one of {', '.join(PREFERENCES)}")
    fitting = [result for result in keep_readable(results, readers) if result.is_smaller]
    if not fitting:
        return None
    question = _Question(results, fitting, tuple(readers), default_bytes or _count_default_bytes(fitting[0]))
    choose = {"loss": question.choose_loss, "size": question.choose_size, "speed": question.choose_speed}[prefer]
    result, rule = choose()
    return Recommendation(result, question.explain(result, rule))


def keep_readable(results: Sequence[Comparison], readers: Sequence[str]) -> list[Comparison]:
    """Leave out what one of the readers cannot read."""
    return [result for result in results if set(readers) <= set(result.readers)]


def _count_default_bytes(result: Comparison) -> float:
    return RowFormat(round(result.bytes_per_row / result.share_of_float32 / 4)).row_bytes


@dataclass(frozen=True)
class _Question:
    """What there is to choose from; each choice is a result and what it is."""

    results: Sequence[Comparison]
    fitting: Sequence[Comparison]
    readers: tuple[str, ...]
    default_bytes: float

    @property
    def baseline(self) -> Comparison | None:
        """What others are held against: quantize's default, or the least loss of other uniform rows of 4 bits."""
        default = self.find(_DEFAULT)
        alike = [result for result in self.results if _row_format(result) == ("uniform", 4, "float16", None)]
        return default or min(alike, key=lambda result: result.loss, default=None)

    def find(self, variant: Variant) -> Comparison | None:
        return next((result for result in self.results if result.variant == variant), None)

    def choose_loss(self) -> tuple[Comparison, str]:
        front = find_front(self.fitting)
        within = [result for result in front if self.is_small(result)]
        if not within:
            return front[0], "is the smallest of those that were measured"
        result = within[-1]
        rule = f"has the least loss in {_DEFAULT_BYTES}"
        least = min(other.loss for other in self.fitting if self.is_small(other))
        return result, rule if result.loss <= least else f"{rule}, but for rotated rows that save less than 1 %"

    def choose_size(self) -> tuple[Comparison, str]:
        limit = self.baseline or self.choose_loss()[0]
        front = find_front(self.fitting)
        good = [result for result in front if result.loss <= limit.loss]
        if not good:
            return front[-1], "has the least loss of those that were measured"
        if good[0] == limit:
            return limit, "takes the fewest bytes: nothing smaller loses as little"
        return good[0], f"takes the fewest bytes with no more loss than {_name(limit)}"

    def choose_speed(self) -> tuple[Comparison, str]:
        limit = self.baseline or self.choose_loss()[0]
        good = [each for each in self.fitting if self.is_small(each) and each.loss <= ABOUT * limit.loss]
        if not good:
            return self.choose_loss()
        # Rows of one format are looked up alike, whatever method has packed them.
        speeds: dict[tuple[object, ...], list[float]] = {}
        for result in good:
            speeds.setdefault(_row_format(result), []).append(result.lookups_per_second)
        speed = {row_format: statistics.median(measured) for row_format, measured in speeds.items()}
        fast = [result for result in good if speed[_row_format(result)] >= _ABOUT_AS_FAST * max(speed.values())]
        result = min(fast, key=lambda result: (result.loss, result.bytes_per_row))
        rule = f"has the fastest lookups in {_DEFAULT_BYTES}"
        return result, rule if result == limit else f"{rule}, with about the loss of {_name(limit)}"

    def is_small(self, result: Comparison) -> bool:
        return result.bytes_per_row <= ABOUT * self.default_bytes

    def explain(self, result: Comparison, rule: str) -> str:
        """Say what a result is, what it costs against others, and who reads it."""
        among = f" that {_join([READER_TITLES[reader] for reader in self.readers])} can read" if self.readers else ""
        said = f"Of the ways{among}, {_name(result)} {rule}." if among else f"{_name(result)} {rule}."
        baseline = self.baseline
        other = self.find(_PEER) if baseline is None or result == baseline else baseline
        if other is not None and other != result:
            default = ", quantize's default" if other.variant == _DEFAULT else ""
            said += f" Against {_name(other)}{default}: {_hold_against(result, other)}."
        read = _join([READER_TITLES[reader] for reader in result.readers])
        return f"{said} {read} can read it too." if read else f"{said} Only embpack reads it."


def _row_format(result: Comparison) -> tuple[object, ...]:
    return result.layout, result.bits, result.param_dtype, result.rotate


def _name(result: Comparison) -> str:
    return f"{result.variant.name} at {result.bits} bits"


def _join(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _hold_against(result: Comparison, other: Comparison) -> str:
    loss = _say_share(result.loss, other.loss, ("less loss", "the same loss", "more loss"), 0.001)
    size = _say_share(result.bytes_per_row, other.bytes_per_row, ("fewer bytes", "as many bytes", "more bytes"), 0.01)
    # Rows of one format are looked up alike: what measurements of them differ by is noise.
    lookups = result.lookups_per_second / other.lookups_per_second if _row_format(result) != _row_format(other) else 1.0
    packing = result.rows_per_second / other.rows_per_second
    return ", ".join(
        [
            loss,
            size,
            _say_pace(lookups, "lookups", f"lookups at {lookups:.2g} of the speed"),
            _say_pace(packing, "packing", f"packing takes {_round(1 / packing)} times as long"),
        ]
    )


def _say_share(value: float, other: float, words: tuple[str, str, str], least: float) -> str:
    """Say by how much of another a value is less or more; up to `least` of it is nothing."""
    less, same, more = words
    share = value / other - 1 if other else 0.0
    if abs(share) <= least:
        return same
    return f"{100 * abs(share):.3g} % {less if share < 0 else more}"


def _say_pace(pace: float, what: str, slower: str) -> str:
    if _ABOUT_AS_FAST <= pace <= 1 / _ABOUT_AS_FAST:
        return f"{what} as fast"
    return slower if pace < 1 else f"{what} {_round(pace)} times as fast"


def _round(times: float) -> str:
    return f"{times:,.0f}" if times >= 10 else f"{times:.1f}"

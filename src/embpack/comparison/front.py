"""The results that no other beats, and what they are called."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from embpack.comparison.array import Comparison
from embpack.readers import READERS
from embpack.variant import Variant


class Measured(Protocol):
    """What was measured of a way to pack a table; a Comparison is one."""

    @property
    def variant(self) -> Variant:
        """The way."""

    @property
    def loss(self) -> float:
        """Normalized l2 loss."""

    @property
    def bytes_per_row(self) -> float:
        """Bytes of the packed table by its number of rows."""

    @property
    def is_smaller(self) -> bool:
        """Whether the packed table takes fewer bytes than its weights."""


Result = TypeVar("Result", bound=Measured)

# Sizes within 1 % count as equal, to allow for shared codebooks.
ABOUT = 1.01
# A rotation counts only if the loss without it is at least so many times as large: lookups have to undo it.
_LEAST_GAIN = 1.01


def find_front(results: Sequence[Result]) -> list[Result]:
    """Find the Pareto front: the results that are smaller than the weights and that no other beats.

    A result beats another if it has fewer bytes and no more loss, or less loss and no more bytes; of equal ones the
    first counts. Results of rotated rows are left out unless they lose 1 % less than the same without rotation. The
    front comes by rising bytes, that is, by falling loss.
    """
    plain = {result.variant: result.loss for result in results if result.variant.rotate is None}
    front: list[Result] = []
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        unrotated = plain.get(replace(result.variant, rotate=None), math.inf)
        if result.variant.rotate is not None and unrotated < _LEAST_GAIN * result.loss:
            continue
        if result.is_smaller and (not front or result.loss < front[-1].loss):
            front.append(result)
    return front


def name_variant(result: Comparison, others: Iterable[Comparison]) -> str:
    """Name a result as briefly as tells it apart from the others of the same method and bits."""
    name = result.variant.name
    twins = {other.param_dtype for other in others if (other.variant.name, other.bits) == (name, result.bits)}
    return f"{name}, {result.param_dtype}" if len(twins) > 1 else name


def describe_metric(result: Comparison) -> list[str]:
    """Write the user's own figure, and how it differs from that of the float tables; nothing if there is none."""
    if result.metric is None or result.metric_of_floats is None:
        return []
    return [f"{result.metric:.6g}", f"{result.metric - result.metric_of_floats:+.3g}"]


def list_readers(result: Comparison) -> str:
    """Say in a word or two who else reads the rows."""
    if result.readers == READERS:
        return "all"
    return ", ".join(result.readers) or "embpack"

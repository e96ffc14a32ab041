"""Where the names of points go, so that none lies on another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embpack.comparison.report.svg import CHARACTER_WIDTH

LINE_HEIGHT = 14.0
# From a point to its name; farther off a line leads there.
_NEAR, _FAR = 9.0, 24.0


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two have area in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: "Box") -> bool:
        """Whether the other one lies within."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )

    def distance(self, point: tuple[float, float]) -> float:
        """How far a point lies from it; 0 within."""
        x, y = point
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.top - y, 0, y - self.bottom))


@dataclass(frozen=True)
class Label:
    """A name, its place, and whether a line must lead there from its point."""

    content: str
    box: Box
    is_far: bool

    def find_end(self, point: tuple[float, float]) -> tuple[float, float]:
        """Say where a line from the point to its name ends."""
        box = self.box
        return box.left - 2 if box.left > point[0] else box.right + 2, (box.top + box.bottom) / 2


def place_beside(
    contents: Sequence[str],
    point: tuple[float, float],
    frame: Box,
    taken: Sequence[Box],
    others: Sequence[tuple[float, float]] = (),
) -> Label | None:
    """Place a name right of a point or left of it, a little below the middle or above; None if nothing is free.

    Args:
        contents: the name, and shorter ones for where it finds no room.
        point: (x, y).
        frame: that names must lie in.
        taken: where no name may lie.
        others: points that are named in the same way; nearer to one of them the name would be taken for its own.
    """
    x, y = point
    for below in (11, 24, -11, -24):
        for content in contents:
            for left in (x + _NEAR, x - _NEAR - _measure(content)):
                box = _make_box(content, left, y + below)
                if _is_free(box, frame, taken) and all(box.distance(point) < box.distance(other) for other in others):
                    return Label(content, box, is_far=False)
    return None


def place_column(
    contents: Sequence[str],
    points: Sequence[tuple[float, float]],
    frame: Box,
    taken: Sequence[Box],
    lines: Sequence[Box] = (),
) -> list[Label | None]:
    """Place the names of points that lie about above one another, in the same order and as near as they can be.

    Args:
        contents: the names.
        points: (x, y), y rising.
        frame: that names must lie in.
        taken: where no name may lie.
        lines: where nothing may lead across from a point to its name.

    Returns:
        A label for each name, or None where there is no room for it.
    """
    middles = spread([y for _, y in points], LINE_HEIGHT)
    labels: list[Label | None] = []
    start = 0
    for end in range(1, len(middles) + 1):
        # Names that touch are a stack, which lies on one side as a whole.
        if end == len(middles) or middles[end] - middles[end - 1] > LINE_HEIGHT + 0.1:
            stack = slice(start, end)
            labels += _place_stack(contents[stack], points[stack], middles[stack], frame, taken, lines)
            start = end
    return labels


def _place_stack(
    contents: Sequence[str],
    points: Sequence[tuple[float, float]],
    middles: Sequence[float],
    frame: Box,
    taken: Sequence[Box],
    lines: Sequence[Box],
) -> list[Label | None]:
    """Place a stack of names on the side of their points that has more room."""
    is_far = max(abs(middle - y) for middle, (_, y) in zip(middles, points, strict=True)) > 3
    gap = _FAR if is_far else _NEAR
    sides: list[list[Label | None]] = []
    for is_right in (False, True):
        edge = max(x for x, _ in points) + gap if is_right else min(x for x, _ in points) - gap
        lefts = [edge if is_right else edge - _measure(content) for content in contents]
        boxes = [_make_box(*item) for item in zip(contents, lefts, middles, strict=True)]
        labels = [Label(content, box, is_far) for content, box in zip(contents, boxes, strict=True)]
        sides.append(
            [
                label if _is_free(label.box, frame, taken) and not _crosses(label, point, lines) else None
                for label, point in zip(labels, points, strict=True)
            ]
        )
    return min(sides, key=lambda labels: labels.count(None))


def trace(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """List boxes without area along a line, once it has left the point that it starts at."""
    length = math.dist(start, end)
    steps = [step / length for step in range(math.ceil(_NEAR), math.floor(length) + 1)]
    places = [[a + share * (b - a) for a, b in zip(start, end, strict=True)] for share in steps]
    return [Box(x, y, x, y) for x, y in places]


def _crosses(label: Label, point: tuple[float, float], lines: Sequence[Box]) -> bool:
    """Whether what leads from a point to its name crosses a line."""
    return any(line.holds(box) for box in trace(point, label.find_end(point)) for line in lines)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move values apart until there is a gap between each and the next, by the least squares.

    Args:
        wanted: values, rising.
        gap: the least distance.

    Source: pool adjacent violators, on the values less i * gap.
    """
    pools: list[list[float]] = []
    for i, value in enumerate(wanted):
        pools.append([value - i * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [_mean(pool) for pool in pools for _ in pool]
    return [value + i * gap for i, value in enumerate(level)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _measure(content: str) -> float:
    return CHARACTER_WIDTH * len(content)


def _make_box(content: str, left: float, middle: float) -> Box:
    return Box(left, middle - LINE_HEIGHT / 2 + 0.5, left + _measure(content), middle + LINE_HEIGHT / 2 - 0.5)


def _is_free(box: Box, frame: Box, taken: Sequence[Box]) -> bool:
    return frame.holds(box) and not any(box.overlaps(other) for other in taken)

"""Where the names of points go, so that none lies on another."""

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


@dataclass(frozen=True)
class Label:
    """A name, its place, and whether a line must lead there from its point."""

    content: str
    box: Box
    is_far: bool


def place_beside(contents: Sequence[str], point: tuple[float, float], frame: Box, taken: Sequence[Box]) -> Label | None:
    """Place a name right of a point or left of it, a little below the middle; None if neither is free.

    Args:
        contents: the name, and shorter ones for where it finds no room.
        point: (x, y).
        frame: that names must lie in.
        taken: where no name may lie.
    """
    x, y = point
    for below in (11, 24):
        for content in contents:
            for left in (x + _NEAR, x - _NEAR - _measure(content)):
                box = _make_box(content, left, y + below)
                if _is_free(box, frame, taken):
                    return Label(content, box, is_far=False)
    return None


def place_column(
    contents: Sequence[str], x: float, heights: Sequence[float], frame: Box, taken: Sequence[Box]
) -> list[Label | None]:
    """Place the names of points that lie above one another, in the same order and as near as they can be.

    Args:
        contents: the names.
        x: of all points.
        heights: of the points, rising.
        frame: that names must lie in.
        taken: where no name may lie.

    Returns:
        A label for each name, or None where there is no room for it.
    """
    middles = spread(heights, LINE_HEIGHT)
    labels: list[Label | None] = []
    start = 0
    for end in range(1, len(middles) + 1):
        # Names that touch are a stack, which lies on one side as a whole.
        if end == len(middles) or middles[end] - middles[end - 1] > LINE_HEIGHT + 0.1:
            stack = slice(start, end)
            labels += _place_stack(contents[stack], x, heights[stack], middles[stack], frame, taken)
            start = end
    return labels


def _place_stack(
    contents: Sequence[str],
    x: float,
    heights: Sequence[float],
    middles: Sequence[float],
    frame: Box,
    taken: Sequence[Box],
) -> list[Label | None]:
    """Place a stack of names on the side of their points that has more room."""
    is_far = max(abs(middle - height) for middle, height in zip(middles, heights, strict=True)) > 3
    gap = _FAR if is_far else _NEAR
    sides: list[list[Label | None]] = []
    for is_right in (False, True):
        lefts = [x + gap if is_right else x - gap - _measure(content) for content in contents]
        boxes = [_make_box(*item) for item in zip(contents, lefts, middles, strict=True)]
        named = zip(contents, boxes, strict=True)
        sides.append([Label(name, box, is_far) if _is_free(box, frame, taken) else None for name, box in named])
    return min(sides, key=lambda labels: labels.count(None))


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

"""What the pictures are drawn with: elements, scales and places for labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Of the page's font, on average; a label may be a little longer or shorter than we think.
CHARACTER_WIDTH, LINE_HEIGHT = 6.4, 14.0


def element(name: str, content: str = "", **attributes: object) -> str:
    """Write an element of XML; content is markup, attribute names end in _ where Python has the word."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_number(value) if isinstance(value, float) else escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(content: str, x: float, y: float, **attributes: object) -> str:
    """Write a line of text."""
    return element("text", escape(content), x=x, y=y, **attributes)


def title(content: str) -> str:
    """Write what shows up when the pointer rests on an element."""
    return element("title", escape(content))


def picture(content: str, width: float, height: float, label: str) -> str:
    """Write a picture whose text is not scaled as long as there are `width` pixels for it."""
    size = {"viewBox": f"0 0 {_number(width)} {_number(height)}", "width": width, "height": height}
    return element("svg", content, role="img", aria_label=label, **size)


def shorten(content: str, width: float) -> str:
    """Cut a text so that it fits a width."""
    most = max(2, int(width / CHARACTER_WIDTH))
    return content if len(content) <= most else content[: most - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Scale:
    """Where values lie: [low, high] on [start, end]; values beyond lie on the ends."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Say where a value lies."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Choose round values, about `most` of them."""
        if not self.is_log:
            step = _round_step((self.high - self.low) / most)
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                break
        return found


def _round_step(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    if step <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


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


def place_label(content: str, point: tuple[float, float], frame: Box, taken: Sequence[Box]) -> Box | None:
    """Find room for a point's label: right of it or left of it, the nearest height that is free.

    Args:
        content: of the label.
        point: (x, y) of its middle.
        frame: that labels must lie in.
        taken: where no label may lie.

    Returns:
        The label's box, or None if there is no room.
    """
    width = CHARACTER_WIDTH * len(content)
    x, y = point
    for distance in range(0, 150, 3):
        # Farther off, a line leads from the point to the label.
        gap = 9 if distance < 12 else 22
        for left in (x + gap, x - gap - width):
            for middle in (y - distance, y + distance):
                box = Box(left, middle - LINE_HEIGHT / 2, left + width, middle + LINE_HEIGHT / 2)
                if frame.holds(box) and not any(box.overlaps(other) for other in taken):
                    return box
    return None

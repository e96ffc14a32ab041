"""What the page and its pictures are made of: elements and scales."""

import html
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from embpack.text import printable

# Of the page's font, on average; a text may be a little longer or shorter than we think.
CHARACTER_WIDTH = 6.8
# The width of the text on a screen, and on a phone.
WIDE, NARROW = 760.0, 350.0


def escape(content: str) -> str:
    """Write text as it stands in markup, names of others so that they are seen and do nothing."""
    return html.escape(printable(content))


def breakable(name: str) -> str:
    """Write a name that a line may end in after its dots, slashes, dashes and underlines, and nowhere else."""
    return "<wbr/>".join(escape(part) for part in re.split(r"(?<=[./_-])(?![./_-])", name) if part)


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


def mark(content: str, label: str, x: float, y: float) -> str:
    """Group shapes that stand for something, drawn from (x, y) on.

    What they stand for shows up under the pointer, on a tap and by the keyboard.
    """
    place = f"translate({_number(x)} {_number(y)})"
    return element("g", content, class_="mark", tabindex=-1, role="img", aria_label=label, transform=place)


@dataclass(frozen=True)
class Picture:
    """A drawing whose text is not scaled as long as there are `width` pixels for it.

    Attributes:
        content: markup of SVG.
        width, height: in pixels.
        label: what it shows.
    """

    content: str
    width: float
    height: float
    label: str

    def __str__(self) -> str:
        """Write it for a page, where the keyboard gets to the first mark, and from there by arrows to the others."""
        return self.write(self.content.replace('tabindex="-1"', 'tabindex="0"', 1))

    def write(self, content: str, margin: float = 0.0) -> str:
        """Write an element of this size that has some content, with a margin around it."""
        width, height = self.width + 2 * margin, self.height + 2 * margin
        box = " ".join(map(_number, (-margin, -margin, width, height)))
        size = {"viewBox": box, "width": width, "height": height}
        return element("svg", content, xmlns="http://www.w3.org/2000/svg", role="group", aria_label=self.label, **size)


def draw_twice(draw: Callable[[float], Picture]) -> str:
    """Draw for a screen and for a phone: text that shrinks with its picture could not be read there."""
    return element("div", str(draw(WIDE)), class_="wide") + element("div", str(draw(NARROW)), class_="narrow")


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

"""Pictures with a row for each result: its loss, and the losses of single rows."""

import statistics
from collections.abc import Sequence
from typing import Any

from embpack.comparison.array import QUANTILES, Comparison
from embpack.comparison.report.subject import Subject, describe
from embpack.comparison.report.svg import CHARACTER_WIDTH, Picture, Scale, element, mark, shorten, text

_ROW_HEIGHT = 24.0
# Bars end at this many times the median, so that one bad method leaves the others apart.
_LONGEST = 2.2
_BAR: dict[str, Any] = {"y": 4, "height": 15}


def _group(results: Sequence[Comparison]) -> list[tuple[float, list[Comparison]]]:
    """Results by rising bits, within them by rising loss."""
    ordered = sorted(results, key=lambda result: (result.bits, result.loss))
    return [
        (bits, [result for result in ordered if result.bits == bits])
        for bits in dict.fromkeys(result.bits for result in ordered)
    ]


def _label_width(subject: Subject, width: float) -> float:
    longest = max(len(subject.name(result)) for result in subject.results)
    return min(longest * CHARACTER_WIDTH + 12, 0.36 * width)


def draw_losses(subject: Subject, width: float) -> Picture:
    """Draw a bar for each result's loss, a group for each number of bits, each on a scale of its own."""
    left, right = _label_width(subject, width), width - 62
    parts, top = [], 0.0
    for bits, group in _group(subject.results):
        high = min(group[-1].loss, _LONGEST * statistics.median(result.loss for result in group)) or 1.0
        scale = Scale(0, high, left, right)
        parts.append(text(f"{bits} bits", 0, top + 15, class_="group"))
        top += _ROW_HEIGHT
        for result in group:
            kind = "bar chosen" if result == subject.recommended else "bar"
            end = scale.place(result.loss)
            row = _draw_name(result, subject, left) + element("rect", class_=kind, x=left, width=end - left, **_BAR)
            row += element("path", class_="cut", d=f"M{end - 16:.1f} 21l6-19h5l-6 19z") if result.loss > high else ""
            row += text(f"{result.loss:.5f}", end + 6, 16, class_="value")
            parts.append(mark(row, describe(result), 0, top))
            top += _ROW_HEIGHT
        top += 8
    return Picture("".join(parts), width, top, "Loss of each method")


def _draw_name(result: Comparison, subject: Subject, left: float) -> str:
    return text(shorten(subject.name(result), left - 8), left - 8, 16, class_="label end")


def draw_row_losses(subject: Subject, width: float) -> Picture:
    """Draw how the losses of single rows spread: 1 to 99 %, the middle half, the median and the worst row."""
    left, right = _label_width(subject, width), width - 14
    parts, top = [], 0.0
    for bits, group in _group(subject.results):
        worst = max(result.worst_row_loss for result in group)
        high = min(worst, 2 * _LONGEST * statistics.median(_median(result) for result in group)) or 1.0
        scale = Scale(0, high * 1.03, left, right)
        parts.append(text(f"{bits} bits", 0, top + 15, class_="group"))
        top += _ROW_HEIGHT
        bottom = top + len(group) * _ROW_HEIGHT
        for value in scale.ticks(5):
            at = scale.place(value)
            parts.append(element("line", class_="grid", x1=at, x2=at, y1=top, y2=bottom))
            parts.append(text(f"{value:.3g}", at, bottom + 13, class_="tick middle"))
        for result in group:
            row = _draw_name(result, subject, left)
            row += _draw_spread(result, scale, chosen=result == subject.recommended)
            parts.append(mark(row, _describe_rows(result), 0, top))
            top += _ROW_HEIGHT
        top += 28
    return Picture("".join(parts), width, top, "Losses of single rows, each method")


def _median(result: Comparison) -> float:
    return result.row_losses[QUANTILES.index(0.5)]


def _draw_spread(result: Comparison, scale: Scale, *, chosen: bool) -> str:
    places = {share: scale.place(loss) for share, loss in zip(QUANTILES, result.row_losses, strict=True)}
    kind = " chosen" if chosen else ""
    half: dict[str, Any] = {"x": places[0.25], "width": max(places[0.75] - places[0.25], 1.0), "y": 7, "height": 10}
    return (
        element("path", class_=f"whisker{kind}", d=f"M{places[0.01]:.1f} 12H{places[0.99]:.1f}")
        + element("rect", class_=f"half{kind}", **half)
        + element("path", class_="median", d=f"M{places[0.5]:.1f} 7v10")
        + (
            element("path", class_="beyond", d=f"M{scale.end + 2:.1f} 8l6 4l-6 4z")
            if result.worst_row_loss > scale.high
            else element("circle", class_="worst", cx=places[1.0], cy=12, r=2.5)
        )
    )


def _describe_rows(result: Comparison) -> str:
    median, most = (result.row_losses[QUANTILES.index(share)] for share in (0.5, 0.99))
    return (
        f"{result.variant}: loss of rows: median {median:.5f}, 99 % of rows at most {most:.5f}, the worst, row "
        f"{result.worst_row}, {result.worst_row_loss:.5f}"
    )

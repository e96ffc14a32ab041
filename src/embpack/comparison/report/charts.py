"""The pictures of the page, each drawn for a width in pixels."""

import statistics
from collections.abc import Sequence
from typing import Any

from embpack.comparison.array import QUANTILES, Comparison
from embpack.comparison.front import find_front, name_variant
from embpack.comparison.report.labels import Box, Label, place_beside, place_column
from embpack.comparison.report.svg import CHARACTER_WIDTH, Scale, element, picture, shorten, text
from embpack.comparison.report.svg import title as hint

# With more points than this there is room for the names of the best only.
_MOST_NAMES = 24
_ROW_HEIGHT = 24.0
# Bars end at this many times the median, so that one bad method leaves the others apart.
_LONGEST = 2.2


def describe(result: Comparison) -> str:
    """Say in a line what a result is."""
    return (
        f"{result.variant}: loss {result.loss:.5f}, {result.bytes_per_row:.4g} bytes a row "
        f"({100 * result.share_of_float32:.2f} % of float32)"
    )


def draw_error_against_bytes(results: Sequence[Comparison], recommended: Comparison | None, width: float) -> str:
    """Draw each result's loss over its bytes a row, with the Pareto front as steps."""
    height = 400.0 if width > 500 else 380.0
    frame = Box(46, 14, width - 8, height - 46)
    losses = [result.loss for result in results if result.loss > 0] or [1.0]
    is_log = max(losses) > 4 * min(losses)
    low, high = (min(losses) / 1.5, max(losses) * 1.5) if is_log else (0.0, max(losses) * 1.15)
    y = Scale(low, high, frame.bottom, frame.top, is_log)
    x = Scale(0, max(result.bytes_per_row for result in results) * 1.18, frame.left, frame.right)
    front = find_front(results)
    marks = _draw_points(results, front, recommended, x, y)
    labels = _draw_labels(results, front, x, y, frame)
    axes = _draw_axes(x, y, frame, results[0])
    return picture(
        axes + _draw_front(front, x, y, frame) + labels + marks, width, height, "Loss against bytes a row, each method"
    )


def _draw_axes(x: Scale, y: Scale, frame: Box, result: Comparison) -> str:
    parts = []
    for value in y.ticks(8):
        at = y.place(value)
        parts.append(element("line", class_="grid", x1=frame.left, x2=frame.right, y1=at, y2=at))
        parts.append(text(f"{value:.4g}", frame.left - 6, at + 4, class_="tick end"))
    share_of_byte = result.share_of_float32 / result.bytes_per_row
    for value in x.ticks(8 if frame.right > 400 else 5):
        at = x.place(value)
        parts.append(element("line", class_="axis", x1=at, x2=at, y1=frame.bottom, y2=frame.bottom + 4))
        parts.append(text(f"{value:.4g}", at, frame.bottom + 17, class_="tick middle"))
        if value:
            parts.append(text(f"{100 * value * share_of_byte:.3g} %", at, frame.bottom + 31, class_="faint middle"))
    bottom = frame.bottom
    parts.append(element("line", class_="axis", x1=frame.left, x2=frame.right, y1=bottom, y2=bottom))
    parts.append(text("bytes a row, and of float32", frame.right, frame.bottom + 44, class_="faint end"))
    parts.append(text("normalized l2 loss", frame.left - 40, 9, class_="faint"))
    return "".join(parts)


def _draw_front(front: Sequence[Comparison], x: Scale, y: Scale, frame: Box) -> str:
    """Draw what can be had at each size: from each point on to the next one, then down."""
    if not front:
        return ""
    path = f"M{x.place(front[0].bytes_per_row):.1f} {frame.top:.1f}"
    for result in front:
        path += f"H{x.place(result.bytes_per_row):.1f}V{y.place(result.loss):.1f}"
    return element("path", class_="front", d=f"{path}H{frame.right:.1f}")


def _draw_points(
    results: Sequence[Comparison],
    front: Sequence[Comparison],
    recommended: Comparison | None,
    x: Scale,
    y: Scale,
) -> str:
    parts = []
    for result in sorted(results, key=lambda result: result in front):
        kind = "best" if result in front else "other"
        at: dict[str, Any] = {"cx": x.place(result.bytes_per_row), "cy": y.place(result.loss)}
        if result == recommended:
            parts.append(element("circle", class_="ring", r=9.0, **at))
        parts.append(element("circle", hint(describe(result)), class_=kind, r=5.0 if kind == "best" else 4.0, **at))
    return "".join(parts)


def _draw_labels(results: Sequence[Comparison], front: Sequence[Comparison], x: Scale, y: Scale, frame: Box) -> str:
    """Name the points, those of the front first; one that finds no room is named by its hint alone."""
    places = [(x.place(result.bytes_per_row), y.place(result.loss)) for result in results]
    taken = [Box(left - 5, top - 5, left + 5, top + 5) for left, top in places]
    parts = []
    for result, point in zip(results, places, strict=True):
        if result in front:
            name = shorten(name_variant(result, results), frame.right / 3)
            label = place_beside([f"{name}, {result.bits} bits", name], point, frame, taken)
            if label is not None:
                taken.append(label.box)
                parts.append(_draw_label(label, point, "label best-label"))
    if len(results) > _MOST_NAMES:
        return "".join(parts)
    others = [item for item in zip(results, places, strict=True) if item[0] not in front]
    for column in sorted({point[0] for _, point in others}):
        items = sorted((point[1], name_variant(result, results)) for result, point in others if point[0] == column)
        heights = [height for height, _ in items]
        names = [shorten(name, frame.right / 3) for _, name in items]
        for label, height in zip(place_column(names, column, heights, frame, taken), heights, strict=True):
            if label is not None:
                taken.append(label.box)
                parts.append(_draw_label(label, (column, height), "label"))
    return "".join(parts)


def _draw_label(label: Label, point: tuple[float, float], kind: str) -> str:
    box = label.box
    middle = (box.top + box.bottom) / 2
    line = ""
    if label.is_far:
        end = box.left - 2 if box.left > point[0] else box.right + 2
        line = element("line", class_="leader", x1=point[0], y1=point[1], x2=end, y2=middle)
    is_left = box.right < point[0]
    return line + text(
        label.content, box.right if is_left else box.left, middle + 4, class_=f"{kind} end" if is_left else kind
    )


def _group(results: Sequence[Comparison]) -> list[tuple[float, list[Comparison]]]:
    """Results by rising bits, within them by rising loss."""
    ordered = sorted(results, key=lambda result: (result.bits, result.loss))
    return [
        (bits, [result for result in ordered if result.bits == bits])
        for bits in dict.fromkeys(result.bits for result in ordered)
    ]


def _label_width(results: Sequence[Comparison], width: float) -> float:
    longest = max(len(name_variant(result, results)) for result in results)
    return min(longest * CHARACTER_WIDTH + 12, 0.36 * width)


def draw_losses(results: Sequence[Comparison], recommended: Comparison | None, width: float) -> str:
    """Draw a bar for each result's loss, a group for each number of bits, each on a scale of its own."""
    left, right = _label_width(results, width), width - 62
    parts, top = [], 0.0
    for bits, group in _group(results):
        high = min(group[-1].loss, _LONGEST * statistics.median(result.loss for result in group)) or 1.0
        scale = Scale(0, high, left, right)
        parts.append(text(f"{bits} bits", 0, top + 15, class_="group"))
        top += _ROW_HEIGHT
        for result in group:
            kind = "bar chosen" if result == recommended else "bar"
            end = scale.place(result.loss)
            bar = element("rect", hint(describe(result)), class_=kind, x=left, y=top + 4, width=end - left, height=15.0)
            parts.append(bar + (_draw_cut(end - 16, top + 4) if result.loss > high else ""))
            parts.append(_draw_name(result, results, left, top))
            parts.append(text(f"{result.loss:.5f}", end + 6, top + 16, class_="value"))
            top += _ROW_HEIGHT
        top += 8
    return picture("".join(parts), width, top, "Loss of each method")


def _draw_name(result: Comparison, results: Sequence[Comparison], left: float, top: float) -> str:
    return text(shorten(name_variant(result, results), left - 8), left - 8, top + 16, class_="label end")


def _draw_cut(x: float, top: float) -> str:
    """Draw the mark of a bar that is longer than there is room for."""
    return element("path", class_="cut", d=f"M{x:.1f} {top + 17:.1f}l6 -19h5l-6 19z")


def draw_row_losses(results: Sequence[Comparison], recommended: Comparison | None, width: float) -> str:
    """Draw how the losses of single rows spread: 1 to 99 %, the middle half, the median and the worst row."""
    left, right = _label_width(results, width), width - 14
    parts, top = [], 0.0
    for bits, group in _group(results):
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
            parts.append(_draw_name(result, results, left, top))
            parts.append(_draw_spread(result, scale, top + 12, chosen=result == recommended))
            top += _ROW_HEIGHT
        top += 28
    return picture("".join(parts), width, top, "Losses of single rows, each method")


def _median(result: Comparison) -> float:
    return result.row_losses[QUANTILES.index(0.5)]


def _draw_spread(result: Comparison, scale: Scale, middle: float, *, chosen: bool) -> str:
    quantiles = dict(zip(QUANTILES, result.row_losses, strict=True))
    places = {share: scale.place(loss) for share, loss in quantiles.items()}
    kind = " chosen" if chosen else ""
    told = ", ".join(f"{100 * share:.0f} %: {loss:.5f}" for share, loss in quantiles.items())
    whole = element("line", class_=f"whisker{kind}", x1=places[0.01], x2=places[0.99], y1=middle, y2=middle)
    half: dict[str, Any] = {
        "x": places[0.25],
        "width": max(places[0.75] - places[0.25], 1.0),
        "y": middle - 5,
        "height": 10.0,
    }
    median = element("line", class_="median", x1=places[0.5], x2=places[0.5], y1=middle - 5, y2=middle + 5)
    if quantiles[1.0] > scale.high:
        x = scale.end
        worst = element("path", class_="beyond", d=f"M{x + 2:.1f} {middle - 4:.1f}l6 4l-6 4z")
    else:
        worst = element("circle", class_="worst", cx=places[1.0], cy=middle, r=2.5)
    rows = hint(f"{result.variant}: loss of rows, by share of rows: {told}; the worst is row {result.worst_row}")
    return element("g", rows + whole + element("rect", class_=f"half{kind}", **half) + median + worst)

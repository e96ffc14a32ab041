"""Pictures with a point for each result, or for each table."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from embpack.comparison.array import Comparison
from embpack.comparison.checkpoint import TableComparison
from embpack.comparison.report.labels import Box, Label, place_beside, place_column, trace
from embpack.comparison.report.subject import Subject, amount, describe, distinguish
from embpack.comparison.report.svg import Picture, Scale, element, mark, shorten, text

# With more points than this there is room for the names of the best only.
_MOST_NAMES = 30
# Points of about one size, which lie above one another, are named in one column.
_COLUMN_WIDTH = 4.0
_POINT, _BEST = 4.0, 5.0
# Tables that are named: those with the most loss.
_MOST_TABLES = 5


def draw_error_against_bytes(subject: Subject, width: float) -> Picture:
    """Draw each result's loss over its bytes a row, with the front as steps."""
    height = 400.0 if width > 500 else 380.0
    frame = Box(46, 20, width - 8, height - 46)
    y = _scale_losses([result.loss for result in subject.results], frame)
    x = Scale(0, max(result.bytes_per_row for result in subject.results) * 1.18, frame.left, frame.right)
    plot = _Plot(subject, x, y, frame)
    content = _draw_losses(y, frame) + _draw_bytes(x, frame, subject.results[0])
    content += plot.draw_front() + plot.draw_labels() + plot.draw_points()
    return Picture(content, width, height, f"Loss against bytes a row, {subject.title}")


def draw_tables(tables: Sequence[tuple[TableComparison, Comparison]], width: float) -> Picture:
    """Draw a point for each table: its loss as packed in one way over its size; the worst are named."""
    height = 300.0
    frame = Box(46, 20, width - 8, height - 46)
    sizes = [4.0 * table.num_embeddings * table.embedding_dim for table, _ in tables]
    y = _scale_losses([result.loss for _, result in tables], frame)
    x = Scale(min(sizes) / 1.5, max(sizes) * 1.5, frame.left, frame.right, is_log=True)
    places = [(x.place(size), y.place(result.loss)) for size, (_, result) in zip(sizes, tables, strict=True)]
    points = []
    for (table, result), (left, top), size in zip(tables, places, sizes, strict=True):
        shape = table.num_embeddings, table.embedding_dim
        said = f"{table.name}: loss {result.loss:.5f}, {shape[0]:,} x {shape[1]}, {amount(size)}B in float32"
        points.append(mark(element("circle", class_="other", r=_POINT), said, left, top))
    content = _draw_losses(y, frame) + _draw_sizes(x, frame) + "".join(points)
    content += _name_worst(tables, places, frame)
    return Picture(content, width, height, "Loss of each table against its size")


def _name_worst(
    tables: Sequence[tuple[TableComparison, Comparison]], places: Sequence[tuple[float, float]], frame: Box
) -> str:
    taken, parts = _around(places), []
    names = distinguish([table.name for table, _ in tables])
    worst = sorted(range(len(tables)), key=lambda i: -tables[i][1].loss)[:_MOST_TABLES]
    for i in worst:
        label = place_beside([shorten(names[i], frame.right / 3)], places[i], frame, taken)
        if label is not None:
            taken.append(label.box)
            parts.append(_draw_label(label, places[i], "label"))
    return "".join(parts)


def _scale_losses(losses: Sequence[float], frame: Box) -> Scale:
    some = [loss for loss in losses if loss > 0] or [1.0]
    is_log = max(some) > 4 * min(some)
    low, high = (min(some) / 1.5, max(some) * 1.5) if is_log else (0.0, max(some) * 1.15)
    return Scale(low, high, frame.bottom, frame.top, is_log)


def _draw_losses(y: Scale, frame: Box) -> str:
    parts = [text("normalized l2 loss", frame.left - 40, 11, class_="caption")]
    for value in y.ticks(8):
        at = y.place(value)
        parts.append(element("line", class_="grid", x1=frame.left, x2=frame.right, y1=at, y2=at))
        parts.append(text(f"{value:.4g}", frame.left - 6, at + 4, class_="tick end"))
    return "".join(parts)


def _draw_bytes(x: Scale, frame: Box, result: Comparison) -> str:
    parts = [_draw_axis(frame, "bytes a row, and of float32")]
    share_of_byte = result.share_of_float32 / result.bytes_per_row
    for value in x.ticks(8 if frame.right > 400 else 5):
        parts.append(_draw_tick(x.place(value), frame, f"{value:.4g}"))
        if value:
            share = f"{100 * value * share_of_byte:.3g} %"
            parts.append(text(share, x.place(value), frame.bottom + 31, class_="caption middle"))
    return "".join(parts)


def _draw_sizes(x: Scale, frame: Box) -> str:
    ticks = [_draw_tick(x.place(value), frame, f"{amount(value)}B") for value in x.ticks(8 if frame.right > 400 else 5)]
    return _draw_axis(frame, "size in float32") + "".join(ticks)


def _draw_axis(frame: Box, caption: str) -> str:
    bottom = frame.bottom
    line = element("line", class_="axis", x1=frame.left, x2=frame.right, y1=bottom, y2=bottom)
    return line + text(caption, frame.right, bottom + 44, class_="caption end")


def _draw_tick(at: float, frame: Box, value: str) -> str:
    line = element("line", class_="axis", x1=at, x2=at, y1=frame.bottom, y2=frame.bottom + 4)
    return line + text(value, at, frame.bottom + 17, class_="tick middle")


@dataclass(frozen=True)
class _Plot:
    """Results on their scales."""

    subject: Subject
    x: Scale
    y: Scale
    frame: Box

    def place(self, result: Comparison) -> tuple[float, float]:
        return self.x.place(result.bytes_per_row), self.y.place(result.loss)

    @property
    def corners(self) -> list[tuple[float, float]]:
        """What can be had at each size: from each point on to the next one, then down."""
        corners: list[tuple[float, float]] = []
        above = self.frame.top
        for left, top in map(self.place, self.subject.front):
            corners += [(left, above), (left, top)]
            above = top
        return [*corners, (self.frame.right, above)] if corners else []

    def draw_front(self) -> str:
        path = "L".join(f"{left:.1f} {top:.1f}" for left, top in self.corners)
        return element("path", class_="front", d=f"M{path}") if path else ""

    def draw_points(self) -> str:
        """Draw the points, the best last: they lie on top."""
        parts = []
        for result in sorted(self.subject.by_size, key=lambda result: result in self.subject.front):
            kind, size = ("best", _BEST) if result in self.subject.front else ("other", _POINT)
            ring = element("circle", class_="ring", r=9.0) if result == self.subject.recommended else ""
            point = element("circle", class_="touch", r=11.0) + ring + element("circle", class_=kind, r=size)
            parts.append(mark(point, describe(result), *self.place(result)))
        return "".join(parts)

    def draw_labels(self) -> str:
        """Name the points, those of the front first; one that finds no room says its name as a mark alone."""
        subject = self.subject
        taken = _around([self.place(result) for result in subject.results]) + _along(self.corners)
        parts = []
        for result in subject.front:
            point, others = self.place(result), [self.place(other) for other in subject.front if other != result]
            name = shorten(subject.name(result), self.frame.right / 3)
            contents = [f"{name}, {result.bits} bits", name]
            parts += self._draw_placed([place_beside(contents, point, self.frame, taken, others)], [result], taken)
        if len(subject.results) <= _MOST_NAMES:
            for column in self._columns():
                names = [shorten(subject.name(result), self.frame.right / 3) for result in column]
                points = [self.place(result) for result in column]
                # What leads to a name may pass other points, but neither the front nor another name.
                lines = taken[len(subject.results) :]
                parts += self._draw_placed(place_column(names, points, self.frame, taken, lines), column, taken)
        return "".join(parts)

    def _draw_placed(
        self, labels: Sequence[Label | None], results: Sequence[Comparison], taken: list[Box]
    ) -> list[str]:
        parts = []
        for label, result in zip(labels, results, strict=True):
            if label is not None:
                taken += [
                    label.box,
                    *(trace(self.place(result), label.find_end(self.place(result))) if label.is_far else []),
                ]
                kind = "label best-label" if result in self.subject.front else "label"
                parts.append(_draw_label(label, self.place(result), kind))
        return parts

    def _columns(self) -> list[list[Comparison]]:
        """The points beside the front, those of about one size together, from the top."""
        columns: list[list[Comparison]] = []
        for result in self.subject.by_size:
            if result in self.subject.front:
                continue
            if columns and self.place(result)[0] - self.place(columns[-1][0])[0] < _COLUMN_WIDTH:
                columns[-1].append(result)
            else:
                columns.append([result])
        return [sorted(column, key=lambda result: -result.loss) for column in columns]


def _around(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Where points are drawn."""
    return [Box(left - 5, top - 5, left + 5, top + 5) for left, top in points]


def _along(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Where a line is drawn that goes across or down from corner to corner."""
    return [Box(a[0] - 1, min(a[1], b[1]) - 1, b[0] + 1, max(a[1], b[1]) + 1) for a, b in pairwise(corners)]


def _draw_label(label: Label, point: tuple[float, float], kind: str) -> str:
    box, (end, middle) = label.box, label.find_end(point)
    line = element("line", class_="leader", x1=point[0], y1=point[1], x2=end, y2=middle) if label.is_far else ""
    is_left = box.right < point[0]
    return line + text(
        label.content, box.right if is_left else box.left, middle + 4, class_=f"{kind} end" if is_left else kind
    )

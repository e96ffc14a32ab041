"""Pictures of comparisons: their scales and labels, and as files by themselves; and all results as CSV."""

import csv
import dataclasses
import io
import itertools
import re
import struct
from xml.etree import ElementTree

import numpy as np
import pytest
from comparisons import make_comparison, make_file, make_result, make_table_comparison
from hypothesis import given
from hypothesis import strategies as st

import embpack
from embpack.comparison.array import QUANTILES
from embpack.comparison.checkpoint import FileComparison
from embpack.comparison.report import make_csv, make_png, make_svg
from embpack.comparison.report.labels import Box, place_beside, place_column, spread
from embpack.comparison.report.scatter import draw_error_against_bytes
from embpack.comparison.report.subject import Subject, distinguish
from embpack.comparison.report.svg import CHARACTER_WIDTH, Scale

SVG = "{http://www.w3.org/2000/svg}"


def test_a_scale_places_and_chooses_round_ticks():
    assert Scale(0, 10, 100, 200).place(5) == 150
    assert Scale(0, 10, 100, 200).place(20) == 200
    assert Scale(0.01, 1, 0, 100, is_log=True).place(0.1) == pytest.approx(50)
    assert Scale(0, 85, 0, 1).ticks(5) == [0, 20, 40, 60, 80]
    assert Scale(0.03, 1.2, 0, 1, is_log=True).ticks(8) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_spread_values_keep_their_gap_order_and_middle(values):
    wanted = sorted(values)
    moved = spread(wanted, 14)
    assert np.all(np.diff(moved) >= 14 - 1e-9)
    assert sum(moved) == pytest.approx(sum(wanted), abs=1e-6)
    if len(wanted) == 1 or np.diff(wanted).min() >= 14:
        assert moved == pytest.approx(wanted, abs=1e-9)


@given(
    st.lists(st.floats(20, 380), min_size=1, max_size=14),
    st.lists(st.tuples(st.floats(46, 340), st.floats(14, 380)), max_size=5),
)
def test_no_label_lies_on_another_or_outside(heights, points):
    frame = Box(46, 14, 342, 380)
    boxes = []
    for point in points:
        label = place_beside(["greedy, 4 bits", "greedy"], point, frame, boxes)
        boxes += [label.box] if label else []
    column = [(190, height) for height in sorted(heights)]
    labels = place_column([f"method {i}" for i in range(len(heights))], column, frame, boxes)
    boxes += [label.box for label in labels if label]
    assert all(frame.holds(box) for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def read_picture(drawn):
    """Labels as boxes, points, and the lines of the front and of what leads to labels."""
    root = ElementTree.fromstring(drawn)
    labels = []
    for shape in root.iter(f"{SVG}text"):
        if "label" in shape.get("class").split():
            width, left = CHARACTER_WIDTH * len(shape.text), float(shape.get("x"))
            left -= width if "end" in shape.get("class").split() else 0
            labels.append((left, float(shape.get("y")) - 10, left + width, float(shape.get("y")) + 2))
    places = [re.findall(r"[\d.]+", mark.get("transform")) for mark in root.iter(f"{SVG}g")]
    (front,) = [shape for shape in root.iter(f"{SVG}path") if shape.get("class") == "front"]
    corners = [tuple(map(float, corner.split(" "))) for corner in front.get("d")[1:].split("L")]
    leaders = [
        ((float(line.get("x1")), float(line.get("y1"))), (float(line.get("x2")), float(line.get("y2"))))
        for line in root.iter(f"{SVG}line")
        if line.get("class") == "leader"
    ]
    return labels, [tuple(map(float, place)) for place in places], list(itertools.pairwise(corners)), leaders


def along(start, end, steps=200):
    return [tuple(np.add(start, np.multiply(np.subtract(end, start), i / steps))) for i in range(steps + 1)]


def is_within(point, box, slack=0.0):
    left, top, right, bottom = box
    return left + slack < point[0] < right - slack and top + slack < point[1] < bottom - slack


@pytest.mark.parametrize("width", [350.0, 760.0])
@pytest.mark.parametrize("count", range(1, 9))
def test_labels_lie_on_no_line_and_no_point(count, width):
    comparison = make_comparison(count)
    subject = Subject("emb", comparison.overall, comparison.front, comparison.recommended)
    labels, points, front, leaders = read_picture(str(draw_error_against_bytes(subject, width)))
    assert len(labels) >= 10 and len(points) == len(subject.results)
    for label in labels:
        assert not [point for point in points if is_within(point, label)]
        assert not [line for line in front for point in along(*line) if is_within(point, label)]
        assert not [line for line in leaders for point in along(*line) if is_within(point, label)]
    for start, end in leaders:
        # Where it leaves its point it may lie on the line of the front, which goes through the point too.
        away = [point for point in along(start, end) if np.hypot(*np.subtract(point, start)) > 10]
        crossed = [line for line in front for point in away if is_within(point, box_around(line))]
        assert crossed == []


def box_around(line):
    (left, top), (right, bottom) = line
    return left - 0.5, min(top, bottom) - 0.5, right + 0.5, max(top, bottom) + 0.5


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["user_emb", "item_emb"], ["user_…", "item_…"]),
        (["m.x_emb.weight", "m.y_emb.weight"], ["…x_…", "…y_…"]),
        (["a", "b"], ["a", "b"]),
        (["a", "a.b"], ["a", "a.b"]),
        (["only.one"], ["only.one"]),
        (["same.name", "same.name"], ["…name", "…name"]),
    ],
)
def test_names_of_tables_without_what_all_share(names, expected):
    assert distinguish(names) == expected


# Files


def test_the_svg_needs_nothing_but_itself():
    comparison = make_comparison(3)
    root = ElementTree.fromstring(make_svg(comparison))
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}metadata").text == f"embpack {embpack.__version__}"
    style = root.find(f"{SVG}style").text
    # Not every program knows names of colours, or of fonts alone.
    assert "var(" not in style and "url(" not in style and "@import" not in style
    used = {name for shape in root.iter() for name in shape.get("class", "").split()}
    assert used - {"mark", "touch"} <= set(re.findall(r"\.([\w-]+)", style))
    marks = [shape.get("aria-label") for shape in root.iter(f"{SVG}g")]
    assert sorted(marks) == sorted(set(marks)) and len(marks) == len(comparison.overall)


def test_the_png_is_the_same_picture():
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    comparison = make_comparison(3)
    root = ElementTree.fromstring(make_svg(comparison))
    png = make_png(comparison)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (2 * int(root.get("width")), 2 * int(root.get("height")))
    pixels = imread(io.BytesIO(png))[..., :3]
    left, top, *_ = map(float, root.get("viewBox").split())
    best = np.array([0x0B, 0x6E, 0x5F]) / 255
    for mark in root.iter(f"{SVG}g"):
        if "best" in [shape.get("class") for shape in mark]:
            x, y = map(float, re.findall(r"[\d.]+", mark.get("transform")))
            assert pixels[round(2 * (y - top)), round(2 * (x - left))] == pytest.approx(best, abs=0.01)
    assert embpack.__version__.encode() in png


def test_a_png_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setattr("embpack.comparison.report.pictures.find_spec", lambda name: None)
    with pytest.raises(embpack.MissingExtraError, match=r"a PNG picture needs matplotlib: .*embpack\[png\]"):
        make_png(make_comparison(1))


def test_pictures_where_no_way_packs_all_tables():
    tables = make_table_comparison([make_result()], "a"), make_table_comparison([make_result(method="asym")], "b")
    comparison = dataclasses.replace(make_file(make_result()), tables=tables)
    root = ElementTree.fromstring(make_svg(comparison))
    assert [shape.text for shape in root.iter(f"{SVG}text")] == ["No way that was measured packs all tables."]
    pytest.importorskip("matplotlib")
    assert make_png(comparison).startswith(b"\x89PNG")


def test_the_csv_has_a_row_for_each_result_of_each_table():
    comparison = dataclasses.replace(make_comparison(2), readers=("onnx",))
    rows = list(csv.DictReader(io.StringIO(make_csv(comparison))))
    results = [(table, result) for table in comparison.tables for result in table.results]
    for row, (table, result) in zip(rows, results, strict=True):
        assert (row["table"], int(row["num_embeddings"]), row["dtype"]) == (table.name, table.num_embeddings, "float32")
        assert (row["method"], float(row["bits"]), row["rotate"]) == (result.method, result.bits, result.rotate or "")
        assert (float(row["loss"]), float(row["bytes_per_row"])) == (result.loss, result.bytes_per_row)
        assert float(row["lookups_per_second"]) == result.lookups_per_second
        assert tuple(row["readers"].split()) == result.readers
        assert [float(row[f"row_loss_{100 * share:g}"]) for share in QUANTILES] == list(result.row_losses)
        assert row["is_best"] == str(result in comparison.find_front(table.results))
        assert row["is_recommended"] == str(result.variant == comparison.recommended.variant)
    assert None not in rows[0] and None not in rows[0].values()


@pytest.mark.parametrize("name", ["a,b emb", 'quoted " emb', "line\nemb", "\ud800emb"])
def test_names_in_the_csv_are_one_field_of_one_line(name):
    table = make_table_comparison([make_result(table=name)], name)
    written = make_csv(FileComparison(make_file(make_result()).src, (table,), (), (), 1))
    assert len(written.splitlines()) == 2
    assert written.encode()
    (row,) = csv.DictReader(io.StringIO(written))
    assert (
        row["table"].encode("unicode_escape").decode().replace("\\\\", "\\")
        == name.encode("unicode_escape", "surrogatepass").decode()
    )

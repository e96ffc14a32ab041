"""The page that embpack compare writes: its text, and what a browser makes of it."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors
from comparisons import (
    compare_file,
    make_file,
    make_result,
    make_table_comparison,
)

import embpack
from embpack.comparison.array import Skipped
from embpack.comparison.checkpoint import FileComparison
from embpack.comparison.front import find_front, list_readers
from embpack.comparison.report import make_page
from embpack.text import printable
from embpack.variant import Variant

SVG = "http://www.w3.org/2000/svg"


def make_weight(rows=150, dim=24, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim), np.float32)


def read_amount(value):
    """A number to three digits with its prefix, written in another way than the page does."""
    power = min(3, max(0, int(np.floor(np.log10(value) / 3))))
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G'][power]}"


class Tags(HTMLParser):
    """Names and attributes of all elements."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def comparison(tmp_path):
    weights = {"user_emb": make_weight(), "item_emb": make_weight(40, 8, 1)}
    return compare_file(write_safetensors(tmp_path, Arrays(weights)))


def test_the_page_asks_nothing_of_any_network(comparison):
    page = make_page(comparison)
    # The name of SVG is no address; nothing else looks like one but a comment of the script.
    assert re.findall(r"https?://[^\s\"]*", page.replace(str(comparison.src), "").replace(SVG, "")) == []
    assert "url(" not in page
    assert "@import" not in page
    tags = Tags(page).found
    assert {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "embed", "base"} == set()
    assert [attributes for _, attributes in tags if {"src", "href", "xlink:href"} & set(attributes)] == []


def test_the_page_is_well_formed(comparison):
    root = ElementTree.fromstring(make_page(comparison))
    assert [child.tag for child in root] == ["head", "body"]
    # For a screen and for a phone: two pictures of the total and one of the tables; of each table two for both.
    assert len(list(root.iter(f"{{{SVG}}}svg"))) == 2 * (2 + 1) + 2 * 2


def test_the_page_has_the_figures_and_the_commands(comparison):
    root = ElementTree.fromstring(make_page(comparison))
    shown = [["".join(cell.itertext()).replace("\xa0", " ") for cell in row] for row in root.iter("tr")]
    by_size = sorted(comparison.overall, key=lambda result: (result.bytes_per_row, result.loss))
    assert [row[:4] + row[7:10] for row in shown[1 : 1 + len(by_size)]] == [
        [
            *(result.variant.name, str(result.bits), f"{result.loss:.5f}", f"{100 * result.share_of_float32:.2f} %"),
            *(list_readers(result), result.layout, f"{result.worst_row_loss:.5f}"),
        ]
        for result in by_size
    ]
    for result, row in zip(by_size, shown[1:], strict=False):
        assert [row[5], row[6]] == [read_amount(result.rows_per_second), read_amount(result.lookups_per_second)]
    commands = ["".join(code.itertext()) for code in root.iter("code")]
    expected = [comparison.write_command(result) for result in comparison.front]
    assert commands == [comparison.write_command(comparison.recommended), *expected]


def test_the_page_marks_the_front(comparison):
    (table,) = [t for t in comparison.tables if t.name == "user_emb"]
    page = make_page(dataclasses.replace(comparison, tables=(table,)))
    picture = next(ElementTree.fromstring(page).iter(f"{{{SVG}}}svg"))
    marks = [(mark.get("aria-label"), [shape.get("class") for shape in mark]) for mark in picture.iter(f"{{{SVG}}}g")]
    best = {label for label, shapes in marks if "best" in shapes}
    assert len(marks) == len(table.results)
    assert len(best) == len(find_front(table.results))
    assert all(any(text.startswith(str(result.variant)) for text in best) for result in find_front(table.results))


def test_the_page_says_why(comparison):
    for asked in (comparison, dataclasses.replace(comparison, readers=("fbgemm",), prefer="speed")):
        section = next(ElementTree.fromstring(make_page(asked)).iter("section"))
        assert list(section)[-1].text == asked.recommendation.reason


def test_the_page_says_that_nothing_is_read_by_a_reader():
    page = make_page(make_file(make_result(readers=("onnx",)), readers=("fbgemm",)))
    section = next(ElementTree.fromstring(page).iter("section"))
    said = "No way that was measured makes all of these tables smaller and is read by fbgemm."
    assert "".join(section.itertext()) == said


def test_the_page_says_who_wrote_it(comparison):
    metas = [attributes for tag, attributes in Tags(make_page(comparison)).found if tag == "meta"]
    assert {"name": "generator", "content": f"embpack {embpack.__version__}"} in metas


@pytest.mark.parametrize("name", ["\x1b[31memb", "a\n_emb", "\u202eemb", "\x00emb", "\ud800emb"])
def test_names_that_cannot_be_seen_are_escaped_on_the_page(name):
    result = make_result(table=name)
    skipped = Skipped(name, Variant("asym", 8), f"{name}[3] is odd")
    tables = [dataclasses.replace(make_table_comparison([result], each), skipped=(skipped,)) for each in (name, "emb")]
    page = make_page(FileComparison(Path(f"{name}.npy"), tuple(tables), (name,), (), 1))
    root = ElementTree.fromstring(page)
    text = "".join(root.itertext())
    assert [c for c in page if not c.isprintable() and c not in "\n\xa0"] == []
    assert next(root.iter("title")).text == f"Packing {printable(name)}.npy"
    assert f"{printable(name)}: asym at 8 bits: {printable(name)}[3] is odd" in text
    assert text.count(printable(name)) >= 4
    assert all(code.isprintable() for code in ("".join(code.itertext()) for code in root.iter("code")))


@pytest.mark.parametrize("name", ["<b>bold</b> emb", "[red] emb", "a&b;\"emb'", "]]> emb", "<script>emb"])
def test_names_are_shown_as_they_are(tmp_path, name):
    weights = {name: make_weight(), "other_emb": make_weight()}
    page = make_page(compare_file(write_safetensors(tmp_path, Arrays(weights)), include=["*"]))
    root = ElementTree.fromstring(page)
    names = ["".join(summary.find("b").itertext()) for summary in root.iter("summary")]
    assert names == [name, "other_emb"]
    assert [tag for tag, _ in Tags(page).found].count("script") == 1
    assert [tag for tag, _ in Tags(page).found].count("b") == 2


def test_what_is_left_out_is_on_the_page():
    table = make_table_comparison([make_result()])
    skipped = Skipped("emb", Variant("asym", 8, "float32"), "not <at> 8 bits")
    page = make_page(FileComparison(Path("m.npy"), (dataclasses.replace(table, skipped=(skipped,)),), (), (), 1))
    (item,) = [item for item in ElementTree.fromstring(page).iter("li") if "class" not in item.attrib][-1:]
    assert "".join(item.itertext()) == "emb: asym at 8 bits with float32 parameters: not <at> 8 bits"


@pytest.mark.parametrize(
    "results",
    [
        [make_result(loss=0.0, worst_row_loss=0.0, row_losses=(0.0,) * 9)],
        [make_result(loss=0.0, worst_row_loss=0.0, row_losses=(0.0,) * 9), make_result(40.0, 0.5)],
        [make_result(256.0)],
        [make_result(loss=1e-30), make_result(loss=1e30)],
        [make_result(float(size), 1 / size, method=f"greedy:b={size}") for size in range(1, 60)],
    ],
    ids=["no loss", "one without loss", "nothing is smaller", "far apart", "many"],
)
def test_pages_of_odd_results(results):
    page = make_page(make_file(*results))
    root = ElementTree.fromstring(page)
    assert len(list(root.iter("tr"))) == 1 + len(results)
    numbers = [value for e in root.iter() for key, value in e.items() if key in ("x", "y", "x1", "cx", "cy", "width")]
    places = [value for e in root.iter() for key, value in e.items() if key in ("d", "transform")]
    numbers += [number for value in places for number in re.findall(r"-?[\d.]+", value)]
    assert all(-20 <= float(number) <= 2000 for number in numbers)
    assert "nan" not in page


def test_a_page_without_a_way_for_all_tables():
    tables = make_table_comparison([make_result()], "a"), make_table_comparison([make_result(method="asym")], "b")
    comparison = FileComparison(Path("m.npz"), tables, (), (), 2)
    assert comparison.recommended is None
    root = ElementTree.fromstring(make_page(comparison))
    assert len(list(root.iter(f"{{{SVG}}}svg"))) == 2 * 2

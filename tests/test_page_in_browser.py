"""The page that embpack compare writes, as Chromium shows it: on a phone and on a screen, light and dark, on paper."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
from comparisons import SCHEMES, WIDTHS, find_browser, make_comparison, make_file, make_result, open_browser

from embpack.comparison.report import make_page

COUNTS = (1, 3, 200)
# Of text, by WCAG 2.2, success criterion 1.4.3, and of what has a meaning, by 1.4.11.
LEAST_CONTRAST, LEAST_MARK_CONTRAST = 4.5, 3.0
pytestmark = pytest.mark.skipif(
    find_browser() is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium or no playwright: the page is not looked at (apt-get install chromium; embpack[test])",
)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for count in COUNTS:
        (folder / f"{count}.html").write_text(make_page(make_comparison(count)))
    return folder


@pytest.fixture
def show(browser, pages):
    """Opens a page, which must do so without an error; closes all of them."""
    contexts, errors = [], []

    def open_page(page: Path | int, width: int = 1280, scheme: str = "light", **options):
        path = pages / f"{page}.html" if isinstance(page, int) else page
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        view = context.new_page()
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        view.on("request", lambda request: request.url.startswith("file:") or errors.append(request.url))
        view.goto(path.as_uri())
        return view

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


LOOKS = list(itertools.product(WIDTHS, SCHEMES))


def unfold(view):
    """Unfold the first table, where there are several, and wait for its pictures."""
    if view.locator("details").count():
        view.locator("summary").first.click()
        view.locator("details").first.locator("svg").first.wait_for()


def read_axe():
    spec = importlib.util.find_spec("axe_playwright_python")
    return (Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text()


@pytest.mark.parametrize(("count", "is_packed"), [(1, False), (3, True)])
def test_axe_finds_nothing(show, tmp_path, monkeypatch, count, is_packed):
    """Of a page with few marks, which axe looks at one by one, for seconds."""
    if is_packed:
        monkeypatch.setattr("embpack.comparison.report.details._MOST_PLAIN", 0)
    page = tmp_path / "page.html"
    page.write_text(make_page(make_comparison(count, num_results=4)))
    for width, scheme in LOOKS:
        view = show(page, width, scheme)
        unfold(view)
        view.evaluate(read_axe())
        found = view.evaluate("axe.run()")
        assert [(rule["id"], [node["target"] for node in rule["nodes"]]) for rule in found["violations"]] == []
        assert len(found["passes"]) > 15


READ_CONTRASTS = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const ground = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = (color) => {
    const both = [luminance(color), ground].sort((a, b) => b - a);
    return (both[0] + 0.05) / (both[1] + 0.05);
  };
  const read = (selector, property) => [...document.querySelectorAll(selector)].map(
    (shape) => [shape.getAttribute("class"), contrast(getComputedStyle(shape)[property])]);
  return {texts: read("svg text", "fill"), marks: read("svg .best, svg .other, svg .bar", "fill"),
          lines: read("svg .front, svg .axis, svg .whisker, svg .median, svg .worst, svg .half", "stroke")};
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pictures_have_contrast(show, scheme):
    """That axe does not look at: text of SVG has a fill, no colour."""
    found = show(3, 1280, scheme).evaluate(READ_CONTRASTS)
    assert {kind for kind, _ in found["texts"]} >= {"caption", "caption end", "tick end", "label", "value", "group"}
    assert [each for each in found["texts"] if each[1] < LEAST_CONTRAST] == []
    assert [each for each in found["marks"] + found["lines"] if each[1] < LEAST_MARK_CONTRAST] == []


def test_many_tables_fit_into_a_megabyte(pages):
    assert (pages / "200.html").stat().st_size <= 1_000_000


LONG = "model.tower." + "averyveryverylongname" * 6 + ".weight"


def test_nothing_is_wider_than_a_phone_and_no_name_is_broken(show, tmp_path):
    odd = make_comparison(2)
    long = dataclasses.replace(odd.tables[0], name=LONG)
    odd = dataclasses.replace(odd, src=Path(f"{LONG}.safetensors"), tables=(long, odd.tables[1]), readers=("onnx",))
    (tmp_path / "long.html").write_text(make_page(odd))
    nothing = make_file(make_result(256.0, table=LONG), name=f"{LONG}.npy")
    (tmp_path / "nothing.html").write_text(make_page(nothing))
    for page in (*COUNTS, tmp_path / "long.html", tmp_path / "nothing.html"):
        view = show(page, WIDTHS[0])
        unfold(view)
        assert view.evaluate("document.documentElement.scrollWidth") <= WIDTHS[0], page
        # A word that is broken has a box on each of two lines.
        words = view.locator("th:visible, td:visible, code span:visible, svg text:visible")
        assert words.count() > 10
        broken = """words => words.filter(word => {
            const range = document.createRange();
            range.selectNodeContents(word);
            return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1;
        }).map(word => word.textContent)"""
        assert words.evaluate_all(broken) == []


def read_tip(view):
    tip = view.locator("#tip")
    return tip.inner_text() if tip.is_visible() else None


@pytest.mark.parametrize("width", WIDTHS)
def test_marks_say_what_they_are_at_the_keyboard(show, tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text(make_page(make_comparison(2, num_results=6)))
    view = show(page, width)
    unfold(view)
    for picture in view.locator("svg:visible").all():
        first = picture.locator(".mark[tabindex='0']")
        assert first.count() == 1
        first.focus()
        view.keyboard.press("Shift")  # the keyboard is in use: focus is to be seen
        told = []
        for _ in range(picture.locator(".mark").count()):
            focused = view.locator(":focus")
            assert read_tip(view) == focused.get_attribute("aria-label")
            assert focused.evaluate("mark => getComputedStyle(mark).outlineStyle") == "solid"
            told.append(read_tip(view))
            view.keyboard.press("ArrowRight")
        assert len(set(told)) == len(told) >= 3
        assert read_tip(view) == told[0]
        view.keyboard.press("ArrowLeft")
        assert read_tip(view) == told[-1]
        view.keyboard.press("Escape")
        assert read_tip(view) is None


def test_arrows_go_from_left_to_right(show):
    view = show(1)
    picture = view.locator("svg:visible").first
    picture.locator(".mark").last.focus()
    places = []
    for _ in range(picture.locator(".mark").count()):
        view.keyboard.press("ArrowRight")
        places.append(view.locator(":focus").bounding_box()["x"])
    assert places == pytest.approx(sorted(places), abs=1)


@pytest.mark.parametrize("width", WIDTHS)
def test_marks_say_what_they_are_on_a_tap_and_under_the_pointer(show, width):
    view = show(3, width, has_touch=True)
    marks = view.locator("svg:visible").first.locator(".mark")
    for mark in (marks.first, marks.last):
        mark.tap()
        told = read_tip(view)
        assert told is not None and " bits with " in told
        box = view.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0
    view.locator("h1").tap()
    assert read_tip(view) is None
    bar = view.locator(".bar:visible").first
    bar.hover()
    assert read_tip(view).startswith(bar.locator("xpath=..").locator("text").first.inner_html())
    view.locator("h2:visible").first.hover()
    assert read_tip(view) is None


@pytest.mark.parametrize("count", [3, 200])
def test_a_table_that_is_unfolded_has_its_pictures_and_figures(show, count):
    comparison = make_comparison(count)
    view = show(count)
    for place in (1, count - 1):
        table, details = comparison.tables[place], view.locator("details").nth(place)
        details.locator("summary").click()
        details.locator("svg").first.wait_for()
        assert details.locator("svg").count() == 2
        assert table.name in details.locator("svg").first.get_attribute("aria-label")
        rows = [row.split("\t") for row in details.locator("tbody").inner_text().splitlines()]
        by_size = sorted(table.results, key=lambda result: (result.bytes_per_row, result.loss))
        assert [row[2] for row in rows] == [f"{result.loss:.5f}" for result in by_size]


@pytest.mark.parametrize("count", [3, 200])
def test_without_scripts_the_figures_of_each_table_can_be_read(show, count):
    comparison = make_comparison(count)
    view = show(count, java_script_enabled=False)
    table, details = comparison.tables[-1], view.locator("details").last
    details.locator("summary").click()
    shown = details.locator("tbody").inner_text()
    assert [f"{result.loss:.5f}" in shown for result in comparison.find_front(table.results)].count(False) == 0


@pytest.mark.parametrize("count", COUNTS)
def test_on_paper_all_is_unfolded_and_light(show, count):
    view = show(count, scheme="dark")
    dark = view.evaluate("getComputedStyle(document.body).backgroundColor")
    view.emulate_media(media="print", color_scheme="dark")
    light = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark, light) == ("rgb(20, 23, 26)", "rgb(255, 255, 255)")
    tables = view.locator("details table")
    assert tables.count() == (0 if count == 1 else count)
    assert all(table.is_visible() for table in (tables.first, tables.last) if count > 1)
    assert view.locator(".wide").first.is_visible() and not view.locator(".narrow").first.is_visible()
    assert view.pdf(format="A4").startswith(b"%PDF")
    # What was opened to be printed is folded again.
    assert view.locator("details[open]").count() == 0


def test_commands_are_selected_whole_by_a_click(show):
    comparison = make_comparison(1)
    view = show(1)
    view.locator("code").first.click()
    assert view.evaluate("getSelection().toString()") == comparison.write_command(comparison.recommended)

"""Photographs pages of embpack compare, to be looked at: python -m tests.screenshots FOLDER.

Each page, of 1, 3 and 200 tables, on a phone and on a screen, light and dark, with the first table unfolded and a mark
in focus; and on paper, as PDF. Prints how long the page of 200 tables takes to open.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import SCHEMES, WIDTHS, make_comparison, open_browser

from embpack.comparison.report import make_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to put the pictures")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        for count in (3, 200):
            page = folder / f"{count}.html"
            page.write_text(make_page(make_comparison(count)))
            for width in WIDTHS:
                for scheme in SCHEMES:
                    _photograph(browser, page, width, scheme)
            _print(browser, page)


def _photograph(browser: Any, page: Path, width: int, scheme: str) -> None:
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view.goto(page.as_uri())
    time = view.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"{page.name} at {width} pixels, {scheme}: {page.stat().st_size:,} bytes, open in {time:.0f} ms")
    if view.locator("summary").count():
        view.locator("summary").first.click()
    mark = view.locator("svg:visible .mark[tabindex='0']").first
    mark.focus()
    view.keyboard.press("ArrowRight")
    view.screenshot(path=page.with_name(f"{page.stem}-{width}-{scheme}.png"), full_page=True)
    view.close()


def _print(browser: Any, page: Path) -> None:
    view = browser.new_page()
    view.goto(page.as_uri())
    view.pdf(path=page.with_suffix(".pdf"), format="A4")
    view.close()


if __name__ == "__main__":
    main()

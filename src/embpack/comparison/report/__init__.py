"""What embpack compare finds, as a page to look at, as a picture of it, and as rows for other programs."""

from embpack.comparison.report.own import is_report
from embpack.comparison.report.page import make_page
from embpack.comparison.report.pictures import make_png, make_svg, require_matplotlib
from embpack.comparison.report.rows import make_csv

__all__ = ["is_report", "make_csv", "make_page", "make_png", "make_svg", "require_matplotlib"]

"""What embpack compare finds, as a page to look at."""

from embpack.comparison.report.page import make_page

__all__ = ["make_page"]

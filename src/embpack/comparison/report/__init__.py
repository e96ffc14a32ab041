"""What embpack compare finds, as a page to look at."""

from embpack.comparison.report.page import is_page, make_page

__all__ = ["is_page", "make_page"]

"""How packed rows lie in memory (the bytes themselves: docs/format.md). LAYOUTS is the list of ways."""

from embpack.layouts.base import BITS, PARAM_BYTES, ArraySpec, Layout
from embpack.layouts.row_format import LAYOUTS, ROTATIONS, RowFormat

__all__ = ["BITS", "LAYOUTS", "PARAM_BYTES", "ROTATIONS", "ArraySpec", "Layout", "RowFormat"]

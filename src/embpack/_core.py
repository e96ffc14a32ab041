"""Loads the native core; imported before anything else of the package."""

import os

from embpack import _native

_isa = os.environ.get("EMBPACK_ISA")
if _isa and not _native.use_isa(_isa):
    raise ImportError(
        f"EMBPACK_ISA is {_isa!r}, which this CPU or build does not have; choose one of "
        f"{', '.join(_native.available_isas())}, or unset it"
    )

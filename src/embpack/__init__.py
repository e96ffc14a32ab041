"""Pack trained embedding tables to 4 bits a value, and look rows up straight from the packed bytes."""

from embpack import _core  # noqa: F401  (first: it says how the core is loaded)
from embpack.comparison.array import Comparison
from embpack.comparison.choice import Recommendation, recommend
from embpack.comparison.tables import compare
from embpack.convert import Report, quantize_file
from embpack.disk import DiskTable
from embpack.errors import FormatError, LossLimitError, MissingExtraError
from embpack.file_updates import FileUpdateReport, TableUpdate, update_file
from embpack.files import save
from embpack.group import TableGroup
from embpack.lookups import Table
from embpack.methods import METHODS, Method, parse_method
from embpack.packed_files import load
from embpack.packing import quantize
from embpack.planning import Plan, PlannedTable, plan
from embpack.readers import find_readers
from embpack.selection import select_variants
from embpack.shard_writer import TableReport
from embpack.table import PackedTable
from embpack.threads import get_num_threads, set_num_threads
from embpack.unpacking import dequantize_file
from embpack.updating import UpdateReport
from embpack.variant import Variant, parse_variant

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Comparison",
    "DiskTable",
    "FileUpdateReport",
    "FormatError",
    "LossLimitError",
    "Method",
    "MissingExtraError",
    "PackedTable",
    "Plan",
    "PlannedTable",
    "Recommendation",
    "Report",
    "Table",
    "TableGroup",
    "TableReport",
    "TableUpdate",
    "UpdateReport",
    "Variant",
    "compare",
    "dequantize_file",
    "find_readers",
    "get_num_threads",
    "load",
    "parse_method",
    "parse_variant",
    "plan",
    "quantize",
    "quantize_file",
    "recommend",
    "save",
    "select_variants",
    "set_num_threads",
    "update_file",
]

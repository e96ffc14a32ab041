"""Nodes of ONNX's standard operators that pool bags of packed rows."""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from embpack.bags import as_row, check_mode, check_weighted
from embpack.lookups import output_dtype
from embpack.onnx.graph import TableGraph, add_rotation, add_rows
from embpack.table import PackedTable

_EMPTY_BAG = {"sum": 0.0, "mean": 0.0, "max": -np.inf}
_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Bags:
    """Bags to pool, and how: build_bags' arguments."""

    mode: str
    indices: str
    offsets: str | None
    weights: str | None = None
    include_last_offset: bool = False
    padding_idx: int | None = None
    dtype: str = "float32"

    @property
    def has_end(self) -> bool:
        """Whether the last offset is where the last bag ends."""
        return self.include_last_offset and self.offsets is not None


def build_bags(
    table: PackedTable,
    mode: str,
    inputs: tuple[str, str | None, str | None] = ("indices", "offsets", None),
    output: str = "values",
    *,
    prefix: str = "",
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: str = "float32",
) -> TableGraph:
    """Make the nodes that pool bags of rows, as table.embedding_bag(indices, offsets, mode, weights) does.

    No standard operator can refuse offsets. Where table.embedding_bag raises, indices before the first offset or after
    the last one of include_last_offset are left out, and what a mean is divided by may be wrong.

    Args:
        table: N rows, embedding_dim d; its bytes become the initializers, not copied.
        mode: "sum", "mean" or "max".
        inputs: names of indices, int64 or int32 [L], of offsets, int64 or int32 [B], and of weights, float32 [L], or
            None for none. Without offsets, None, indices are [B, n] and each row is a bag; weights are [B, n] then.
        output: name for the values [B, d].
        prefix: of all other names.
        include_last_offset: whether offsets, if there are any, are [B + 1], the last one being where the last bag ends.
        padding_idx: rows of this index are left out, of a mean's count too; negative counts from the end.
        dtype: of the values: "float32", or "float16" or "bfloat16", to which the float32 sums are rounded as by
            table.embedding_bag.

    Raises:
        ValueError: there is no such mode, dtype or row, or the mode takes no weights.

    Source: torch.nn.functional.embedding_bag.
    """
    graph = TableGraph(prefix)
    bags = Bags(mode, *inputs, include_last_offset=include_last_offset, padding_idx=padding_idx, dtype=dtype)
    add_bags(graph, table, bags, output)
    return graph


def add_bags(graph: TableGraph, table: PackedTable, bags: Bags, output: str) -> None:
    """Add build_bags' nodes to a graph of the same table."""
    check_mode(bags.mode)
    if bags.weights is not None:
        check_weighted(bags.mode)
    output_dtype(bags.dtype)
    indices, offsets, weights = add_flat(graph, bags)
    rows = add_rows(graph, table, indices)
    if bags.mode == "max":
        rows = add_rotation(graph, table, rows)
    if weights is not None:
        rows = graph.add("Mul", rows, graph.add("Unsqueeze", weights, graph.constant([1])), name="weighted")
    num_indices = graph.add("Shape", indices, name="num_indices")
    numbers = _add_bag_numbers(graph, offsets, num_indices)
    if bags.padding_idx is not None:
        numbers = _add_padding(graph, table, (indices, numbers), bags.padding_idx)
    pooled = _add_pooled(graph, table.embedding_dim, (rows, numbers, offsets), bags.mode)
    pooled = graph.add("Slice", pooled, *_bounds(graph, 1, -1 if bags.has_end else _TO_THE_END))
    if bags.mode != "max":
        pooled = add_rotation(graph, table, pooled)  # once a bag: a sum of rotated rows is the rotated sum
    if bags.mode == "sum":
        graph.add_result("Identity", pooled, output=output, dtype=bags.dtype)
        return
    if bags.padding_idx is None:
        counts = _add_lengths(graph, bags, offsets, num_indices)
    else:
        counts = _add_counts(graph, bags, offsets, numbers)
    _add_result(graph, bags, (pooled, counts), output)


def add_flat(graph: TableGraph, bags: Bags) -> tuple[str, str, str | None]:
    """Make indices and weights 1-D and offsets int64; those of rows of 2-D indices are multiples of a row's length."""
    indices, offsets, weights = bags.indices, bags.offsets, bags.weights
    if offsets is not None:
        return indices, graph.add("Cast", offsets, to=TensorProto.INT64), weights
    shape = graph.add("Shape", indices)
    num_bags, bag_size = (graph.add("Gather", shape, graph.constant(axis), axis=0) for axis in (0, 1))
    numbers = graph.add("Range", graph.constant(0), num_bags, graph.constant(1))
    offsets = graph.add("Mul", numbers, bag_size, name="offsets")
    flat = graph.constant([-1])
    indices = graph.add("Reshape", indices, flat, name="flat")
    return indices, offsets, weights and graph.add("Reshape", weights, flat)


def _add_bag_numbers(graph: TableGraph, offsets: str, num_indices: str) -> str:
    """Number the bag of each index, int64 [L]: how many bags start at it or before, so the first bag is 1."""
    one_more = graph.add("Add", num_indices, graph.constant([1]))
    zeros = graph.add("ConstantOfShape", one_more, value=numpy_helper.from_array(np.zeros(1, np.int64)))
    ones = _add_ones(graph, offsets)
    # An empty last bag starts after the last index: hence one more.
    starts = graph.add("ScatterElements", zeros, offsets, ones, axis=0, reduction="add", name="starts")
    numbers = graph.add("CumSum", starts, graph.constant(0))
    return graph.add("Slice", numbers, graph.constant([0]), num_indices, graph.constant([0]), name="bags")


def _add_ones(graph: TableGraph, like: str) -> str:
    return graph.add("ConstantOfShape", graph.add("Shape", like), value=numpy_helper.from_array(np.ones(1, np.int64)))


def _add_padding(graph: TableGraph, table: PackedTable, values: tuple[str, str], padding_idx: int) -> str:
    """Move indices of the padding row to bag 0, which is cut off; negative ones that name the row, too."""
    indices, numbers = values
    rows = graph.add("Mod", graph.add("Cast", indices, to=TensorProto.INT64), graph.constant([table.num_embeddings]))
    is_padding = graph.add("Equal", rows, graph.constant([as_row(padding_idx, table.num_embeddings)]))
    return graph.add("Where", is_padding, graph.constant([0]), numbers, name="bags_without_padding")


def _add_pooled(graph: TableGraph, embedding_dim: int, values: tuple[str, str, str], mode: str) -> str:
    """Sum rows [L, d] of equal bag numbers, or find their largest: float32 [1 + offsets, d].

    Rows before the first bag go to a bag 0 that is to be cut off: a negative index would put them into the last one. If
    offsets are right, there are none. ScatterND, which needs no targets as large as the rows, would be faster, but ONNX
    Runtime has several threads add to one bag at once, and loses rows.
    """
    rows, numbers, offsets = values
    one_more = graph.add("Add", graph.add("Shape", offsets), graph.constant([1]))
    shape = graph.add("Concat", one_more, graph.constant([embedding_dim]), axis=0)
    empty = numpy_helper.from_array(np.array([_EMPTY_BAG[mode]], np.float32))
    start = graph.add("ConstantOfShape", shape, value=empty)
    column = graph.add("Unsqueeze", numbers, graph.constant([1]))
    targets = graph.add("Expand", column, graph.add("Shape", rows))
    reduction = "max" if mode == "max" else "add"
    return graph.add("ScatterElements", start, targets, rows, axis=0, reduction=reduction, name="pooled")


def _bounds(graph: TableGraph, start: int, end: int) -> tuple[str, str, str]:
    """Starts, ends and axes of a slice of axis 0."""
    return graph.constant([start]), graph.constant([end]), graph.constant([0])


def _add_lengths(graph: TableGraph, bags: Bags, offsets: str, num_indices: str) -> str:
    """From each bag's start to the next one's, int64 [B]."""
    bounds = offsets if bags.has_end else graph.add("Concat", offsets, num_indices, axis=0)
    ends = graph.add("Slice", bounds, *_bounds(graph, 1, _TO_THE_END), name="ends")
    starts = graph.add("Slice", offsets, *_bounds(graph, 0, -1), name="first") if bags.has_end else offsets
    return graph.add("Sub", ends, starts)


def _add_counts(graph: TableGraph, bags: Bags, offsets: str, numbers: str) -> str:
    """How often each bag's number is there, int64 [B]."""
    one_more = graph.add("Add", graph.add("Shape", offsets), graph.constant([1]))
    zeros = graph.add("ConstantOfShape", one_more, value=numpy_helper.from_array(np.zeros(1, np.int64)))
    ones = _add_ones(graph, numbers)
    counts = graph.add("ScatterElements", zeros, numbers, ones, axis=0, reduction="add", name="num_rows")
    return graph.add("Slice", counts, *_bounds(graph, 1, -1 if bags.has_end else _TO_THE_END))


def _add_result(graph: TableGraph, bags: Bags, values: tuple[str, str], output: str) -> None:
    """Divide sums by counts, or put zeros where no row has been for a maximum."""
    pooled, counts = values
    counts = graph.add("Unsqueeze", counts, graph.constant([1]), name="counts")
    if bags.mode == "max":
        is_empty = graph.add("Equal", counts, graph.constant([0]))
        zero = graph.constant([0], np.float32)
        graph.add_result("Where", is_empty, zero, pooled, output=output, dtype=bags.dtype)
    else:
        divisor = graph.add("Cast", graph.add("Max", counts, graph.constant([1])), to=TensorProto.FLOAT)
        graph.add_result("Div", pooled, divisor, output=output, dtype=bags.dtype)

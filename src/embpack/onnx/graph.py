"""Nodes of ONNX's standard operators that look packed rows up, for a model of their own or a part of another."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embpack.table import MODES, PackedTable

# The first one with BitwiseAnd, and with a ScatterElements that finds the largest.
OPSET = 18
_PARAM_TYPES = {"float16": "<f2", "float32": "<f4"}
_CHUNK_ROWS = 1 << 20
_EMPTY_BAG = {"sum": 0.0, "mean": 0.0, "max": -np.inf}


@dataclass
class TableGraph:
    """A part of an ONNX graph, of operator set OPSET and later.

    Attributes:
        prefix: of the names of all nodes, initializers and values in between, to tell one table's from another's.
        nodes: in an order in which they can be run.
        initializers: the table's own bytes by name, uint8, uint16, float16 or float32: views of the table, which need
            not be contiguous.
        constants: small initializers beside them, such as shapes, by name.
    """

    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, NDArray[Any]] = field(default_factory=dict)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, name: str = "", output: str = "", **attributes: Any) -> str:
        """Add a node with one output; return the output's name, the node's own unless output says another."""
        name = f"{self.prefix}{name or op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output or name], name, **attributes))
        return output or name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """Add a small initializer, once for all uses of it."""
        array = np.array(values, dtype)
        name = f"{self.prefix}{array.dtype}{array.tolist()}".replace(" ", "")
        self.constants[name] = array
        return name

    def initializer(self, name: str, array: NDArray[Any]) -> str:
        """Add an array of the table."""
        self.initializers[self.prefix + name] = array
        return self.prefix + name


def build_gather(
    table: PackedTable, indices: str = "indices", output: str = "values", *, prefix: str = ""
) -> TableGraph:
    """Make the nodes that look rows up, as table[indices] does, to the bit.

    Args:
        table: N rows, embedding_dim d; its bytes become the initializers, not copied.
        indices: name of a value, int64 or int32 of any shape [...], each in [-N, N); negative ones count from the end.
        output: name for the float32 [..., d].
        prefix: of all other names.
    """
    graph = TableGraph(prefix)
    flat = graph.add("Reshape", indices, graph.constant([-1]), name="flat")
    rows = _add_rows(graph, table, flat)
    shape = graph.add("Concat", graph.add("Shape", indices), graph.constant([table.embedding_dim]), axis=0)
    graph.add("Reshape", rows, shape, output=output, allowzero=1)
    return graph


def build_bags(
    table: PackedTable,
    mode: str,
    inputs: tuple[str, str, str | None] = ("indices", "offsets", None),
    output: str = "values",
    *,
    prefix: str = "",
) -> TableGraph:
    """Make the nodes that pool bags of rows, as table.embedding_bag(indices, offsets, mode, weights) does.

    Args:
        table: N rows, embedding_dim d; its bytes become the initializers, not copied.
        mode: "sum", "mean" or "max".
        inputs: names of indices, int64 [L], of offsets, int64 [B], and of weights, float32 [L], or None for none.
        output: name for the float32 [B, d].
        prefix: of all other names.

    Raises:
        ValueError: there is no such mode, or it takes no weights.

    Source: torch.nn.functional.embedding_bag.
    """
    indices, offsets, weights = inputs
    check_mode(mode, has_weights=weights is not None)
    graph = TableGraph(prefix)
    rows = _add_rows(graph, table, indices)
    if weights is not None:
        rows = graph.add("Mul", rows, graph.add("Unsqueeze", weights, graph.constant([1])), name="weighted")
    num_indices = graph.add("Shape", indices, name="num_indices")
    bags = _add_bag_numbers(graph, offsets, num_indices)
    pooled = _add_pooled(graph, table.embedding_dim, (rows, bags, offsets), mode)
    if mode == "sum":
        graph.add("Identity", pooled, output=output)
        return graph
    ends = graph.add("Slice", graph.add("Concat", offsets, num_indices, axis=0), *_from_one_on(graph), name="ends")
    counts = graph.add("Unsqueeze", graph.add("Sub", ends, offsets), graph.constant([1]), name="counts")
    if mode == "max":
        is_empty = graph.add("Equal", counts, graph.constant([0]))
        graph.add("Where", is_empty, graph.constant([0], np.float32), pooled, output=output)
    else:
        divisor = graph.add("Max", counts, graph.constant([1]))
        graph.add("Div", pooled, graph.add("Cast", divisor, to=TensorProto.FLOAT), output=output)
    return graph


def check_mode(mode: Any, *, has_weights: bool) -> None:
    """Refuse a mode that there is not, and weights where they have no meaning.

    Raises:
        ValueError: as said.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}, or None for single rows")
    if has_weights and mode != "sum":
        raise ValueError(f"per_sample_weights go with mode 'sum' only, not {mode!r}")


def _add_rows(graph: TableGraph, table: PackedTable, indices: str) -> str:
    """Look rows up: indices [L] to float32 [L, d]."""
    codes = _add_codes(graph, table, indices)
    if table.layout == "uniform":
        return _add_levels(graph, table, codes, _add_gather(graph, "params", _params(table), indices))
    if table.layout == "codebook":
        codebooks = _add_gather(graph, "codebooks", _params(table), indices)
    else:
        assert table.clusters is not None and table.codebooks is not None
        clusters = _add_gather(graph, "clusters", table.clusters, indices)
        codebooks = _add_gather(graph, "codebooks", table.codebooks, graph.add("Cast", clusters, to=TensorProto.INT64))
    numbers = graph.add("Cast", codes, to=TensorProto.INT32)
    values = graph.add("GatherElements", codebooks, numbers, axis=1, name="levels")
    return graph.add("Cast", values, to=TensorProto.FLOAT)


def _params(table: PackedTable) -> NDArray[Any]:
    """What follows the codes of a row: [num_embeddings, 2 or 2^bits] of the parameter type, a view."""
    return table.packed[:, table.row_format.code_bytes :].view(_PARAM_TYPES[table.row_format.param_dtype])


def _add_gather(graph: TableGraph, name: str, array: NDArray[Any], indices: str) -> str:
    return graph.add("Gather", graph.initializer(name, array), indices, axis=0, name=f"{name}_of_rows")


def _add_codes(graph: TableGraph, table: PackedTable, indices: str) -> str:
    """Look codes up and unpack them: uint8 [L, d]."""
    row_format = table.row_format
    packed = _add_gather(graph, "codes", table.packed[:, : row_format.code_bytes], indices)
    per_byte = 8 // row_format.bits
    if per_byte == 1:
        return packed
    mask, last_axis = graph.constant([row_format.num_levels - 1], np.uint8), graph.constant([2])
    # Whole arrays by one number each, then interleaved: broadcasting the shifts takes ONNX Runtime four times as long.
    parts = []
    for shift in range(0, 8, row_format.bits):
        shifted = graph.add("BitShift", packed, graph.constant([shift], np.uint8), direction="RIGHT")
        parts.append(graph.add("Unsqueeze", graph.add("BitwiseAnd", shifted, mask), last_axis))
    codes = graph.add("Concat", *parts, axis=2)
    width = row_format.code_bytes * per_byte
    codes = graph.add("Reshape", codes, graph.constant([-1, width]))
    if width == table.embedding_dim:
        return codes
    ends = graph.constant([table.embedding_dim])
    return graph.add("Slice", codes, graph.constant([0]), ends, graph.constant([1]), name="without_padding")


def _add_levels(graph: TableGraph, table: PackedTable, codes: str, params: str) -> str:
    """Levels of codes, fma(scale, code, bias) rounded once: codes [L, d] and params [L, 2] to float32 [L, d].

    With float16 parameters scale * code has 19 bits and is exact in float32: the addition is all that rounds. With
    float32 ones it has 32 bits and is exact in float64, and as a rule the sum is too, and the last cast rounds.
    """
    real = TensorProto.FLOAT if table.row_format.has_f16_params else TensorProto.DOUBLE
    wide = graph.add("Cast", params, to=real, name="params")
    scale, bias = (
        graph.add("Slice", wide, *(graph.constant([value]) for value in (column, column + 1, 1)), name=name)
        for column, name in enumerate(("scale", "bias"))
    )
    product = graph.add("Mul", scale, graph.add("Cast", codes, to=real), name="product")
    if table.row_format.has_f16_params:
        return graph.add("Add", product, bias)
    if have_exact_sums(_params(table), table.bits):
        return graph.add("Cast", graph.add("Add", product, bias), to=TensorProto.FLOAT)
    return _add_sum_rounded_once(graph, product, bias)


def have_exact_sums(params: NDArray[np.float32], bits: int) -> bool:
    """Whether scale * code + bias is exact in float64, whatever the code, for all rows of params [N, 2].

    For scale < 2^a and bias < 2^b, of 24 bits each, the sum is less than 2^(max(a + bits, b) + 1) and a multiple of
    2^(min(a, b) - 24); float64 has 53 bits, so 28 are left. Rows of packed weights rarely have scale and bias farther
    apart: those of few float32 spacings far from zero do.
    """
    for start in range(0, len(params), _CHUNK_ROWS):
        chunk = params[start : start + _CHUNK_ROWS]
        with np.errstate(invalid="ignore"):  # NaN, which other packers let pass
            _, exponents = np.frexp(chunk[(chunk != 0).all(axis=1)])
        of_scale, of_bias = exponents.T
        if (np.maximum(of_scale + bits, of_bias) - np.minimum(of_scale, of_bias) > 28).any():
            return False
    return True


def _add_sum_rounded_once(graph: TableGraph, product: str, bias: str) -> str:
    """Add float64 values that each come from float32, and round once, to float32.

    The sum is total + error exactly (Knuth's TwoSum). Rounding to float32 changes its answer only at numbers of 25
    bits: float32 numbers and what is half way between. So of the sum it is enough to know a number of 25 bits next to
    it, `near` (Veltkamp's splitting), and on which side of that it lies: the sign of (total - near) + error, whose
    first term is 0 or larger than the second. A step of 2^-40 to that side passes no other number of 25 bits. Below
    float32's normal range all numbers are multiples of its smallest, and nothing is ever rounded.
    """
    add = graph.add

    def number(value: float) -> str:
        return graph.constant([value], np.float64)

    total = add("Add", product, bias, name="total")
    of_bias = add("Sub", total, product)
    of_product = add("Sub", total, of_bias)
    error = add("Add", add("Sub", product, of_product), add("Sub", bias, of_bias), name="error")
    spread = add("Mul", total, number(2.0**28 + 1))
    near = add("Sub", spread, add("Sub", spread, total), name="near")
    beyond = add("Add", add("Sub", total, near), error, name="beyond")
    # Times near: the sign is for a step away from zero. As a factor the step leaves the sign of a zero alone.
    side = add("Sign", add("Mul", beyond, near), name="side")
    step = add("Add", add("Mul", side, number(2.0**-40)), number(1.0), name="step")
    moved = add("Mul", near, step, name="moved")
    # Of infinite parameters, which other packers let pass, the splitting would make NaN.
    return add("Cast", add("Where", add("IsInf", total), total, moved), to=TensorProto.FLOAT)


def _from_one_on(graph: TableGraph) -> tuple[str, str, str]:
    """Starts, ends and axes of a slice without the first element of axis 0."""
    return graph.constant([1]), graph.constant([np.iinfo(np.int64).max]), graph.constant([0])


def _add_bag_numbers(graph: TableGraph, offsets: str, num_indices: str) -> str:
    """Number the bag of each index, int64 [L]: how many bags start at it or before, so the first bag is 1."""
    one_more = graph.add("Add", num_indices, graph.constant([1]))
    zeros = graph.add("ConstantOfShape", one_more, value=numpy_helper.from_array(np.zeros(1, np.int64)))
    ones = graph.add(
        "ConstantOfShape", graph.add("Shape", offsets), value=numpy_helper.from_array(np.ones(1, np.int64))
    )
    # An empty last bag starts after the last index: hence one more.
    starts = graph.add("ScatterElements", zeros, offsets, ones, axis=0, reduction="add", name="starts")
    numbers = graph.add("CumSum", starts, graph.constant(0))
    return graph.add("Slice", numbers, graph.constant([0]), num_indices, graph.constant([0]), name="bags")


def _add_pooled(graph: TableGraph, embedding_dim: int, values: tuple[str, str, str], mode: str) -> str:
    """Sum rows [L, d] of equal bag numbers, or find their largest: float32 [B, d].

    Rows before the first bag, which there are none of if offsets are right, go to a bag 0 that is cut off: a negative
    index would put them into the last one. ScatterND, without targets as large as the rows, would be quicker, but ONNX
    Runtime has several threads add to one bag at once, and loses rows.
    """
    rows, bags, offsets = values
    one_more = graph.add("Add", graph.add("Shape", offsets), graph.constant([1]))
    shape = graph.add("Concat", one_more, graph.constant([embedding_dim]), axis=0)
    empty = numpy_helper.from_array(np.array([_EMPTY_BAG[mode]], np.float32))
    start = graph.add("ConstantOfShape", shape, value=empty)
    column = graph.add("Unsqueeze", bags, graph.constant([1]))
    targets = graph.add("Expand", column, graph.add("Shape", rows))
    reduction = "max" if mode == "max" else "add"
    pooled = graph.add("ScatterElements", start, targets, rows, axis=0, reduction=reduction, name="pooled")
    return graph.add("Slice", pooled, *_from_one_on(graph))

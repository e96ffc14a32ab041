"""Nodes of ONNX's standard operators that look packed rows up, for a model of their own or a part of another."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embpack.lookups import output_dtype
from embpack.readers import explain_unread
from embpack.rotation import matrix
from embpack.rows import LARGEST
from embpack.table import PackedTable

# The first operator set with BitwiseAnd, and with a ScatterElements that finds the largest.
OPSET = 18
_PARAM_TYPES = {"float16": "<f2", "float32": "<f4"}
# Of values, by embpack.table's names.
_VALUE_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_CHUNK_ROWS = 1 << 20


@dataclass
class TableGraph:
    """A part of an ONNX graph, of operator set OPSET and later.

    Attributes:
        prefix: of the names of all nodes, initializers and values in between, to tell one table's from another's.
        nodes: in an order in which they can be run.
        initializers: the table's own bytes by name, uint8, uint16, float16 or float32: views of the table, which need
            not be contiguous; of a rotated one also the matrix that undoes it.
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

    def add_result(self, op: str, *inputs: str, output: str, dtype: str) -> None:
        """Add a node that makes float32, and a cast if dtype is another type, so that output names the last value."""
        if dtype == "float32":
            self.add(op, *inputs, output=output)
        else:
            self.add_cast(self.add(op, *inputs), dtype, output)

    def add_cast(self, values: str, dtype: str, output: str = "") -> str:
        """Round float32 to float16 or bfloat16; finite values that it cannot hold become its largest."""
        largest, infinity = LARGEST[dtype], self.constant(np.inf, np.float32)
        clipped = self.add("Clip", values, self.constant(-largest, np.float32), self.constant(largest, np.float32))
        is_finite = self.add("Less", self.add("Abs", values), infinity)
        return self.add("Cast", self.add("Where", is_finite, clipped, values), output=output, to=_VALUE_TYPES[dtype])

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
    table: PackedTable,
    indices: str = "indices",
    output: str = "values",
    *,
    prefix: str = "",
    dtype: str = "float32",
) -> TableGraph:
    """Make the nodes that look rows up, as table[indices] does, to the bit if the table is not rotated.

    Args:
        table: N rows, embedding_dim d; its bytes become the initializers, not copied.
        indices: name of a value, int64 or int32 of any shape [...], each in [-N, N); negative ones count from the end.
        output: name for the values [..., d].
        prefix: of all other names.
        dtype: of the values: "float32", or "float16" or "bfloat16", to which float32 is rounded as by table.gather.

    Raises:
        ValueError: there is no such dtype.
    """
    graph = TableGraph(prefix)
    add_gather(graph, table, indices, output, dtype)
    return graph


def add_gather(graph: TableGraph, table: PackedTable, indices: str, output: str, dtype: str) -> None:
    """Add build_gather's nodes to a graph of the same table."""
    output_dtype(dtype)
    flat = graph.add("Reshape", indices, graph.constant([-1]), name="flat")
    rows = add_rotation(graph, table, add_rows(graph, table, flat))
    if dtype != "float32":
        rows = graph.add_cast(rows, dtype)
    shape = graph.add("Concat", graph.add("Shape", indices), graph.constant([table.embedding_dim]), axis=0)
    graph.add("Reshape", rows, shape, output=output, allowzero=1)


def add_rows(graph: TableGraph, table: PackedTable, indices: str) -> str:
    """Look rows up as they were packed: indices [L] to float32 [L, d]."""
    reason = explain_unread(table.row_format, "onnx")
    if reason is not None:
        raise ValueError(f"the table {reason}")
    return _ADD_ROWS[table.layout](graph, table, indices)


def _add_uniform_rows(graph: TableGraph, table: PackedTable, indices: str) -> str:
    codes = _add_codes(graph, table, indices)
    return _add_levels(graph, table, codes, _add_gather(graph, "params", _params(table), indices))


def _add_codebook_rows(graph: TableGraph, table: PackedTable, indices: str) -> str:
    codes = _add_codes(graph, table, indices)
    return _add_choice(graph, codes, _add_gather(graph, "codebooks", _params(table), indices))


def _add_clustered_rows(graph: TableGraph, table: PackedTable, indices: str) -> str:
    assert table.clusters is not None and table.codebooks is not None
    codes = _add_codes(graph, table, indices)
    clusters = _add_gather(graph, "clusters", table.clusters, indices)
    numbers = graph.add("Cast", clusters, to=TensorProto.INT64)
    return _add_choice(graph, codes, _add_gather(graph, "codebooks", table.codebooks, numbers))


# By layout: those that embpack.readers names.
_ADD_ROWS = {"uniform": _add_uniform_rows, "codebook": _add_codebook_rows, "clustered": _add_clustered_rows}


def _add_choice(graph: TableGraph, codes: str, codebooks: str) -> str:
    """Choose from codebooks [L, 2^bits] by codes [L, d]: float32 [L, d]."""
    numbers = graph.add("Cast", codes, to=TensorProto.INT32)
    values = graph.add("GatherElements", codebooks, numbers, axis=1, name="levels")
    return graph.add("Cast", values, to=TensorProto.FLOAT)


def add_rotation(graph: TableGraph, table: PackedTable, values: str) -> str:
    """Rotate values of rows back, float32 [.., d]; themselves if the table is not rotated."""
    if table.rotation is None:
        return values
    back = graph.initializer("rotation", matrix(table.embedding_dim).T)
    return graph.add("MatMul", values, back, name="rotated_back")


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
    # Shifts whole arrays by one number each, and interleaves the results: broadcasting shifts takes ONNX Runtime four
    # times as long.
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

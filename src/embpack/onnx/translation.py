"""PyTorch models as ONNX graphs: torch.onnx.export puts a placeholder for each lookup, and nodes replace those."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from embpack.onnx.bags import Bags, add_bags
from embpack.onnx.features import Features
from embpack.onnx.graph import OPSET, TableGraph, add_gather
from embpack.table import PackedTable
from embpack.torch.collection_ops import Group, read_tables
from embpack.torch.ops import as_table
from embpack.torch.private import argument_names

# Of placeholders; none is left in a model.
_DOMAIN = "embpack"
_TENSOR_TYPES = ("uint8", "int32", "int64", "float", "float16", "bfloat16")
_DTYPE_NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
# Smaller initializers, such as shapes, stay with the nodes: tools want to see them there.
_SMALL_BYTES = 1024


class Tables:
    """The tables of a model, each with the part of the graph that looks its rows up.

    Attributes:
        nodes: of all parts, in an order in which they can be run.
    """

    def __init__(self, initializers: Mapping[str, NDArray[Any]]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        # Of no table.
        self.common = TableGraph("embpack.", self.nodes)
        self._initializers = initializers
        self._parts: dict[Any, tuple[TableGraph, PackedTable]] = {}

    def find(
        self, packed: str, row_format: str, clusters: str | None = None, codebooks: str | None = None
    ) -> tuple[TableGraph, PackedTable]:
        """Return the part for a table and the table, given an operator's arguments; the same for the same memory."""
        arrays = [None if name is None else self._read(name) for name in (packed, clusters, codebooks)]
        key = (row_format, *(array is not None and (array.ctypes.data, array.shape) for array in arrays))
        if key not in self._parts:
            rows, *shared = (None if array is None else torch.from_numpy(array) for array in arrays)
            assert rows is not None
            # With one list of nodes, whose length is in the names, all parts have names of their own.
            self._parts[key] = (TableGraph(f"{packed}.", self.nodes), as_table(rows, row_format, *shared))
        return self._parts[key]

    def collect(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the tables' initializers and the small ones beside them."""
        initializers, constants = {}, dict(self.common.constants)
        for part, _ in self._parts.values():
            initializers.update(part.initializers)
            constants.update(part.constants)
        return initializers, constants

    def _read(self, name: str) -> NDArray[Any]:
        if name not in self._initializers:
            raise ValueError(
                f"the table's tensor {name} is an input of the model or computed in it; make it a buffer, as "
                "embpack.torch.PackedEmbedding does"
            )
        return self._initializers[name]


Arguments = Mapping[str, Any]


def _find(tables: Tables, arguments: Arguments) -> tuple[TableGraph, PackedTable]:
    shared = (arguments.get("clusters"), arguments.get("codebooks"))
    return tables.find(arguments["packed"], arguments["row_format"], *shared)


def _translate_embedding(tables: Tables, arguments: Arguments, output: str) -> None:
    """Replace embpack::embedding."""
    graph, table = _find(tables, arguments)
    add_gather(graph, table, arguments["indices"], output, _dtype(arguments))


def _translate_bags(tables: Tables, arguments: Arguments, output: str) -> None:
    """Replace embpack::embedding_bag and embpack::embedding_bag.weighted."""
    graph, table = _find(tables, arguments)
    bags = Bags(
        arguments.get("mode", "sum"),
        arguments["indices"],
        arguments["offsets"],
        arguments.get("per_sample_weights"),
        include_last_offset=arguments.get("include_last_offset", False),
        padding_idx=arguments.get("padding_idx"),
        dtype=_dtype(arguments),
    )
    add_bags(graph, table, bags, output)


def _translate_collection(tables: Tables, arguments: Arguments, output: str) -> None:
    """Replace embpack::embedding_bag_collection and embpack::embedding_bag_collection.weighted."""
    group = Group(*(arguments[name] for name in Group._fields))
    dtype, include_last = _dtype(arguments), arguments.get("include_last_offset", False)
    bags = Bags("sum", arguments["indices"], arguments["offsets"], arguments.get("per_sample_weights"), include_last)
    features = Features(tables.common, bags, group.num_features)
    uses, _, table_of, *_ = read_tables(group.tables)
    of_tables = list(group.table_arguments())
    pooled: list[str] = []
    for table, feature in zip(table_of, group.feature_of, strict=True):
        graph, rows = tables.find(*of_tables[table])
        padding_idx = None if uses[table].padding_index == -1 else uses[table].padding_index
        of_feature = replace(features.split(feature), mode=uses[table].mode, padding_idx=padding_idx, dtype=dtype)
        pooled.append(f"{output}.{len(pooled)}")
        add_bags(graph, rows, of_feature, pooled[-1])
    tables.common.add("Concat", *pooled, axis=1, output=output)


def _dtype(arguments: Arguments) -> str:
    """The operator's dtype as embpack.table names it; one that it does not take, as ONNX does."""
    dtype = arguments.get("dtype")
    return _DTYPE_NAMES.get(TensorProto.FLOAT if dtype is None else dtype, str(dtype))


# What replaces a lookup, given its operator's arguments by name; tensors are names of values, lists of them lists.
OPERATORS: dict[Any, Callable[[Tables, Arguments, str], None]] = {
    torch.ops.embpack.embedding.default: _translate_embedding,
    torch.ops.embpack.embedding_bag.default: _translate_bags,
    torch.ops.embpack.embedding_bag.weighted: _translate_bags,
    torch.ops.embpack.embedding_bag_collection.default: _translate_collection,
    torch.ops.embpack.embedding_bag_collection.weighted: _translate_collection,
}


@dataclass(frozen=True)
class _Input:
    """Stands for a tensor among a call's arguments: an input of its placeholder."""

    number: int


@dataclass(frozen=True)
class _Call:
    """A call of an operator."""

    operator: Any
    arguments: dict[str, Any]

    def expand(self, tables: Tables, node: onnx.NodeProto) -> None:
        """Add the nodes that replace the call's placeholder."""
        arguments = {
            name: _replace(value, _Input, lambda at: node.input[at.number]) for name, value in self.arguments.items()
        }
        OPERATORS[self.operator](tables, arguments, node.output[0])


def check_model(model: Any) -> None:
    """Raise TypeError if a model is none of PyTorch's."""
    if isinstance(model, PackedTable):
        raise TypeError("model is a PackedTable; embpack.onnx.export writes a table")
    if not isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module or an ExportedProgram")


def translate_model(
    model: Any, args: tuple[Any, ...], **options: Any
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Make an ONNX model without its large initializers, and those.

    Args:
        model: with lookups in packed embeddings.
        args: example inputs.
        **options: others that torch.onnx.export takes.

    Raises:
        ValueError: there are no lookups, or a table is no buffer of the model.
    """
    calls: list[_Call] = []
    program = _export(model, args, calls, **options)
    if not calls:
        raise ValueError(
            "the model looks nothing up in packed embeddings; pack them first, embpack.torch.quantize_(model), or "
            "write it as it is: torch.onnx.export"
        )
    initializers = {name: value.const_value.numpy() for name, value in program.graph.initializers.items()}
    program.graph.initializers.clear()
    translated = onnx_ir.to_proto(program)
    tables = Tables(initializers)
    _expand(translated.graph, calls, tables)
    _remove_domain(translated)
    of_tables, constants = tables.collect()
    used = _find_used(translated.graph)  # a table's own tensors no longer are
    initializers = {name: array for name, array in initializers.items() if name in used}
    small = {name: array for name, array in initializers.items() if array.nbytes <= _SMALL_BYTES}
    for name, array in (small | constants).items():
        translated.graph.initializer.append(numpy_helper.from_array(array, name))
    large = {name: array for name, array in initializers.items() if name not in small}
    return translated, large | of_tables


def _export(model: Any, args: tuple[Any, ...], calls: list[_Call], **options: Any) -> Any:
    """Have PyTorch export a model with placeholders, whose calls are added to a list."""
    program = torch.onnx.export(
        model,
        args,
        verbose=False,
        opset_version=OPSET,
        custom_translation_table={operator: _make_translator(operator, calls) for operator in OPERATORS},
        **options,
    )
    assert program is not None
    return program.model


def _make_translator(operator: Any, calls: list[_Call]) -> Callable[..., Any]:
    """Make the function that PyTorch's exporter calls with the arguments of an operator."""
    names = argument_names(operator)

    def translate(*values: Any, **options: Any) -> Any:
        tensors: list[Any] = []

        def number(tensor: Any) -> _Input:
            tensors.append(tensor)
            return _Input(len(tensors) - 1)

        arguments = dict(zip(names, values, strict=False)) | options
        arguments = {name: _replace(value, onnx_ir.Value, number) for name, value in arguments.items()}
        calls.append(_Call(operator, arguments))
        return _placeholder(*tensors, number=len(calls) - 1)

    return translate


def _make_placeholder() -> Any:
    """Make an operator of any number of tensors, and the number of a call."""
    parameter, variadic = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Variadic
    types = [f"tensor({dtype})" for dtype in _TENSOR_TYPES]
    schema = OpSchema(
        "Lookup",
        _DOMAIN,
        1,
        inputs=[parameter("tensors", "T", param_option=variadic, is_homogeneous=False)],
        outputs=[parameter("values", "V")],
        type_constraints=[("T", types, ""), ("V", types, "")],
        attributes=[OpSchema.Attribute("number", OpSchema.AttrType.INT)],
    )
    return Op(Opset(_DOMAIN, 1), "Lookup", schema)


_placeholder = _make_placeholder()


def _replace(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Replace what is of a kind, in lists too."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        return [_replace(element, kind, function) for element in value]
    return value


def _expand(graph: onnx.GraphProto, calls: list[_Call], tables: Tables) -> None:
    """Replace the placeholders of a graph, and of those within it."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for inner in _subgraphs(node):
            _expand(inner, calls, tables)
        if node.domain == _DOMAIN:
            start = len(tables.nodes)
            calls[node.attribute[0].i].expand(tables, node)
            nodes += tables.nodes[start:]
        else:
            nodes.append(node)
    count = len(graph.node)
    graph.node.extend(nodes)  # copies them
    del graph.node[:count]


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _find_used(graph: onnx.GraphProto) -> set[str]:
    """Names of the values that are read in a graph, and in those within it."""
    used = {value.name for value in graph.output}
    for node in graph.node:
        used.update(node.input)
        for inner in _subgraphs(node):
            used |= _find_used(inner)
    return used


def _remove_domain(model: onnx.ModelProto) -> None:
    kept = [opset for opset in model.opset_import if opset.domain != _DOMAIN]
    count = len(model.opset_import)
    model.opset_import.extend(kept)
    del model.opset_import[:count]

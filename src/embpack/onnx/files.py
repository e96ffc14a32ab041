"""ONNX files of packed tables."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embpack.bags import MODES, check_weighted
from embpack.disk import advise_packed
from embpack.formats.atomic import new_file
from embpack.onnx.bags import build_bags
from embpack.onnx.graph import OPSET, build_gather
from embpack.table import PackedTable

# A Protobuf file has at most 2 GiB, and takes several times that in memory. A file beside it is written in chunks, and
# mapped to be read.
EXTERNAL_BYTES = 1 << 28
EXTERNAL_SUFFIX = ".data"
# Of ONNX 1.13, the first with operator set 18.
_IR_VERSION = 8
_PRODUCER = "embpack"
_PRODUCER_OFFSET = 2
_PRODUCER_TAG = 2 << 3 | 2  # field 2, bytes with their length
_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 24


def export(
    table: PackedTable,
    path: str | os.PathLike[str],
    *,
    mode: str | None = None,
    per_sample_weights: bool = False,
    indices_ndim: int = 1,
    force: bool = False,
) -> None:
    """Write a table as an ONNX model that looks rows up straight from the packed bytes.

    The model has standard operators only (operator set 18, IR version 8). Its initializers are the table's bytes, so
    it is as large as the table and a few kilobytes. A table of more than 256 MiB lies in a second file beside it, whose
    name is PATH and ".data"; move the two together.

    Without a mode it is an embedding:

        indices  int64, of indices_ndim dimensions, [...]
        values   float32 [..., embedding_dim]: table[indices], to the bit if the table is not rotated

    With one it pools bags, torch.nn.functional.embedding_bag:

        indices             int64 [L]
        offsets             int64 [B], non-decreasing from 0, at most L: where each bag starts; the last ends at L
        per_sample_weights  float32 [L], if asked for: what each row is multiplied by
        values              float32 [B, embedding_dim]; an empty bag is zeros

    The runtime chooses the order in which rows of a bag are added. ONNX Runtime's CPU provider adds them in index
    order, so sums, means and maxima without weights are table.embedding_bag's to the bit. With weights, products are
    rounded before they are added, which table.embedding_bag does not do. Either value differs from the exact one by at
    most 1.01 n 2^-24 times the sum of its products' absolute values, for a bag of n <= 100,000 rows and products that
    are not subnormal. Rotated tables are rotated back by a product with the matrix, whose sums are in the runtime's
    order.

    Indices are in [-num_embeddings, num_embeddings), negative ones counting from the end, as ONNX has it. The runtime
    refuses others; nothing checks that offsets do not decrease.

    Args:
        table: what to write.
        path: ends in .onnx; a model of embpack's that exists is replaced at once, when everything is on the disk.
        mode: None, "sum", "mean" or "max".
        per_sample_weights: whether there is an input for them; only for "sum".
        indices_ndim: dimensions of the indices; 1 with a mode. A model has to say how many.
        force: replace any other file, too.

    Raises:
        FileExistsError: there is a file that embpack did not write, and no force.
        TypeError: table is no PackedTable, per_sample_weights no bool, or indices_ndim no integer.
        ValueError: path has another suffix, the table has no rows, there is no such mode, or per_sample_weights or
            indices_ndim do not go with it.
        OSError: the disk is full, the folder cannot be written to.
    """
    path = Path(path)
    _check(table, path)
    _check_inputs(mode, per_sample_weights, index(indices_ndim))
    model, initializers = _make_model(table, mode, indices_ndim, per_sample_weights=per_sample_weights)
    write_model(path, model, initializers, force=force)


def _check(table: Any, path: Path) -> None:
    """Refuse what is no table, and what has no place in a model."""
    if not isinstance(table, PackedTable):
        raise TypeError(f"table is {type(table).__name__}, not PackedTable; {advise_packed(table)}")
    check_suffix(path)
    if table.num_embeddings == 0:
        raise ValueError(f"{path}: the table has no rows; there is nothing to look up")


def check_suffix(path: Path) -> None:
    """Raise ValueError if a name is no ONNX model's."""
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the name of an ONNX model ends in .onnx")


def _check_inputs(mode: Any, per_sample_weights: Any, indices_ndim: int) -> None:
    """Refuse inputs that do not go together."""
    if not isinstance(per_sample_weights, bool):
        raise TypeError(
            f"per_sample_weights is {type(per_sample_weights).__name__}; it is True or False, and the weights "
            "themselves an input of the model"
        )
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}, or None for single rows")
    if per_sample_weights:
        check_weighted(mode)
    if mode is not None and indices_ndim != 1:
        raise ValueError(f"indices_ndim is {indices_ndim}, but with mode {mode!r} indices are 1-D, with offsets")
    if indices_ndim < 0:
        raise ValueError(f"indices_ndim is {indices_ndim}; it must be 0 or more")


def _make_model(
    table: PackedTable, mode: str | None, indices_ndim: int, *, per_sample_weights: bool
) -> tuple[onnx.ModelProto, Mapping[str, NDArray[Any]]]:
    """Make a model without the table's own initializers, and those."""
    int64, float32, d = TensorProto.INT64, TensorProto.FLOAT, table.embedding_dim
    if mode is None:
        part = build_gather(table, prefix="embpack.")
        dims: list[str | int] = [f"indices_{axis}" for axis in range(indices_ndim)]
        inputs = {"indices": (int64, dims)}
        output = [*dims, d]
    else:
        weights = "per_sample_weights" if per_sample_weights else None
        part = build_bags(table, mode, ("indices", "offsets", weights), prefix="embpack.")
        inputs = {"indices": (int64, ["L"]), "offsets": (int64, ["B"])}
        if weights is not None:
            inputs[weights] = (float32, ["L"])
        output = ["B", d]
    graph = helper.make_graph(
        part.nodes,
        "embpack",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info("values", float32, output)],
        [numpy_helper.from_array(array, name) for name, array in part.constants.items()],
        doc_string=repr(table),
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
    )
    return model, part.initializers


def write_model(path: Path, model: onnx.ModelProto, initializers: Mapping[str, NDArray[Any]], *, force: bool) -> None:
    """Write a model with its initializers, in the file or, if they are large, beside it.

    Args:
        path: of the model; one of embpack's that exists is replaced at once, when everything is on the disk.
        model: without those initializers; they are added to it, and who wrote it.
        initializers: by name, of one dimension or more; of more than EXTERNAL_BYTES together they are written to PATH
            and EXTERNAL_SUFFIX, in chunks.
        force: replace any other file, too.

    Raises:
        FileExistsError: there is a file that embpack did not write, and no force.
        OSError: the disk is full, the folder cannot be written to.
    """
    beside = path.with_name(path.name + EXTERNAL_SUFFIX)
    model.producer_name, model.producer_version = _PRODUCER, version("embpack")

    def may_replace(_: Path) -> bool:
        return force or _is_own(path)

    with ExitStack() as files:
        model_file = files.enter_context(new_file(path, may_replace))
        data_file = None
        if sum(array.nbytes for array in initializers.values()) > EXTERNAL_BYTES:
            # The stack leaves it first, so what the model refers to is there before the model is.
            data_file = files.enter_context(new_file(beside, may_replace))
        for name, array in initializers.items():
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = model.graph.initializer.add(name=name, dims=array.shape, data_type=dtype)
            if data_file is None:
                tensor.raw_data = array.tobytes()
            else:
                _write_beside(data_file, beside.name, tensor, array)
        model_file.write(model.SerializeToString())


def _is_own(path: Path) -> bool:
    """Whether a model says that embpack wrote it: its first field is the IR's version, a byte, its second who did."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_PRODUCER_OFFSET + 2 + len(_PRODUCER))
    return start[_PRODUCER_OFFSET:] == bytes((_PRODUCER_TAG, len(_PRODUCER))) + _PRODUCER.encode()


def _write_beside(file: BinaryIO, location: str, tensor: TensorProto, array: NDArray[Any]) -> None:
    """Write an array at the end of a file, and into the tensor where it is."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": file.tell(), "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    for chunk in _iter_chunks(array):
        file.write(chunk.tobytes())


def _iter_chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Split an array by rows."""
    rows = max(1, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]

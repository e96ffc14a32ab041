"""ONNX files of PyTorch models with packed embeddings."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embpack.errors import MissingExtraError
from embpack.onnx.files import check_suffix, write_model

if TYPE_CHECKING:
    import torch

# What export_model needs beyond ONNX, and the extras that bring it.
_PACKAGES = {"torch": ("PyTorch", "torch"), "onnxscript": ("ONNX Script", "onnx")}


def export_model(
    model: "torch.nn.Module | torch.export.ExportedProgram",
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: dict[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    force: bool = False,
) -> None:
    """Write a PyTorch model with packed embeddings as an ONNX model that looks rows up straight from the packed bytes.

    torch.onnx.export does all but the lookups. These become standard operators (operator set 18), as export's do; ONNX
    Runtime needs no library of ours. Tables stay packed, and one that several modules look up is in the file once. If
    weights have more than 256 MiB together, they lie in a second file beside the model, whose name is PATH and ".data";
    move the two together.

    On ONNX Runtime's CPU provider, PackedEmbedding, and PackedEmbeddingBag without weights, return what they return in
    PyTorch, to the bit; for weighted bags and rotated tables see export. The model takes indices in
    [-num_embeddings, num_embeddings); negative ones, which PyTorch refuses, count from the end. Nothing checks that
    offsets do not decrease.

    Args:
        model: on the CPU, with lookups by embpack.torch's modules or operators; a PackedEmbeddingBagCollection must get
            plain tensors. It is exported in the mode it is in: call model.eval() first.
        args: example inputs of the model's forward, tensors of the types and, but for dynamic_shapes, the shapes that
            the ONNX model is to take.
        path: ends in .onnx; an existing file is replaced at once, when everything is on the disk.
        kwargs: example inputs by name.
        input_names: of the ONNX model's inputs, in order; None for those of forward's arguments.
        output_names: of its outputs, in order.
        dynamic_shapes: which dimensions of the inputs may vary, as torch.export.export takes it, such as
            {"users": {0: "batch"}}; None for none. An example's dynamic dimension should be 2 or more.
        force: replace a file that embpack did not write, too.

    Raises:
        FileExistsError: there is such a file, and no force.
        MissingExtraError: PyTorch or ONNX Script is not installed.
        OSError: the disk is full, the folder cannot be written to.
        TypeError: model is no PyTorch model.
        ValueError: path has another suffix, the model looks nothing up in packed embeddings, or a table is no buffer
            of it.
        torch.onnx.errors.OnnxExporterError: torch.onnx.export cannot export the model.

    Source: torch.onnx.export, for its arguments.
    """
    path = Path(path)
    check_suffix(path)
    for package in _PACKAGES:
        _import(package)
    from embpack.onnx.translation import check_model, translate_model

    check_model(model)
    options = {"input_names": input_names, "output_names": output_names, "dynamic_shapes": dynamic_shapes}
    translated, initializers = translate_model(model, args, kwargs=kwargs, **options)
    write_model(path, translated, initializers, force=force)


def _import(package: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtraError("embpack.onnx.export_model", *_PACKAGES[package]) from error

"""Packed tables as ONNX models: rows stay packed in the model and are unpacked where they are looked up."""

from embpack.errors import MissingExtraError

try:
    from embpack.onnx.bags import build_bags
    from embpack.onnx.files import export
    from embpack.onnx.graph import OPSET, TableGraph, build_gather
    from embpack.onnx.models import export_model
except ImportError as error:
    raise MissingExtraError("embpack.onnx", "ONNX", "onnx") from error

__all__ = ["OPSET", "TableGraph", "build_bags", "build_gather", "export", "export_model"]

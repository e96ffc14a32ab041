"""ONNX Runtime: a model's Gather becomes GatherBlockQuantized, with a scale for each block of values."""

import logging
from functools import partial

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from benchmarks.peers.base import Quantizer, Restored

OPSET, IR_VERSION = 21, 10
# Which type the weights have, and so the scales; values a block; whether there are no zero points.
SETTINGS: tuple[tuple[type[np.floating], int, bool], ...] = (
    *((np.float32, block, symmetric) for block in (64, 32) for symmetric in (True, False)),
    *((np.float16, 32, symmetric) for symmetric in (True, False)),
)


def _restore(dtype: type[np.floating], block: int, symmetric: bool, weight: NDArray[np.float32]) -> Restored:
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "indices"], ["rows"])],
        "lookup",
        [helper.make_tensor_value_info("indices", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("rows", element, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(dtype), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    config = DefaultWeightOnlyQuantConfig(
        block, symmetric, op_types_to_quantize=("Gather",), quant_axes=(("Gather", 1),)
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    packed = quantizer.model.model
    nbytes = sum(len(tensor.raw_data) for tensor in packed.graph.initializer)
    session = InferenceSession(packed.SerializeToString(), providers=["CPUExecutionProvider"])
    [values] = session.run(None, {"indices": np.arange(len(weight))})
    return Restored(values, nbytes)


QUANTIZERS = tuple(
    Quantizer(
        "ONNX Runtime",
        f"Gather by {block}{', float16' if dtype is np.float16 else ''}, {'' if symmetric else 'a'}symmetric",
        partial(_restore, dtype, block, symmetric),
        block,
    )
    for dtype, block, symmetric in SETTINGS
)

"""torchao: embeddings with weights of 4 bits, a scale and a zero point for each row or group of 32 values."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from benchmarks.peers.base import Quantizer, Restored

INT4 = torch.int4  # type: ignore[attr-defined]
GROUP = 32
GRANULARITIES = (("rows", PerAxis(0), 1), (f"by {GROUP}", PerGroup(GROUP), GROUP))
MAPPINGS = (
    ("symmetric", MappingType.SYMMETRIC, IntxChooseQParamsAlgorithm.AFFINE),
    ("asymmetric", MappingType.ASYMMETRIC, IntxChooseQParamsAlgorithm.AFFINE),
    ("HQQ", MappingType.SYMMETRIC, IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY),
)


def _restore(granularity: Granularity, mapping: Any, algorithm: Any, weight: NDArray[np.float32]) -> Restored:
    model = torch.nn.Sequential(torch.nn.Embedding(len(weight), weight.shape[1], _weight=torch.from_numpy(weight)))
    config = IntxWeightOnlyConfig(INT4, granularity, mapping, torch.float16, intx_choose_qparams_algorithm=algorithm)
    quantize_(model, config, lambda module, _: isinstance(module, torch.nn.Embedding))
    packed: Any = model[0].weight
    # A code lies in a byte of its own until the model is exported, and zero points are there where all are 0.
    nbytes = packed.qdata.numel() // 2 + packed.scale.nbytes
    nbytes += packed.zero_point.nbytes if mapping is MappingType.ASYMMETRIC else 0
    return Restored(packed.dequantize().numpy(), nbytes)


def _list() -> Iterator[Quantizer]:
    for (groups, granularity, multiple_of), (kind, mapping, algorithm) in product(GRANULARITIES, MAPPINGS):
        restore = partial(_restore, granularity, mapping, algorithm)
        yield Quantizer("torchao", f"IntxWeightOnly {groups}, {kind}", restore, max(multiple_of, 2))


QUANTIZERS = tuple(_list())

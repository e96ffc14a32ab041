"""faiss: scalar quantizers and product quantization, by what its indexes keep of a vector."""

from collections.abc import Callable
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Quantizer, Restored


def _restore(make_index: Callable[[int], Any], weight: NDArray[np.float32]) -> Restored:
    index = make_index(weight.shape[1])
    index.train(weight)
    codes = index.sa_encode(weight)
    # An index without vectors has all that they share: codebooks, the ranges of columns, a few bytes of settings.
    return Restored(index.sa_decode(codes), codes.nbytes + len(faiss.serialize_index(index)))


def _make_scalar(kind: int, d: int) -> Any:
    return faiss.IndexScalarQuantizer(d, kind, faiss.METRIC_L2)


QUANTIZERS = (
    Quantizer("faiss", "QT_4bit", partial(_restore, partial(_make_scalar, faiss.ScalarQuantizer.QT_4bit)), 2),
    Quantizer(
        "faiss", "QT_4bit_uniform", partial(_restore, partial(_make_scalar, faiss.ScalarQuantizer.QT_4bit_uniform)), 2
    ),
    Quantizer("faiss", "MinMaxFP16,SQ4", partial(_restore, lambda d: faiss.index_factory(d, "MinMaxFP16,SQ4")), 2),
    Quantizer("faiss", "IndexEDEN", partial(_restore, lambda d: faiss.IndexEDEN(d, faiss.METRIC_L2, 4)), 2),
    Quantizer("faiss", "PQ, pairs by 256 of them", partial(_restore, lambda d: faiss.IndexPQ(d, d // 2, 8)), 2),
)

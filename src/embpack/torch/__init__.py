"""Packed tables in PyTorch: operators, and modules in place of nn.Embedding and nn.EmbeddingBag."""

from embpack.errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("embpack.torch", "PyTorch", "torch") from error

from embpack.torch import linear_ops, ops  # noqa: F401  (register the operators)
from embpack.torch.checkpoint import load_checkpoint
from embpack.torch.collection import PackedEmbeddingBagCollection
from embpack.torch.convert import quantize_
from embpack.torch.linear import PackedLinear
from embpack.torch.modules import PackedEmbedding, PackedEmbeddingBag, leave_tables_out_of_ddp
from embpack.torch.report import ModelReport

__all__ = [
    "ModelReport",
    "PackedEmbedding",
    "PackedEmbeddingBag",
    "PackedEmbeddingBagCollection",
    "PackedLinear",
    "leave_tables_out_of_ddp",
    "load_checkpoint",
    "quantize_",
]

"""Static encoders of sentence-transformers whose table was packed: they get a class that saves and opens it."""

import sys

from torch import nn

from embpack.torch.modules import PackedEmbeddingBag


def adopt_static_encoders(model: nn.Module) -> None:
    """Make each StaticEmbedding of a model whose embedding is packed a PackedStaticEmbedding, itself."""
    # Without this module there is none.
    if "sentence_transformers.sentence_transformer.modules.static_embedding" not in sys.modules:
        return
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from embpack.sentence_transformers import PackedStaticEmbedding

    for module in model.modules():
        if type(module) is StaticEmbedding and isinstance(module.embedding, PackedEmbeddingBag):
            module.__class__ = PackedStaticEmbedding

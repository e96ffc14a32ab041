"""Bags of features for tables that stay float: each is pooled by its own module, to the bit as without a collection."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embpack.torch.private import is_only_forward


class FeatureBags(NamedTuple):
    """The bags of several features, feature after feature, each with the same number of bags.

    Attributes:
        num_features: how many there are.
        indices: 1-D [L], or 2-D [num_features * B, n] with a bag a row.
        starts: of 1-D indices, [num_features, B + 1]: where a feature's bags start among its own indices, and where the
            last one ends; None for 2-D ones.
        firsts: where the indices of each feature start, and where the last ones end.
        weights: shaped like indices, or None.
    """

    num_features: int
    indices: Tensor
    starts: Tensor | None
    firsts: list[int]
    weights: Tensor | None

    @classmethod
    def of(
        cls,
        num_features: int,
        bags: tuple[Tensor, Tensor | None],
        weights: Tensor | None,
        include_last_offset: bool,
    ) -> "FeatureBags":
        """Make them of the arguments of a lookup that has been checked, as packed tables do it."""
        indices, edges = bags
        size = indices.shape[0]
        if edges is None:
            batch = size // num_features
            return cls(num_features, indices, None, [feature * batch for feature in range(num_features + 1)], weights)
        if not include_last_offset:
            edges = torch.cat([edges, edges.new_full((1,), size)])
        batch = (edges.shape[0] - 1) // num_features
        of_features = edges.contiguous().as_strided((num_features, batch + 1), (batch, 1))
        firsts = of_features[:, 0]
        return cls(num_features, indices, of_features - firsts[:, None], [*firsts.tolist(), size], weights)

    def pool(self, module: Any, feature: int) -> Tensor:
        """Pool the bags of one feature by an nn.EmbeddingBag: values of its type [B, embedding_dim]."""
        own = slice(self.firsts[feature], self.firsts[feature + 1])
        starts = None if self.starts is None else self.starts[feature]
        if starts is not None and not module.include_last_offset:
            starts = starts[:-1]
        weights = None if self.weights is None else self.weights[own].to(module.weight.dtype)
        if not torch.is_grad_enabled() and is_only_forward(module):
            return _pool_detached(module, self.indices[own], starts, weights)
        pooled: Tensor = module(self.indices[own], starts, weights)
        return pooled


def _pool_detached(module: nn.EmbeddingBag, indices: Tensor, starts: Tensor | None, weights: Tensor | None) -> Tensor:
    """Do what the module does, in a third of the time.

    PyTorch makes ready for a derivative of a weight that requires one, though none is taken where gradients are off.
    """
    return nn.functional.embedding_bag(
        indices,
        module.weight.detach(),
        starts,
        mode=module.mode,
        per_sample_weights=weights,
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
    )

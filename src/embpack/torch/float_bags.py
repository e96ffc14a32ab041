"""Bags of features for tables that stay float, or on the disk: each is pooled by its own module.

What comes of that is to the bit what comes of the module without a collection, but for float16 and bfloat16 tables on
the disk, whose sums stay float32, as those of packed tables do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embpack.bags import count_bags_of_features, explain_offsets
from embpack.disk import are_offsets
from embpack.lookups import find_outside
from embpack.torch.modules import PackedEmbeddingBag
from embpack.torch.ops import check_types
from embpack.torch.private import is_only_forward


def check_bags(num_features: int, indices: Tensor, offsets: Tensor | None, *, include_last_offset: bool) -> int:
    """Check the arguments of a lookup as packed tables do it, where there are none; return the bags of each feature.

    Raises:
        TypeError: indices or offsets are neither int32 nor int64.
        ValueError: they do not go together, or offsets do not start at 0 or leave the indices.
    """
    check_types(None, indices=indices, offsets=offsets)
    batch = count_bags_of_features(num_features, indices, offsets, include_last_offset=include_last_offset)
    if offsets is not None:
        ends = offsets if include_last_offset else torch.cat([offsets, offsets.new_full((1,), len(indices))])
        if not are_offsets(ends.numpy(), len(indices)):
            raise explain_offsets(offsets.numpy(), len(indices))
    return batch


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

    def prefetch(self, module: Any, feature: int, table: int) -> None:
        """Start to read the rows of one feature, if they stay on the disk; table is its number, for errors.

        Raises:
            IndexError: an index is out of range; names its position and value, feature and table.
        """
        if not isinstance(module, PackedEmbeddingBag):
            return
        before, own = (
            self.indices[part].reshape(-1).numpy()
            for part in (slice(self.firsts[feature]), slice(self.firsts[feature], self.firsts[feature + 1]))
        )
        fault = find_outside(own, module.num_embeddings)
        if fault != -1:
            error = module.table.explain_fault(len(before) + fault, self.indices.reshape(-1).numpy())
            raise IndexError(f"feature {feature}, table {table}: {error}")
        module.table.prefetch(own)

    def pool(self, module: Any, feature: int) -> Tensor:
        """Pool the bags of one feature: values [B, embedding_dim] of an nn.EmbeddingBag's type, or float32."""
        own = slice(self.firsts[feature], self.firsts[feature + 1])
        starts = None if self.starts is None else self.starts[feature]
        if isinstance(module, PackedEmbeddingBag):
            weights = None if self.weights is None else self.weights[own].float()
            return module.pool_as_float32(self.indices[own], starts, weights)
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

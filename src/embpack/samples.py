"""Data that looks trained, for the demonstration."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def make_table(rng: np.random.Generator, num_embeddings: int, embedding_dim: int) -> NDArray[np.float32]:
    """Make a table as training leaves them, float32 [num_embeddings, embedding_dim].

    Values are heavy-tailed (Student's t with 6 degrees of freedom), columns have means and spreads of their own,
    and row norms follow a power law of the row's rank: frequent ids have been pushed further.
    """
    values = rng.standard_normal((num_embeddings, embedding_dim), dtype=np.float32)
    values /= np.sqrt(rng.chisquare(6, values.shape) / 6).astype(np.float32)
    values *= rng.uniform(0.5, 1.5, embedding_dim).astype(np.float32)
    values += rng.normal(0, 0.2, embedding_dim).astype(np.float32)
    ranks = (1 + rng.permutation(num_embeddings)) / num_embeddings
    values *= (0.05 * ranks[:, None] ** -0.2).astype(np.float32)
    return values


def make_checkpoint(rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Make a recommender's checkpoint: three tables and the weights of a layer."""
    return {
        "user_embedding.weight": make_table(rng, 200_000, 64),
        "item_embedding.weight": make_table(rng, 100_000, 32),
        "tag_embedding.weight": make_table(rng, 20_000, 128).astype(np.float16),
        "head.linear.weight": rng.standard_normal((256, 224), dtype=np.float32),
        "head.linear.bias": rng.standard_normal(256, dtype=np.float32),
    }

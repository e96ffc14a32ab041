"""What lookups are raced on: tables of 4-bit rows, the same rows at other precisions, bags of indices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import embpack
from embpack import PackedTable

# Exponent of the power law: the k-th most popular row is asked for 1 / k^1.05 as often as the first.
POWER = 1.05
PARAM_BYTES = 4

Values = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Bags:
    """Bags of one table, or of several tables, table after table, as many bags each.

    Attributes:
        indices: int64 [L].
        offsets: int64 [tables * bags + 1], where each bag starts, and the last one ends.
    """

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]


def make_table(rows: int, embedding_dim: int, seed: int = 0) -> PackedTable:
    """Make a table of random codes whose values are in about -1 to 1; nothing is quantized."""
    generator = np.random.default_rng(seed)
    row_bytes = embedding_dim // 2 + PARAM_BYTES
    packed = generator.integers(0, 256, (rows, row_bytes), np.uint8)
    params = np.empty((rows, 2), np.float16)
    params[:, 0] = generator.uniform(0.08, 0.16, rows)
    params[:, 1] = params[:, 0] * -7.5
    packed[:, -PARAM_BYTES:] = params.view(np.uint8)
    return PackedTable.from_packed(packed, embedding_dim)


def quantize_normal(rows: int, embedding_dim: int, method: str) -> PackedTable:
    """Quantize a table of normal values, for the layouts that need a method to make them."""
    weight = np.random.default_rng(0).standard_normal((rows, embedding_dim), dtype=np.float32)
    return embpack.quantize(weight, method)


def repeat_rows(table: PackedTable, rows: int) -> PackedTable:
    """Make a larger table of the rows of one that is quicker to make, again and again."""
    packed = np.resize(table.packed, (rows, table.row_bytes))
    return PackedTable(packed, table.row_format, codebooks=table.codebooks)


def split_rows(table: PackedTable) -> tuple[Bytes, Bytes]:
    """Return the code bytes and the float16 scale and bias of 4-bit rows, each C-contiguous."""
    return table.packed[:, :-PARAM_BYTES].copy(), table.packed[:, -PARAM_BYTES:].copy()


def widen_codes(table: PackedTable) -> Bytes:
    """Return 4-bit codes as a byte each, [N, d]: an 8-bit table of the same scale and bias has the same values."""
    codes = np.empty(table.shape, np.uint8)
    nibbles = table.packed[:, :-PARAM_BYTES]
    np.bitwise_and(nibbles, 15, out=codes[:, 0::2])
    np.right_shift(nibbles, 4, out=codes[:, 1::2])
    return codes


def draw_uniform(generator: np.random.Generator, rows: int, count: int) -> NDArray[np.int64]:
    """Draw indices, all alike."""
    return generator.integers(0, rows, count)


def draw_power(generator: np.random.Generator, rows: int, count: int) -> NDArray[np.int64]:
    """Draw indices by a power law; the popular rows are spread over the table."""
    popularity = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -POWER)
    ranks = np.searchsorted(popularity, generator.random(count) * popularity[-1], side="right")
    drawn: NDArray[np.int64] = generator.permutation(rows)[np.minimum(ranks, rows - 1)]
    return drawn


DISTRIBUTIONS = {"uniform": draw_uniform, "power": draw_power}


def make_bags(rows: int, bag_size: int, count: int, distribution: str = "uniform", seed: int = 1) -> Bags:
    """Make bags of one size, about ``count`` indices in all."""
    bags = max(1, count // bag_size)
    indices = DISTRIBUTIONS[distribution](np.random.default_rng(seed), rows, bags * bag_size)
    return Bags(indices, np.arange(bags + 1, dtype=np.int64) * bag_size)


def make_uneven_bags(rows: int, bag_size: int, bags: int, seed: int = 1) -> Bags:
    """Make bags of half to one and a half times a size."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(bag_size // 2, bag_size + bag_size // 2, bags, endpoint=True)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Bags(draw_uniform(generator, rows, int(offsets[-1])), offsets)


class Expected:
    """What bags sum to, in float64, and how far from it a float32 sum may be.

    A value is scale * code + bias, and a bag of n adds n of them. However the sum is ordered, whether the biases are
    added with it or by themselves, no term takes part in more than 2 n + 2 roundings of 2^-24 each: two of its own,
    and one for each of at most 2 n additions. So the error is at most (2 n + 2) 2^-24 times the sum of the terms'
    magnitudes, |scale| 15 + |bias|; of rows with codebooks the magnitude is that of the largest value.

    Attributes:
        sums: float64 [bags, tables * d].
        bounds: float64, broadcasts to sums.
    """

    def __init__(self, tables: Sequence[PackedTable], bags: Bags) -> None:
        starts = bags.offsets[:-1].reshape(len(tables), -1)
        ends = bags.offsets[1:].reshape(len(tables), -1)
        sums, bounds = [], []
        for table, first, last in zip(tables, starts, ends, strict=True):
            indices, places = bags.indices[first[0] : last[-1]], first - first[0]
            roundings = 2.0 * (last - first) + 2
            sums.append(np.add.reduceat(table[indices].astype(np.float64), places))
            magnitudes = np.add.reduceat(_measure_magnitudes(table, indices), places)
            bounds.append(np.tile((roundings * 2.0**-24 * magnitudes)[:, None], table.embedding_dim))
        self.sums = np.concatenate(sums, axis=1)
        self.bounds = np.concatenate(bounds, axis=1)

    def find_wrong(self, answer: NDArray[np.float32]) -> str | None:
        """Say which bag is wrong, None if none is."""
        if answer.shape != self.sums.shape:
            return f"sums are {list(answer.shape)}, not {list(self.sums.shape)}"
        wrong = np.flatnonzero(~(np.abs(answer - self.sums) <= self.bounds).all(axis=1))
        return f"{len(wrong)} of {len(answer)} bags, the first is bag {wrong[0]}" if len(wrong) else None


def _measure_magnitudes(table: PackedTable, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    if table.layout == "uniform":
        params = table.packed[indices, -PARAM_BYTES:].copy().view(np.float16).astype(np.float64)
        scale, bias = np.abs(params).T
        magnitudes: NDArray[np.float64] = scale * 15 + bias
        return magnitudes
    largest: NDArray[np.float64] = np.abs(table[indices]).max(axis=1).astype(np.float64)
    return largest

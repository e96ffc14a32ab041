"""Altered files: each is read as a user would read it, and must be told from the one that was written.

    python -m tests.fuzz_files --cases 100000

alters files of every layout and of every format that is read, in batches, each a process of its own with bounded memory
and time. Of each case it prints nothing but what is wrong; the last line counts. Case N of a seed is always the same:

    python -m tests.fuzz_files --first N --cases 1

A case holds if reading the file ends in one of the errors that are promised, with the file's name in it, and leaves
nothing behind; or if it gives what was written. Of a packed file that means the values of its tables, once their
checksums agree. Of a source the altered bytes may be values: then what was packed must agree with its own checksums.
"""

import argparse
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

import embpack
from embpack.errors import FormatError
from embpack.files import PIECE_ROWS

BATCH = 500
MEMORY = 6 << 30
SECONDS = 600
ROWS, DIM = 24, 16
PROMISED = (FormatError, ValueError, FileNotFoundError)


@dataclass(frozen=True)
class Original:
    """What is altered.

    Attributes:
        path: a file, or a folder of shards.
        tables: of a packed one the values of each table; None for a source.
    """

    path: Path
    tables: dict[str, np.ndarray] | None = None


def make_originals(folder: Path) -> list[Original]:
    """Write a file of each kind: packed ones of every layout, sources of every format."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((ROWS, DIM)) * rng.lognormal(-1, 0.5, (ROWS, 1))).astype(np.float32)
    state = {"item_embedding.weight": torch.from_numpy(weights), "bias": torch.arange(3.0)}
    return [*_make_sources(folder, state), *_make_packed(folder, state)]


def _make_sources(folder: Path, state: dict[str, torch.Tensor]) -> list[Original]:
    weights = state["item_embedding.weight"].numpy()
    arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in state.items()}
    save_file(state, folder / "a.safetensors", metadata={"format": "pt"})
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save_file(half, folder / "half.safetensors")
    codes = state["item_embedding.weight"].to(torch.float8_e4m3fn)
    pieces = {f"item_embedding.shard_{i}.weight": codes[9 * i : 9 * i + 9].contiguous() for i in range(3)}
    scales = {
        f"item_embedding.shard_{i}.weight_scale": torch.full((len(pieces[name]), 1), 0.5)
        for i, name in enumerate(pieces)
    }
    save_file({**pieces, **scales, "bias": state["bias"]}, folder / "pieces.safetensors")
    blocks = {"item_embedding.weight": codes, "item_embedding.scale": torch.full((ROWS, 2), 126, dtype=torch.uint8)}
    save_file(blocks, folder / "blocks.safetensors")
    torch.save(state, folder / "a.pt")
    torch.save({"state_dict": state, "epoch": 3}, folder / "wrapped.pth", pickle_protocol=4)
    torch.save(state, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    np.save(folder / "a.npy", weights)
    np.save(folder / "fortran.npy", np.asfortranarray(weights))
    np.savez(folder / "a.npz", **arrays)
    np.savez_compressed(folder / "deflated.npz", **arrays)
    values = pa.FixedSizeListArray.from_arrays(pa.array(weights.reshape(-1)), DIM)
    pq.write_table(pa.table({"vector": values, "word": [f"w{i}" for i in range(ROWS)]}), folder / "a.parquet")
    shards = folder / "sharded"
    shards.mkdir()
    _write_shards(shards, state)
    return [Original(path) for path in sorted(folder.iterdir())]


def _write_shards(folder: Path, state: dict[str, torch.Tensor]) -> None:
    weight_map = {name: f"model-{i:05}-of-{len(state):05}.safetensors" for i, name in enumerate(state, start=1)}
    for name, file_name in weight_map.items():
        save_file({name: state[name]}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _make_packed(folder: Path, state: dict[str, torch.Tensor]) -> list[Original]:
    kinds: list[tuple[str, float, str | None]] = [
        ("optimal", 4, None), ("greedy", 2, "hadamard"), ("asym", 8, None), ("kmeans", 4, None),
        ("kmeans-cls:K=3", 4, None), ("trellis", 3.5, None), ("trellis", 4, "hadamard"),
    ]  # fmt: skip
    source, originals = folder / "source.safetensors", []
    save_file({**state, "user_embedding.weight": state["item_embedding.weight"].flip(0).contiguous()}, source)
    for i, (method, bits, rotation) in enumerate(kinds):
        path = folder / f"packed{i}.safetensors"
        embpack.quantize_file(source, path, method=method, bits=bits, rotate=rotation, include=["*_embedding.*"])
        originals.append(_remember(path))
    source.unlink()
    sharded = folder / "packed"
    embpack.quantize_file(folder / "sharded", sharded, include=["*_embedding.*"])
    return [*originals, _remember(sharded), *_make_pieces(folder)]


def _make_pieces(folder: Path) -> list[Original]:
    """Write tables in pieces, of a layout with nothing beside the rows and of one with all that there can be."""
    weights, originals = np.random.default_rng(1).standard_normal((2 * PIECE_ROWS + 9, DIM), np.float32), []
    np.save(folder / "source.npy", weights)
    for method in ("asym", "kmeans-cls:K=3"):
        path = folder / f"pieces{len(originals)}"
        embpack.quantize_file(folder / "source.npy", path, method=method, max_shard_size=1)
        originals.append(_remember(path))
    (folder / "source.npy").unlink()
    return originals


def _remember(path: Path) -> Original:
    return Original(path, {name: table.dequantize() for name, table in embpack.load(path, access="memory").items()})


def alter(raw: bytes, rng: np.random.Generator) -> bytes:
    """Alter bytes in one of the ways in which files are altered by disks, transfers, and people."""
    size = len(raw)
    # Half of the alterations fall where the structure is: into the first kilobyte, or the last.
    start, stop = [(0, size), (0, min(1024, size)), (0, size), (max(0, size - 1024), size)][rng.integers(4)]
    return ALTERATIONS[rng.integers(len(ALTERATIONS))](bytearray(raw), start, max(stop, start + 1), rng)


def _flip_bits(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    for place in rng.integers(start, stop, rng.integers(1, 5)):
        out[place] ^= 1 << rng.integers(8)
    return bytes(out)


def _change_bytes(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    for place in rng.integers(start, stop, rng.integers(1, 9)):
        out[place] = rng.integers(256)
    return bytes(out)


def _change_digits(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    """Change numbers where they are text, as in headers."""
    digits = [place for place in range(start, min(stop, len(out))) if chr(out[place]).isdigit()]
    for place in rng.choice(digits, 2) if digits else ():
        out[place] = ord("0") + rng.integers(10)
    return bytes(out)


def _cut(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    return bytes(out[: rng.integers(start, stop)])


def _lengthen(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    return bytes(out) + rng.bytes(int(rng.integers(1, 200)))


def _clear_sector(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    place = rng.integers(start, stop)
    return bytes(out[:place]) + bytes(len(out[place : place + 64])) + bytes(out[place + 64 :])


def _copy_part(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    place, source, size = rng.integers(start, stop), rng.integers(len(out)), rng.integers(1, 64)
    part = out[source : source + size]
    return bytes(out[:place]) + bytes(part) + bytes(out[place + len(part) :])


def _leave_out(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    place = rng.integers(start, stop)
    return bytes(out[:place]) + bytes(out[place + rng.integers(1, 16) :])


def _repeat(out: bytearray, start: int, stop: int, rng: np.random.Generator) -> bytes:
    place = rng.integers(start, stop)
    return bytes(out[: place + rng.integers(1, 16)]) + bytes(out[place:])


ALTERATIONS = (
    _flip_bits, _change_bytes, _change_digits, _cut, _lengthen, _clear_sector, _copy_part, _leave_out, _repeat,
)  # fmt: skip


def run_case(number: int, seed: int, originals: list[Original], folder: Path) -> str:
    """Alter a file and read it; returns what came of it.

    Raises:
        Exception: it is none of what is promised.
    """
    rng = np.random.default_rng([seed, number])
    original = originals[number % len(originals)]
    path = folder / original.path.name
    if original.path.is_dir():
        shutil.copytree(original.path, path)
        files = sorted(path.iterdir())
        altered = files[rng.integers(len(files))]
    else:
        altered = path
    before = (original.path / altered.name if original.path.is_dir() else original.path).read_bytes()
    after = alter(before, rng)
    altered.write_bytes(after)
    if after == before:
        return "not altered"
    try:
        return _read_source(path, folder) if original.tables is None else _read_packed(path, folder, original.tables)
    except PROMISED as error:
        # A lookup knows no file, and says which row.
        if not any(place in str(error) for place in (str(folder), "tensor ", f"{original.path.stem}[", "row ")):
            raise AssertionError(f"the error does not say where: {error!r}") from error
        return "refused"


def _read_source(path: Path, folder: Path) -> str:
    """Pack it; what comes out must agree with its checksums."""
    packed = folder / ("out" if path.is_dir() else "out.safetensors")
    try:
        embpack.quantize_file(path, packed, include=["*"])
    finally:
        left = {each.name for each in folder.iterdir()} - {path.name, packed.name}
        assert not left, f"left behind: {left}"
    for table in embpack.load(packed, verify=True).values():
        assert np.isfinite(table.dequantize()).all()
    return "read"


def _read_packed(path: Path, folder: Path, tables: dict[str, np.ndarray]) -> str:
    """Look rows up before checksums are compared, which must not harm; then what was written must come back."""
    for table in embpack.load(path).values():
        indices = np.arange(table.num_embeddings)
        table.gather(indices)
        table.embedding_bag(indices, np.array([0, 3]))
    verified = embpack.load(path, verify=True)
    plain = folder / ("plain" if path.is_dir() else "plain.safetensors")
    embpack.dequantize_file(path, plain)
    assert verified.keys() == tables.keys(), f"tables are {sorted(verified)}"
    for name, table in verified.items():
        assert np.array_equal(table.dequantize(), tables[name], equal_nan=True), f"other values in {name}"
    return "as written"


def run_batch(first: int, cases: int, seed: int) -> Counter[str]:
    """Run cases in this process; prints those that fail."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "originals").mkdir()
        originals = make_originals(root / "originals")
        for number in range(first, first + cases):
            folder = root / "case"
            folder.mkdir()
            try:
                outcomes[run_case(number, seed, originals, folder)] += 1
            except Exception:
                outcomes["FAILED"] += 1
                print(f"case {number} of seed {seed}, {originals[number % len(originals)].path.name}:", file=sys.stderr)
                traceback.print_exc(limit=-4)
            shutil.rmtree(folder)
    return outcomes


def _run_in_process(first: int, cases: int, seed: int) -> Counter[str]:
    """Run cases in a process of their own; where it dies, find the cases by which it does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    command = [sys.executable, "-m", "tests.fuzz_files", "--here", "--first", str(first), "--cases", str(cases)]
    try:
        done = subprocess.run(
            [*command, "--seed", str(seed)], stdout=subprocess.PIPE, text=True, timeout=SECONDS, preexec_fn=limit
        )
        how = f"ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"rc {done.returncode}"
        if done.returncode == 0:
            return Counter(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        how = f"not done in {SECONDS} s"
    if cases == 1:
        print(f"case {first} of seed {seed}: {how}", file=sys.stderr)
        return Counter(DIED=1)
    half = cases // 2
    return _run_in_process(first, half, seed) + _run_in_process(first + half, cases - half, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=BATCH)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="in this process, and print counts as JSON")
    arguments = parser.parse_args()
    stop, seed = arguments.first + arguments.cases, arguments.seed
    if arguments.here:
        print(json.dumps(run_batch(arguments.first, arguments.cases, seed)))
        return
    outcomes: Counter[str] = Counter()
    for first in range(arguments.first, stop, BATCH):
        outcomes += _run_in_process(first, min(BATCH, stop - first), seed)
        print(f"{min(first + BATCH, stop) - arguments.first:,} of {arguments.cases:,}: {dict(outcomes)}", flush=True)
    sys.exit(bool(outcomes["FAILED"] or outcomes["DIED"]))


if __name__ == "__main__":
    main()

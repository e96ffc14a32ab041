"""Killed runs: what they were to write is there whole or not at all, and the next run leaves nothing of theirs behind.

    python -m tests.kill_runs --runs 500

starts a run, kills it (SIGKILL) at a random moment, and looks: the destination must be as it was before, or as a whole
run leaves it, byte for byte. After the last one a whole run must leave no temporary file or folder.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import embpack

ROWS, DIM = 20_000, 64


@dataclass(frozen=True)
class Kind:
    """What is run.

    Attributes:
        name: for people, and of the folder in which it runs.
        run: writes a destination.
        suffix: of the destination; a folder has none.
        before: makes what is there before, if anything is.
        resume: goes on where a run that was killed was; None if nothing does.
    """

    name: str
    run: Callable[[Path], object]
    suffix: str = ""
    before: Callable[[Path], object] = lambda path: None
    resume: Callable[[Path], object] | None = None


def write_sources(folder: Path) -> None:
    """Write what is read: a checkpoint, the same in shards beside a configuration, both packed, and a delta."""
    rng = np.random.default_rng(0)
    names = [f"{name}_embedding.weight" for name in ("user", "item", "shop")]
    tables = {name: rng.standard_normal((ROWS, DIM)).astype(np.float32) for name in names}
    source, shards = folder / "source.safetensors", folder / "shards"
    save_file(tables, source)
    shards.mkdir()
    for name in names:
        save_file({name: tables[name]}, shards / f"{name}.safetensors")
    weight_map = ",".join(f'"{name}": "{name}.safetensors"' for name in names)
    (shards / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    (shards / "config.json").write_text("{}")
    embpack.quantize_file(source, folder / "packed.safetensors", method="asym")
    embpack.quantize_file(shards, folder / "packed", method="asym")
    embpack.quantize_file(source, folder / "pieces", method="asym", max_shard_size="150 kB")
    ids = rng.permutation(ROWS)[: ROWS // 10]
    rows = rng.standard_normal((len(ids), DIM)).astype(np.float32)
    np.savez(folder / "delta.npz", **{f"{names[0]}.indices": ids, f"{names[0]}.rows": rows})


def list_kinds(folder: Path) -> list[Kind]:
    """List what is run on what write_sources wrote."""
    source, shards, packed = folder / "source.safetensors", folder / "shards", folder / "packed.safetensors"

    def quantize(path: Path) -> object:
        return embpack.quantize_file(source, path, method="greedy", force=True)

    def quantize_shards(path: Path) -> object:
        return embpack.quantize_file(shards, path, method="greedy")

    def quantize_pieces(path: Path, *, resume: bool = False) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there may be nothing to resume
            return embpack.quantize_file(source, path, method="trellis", max_shard_size="150 kB", resume=resume)

    def update(old: Path, path: Path) -> object:
        if not path.exists():
            put(old, path)
        return embpack.update_file(path, [folder / "delta.npz"])

    def put(old: Path, path: Path) -> object:
        return shutil.copytree(old, path) if old.is_dir() else shutil.copyfile(old, path)

    def write_text(path: Path) -> object:
        return path.write_bytes(b"as it was before")

    return [
        Kind("quantize", quantize, ".safetensors", write_text),
        Kind("quantize shards", quantize_shards),
        Kind("quantize pieces", quantize_pieces, resume=partial(quantize_pieces, resume=True)),
        Kind("quantize shards again", quantize_shards, before=partial(shutil.copytree, folder / "packed")),
        Kind("dequantize", lambda path: embpack.dequantize_file(packed, path, force=True), ".safetensors", write_text),
        Kind("update", partial(update, packed), ".safetensors", partial(put, packed)),
        Kind("update pieces", partial(update, folder / "pieces"), before=partial(put, folder / "pieces")),
        Kind("save", lambda path: embpack.save(path, embpack.load(packed), force=True), ".safetensors", write_text),
    ]


def read_tree(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of each file of a folder; nothing where there is neither."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] * path.exists()
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _start(work: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def _run(work: Callable[[], object]) -> float:
    """Run it in a process of its own; returns seconds."""
    started = time.perf_counter()
    _, status = os.waitpid(_start(work), 0)
    assert status == 0, "a run that nobody killed has failed"
    return time.perf_counter() - started


def kill(kind: Kind, folder: Path, runs: int, rng: np.random.Generator) -> Counter[str]:
    """Kill runs of a kind; returns how often which outcome was found."""
    path = folder / f"out{kind.suffix}"
    seconds = _run(lambda: kind.run(path))
    whole, outcomes = read_tree(path), Counter[str]()
    is_over = True
    for _ in range(runs):
        if is_over:
            _remove(path)
            kind.before(path)
        before = read_tree(path)
        work = kind.run if is_over or kind.resume is None else kind.resume
        process = _start(partial(work, path))
        time.sleep(seconds * rng.uniform(0, 1.1))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = read_tree(path)
        outcomes["whole" if found == whole else "as before" if found == before else "TORN"] += 1
        is_over = kind.resume is None or found == whole
    outcomes["temporaries"] = len([each for each in folder.iterdir() if each != path])
    _run(lambda: kind.run(path))
    assert read_tree(path) == whole
    outcomes["LEFT BEHIND"] = len([each for each in folder.iterdir() if each != path])
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, bad = np.random.default_rng(arguments.seed), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        # Threads do not live through a fork: this process starts none.
        _run(lambda: write_sources(root))
        kinds = list_kinds(root)
        for kind in kinds:
            folder = root / kind.name
            folder.mkdir()
            outcomes = kill(kind, folder, -(-arguments.runs // len(kinds)), rng)
            print(f"{kind.name}: {dict(outcomes)}", flush=True)
            bad += outcomes["TORN"] + outcomes["LEFT BEHIND"]
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

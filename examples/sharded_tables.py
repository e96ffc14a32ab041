"""Serve packed tables from several processes, on one machine or on as many as torchrun starts, each with its part.

torchrun --standalone --nproc-per-node 2 examples/sharded_tables.py
torchrun --standalone --nproc-per-node 4 examples/sharded_tables.py --rows 20000000    # 720 MB
python examples/sharded_tables.py    # one process, which has all rows

The first process writes a file of packed tables, where those of a model would be that embpack quantize packed. Each
maps the file, takes its part into memory and lets go of the file. TorchRec sends indices to the processes that have
their rows, by gloo, and pooled values back. What comes out is compared with one process's. Needs embpack[torchrec], and
TorchRec itself: pip install --no-deps torchrec==1.9.2
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torchrec.distributed.shard import shard  # type: ignore[import-untyped]
from torchrec.distributed.sharding_plan import row_wise, table_wise  # type: ignore[import-untyped]
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType  # type: ignore[import-untyped]
from torchrec.modules.embedding_modules import EmbeddingBagCollection  # type: ignore[import-untyped]
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # type: ignore[import-untyped]

import embpack
import embpack.torchrec

logging.getLogger("torch.fx").setLevel(logging.ERROR)  # warnings to TorchRec's developers, not to its users
warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)

DIM, SITES, BAGS, LONGEST = 64, 5000, 512, 20


class Served(NamedTuple):
    """What a process holds, and what it found."""

    part: int  # bytes of memory that its part of the tables took
    time: float  # seconds for a batch
    error: float  # the greatest difference from one process's values


def write_tables(path: Path, rows: int) -> None:
    """Pack a table of so many users, and one of sites; to be quick, users are a few thousand rows over and over."""
    random = np.random.default_rng(0)
    some = embpack.quantize(random.standard_normal((min(rows, 4096), DIM), np.float32), "greedy")
    users = np.resize(some.packed, (rows, some.packed.shape[1]))
    sites = embpack.quantize(random.standard_normal((SITES, DIM), np.float32), "greedy")
    embpack.save(path, {"user": embpack.PackedTable.from_packed(users, embedding_dim=DIM), "site": sites})


def make_collection(rows: int) -> Any:
    """Make what the tables are looked up by, without memory for their floats: means of users, sums of sites."""
    users = EmbeddingBagConfig(
        name="user", num_embeddings=rows, embedding_dim=DIM, feature_names=["friends"], pooling=PoolingType.MEAN
    )
    sites = EmbeddingBagConfig(name="site", num_embeddings=SITES, embedding_dim=DIM, feature_names=["visited"])
    return EmbeddingBagCollection([users, sites], device=torch.device("meta"))


def draw_bags(rows: int) -> Any:
    """Draw this process's own bags; some are empty."""
    random = np.random.default_rng(dist.get_rank())
    lengths = random.integers(0, LONGEST, (2, BAGS))
    indices = [random.integers(0, size, count) for size, count in zip((rows, SITES), lengths.sum(axis=1), strict=True)]
    return KeyedJaggedTensor(
        ["friends", "visited"], torch.from_numpy(np.concatenate(indices)), lengths=torch.from_numpy(lengths.reshape(-1))
    )


def count_private_bytes() -> int:
    """Count the bytes of this process's own memory, without pages of files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def serve(path: Path, rows: int) -> Served:
    """Take this process's part, and look up its bags."""
    before = count_private_bytes()
    sharder = embpack.torchrec.Sharder(embpack.load(path))
    last = dist.get_world_size() - 1
    served = shard(make_collection(rows), {"user": row_wise(), "site": table_wise(rank=last)}, sharder=sharder)
    del sharder  # so the file is no longer mapped
    part = count_private_bytes() - before
    features = draw_bags(rows)
    with torch.inference_mode():
        times = []
        for _ in range(20):
            start = time.perf_counter()
            pooled = served(features).wait()
            times.append(time.perf_counter() - start)
    return Served(part, float(np.median(times)), find_error(path, features, pooled))


def find_error(path: Path, features: Any, pooled: Any) -> float:
    """Return the greatest difference from what embpack looks up in the mapped file, by itself."""
    tables, errors = embpack.load(path), []
    for name, key, mode in (("user", "friends", "mean"), ("site", "visited", "sum")):
        indices, offsets = features[key].values().numpy(), features[key].offsets().numpy()[:-1]
        wanted = tables[name].embedding_bag(indices, offsets, mode=mode)
        errors.append(float(np.abs(pooled[key].numpy() - wanted).max()))
    return max(errors)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example in one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="users (%(default)s)")
    rows = parser.parse_args(arguments).rows
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:  # not started by torchrun
        os.environ.update(alone)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "tables.safetensors"]
        if rank == 0:
            write_tables(paths[0], rows)
        dist.broadcast_object_list(paths)
        found: list[Any] = [None] * size
        dist.all_gather_object(found, serve(paths[0], rows))
        if rank == 0:
            show(found, paths[0].stat().st_size)
    dist.destroy_process_group()


def show(found: Sequence[Served], nbytes: int) -> None:
    """Print a line for each process."""
    table = Table("process", box=None, title=f"{nbytes:,} bytes of packed tables")
    for name in ("bytes of its own", "of all", f"seconds for {BAGS} bags", "greatest difference"):
        table.add_column(name, justify="right")
    for rank, served in enumerate(found):
        share = f"{served.part / nbytes:.1%}".replace("%", " %")
        table.add_row(str(rank), f"{served.part:,}", share, f"{served.time:.4f}", f"{served.error:.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

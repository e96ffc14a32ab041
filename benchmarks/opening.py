"""Opening a model with tables of many gigabytes: how long, and how much memory."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

import embpack
from embpack.cli import show
from embpack.files import make_metadata
from embpack.formats import OutTensor
from embpack.packed_files import open_packed
from embpack.torch import load_checkpoint

DIM, SMALL_ROWS = 64, 16
TABLE = "user_embedding.weight"
PAGE_BYTES = 4096
LENGTH_BYTES = 8  # of a safetensors header's length
EPILOG = """
The checkpoint is sparse: it has the size, and all rows are zeros that take no room on the disk. Opening reads none of
them, so that makes no difference.
"""


class Recommender(nn.Module):
    """A model with a large table."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.user_embedding = nn.EmbeddingBag(rows, DIM, mode="sum")
        self.top = nn.Linear(DIM, 1)

    def forward(self, users: torch.Tensor) -> torch.Tensor:
        """Score bags of users [B, n]."""
        scores: torch.Tensor = self.top(self.user_embedding(users))
        return scores


def write_sparse_checkpoint(path: Path, rows: int) -> None:
    """Write what embpack quantize makes of such a model, with zeros for the table's bytes."""
    with TemporaryDirectory() as folder:
        source, small = Path(folder) / "float.safetensors", Path(folder) / "small.safetensors"
        save_model(Recommender(SMALL_ROWS), str(source))
        embpack.quantize_file(source, small)
        content = small.read_bytes()
        with open_packed(small) as packed:
            [metadata] = (file.contents for file in packed.files)
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(content[LENGTH_BYTES:end])
    header[TABLE]["shape"][0] = rows
    size = 0
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        begin, stop = entry["data_offsets"]
        length = rows * (stop - begin) // SMALL_ROWS if entry is header[TABLE] else stop - begin
        entry["data_offsets"] = [size, size + length]
        size += length
    tensors = [
        OutTensor(name, entry["dtype"], tuple(entry["shape"]), lambda: iter(()))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    entries = {TABLE: replace(metadata.tables[TABLE], num_embeddings=rows)}
    header["__metadata__"] |= make_metadata(entries, metadata.others or {}, tensors)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        file.truncate(LENGTH_BYTES + len(text) + size)


def count_resident_bytes() -> int:
    """Memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def main(arguments: Sequence[str] | None = None) -> None:
    """Open one, and print what it took."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.opening",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=10, metavar="N", help="of packed rows (default: 10)")
    rows = int(parser.parse_args(arguments).gigabytes * 1e9) // (DIM // 2 + 4)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_sparse_checkpoint(path, rows)
        start = time.perf_counter()
        with torch.device("meta"):
            model = Recommender(rows)
        made, before = time.perf_counter(), count_resident_bytes()
        load_checkpoint(model, path)
        model(torch.tensor([[0, rows - 1]]))
        opened, more = time.perf_counter(), count_resident_bytes() - before
    table: Any = model.user_embedding
    for line in (
        f"{rows:,} x {DIM}: {table.packed.nbytes:,} bytes of packed rows, {4 * DIM * rows:,} of float32",
        f"model made on the meta device in {made - start:.3f} s, nearly all of which PyTorch takes for its first one",
        f"opened, and two rows looked up, in {opened - made:.4f} s, with {more / 2**20:.1f} MiB more in memory",
    ):
        show.output.print(line)


if __name__ == "__main__":
    main()

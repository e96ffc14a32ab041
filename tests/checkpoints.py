"""Checkpoints to pack, files by hand, and programs to run on them; used by several test files."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

LENGTH_BYTES = 8


class RawTensor(NamedTuple):
    """A tensor as a safetensors file has it."""

    dtype: str
    shape: tuple[int, ...]
    payload: bytes


class RawFile(NamedTuple):
    """A safetensors file taken apart without any library."""

    header_bytes: int
    metadata: dict[str, str]
    tensors: dict[str, RawTensor]


def read_raw(path: Path) -> RawFile:
    """Take a safetensors file apart, as docs/format.md describes it."""
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + header_bytes])
    payload = content[LENGTH_BYTES + header_bytes :]
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: RawTensor(entry["dtype"], tuple(entry["shape"]), payload[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    return RawFile(header_bytes, metadata, tensors)


def write_raw(path: Path, header: Mapping[str, Any] | bytes, payload: bytes = b"", size: int = 0) -> None:
    """Write a safetensors file by hand; with size it is made that long, and takes no room on the disk for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text + payload)
        if size:
            file.truncate(LENGTH_BYTES + len(text) + size)


def checksum_header(value: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Checksum a header as docs/format.md has it; tensors: by name, of type and shape as the header has them."""
    covered = {key: value[key] for key in ("version", "tables", "others")}
    covered["tensors"] = {name: [entry["dtype"], entry["shape"]] for name, entry in tensors.items()}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write_sparse_table(path: Path, name: str, num_embeddings: int, embedding_dim: int) -> None:
    """Write a float32 table of zeros that takes no room on the disk."""
    size = num_embeddings * embedding_dim * 4
    entry = {"dtype": "F32", "shape": [num_embeddings, embedding_dim], "data_offsets": [0, size]}
    write_raw(path, {name: entry}, size=size)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Make a PyTorch tensor, of bfloat16 too, of which PyTorch knows nothing in NumPy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Undo as_tensor."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@dataclass(frozen=True)
class Arrays:
    """What a test packs: tables, and tensors that must come through as they are."""

    tables: dict[str, np.ndarray]
    others: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: as_tensor(array) for name, array in {**self.others, **self.tables}.items()}


def write_safetensors(folder: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "model.safetensors"
    save_file(arrays.tensors, path, metadata=metadata)
    return path


def write_shards(folder: Path, arrays: Arrays) -> Path:
    """Write one shard a tensor, and return the folder of them."""
    folder = folder / "sharded"
    folder.mkdir()
    tensors = arrays.tensors
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items(), start=1):
        weight_map[name] = f"model-{i:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / weight_map[name], metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_shards_named_by_index(folder: Path, arrays: Arrays) -> Path:
    return write_shards(folder, arrays) / "model.safetensors.index.json"


def write_torch(folder: Path, arrays: Arrays) -> Path:
    torch.save(arrays.tensors, folder / "model.pt")
    return folder / "model.pt"


def write_wrapped_torch(folder: Path, arrays: Arrays) -> Path:
    torch.save({"state_dict": arrays.tensors, "epoch": 3}, folder / "model.pth")
    return folder / "model.pth"


def write_old_torch(folder: Path, arrays: Arrays) -> Path:
    torch.save(arrays.tensors, folder / "model.bin", _use_new_zipfile_serialization=False)
    return folder / "model.bin"


def write_npy(folder: Path, arrays: Arrays) -> Path:
    [(name, array)] = arrays.tables.items()
    np.save(folder / f"{name}.npy", array)
    return folder / f"{name}.npy"


def write_npz(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "model.npz", **arrays.others, **arrays.tables)
    return folder / "model.npz"


def write_compressed_npz(folder: Path, arrays: Arrays) -> Path:
    np.savez_compressed(folder / "model.npz", **arrays.others, **arrays.tables)
    return folder / "model.npz"


def write_parquet(folder: Path, arrays: Arrays) -> Path:
    columns = {name: pa.array(array) for name, array in arrays.others.items()}
    for name, array in arrays.tables.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
    columns["word"] = pa.array([f"word {i}" for i in range(len(next(iter(arrays.tables.values()))))])
    # Row groups that are no multiple of a chunk.
    pq.write_table(pa.table(columns), folder / "model.parquet", row_group_size=47)
    return folder / "model.parquet"


Write = Callable[[Path, Arrays], Path]


def names_in(folder: Path) -> set[str]:
    """Everything in a folder, hidden files too: what a failure must not leave behind."""
    return {file.name for file in folder.iterdir()}


def run_python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_embpack(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as its users do."""
    command = Path(sys.executable).with_name("embpack")
    return subprocess.run(
        [command, *map(str, args)],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )

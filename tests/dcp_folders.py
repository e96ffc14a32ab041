"""Folders of torch.distributed.checkpoint made by hand, with chunks that PyTorch's processes would cut otherwise."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Chunks = Mapping[tuple[int, ...], torch.Tensor]


def write_dcp(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Chunks]],
    change: Callable[[Metadata], Any] = lambda metadata: metadata,
) -> Path:
    """Write one.

    Args:
        folder: is made.
        tensors: by name, the shape of each, and its chunks by where they begin; each lies in a file of its own rank.
        change: what is pickled in place of the metadata.
    """
    folder.mkdir(parents=True)
    metadata = Metadata({}, storage_data={}, version="1.0.0")
    for name, (shape, chunks) in tensors.items():
        dtype = next((chunk.dtype for chunk in chunks.values()), torch.float32)
        places = [ChunkStorageMetadata(torch.Size(offsets), chunk.size()) for offsets, chunk in chunks.items()]
        metadata.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(shape), places
        )
        for rank, (offsets, chunk) in enumerate(chunks.items()):
            with (folder / f"__{rank}_0.distcp").open("ab") as file:
                start = file.tell()
                torch.save(chunk, file)
                entry = _StorageInfo(f"__{rank}_0.distcp", start, file.tell() - start)
            metadata.storage_data[MetadataIndex(name, offsets)] = entry
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))
    return folder


def write_pieces(folder: Path, tensors: Mapping[str, Chunks]) -> Path:
    """Write what HuggingFaceStorageWriter does with save_distributed; each chunk is in a file of its own rank."""
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for rank in range(max(map(len, tensors.values()))):
        own = {name: list(chunks.items())[rank] for name, chunks in tensors.items() if rank < len(chunks)}
        places = {name: {"saved_offsets": list(offsets)} for name, (offsets, _) in own.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        path = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file({name: tensor.contiguous() for name, (_, tensor) in own.items()}, path, metadata)
    return folder

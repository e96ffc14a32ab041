"""Writes state dicts with torch.save."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from embpack.sources.dtypes import ARRAY_DTYPES
from embpack.sources.torch import DTYPES
from embpack.targets.base import OutShard, OutTensor, as_bytes, iter_checked, refuse_dtypes


def write_torch(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Save a plain dict of tensors; all of them are in memory at once, torch.save wants it so.

    Raises:
        ValueError: PyTorch has no such type.
    """
    refuse_dtypes(path, shard, DTYPES, "write .safetensors")
    state = {tensor.name: _collect(tensor) for tensor in shard.tensors}
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # PyTorch's own error when writing to the file fails hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _collect(tensor: OutTensor) -> torch.Tensor:
    array = np.empty(tensor.shape, ARRAY_DTYPES[tensor.dtype])
    values, filled = as_bytes(array), 0
    for chunk in iter_checked(tensor):
        values[filled : filled + chunk.nbytes] = as_bytes(chunk)
        filled += chunk.nbytes
    return torch.from_numpy(array).view(DTYPES[tensor.dtype])

"""Writes .npy and .npz files as a stream."""

import zipfile
from pathlib import Path
from typing import IO, BinaryIO

from numpy.lib import format as npy

from embpack.sources.dtypes import NUMPY_DTYPES
from embpack.targets.base import OutShard, OutTensor, as_bytes, iter_checked, refuse_dtypes

_WAYS_OUT = "write .safetensors or .pt"


def write_npy(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write the only tensor of a shard.

    Raises:
        ValueError: there is not exactly one, or NumPy has no such type.
    """
    if len(shard.tensors) != 1:
        raise ValueError(f"{path}: an .npy file holds 1 tensor, but there are {len(shard.tensors)}; write .npz")
    refuse_dtypes(path, shard, NUMPY_DTYPES, _WAYS_OUT)
    _write_array(file, shard.tensors[0])


def write_npz(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write an uncompressed .npz file.

    Raises:
        ValueError: NumPy has no such type.
    """
    refuse_dtypes(path, shard, NUMPY_DTYPES, _WAYS_OUT)
    with zipfile.ZipFile(file, "w") as archive:
        for tensor in shard.tensors:
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as member:
                _write_array(member, tensor)


def _write_array(file: IO[bytes], tensor: OutTensor) -> None:
    descr = npy.dtype_to_descr(NUMPY_DTYPES[tensor.dtype])
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": tensor.shape})
    for chunk in iter_checked(tensor):
        file.write(as_bytes(chunk))

"""Where load_checkpoint finds tables: in files of embpack quantize, and in those of a packed model's state dict."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from embpack.errors import FormatError
from embpack.files import METADATA_KEY
from embpack.formats import INDEX_SUFFIX, SourceTensor, open_checkpoint
from embpack.formats.paths import as_path
from embpack.formats.torch import DTYPES
from embpack.lookups import Table
from embpack.packed_files import Access, open_packed
from embpack.rows import ROW_DTYPES
from embpack.torch.ops import table_of_arrays
from embpack.torch.state import FORMAT, read_format

Found = tuple[dict[str, Table], dict[str, SourceTensor]]


@contextmanager
def open_tables(path: str | Path, access: Access) -> Iterator[Found]:
    """Open a file of embpack quantize, or one that a packed model was saved in, each maybe in shards.

    Args:
        path: of it.
        access: to the rows, as embpack.load takes it.

    Yields:
        Tables by the name of the float weight in a model, and all other tensors by name, which can be read
        until the block ends.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version.
    """
    path = as_path(path)
    if _is_state(path):
        with open_checkpoint(path) as checkpoint:
            yield _split_state(path, {tensor.name: tensor for tensor in checkpoint.tensors}, access)
        return
    with open_packed(path) as packed:
        yield {name: table.open(access) for name, table in packed.tables.items()}, packed.others


def _is_state(path: Path) -> bool:
    """Whether safetensors files have the buffers of packed modules, and not the metadata of embpack quantize."""
    if path.is_file() and not path.name.endswith((".safetensors", INDEX_SUFFIX)):
        return False
    with open_checkpoint(path) as checkpoint:
        is_ours = any(METADATA_KEY in shard.metadata for shard in checkpoint.shards)
        names = [tensor.name for shard in checkpoint.shards for tensor in shard.tensors]
    return not is_ours and any(name.endswith(f".{FORMAT}") for name in names)


def _split_state(path: Path, tensors: Mapping[str, SourceTensor], access: Access) -> Found:
    """Tell the buffers of packed modules from other tensors.

    Modules that share rows have them in the file once; what the others say of them is left out.
    """
    owners = [name.removesuffix(f".{FORMAT}") for name in tensors if name.endswith(f".{FORMAT}")]
    buffers = {f"{owner}.{name}" for owner in owners for name in (FORMAT, "packed", "clusters", "codebooks")}
    others = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    dtype = _find_dtype(others)
    with_rows = [owner for owner in owners if f"{owner}.packed" in tensors]
    return {f"{owner}.weight": _make_table(path, tensors, owner, dtype, access) for owner in with_rows}, others


def _find_dtype(tensors: Mapping[str, SourceTensor]) -> str:
    """The type of the first floats in the file: a state dict does not say of what type a table's weights were."""
    names = [str(DTYPES.get(tensor.dtype)).removeprefix("torch.") for tensor in tensors.values()]
    return next((name for name in names if name in ROW_DTYPES), "float32")


def _make_table(path: Path, tensors: Mapping[str, SourceTensor], owner: str, dtype: str, access: Access) -> Table:
    def read(name: str, *, mapped: bool = False) -> Any:
        tensor = tensors.get(f"{owner}.{name}")
        return None if tensor is None else tensor.whole(mapped=mapped)

    text = read_format(torch.from_numpy(read(FORMAT)))
    if access == "disk":
        raise ValueError(
            f"{path}: rows of a state dict cannot stay on the disk; pack the checkpoint with embpack quantize, or load "
            "it with access='mapped'"
        )
    try:
        return table_of_arrays(
            text, read("packed", mapped=access == "mapped"), read("clusters"), read("codebooks"), dtype=dtype
        )
    except ValueError as error:
        raise FormatError(f"{path}: {owner}: {error}") from None

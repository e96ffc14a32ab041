"""Safetensors files of which each has what one process held, as PyTorch's HuggingFaceStorageWriter writes them.

With ``save_distributed`` each process writes a file; a tensor has its whole name in all of them, and their metadata
says where its pieces begin. There is no index.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embpack.errors import FormatError
from embpack.formats.base import Checkpoint, Shard, SourceTensor
from embpack.formats.blocks import Block, are_joinable, join_blocks
from embpack.formats.rank_files import list_pieces
from embpack.formats.safetensors import parse_object, read_shard
from embpack.formats.source import SourceFile, make_source

_KEY = "DCP_SHARDING_INFO"
_OWN_KEYS = {_KEY, "DCP_VERSION"}


@contextmanager
def open_distributed(path: Path) -> Iterator[Checkpoint]:
    """Open all files of a checkpoint, which is one shard: pieces of a tensor are joined.

    Args:
        path: of one of its files.

    Raises:
        FormatError: one of them is damaged, does not say where its pieces begin, or pieces do not fit together.
    """
    folder = path.parent
    sources = [make_source(each) for each in list_pieces(folder)]
    shards = list(map(_read, sources))
    blocks: dict[str, list[Block]] = {}
    for shard in shards:
        places = _read_offsets(folder / shard.file_name, shard)
        for tensor in shard.tensors:
            blocks.setdefault(tensor.name, []).append(Block(places[tensor.name], tensor))
    items = [shard.metadata.items() for shard in shards]
    metadata = {key: value for key, value in items[0] if key not in _OWN_KEYS and all((key, value) in i for i in items)}
    others = dict.fromkeys(key for own in items for key, _ in own if key not in {*_OWN_KEYS, *metadata})
    left_out = [f"metadata {key!r} (it is not the same in all files)" for key in others]
    tensors = []
    for name, own in blocks.items():
        joined = _join(folder, name, own)
        if joined is None:
            left_out.append(f"tensor {name!r} (it is cut along two dimensions beside its first)")
        else:
            tensors.append(joined)
    whole = Shard("model.safetensors", sum(shard.num_bytes for shard in shards), tuple(tensors), metadata)
    yield Checkpoint(folder, (whole,), left_out=tuple(left_out), sources=tuple(sources))


def _read(source: SourceFile) -> Shard:
    with source:
        return read_shard(source, source.path.name)


def _read_offsets(path: Path, shard: Shard) -> dict[str, tuple[int, ...]]:
    """Return where each tensor of a file begins in the whole one."""
    if _KEY not in shard.metadata:
        raise FormatError(
            f"{path}: its name is that of a piece of a checkpoint, but it has no metadata {_KEY}, which says where "
            "tensors begin; rename it if it is whole"
        )
    places = parse_object(path, shard.metadata[_KEY].encode())
    found = {}
    for tensor in shard.tensors:
        place = places.get(tensor.name)
        offsets = place.get("saved_offsets") if isinstance(place, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != len(tensor.shape)
            or not all(type(each) is int and 0 <= each < 1 << 63 for each in offsets)
        ):
            raise FormatError(f"{path}: its metadata {_KEY} does not say where tensor {tensor.name!r} begins")
        found[tensor.name] = tuple(offsets)
    return found


def _join(folder: Path, name: str, blocks: list[Block]) -> SourceTensor | None:
    """Join the pieces of a tensor, whose shape is known by them alone; None if they are cut in another way."""
    first = blocks[0].tensor
    for block in blocks:
        if (block.tensor.dtype, len(block.tensor.shape)) != (first.dtype, len(first.shape)):
            raise FormatError(
                f"{folder}: pieces of tensor {name!r} are {first.dtype} with {len(first.shape)} dimensions and "
                f"{block.tensor.dtype} with {len(block.tensor.shape)}; they are of different checkpoints"
            )
    ends = ([offset + size for offset, size in zip(each.offsets, each.tensor.shape, strict=True)] for each in blocks)
    shape = tuple(map(max, zip(*ends, strict=True)))
    if not are_joinable(shape, [block.tensor.shape for block in blocks]):
        return None
    return join_blocks(str(folder), name, shape, first.dtype, blocks)

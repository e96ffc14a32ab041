"""Folders of torch.distributed.checkpoint, read without PyTorch: no pickle is ever run, no process group is needed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import Checkpoint, Shard, SourceTensor
from embpack.formats.blocks import Block, are_joinable, join_blocks
from embpack.formats.dcp_metadata import Chunk, Entry, SavedState, SavedTensor, merge_states, read_metadata
from embpack.formats.dtypes import ARRAY_DTYPES, count_bytes
from embpack.formats.rank_files import METADATA_NAME, list_metadata
from embpack.formats.source import SourceFile, make_source
from embpack.formats.torch_file import read_saved
from embpack.formats.torch_tensor import NAMES, TAGS, ViewReader, is_tensor, view_tensor
from embpack.table_names import is_optimizer_state

# What lies beside the weight of a table of TorchRec that finds rows by key, and only beside such.
_BESIDE_KEYED = ("weight_id", "bucket", "metadata")
_MOST_NAMED = 3
# Places that are known of entries; each takes about a kilobyte, and of a large checkpoint there are many.
_MOST_PLACES = 4096


@contextmanager
def open_dcp(path: Path) -> Iterator[Checkpoint]:
    """Open a checkpoint, which is one shard: chunks of a tensor are joined.

    Args:
        path: of its metadata.

    Raises:
        FormatError: it is damaged, files are missing, or its entries are compressed.
    """
    paths = [path] if path.name == METADATA_NAME else list_metadata(path.parent)
    metadata = [make_source(each) for each in paths]
    kept, left_out = _choose(merge_states(path, list(map(_read_metadata, metadata))))
    _check_entries(path, kept)
    entries = [chunk.entry for tensor in kept.values() for chunk in tensor.chunks]
    sources = _open_sources(path, entries)
    finder = _Finder()
    tensors = tuple(_make_tensor(path, name, tensor, sources, finder) for name, tensor in kept.items())
    shard = Shard("model.safetensors", sum(entry.num_bytes for entry in entries), tensors)
    yield Checkpoint(path.parent, (shard,), left_out=left_out, sources=(*metadata, *sources.values()))


def _read_metadata(source: SourceFile) -> SavedState:
    with source, source.unchanged("metadata"):
        return read_metadata(source)


def _choose(state: SavedState) -> tuple[dict[str, SavedTensor], tuple[str, ...]]:
    """Choose the tensors that are read, and note why others are not."""
    keyed = {name for name in state.tensors if name.endswith(".weight") and f"{name}_id" in state.tensors}
    stems = {name.removesuffix("weight") for name in keyed}
    beside = {f"{stem}{part}" for stem in stems for part in _BESIDE_KEYED}
    kept: dict[str, SavedTensor] = {}
    optimizer, unknown, cut = list[str](), list[str](), list[str]()
    for name, tensor in state.tensors.items():
        if name in keyed or name in beside:
            continue
        if is_optimizer_state(name):
            optimizer.append(name)
        elif tensor.dtype not in TAGS:
            unknown.append(name)
        elif not are_joinable(tensor.shape, [chunk.sizes for chunk in tensor.chunks]):
            cut.append(name)
        else:
            kept[name] = tensor
    groups = (
        ("tensors of the optimizer", optimizer),
        ("objects, which are no tensors", state.objects),
        ("tables that find rows by key and not by number", sorted(keyed)),
        ("tensors of a type that safetensors files have not", unknown),
        ("tensors that are cut along two dimensions beside their first", cut),
    )
    return kept, tuple(_note(what, names) for what, names in groups if names)


def _note(what: str, names: Sequence[str]) -> str:
    more = " ..." if len(names) > _MOST_NAMED else ""
    return f"{what}: {len(names):,} ({', '.join(map(repr, names[:_MOST_NAMED]))}{more})"


def _check_entries(path: Path, kept: dict[str, SavedTensor]) -> None:
    """Refuse entries that cannot be what the metadata says, and those that lie over each other."""
    entries = []
    for name, tensor in kept.items():
        for chunk in tensor.chunks:
            entry = chunk.entry
            if entry.transforms:
                raise FormatError(
                    f"{path}: tensor {name!r} was compressed ({', '.join(entry.transforms)}), and such entries are not "
                    "read; save it again without extensions: FileSystemWriter(folder)"
                )
            num_bytes = count_bytes(TAGS[tensor.dtype], chunk.sizes)
            if num_bytes > entry.num_bytes:
                raise FormatError(
                    f"{path}: the chunk at {list(chunk.offsets)} of tensor {name!r} takes {num_bytes} bytes, but has "
                    f"{entry.num_bytes} in {entry.file_name}; it is damaged, copy it again"
                )
            entries.append((entry.file_name, entry.offset, entry.num_bytes, name))
    entries.sort()
    for (file_name, offset, num_bytes, name), (next_file, next_offset, _, next_name) in pairwise(entries):
        if file_name == next_file and offset + num_bytes > next_offset:
            raise FormatError(
                f"{path}: tensors {name!r} and {next_name!r} lie over each other at byte {next_offset} of {file_name}; "
                "it is damaged, copy it again"
            )


def _open_sources(path: Path, entries: Iterable[Entry]) -> dict[str, SourceFile]:
    """Open each file once, to see that it is there and long enough; it is opened again when its tensors are read."""
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry.file_name] = max(ends.get(entry.file_name, 0), entry.offset + entry.num_bytes)
    sources = {}
    for file_name, end in sorted(ends.items()):
        if not (path.parent / file_name).is_file():
            raise FormatError(f"{path}: puts tensors into {file_name}, but there is no such file; copy it too")
        source = sources[file_name] = make_source(path.parent / file_name)
        with source:
            if source.size < end:
                raise FormatError(
                    f"{source.path}: has {source.size} bytes, the metadata promises {end}; it is truncated, copy it "
                    "again"
                )
    return sources


@dataclass(frozen=True)
class _Values:
    """A chunk in its file, and what it must be."""

    name: str
    tag: str
    chunk: Chunk
    source: SourceFile


class _Finder:
    """Finds the values of chunks in their files, which are open; what was found last is known, in this process."""

    def __init__(self) -> None:
        self.find = lru_cache(_MOST_PLACES)(_find_values)

    def __reduce__(self) -> tuple[type["_Finder"], tuple[()]]:
        return _Finder, ()


def _make_tensor(
    path: Path, name: str, tensor: SavedTensor, sources: dict[str, SourceFile], finder: _Finder
) -> SourceTensor:
    tag = TAGS[tensor.dtype]
    blocks = []
    for chunk in tensor.chunks:
        source = sources[chunk.entry.file_name]
        read = partial(_iter_rows, finder, _Values(name, tag, chunk, source))
        blocks.append(Block(chunk.offsets, SourceTensor(name, chunk.sizes, tag, read, source)))
    return join_blocks(str(path), name, tensor.shape, tag, blocks)


def _iter_rows(finder: _Finder, values: _Values, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    return finder.find(values).iter_rows(start, stop, n)


def _find_values(values: _Values) -> ViewReader:
    """Find a chunk's values in its entry, a file of torch.save within the file.

    Raises:
        FormatError: the entry is none, or is not what the metadata says.
    """
    entry, sizes, source = values.chunk.entry, values.chunk.sizes, values.source
    part = source.part(entry.offset, entry.num_bytes, f"entry of {values.name!r} at byte {entry.offset}")
    saved = read_saved(part)
    view = view_tensor(saved, values.name, saved.value) if is_tensor(saved.value) else "no tensor"
    if isinstance(view, str):
        raise FormatError(f"{part.path}: holds a {view}; the metadata promises {_describe(values.tag, sizes)}")
    if (view.tag, view.shape) != (values.tag, sizes) or count_bytes(view.tag, sizes) > view.storage.nbytes:
        raise FormatError(
            f"{part.path}: holds {view.storage.nbytes} bytes for {_describe(view.tag, view.shape)}, the metadata "
            f"promises {_describe(values.tag, sizes)}; they are of different checkpoints"
        )
    dtype = ARRAY_DTYPES[view.tag].newbyteorder(saved.byte_order)
    return ViewReader(replace(view, offset=entry.offset + view.offset), source, dtype)


def _describe(tag: str, shape: tuple[int, ...]) -> str:
    return f"{NAMES[tag]} of shape {list(shape)}"

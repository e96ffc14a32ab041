"""What the metadata of torch.distributed.checkpoint says: which tensors there are, and where their chunks lie.

It is a pickle of PyTorch's classes, which is read without PyTorch and without being run.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embpack.errors import FormatError
from embpack.formats.base import is_utf8
from embpack.formats.pickled import Made, Named, PickleError, read_pickle
from embpack.formats.source import SourceFile
from embpack.formats.torch_file import MOST_PICKLE_BYTES

# A chunk takes 70 steps, and while they are read some 2 kB of memory.
MOST_STEPS = 1 << 24
_MOST_DIMENSIONS = 64
_SMALLER = "save the model's state dict alone, without the optimizer's"


@dataclass(frozen=True)
class Entry:
    """Where a chunk's values lie.

    Attributes:
        file_name: path of the file from the checkpoint's folder on.
        offset: of its first byte in the file.
        num_bytes: that it has there, with what is around the values.
        transforms: what was done to its bytes, "stream.zstd/1"; none in general.
    """

    file_name: str
    offset: int
    num_bytes: int
    transforms: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it begins and how long it is in each dimension, and where its values lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    entry: Entry


@dataclass(frozen=True)
class SavedTensor:
    """A tensor.

    Attributes:
        dtype: PyTorch's name of its type, "float32".
        shape: of the whole tensor.
        chunks: those that have values, in order, each once.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class SavedState:
    """What was saved: tensors by name, and names of the objects that are no tensors."""

    tensors: dict[str, SavedTensor]
    objects: tuple[str, ...]


def read_metadata(source: SourceFile) -> SavedState:
    """Read a file of metadata that is open.

    Raises:
        FormatError: it is none, or damaged, or names files outside of its folder.
    """
    path = source.path
    if source.size > MOST_PICKLE_BYTES:
        raise FormatError(
            f"{path}: has {source.size} bytes, and metadata of at most {MOST_PICKLE_BYTES} is read; {_SMALLER}"
        )
    try:
        value = read_pickle(io.BytesIO(source.read(0, source.size)), most_steps=MOST_STEPS)
    except PickleError as error:
        advice = _SMALLER if "more than" in str(error) else "copy it again"
        raise FormatError(
            f"{path}: not metadata of torch.distributed.checkpoint, or damaged: {error}; {advice}"
        ) from error
    return _Reader(path).read(value)


def merge_states(path: Path, states: list[SavedState]) -> SavedState:
    """Join what several processes have saved, each with metadata of its own.

    Raises:
        FormatError: they disagree on a tensor.
    """
    if len(states) == 1:
        return states[0]
    tensors: dict[str, SavedTensor] = {}
    # What all processes have whole, each of them has saved: one will do.
    chunks: dict[str, dict[tuple[tuple[int, ...], ...], Chunk]] = {}
    for name, tensor in (item for state in states for item in state.tensors.items()):
        first = tensors.setdefault(name, tensor)
        if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
            raise FormatError(
                f"{path}: tensor {name!r} is {first.dtype} of shape {list(first.shape)}, in the metadata of another "
                f"process {tensor.dtype} of shape {list(tensor.shape)}; they are of different checkpoints"
            )
        for chunk in tensor.chunks:
            chunks.setdefault(name, {}).setdefault((chunk.offsets, chunk.sizes), chunk)
    joined = {
        name: SavedTensor(tensor.dtype, tensor.shape, tuple(chunks.get(name, {}).values()))
        for name, tensor in tensors.items()
    }
    return SavedState(joined, tuple(dict.fromkeys(name for state in states for name in state.objects)))


class _Reader:
    """Reads the value of the pickle of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, value: object) -> SavedState:
        fields = _find_fields(value, "Metadata")
        if fields is None:
            held = str(value) if isinstance(value, Made) else type(value).__name__
            raise self._refuse(f"holds a {held:.100}, not metadata of torch.distributed.checkpoint; it is never run")
        saved, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(saved, dict) or not isinstance(stored, dict):
            raise self._refuse("does not say which tensors there are and where they lie; it is damaged, copy it again")
        entries = dict(self._iter_entries(stored))
        tensors, objects = dict[str, SavedTensor](), []
        for name, described in saved.items():
            if not isinstance(name, str) or not is_utf8(name):
                raise self._refuse(f"an entry is named {str(name)!r:.100}, which is no text; rename it and save again")
            if _is_made(described, "BytesStorageMetadata"):
                objects.append(name)
            else:
                tensors[name] = self._read_tensor(name, described, entries)
        return SavedState(tensors, tuple(objects))

    def _refuse(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {what}")

    def _iter_entries(self, stored: dict[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...]], Entry]]:
        for key, value in stored.items():
            index, info = _find_fields(key, "MetadataIndex") or {}, _find_fields(value, "_StorageInfo") or {}
            match index, info:
                case {"fqn": str(name)}, {"relative_path": str(place), "offset": int(offset), "length": int(length)}:
                    pass
                case _:
                    raise self._refuse("an entry of storage_data is damaged; copy it again")
            parts = PurePosixPath(place)
            if parts.is_absolute() or ".." in parts.parts or "\0" in place or "://" in place or not parts.parts:
                raise self._refuse(
                    f"puts {name!r:.100} into {place!r:.100}, which is outside its folder; it is not read"
                )
            if offset < 0 or length < 0:
                raise self._refuse(f"puts {name!r:.100} at bytes [{offset}, {offset + length}); copy it again")
            offsets = _as_sizes(index.get("offset"))
            if offsets is not None:  # what is no tensor has none
                transforms = info.get("transform_descriptors") or ()
                names = transforms if isinstance(transforms, list | tuple) else [transforms]
                yield (name, offsets), Entry(place, offset, length, tuple(map(str, names)))

    def _read_tensor(
        self, name: str, described: object, entries: dict[tuple[str, tuple[int, ...]], Entry]
    ) -> SavedTensor:
        fields = _find_fields(described, "TensorStorageMetadata") or {}
        dtype, shape = _find_dtype(fields.get("properties")), _as_sizes(fields.get("size"))
        chunks = fields.get("chunks")
        if dtype is None or shape is None or not isinstance(chunks, list):
            raise self._refuse(f"what it says of tensor {name!r:.100} is damaged; copy it again")
        found: dict[tuple[int, ...], Chunk] = {}
        for value in chunks:
            chunk = _find_fields(value, "ChunkStorageMetadata") or {}
            offsets, sizes = _as_sizes(chunk.get("offsets")), _as_sizes(chunk.get("sizes"))
            if offsets is None or sizes is None or not _is_inside(offsets, sizes, shape):
                raise self._refuse(
                    f"tensor {name!r:.100} of shape {list(shape)} has a chunk that is no part of it; copy it again"
                )
            # Processes that have no rows of a table save none.
            if not math.prod(sizes):
                continue
            entry = entries.get((name, offsets))
            if entry is None:
                raise self._refuse(f"does not say where the chunk at {list(offsets)} of tensor {name!r:.100} lies")
            found[offsets] = Chunk(offsets, sizes, entry)
        return SavedTensor(dtype, shape, tuple(found.values()))


def _is_made(value: object, name: str) -> bool:
    """Whether a value would be an object of a class of torch.distributed, whichever module of it has the class."""
    match value:
        case Made(Named(module, found)):
            return found == name and module.startswith("torch.distributed.")
    return False


def _find_fields(value: object, name: str) -> dict[Any, Any] | None:
    """Return the attributes of an object of a class of torch.distributed."""
    if isinstance(value, Made) and _is_made(value, name) and isinstance(value.state, dict):
        return value.state
    return None


def _find_dtype(properties: object) -> str | None:
    if not isinstance(properties, Made) or not _is_made(properties, "TensorProperties"):
        return None
    match properties.state:
        case (Named("torch", str(name)), *_) | {"dtype": Named("torch", str(name))}:
            return name
    return None


def _as_sizes(value: object) -> tuple[int, ...] | None:
    """Return sizes or offsets, in general a torch.Size; None if the value is none."""
    match value:
        case Made(Named("torch", "Size"), (tuple(inner) | list(inner),)) | tuple(inner) | list(inner):
            sizes = tuple(inner)
        case Made(Named("torch", "Size"), ()):
            sizes = ()
        case _:
            return None
    if len(sizes) > _MOST_DIMENSIONS or not all(type(each) is int and 0 <= each < 1 << 63 for each in sizes):
        return None
    return sizes


def _is_inside(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if not len(offsets) == len(sizes) == len(shape):
        return False
    return all(offset + size <= length for offset, size, length in zip(offsets, sizes, shape, strict=True))

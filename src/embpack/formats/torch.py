"""State dicts of torch.save; no pickle is ever run."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from embpack.errors import FormatError
from embpack.formats.base import (
    Checkpoint,
    OutShard,
    OutTensor,
    Shard,
    SourceTensor,
    as_bytes,
    iter_checked,
    refuse_dtypes,
)
from embpack.formats.dtypes import ARRAY_DTYPES
from embpack.formats.pickled import Made, Named, Outside
from embpack.formats.source import SourceFile, make_source
from embpack.formats.torch_file import ADVICE, read_saved
from embpack.formats.torch_tensor import NAMES, View, ViewReader, describe_tensor, is_tensor, view_tensor

DTYPES: dict[str, torch.dtype] = {tag: getattr(torch, name) for tag, name in NAMES.items()}
"""PyTorch's type of each safetensors name that it can hold."""

# Where training scripts put a state dict that they save with other things: PyTorch's examples, fairseq and nanoGPT,
# Lightning and OpenMMLab, DeepSpeed, and others.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
# Expanded and tied tensors take more than the file has: so many times its bytes, and no less than the second.
_MOST_TIMES, _ALWAYS_BYTES = 100, 1 << 26


@contextmanager
def open_torch(path: Path) -> Iterator[Checkpoint]:
    """Open a state dict, which may be one entry of a dict with other things, as training scripts save it.

    Raises:
        FormatError: it is not a dict of tensors, or damaged.
    """
    source = make_source(path)
    with source:
        saved = read_saved(source)
        state, left_out = _choose_state(path, saved.value)
        views: dict[str, View] = {}
        for name, value in state.items():
            view = view_tensor(saved, name, value) if is_tensor(value) else _describe_inside(value)
            if isinstance(view, str):
                left_out.append(f"entry {_name_entry(name)} ({view})")
            elif not isinstance(name, str):
                raise FormatError(
                    f"{path}: the name of a tensor is {_name_entry(name)}, not a string; rename it and save again"
                )
            else:
                views[name] = view
        _refuse_expanded(source, views)
        tensors = tuple(_make_tensor(source, saved.byte_order, name, view) for name, view in views.items())
        yield Checkpoint(path, (Shard(path.name, source.size, tensors),), left_out=tuple(left_out))


def _choose_state(path: Path, value: object) -> tuple[dict[Any, Any], list[str]]:
    """Find the dict of tensors, and note what is beside it."""
    items = _find_items(value)
    if items is None:
        raise FormatError(f"{path}: holds a {_describe(value)}, not a dict of tensors by name; {_advise([value])}")
    with_tensors = [key for key, item in items.items() if _has_tensors(item)]
    wrappers = [key for key in with_tensors if key in _WRAPPERS]
    if not wrappers and _has_tensors(items):
        return items, []
    if len(wrappers) == 1:
        beside = [_note_beside(key, item, wrappers[0]) for key, item in items.items() if key != wrappers[0]]
        return _find_items(items[wrappers[0]]) or {}, beside
    chosen = wrappers or with_tensors
    if chosen:
        names = " and ".join(map(_name_entry, chosen))
        raise FormatError(
            f"{path}: holds dicts of tensors under {names}; save the one that is meant by itself: "
            f"torch.save(torch.load(path, weights_only=True)[{_name_entry(chosen[0])}], 'weights.pt')"
        )
    held = ", ".join(f"{_name_entry(key)} ({_describe(item)})" for key, item in list(items.items())[:8]) or "nothing"
    raise FormatError(f"{path}: holds a dict with no tensors, but {held}; {_advise(items.values())}")


def _note_beside(key: object, item: object, wrapper: str) -> str:
    """Note what is beside the dict of tensors; of what may be looked for, why it is not read."""
    why = f"; outside {wrapper!r}, which is read: save it by itself" if is_tensor(item) or _has_tensors(item) else ""
    return f"entry {_name_entry(key)} ({_describe(item)}{why})"


def _find_items(value: object) -> dict[Any, Any] | None:
    """Return what is in a dict of any class; None if the value is no dict."""
    match value:
        case dict():
            return value
        # As Python 2 wrote it.
        case Made(Named("collections", "OrderedDict"), (list(pairs),)):
            return dict(
                pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
            )
        case Made(maker=Named("collections", "OrderedDict" | "defaultdict"), items=items):
            return items
        case Made(items=items) if items:
            return items
    return None


def _has_tensors(value: object) -> bool:
    return any(map(is_tensor, (_find_items(value) or {}).values()))


def _name_entry(key: object) -> str:
    return str(key) if isinstance(key, Made) else repr(key)


def _describe(value: object) -> str:
    if is_tensor(value):
        return describe_tensor(value)
    if _has_tensors(value):
        return "dict with tensors"
    if isinstance(value, Made):
        return str(value)
    return "storage" if isinstance(value, Outside) else type(value).__name__


def _describe_inside(value: object) -> str:
    """Describe what is no tensor among tensors."""
    return f"{_describe(value)}; save it by itself" if _has_tensors(value) else _describe(value)


def _advise(values: Iterable[object]) -> str:
    if any(isinstance(value, Made) and not is_tensor(value) for value in values):
        return (
            f"only a pickle makes such objects, and pickles are never run; where their classes are installed, {ADVICE}"
        )
    return ADVICE


def _refuse_expanded(source: SourceFile, views: dict[str, View]) -> None:
    """Raise FormatError where a small file stands for very much."""
    sizes = {name: math.prod(view.shape) * ARRAY_DTYPES[view.tag].itemsize for name, view in views.items()}
    total = sum(sizes.values())
    if total > max(_MOST_TIMES * source.size, _ALWAYS_BYTES):
        name = max(sizes, key=lambda name: sizes[name] - views[name].storage.nbytes)
        raise FormatError(
            f"{source.path}: its tensors take {total} bytes, over {_MOST_TIMES} times the {source.size} of the file; "
            f"{name!r} of shape {list(views[name].shape)} takes {sizes[name]}, but has {views[name].storage.nbytes} in "
            "the file; save the .contiguous() of what was expanded"
        )


def _make_tensor(source: SourceFile, byte_order: str, name: str, view: View) -> SourceTensor:
    reader = ViewReader(view, source, ARRAY_DTYPES[view.tag].newbyteorder(byte_order))
    return SourceTensor(name, view.shape, view.tag, reader.iter_rows, source, stored=reader.stored)


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

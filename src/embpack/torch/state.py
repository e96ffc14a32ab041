"""What a packed module's state dict says of its rows, and whether those of another are what the module reads.

Sizes do not tell what bytes mean: rotated rows have those of others, and the ways to pack share some. So the row format
lies beside the rows, as a buffer of its own, and goes wherever they go. It has one length, whatever it says: what
compares sizes before values, as torch.distributed.checkpoint does, lets it through, and the module says what is wrong.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from embpack.layouts import RowFormat

FORMAT = "row_format_ascii"
FORMAT_BYTES = 64


def write_format(row_format: RowFormat) -> Tensor:
    """Make the buffer of a row format: its text in ASCII and zeros, uint8 [64], in memory even on the meta device."""
    text = str(row_format).encode("ascii").ljust(FORMAT_BYTES, b"\0")
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def read_format(buffer: Tensor) -> str:
    """Undo write_format; any bytes are some text, which is then no row format."""
    values: Any = buffer.to("cpu", torch.uint8).reshape(-1).tolist()
    return bytes(values).rstrip(b"\0").decode("latin-1")


def check_format(buffer: Tensor, row_format: RowFormat, name: str) -> None:
    """Raise ValueError if rows, by the buffer beside them, are of another format than that in which they are read."""
    found = read_format(buffer)
    if found != str(row_format):
        raise ValueError(
            f"{name}: the rows are {found!r}, but the module reads {str(row_format)!r}. Make the module like the one "
            f"that was saved{_list_differences(found, row_format)}"
        )


def receive_state(
    state: Mapping[str, Any], buffers: Mapping[str, Tensor | None], row_format: RowFormat, prefix: str, name: str
) -> Mapping[str, Any]:
    """Look at what load_state_dict brings for a module, before anything of it is changed.

    Args:
        state: by name, maybe with what is of other modules.
        buffers: the module's own.
        row_format: how the module reads its rows.
        prefix: what names in state have before those in buffers.
        name: the module's, for messages.

    Returns:
        What to load: the state; with the row format if it is an older one, which lacks it.

    Raises:
        ValueError: the rows are of another format, or of an older state whose sizes allow several, or have other sizes
            than the module's.
    """
    own = {prefix + key: buffer for key, buffer in buffers.items() if buffer is not None}
    given = {key: state[key] for key in own if isinstance(state.get(key), Tensor)}
    key = prefix + FORMAT
    if key in given and not given[key].is_meta:
        check_format(given[key], row_format, name)
    wrong = [item for item, tensor in given.items() if tensor.shape != own[item].shape]
    if wrong:  # in PyTorch's words
        raise ValueError(
            "\n\t".join(
                f"size mismatch for {item}: copying a param with shape {given[item].shape} from checkpoint, "
                f"the shape in current model is {own[item].shape}."
                for item in wrong
            )
        )
    if given and key not in given:
        _admit_older(row_format, key, name)
        return {**state, key: write_format(row_format)}
    return state


def _admit_older(row_format: RowFormat, key: str, name: str) -> None:
    """Warn of what an older state does not say, or refuse it if its sizes are those of several formats."""
    others = row_format.find_others_of_size()
    if others:
        formats = " and ".join(repr(str(each)) for each in (row_format, *others))
        raise ValueError(
            f"{name}: the state dict lacks {key}, as those of earlier versions do, and its sizes are those of both "
            f"{formats}; the module reads the first. If you know that the rows are that, say so: "
            f"state[{key!r}] = module.state_dict()[{key!r}]"
        )
    warnings.warn(
        "the state dict is of an earlier version and does not say whether its rows were rotated; they are read as "
        f"{str(row_format)!r}, as the module was made. Save its state dict again, which then says it",
        stacklevel=2,
    )


def _list_differences(found: str, row_format: RowFormat) -> str:
    """How a module of a format is made, as far as it differs from one of another."""
    try:
        wanted = RowFormat.parse(found)
    except ValueError:
        return ", by an embpack that knows this format"
    values = [(field.name, getattr(wanted, field.name)) for field in fields(RowFormat)]
    different = [f"{name}={value!r}" for name, value in values if value != getattr(row_format, name)]
    return f": {', '.join(different)}"

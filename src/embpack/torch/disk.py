"""Modules whose rows stay on the disk: how they look rows up, and what they refuse."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embpack.bags import check_integers
from embpack.disk import DiskTable, find_row, read_arrays, renumber
from embpack.errors import FormatError
from embpack.lookups import find_outside
from embpack.torch.ops import check_devices


@torch.compiler.disable  # type: ignore[untyped-decorator]  # which has no types
def look_up(table: DiskTable, operator: Any, row_format: str, indices: Tensor, *lookup: Any, **options: Any) -> Tensor:
    """Call an operator with the rows that are asked for, each once, and what is asked of them.

    All of these rows are in memory at the same time.

    Args:
        table: whose rows they are.
        operator: embpack::embedding or embpack::embedding_bag, or the latter's overload with weights.
        row_format: of the rows, as it takes it.
        indices: of any shape.
        lookup: its other arguments but for the arrays beside the rows.
        options: padding_idx, if it is not None, among them.
    """
    check_integers("indices", indices)
    check_devices(torch.empty(0), indices=indices)
    flat = indices.reshape(-1).numpy()
    fault = find_outside(flat, table.num_embeddings)
    if fault != -1:
        raise table.explain_fault(fault, flat)
    rows, numbers = renumber(flat)
    if "padding_idx" in options:
        of_padding = find_row(rows, options.pop("padding_idx"))
        if of_padding >= 0:
            options["padding_idx"] = of_padding
    packed, *clusters = read_arrays([(array, rows) for array in table.arrays])
    beside: list[Tensor | None] = [_as_tensor(array) for array in clusters] or [None]
    if table.codebooks is not None:
        beside.append(_as_tensor(table.codebooks))
    try:
        found: Tensor = operator(
            torch.from_numpy(packed),
            row_format,
            torch.from_numpy(numbers).reshape(indices.shape),
            *lookup,
            *beside,
            **options,
        )
    except FormatError:
        table.gather(flat)  # which says it of the row in the table
        raise
    return found


def _as_tensor(array: Any) -> Tensor:
    """View what lies beside rows as operators take it: uint8 [entries, bytes of one]."""
    writable = array if array.flags.writeable else array.copy()  # as PyTorch's tensors are
    return torch.from_numpy(writable.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8))


def refuse_state(state: Mapping[str, Any], prefix: str, names: Collection[str]) -> None:
    """Raise ValueError if load_state_dict brings rows for a module that leaves its own on the disk."""
    brought = [name for name in names if prefix + name in state]
    if brought:
        raise ValueError(
            f"{prefix}{brought[0]} is in the state dict, but the rows of {prefix[:-1] or 'the module'} stay on the "
            "disk; load the model with access='mapped' to load rows into it"
        )


def refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise ValueError for a state dict that would lack the rows."""
    raise ValueError(
        f"the rows of {prefix[:-1] or 'the module'} stay on the disk, and a state dict would not have them; load the "
        "model with access='mapped' to save it, or save the state dicts of its other modules"
    )

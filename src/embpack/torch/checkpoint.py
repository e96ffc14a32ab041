"""load_checkpoint: a model with its tables packed and mapped, from a file that embpack quantize wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from embpack.files import open_packed
from embpack.table import PackedTable
from embpack.torch.convert import PACKED, Place, address_of, swap_collections, walk_children
from embpack.torch.modules import check_supported


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint with packed tables into a model, which needs no memory for float tables at any time.

    Args:
        model: made on the meta device (with torch.device("meta"): ...), or with values, which are replaced. Each
            nn.Embedding and nn.EmbeddingBag whose weight is a packed table of the file becomes a packed module, those
            of TorchRec's collections as quantize_ has it.
        path: a file written by embpack quantize; for a sharded one its folder or index.

    Returns:
        The model. Tables are mapped: opening does not depend on their size, and rows are read where they are looked
        up. All other tensors are in memory.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version.
        ValueError: model and file do not have the same tensors; names them. The model may be half loaded then. Or a
            module does what a packed one cannot (max_norm, sparse, scale_grad_by_freq).
    """
    tables: dict[str, PackedTable] = {}
    floats: dict[str, Tensor] = {}
    for file in open_packed(path):
        tables |= {name: file.table(name) for name in file.entries}
        with safe_open(file.path, "pt") as opened:
            floats |= {name: opened.get_tensor(name) for name in file.others}
    packed = _swap(model, tables)
    outcome = model.load_state_dict(floats, strict=False, assign=True)
    missing = [name for name in outcome.missing_keys if not name.startswith(packed)]
    if missing or outcome.unexpected_keys:
        raise ValueError(
            f"{path} does not go with the model: it lacks {', '.join(missing) or 'nothing'}, and the model lacks "
            f"{', '.join(outcome.unexpected_keys) or 'nothing'}"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unmade = [name for name, tensor in tensors if tensor.is_meta]
    if unmade:
        raise ValueError(
            f"{', '.join(unmade)}: still on the meta device, for no checkpoint has buffers that are not persistent; "
            "make them after loading, or make the model elsewhere"
        )
    return model


def _swap(model: nn.Module, tables: Mapping[str, PackedTable]) -> tuple[str, ...]:
    """Put packed modules in place, and return the beginnings of the names of what they have."""
    swaps: list[tuple[Place, nn.Module]] = []
    made: dict[nn.Module, nn.Module] = {}
    children: list[tuple[Any, Place]] = list(walk_children(model))
    # A weight that two embeddings share may be in the file once.
    shared = {
        address_of(module.weight): tables[f"{place.name}.weight"]
        for module, place in children
        if f"{place.name}.weight" in tables and type(module) in PACKED
    }
    for module, place in children:
        table = tables.get(f"{place.name}.weight")
        if table is None and type(module) in PACKED:
            table = shared.get(address_of(module.weight))
        if module not in made:
            if table is None:
                continue
            made[module] = _pack(module, place.name, table)
        swaps.append((place, made[module]))
    used = {f"{place.name}.weight" for place, _ in swaps}
    nobodys = [name for name in tables if name not in used]
    if nobodys:
        raise ValueError(f"the model has no embedding for {', '.join(nobodys)}")
    for place, module in swaps:
        setattr(place.parent, place.child, module)
    swap_collections(model)
    return tuple(f"{place.name}." for place, _ in swaps)


def _pack(module: Any, name: str, table: PackedTable) -> nn.Module:
    packed = PACKED.get(type(module))
    if packed is None:
        known = ", ".join(f"nn.{kind.__name__}" for kind in PACKED)
        raise ValueError(f"{name} is a {type(module).__name__}, but its weight is packed, which takes {known}")
    shape = (module.num_embeddings, module.embedding_dim)
    if shape != table.shape:
        raise ValueError(f"{name} is {shape[0]} x {shape[1]}, but its table is {table.shape[0]} x {table.shape[1]}")
    check_supported(module, name)
    return packed.like(module, table).train(module.training)

"""load_checkpoint: a model with its tables packed and mapped, from a file that embpack quantize wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from embpack.files import open_packed
from embpack.table import PackedTable
from embpack.torch.convert import (
    PACKED,
    Place,
    address_of,
    check_tied,
    find_additions,
    is_torchrec_bags,
    swap_collections,
    walk_children,
)
from embpack.torch.modules import check_supported
from embpack.torch.ops import dequantize


def load_checkpoint(model: nn.Module, path: str | Path, *, tied: Literal["refuse", "untie"] = "refuse") -> nn.Module:
    """Load a checkpoint with packed tables into a model, which needs no memory for float tables at any time.

    Args:
        model: made on the meta device (with torch.device("meta"): ...), or with values, which are replaced. Each
            nn.Embedding and nn.EmbeddingBag whose weight is a packed table of the file becomes a packed module;
            TorchRec's collections become what quantize_ makes of them.
        path: a file written by embpack quantize; for a sharded one its folder or index.
        tied: what to do if a weight that the file has once, packed, is also that of a module that is not packed, such
            as a language model's output layer: "refuse" raises, "untie" gives that module the table's rows as floats.

    Returns:
        The model. Tables are mapped: opening does not depend on their size, and rows are read when they are looked up.
        What is written to them, as by another load_state_dict, stays in this process and does not reach the file. All
        other tensors are in memory, of the types that the file has; a packed module returns values of the type that its
        weights had.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version.
        TypeError: model is no module.
        ValueError: model and file do not have the same tensors; names them. The model may be half loaded then. Or a
            weight is tied, a module does what a packed one cannot (max_norm, sparse, scale_grad_by_freq, hooks), or the
            model is itself an embedding.
    """
    check_tied(tied)
    _check_model(model)
    tables: dict[str, PackedTable] = {}
    floats: dict[str, Tensor] = {}
    for file in open_packed(path):
        tables |= {name: file.table(name) for name in file.entries}
        with safe_open(file.path, "pt") as opened:
            floats |= {name: opened.get_tensor(name) for name in file.others}
    shared = _find_shared(model)
    packed = _swap(model, tables, shared)
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for names in shared:
        floats |= _give_lacking(names, left, floats, tables, tied)
    outcome = model.load_state_dict(floats, strict=False, assign=True)
    missing = [name for name in outcome.missing_keys if not name.startswith(packed)]
    lacks = [("it", missing), ("the model", outcome.unexpected_keys)]
    if missing or outcome.unexpected_keys:
        what = ", and ".join(f"{owner} lacks {', '.join(names)}" for owner, names in lacks if names)
        raise ValueError(f"{path} does not go with the model: {what}")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unmade = [name for name, tensor in tensors if tensor.is_meta]
    if unmade:
        raise ValueError(
            f"{', '.join(unmade)}: still on the meta device, for no checkpoint has buffers that are not persistent; "
            "make them after loading, or make the model elsewhere"
        )
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; load_checkpoint loads a file into a torch.nn.Module")
    if type(model) in PACKED:
        kind = PACKED[type(model)].__name__
        raise ValueError(
            f"the model is itself an nn.{type(model).__name__}, which cannot be swapped in place; use "
            f"{kind}.from_table(embpack.load(path)[name])"
        )
    if is_torchrec_bags(model):
        raise ValueError("the model is itself an EmbeddingBagCollection, which cannot be swapped in place; wrap it")


def _find_shared(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one or share their memory, of which a file may have one only."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(address_of(parameter), []).append(name)
    return [names for names in names_of.values() if len(names) > 1]


def _give_lacking(
    names: list[str], left: set[str], floats: Mapping[str, Tensor], tables: Mapping[str, PackedTable], tied: str
) -> dict[str, Tensor]:
    """Make the tensors of names that share one, are left in the model, and that the file does not have as floats."""
    lacking = [name for name in names if name in left and name not in floats]
    source = next((floats[name] for name in names if name in floats), None)
    table = next((name for name in names if name in tables), None)
    if not lacking or (source is None and table is None):
        return {}
    if source is None:
        assert table is not None
        if tied == "refuse":
            embedding = next(name for name in names if name not in left)
            raise ValueError(
                f"{lacking[0]} is also {embedding}, which is packed: pass tied='untie' to give {lacking[0]} the "
                f"table's rows as floats, or leave the table as it is, embpack quantize --exclude '{table}'"
            )
        source = dequantize(tables[table], getattr(torch, tables[table].dtype))
    return dict.fromkeys(lacking, source)


def _swap(model: nn.Module, tables: Mapping[str, PackedTable], shared: list[list[str]]) -> tuple[str, ...]:
    """Put packed modules in place, and return the beginnings of the names of what they have."""
    children: list[tuple[Any, Place]] = list(walk_children(model))
    embeddings = {f"{place.name}.weight" for module, place in children if type(module) in PACKED}
    # A weight that several modules share may be in the file once, under the name of any.
    table_of = {name: name for name in tables}
    for names in shared:
        own, there = embeddings.intersection(names), [name for name in names if name in tables]
        if own and there:
            table_of = {name: table for name, table in table_of.items() if name not in there}
            table_of |= {name: name if name in tables else there[0] for name in own}
    swaps: list[tuple[Place, nn.Module]] = []
    made: dict[nn.Module, nn.Module] = {}
    used: set[str] = set()
    for module, place in children:
        table = table_of.get(f"{place.name}.weight")
        if module not in made:
            if table is None:
                continue
            made[module] = _pack(module, place.name, tables[table])
        swaps.append((place, made[module]))
        used.update(() if table is None else (table,))
    nobodys = [name for name in tables if name not in used]
    if nobodys:
        raise ValueError(_explain_nobodys(nobodys, children))
    for place, module in swaps:
        place.hang(module)
    swap_collections(model)
    return tuple(f"{place.name}." for place, _ in swaps)


def _explain_nobodys(names: list[str], children: list[tuple[Any, Place]]) -> str:
    """Say what is wrong if a model has no embedding for tables."""
    own = [f"{place.name}.weight" for module, place in children if type(module) in PACKED]
    return f"the model has no embedding for {', '.join(names)}; it has {', '.join(own) or 'none'}"


def _pack(module: Any, name: str, table: PackedTable) -> nn.Module:
    if type(module) in PACKED.values():
        raise ValueError(f"{name} is packed already; load the file into the model as it was before that")
    packed = PACKED.get(type(module))
    if packed is None:
        known = ", ".join(f"nn.{kind.__name__}" for kind in PACKED)
        raise ValueError(
            f"{name} is a {type(module).__name__}, but its weight is packed, which takes {known}: leave it as it is, "
            f"embpack quantize --exclude '{name}.weight'"
        )
    added = find_additions(module)
    if added is not None:
        raise ValueError(
            f"{name} has {added}, which a packed module would not have: add it after loading, or leave the table as it "
            f"is, embpack quantize --exclude '{name}.weight'"
        )
    shape = (module.num_embeddings, module.embedding_dim)
    if shape != table.shape:
        raise ValueError(f"{name} is {shape[0]} x {shape[1]}, but its table is {table.shape[0]} x {table.shape[1]}")
    check_supported(module, name)
    return packed.like(module, table).train(module.training)

"""load_checkpoint: a model with its tables packed and mapped, from a file that embpack quantize wrote."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embpack.errors import kind_of
from embpack.files import open_packed
from embpack.formats import SourceTensor
from embpack.formats.torch import DTYPES
from embpack.table import PackedTable
from embpack.torch.convert import (
    PACKED,
    Place,
    find_additions,
    hanging,
    is_torchrec_bags,
    swap_collections,
    walk_children,
)
from embpack.torch.encoders import adopt_static_encoders
from embpack.torch.modules import check_supported, leave_tables_out_of_ddp
from embpack.torch.ops import dequantize
from embpack.torch.tied import check_tied, group_names, retied


def load_checkpoint(model: nn.Module, path: str | Path, *, tied: Literal["refuse", "untie"] = "refuse") -> nn.Module:
    """Load a checkpoint with packed tables into a model, which needs no memory for float tables at any time.

    Args:
        model: made on the meta device (with torch.device("meta"): ...), or with values, which are replaced. Each
            nn.Embedding and nn.EmbeddingBag whose weight is a packed table of the file becomes a packed module;
            TorchRec's collections become what quantize_ makes of them.
        path: a file written by embpack quantize; for a sharded one its folder or index.
        tied: what to do if a module that is not packed, such as a language model's output layer, has a weight that the
            file has packed only: "refuse" raises, "untie" gives that module the table's rows as floats.

    Returns:
        The model. Tables are mapped: opening does not depend on their size, and rows are read when they are looked up.
        What is written to them, as by another load_state_dict, stays in this process and does not reach the file. All
        other tensors are in memory, of the types that the file has; a packed module returns values of the type that its
        weights had.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version.
        TypeError: model is no module.
        ValueError: model and file do not have the same tensors; names them. No module is packed then, but tensors of
            others may be those of the file. Or a weight is tied, a module does what a packed one cannot (max_norm,
            sparse, scale_grad_by_freq, hooks), the module that it is in does not let it be replaced, or the model is
            itself an embedding.
    """
    check_tied(tied)
    _check_model(model)
    tables: dict[str, PackedTable] = {}
    floats: dict[str, Tensor] = {}
    with open_packed(path) as files:
        for file in files:
            tables |= {name: file.table(name) for name in file.entries}
            floats |= {name: _read(file.path, tensor) for name, tensor in file.others.items()}
    groups, places = group_names(model), _find_places(model)
    chosen = _choose_tables(places, groups, tables, floats)
    packed = {place.name for module in chosen for place in places[module]}
    floats = _share_floats(groups, {f"{name}.weight" for name in packed}, tables, floats, tied)
    swaps = [
        (places[module], _pack(module, places[module][0].name, name, tables[name])) for module, name in chosen.items()
    ]
    with hanging() as hang, retied(model):
        for hangs, new in swaps:
            for place in hangs:
                hang(place, new)
        swap_collections(model, hang)
        _load_floats(model, floats, tuple(f"{name}." for name in packed), path)
        adopt_static_encoders(model)
        leave_tables_out_of_ddp(model)
    return model


def _load_floats(model: nn.Module, floats: Mapping[str, Tensor], packed: tuple[str, ...], path: str | Path) -> None:
    """Load all that is not packed; the names of what is begin with one of packed."""
    try:
        outcome = model.load_state_dict(floats, strict=False, assign=True)
    except RuntimeError as error:  # of sizes that differ
        raise ValueError(f"{path} does not go with the model: {error}") from None
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


def _read(path: Path, tensor: SourceTensor) -> Tensor:
    """Read a tensor into memory of its own."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which load_checkpoint cannot load")
    return torch.from_numpy(tensor.whole(mapped=False)).view(DTYPES[tensor.dtype])


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


def _find_places(model: nn.Module) -> dict[Any, list[Place]]:
    """All modules below a model, and where each hangs."""
    places: dict[Any, list[Place]] = {}
    for module, place in walk_children(model):
        places.setdefault(module, []).append(place)
    return places


def _choose_tables(
    places: Mapping[Any, Sequence[Place]],
    groups: Iterable[Sequence[str]],
    tables: Mapping[str, PackedTable],
    floats: Mapping[str, Tensor],
) -> dict[Any, str]:
    """Choose the modules that are packed, each with the name of its table.

    Where modules share a weight, the file may have it under the name of any of them, or of several, of which some are
    packed. Each embedding becomes what has its own name; one without is packed if anything of its weight is.
    """
    group_of = {name: names for names in groups for name in names}
    chosen: dict[Any, str] = {}
    for module in places:
        own = [f"{place.name}.weight" for place in places[module]]
        named = [name for name in own if name in tables]
        if type(module) in PACKED and not named and not any(name in floats for name in own):
            named = [name for name in group_of.get(own[0], ()) if name in tables]
        if named and (type(module) in PACKED or type(module) in PACKED.values()):
            chosen[module] = named[0]
    packed = {f"{place.name}.weight" for module in chosen for place in places[module]}
    # A table may also be of a weight that an embedding has, under the name of an output layer, which gets floats.
    left = set(tables) - packed - set(chosen.values())
    nobodys = [name for name in tables if name in left and packed.isdisjoint(group_of.get(name, ()))]
    if nobodys:
        raise ValueError(_explain_nobodys(nobodys, places))
    return chosen


def _explain_nobodys(names: Sequence[str], places: Mapping[Any, Sequence[Place]]) -> str:
    """Say what is wrong if a model has no embedding for tables."""
    kinds = {f"{place.name}.weight": (place.name, module) for module in places for place in places[module]}
    others = [f"{kinds[name][0]} is {kind_of(kinds[name][1])}" for name in names if name in kinds]
    if others:
        known = " or ".join(f"nn.{kind.__name__}" for kind in PACKED)
        exclude = " ".join(f"--exclude '{name}'" for name in names if name in kinds)
        return (
            f"{', '.join(others)}, but a packed weight takes an {known}: leave it as it is, embpack quantize {exclude}"
        )
    own = [name for name, (_, module) in kinds.items() if type(module) in PACKED]
    return f"the model has no embedding for {', '.join(names)}; it has {', '.join(own) or 'none'}"


def _share_floats(
    groups: Iterable[Sequence[str]],
    packed: Collection[str],
    tables: Mapping[str, PackedTable],
    floats: Mapping[str, Tensor],
    tied: str,
) -> dict[str, Tensor]:
    """Make all tensors to load: those of the file, and those of weights that it has under other names.

    Names of one weight whose values are the same share one tensor, as in the model that was saved.
    """

    @cache
    def unpack(table: str) -> Tensor:
        return dequantize(tables[table], getattr(torch, tables[table].dtype))

    loaded = {name: tensor for name, tensor in floats.items() if name not in packed}
    for names in groups:
        there = [floats[name] for name in names if name in floats]
        for name in names:
            if name in packed:
                continue
            table = next((each for each in (name, *names) if each in tables), None)
            if name in floats:
                loaded[name] = next(tensor for tensor in there if _are_equal(tensor, floats[name]))
            elif there and name not in tables:
                loaded[name] = there[0]
            elif table is not None:
                embedding = next(each for each in names if each in packed)
                if tied == "refuse":
                    raise ValueError(
                        f"{name} is also {embedding}, which is packed: pass tied='untie' to give {name} the table's "
                        f"rows as floats, or leave the table as it is, embpack quantize --exclude '{table}'"
                    )
                loaded[name] = unpack(table)
    return loaded


def _are_equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or (tensor.dtype == other.dtype and torch.equal(tensor, other))


def _pack(module: Any, name: str, table_name: str, table: PackedTable) -> nn.Module:
    if type(module) in PACKED.values():
        raise ValueError(f"{name} is packed already; load the file into the model as it was before that")
    added = find_additions(module)
    if added is not None:
        raise ValueError(
            f"{name} has {added}, which a packed module would not have: add it after loading, or leave the table as it "
            f"is, embpack quantize --exclude '{table_name}'"
        )
    shape = (module.num_embeddings, module.embedding_dim)
    if shape != table.shape:
        raise ValueError(f"{name} is {shape[0]} x {shape[1]}, but its table is {table.shape[0]} x {table.shape[1]}")
    check_supported(module, name)
    return PACKED[type(module)].like(module, table).train(module.training)

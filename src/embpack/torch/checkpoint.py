"""load_checkpoint: a model with its tables packed and mapped, from a file that embpack quantize wrote."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from embpack.errors import kind_of
from embpack.formats import SourceTensor
from embpack.formats.paths import as_path
from embpack.formats.torch import DTYPES
from embpack.lookups import Table
from embpack.packed_files import Access, check_access
from embpack.torch.convert import (
    PACKED,
    Place,
    find_additions,
    hanging,
    is_torchrec_bags,
    make_packed,
    swap_collections,
    walk_children,
)
from embpack.torch.encoders import adopt_static_encoders
from embpack.torch.modules import check_supported, leave_tables_out_of_ddp, tables_of
from embpack.torch.ops import dequantize
from embpack.torch.packed_module import PackedModule
from embpack.torch.pretrained import followed
from embpack.torch.saved_state import open_tables
from embpack.torch.tied import Tied, check_layer, check_tied, group_names


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    tied: Literal["refuse", "share", "untie"] = "refuse",
    access: Access = "mapped",
) -> nn.Module:
    """Load a checkpoint with packed tables into a model, which needs no memory for float tables at any time.

    Args:
        model: made on the meta device (with torch.device("meta"): ...), or with values, which are replaced. Each
            nn.Embedding and nn.EmbeddingBag whose weight is a packed table of the file becomes a packed module;
            TorchRec's collections become what quantize_ makes of them.
        path: a file written by embpack quantize, or the safetensors file of a packed model's state dict, as
            save_pretrained and safetensors' save_model write it; for a sharded one its folder or index.
        tied: what to do if a module that is no embedding, such as a language model's output layer, has a weight that
            the file has packed only: "refuse" raises; "share" makes that layer, an nn.Linear, a PackedLinear over the
            same rows; "untie" gives it the table's rows as floats.
        access: where packed rows are when they are looked up, as embpack.load takes it; "disk" leaves them there, and
            what a module can do then is said at PackedModule.

    Returns:
        The model. Opening mapped tables does not depend on their size, and rows are read when they are looked up. What
        is written to them, as by another load_state_dict, stays in this process and does not reach the file. All other
        tensors are in memory, of the types that the file has; a packed module returns values of the type that its
        weights had, or of the first floats in the file of a state dict, which does not say it.

    Raises:
        FileNotFoundError: there is nothing at path.
        FormatError: the file is damaged, truncated, not ours or of a future version.
        TypeError: model is no module.
        ValueError: model and file do not have the same tensors; names them. No module is packed then, but tensors of
            others may be those of the file. Or a weight is tied, a module does what a packed one cannot (max_norm,
            sparse, scale_grad_by_freq, hooks), the module that it is in does not let it be replaced, the model is
            itself an embedding, or there is no such access.
    """
    check_tied(tied)
    path = as_path(path)
    check_access(access, path)
    if access == "disk" and tied == "share":
        raise ValueError("an output layer needs all rows each time, so they cannot stay on the disk: access='mapped'")
    _check_model(model)
    with open_tables(path, access) as (tables, others):
        floats = {name: _read(path, tensor) for name, tensor in others.items()}
    groups, places = group_names(model), _find_places(model)
    chosen = _choose_tables(places, groups, tables, floats)
    packed = {f"{place.name}.weight" for module in chosen for place in places[module]}
    sources = _find_sources(groups, packed, tables, floats)
    if tied == "share":
        chosen |= _choose_layers(dict(model.named_modules(remove_duplicate=False)), sources)
    loaded = _share_floats(groups, packed, floats, sources)
    if tied == "untie":
        unpack = cache(lambda name: dequantize(tables[name], getattr(torch, tables[name].dtype)))
        loaded |= {source.name: unpack(source.table) for source in sources}
    elif tied == "refuse":
        _refuse_sources(sources)
    made: dict[int, PackedModule] = {}
    swaps = [
        (places[module], _pack(module, places[module][0].name, name, tables[name], made))
        for module, name in chosen.items()
    ]
    with hanging() as hang, followed(model):
        for hangs, new in swaps:
            for place in hangs:
                hang(place, new)
        swap_collections(model, hang)
        _load_floats(model, loaded, path)
        adopt_static_encoders(model)
        leave_tables_out_of_ddp(model)
    return model


def _load_floats(model: nn.Module, floats: Mapping[str, Tensor], path: str | Path) -> None:
    """Load all that is not packed."""
    try:
        outcome = model.load_state_dict(floats, strict=False, assign=True)
    except RuntimeError as error:  # of sizes that differ
        raise ValueError(f"{path} does not go with the model: {error}") from None
    packed = tables_of(model)
    missing = [name for name in outcome.missing_keys if name not in packed]
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


def _read(path: str | Path, tensor: SourceTensor) -> Tensor:
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
    tables: Mapping[str, Table],
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


class Source(NamedTuple):
    """A weight of a module that is no embedding, which the file has packed only: under its own name or another."""

    name: str
    table: str
    embedding: str


def _find_sources(
    groups: Iterable[Sequence[str]],
    packed: Collection[str],
    tables: Mapping[str, Table],
    floats: Mapping[str, Tensor],
) -> list[Source]:
    """Find the weights that have to be made of a table, though their modules are no embeddings."""
    found = []
    for names in groups:
        has_floats = any(name in floats for name in names)
        for name in names:
            table = next((each for each in (name, *names) if each in tables), None)
            if table is None or name in packed or name in floats or (has_floats and name not in tables):
                continue
            found.append(Source(name, table, next(each for each in names if each in packed)))
    return found


def _refuse_sources(sources: Iterable[Source]) -> None:
    for name, table, embedding in sources:
        raise ValueError(
            f"{name} is also {embedding}, which is packed: pass tied='share' to have {name} use the same packed rows, "
            f"tied='untie' to give it those rows as floats, or leave the table as it is, embpack quantize --exclude "
            f"'{table}'"
        )


def _choose_layers(modules: Mapping[str, nn.Module], sources: Iterable[Source]) -> dict[Any, str]:
    """Choose the output layers that get packed rows, each with the name of its table."""
    chosen: dict[Any, str] = {}
    for name, table, embedding in sources:
        owner_name, _, parameter = name.rpartition(".")
        owner = modules[owner_name]
        check_layer(Tied(embedding, owner, owner_name, parameter), find_additions)
        chosen[owner] = table
    return chosen


def _share_floats(
    groups: Iterable[Sequence[str]],
    packed: Collection[str],
    floats: Mapping[str, Tensor],
    sources: Iterable[Source],
) -> dict[str, Tensor]:
    """Make all floats to load: those of the file, and those of weights that it has under other names.

    Names of one weight whose values are the same share one tensor, as in the model that was saved.
    """
    loaded = {name: tensor for name, tensor in floats.items() if name not in packed}
    left_out = {*packed, *(source.name for source in sources)}
    for names in groups:
        there = [floats[name] for name in names if name in floats]
        for name in names:
            if there and name not in left_out:
                loaded[name] = next((each for each in there if _are_equal(each, floats.get(name, each))), there[0])
    return loaded


def _are_equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or (tensor.dtype == other.dtype and torch.equal(tensor, other))


def _pack(module: Any, name: str, table_name: str, table: Table, made: dict[int, PackedModule]) -> nn.Module:
    if type(module) in PACKED.values():
        raise ValueError(f"{name} is packed already; load the file into the model as it was before that")
    added = find_additions(module)
    if added is not None:
        raise ValueError(
            f"{name} has {added}, which a packed module would not have: add it after loading, or leave the table as it "
            f"is, embpack quantize --exclude '{table_name}'"
        )
    shape = tuple(module.weight.shape)
    if shape != table.shape:
        raise ValueError(f"{name} is {shape[0]} x {shape[1]}, but its table is {table.shape[0]} x {table.shape[1]}")
    if type(module) in PACKED:
        check_supported(module, name)
    return make_packed(module, table, made)

"""Weights that several modules have: which these are, and what happens to them when some of the modules are packed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from embpack.torch.modules import PackedEmbedding, PackedEmbeddingBag

PACKED_MODULES = (PackedEmbedding, PackedEmbeddingBag)


def check_tied(tied: str) -> None:
    """Raise ValueError if there is no such way with tied weights."""
    if tied not in ("refuse", "untie"):
        raise ValueError(f"tied is {tied!r}; choose 'refuse' or 'untie'")


def key_of(weight: Tensor) -> tuple[Any, ...]:
    """All that says which values a weight has: of one key are weights that have the same, in the same memory.

    Weights that only overlap, or begin at one address as a matrix and its transpose do, have different keys.
    """
    try:
        # On the meta device there is no address, but all views of a tensor have one storage.
        memory = weight.data_ptr() or weight.untyped_storage()
        return memory, weight.device, weight.dtype, weight.shape, weight.stride(), weight.is_neg()
    except (RuntimeError, ValueError):  # sparse, nested, not initialized: there is no one memory
        return (id(weight),)


def group_names(model: nn.Module) -> list[list[str]]:
    """Names of a model's parameters, those of one weight together."""
    names_of: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(key_of(parameter), []).append(name)
    return list(names_of.values())


def refuse_tied(model: nn.Module, embeddings: Iterable[tuple[Any, str]]) -> None:
    """Raise ValueError if an embedding, given with its name, shares its weight with a module that is not among them."""
    modules = {module: name for module, name in embeddings}
    names = {key_of(module.weight): f"{name}.weight" for module, name in modules.items()}
    for owner_name, owner in model.named_modules():
        if owner in modules:
            continue
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            key = key_of(parameter)
            if key in names:
                other = f"{owner_name}.{parameter_name}" if owner_name else parameter_name
                raise ValueError(
                    f"{names[key]} is also {other}, which stays float: pass tied='untie' to pack the one and leave the "
                    "other as it is, or a filter that leaves the embedding alone"
                )


@contextmanager
def retied(model: nn.Module) -> Iterator[None]:
    """Tell models of transformers which weights are tied still after modules were packed within.

    Their tie_weights and save_pretrained go by names, which a class of models declares in _tied_weights_keys. A packed
    module has no weight that another could have; what packed modules share are their buffers.
    """
    models: list[Any] = [module for module in model.modules() if hasattr(module, "get_expanded_tied_weights_keys")]
    declared = [_read_declared(each) for each in models]
    yield
    for each, names in zip(models, declared, strict=True):
        still = _find_still_tied(each, names)
        if still != names:
            each._tied_weights_keys = still
        each.all_tied_weights_keys = _find_still_tied(each, getattr(each, "all_tied_weights_keys", {}))


def _read_declared(model: Any) -> dict[str, str]:
    try:
        names: dict[str, str] = model.get_expanded_tied_weights_keys()
    except ValueError:  # what is declared is not there, or no longer: it stays as it is
        return {}
    return names


def _find_still_tied(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Find what is tied of a model, given what was: each name with that of what it is tied to."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    families: dict[str, list[str]] = {}
    for name, source in names.items():
        families.setdefault(source, [source]).append(name)
    still: dict[str, str] = {}
    for family in families.values():
        owners = [name.rpartition(".")[0] for name in family]
        packed = [owner for owner in owners if isinstance(modules.get(owner), PACKED_MODULES)]
        floats = [name for name, owner in zip(family, owners, strict=True) if owner not in packed]
        still |= {name: floats[0] for name in floats[1:]}
        for owner in packed[1:]:
            buffers, others = (dict(modules[each].named_buffers()) for each in (owner, packed[0]))
            shared = [name for name in buffers if name in others and key_of(buffers[name]) == key_of(others[name])]
            still |= {f"{owner}.{name}": f"{packed[0]}.{name}" for name in shared}
    return still

"""Weights that several modules have: which these are, and what happens to them when some of the modules are packed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from embpack.errors import kind_of
from embpack.torch.packed_module import PackedModule

WAYS = ("refuse", "share", "untie")


def check_tied(tied: str) -> None:
    """Raise ValueError if there is no such way with tied weights."""
    if tied not in WAYS:
        raise ValueError(f"tied is {tied!r}; choose 'refuse', 'share' or 'untie'")


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


def memory_of(tensor: Tensor) -> tuple[Any, int]:
    """What memory a tensor is in, and its bytes: of one memory are all views of it, counted as a whole."""
    try:
        storage = tensor.untyped_storage()
        return (storage.data_ptr() or id(tensor), tensor.device), storage.nbytes()
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, nested, not initialized: there is no one memory
        return (id(tensor),), tensor.numel() * tensor.element_size()


def group_names(model: nn.Module) -> list[list[str]]:
    """Names of a model's parameters, those of one weight together."""
    names_of: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(key_of(parameter), []).append(name)
    return list(names_of.values())


class Tied(NamedTuple):
    """A weight that an embedding shares with a module that is none of those that are packed."""

    embedding: str
    owner: nn.Module
    owner_name: str
    parameter: str

    @property
    def name(self) -> str:
        """The weight's name in that module."""
        return f"{self.owner_name}.{self.parameter}" if self.owner_name else self.parameter


def find_tied(model: nn.Module, embeddings: Iterable[tuple[Any, str]]) -> list[Tied]:
    """Find the weights that embeddings, given with their names, share with modules that are not among them."""
    modules = {module: name for module, name in embeddings}
    names = {key_of(module.weight): f"{name}.weight" for module, name in modules.items()}
    return [
        Tied(names[key_of(parameter)], owner, owner_name, parameter_name)
        for owner_name, owner in model.named_modules()
        if owner not in modules
        for parameter_name, parameter in owner.named_parameters(recurse=False)
        if key_of(parameter) in names
    ]


def refuse_tied(tied: Iterable[Tied]) -> None:
    """Raise ValueError if there are any."""
    for each in tied:
        raise ValueError(
            f"{each.embedding} is also {each.name}, which stays float: pass tied='share' to give both one packed table"
            ", tied='untie' to pack the one and leave the other as it is, or a filter that leaves the embedding alone"
        )


def check_layer(each: Tied, added: str | None) -> None:
    """Raise ValueError if a module that shares a weight cannot have packed rows.

    Args:
        each: the weight.
        added: what somebody has added to the module, and a packed one would lose.
    """
    if type(each.owner) is not nn.Linear or each.parameter != "weight":
        reason = f"{kind_of(each.owner)}, and only nn.Linear can have packed rows"
    elif added is not None:
        reason = f"a Linear with {added}, which a packed module would not have"
    else:
        return
    raise ValueError(
        f"{each.embedding} is also {each.name}, of {reason}: pass tied='untie' to leave it as it is, or a filter that "
        "leaves the embedding alone"
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
        # A packed layer still has its bias, which may be tied to another.
        packed = [
            owner
            for name, owner in zip(family, owners, strict=True)
            if name.endswith("weight") and isinstance(modules.get(owner), PackedModule)
        ]
        floats = [name for name, owner in zip(family, owners, strict=True) if owner not in packed]
        still |= {name: floats[0] for name in floats[1:]}
        for owner in packed[1:]:
            buffers, others = (dict(modules[each].named_buffers()) for each in (owner, packed[0]))
            shared = [name for name in buffers if name in others and key_of(buffers[name]) == key_of(others[name])]
            still |= {f"{owner}.{name}": f"{packed[0]}.{name}" for name in shared}
    return still

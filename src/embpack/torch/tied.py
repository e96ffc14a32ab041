"""Weights that several modules have: which these are, and which of the modules can be packed."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from embpack.errors import kind_of

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


def check_layer(each: Tied, find_additions: Callable[[nn.Module], str | None]) -> None:
    """Raise ValueError if a module that shares a weight cannot have packed rows.

    Args:
        each: the weight.
        find_additions: says what somebody has added to an nn.Linear, and a packed one would lose.
    """
    if type(each.owner) is not nn.Linear or each.parameter != "weight":
        reason = f"{kind_of(each.owner)}, and only nn.Linear can have packed rows"
    else:
        added = find_additions(each.owner)
        if added is None:
            return
        reason = f"a Linear with {added}, which a packed module would not have"
    raise ValueError(
        f"{each.embedding} is also {each.name}, of {reason}: pass tied='untie' to leave it as it is, or a filter that "
        "leaves the embedding alone"
    )

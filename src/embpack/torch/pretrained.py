"""What models of transformers are told when modules of theirs are packed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from embpack.torch.packed_module import PackedModule
from embpack.torch.tied import key_of


@contextmanager
def followed(model: nn.Module) -> Iterator[None]:
    """Tell models of transformers, which a model is or has in it, what there is still after modules were packed within.

    Their tie_weights and save_pretrained go by names, which a class of models declares in _tied_weights_keys. A packed
    module has no weight that another could have; what packed modules share are their buffers. And packed rows cannot
    be resized.
    """
    models: list[Any] = [module for module in model.modules() if hasattr(module, "get_expanded_tied_weights_keys")]
    declared = [_read_declared(each) for each in models]
    yield
    for each, names in zip(models, declared, strict=True):
        still = _find_still_tied(each, names)
        if still != names:
            each._tied_weights_keys = still
        each.all_tied_weights_keys = _find_still_tied(each, getattr(each, "all_tied_weights_keys", {}))
        embedding = _find_embedding(each)
        if isinstance(embedding, PackedModule):
            each.resize_token_embeddings = partial(keep_rows, embedding)


def _read_declared(model: Any) -> dict[str, str]:
    try:
        names: dict[str, str] = model.get_expanded_tied_weights_keys()
    except ValueError:  # what is declared is not there, or no longer: it stays as it is
        return {}
    return names


def _find_embedding(model: Any) -> nn.Module | None:
    try:
        embedding: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # it has none, or none that it knows
        return None
    return embedding


def keep_rows(
    embedding: PackedModule, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any
) -> PackedModule:
    """Do what resize_token_embeddings of a model can do if its token embedding is packed: nothing.

    Raises:
        ValueError: the embedding would have another number of rows.
    """
    rows = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
    multiple = pad_to_multiple_of or 1
    wanted = (rows + multiple - 1) // multiple * multiple
    if wanted != embedding.num_embeddings:
        raise ValueError(
            f"the token embedding is packed and has {embedding.num_embeddings} rows, not {wanted}: resize the model "
            "before it is packed, and pack that"
        )
    return embedding


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

"""quantize_: a model's embeddings packed in place."""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

from torch import Tensor, nn

from embpack.errors import kind_of, naming
from embpack.lookups import Table
from embpack.methods import DEFAULT_METHOD, Method
from embpack.packing import pack
from embpack.rules import MIN_ROWS, explain_growth
from embpack.shard_writer import Progress, no_progress
from embpack.table import PackedTable
from embpack.torch.collection import PackedEmbeddingBagCollection
from embpack.torch.encoders import adopt_static_encoders
from embpack.torch.linear import PackedLinear
from embpack.torch.modules import PackedEmbedding, PackedEmbeddingBag, check_supported, leave_tables_out_of_ddp
from embpack.torch.packed_module import PackedModule
from embpack.torch.pretrained import followed
from embpack.torch.private import has_hooks
from embpack.torch.report import ModelReport, describe_table
from embpack.torch.tied import Tied, check_layer, check_tied, find_tied, key_of, memory_of, refuse_tied
from embpack.variant import Variant

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Place:
    """Where a module hangs in a model."""

    parent: nn.Module
    child: str
    name: str


Hang = Callable[[Place, nn.Module], None]


def quantize_(
    model: nn.Module,
    method: str | Method = DEFAULT_METHOD,
    *,
    bits: float = 4,
    param_dtype: str | None = None,
    rotate: str | None = None,
    filter: Filter | None = None,
    tied: Literal["refuse", "share", "untie"] = "refuse",
    progress: Progress = no_progress,
) -> ModelReport:
    """Pack the embeddings of a model, in place: each nn.Embedding and nn.EmbeddingBag becomes a packed module.

    TorchRec's collections are packed, too: an EmbeddingBagCollection becomes a PackedEmbeddingBagCollection, which
    also holds those of its tables that stay float. An EmbeddingCollection stays TorchRec's module over packed tables.

    Args:
        model: on the CPU. Nothing of it is changed unless all that is to be packed can be.
        method: as embpack.quantize takes it.
        bits: as embpack.quantize takes them.
        param_dtype: "float16" or "float32"; None is embpack.quantize's default for the method and bits.
        rotate: "hadamard" or None, as embpack.quantize takes it.
        filter: called with module and name, says whether to pack it, whatever its size. None packs all of at least 16
            rows that packing makes smaller: others save nothing worth their loss.
        tied: what to do if a weight is shared with a module that is no embedding, such as a language model's output
            layer: "refuse" raises; "share" makes that layer, an nn.Linear, a PackedLinear over the same packed rows;
            "untie" packs the embedding and leaves the other its float weight, so that the model may become larger.
        progress: called with a module's name and its number of rows when it is packed.

    Returns:
        What became of each embedding, and of the bytes of the model.

    Raises:
        TypeError: model is no module, filter no function, or a weight is of another type than embpack.quantize takes,
            such as float64 or a DTensor; names it.
        ValueError: a weight is tied (to another module than a plain nn.Linear, with "share"), cannot be packed or has
            no values, a module does what a packed one cannot (max_norm, sparse, scale_grad_by_freq), the module that it
            is in does not let it be replaced, the model is itself an embedding, or an argument is not as above.

    Source: torchao.quantization.quantize_, for its signature.
    """
    check_tied(tied)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter is {type(filter).__name__}; it must be a function of a module and its name")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; quantize_ packs a torch.nn.Module's embeddings in place")
    if type(model) in PACKED or is_torchrec_bags(model):
        kind = type(model).__name__
        raise ValueError(f"the model is itself an embedding ({kind}), which cannot be swapped in place; use from_float")
    variant = Variant(method, bits, param_dtype, rotate)
    places, left_alone = _find(model, filter, variant)
    for module, hangs in places.items():
        check_supported(module, hangs[0].name)
    tied_weights = find_tied(model, [(module, hangs[0].name) for module, hangs in places.items()])
    places |= _find_layers(model, tied_weights, tied)
    bytes_before = count_bytes(model)
    packed: dict[Any, tuple[PackedTable, str | None]] = {}
    made: dict[int, PackedModule] = {}
    reports, swaps = [], []
    for module, hangs in places.items():
        weight, key, start = module.weight, key_of(module.weight), perf_counter()
        is_first = key not in packed
        if is_first:
            packed[key] = _pack(weight, hangs[0].name, variant)
        table, warning = packed[key]
        report = describe_table(hangs[0].name, weight, table, perf_counter() - start, warning)
        reports.append(report if is_first else replace(report, bytes_before=0, bytes_after=0))
        progress(hangs[0].name, table.num_embeddings)
        swaps.append((hangs, make_packed(module, table, made)))
    with hanging() as hang, followed(model):
        for hangs, new in swaps:
            for place in hangs:
                hang(place, new)
        collections = swap_collections(model, hang)
        adopt_static_encoders(model)
        leave_tables_out_of_ddp(model)
    inside = tuple(f"{name}." for name, _ in collections)
    alone = [(hangs[0].name, type(new).__name__) for hangs, new in swaps if not hangs[0].name.startswith(inside)]
    became = (*alone, *collections)
    untied = tuple(each.name for each in tied_weights if each.owner not in places)
    return ModelReport(tuple(reports), tuple(left_alone), became, untied, bytes_before, count_bytes(model))


PACKED: dict[type, type[PackedEmbedding] | type[PackedEmbeddingBag]] = {
    nn.Embedding: PackedEmbedding,
    nn.EmbeddingBag: PackedEmbeddingBag,
}
PACKED_KINDS = tuple(PACKED.values())
# With that of output layers, which are packed only with the embedding whose weight they have.
PACKED_WITH_LAYERS: dict[type, type[PackedModule]] = {**PACKED, nn.Linear: PackedLinear}


def make_packed(module: Any, table: Table, made: dict[int, PackedModule]) -> PackedModule:
    """Make the packed module for a float one; all that are made of one table have the same tensors.

    Args:
        module: nn.Embedding, nn.EmbeddingBag or nn.Linear.
        table: its rows.
        made: the first module that was made of each table, by the table's id.
    """
    new = PACKED_WITH_LAYERS[type(module)].like(module, table).train(module.training)
    first = made.setdefault(id(table), new)
    if first is not new:
        new.share_rows(first)
    return new


def count_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, each memory counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(dict(map(memory_of, tensors)).values())


def is_torchrec_bags(module: nn.Module) -> bool:
    """Whether it is a torchrec.EmbeddingBagCollection; without TorchRec nothing is."""
    return _is_torchrec(module, "EmbeddingBagCollection")


def _is_torchrec(module: nn.Module, name: str) -> bool:
    torchrec: Any = sys.modules.get("torchrec.modules.embedding_modules")
    return torchrec is not None and type(module) is getattr(torchrec, name)


@contextmanager
def hanging() -> Iterator[Hang]:
    """Give what puts a module in a place; all that it has put is taken back if there is an error within.

    Raises:
        ValueError: the module that a place is in does not let it be replaced.
    """
    before: list[tuple[Place, nn.Module]] = []

    def hang(place: Place, module: nn.Module) -> None:
        replaced = place.parent.get_submodule(place.child)
        try:
            setattr(place.parent, place.child, module)
        except Exception as error:
            raise ValueError(
                f"{place.name} is in {kind_of(place.parent)}, which does not let it be replaced ({error}): pack it "
                "before it is put there, or leave it as it is"
            ) from error
        before.append((place, replaced))

    try:
        yield hang
    except BaseException:
        for place, replaced in reversed(before):
            setattr(place.parent, place.child, replaced)
        raise


def swap_collections(model: nn.Module, hang: Hang) -> list[tuple[str, str]]:
    """Swap TorchRec's collections of bags of which some are packed; return what each became.

    One stays TorchRec's if it has a table of another kind than nn.EmbeddingBag.
    """
    swaps: dict[nn.Module, nn.Module] = {}
    became: dict[nn.Module, tuple[str, str]] = {}
    for module, place in list(walk_children(model)):
        collection: Any = module
        if is_torchrec_bags(module):
            bags = collection.embedding_bags
            if module not in swaps and _are_bags(bags.values()):
                swaps[module] = PackedEmbeddingBagCollection.like(collection, bags).train(module.training)
            if module in swaps:
                hang(place, swaps[module])
        elif _is_torchrec(module, "EmbeddingCollection"):
            bags = collection.embeddings
        else:
            continue
        if any(isinstance(bag, PACKED_KINDS) for bag in bags.values()):
            became.setdefault(module, (place.name, _explain_collection(swaps.get(module, module), bags.values())))
    return list(became.values())


def _are_bags(bags: Collection[nn.Module]) -> bool:
    """Whether a collection of these can be packed: some are, and the others can be held as they are."""
    packed = [isinstance(bag, PackedEmbeddingBag) for bag in bags]
    return any(packed) and all(isinstance(bag, (PackedEmbeddingBag, nn.EmbeddingBag)) for bag in bags)


def _explain_collection(collection: nn.Module, tables: Collection[nn.Module]) -> str:
    """Say what a collection is now: its kind, its tables, and what those that stay float cost."""
    floats = [table for table in tables if not isinstance(table, PACKED_KINDS)]
    weights = [weight for table in floats for weight in table.parameters()]
    num_packed = len(tables) - len(floats)
    text = f"{type(collection).__name__}, {num_packed} packed table{'s' * (num_packed != 1)}"
    if floats:
        types = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
        text += f", {len(floats)} of {' and '.join(types)} ({sum(weight.nbytes for weight in weights):,} bytes)"
    return text


def walk_children(model: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    """All modules below a model, once for each place where they hang."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if name:
            yield module, Place(modules[parent], child, name)


def _find(
    model: nn.Module, filter: Filter | None, variant: Variant
) -> tuple[dict[Any, list[Place]], list[tuple[str, str]]]:
    places: dict[Any, list[Place]] = {}
    left_alone = []
    for module, place in walk_children(model):
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        reason = _reason_to_leave(module, place.name, filter, variant)
        if reason is None:
            places.setdefault(module, []).append(place)
        else:
            left_alone.append((place.name, reason))
    return places, left_alone


def _find_layers(model: nn.Module, tied_weights: Sequence[Tied], tied: str) -> dict[Any, list[Place]]:
    """Find the output layers that are to share packed rows with an embedding, and where they hang.

    Raises:
        ValueError: none are to, but there are some; or one cannot have packed rows.
    """
    if tied == "refuse":
        refuse_tied(tied_weights)
    if tied != "share":
        return {}
    for each in tied_weights:
        check_layer(each, find_additions)
    places: dict[Any, list[Place]] = {each.owner: [] for each in tied_weights}
    for module, place in walk_children(model):
        if module in places:
            places[module].append(place)
    return places


def find_additions(module: nn.Module) -> str | None:
    """What somebody has added to an nn.Embedding, nn.EmbeddingBag or nn.Linear, and a packed module would lose."""
    if has_hooks(module):
        return "hooks"
    if "forward" in vars(module):
        return "a forward of its own"
    owned = [
        *module.named_parameters(recurse=False, remove_duplicate=False),
        *module.named_buffers(recurse=False, remove_duplicate=False),
        *module.named_children(),
    ]
    plain_module = type(module)(1, 1, device="meta")
    known = {*vars(plain_module), *(name for name, _ in plain_module.named_parameters())}
    # Names with an underscore are those that frameworks leave on every module, as transformers does.
    plain = [name for name in vars(module) if name not in known and not name.startswith("_")]
    return next((name for name in (*(name for name, _ in owned), *plain) if name not in known), None)


def _reason_to_leave(
    module: nn.Embedding | nn.EmbeddingBag, name: str, filter: Filter | None, variant: Variant
) -> str | None:
    if type(module) not in PACKED:
        return f"{kind_of(module)}, whose own forward a packed module would not have"
    added = find_additions(module)
    if added is not None:
        return f"it has {added}, which a packed module would not have"
    if filter is not None:
        return None if filter(module, name) else "the filter says no"
    if module.num_embeddings < MIN_ROWS:
        return f"only {module.num_embeddings} rows"
    shape = (module.num_embeddings, module.embedding_dim)
    with naming(name):
        return explain_growth(math.prod(shape) * module.weight.dtype.itemsize, variant, *shape)


def _pack(weight: Tensor, name: str, variant: Variant) -> tuple[PackedTable, str | None]:
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no values: load them first, or open a packed file by load_checkpoint"
        )
    with naming(name):
        return pack(weight, variant)

"""TorchRec's quantized collections made of packed tables, and read."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torchrec.modules.embedding_configs import (  # type: ignore[import-untyped]
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
)
from torchrec.modules.embedding_modules import (  # type: ignore[import-untyped]
    EmbeddingBagCollection,
    EmbeddingCollection,
)
from torchrec.quant import embedding_modules as quant  # type: ignore[import-untyped]

from embpack.errors import kind_of, naming
from embpack.fbgemm import check_table, fill_tbe, from_tbe
from embpack.layouts import LAYOUTS
from embpack.methods import DEFAULT_METHOD, Method, parse_method
from embpack.packing import pack_and_warn
from embpack.table import PackedTable
from embpack.variant import Variant

DATA_TYPES = {2: DataType.INT2, 4: DataType.INT4, 8: DataType.INT8}
# What TorchRec leaves on a float module for its quantized one, and the constructor's name for it.
_MARKS = {
    quant.MODULE_ATTR_REGISTER_TBES_BOOL: "register_tbes",
    quant.MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: "quant_state_dict_split_scale_bias",
    quant.MODULE_ATTR_ROW_ALIGNMENT_INT: "row_alignment",
    quant.MODULE_ATTR_CACHE_FEATURES_ORDER: "cache_features_order",
}


def quantize(
    collection: Any, method: str | Method = DEFAULT_METHOD, bits: int = 4, *, output_dtype: torch.dtype = torch.float32
) -> Any:
    """Quantize an embedding collection with one of embpack's methods.

    Args:
        collection: torchrec.EmbeddingBagCollection, weighted or not, or torchrec.EmbeddingCollection, of float32,
            float16 or bfloat16 tables on any device but meta; it is not changed. The marks that TorchRec's quant_prep_*
            and pruning left on it are heeded. All of its tables are packed, whatever their size.
        method: of uniform rows, as embpack.quantize takes it; "asym" makes TorchRec's own bytes.
        bits: of each code, 2, 4 or 8, for all tables; from_tables takes each table as it was packed.
        output_dtype: of the pooled values.

    Returns:
        The EmbeddingBagCollection or EmbeddingCollection of torchrec.quant.embedding_modules, on the CPU, with float16
        scales and biases. As TorchRec has it, its KeyedTensor may have the features in another order than the float
        collection's, if tables differ in pooling: take them by name.

    Raises:
        TypeError: collection is something else, or a table is of another type; the table is named.
        ValueError: the method makes no uniform rows, or a table cannot be packed or held; the table is named.

    Source: torchrec.quant.embedding_modules.EmbeddingBagCollection.from_float, which takes minimum and maximum.
    """
    chosen = parse_method(method)
    if not LAYOUTS[chosen.layout].has_scale_and_bias:
        raise ValueError(
            f"method {chosen.name!r} makes rows of the {chosen.layout} layout, but TorchRec reads uniform ones only; "
            "choose 'greedy' or another method of uniform rows"
        )
    configs, embeddings = _read_collection(collection)
    rows_kept = getattr(collection, quant.MODULE_ATTR_EMB_CONFIG_NAME_TO_NUM_ROWS_POST_PRUNING_DICT, {})
    tables = {}
    for config in configs:
        weight = embeddings[config.name].weight
        if config.name in rows_kept:
            config.num_embeddings_post_pruning = rows_kept[config.name]
            weight = weight[: rows_kept[config.name]]
        tables[config.name] = _quantize_table(weight, chosen, bits, config.name)
    options = {option: getattr(collection, mark) for mark, option in _MARKS.items() if hasattr(collection, mark)}
    if isinstance(collection, EmbeddingBagCollection):
        options["is_weighted"] = collection.is_weighted()
    else:
        options["need_indices"] = collection.need_indices()
    return from_tables(tables, configs, output_dtype=output_dtype, **options)


def from_tables(
    tables: Mapping[str, PackedTable],
    configs: Sequence[Any],
    *,
    output_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """Make TorchRec's quantized collection of packed tables, on the CPU.

    Args:
        tables: by the names of the configs; uniform, with float16 parameters, of any bits. Their bytes are copied.
        configs: EmbeddingBagConfig of each table for an EmbeddingBagCollection, or EmbeddingConfig for an
            EmbeddingCollection; copied, and their data_type set to the table's bits.
        output_dtype: of the pooled values.
        options: what else the collection's constructor takes: is_weighted (False if not given) for bags, need_indices
            for an EmbeddingCollection; row_alignment (16), register_tbes, quant_state_dict_split_scale_bias,
            cache_features_order.

    Returns:
        The EmbeddingBagCollection or EmbeddingCollection of torchrec.quant.embedding_modules.

    Raises:
        TypeError: the configs are not all of one kind, a table is no PackedTable, or there is no such option.
        ValueError: tables and configs do not agree, or TorchRec cannot hold a table; says what to do.
    """
    copies = [copy.deepcopy(config) for config in configs]
    kind = _kind_of(copies)
    _check_names(tables, [config.name for config in copies])
    for config in copies:
        check_config(config, tables[config.name])
        config.data_type = DATA_TYPES[tables[config.name].bits]
    if kind is quant.EmbeddingBagCollection:
        options = {"is_weighted": False, **options}
    collection = kind(tables=copies, device=torch.device("cpu"), output_dtype=output_dtype, **options)
    # Filled in place: the constructor would keep a second copy in memory.
    for module in collection._emb_modules:
        fill_tbe(module, [tables[name] for name, *_ in module.embedding_specs])
    return collection


def to_tables(collection: Any) -> dict[str, PackedTable]:
    """Read the tables of TorchRec's quantized collection, whoever quantized them.

    They can be looked up, compared, and saved by embpack.save, as PyTorch's weights_only loading refuses TorchRec's own
    state dict.

    Args:
        collection: EmbeddingBagCollection or EmbeddingCollection of torchrec.quant.embedding_modules, of INT2, INT4 or
            INT8 tables, on any device.

    Returns:
        The tables by name, in the order of the configs, with bytes of their own; see fbgemm.from_tbe.

    Raises:
        TypeError: collection is something else, or has virtual tables.
        ValueError: a table is not packed, or is pruned.
    """
    if isinstance(collection, quant.EmbeddingBagCollection):
        configs = collection.embedding_bag_configs()
    elif isinstance(collection, quant.EmbeddingCollection):
        configs = collection.embedding_configs()
    else:
        raise TypeError(
            f"collection is {kind_of(collection)}; to_tables reads an EmbeddingBagCollection or "
            "EmbeddingCollection of torchrec.quant, which quantize makes"
        )
    tables = {
        name: table
        for module in collection._emb_modules
        for (name, *_), table in zip(module.embedding_specs, from_tbe(module), strict=True)
    }
    return {config.name: tables[config.name] for config in configs}


def _read_collection(collection: Any) -> tuple[list[Any], Any]:
    """Return copies of the configs of a float collection, and its embeddings by name."""
    if isinstance(collection, EmbeddingBagCollection):
        configs, embeddings = collection.embedding_bag_configs(), collection.embedding_bags
    elif isinstance(collection, EmbeddingCollection):
        configs, embeddings = collection.embedding_configs(), collection.embeddings
    else:
        raise TypeError(
            f"collection is {kind_of(collection)}; quantize takes a torchrec.EmbeddingBagCollection or "
            "torchrec.EmbeddingCollection, as it is before it is sharded"
        )
    return copy.deepcopy(configs), embeddings


def _quantize_table(weight: torch.Tensor, method: Method, bits: int, name: str) -> PackedTable:
    with naming(f"table {name!r}"):
        try:
            return pack_and_warn(weight, Variant(method, bits, "float16"), f"table {name!r}")
        except ValueError as error:
            if "param_dtype=" not in str(error):
                raise
            # What embpack.quantize's message proposes does not help here.
            raise ValueError(f"{error}; but TorchRec has float16 parameters only: rescale the table") from error


def _kind_of(configs: Sequence[Any]) -> Any:
    kinds = {EmbeddingBagConfig: quant.EmbeddingBagCollection, EmbeddingConfig: quant.EmbeddingCollection}
    for config_kind, kind in kinds.items():
        if configs and all(isinstance(config, config_kind) for config in configs):
            return kind
    names = ", ".join(sorted({type(config).__name__ for config in configs})) or "none"
    raise TypeError(
        f"the configs are {names}; give an EmbeddingBagConfig for each table, or an EmbeddingConfig for each"
    )


def _check_names(tables: Iterable[str], names: Sequence[str]) -> None:
    tables = list(tables)
    for name in names:
        if name not in tables:
            raise ValueError(f"a config names table {name!r}, but the tables are {', '.join(tables) or 'none'}; add it")
    for name in tables:
        if name not in names:
            raise ValueError(f"table {name!r} has no config; the configs are of {', '.join(names)}: add one")


def check_config(config: Any, table: PackedTable) -> None:
    """Refuse a table that TorchRec cannot hold, or that is not what its config says; it is named."""
    check_table(table, f"table {config.name!r}", "torchrec")
    if config.use_virtual_table:
        raise ValueError(f"table {config.name!r} is virtual and has no fixed rows; set use_virtual_table=False")
    # Only bags know of pruning in TorchRec.
    pruned = config.num_embeddings_post_pruning if isinstance(config, EmbeddingBagConfig) else None
    wanted = (config.num_embeddings if pruned is None else pruned, config.embedding_dim)
    if table.shape != wanted:
        raise ValueError(
            f"table {config.name!r} is {table.num_embeddings} x {table.embedding_dim}, but its config says "
            f"{wanted[0]} x {wanted[1]}; they must agree"
        )

"""Packed tables sharded by TorchRec over several processes, on CPUs.

TorchRec shards quantized collections in one process alone, over its devices: ShardedQuantEmbeddingBagCollection has the
lookups of all ranks and no process group. What it shards over processes, ShardedEmbeddingBagCollection, takes no
quantized rows. Here the latter gets the lookups of the former, those of its own rank, filled with packed rows.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType  # type: ignore[import-untyped]
from torch import nn
from torchrec.distributed import embeddingbag, fused_params  # type: ignore[import-untyped]
from torchrec.distributed.embedding_lookup import (  # type: ignore[import-untyped]
    MetaInferGroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.types import ShardingType  # type: ignore[import-untyped]
from torchrec.modules.embedding_configs import DataType, PoolingType  # type: ignore[import-untyped]
from torchrec.modules.embedding_modules import EmbeddingBagCollection  # type: ignore[import-untyped]

from embpack.errors import kind_of
from embpack.formats.mapped import reading_all
from embpack.table import PackedTable
from embpack.torchrec.collections import DATA_TYPES, check_config

_CPU = torch.device("cpu")
_SHARDING_TYPES = [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value]
_KERNEL = "quant"
# By the first, shards of columns have their own width, not the whole table's.
_FUSED_PARAMS = {
    fused_params.FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: True,
    "output_dtype": SparseType.FP32,
}


class Sharder(embeddingbag.EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """What TorchRec shards an EmbeddingBagCollection of packed tables with, over processes that look rows up on CPUs.

    For torchrec.distributed.shard.shard, or among the sharders of shard_modules and DistributedModelParallel, whose
    plans name "row_wise", "table_wise" or "column_wise" for each table; the kernel that a plan names is not used.

        tables = embpack.load("tables.safetensors")  # mapped: each process reads its own part alone
        collection = EmbeddingBagCollection(configs, device=torch.device("meta"))
        sharded = shard(collection, {"user": row_wise(), "item": table_wise(rank=1)}, sharder=Sharder(tables))
        pooled = sharded(features)  # of this process's own bags, while all processes call it

    The sharded collection has a copy of its part of the tables: let go of the Sharder and the tables, and their file is
    no longer mapped. The model's state dict is without them.

    Values are those of torchrec.quant's collection in one process, bit for bit where rows are whole on one process.
    Sums over shards of rows are added in another order. Means are divided once, by the number of indices, weighted or
    not, as FBGEMM has it.

    An index that is out of range is not found: FBGEMM takes it for 0, and in a table that is sharded by rows it may
    stand for any row.

    Args:
        tables: by the names of the collection's tables; uniform, with float16 parameters, of any bits. There may be
            others, such as those of other collections of the model.
    """

    def __init__(self, tables: Mapping[str, PackedTable]) -> None:
        super().__init__()
        self._tables = tables

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the ways to shard: by rows, by tables, by columns."""
        return list(_SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return FBGEMM's kernel for packed rows."""
        return [_KERNEL]

    def shard(
        self,
        module: Any,
        params: Mapping[str, Any],
        env: Any,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> "ShardedPackedEmbeddingBagCollection":
        """Make the part of this process.

        Args:
            module: torchrec.EmbeddingBagCollection, best on the meta device, as its weights are not used.
            params: ParameterSharding of each table.
            env: ShardingEnv of a process group.
            device: CPU, or None.
            module_fqn: its name in the model.

        Returns:
            The sharded collection; called with a KeyedJaggedTensor, it returns an awaitable of a KeyedTensor.

        Raises:
            TypeError: module is something else, or a table is no PackedTable.
            ValueError: a table is missing, TorchRec cannot hold it or does not shard it so; it is named. Or there is no
                process group.
        """
        if device is not None and device.type != "cpu":
            raise ValueError(f"device is {device}; packed tables are sharded over processes on CPUs: device='cpu'")
        if env.process_group is None:
            raise ValueError(
                "there is no process group; call torch.distributed.init_process_group('gloo') in each process, and "
                "shard without an env or with ShardingEnv.from_process_group"
            )
        meta = _make_meta(module)
        plan = {}
        for config in meta.embedding_bag_configs():
            if config.name not in self._tables:
                names = ", ".join(self._tables) or "none"
                raise ValueError(f"the collection has table {config.name!r}, but the tables are {names}; add it")
            table = self._tables[config.name]
            check_config(config, table)
            if config.name not in params:
                raise ValueError(f"the plan says nothing of table {config.name!r}; add how it is sharded")
            _check_sharding(config, table, params[config.name], env.world_size)
            config.data_type = DATA_TYPES[table.bits]
            plan[config.name] = dataclasses.replace(params[config.name], compute_kernel=_KERNEL)
        return ShardedPackedEmbeddingBagCollection(self._tables, meta, plan, env, module_fqn)


class ShardedPackedEmbeddingBagCollection(embeddingbag.ShardedEmbeddingBagCollection):  # type: ignore[misc]
    """One process's part of packed tables, which Sharder makes."""

    def __init__(
        self, tables: Mapping[str, PackedTable], module: Any, plan: Mapping[str, Any], env: Any, name: str | None
    ) -> None:
        super().__init__(module, plan, env, device=_CPU, module_fqn=name)
        for lookup in self._lookups:
            for tbe, config in lookup.get_tbes_to_register().items():
                _fill_part(tbe, config.embedding_tables, tables)
        # By the names of pooled values: the features whose sums over shards of rows are still to be divided.
        self._averaged = {
            name: feature
            for info in self.sharding_type_to_sharding_infos.get(ShardingType.ROW_WISE.value, ())
            if info.embedding_config.pooling == PoolingType.MEAN
            for name, feature in zip(
                info.embedding_config.embedding_names, info.embedding_config.feature_names, strict=True
            )
        }

    def input_dist(self, ctx: Any, features: Any) -> Any:
        """Send indices to the processes that have their rows.

        Raises:
            ValueError: features differ in their number of bags.
        """
        if features.variable_stride_per_key():
            raise ValueError("features differ in their number of bags, which FBGEMM's packed rows do not take")
        sent = super().input_dist(ctx, features)
        if self._averaged:
            # TorchRec's own divides means of whole tables a second time, adds 1e-6, and takes sums of weights.
            ctx.divisor = self._count_rows(features)
        return sent

    def _count_rows(self, features: Any) -> torch.Tensor:
        """Return what each pooled value is divided by, float32 [B, sum of embedding_dims]."""
        ones = torch.ones(features.stride())
        counts = [
            features[self._averaged[name]].lengths().float().clamp(min=1) if name in self._averaged else ones
            for name in self._embedding_names
        ]
        return torch.stack(counts, dim=1).repeat_interleave(self._dim_per_key, dim=1)

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            configs = sharding._grouped_embedding_configs
            if isinstance(sharding, embeddingbag.RwPooledEmbeddingSharding):
                configs = [dataclasses.replace(config, pooling=PoolingType.SUM) for config in configs]
            self._lookups.append(
                MetaInferGroupedPooledEmbeddingsLookup(configs, device=_CPU, fused_params=_FUSED_PARAMS)
            )

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        self.embedding_bags = nn.ModuleDict({name: _TableName() for name in self._table_names})


class _TableName(nn.Module):
    """A table among a model's parameters, which shard asks to keep their names; embpack saves and loads its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def _make_meta(module: Any) -> Any:
    """Return a float collection without memory, with configs of its own."""
    if not isinstance(module, EmbeddingBagCollection):
        raise TypeError(
            f"module is {kind_of(module)}; a Sharder takes a torchrec.EmbeddingBagCollection on the meta device"
        )
    configs = copy.deepcopy(module.embedding_bag_configs())
    for config in configs:
        config.data_type = DataType.FP32
    return EmbeddingBagCollection(configs, is_weighted=module.is_weighted(), device=torch.device("meta"))


def _check_sharding(config: Any, table: PackedTable, sharding: Any, world_size: int) -> None:
    """Refuse what TorchRec would send to the wrong process, or FBGEMM cannot hold."""
    what, kind = f"table {config.name!r}", sharding.sharding_type
    if kind not in _SHARDING_TYPES:
        raise ValueError(
            f"the plan shards {what} {kind!r}, which packed tables are not; choose one of {', '.join(_SHARDING_TYPES)}"
        )
    if config.num_embeddings_post_pruning is not None:
        raise ValueError(f"{what} is pruned, and shards do not map indices to the rows that are left; pack all rows")
    if kind == ShardingType.ROW_WISE.value:
        _check_rows(what, table, sharding.sharding_spec.shards, world_size)
    else:
        _check_columns(what, table, sharding.sharding_spec.shards, sharding.ranks, world_size)


def _check_rows(what: str, table: PackedTable, shards: Any, world_size: int) -> None:
    """Refuse shards of other rows than those whose indices TorchRec sends to their process."""
    found = [shard.shard_offsets[0] for shard in shards] + [shards[-1].shard_offsets[0] + shards[-1].shard_sizes[0]]
    block = -(-table.num_embeddings // world_size)
    wanted = [min(rank * block, table.num_embeddings) for rank in range(world_size + 1)]
    if found != wanted:
        raise ValueError(
            f"the plan's shards of {what} begin at rows {found[:-1]} and end at {found[-1]}, but of {world_size} "
            f"processes TorchRec asks for rows from {wanted[:-1]} to {wanted[-1]}; make the plan by row_wise()"
        )


def _check_columns(what: str, table: PackedTable, shards: Any, ranks: Any, world_size: int) -> None:
    """Refuse whole tables, and shards of columns, that are on no process, and codes that share a byte."""
    if not all(0 <= rank < world_size for rank in ranks):
        raise ValueError(
            f"the plan has {what} on ranks {ranks}, but there are {world_size} processes (valid: 0 to {world_size - 1})"
        )
    codes_a_byte = 8 // table.bits
    for shard in shards:
        column, width = shard.shard_offsets[1], shard.shard_sizes[1]
        if column % codes_a_byte or width % codes_a_byte:
            raise ValueError(
                f"the plan has columns {column} to {column + width} of {what} on one process, but codes of "
                f"{table.bits} bits are cut at multiples of {codes_a_byte}; make the plan by column_wise()"
            )


def _fill_part(tbe: Any, parts: Any, tables: Mapping[str, PackedTable]) -> None:
    """Copy the rows and columns of each part from its table."""
    for part, (codes, params) in zip(parts, tbe.split_embedding_weights(), strict=True):
        table = tables[part.name]
        row, column = part.local_metadata.shard_offsets
        packed = table.packed[row : row + part.local_rows]
        first = column * table.bits // 8
        # Through NumPy: PyTorch warns of arrays that are not writable, as those of a mapped file are.
        with reading_all(packed):
            codes.numpy()[...] = packed[:, first : first + part.local_cols * table.bits // 8]
            params.numpy()[...] = packed[:, table.row_format.code_bytes :]

"""PackedEmbeddingBagCollection: many tables, the packed ones pooled in one call."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from embpack.bags import check_weighted
from embpack.disk import DiskTable
from embpack.errors import kind_of, naming
from embpack.methods import DEFAULT_METHOD, Method
from embpack.packing import pack_and_warn
from embpack.table import PackedTable
from embpack.torch.arguments import call_as_leaf, check_tensors, flatten_nested
from embpack.torch.collection_ops import TableUse, describe_tables
from embpack.torch.float_bags import FeatureBags, check_bags
from embpack.torch.modules import PackedEmbeddingBag, check_supported
from embpack.torch.private import buffers_of
from embpack.variant import Variant


class PackedEmbeddingBagCollection(nn.Module):
    """torchrec.EmbeddingBagCollection over packed rows: many tables, one call of the core whatever their number.

    Tables that are not packed, as quantize_ leaves small ones, are held as they are: modules with their weights, hooks
    and gradients, each called for its own features. So are packed ones whose rows stay on the disk; the rows of all of
    them are read at once.

    Args:
        embedding_bags: the tables by name: packed ones of any layout, bits and embedding_dim, at least one, and
            nn.EmbeddingBags. Each is pooled by its own mode, without the rows of its padding_idx.
        feature_names: by name of a table, the features that read it. None: one feature each, of the table's name.
        is_weighted: whether the weights of a KeyedJaggedTensor count; all modes must then be "sum".
        include_last_offset: whether the offsets of plain tensors end with where the last bag ends.

    Attributes:
        features: names of the features of plain input, in their order: that of feature_names, each once.
        embedding_names: names of the lookups, whose values are side by side in a row of the output: a feature's name,
            and of one that reads several tables, "feature@table".
        embedding_dims: values of each.

    It has all that TorchRec's has but reset_parameters: a packed table is not trained. TorchRec is needed only for a
    KeyedJaggedTensor, and where its own classes are returned.

    Raises:
        TypeError: a table is neither a PackedEmbeddingBag nor an nn.EmbeddingBag, or feature_names has a text in place
            of a list.
        ValueError: no table is packed, feature_names are of other tables, or weights count and a mode is not "sum".

    Source: torchrec.EmbeddingBagCollection.
    """

    def __init__(
        self,
        embedding_bags: Mapping[str, PackedEmbeddingBag | nn.EmbeddingBag],
        feature_names: Mapping[str, Sequence[str]] | None = None,
        *,
        is_weighted: bool = False,
        include_last_offset: bool = False,
    ) -> None:
        super().__init__()
        names = {name: (name,) for name in embedding_bags} if feature_names is None else feature_names
        for name, features in names.items():
            if isinstance(features, str):
                raise TypeError(f"feature_names[{name!r}] is {features!r}; it must be a list of names: [{features!r}]")
        if not embedding_bags or set(names) != set(embedding_bags):
            tables = ", ".join(embedding_bags) or "none"
            raise ValueError(f"the tables are {tables}, but feature_names are of {', '.join(names) or 'none'}")
        for name, bag in embedding_bags.items():
            if not isinstance(bag, (PackedEmbeddingBag, nn.EmbeddingBag)):
                raise TypeError(
                    f"table {name!r} is {kind_of(bag)}; it must be a PackedEmbeddingBag, or an nn.EmbeddingBag that "
                    "stays float"
                )
        if not any(isinstance(bag, PackedEmbeddingBag) for bag in embedding_bags.values()):
            raise ValueError(
                f"no table is packed ({', '.join(embedding_bags)}): there is nothing to look up in one call"
            )
        self.embedding_bags = nn.ModuleDict(embedding_bags)
        self.feature_names = {name: tuple(names[name]) for name in embedding_bags}
        self._is_weighted = is_weighted
        self.include_last_offset = include_last_offset
        self._set_lookups()
        if is_weighted:
            self._check_modes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle; an older one has is_weighted as an attribute, and nothing of float tables."""
        if "is_weighted" in state:
            state = {**state, "_is_weighted": state["is_weighted"]}
            del state["is_weighted"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_lookups()

    def _list_uses(self) -> list[tuple[Any, ...] | None]:
        """What a call depends on that may have changed since the last one: bags and their attributes may be set."""
        return [vars(bag).get("_use") for bag in self.embedding_bags.values()]

    def _set_lookups(self) -> None:
        """Find once what seldom changes from call to call: a hundred tables take a while to ask."""
        self._known_uses = self._list_uses()
        bags: Any = self.embedding_bags
        self._readers = [name for names in self.feature_names.values() for name in names]
        self.features = tuple(dict.fromkeys(self._readers))
        self._feature_of = [self.features.index(name) for name in self._readers]
        table_of = [table for table, names in self.feature_names.items() for _ in names]
        self.embedding_names = [
            name if self._readers.count(name) == 1 else f"{name}@{table}"
            for name, table in zip(self._readers, table_of, strict=True)
        ]
        self.embedding_dims = [bags[table].embedding_dim for table in table_of]
        self._packed_lookups = [i for i, table in enumerate(table_of) if _is_pooled(bags[table])]
        # The packed tables leave columns for the others, if these are few. Otherwise torch.cat puts all side by side.
        self._leaves_columns = 2 * len(self._packed_lookups) >= len(table_of)
        width_of = {
            table: bag.embedding_dim if self._leaves_columns or _is_pooled(bag) else 0 for table, bag in bags.items()
        }
        widths = [width_of[table] for table in table_of]
        # Lookups of float tables: number, table, and where its columns begin and end beside those of packed tables.
        self._float_lookups = [
            (i, table, end - widths[i], end)
            for i, (table, end) in enumerate(zip(table_of, accumulate(widths), strict=True))
            if not _is_pooled(bags[table])
        ]
        self._described = describe_tables(
            [
                _describe_use(bags[table], len(names)) if _is_pooled(bags[table]) else len(names) * width_of[table]
                for table, names in self.feature_names.items()
            ]
        )

    @classmethod
    def from_float(
        cls, collection: Any, method: str | Method = DEFAULT_METHOD, **options: Any
    ) -> "PackedEmbeddingBagCollection":
        """Pack a torchrec.EmbeddingBagCollection.

        Args:
            collection: on the CPU, not sharded.
            method: as embpack.quantize takes it.
            **options: others that embpack.quantize takes: bits, param_dtype, rotate.
        """
        packed, variant = {}, Variant(method, **options)
        for name, bag in collection.embedding_bags.items():
            with naming(f"table {name!r}"):
                check_supported(bag, "the module")
                table = pack_and_warn(bag.weight.detach(), variant, f"table {name!r}")
            packed[name] = PackedEmbeddingBag.like(bag, table)
        return cls.like(collection, packed)

    @classmethod
    def like(
        cls, collection: Any, embedding_bags: Mapping[str, PackedEmbeddingBag | nn.EmbeddingBag]
    ) -> "PackedEmbeddingBagCollection":
        """Make a collection of tables, with the features of a torchrec.EmbeddingBagCollection."""
        feature_names = {config.name: config.feature_names for config in collection.embedding_bag_configs()}
        return cls(embedding_bags, feature_names, is_weighted=collection.is_weighted())

    @property
    def tables(self) -> dict[str, PackedTable | DiskTable]:
        """The rows of packed tables as PackedTables by name, which share their memory, or as DiskTables."""
        return {name: bag.table for name, bag in self.embedding_bags.items() if isinstance(bag, PackedEmbeddingBag)}

    def _list_packed(self) -> list[PackedEmbeddingBag]:
        """Those that are pooled in one call."""
        return [bag for bag in self.embedding_bags.values() if isinstance(bag, PackedEmbeddingBag) and _is_pooled(bag)]

    def is_weighted(self) -> bool:
        """Whether the weights of a KeyedJaggedTensor count."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return next(bag.device for bag in self.embedding_bags.values() if isinstance(bag, PackedEmbeddingBag))

    def embedding_bag_configs(self) -> list[Any]:
        """Return torchrec.EmbeddingBagConfig of each table, with the type that its weights had.

        Raises:
            ValueError: TorchRec lacks a table's mode, or padding_idx.
        """
        from torchrec.modules.embedding_configs import (  # type: ignore[import-untyped]
            DataType,
            EmbeddingBagConfig,
            PoolingType,
        )

        bags: Any = self.embedding_bags
        poolings = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
        types = {torch.float16: DataType.FP16, torch.bfloat16: DataType.BF16}
        for name, bag in bags.items():
            if bag.mode not in poolings or bag.padding_idx is not None:
                what = f"mode {bag.mode!r}" if bag.mode not in poolings else f"padding_idx {bag.padding_idx}"
                raise ValueError(
                    f"table {name!r} has {what}, which TorchRec lacks; take embedding_bags[name].to_float()"
                )
        return [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=bag.embedding_dim,
                num_embeddings=bag.num_embeddings,
                feature_names=list(self.feature_names[name]),
                data_type=types.get(_type_of(bag), DataType.FP32),
                pooling=poolings[bag.mode],
            )
            for name, bag in bags.items()
        ]

    def to_float(self) -> Any:
        """Return torchrec.EmbeddingBagCollection with the rows as float32.

        Raises:
            ValueError: TorchRec lacks a table's mode, or padding_idx.
        """
        from torchrec.modules.embedding_configs import DataType
        from torchrec.modules.embedding_modules import EmbeddingBagCollection  # type: ignore[import-untyped]

        configs = self.embedding_bag_configs()
        for config in configs:
            config.data_type = DataType.FP32
        made = EmbeddingBagCollection(tables=configs, is_weighted=self._is_weighted, device=torch.device("meta"))
        floats = {f"embedding_bags.{name}.weight": _copy_rows(bag) for name, bag in self.embedding_bags.items()}
        made.load_state_dict(floats, assign=True)
        made._device = self.device  # else it would go on to say meta
        return made.requires_grad_(requires_grad=False)

    def forward(self, features: Any, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Any:
        """Pool the bags of all features.

        Args:
            features: a KeyedJaggedTensor, which has all features, in any order, and maybe others; with inverse indices
                its keys may have different numbers of bags. Or int32 or int64 indices, those of the first of
                self.features, then those of the second, and so on, each with the same number of bags: 1-D [L] with
                offsets, 2-D [F * B, n] for F features and B bags of n, or nested, of layout torch.jagged, for bags of
                several sizes.
            offsets: int32 or int64 [F * B], non-decreasing from 0: where each bag starts in 1-D indices; with
                include_last_offset [F * B + 1].
            per_sample_weights: float32 or of the tables' dtype, shaped like indices; only if all modes are "sum". They
                get gradients by backward() if they require them, as those of a KeyedJaggedTensor do.

        Returns:
            float32 [B, sum(embedding_dims)], whatever the tables' dtype, as TorchRec has it; an empty bag is zeros.
            For a KeyedJaggedTensor it is in a KeyedTensor.

        Raises:
            IndexError: an index is out of range; names its position and value, and the numbers of feature and table.
            NotImplementedError: weights in forward mode (torch.func.jvp, jacfwd).
            TypeError: an argument is of another type.
            ValueError: the arguments do not go together, or keys of a KeyedJaggedTensor are missing, or have different
                numbers of bags and no inverse indices.
        """
        if isinstance(features, (Tensor, Proxy)):
            proxy = check_tensors(features=features, offsets=offsets, per_sample_weights=per_sample_weights)
            if proxy is not None and proxy.tracer.root is self:
                raise ValueError(
                    "torch.fx traces a PackedEmbeddingBagCollection as a part of a model only; put it into one: "
                    "torch.nn.Sequential(module)"
                )
            if proxy is not None:
                return call_as_leaf(proxy, self, features, offsets, per_sample_weights)
            has_last = self.include_last_offset
            if features.is_nested:
                features, offsets, per_sample_weights = flatten_nested(features, offsets, per_sample_weights)
                has_last = True
            where = (self._feature_of, len(self.features))
            return self._pool(where, (features, offsets), per_sample_weights, has_last)
        if offsets is not None or per_sample_weights is not None:
            raise ValueError("a KeyedJaggedTensor has offsets and weights of its own")
        return self._pool_features(features)

    def _pool_features(self, features: Any) -> Any:
        try:
            from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor  # type: ignore[import-untyped]
            from torchrec.sparse.tensor_dict import maybe_td_to_kjt  # type: ignore[import-untyped]
        except ImportError:
            raise TypeError(f"features is {kind_of(features)}; it must be a tensor") from None

        features = maybe_td_to_kjt(features, None)
        if not isinstance(features, KeyedJaggedTensor):
            raise TypeError(f"features is {kind_of(features)}; it must be a tensor or a KeyedJaggedTensor")
        inverse = features.inverse_indices_or_none()
        if features.variable_stride_per_key() and inverse is None:
            raise ValueError(
                "features have different numbers of bags (variable stride) and no inverse indices; give each key as "
                "many, or inverse_indices"
            )
        positions = {key: position for position, key in enumerate(features.keys())}
        missing = [name for name in self.features if name not in positions]
        if missing:
            raise ValueError(f"the features lack {', '.join(missing)}; they are {', '.join(positions) or 'none'}")
        where = ([positions[name] for name in self._readers], len(features.keys()))
        if self._is_weighted and features.weights_or_none() is None:
            raise ValueError("the collection is weighted, and the features have no weights")
        weights = features.weights() if self._is_weighted else None
        values, offsets = features.values(), features.offsets()
        if features.variable_stride_per_key():
            offsets = _even_out(features)
        pooled = self._pool(where, (values, offsets), weights, include_last_offset=True)
        if inverse is not None:
            pooled = self._spread(pooled, *inverse)
        return KeyedTensor(self.embedding_names, self.embedding_dims, pooled)

    def _spread(self, pooled: Tensor, keys: Sequence[str], inverse: Tensor) -> Tensor:
        """Give each sample the bag that it shares with others: inverse has its number, int64 [number of keys, B]."""
        row_of = {key: row for row, key in enumerate(keys)}
        of_lookups = torch.split(pooled, self.embedding_dims, dim=1)
        rows = (inverse[row_of[name]] for name in self._readers)
        return torch.cat([values.index_select(0, row) for values, row in zip(of_lookups, rows, strict=True)], dim=1)

    def _pool(
        self,
        where: tuple[list[int], int],
        bags: tuple[Tensor, Tensor | None],
        weights: Tensor | None,
        include_last_offset: bool,
    ) -> Tensor:
        if self._list_uses() != self._known_uses:
            self._set_lookups()
        if weights is not None:
            self._check_modes()
        if not self._float_lookups:
            return self._pool_packed(where, bags, weights, include_last_offset)
        feature_of, num_features = where
        of_packed = [feature_of[lookup] for lookup in self._packed_lookups]
        if of_packed:
            pooled = self._pool_packed((of_packed, num_features), bags, weights, include_last_offset)
        else:
            batch = check_bags(num_features, *bags, include_last_offset=include_last_offset)
            pooled = torch.empty((batch, 0), dtype=torch.float32)
        return self._add_floats(pooled, feature_of, FeatureBags.of(num_features, bags, weights, include_last_offset))

    def _add_floats(self, pooled: Tensor, feature_of: Sequence[int], bags: FeatureBags) -> Tensor:
        """Pool the bags of float tables, and put their columns between those of packed tables."""
        modules = self.embedding_bags
        for lookup, table, *_ in self._float_lookups:
            bags.prefetch(modules[table], feature_of[lookup], list(modules).index(table))
        found = [bags.pool(modules[table], feature_of[lookup]) for lookup, table, *_ in self._float_lookups]
        if not self._leaves_columns or any(values.requires_grad for values in (pooled, *found)):
            parts, done = [], 0
            for (*_, begin, end), values in zip(self._float_lookups, found, strict=True):
                parts += [pooled[:, done:begin], values.float()]
                done = end
            return torch.cat([*parts, pooled[:, done:]], dim=1)
        for (*_, begin, end), values in zip(self._float_lookups, found, strict=True):
            pooled[:, begin:end] = values
        return pooled

    def _pool_packed(
        self,
        where: tuple[list[int], int],
        bags: tuple[Tensor, Tensor | None],
        weights: Tensor | None,
        include_last_offset: bool,
    ) -> Tensor:
        pool: Any = torch.ops.embpack.embedding_bag_collection.default
        arguments: tuple[Any, ...] = (*self._tensors(), self._described, *where, *bags)
        if weights is not None:
            if all(bag.dtype == weights.dtype for bag in self._list_packed()):
                weights = weights.float()
            pool = torch.ops.embpack.embedding_bag_collection.weighted
            arguments = (*arguments, weights)
        pooled: Tensor = pool(*arguments, include_last_offset=include_last_offset)
        return pooled

    def _tensors(self) -> tuple[list[Any], ...]:
        of_bags: list[Any] = [buffers_of(bag) for bag in self._list_packed()]
        return (
            [buffers["packed"] for buffers in of_bags],
            [buffers["clusters"] for buffers in of_bags if buffers["clusters"] is not None],
            [buffers["codebooks"] for buffers in of_bags if buffers["codebooks"] is not None],
        )

    def _check_modes(self) -> None:
        bags: Any = self.embedding_bags
        for name, bag in bags.items():
            check_weighted(bag.mode, f"table {name!r}")

    def extra_repr(self) -> str:
        """What print shows beside the tables."""
        readers = [f"{name}: {', '.join(names)}" for name, names in self.feature_names.items() if names != (name,)]
        return "; ".join(readers)


def _is_pooled(bag: nn.Module) -> bool:
    """Whether a table is packed and its rows are in memory, or mapped: those are pooled in one call."""
    return isinstance(bag, PackedEmbeddingBag) and bag.on_disk is None


def _describe_use(bag: Any, num_lookups: int) -> TableUse:
    row_format, mode, padding_idx = bag._use
    return TableUse(row_format, mode, -1 if padding_idx is None else padding_idx, num_lookups)


def _type_of(bag: Any) -> torch.dtype:
    """The type of the values that a table returns."""
    dtype: torch.dtype = bag.dtype if isinstance(bag, PackedEmbeddingBag) else bag.weight.dtype
    return dtype


def _copy_rows(bag: Any) -> Tensor:
    """The rows of a table as float32, in memory of their own."""
    rows: Tensor = (bag.to_float() if isinstance(bag, PackedEmbeddingBag) else bag).weight.detach()
    return rows.to(torch.float32, copy=True)


def _even_out(features: Any) -> Tensor:
    """Offsets of a KeyedJaggedTensor's bags, and of empty ones after them that give each key as many bags."""
    lengths: Any = features.lengths().split(features.stride_per_key())
    of_all = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True).reshape(-1)
    return torch.cat([of_all.new_zeros(1), of_all]).cumsum(0)

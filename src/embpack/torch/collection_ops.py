"""The operators embpack::embedding_bag_collection and embpack::embedding_bag_collection.weighted.

They pool bags from several tables at once. The tables' tensors are lists: packed of all tables, clusters and codebooks
of those that have them (see embpack.torch.ops). All else that is known of the tables is one text, which describe_tables
makes: for a hundred tables, lists would take longer to pass than rows to pool. indices are those of num_features
features, feature after feature, each with the same number of bags. A table is looked up as often as the text says.
Lookup i, over all tables, pools the bags of feature feature_of[i], and its values follow those of lookup i - 1 in a row
of the output, or columns that the text leaves to be written by others.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embpack import _native
from embpack.bags import as_row, check_mode, check_weighted, check_weights, count_bags_of_features, explain_offsets
from embpack.layouts import RowFormat
from embpack.torch.ops import (
    DTYPE,
    DTYPE_NAMES,
    as_table,
    check_devices,
    check_types,
    library,
    make_fake,
    refuse_forward_mode,
)

TABLES = "Tensor[] packed, Tensor[] clusters, Tensor[] codebooks, str tables, int[] feature_of, int num_features"
BAGS = "Tensor indices, Tensor? offsets"
LAST = f"bool include_last_offset=False, {DTYPE}"

library.define(f"embedding_bag_collection({TABLES}, {BAGS}, *, {LAST}) -> Tensor")
library.define(f"embedding_bag_collection.weighted({TABLES}, {BAGS}, Tensor per_sample_weights, *, {LAST}) -> Tensor")
# The derivative of weighted by its weights, times a gradient of its output.
library.define(
    f"embedding_bag_collection_by_weights({TABLES}, {BAGS}, Tensor gradient, *, bool include_last_offset=False) "
    "-> Tensor"
)


class TableUse(NamedTuple):
    """What is known of a table beside its tensors, how its bags are pooled, and how many lookups read it."""

    row_format: str
    mode: str
    padding_index: int  # -1: none
    num_lookups: int


def describe_tables(uses: Sequence[TableUse | int]) -> str:
    """Make the operators' argument `tables`: of each table its use, and between them how many columns are left."""
    return json.dumps(uses, separators=(",", ":"))


class Description(NamedTuple):
    """What a text of describe_tables says, and the same for the core.

    Attributes:
        uses, row_formats: of each table.
        table_of: of each lookup, its table.
        columns: of each lookup, where its values begin in a row of the output.
        width: of a row.
        native: the core's.
    """

    uses: tuple[TableUse, ...]
    row_formats: tuple[RowFormat, ...]
    table_of: tuple[int, ...]
    columns: tuple[int, ...]
    width: int
    native: Any


@lru_cache
def read_tables(text: str) -> Description:
    """Read a text of describe_tables.

    Raises:
        ValueError: it is something else.
    """
    try:
        described = [part if isinstance(part, int) else TableUse(*part) for part in json.loads(text)]
        native: Any = _native.TensorGroup()
        for part in described:
            if isinstance(part, int):
                native.leave(part)
            else:
                native.add(*part)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tables are not described as describe_tables does it: {error}") from error
    uses: list[TableUse] = []
    row_formats: list[RowFormat] = []
    table_of: list[int] = []
    columns: list[int] = []
    width = 0
    for part in described:
        if isinstance(part, int):
            width += part
            continue
        row_format = RowFormat.parse(part.row_format)
        columns += [width + lookup * row_format.embedding_dim for lookup in range(part.num_lookups)]
        table_of += [len(uses)] * part.num_lookups
        width += part.num_lookups * row_format.embedding_dim
        uses.append(part)
        row_formats.append(row_format)
    return Description(tuple(uses), tuple(row_formats), tuple(table_of), tuple(columns), width, native)


class Group(NamedTuple):
    """The operators' arguments but for the bags."""

    packed: list[Tensor]
    clusters: list[Tensor]
    codebooks: list[Tensor]
    tables: str
    feature_of: list[int]
    num_features: int

    def table_arguments(self) -> Iterator[tuple[Any, ...]]:
        """What embpack.torch.ops.as_table takes, of each table."""
        clusters, codebooks = iter(self.clusters), iter(self.codebooks)
        for packed, row_format in zip(self.packed, read_tables(self.tables).row_formats, strict=True):
            beside = [spec.name for spec in row_format.form.beside(0)]
            numbers = next(clusters) if "clusters" in beside else None
            yield packed, str(row_format), numbers, next(codebooks) if "codebooks" in beside else None

    def check(self) -> None:
        """Raise ValueError if the tables are not as described, or the lookups not theirs."""
        uses, row_formats, table_of, *_ = read_tables(self.tables)
        beside = [spec.name for row_format in row_formats for spec in row_format.form.beside(0)]
        counts = (len(self.packed), len(self.clusters), len(self.codebooks), len(self.feature_of))
        described = (len(uses), beside.count("clusters"), beside.count("codebooks"), len(table_of))
        if counts != described:
            raise ValueError(
                f"there are {counts[0]} packed, {counts[1]} clusters, {counts[2]} codebooks, {counts[3]} feature_of; "
                f"tables describe {', '.join(map(str, described[:3]))} and {described[3]}"
            )
        for use, arguments in zip(uses, self.table_arguments(), strict=True):
            table = as_table(*arguments)
            check_mode(use.mode)
            if use.padding_index != -1:
                as_row(use.padding_index, table.num_embeddings)
        for feature in self.feature_of:
            if not 0 <= feature < self.num_features:
                raise ValueError(f"a lookup is of feature {feature}, but there are {self.num_features}")


def _pool_collection(*arguments: Any, include_last_offset: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    *group, indices, offsets = arguments
    return _pool(Group(*group), (indices, offsets), None, include_last_offset, dtype)


def _pool_weighted_collection(
    *arguments: Any, include_last_offset: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    *group, indices, offsets, weights = arguments
    refuse_forward_mode()
    check_weights(weights, indices)
    return _pool(Group(*group), (indices, offsets), weights.detach(), include_last_offset, dtype)


def _pool(
    group: Group,
    bags: tuple[Tensor, Tensor | None],
    weights: Tensor | None,
    include_last_offset: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    indices, offsets = bags
    if offsets is None:
        count_bags_of_features(group.num_features, indices, None, include_last_offset=include_last_offset)
        offsets, include_last_offset = _find_starts(indices), False
        indices = indices.reshape(-1)
    values, starts = indices.contiguous(), offsets.contiguous()
    weights = None if weights is None else weights.reshape(-1).contiguous()
    *tensors, text, feature_of, num_features = group
    pool = read_tables(text).native.pool
    try:
        found: Any = pool(
            *tensors, feature_of, num_features, values, starts, weights, include_last_offset, DTYPE_NAMES[dtype]
        )
    except (KeyError, TypeError, ValueError):
        if dtype == torch.float64:
            return _pool(group, bags, weights, include_last_offset, None).double()
        _check(group, (indices, offsets), weights is not None, include_last_offset, dtype)
        raise
    if isinstance(found, tuple):
        raise _explain(group, found, values, starts)
    pooled: Tensor = found
    return pooled


def _find_starts(indices: Tensor) -> Tensor:
    """Where the bags of 2-D indices start."""
    num_bags, bag_size = indices.shape
    return torch.arange(num_bags, dtype=torch.int64) * bag_size


def _check(
    group: Group, bags: tuple[Tensor, Tensor], has_weights: bool, include_last_offset: bool, dtype: torch.dtype | None
) -> None:
    """Say it better than the core, which has refused the arguments."""
    indices, offsets = bags
    check_types(dtype, indices=indices, offsets=offsets)
    group.check()
    for table, use in enumerate(read_tables(group.tables).uses if has_weights else ()):
        check_weighted(use.mode, f"table {table}")
    count_bags_of_features(group.num_features, indices, offsets, include_last_offset=include_last_offset)


def _explain(group: Group, found: tuple[int, int], indices: Tensor, offsets: Tensor) -> Exception:
    lookup, fault = found
    if fault == _native.bad_offsets:
        return explain_offsets(offsets.numpy(), len(indices))
    table = read_tables(group.tables).table_of[lookup]
    error = as_table(*list(group.table_arguments())[table]).explain_fault(fault, indices.numpy())
    return type(error)(f"feature {group.feature_of[lookup]}, table {table}: {error}")


def _differentiate_by_weights(*arguments: Any, include_last_offset: bool = False) -> Tensor:
    """The derivative by a weight: the product of its row and its bag's gradient, for each lookup that reads it."""
    *of_group, indices, offsets, gradient = arguments
    group = Group(*of_group)
    uses, row_formats, table_of, columns, *_ = read_tables(group.tables)
    tables = list(group.table_arguments())
    batch = count_bags_of_features(group.num_features, indices, offsets, include_last_offset=include_last_offset)
    values = indices.reshape(-1)
    edges = _find_starts(indices) if offsets is None else offsets
    if offsets is None or not include_last_offset:
        edges = torch.cat([edges, edges.new_tensor([values.shape[0]])])
    by_weights = torch.zeros(values.shape, dtype=torch.float32)
    for table, feature, column in zip(table_of, group.feature_of, columns, strict=True):
        of_feature = edges[feature * batch : (feature + 1) * batch + 1]
        of_values = slice(int(of_feature[0]), int(of_feature[-1]))
        packed, row_format, *shared = tables[table]
        rows = torch.ops.embpack.embedding(packed, row_format, values[of_values], *shared)
        width = row_formats[table].embedding_dim
        of_bags = gradient[:, column : column + width].repeat_interleave(of_feature.diff(), dim=0)
        products = (rows * of_bags).sum(-1).masked_fill(values[of_values] == uses[table].padding_index, 0)
        by_weights[of_values] += products
    return by_weights.reshape(indices.shape)


library.impl("embedding_bag_collection", _pool_collection, "CPU")
library.impl("embedding_bag_collection.weighted", _pool_weighted_collection, "CPU")
library.impl("embedding_bag_collection_by_weights", _differentiate_by_weights, "CPU")

NUM_ARGUMENTS = len(Group._fields)


def _fake_pooled(*arguments: Any, include_last_offset: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    group, (indices, offsets, *weights) = Group(*arguments[:NUM_ARGUMENTS]), arguments[NUM_ARGUMENTS:]
    check_devices(group.packed[0], indices=indices, offsets=offsets, per_sample_weights=next(iter(weights), None))
    batch = count_bags_of_features(group.num_features, indices, offsets, include_last_offset=include_last_offset)
    return make_fake(indices, (batch, read_tables(group.tables).width), dtype)


def _fake_weighted(*arguments: Any, **options: Any) -> Tensor:
    indices, _, weights = arguments[NUM_ARGUMENTS:]
    refuse_forward_mode()
    check_weights(weights, indices)
    return _fake_pooled(*arguments, **options)


def _fake_by_weights(*arguments: Any, include_last_offset: bool = False) -> Tensor:
    indices, _, gradient = arguments[NUM_ARGUMENTS:]
    by_weights: Tensor = gradient.new_empty(indices.shape, dtype=torch.float32)
    return by_weights


torch.library.register_fake("embpack::embedding_bag_collection", _fake_pooled, lib=library)
torch.library.register_fake("embpack::embedding_bag_collection.weighted", _fake_weighted, lib=library)
torch.library.register_fake("embpack::embedding_bag_collection_by_weights", _fake_by_weights, lib=library)


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    group, (indices, offsets, _) = Group(*inputs[:NUM_ARGUMENTS]), inputs[NUM_ARGUMENTS:]
    ctx.counts = (len(group.packed), len(group.clusters), len(group.codebooks), 2)
    ctx.of_lookups = group[3:]
    ctx.include_last_offset = keyword_only_inputs["include_last_offset"]
    ctx.save_for_backward(*group.packed, *group.clusters, *group.codebooks, indices, offsets)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    *tensors, bags = ([next(saved) for _ in range(count)] for count in ctx.counts)
    by_weights = torch.ops.embpack.embedding_bag_collection_by_weights(
        *tensors, *ctx.of_lookups, *bags, gradient, include_last_offset=ctx.include_last_offset
    )
    of_tensors = ([None] * len(of_tables) for of_tables in tensors)
    return (*of_tensors, None, None, None, None, None, by_weights)


torch.library.register_autograd(
    "embpack::embedding_bag_collection.weighted", _differentiate, setup_context=_remember, lib=library
)

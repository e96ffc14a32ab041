"""Writes tensors as the columns of a Parquet file."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from embpack.sources.base import rechunk
from embpack.sources.parquet import DTYPES, VECTOR_DTYPES
from embpack.targets.base import OutShard, OutTensor, iter_entries, refuse_dtypes

_GROUP_BYTES = 1 << 24


def write_parquet(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write columns, a row group at a time: 2-D tensors as fixed-size lists, 1-D tensors as numbers.

    Raises:
        ValueError: a tensor has another shape or a type that a column cannot have, or numbers of rows differ.
    """
    refuse_dtypes(path, shard, DTYPES, "write .safetensors or .pt")
    schema = pa.schema([(tensor.name, _column_type(path, tensor)) for tensor in shard.tensors])
    num_rows = _count_rows(path, shard.tensors)
    row_bytes = sum(tensor.nbytes for tensor in shard.tensors) // max(1, num_rows)
    group_rows = max(1, _GROUP_BYTES // max(1, row_bytes))
    columns = [_iter_columns(tensor, group_rows) for tensor in shard.tensors]
    # Dictionaries pay for values that repeat; weights do not.
    with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for group in zip(*columns, strict=True):
            writer.write_table(pa.Table.from_arrays(list(group), schema=schema), row_group_size=group_rows)


def _column_type(path: Path, tensor: OutTensor) -> pa.DataType:
    dtype = DTYPES[tensor.dtype]
    if len(tensor.shape) == 1:
        return dtype
    if len(tensor.shape) == 2 and tensor.dtype in VECTOR_DTYPES and tensor.shape[1] > 0:
        return pa.list_(dtype, tensor.shape[1])
    raise ValueError(
        f"{path}: tensor {tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)}; a column holds "
        f"numbers [N] or vectors [N, d] of {', '.join(VECTOR_DTYPES)}; write .safetensors or .pt"
    )


def _count_rows(path: Path, tensors: tuple[OutTensor, ...]) -> int:
    if not tensors:
        raise ValueError(f"{path}: there are no tensors, but a Parquet file has at least one column")
    first = tensors[0]
    for tensor in tensors[1:]:
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(
                f"{path}: tensor {first.name!r} has {first.shape[0]} rows and {tensor.name!r} has "
                f"{tensor.shape[0]}, but columns are of one length; write .safetensors or .pt"
            )
    return first.shape[0]


def _iter_columns(tensor: OutTensor, group_rows: int) -> Iterator[pa.Array]:
    """Yield a tensor's Arrow arrays, one a row group."""
    for rows in rechunk(iter_entries(tensor), group_rows):
        values = pa.array(rows.reshape(-1))
        yield values if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, rows.shape[1])

"""FBGEMM's packed tables, to and from ours, byte for byte.

FBGEMM has two homes for a packed row. Its operators (FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf and what reads it)
take the uniform layout as it is: ``PackedTable.from_packed`` adopts such tensors without a copy, and
``torch.from_numpy(table.packed)`` is one. Its table-batched embeddings, IntNBitTableBatchedEmbeddingBagsCodegen, keep
scale and bias in front of the codes: to_tbe and from_tbe move them.

    import embpack.fbgemm

    tbe = embpack.fbgemm.to_tbe([users, items])
    pooled = tbe(indices, offsets)  # float32 [B, sum of embedding_dims]
"""

from collections.abc import Sequence
from typing import Any

from embpack.disk import advise_packed
from embpack.errors import MissingExtraError, kind_of
from embpack.layouts import RowFormat
from embpack.pages import use_huge_pages
from embpack.readers import explain_unread
from embpack.table import PackedTable

try:
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType  # type: ignore[import-untyped]
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (  # type: ignore[import-untyped]
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (  # type: ignore[import-untyped]
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )
except ImportError as error:
    raise MissingExtraError("embpack.fbgemm", "FBGEMM", "fbgemm") from error

__all__ = ["from_tbe", "to_tbe"]

_POOLINGS = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN}
_OUTPUT_TYPES = {"float32": SparseType.FP32, "float16": SparseType.FP16, "bfloat16": SparseType.BF16}
_WEIGHT_TYPES = {2: SparseType.INT2, 4: SparseType.INT4, 8: SparseType.INT8}
# By value: a SparseType that was copied or pickled, as copy.deepcopy of a module does, is no longer the same object.
_BITS = {weight_type.value: bits for bits, weight_type in _WEIGHT_TYPES.items()}
_PARAM_BYTES = 4  # A scale and a bias, float16 each.


def to_tbe(
    tables: Sequence[PackedTable],
    pooling: str = "sum",
    table_of: Sequence[int] | None = None,
    *,
    output_dtype: str = "float32",
    row_alignment: int = 1,
    bounds_check_mode: Any = BoundsCheckMode.FATAL,
) -> Any:
    """Make FBGEMM's table-batched embeddings of packed tables, on the CPU.

    Args:
        tables: uniform, with float16 parameters, of 2, 4 or 8 bits, mixed or not; their bytes are copied. At 8 bits
            ``embpack.quantize(weight, bits=8, param_dtype="float16")`` makes them.
        pooling: "sum" or "mean", of all features.
        table_of: for each feature, the number of the table that it reads; each table has at least one. None is one
            feature a table, in order.
        output_dtype: "float32", "float16" or "bfloat16", which FBGEMM rounds with ties away from zero.
        row_alignment: bytes that the rows start at multiples of: 1 is FBGEMM's own on the CPU, TorchRec has 16.
        bounds_check_mode: FBGEMM's BoundsCheckMode. FATAL raises RuntimeError for an index that is out of range.
            WARNING, FBGEMM's own default, and IGNORE set it to 0 **in the caller's tensor** and pool row 0. Whatever
            the mode, an index of -1 is skipped.

    Returns:
        An IntNBitTableBatchedEmbeddingBagsCodegen; called with indices and offsets, feature after feature, and
        per_sample_weights, it returns [B, sum of embedding_dims]. It adds fma(w * scale, code, sum + w * bias) row by
        row, which may differ from TableGroup in the last bits.

    Raises:
        TypeError: a table is no PackedTable.
        ValueError: a table's layout, rotation, parameters or embedding_dim are not FBGEMM's; no such pooling,
            output_dtype or row_alignment; a feature reads no table, or a table has no feature.

    Source: fbgemm_gpu.split_table_batched_embeddings_ops_inference, its rows and the meaning of feature_table_map.
    """
    if pooling not in _POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; choose one of {', '.join(_POOLINGS)}")
    if output_dtype not in _OUTPUT_TYPES:
        raise ValueError(f"output_dtype is {output_dtype!r}; choose one of {', '.join(_OUTPUT_TYPES)}")
    if row_alignment < 1:
        raise ValueError(f"row_alignment is {row_alignment}; it must be at least 1")
    for number, table in enumerate(tables):
        check_table(table, f"tables[{number}]", "fbgemm")
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            ("", table.num_embeddings, table.embedding_dim, _WEIGHT_TYPES[table.bits], EmbeddingLocation.HOST)
            for table in tables
        ],
        feature_table_map=_read_table_of(table_of, len(tables)),
        pooling_mode=_POOLINGS[pooling],
        device="cpu",
        bounds_check_mode=bounds_check_mode,
        output_dtype=_OUTPUT_TYPES[output_dtype],
        row_alignment=row_alignment,
    )
    module.initialize_weights()
    fill_tbe(module, tables)
    return module


def from_tbe(module: Any) -> list[PackedTable]:
    """Read the tables of FBGEMM's table-batched embeddings.

    Args:
        module: an IntNBitTableBatchedEmbeddingBagsCodegen with weights, of INT2, INT4 or INT8, on any device.

    Returns:
        Its tables in order, uniform with float16 parameters, with bytes of their own: those that to_tbe was given.
        FBGEMM does not keep what the weights were and how they were packed: ``dtype`` is "float32", ``method`` "" and
        ``loss`` None.

    Raises:
        TypeError: module is something else.
        ValueError: it has no weights yet, a table of floats, parameters that are not float16, or pruned rows.
    """
    # A subclass may keep its rows elsewhere, as KVEmbeddingInference does.
    if type(module) is not IntNBitTableBatchedEmbeddingBagsCodegen:
        raise TypeError(f"module is {kind_of(module)}; from_tbe reads FBGEMM's IntNBitTableBatchedEmbeddingBagsCodegen")
    _check_module(module)
    tables = []
    for number, (spec, parts) in enumerate(zip(module.embedding_specs, module.split_embedding_weights(), strict=True)):
        name, _, embedding_dim, weight_type, _ = spec
        if weight_type.value not in _BITS:
            raise ValueError(
                f"table {number} ({name!r}) is {weight_type.value}, not packed; pack its weights with embpack.quantize"
            )
        row_format = RowFormat(embedding_dim, _BITS[weight_type.value], "float16")
        packed = torch.cat([part.cpu() for part in parts], dim=1).numpy()
        use_huge_pages(packed)
        tables.append(PackedTable(packed, row_format))
    return tables


def check_table(table: PackedTable, name: str, reader: str) -> None:
    """Refuse a table whose rows a reader, "fbgemm" or "torchrec", cannot hold as they are.

    Raises:
        TypeError: it is no PackedTable.
        ValueError: its layout, rotation, parameters or embedding_dim are none of the reader's; says what to do.
    """
    if not isinstance(table, PackedTable):
        raise TypeError(f"{name} is {type(table).__name__}, not PackedTable; {advise_packed(table)}")
    reason = explain_unread(table.row_format, reader)
    if reason is not None:
        by_hand = (
            ", or give the rotated rows themselves, table.as_packed, and multiply what comes out by "
            f"embpack.rotation.matrix({table.embedding_dim}).T"
        )
        raise ValueError(f"{name} {reason}{by_hand if table.rotation is not None else ''}")


def fill_tbe(module: Any, tables: Sequence[PackedTable]) -> None:
    """Copy packed rows into table-batched embeddings on the CPU that have room for just them."""
    # Through NumPy: PyTorch warns of arrays that are not writable, as those of a mapped file are.
    for table, (codes, params) in zip(tables, module.split_embedding_weights(), strict=True):
        codes.numpy()[...] = table.packed[:, : table.row_format.code_bytes]
        params.numpy()[...] = table.packed[:, table.row_format.code_bytes :]


def _read_table_of(table_of: Sequence[int] | None, num_tables: int) -> list[int]:
    if not num_tables:
        raise ValueError("there are no tables; give at least one")
    numbers = list(range(num_tables) if table_of is None else table_of)
    for feature, number in enumerate(numbers):
        if not 0 <= number < num_tables:
            raise ValueError(
                f"table_of[{feature}] is {number}, but there are {num_tables} tables (valid: 0 to {num_tables - 1})"
            )
    unread = sorted(set(range(num_tables)) - set(numbers))
    if unread:
        raise ValueError(f"no feature reads tables[{unread[0]}]; FBGEMM wants one for each table: leave the table out")
    return numbers


def _check_module(module: Any) -> None:
    if not module.weight_initialized:
        raise ValueError("module has no weights yet; call its initialize_weights and assign_embedding_weights first")
    if module.scale_bias_size_in_bytes != _PARAM_BYTES:
        raise ValueError(
            f"module keeps {module.scale_bias_size_in_bytes} bytes of scale and bias a row, not the {_PARAM_BYTES} of "
            "float16; make it anew with scale_bias_size_in_bytes=4"
        )
    remapped = module.index_remappings_array.numel() or module.index_remapping_hash_table.numel()
    if remapped or module.index_remapping_hash_table_cpu is not None:
        raise ValueError(
            "module has pruned rows and maps indices to those that are left, which a PackedTable does not; read it "
            "before set_index_remappings is called"
        )

"""Who sums rows in Table 1: embpack, and PyTorch and FBGEMM where they are installed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack

FP32, INT8, INT4 = "FP32", "INT8", "INT4"
BITS = {INT8: 8, INT4: 4}

Values = NDArray[np.float32]
Pool = Callable[[], Values]


@dataclass(frozen=True)
class Bags:
    """What is summed: bags of the same size.

    Attributes:
        weight: float32 [N, d].
        indices: int64 [bags, rows a bag].
    """

    weight: Values
    indices: NDArray[np.int64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each bag starts, and the last one ends."""
        offsets: NDArray[np.int64] = np.arange(len(self.indices) + 1, dtype=np.int64) * self.indices.shape[1]
        return offsets


@dataclass(frozen=True)
class Summer:
    """One way to sum; ``pool`` returns float32 [bags, d], ``rows`` are the values that it sums."""

    kind: str
    name: str
    pool: Pool
    rows: Values


def list_summers(bags: Bags) -> Iterator[Summer]:
    """Ours first, then those of the peers that are installed."""
    packed = {kind: embpack.quantize(bags.weight, "asym", bits) for kind, bits in BITS.items()}
    rows = {kind: table.dequantize() for kind, table in packed.items()}
    flat, offsets = bags.indices.reshape(-1), bags.offsets[:-1].copy()
    for kind, table in packed.items():
        yield Summer(kind, "embpack", _bind(table, flat, offsets), rows[kind])
    yield Summer(FP32, "NumPy", lambda: bags.weight[bags.indices].sum(axis=1), bags.weight)
    for make in (_list_pytorch, _list_fbgemm):
        try:
            yield from make(bags, packed, rows)
        except (ImportError, OSError):  # OSError: its library does not load under this PyTorch.
            continue


def _bind(table: embpack.PackedTable, indices: NDArray[np.int64], offsets: NDArray[np.int64]) -> Pool:
    return lambda: table.embedding_bag(indices, offsets, mode="sum")


def _list_pytorch(bags: Bags, packed: dict[str, embpack.PackedTable], rows: dict[str, Values]) -> Iterator[Summer]:
    torch = import_module("torch")
    quantized = torch.ops.quantized
    weight, flat = torch.from_numpy(bags.weight), torch.from_numpy(bags.indices.reshape(-1))
    offsets = torch.from_numpy(bags.offsets)
    bytes_of = {kind: torch.from_numpy(table.packed) for kind, table in packed.items()}
    embedding_bag = torch.nn.functional.embedding_bag
    pools: dict[str, Pool] = {
        FP32: lambda: embedding_bag(flat, weight, offsets[:-1], mode="sum").numpy(),
        INT8: lambda: quantized.embedding_bag_byte_rowwise_offsets(
            bytes_of[INT8], flat, offsets, include_last_offset=True
        ).numpy(),
        INT4: lambda: quantized.embedding_bag_4bit_rowwise_offsets(
            bytes_of[INT4], flat, offsets, include_last_offset=True
        ).numpy(),
    }
    for kind, pool in pools.items():
        yield Summer(kind, "PyTorch", pool, rows.get(kind, bags.weight))


def _list_fbgemm(bags: Bags, packed: dict[str, embpack.PackedTable], rows: dict[str, Values]) -> Iterator[Summer]:
    """FBGEMM's table-batched embedding for inference, with our codes and parameters; at 8 bits these are float16."""
    import_module("fbgemm_gpu")
    torch, tbe = import_module("torch"), import_module("fbgemm_gpu.split_table_batched_embeddings_ops_inference")
    common = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    sparse_type = import_module("fbgemm_gpu.split_embedding_configs").SparseType
    flat, offsets = (torch.from_numpy(array.astype(np.int32)) for array in (bags.indices.reshape(-1), bags.offsets))
    for kind in (FP32, INT8, INT4):
        count, d = bags.weight.shape
        lookup = tbe.IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", count, d, sparse_type[kind], common.EmbeddingLocation.HOST)],
            device="cpu",
            output_dtype=sparse_type.FP32,
            row_alignment=1,
        )
        values = bags.weight
        rows_and_params: Sequence[NDArray[np.uint8] | None] = (values.view(np.uint8), None)
        if kind != FP32:
            table = packed[kind] if kind == INT4 else embpack.quantize(bags.weight, "asym", 8, "float16")
            values, rows_and_params = table.dequantize(), np.split(table.packed, [table.row_format.code_bytes], axis=1)
        tensors = [None if part is None else torch.from_numpy(part.copy()) for part in rows_and_params]
        lookup.initialize_weights()
        lookup.assign_embedding_weights([tuple(tensors)])
        yield Summer(kind, "FBGEMM", _bind_lookup(lookup, flat, offsets), values)


def _bind_lookup(lookup: Any, indices: Any, offsets: Any) -> Pool:
    return lambda: lookup(indices, offsets).numpy()

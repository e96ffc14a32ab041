"""Array in, packed table out."""

from typing import Any

import numpy as np

from embpack.chunks import iter_chunks
from embpack.methods import DEFAULT_METHOD, Method, measure_loss
from embpack.rows import as_rows
from embpack.table import PackedTable
from embpack.variant import Variant


def quantize(
    weight: Any,
    method: str | Method = DEFAULT_METHOD,
    bits: float = 4,
    param_dtype: str | None = None,
    *,
    error_weights: Any = None,
    rotate: str | None = None,
) -> PackedTable:
    """Pack a trained embedding table, each row with its own scale and bias.

    Args:
        weight: [num_embeddings, embedding_dim] of float32, float16 or bfloat16; NumPy or PyTorch, contiguous or
            not.
        method: how each row's range is chosen: a name in embpack.METHODS, with parameters if need be
            ("greedy:b=1000,r=0.5"), or a Method.
        bits: a code, 2, 4 or 8; for "trellis" any number from 2 to 7, for the bytes of a uniform row of so many.
        param_dtype: of scale and bias or of codebooks, "float16" or "float32"; None is float16, but for uniform
            rows at 8 bits float32, which makes rows that PyTorch and FBGEMM read.
        error_weights: what squared errors count, at least 0: [embedding_dim] by columns, such as the mean second
            moments of the columns' gradients; [num_embeddings, 1] by rows, such as access counts; or of each value,
            [num_embeddings, embedding_dim]. For "optimal". None: all count the same.
        rotate: "hadamard" multiplies rows by a fixed orthogonal matrix before they are packed, and lookups undo it:
            less loss where values are heavy-tailed (embpack.rotation). Error weights are then by rows only, for a
            packed value is of many columns.

    Returns:
        A PackedTable; its ``loss`` is what packing cost, with the error_weights.

    Raises:
        TypeError: weight is of another type.
        ValueError: weight is not 2-D, is empty or has NaN or infinity; a row's scale or bias overflows
            param_dtype; no such method, bits or rotation; error_weights are not as above.

    Source: Guan et al. 2019; with method="asym" the bytes of torch.ops.quantized.embedding_bag_4bit_prepack.
    """
    return pack(weight, Variant(method, bits, param_dtype, rotate), error_weights)


def pack(weight: Any, variant: Variant, error_weights: Any = None) -> PackedTable:
    """Do what quantize does, given one value for how to pack."""
    rows, dtype = as_rows(weight)
    row_format = variant.make_row_format(rows.shape[1])
    packer = variant.parsed_method.fit(lambda: iter_chunks(rows, variant.rotate), len(rows), row_format)
    if error_weights is not None:
        packer = packer.weigh_errors(error_weights, len(rows))
    packed, done, sums = np.empty((len(rows), row_format.row_bytes), np.uint8), 0, []
    for chunk in iter_chunks(rows, variant.rotate):
        sums += packer.pack(chunk, packed[done : done + len(chunk)], done)
        done += len(chunk)
    return PackedTable(packed, row_format, dtype, packer.spec, measure_loss(sums), **packer.beside())

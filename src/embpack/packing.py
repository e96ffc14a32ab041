"""Array in, packed table out; and ranges of rows of a table that is packed piece by piece."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embpack.chunks import iter_chunks, iter_packable
from embpack.methods import DEFAULT_METHOD, Method, Packer, measure_loss
from embpack.methods.base import OnRows, Sums, find_warning
from embpack.pages import use_huge_pages
from embpack.rows import as_rows
from embpack.table import PackedTable
from embpack.text import printable
from embpack.variant import Variant

LEAST_MOVED_BYTES = 4 << 20
"""Bytes of a packed table that is moved to huge pages: packing a smaller one would take twice the time for it."""


def quantize(
    weight: Any,
    method: str | Method = DEFAULT_METHOD,
    bits: float = 4,
    param_dtype: str | None = None,
    *,
    error_weights: Any = None,
    rotate: str | None = None,
) -> PackedTable:
    """Pack a trained embedding table: rows become codes of a few bits, and what these stand for is chosen by a method.

    Args:
        weight: [num_embeddings, embedding_dim] of float32, float16 or bfloat16; NumPy or PyTorch, contiguous or
            not.
        method: what chooses each row's scale and bias, its codebook, or what all rows share: a name in
            embpack.METHODS, with parameters if need be ("greedy:b=1000,r=0.5"), or a Method.
        bits: of each code, 2, 4 or 8. For "trellis" any number from 2 to 7: a row has the bytes of a uniform row of so
            many bits.
        param_dtype: of scale and bias or of codebooks, "float16" or "float32". None is float32 for uniform rows at 8
            bits, which PyTorch and FBGEMM read, and for "trellis", which has no other; float16 for all else.
        error_weights: what squared errors are multiplied by, at least 0: [embedding_dim] by columns, such as the mean
            squared gradients of the columns; [num_embeddings, 1] by rows, such as access counts; or of each value,
            [num_embeddings, embedding_dim]. Only for "optimal". None: all count the same.
        rotate: "hadamard" multiplies rows by a fixed orthogonal matrix before they are packed, and lookups undo it:
            less loss where values are heavy-tailed (embpack.rotation). Error weights can then be by rows only, for a
            rotated value is made of many columns.

    Returns:
        A PackedTable; its ``loss`` is the normalized l2 loss of packing, by the error_weights if there are any.

    Warns:
        UserWarning: rows are too small for float16 parameters and come back no better than zeros.

    Raises:
        TypeError: weight is of another type.
        ValueError: weight is not 2-D, is empty or has NaN or infinity; a row's scale, bias or codebook overflows
            param_dtype; there is no such method, bits or rotation; error_weights are not as above.

    Source: Guan et al. 2019; with method="asym" at 4 bits the bytes of
    torch.ops.quantized.embedding_bag_4bit_prepack.
    """
    return pack_and_warn(weight, Variant(method, bits, param_dtype, rotate), "weight", error_weights)


def pack_and_warn(weight: Any, variant: Variant, name: str, error_weights: Any = None) -> PackedTable:
    """Do what quantize does for a caller of its own, given one value for how to pack and what warnings call it."""
    table, warning = pack(weight, variant, error_weights)
    if warning is not None:
        warnings.warn(f"{printable(name)}: {warning}", stacklevel=3)
    return table


def pack(weight: Any, variant: Variant, error_weights: Any = None) -> tuple[PackedTable, str | None]:
    """Do what quantize does, given one value for how to pack; return the table and what there is to warn of."""
    rows, dtype = as_rows(weight)
    row_format = variant.make_row_format(rows.shape[1])
    packer = variant.parsed_method.fit(lambda: iter_chunks(rows, variant.rotate), len(rows), row_format)
    if error_weights is not None:
        packer = packer.weigh_errors(error_weights, len(rows))
    packed, done, sums = np.empty((len(rows), row_format.row_bytes), np.uint8), 0, []
    by_row = packer.make_by_row(len(rows))
    for chunk in iter_packable(rows, variant.rotate):
        own = slice(done, done + len(chunk))
        sums += packer.pack(chunk, packed[own], done, by_row=None if by_row is None else by_row[own])
        done += len(chunk)
    table = PackedTable(packed, row_format, dtype, packer.spec, measure_loss(sums), clusters=by_row, **packer.beside())
    if table.nbytes >= LEAST_MOVED_BYTES:
        use_huge_pages(table.packed, *table.beside)
    return table, find_warning(sums)


class PackedRows(NamedTuple):
    """Packed rows that follow others.

    Attributes:
        packed: uint8 [n, row_bytes], which the next ones may overwrite.
        sums: of the spans that end with them.
        by_row: entries of the array beside the rows, [n], or those of rows before, too; None if there is none.
        ranges: what is kept of them, an array of kept.RANGE, or of rows before, too; None if nothing is.
        reused: rows that were copied from what an earlier run has packed.
    """

    packed: NDArray[np.uint8]
    sums: Sequence[Sums]
    by_row: NDArray[Any] | None = None
    ranges: NDArray[Any] | None = None
    reused: int = 0


def iter_packed(
    packer: Packer,
    chunks: Iterable[NDArray[Any]],
    start: int = 0,
    on_rows: OnRows | None = None,
    by_row: NDArray[Any] | None = None,
) -> Iterator[tuple[NDArray[np.uint8], list[Sums]]]:
    """Pack a range of a table's rows.

    Args:
        packer: of the table.
        chunks: the rows, as Packer.pack takes them.
        start: number of their first row in the table.
        on_rows: as Packer.pack takes it.
        by_row: as Packer.pack takes it, of all of the range.

    Yields:
        Packed rows, which the next ones overwrite, and the sums that Packer.pack returns for them.
    """
    room, done = np.empty((0, packer.row_format.row_bytes), np.uint8), 0
    for rows in chunks:
        if len(rows) > len(room):
            room = np.empty((len(rows), packer.row_format.row_bytes), np.uint8)
        packed, own = room[: len(rows)], slice(done, done + len(rows))
        yield packed, packer.pack(rows, packed, start + done, on_rows, None if by_row is None else by_row[own])
        done += len(rows)

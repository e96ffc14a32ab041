"""Tensors of any rank that lie in blocks, as processes save those that are sharded among them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import SourceTensor
from embpack.formats.pieces import Piece, join_pieces

_MOST_VALUES = 1 << 58


@dataclass(frozen=True)
class Block:
    """A part of a tensor.

    Attributes:
        offsets: where it begins in the tensor, for each dimension.
        tensor: its values, of as many dimensions.
    """

    offsets: tuple[int, ...]
    tensor: SourceTensor


def join_blocks(where: str, name: str, shape: tuple[int, ...], dtype: str, blocks: Sequence[Block]) -> SourceTensor:
    """Make one tensor of blocks that together are all of it.

    Args:
        where: the checkpoint, for errors.
        name: of the tensor.
        shape: of the tensor.
        dtype: of all blocks.
        blocks: in any order, of sizes that are_joinable; those without values do not count.

    Raises:
        FormatError: blocks lie over each other or outside the tensor, or leave a part of it out; or no tensor has such
            a shape.
    """
    # A shape with a 0 may have any other numbers, and NumPy makes no array of it.
    if math.prod(max(1, length) for length in shape) >= _MOST_VALUES:
        raise FormatError(f"{where}: tensor {name!r} has shape {list(shape)}, which is too large; copy it again")
    blocks = [block for block in blocks if block.tensor.nbytes]
    if len(blocks) == 1 and blocks[0].tensor.shape == shape:
        return replace(blocks[0].tensor, name=name)
    # What is before the axis along which they are cut is rows of a table, and what follows is its columns.
    axis = _find_axes(shape, [block.tensor.shape for block in blocks])[0]
    rows_each, columns_each = math.prod(shape[1:axis]), math.prod(shape[axis + 1 :])
    pieces = []
    for block in blocks:
        row, column = (block.offsets[0], block.offsets[axis]) if len(shape) > 1 else (*block.offsets, 0, 0)[:2]
        own = block.tensor.shape
        flat = math.prod(own[:axis]), math.prod(own[axis:])
        read = partial(_iter_flat, block.tensor, flat, rows_each)
        tensor = replace(block.tensor, shape=flat, iter_rows=read, stored=None)
        pieces.append(Piece(row * rows_each, column * columns_each, tensor))
    flat = math.prod(shape[:axis]), math.prod(shape[axis:])
    table = join_pieces(where, name, flat, dtype, pieces)
    return replace(table, shape=shape, iter_rows=partial(_iter_entries, table, shape, rows_each))


def are_joinable(shape: tuple[int, ...], sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether blocks of such sizes are cut along the first dimension, and one other at most."""
    return len(_find_axes(shape, sizes)) == 1


def _find_axes(shape: tuple[int, ...], sizes: Sequence[tuple[int, ...]]) -> list[int]:
    """Find the dimensions beside the first along which a tensor is cut; the second, if there is none."""
    is_cut = (any(each[axis] != shape[axis] for each in sizes if 0 not in each) for axis in range(1, len(shape)))
    return [axis for axis, cut in enumerate(is_cut, start=1) if cut] or [1]


def _iter_flat(
    tensor: SourceTensor, flat: tuple[int, int], rows_each: int, start: int, stop: int, n: int
) -> Iterator[NDArray[Any]]:
    """Yield entries of a block as rows of a table, rows_each for each of them."""
    for entries in tensor.iter_rows(start // rows_each, stop // rows_each, max(1, n // rows_each)):
        yield entries.reshape(-1, flat[1])


def _iter_entries(
    table: SourceTensor, shape: tuple[int, ...], rows_each: int, start: int, stop: int, n: int
) -> Iterator[NDArray[Any]]:
    """Undo _iter_flat for the whole tensor."""
    for rows in table.iter_rows(start * rows_each, stop * rows_each, n * rows_each):
        yield rows.reshape(-1, *shape[1:])

"""Arrays that lie in pieces in files, one after the other in memory."""

import errno
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.formats.base import SourceTensor
from embpack.formats.mapped import PrivateMap, expect_random_reads, map_over, reserve, was_refused
from embpack.formats.stored import StoredArray


def join_arrays(tensors: Sequence[SourceTensor], *, mapped: bool) -> NDArray[Any]:
    """Return tensors that follow each other along axis 0 as one array, as SourceTensor.whole returns one of them.

    Args:
        tensors: of one type and, but for axis 0, one shape; as they lie in safetensors files.
        mapped: their pages are laid one after the other in one range of addresses, without a copy. What does not begin
            at a page, in its file and in the array, is read into its place.

    Raises:
        FormatError: a file is damaged, or was changed.
    """
    if len(tensors) == 1:
        return tensors[0].whole(mapped=mapped)
    first = _stored(tensors[0])
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    array = _map(tensors, shape, first.dtype) if mapped else None
    if array is None:
        array, start = np.empty(shape, first.dtype), 0
        for tensor in tensors:
            _fill(array[start : start + tensor.shape[0]], tensor)
            start += tensor.shape[0]
    return array


def _map(tensors: Sequence[SourceTensor], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Map tensors; None, and a warning, where that is not allowed."""
    row_bytes = tensors[0].nbytes // tensors[0].shape[0]
    start, has_warned = 0, False
    try:
        reserved = reserve(shape[0] * row_bytes)
        array: NDArray[Any] = np.ndarray(shape, dtype, reserved)
        for tensor in tensors:
            stored, position = _stored(tensor), start * row_bytes
            stop = start + tensor.shape[0]
            if not (position % mmap.PAGESIZE or stored.offset % mmap.PAGESIZE):
                with tensor.unchanged(by_name=False):
                    map_over(reserved, position, stored.source.descriptor, stored.offset, tensor.nbytes)
            elif isinstance(reserved, PrivateMap):
                # Where the last piece of an array beside the rows lies is given by how many rows that piece has.
                if stop < shape[0] and not has_warned:
                    stored.source.warn_of_reading(f"{tensor.name!r} does not begin at a page")
                    has_warned = True
                _fill(array[start:stop], tensor)
            else:
                raise OSError(errno.EACCES, "no memory of its own may be mapped")
            start = stop
    except OSError as error:
        if not was_refused(error):
            raise
        _stored(tensors[0]).source.warn_of_reading(f"cannot be mapped here ({error.strerror})")
        return None
    expect_random_reads(array)
    array.flags.writeable = False
    return array


def _fill(out: NDArray[Any], tensor: SourceTensor) -> None:
    with tensor.unchanged(by_name=False):
        _stored(tensor).source.read_into(_stored(tensor).offset, out)


def _stored(tensor: SourceTensor) -> StoredArray:
    assert tensor.stored is not None  # as in all safetensors files
    return tensor.stored

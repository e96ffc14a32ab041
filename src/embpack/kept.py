"""What a packed file keeps of the rows that it was made of, if it is asked to: checksums, and sums, of ranges of them.

They lie in a tensor beside the table, which no lookup reads. With them a later run leaves alone what has not changed
(embpack.unchanged). docs/format.md has every byte.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack
from embpack.chunks import span_rows
from embpack.formats.base import SourceTensor, as_bytes
from embpack.methods import Packer
from embpack.methods.base import Sums
from embpack.text import printable

SUFFIX = ".embpack_ranges"
"""What a file adds to the name of a table, or of a piece of one, for the tensor."""

RANGE = np.dtype(
    [
        *(("source", "u1", 16), ("packed", "u1", 16)),
        *(("error", "<f8"), ("square", "<f8"), ("lost_rows", "<u8"), ("lost_square", "<f8")),
    ]
)
"""What is kept of a range of span_rows(embedding_dim) rows, of which the last one may have fewer.

source is the checksum of the source's rows, or zeros where it is not known what they were; packed that of the packed
rows and of what lies beside them by row. The rest are the Sums of the range.
"""

_VERSION_BYTES = 32


def count_ranges(num_rows: int, embedding_dim: int) -> int:
    """Count the ranges of so many rows."""
    return -(-num_rows // span_rows(embedding_dim))


def find_shape(num_rows: int, embedding_dim: int) -> tuple[int, int]:
    """Find the shape of the tensor, of type U8: an entry for the whole, then one for each range."""
    return 1 + count_ranges(num_rows, embedding_dim), RANGE.itemsize


def is_kept(tensor: SourceTensor, num_rows: int, embedding_dim: int) -> bool:
    """Whether a tensor that has the name is the one of so many rows."""
    return tensor.dtype == "U8" and tensor.shape == find_shape(num_rows, embedding_dim)


def checksum(*arrays: NDArray[Any] | None) -> NDArray[np.uint8]:
    """Checksum the bytes of arrays, little endian, one after the other: uint8 [16]; those that are None are left out.

    Of hashes SHA-256 is the fastest where the CPU has instructions for it, as all of the last years have.
    """
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(as_bytes(np.ascontiguousarray(array, array.dtype.newbyteorder("<"))))
    return np.frombuffer(digest.digest()[:16], np.uint8)


def describe_packer(packer: Packer) -> NDArray[np.uint8]:
    """Make the entry for the whole, uint8 [64]: embpack's version, and a checksum of all that rows are packed by."""
    version = embpack.__version__.encode()[:_VERSION_BYTES].ljust(_VERSION_BYTES, b"\0")
    return np.frombuffer(version + packer.digest(), np.uint8)


def join_kept(packer: Packer, ranges: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Make the tensor, uint8 [1 + n, 64], of what is to be kept of ranges that follow each other."""
    of_ranges = np.concatenate(ranges)
    return np.concatenate([describe_packer(packer), of_ranges.view(np.uint8)]).reshape(-1, RANGE.itemsize)


def read_version(entry: NDArray[np.uint8]) -> str:
    """Read which embpack has packed the rows, as a message can have it."""
    return printable(entry[:_VERSION_BYTES].tobytes().rstrip(b"\0").decode(errors="replace"))


def as_sums(ranges: NDArray[Any]) -> list[Sums]:
    """Make the Sums of ranges, an array of RANGE [n]."""
    return [
        Sums(float(each["error"]), float(each["square"]), int(each["lost_rows"]), float(each["lost_square"]))
        for each in ranges
    ]


def set_sums(ranges: NDArray[Any], sums: Sequence[Sums]) -> None:
    """Undo as_sums."""
    for name, values in zip(Sums._fields, zip(*sums, strict=True), strict=True):
        ranges[name] = values


def as_ranges(entries: NDArray[np.uint8]) -> NDArray[Any]:
    """View entries, uint8 [n, 64], as an array of RANGE [n]."""
    return np.ascontiguousarray(entries).reshape(-1).view(RANGE)


def forget_rows(kept: NDArray[np.uint8], embedding_dim: int, rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return what is to be kept of a table once some of its packed rows are others than the source's.

    Args:
        kept: the tensor, uint8 [1 + ranges, 64].
        embedding_dim: of the table.
        rows: int [n], numbers of these rows in the table, or in the piece of it that the tensor is of.

    Returns:
        The same, in memory of its own; a next run packs the ranges of these rows anew, whatever the source has.
    """
    known = kept.copy()
    known[1 + np.unique(np.asarray(rows) // span_rows(embedding_dim))] = 0
    return known

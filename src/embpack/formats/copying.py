"""Files that become other files: bytes that both share, where a file system can, until one of them is written to."""

import errno
import fcntl
import os
import sys

# Of Linux: have an open file share all bytes of another.
_SHARE_ALL = 0x40049409
# At a time, so that Ctrl-C is heard.
_PORTION_BYTES = 1 << 27
# What systems say that cannot copy from file to file, or not between these two.
_CANNOT = {errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY}
_BUFFER_BYTES = 1 << 20


def share_bytes(source: int, target: int) -> bool:
    """Have an open file share all bytes of another, in no time, and say whether the file system can.

    Btrfs, XFS and others that copy on write can, within one file system.

    Source: FICLONE, man 2 ioctl_ficlone.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _SHARE_ALL, source)
    except OSError:
        return False
    return True


def copy_bytes(source: int, target: int, start: int, stop: int) -> None:
    """Copy bytes [start, stop) of an open file to the same place of another; positions stay.

    Raises:
        OSError: there is no space, or bytes cannot be read.
    """
    within_system = hasattr(os, "copy_file_range")
    while start < stop:
        if within_system:
            try:
                count = os.copy_file_range(source, target, min(_PORTION_BYTES, stop - start), start, start)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                count = 0
            # Of some files it copies nothing.
            within_system = count > 0
            start += count
            continue
        portion = os.pread(source, min(_BUFFER_BYTES, stop - start), start)
        if not portion:
            return  # it was made shorter, of which whoever reads it hears
        write_all(target, memoryview(portion), start)
        start += len(portion)


def write_all(target: int, view: memoryview, offset: int) -> None:
    """Write bytes to a place of an open file.

    Raises:
        OSError: there is no space.
    """
    while len(view):
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def read_all(source: int, view: memoryview, offset: int) -> None:
    """Fill a view with bytes of an open file, as far as it has them."""
    while len(view) and (count := os.preadv(source, [view], offset)):
        view, offset = view[count:], offset + count

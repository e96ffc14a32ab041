"""Files that become other files: their bytes shared, where a file system can, until one of them is written to."""

import errno
import os

# At a time, so that Ctrl-C is heard; a file system shares whole blocks of it.
_PORTION_BYTES = 1 << 27
# What systems say that cannot copy from file to file, or not between these two.
_CANNOT = {errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY}
_BUFFER_BYTES = 1 << 20


def copy_bytes(source: int, target: int, size: int) -> None:
    """Copy the first bytes of an open file to the beginning of another; positions stay.

    Btrfs, XFS and others that copy on write share the bytes, which takes no time and no space. Others copy them within
    the system, or they go through memory.

    Raises:
        OSError: there is no space, or bytes cannot be read.
    """
    done, within_system = 0, hasattr(os, "copy_file_range")
    while done < size:
        if within_system:
            try:
                count = os.copy_file_range(source, target, min(_PORTION_BYTES, size - done), done, done)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                count = 0
            # Of some file systems, such as /proc, it copies nothing.
            within_system = count > 0
            done += count
            continue
        portion = os.pread(source, min(_BUFFER_BYTES, size - done), done)
        if not portion:
            return  # it was made shorter, of which whoever reads it hears
        while portion:
            written = os.pwrite(target, portion, done)
            portion, done = portion[written:], done + written

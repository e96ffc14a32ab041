"""What lies behind a URI: looked at, read, put and removed through fsspec; tried again, and errors that say what to do.

All functions take paths that formats.paths.is_remote is true of.
"""

import errno
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NoReturn, TypeVar

from embpack.formats.paths import is_remote

_T = TypeVar("_T")

# Of a request that failed for no reason that stays; beside what the packages for each protocol do themselves.
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.2
# What a request never does better the next time.
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
_FINAL_CODES = {errno.EINVAL, errno.EPERM, errno.ENOSYS}
_NO_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "TokenRetrieval", "ProfileNotFound")
_NO_ENDPOINT = ("EndpointConnection", "ConnectTimeout", "ClientConnector", "NoRegion", "InvalidEndpoint")
# Bytes of the parts of an upload, and how many are on their way, and so in memory, at a time; S3 allows 10,000 parts.
_PART_BYTES, _MOST_PARTS, _PARTS_AT_A_TIME = 1 << 24, 10_000, 4
# Requests that go on at a time, where there are several to make.
_AT_A_TIME = 8
# Under these names protocols say in what two versions of an object differ.
_VERSION_KEYS = ("ETag", "etag", "generation", "content_md5", "created")


def locate(path: Path) -> tuple[Any, str]:
    """Return fsspec's file system of a URI, and what that calls the place."""
    uri: Any = path
    return uri.fs, str(uri.path)


def _protocol(path: Path) -> str:
    return str(path).partition("://")[0]


class RemoteError(OSError):
    """Something behind a URI cannot be reached, read or written; the message says why, and what to do."""


def _is_final(error: Exception) -> bool:
    if isinstance(error, OSError):
        return isinstance(error, _FINAL) or error.errno in _FINAL_CODES
    # Who waits for an endpoint is the package below, some half a minute.
    names = (*_NO_CREDENTIALS, *_NO_ENDPOINT)
    return isinstance(error, (*_FINAL, ValueError, TypeError)) or type(error).__name__.startswith(names)


def trying(call: Callable[..., _T], *args: Any, **options: Any) -> _T:
    """Call a function of fsspec, some times if need be: after 0.2 seconds, and twice as many each time, or fewer."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return call(*args, **options)
        except Exception as error:
            if _is_final(error):
                raise
        time.sleep(_FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1))
    return call(*args, **options)


@contextmanager
def explained(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Say of errors of fsspec, and of what is below it, what they mean; nothing happens where the path is no URI's.

    Raises:
        FileNotFoundError: there is no such bucket.
        PermissionError: credentials are missing, or do not allow it.
        RemoteError: all else.
    """
    if not is_remote(path):
        yield
        return
    try:
        yield
    except (ImportError, RemoteError, ValueError, TypeError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if said.startswith(f"{_protocol(path)}://"):  # by us, or of the file that a user names
            raise
        raise _explain(path, what, error, said) from error


def _explain(path: Path, what: str, error: Exception, said: str) -> OSError:
    where, name = f"{path}: {what}", type(error).__name__
    if name.startswith(_NO_CREDENTIALS):
        return PermissionError(f"{where}: there are no credentials ({said}); {_advise_credentials(_protocol(path))}")
    if isinstance(error, PermissionError):
        return PermissionError(
            f"{where}: access is denied ({said}); check the credentials, and what they allow for this place"
        )
    if name.startswith(_NO_ENDPOINT):
        return RemoteError(f"{where}: the endpoint cannot be reached ({said}); check its URL and the network")
    if isinstance(error, FileNotFoundError) and "bucket does not exist" in said:
        return FileNotFoundError(f"{where}: there is no such bucket; check its name, or make it first")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where}: there is nothing of that name; check it")
    return RemoteError(f"{where}: {said or name}; run again, or check the place and the network")


def _advise_credentials(protocol: str) -> str:
    if protocol.startswith("s3"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return f"see how fsspec finds those of {protocol}://"


def look(path: Path) -> Any:
    """Look at what is under a URI now: a file, or a folder.

    Returns:
        What Path.stat does, as far as it is known there.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it cannot be looked at.
    """
    with explained(path):
        return trying(path.stat)


def find(path: Path) -> tuple[int, int, str]:
    """Look at an object as it is now.

    Returns:
        Its size in bytes, when it was last modified in nanoseconds, or 0, and what its store tells versions of it apart
        by, or "".

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be looked at.
    """
    found = look(path)
    if S_ISDIR(found.st_mode):
        raise FileNotFoundError(f"{path}: is a folder, not a file")
    described = found.as_info()
    version = " ".join(str(described[key]) for key in _VERSION_KEYS if described.get(key))
    return int(found.st_size), int(found.st_mtime_ns), version


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) of an object, or fewer where it ends before.

    Raises:
        OSError: they cannot be read.
    """
    with explained(path):
        system, name = locate(path)
        raw: bytes = trying(system.cat_file, name, start=start, end=stop)
        return raw


def list_objects(folder: Path) -> list[str]:
    """Name all objects in a folder and in folders of it, by their paths in it, in order; none if it is not there."""
    with explained(folder):
        system, name = locate(folder)
        prefix = name.rstrip("/") + "/"
        found: list[str] = trying(system.find, name)
        return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix) and name != prefix)


def refuse_access(path: Path, access: str) -> NoReturn:
    """Say that rows cannot be looked up behind a URI; access: what was asked for.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{path}: access={access!r} is for files of this machine; load it with access='memory', or copy it here first"
    )


def put(local: Path, path: Path) -> None:
    """Put a whole file under a URI, in place of what is there; until it is whole, that stays.

    Raises:
        OSError: it cannot be written.
    """
    options: dict[str, Any] = {}
    system, name = locate(path)
    if "s3" in system.protocol:
        part = max(_PART_BYTES, -(-local.stat().st_size // _MOST_PARTS))
        options = {"chunksize": part, "max_concurrency": _PARTS_AT_A_TIME}
    with explained(path, "cannot be written"):
        trying(system.put_file, os.fspath(local), name, **options)


def put_bytes(content: bytes, path: Path) -> None:
    """Put a few bytes under a URI, in place of what is there.

    Raises:
        OSError: they cannot be written.
    """
    with explained(path, "cannot be written"):
        system, name = locate(path)
        trying(system.pipe_file, name, content)


def copy(source: Path, path: Path) -> None:
    """Have an object copied where it lies, in place of what is under the second path.

    Raises:
        OSError: it cannot be copied.
    """
    with explained(path, "cannot be written"):
        system, name = locate(path)
        trying(system.cp_file, locate(source)[1], name)


def remove(path: Path) -> None:
    """Remove an object, if it is there.

    Raises:
        OSError: it cannot be removed.
    """
    with explained(path, "cannot be removed"), suppress(FileNotFoundError):
        system, name = locate(path)
        trying(system.rm_file, name)


def for_each(do: Callable[[_T], None], items: Iterable[_T]) -> None:
    """Do something with several items at a time.

    Raises:
        OSError: the first that it fails with.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(do, items):
            pass


def check_writable(path: Path) -> None:
    """Put an empty object beside a path, and remove it.

    Raises:
        OSError: nothing can be written there.
    """
    with explained(path, "cannot be written"):
        system, probe = locate(path.parent / f".{path.name}.embpack-probe")
        trying(system.pipe_file, probe, b"")
        trying(system.rm_file, probe)

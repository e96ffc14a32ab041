"""Paths as users give them: of files of this machine, and URIs of what lies elsewhere, such as in an object store."""

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from embpack.errors import MissingExtraError

if TYPE_CHECKING:
    from upath import UPath

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# What fsspec needs for a protocol, and the extra of embpack that has it. Of others its own error says what.
_PACKAGES: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "remote")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", None)),
    **dict.fromkeys(("abfs", "abfss", "az"), ("adlfs", None)),
}
# What is there is always looked at: another process may have written it since.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}


def as_path(path: "str | os.PathLike[str] | UPath") -> Path:
    """Make a path of what a user gives.

    Args:
        path: of this machine, or a URI of a protocol that fsspec knows: "s3://bucket/model.safetensors".

    Returns:
        A Path of this machine, for "file://" too. Of any other URI a UPath, which has the methods of Path that are used
        here, and no descriptor, mode or owner; is_remote tells them apart.

    Raises:
        MissingExtraError: it is a URI, and fsspec, universal_pathlib or the package for its protocol is missing.
        ValueError: fsspec knows no such protocol, or the URI names no bucket.
    """
    if not isinstance(path, str):
        module = sys.modules.get("upath")
        if module is None or not isinstance(path, module.UPath) or isinstance(path, Path):
            return Path(path)  # type: ignore[arg-type]
        return _make(str(path), path.protocol, dict(path.storage_options))
    found = _URI.match(path)
    if found is None:
        return Path(path)
    protocol = found[1].lower()
    if protocol == "file":
        return Path(path[found.end() :])
    return _make(f"{protocol}://{path[found.end() :]}", protocol, {})


def _make(uri: str, protocol: str, options: dict[str, Any]) -> Path:
    try:
        from fsspec import get_filesystem_class
        from upath import UPath
    except ImportError as error:
        raise MissingExtraError(f"{protocol}://", "fsspec and universal_pathlib", "remote") from error
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        if protocol in _PACKAGES:
            package, extra = _PACKAGES[protocol]
            raise MissingExtraError(f"{protocol}://", package, extra) from error
        raise ImportError(f"{uri}: {error}") from error
    except ValueError:
        raise ValueError(f"{uri}: fsspec knows no {protocol}://; give s3://, gs:// or abfs://") from None
    try:
        path: Any = UPath(uri, protocol=protocol, **{**_OPTIONS, **options})
    except ValueError as error:
        raise ValueError(f"{uri}: no such place: {error}") from None
    made: Path = path
    return made


def is_remote(path: Path) -> bool:
    """Whether a path that as_path has made is a URI's."""
    return not isinstance(path, Path)


def path_in(path: Path, folder: Path) -> PurePosixPath:
    """Return the path of what lies in a folder, from that on."""
    return PurePosixPath(str(path)).relative_to(str(folder))


def is_same(path: Path, other: Path) -> bool:
    """Whether two paths, of which the second one leads to something, lead to the same."""
    if is_remote(path) != is_remote(other):
        return False
    return _place(path) == _place(other) if is_remote(path) else path.exists() and path.samefile(other)


def _place(uri: Any) -> tuple[Any, str]:
    """What s3:// and s3a:// have alike, say, of one place."""
    return uri.fs.protocol, uri.path.rstrip("/")

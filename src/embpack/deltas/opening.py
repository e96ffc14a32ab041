"""Deltas as users name them: files, pairs of files, and folders that TorchEasyRec dumps into."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from embpack.deltas.arrays import read_archive, read_pair
from embpack.deltas.base import ColumnNames, Delta
from embpack.errors import MissingExtraError
from embpack.formats import open_checkpoint

# TorchEasyRec's names, after a prefix that its users choose.
_DUMP = re.compile(r".*_step_(\d{1,18})(?:_rank_(\d{1,9})_of_(\d{1,9}))?\.parquet")
TORCH_EASY_REC = ColumnNames()
_STEP_FOLDER = re.compile(r"step_\d+")
_HOW = (
    "give DELTA.parquet, DELTA.npz, IDS.npy,ROWS.npy, or a folder of TorchEasyRec's, if need be with the table's name "
    "in front: TABLE=DELTA.npz"
)


def parse_delta(text: str | os.PathLike[str]) -> tuple[str | None, tuple[Path, ...]]:
    """Read "TABLE=DELTA.npz", "TABLE=IDS.npy,ROWS.npy", or either without a table: what there are files of.

    Returns:
        The table, None if none is named, and one path or two.

    Raises:
        FileNotFoundError: no part of it is the name of files.
        ValueError: it is a URI.
    """
    name = os.fspath(text)
    # Names of tables and of files may have equals signs and commas, too.
    starts = [0, *(sign + 1 for sign, character in enumerate(name) if character == "=")]
    for start in starts:
        rest = name[start:]
        commas = [at for at, character in enumerate(rest) if character == ","]
        for paths in ((rest,), *((rest[:at], rest[at + 1 :]) for at in commas)):
            if all(path and Path(path).exists() for path in paths):
                return name[: start - 1] if start else None, tuple(map(Path, paths))
    if "://" in name:
        raise ValueError(f"{name}: deltas are files of this machine; copy it here")
    raise FileNotFoundError(f"{name}: no such file; {_HOW}")


@contextmanager
def open_deltas(given: Sequence[str | os.PathLike[str]], names: ColumnNames = TORCH_EASY_REC) -> Iterator[list[Delta]]:
    """Open deltas.

    Args:
        given: each as parse_delta takes it.
        names: of the columns of Parquet files.

    Yields:
        Them, in the order in which they are given, those of a folder by step and rank.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: a file is damaged, or has other columns or arrays than a delta has.
        MissingExtraError: PyArrow is not installed.
        ValueError: there are none; or some say when rows were written and others do not.
    """
    if isinstance(given, str | os.PathLike):
        raise TypeError(f"deltas is {given!r}; give a list of them: [{given!r}]")
    if not given:
        raise ValueError(f"there are no deltas; {_HOW}")
    with ExitStack() as stack:
        deltas: list[Delta] = []
        for text in given:
            table, paths = parse_delta(text)
            deltas += _open(stack, table, paths, names)
        _refuse_mixed(deltas)
        yield deltas


def _open(stack: ExitStack, table: str | None, paths: tuple[Path, ...], names: ColumnNames) -> list[Delta]:
    [path, *others] = paths
    if any(each.suffix.lower() != ".npy" or each.is_dir() for each in (path, *others)) and others:
        raise ValueError(f"{','.join(map(str, paths))}: two files with a comma between are IDS.npy,ROWS.npy; {_HOW}")
    if others:
        return [read_pair(table, *(stack.enter_context(open_checkpoint(each)) for each in paths))]
    if path.is_dir():
        return [_open_parquet(table, each, names) for each in list_dumps(path)]
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [_open_parquet(table, path, names)]
    if suffix == ".npz":
        return [*read_archive(table, stack.enter_context(open_checkpoint(path)))]
    raise ValueError(f"{path}: no delta ends in {suffix or 'no suffix'!r} alone; {_HOW}")


def _open_parquet(table: str | None, path: Path, names: ColumnNames) -> Delta:
    try:
        from embpack.deltas.parquet import ParquetDelta
        from embpack.formats.parquet import open_columns
    except ImportError as error:
        raise MissingExtraError("reading .parquet files", "PyArrow", "parquet") from error
    with open_columns(path) as columns:  # which opens the file again for each reading, so that there may be many
        return ParquetDelta.make(columns, names, table)


def list_dumps(folder: Path) -> list[Path]:
    """List the files that TorchEasyRec has dumped into a folder, or a folder of one step, by step and rank.

    Raises:
        FileNotFoundError: there are none, or a rank's is missing.
    """
    inner = [path for path in folder.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]
    found: dict[tuple[int, str, int], dict[int, Path]] = {}
    for path in (path for place in (folder, *inner) for path in place.iterdir()):
        match = _DUMP.fullmatch(path.name)
        if match is not None and path.is_file():
            step, rank, count = (int(number or default) for number, default in zip(match.groups(), "001", strict=True))
            found.setdefault((step, str(path.parent), count), {})[rank] = path
    if not found:
        raise FileNotFoundError(f"{folder}: no *_step_*.parquet in this folder or its step_* folders; {_HOW}")
    for (step, place, count), paths in found.items():
        missing = next((rank for rank in range(count) if rank not in paths), None)
        if missing is not None:
            raise FileNotFoundError(
                f"{place}: of step {step} the file of rank {missing} of {count} is missing; wait until it is there, or "
                "copy it, too"
            )
    return [paths[rank] for _, paths in sorted(found.items(), key=lambda item: item[0]) for rank in sorted(paths)]


def _refuse_mixed(deltas: Sequence[Delta]) -> None:
    """Raise ValueError if steps order some of the deltas only."""
    with_steps = [delta for delta in deltas if delta.has_steps]
    if with_steps and len(with_steps) < len(deltas):
        without = next(delta for delta in deltas if not delta.has_steps)
        raise ValueError(
            f"{with_steps[0].locate()} has steps that say when rows were written, but {without.locate()} has none, so "
            "which write is the last is unknown; update by one of them after the other"
        )

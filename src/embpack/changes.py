"""Rows of packed tables that deltas change: which ones, and what they are packed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.deltas import INT8_PARAM_BYTES, Delta, Keys, LastWrites, Rows
from embpack.files import TableEntry
from embpack.formats.dtypes import NUMPY_DTYPES
from embpack.layouts import RowFormat
from embpack.methods import measure_loss
from embpack.methods.base import Sums, condense
from embpack.packed_files import StoredTable, TablePiece
from embpack.rows import widen
from embpack.rules import list_names, suggest
from embpack.shard_writer import Progress
from embpack.table import PackedTable
from embpack.text import printable
from embpack.updating import Update, pack_like

Integers = NDArray[np.int64]

Pack = Callable[[NDArray[Any], Integers], Update]
WriteRows = Callable[[TablePiece, Integers, Update], None]
"""Takes packed rows of a piece of a table, and which rows of the piece they are, ascending."""


@dataclass
class Change:
    """What becomes of a table.

    Attributes:
        table: as it is.
        ids_seen: rows that the deltas have of it.
        rows: int64 [n], of the rows of all deltas those that count, ascending.
        ids: int64 [n], the rows of the table that they are for.
        num_misfits: of those that are packed.
        sums: of those that are packed, by the number of a piece.
    """

    table: StoredTable
    ids_seen: int
    rows: Integers
    ids: Integers
    num_misfits: int = 0
    sums: dict[int, list[Sums]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pieces = self.table.pieces
        self.bounds = np.array([*(piece.first_row for piece in pieces), pieces[-1].end_row])
        self.counts = np.histogram(self.ids, self.bounds)[0]  # rows that change, by piece

    @property
    def pieces(self) -> dict[int, TablePiece]:
        """The pieces that change, by number."""
        return {int(number): self.table.pieces[number] for number in np.flatnonzero(self.counts)}

    def renew(self, number: int, checksum: str) -> TableEntry:
        """Make the entry of a piece whose rows are packed: its loss is unknown, unless all of its rows are."""
        entry, sums, loss, square = self.table.pieces[number].entry, self.sums[number], None, None
        if self.counts[number] == entry.num_embeddings:
            loss, square = measure_loss(sums), math.fsum(span.square for span in sums)
        piece = entry.piece and replace(entry.piece, square_norm=square)
        return replace(entry, checksum=checksum, loss=loss, piece=piece)


def read_changes(deltas: Sequence[Delta], tables: Mapping[str, StoredTable], path: Path) -> list[Change]:
    """Read which rows of a file's tables deltas change, those that do not change left out.

    Raises:
        FormatError: a delta is damaged, or was changed.
        IndexError: an id is out of range.
        ValueError: no table, or more than one, has the name that a delta says.
    """
    writes: dict[str, LastWrites] = {}
    for delta, first_row in zip(deltas, _number(deltas), strict=False):
        found: dict[str | None, StoredTable] = {}
        for keys in delta.iter_keys():
            if keys.table not in found:
                found[keys.table] = find_table(keys.table, tables, path, delta)
            table = found[keys.table]
            _check_ids(delta, keys, table)
            own = writes.setdefault(table.name, LastWrites())
            own.add(keys.ids.astype(np.int64), keys.steps, first_row + keys.positions)
    there = ((table, writes[name]) for name, table in tables.items() if name in writes)
    changes = (Change(table, own.num_added, *own.finish()) for table, own in there)
    return [change for change in changes if len(change.ids)]


def _number(deltas: Sequence[Delta]) -> list[int]:
    """Number the rows of all deltas: that of each one's first, and how many there are."""
    return [*accumulate((delta.num_rows for delta in deltas), initial=0)]


def find_table(name: str | None, tables: Mapping[str, StoredTable], path: Path, delta: Delta) -> StoredTable:
    """Find the table that a delta names, with or without ".weight"; without a name the only one.

    Raises:
        ValueError: there is none, or more than one.
    """
    if name is None:
        if len(tables) > 1:
            raise ValueError(
                f"{delta.locate()}: which table its rows are of is not said, and {path} has {len(tables)}: "
                f"{list_names([*tables], 3)}; put the name in front: TABLE=DELTA"
            )
        return next(iter(tables.values()))
    if name in tables:
        return tables[name]
    found = [each for each in (f"{name}.weight", name.removesuffix(".weight")) if each in tables]
    if len(found) == 1:
        return tables[found[0]]
    verdict = f"no table {name!r}; {suggest(name, list(tables))}"
    if found:
        verdict = f"two tables that {name!r} may mean: {', '.join(found)}"
    raise ValueError(printable(f"{delta.locate()}: {path} has {verdict}"))


def _check_ids(delta: Delta, keys: Keys, table: StoredTable) -> None:
    num_embeddings = table.entry.num_embeddings
    outside = np.flatnonzero((keys.ids < 0) | (keys.ids >= num_embeddings))
    if len(outside):
        at = outside[0]
        raise IndexError(
            f"{delta.locate(int(keys.positions[at]), of_id=True)} is {keys.ids[at]}, but table "
            f"{printable(table.name)!r} has {num_embeddings} rows (valid: 0 to {num_embeddings - 1}); rows cannot be "
            "added to a packed table: pack it anew"
        )


def pack_changes(
    deltas: Sequence[Delta],
    changes: Sequence[Change],
    path: Path,
    write: WriteRows,
    *,
    method: str,
    progress: Progress,
) -> None:
    """Read and pack the rows that count, some at a time, and note in the changes what they came to.

    Args:
        deltas: what the changes were read from.
        changes: to pack.
        path: of the packed file.
        write: takes the rows.
        method: that packs rows of tables whose files do not say it; "" is not known.
        progress: is told of rows that are packed.

    Raises:
        FormatError: a delta is damaged, or was changed.
        ValueError: a row has another number of values, or NaN or infinity; a scale, bias or codebook overflows.
    """
    packers = [_make_packer(change, path, method) for change in changes]
    numbers = _number(deltas)
    most_values = max((change.table.entry.embedding_dim for change in changes), default=0) + INT8_PARAM_BYTES
    for delta, first_row, end_row in zip(deltas, numbers, numbers[1:], strict=False):
        own = []
        for change, pack in zip(changes, packers, strict=True):
            some = slice(*np.searchsorted(change.rows, [first_row, end_row]))
            if some.start < some.stop:
                own.append((change, pack, change.rows[some] - first_row, change.ids[some]))
        if not own:
            continue
        wanted = np.sort(np.concatenate([positions for _, _, positions, _ in own]))
        for batch in delta.iter_rows(wanted, most_values):
            for change, pack, positions, ids in own:
                some = slice(*np.searchsorted(positions, [batch.start, batch.stop]))
                if some.start < some.stop:
                    _pack(delta, batch, change, positions[some], ids[some], pack, write)
                    progress(change.table.name, some.stop - some.start)


def _make_packer(change: Change, path: Path, method: str) -> Pack:
    """Make what packs rows of a table, given their numbers."""
    table = change.table
    codebooks = next(iter(table.read_shared()), None)
    by_row = table.entry.row_format.form.by_row(table.entry.num_embeddings)
    if by_row is not None and codebooks is not None:
        # Of others there are no numbers in the file.
        codebooks = codebooks[: np.iinfo(NUMPY_DTYPES[table.pieces[0].parts[1].dtype]).max + 1]
    place = f"{path}: {printable(table.name)}"

    def pack(rows: NDArray[Any], numbers: Integers) -> Update:
        return pack_like(table.entry.row_format, table.entry.method or method, codebooks, rows, place, numbers)

    return pack


def _pack(
    delta: Delta,
    batch: Rows,
    change: Change,
    positions: Integers,
    ids: Integers,
    pack: Pack,
    write: WriteRows,
) -> None:
    """Pack rows of a batch for one table, those of each of its pieces by themselves."""
    entry = change.table.entry
    order = np.argsort(ids)
    ids, positions = ids[order], positions[order]
    rows = values = batch.take(positions, entry.embedding_dim)
    int8_rows = RowFormat(entry.embedding_dim, 8, "float16")
    if rows.dtype == np.uint8:
        values = PackedTable(rows, int8_rows).dequantize()
    _refuse_not_finite(delta, positions, ids, values)
    cuts = np.searchsorted(ids, change.bounds)
    for number in map(int, np.flatnonzero(np.diff(cuts))):
        some, piece = slice(cuts[number], cuts[number + 1]), change.table.pieces[number]
        if rows.dtype == np.uint8 and entry.row_format == int8_rows:
            # The table's bytes mean what the delta's do.
            square = float(np.square(values[some], dtype=np.float64).sum())
            update = Update(rows[some], None, [Sums(0.0, square)], 0)
        else:
            update = pack(values[some], ids[some])
        change.num_misfits += update.num_misfits
        change.sums[number] = condense([*change.sums.get(number, ()), *update.sums])
        write(piece, ids[some] - piece.first_row, update)


def _refuse_not_finite(delta: Delta, positions: Integers, ids: Integers, values: NDArray[Any]) -> None:
    wide = values if values.dtype == np.float32 else widen(values)
    if np.isfinite(wide).all():
        return
    row, column = np.argwhere(~np.isfinite(wide))[0]
    raise ValueError(
        f"{delta.locate(int(positions[row]))} is {wide[row, column]} in column {column} of the row for id {ids[row]}; "
        "NaN and infinity cannot be packed, replace them first"
    )

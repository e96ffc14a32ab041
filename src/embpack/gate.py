"""The gate: tables that lose more than they may."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from embpack.errors import LossLimitError
from embpack.shard_writer import TableReport
from embpack.text import printable, quote


def check_losses(path: Path, tables: Sequence[TableReport], limit: float) -> None:
    """Refuse a checkpoint whose tables lose more than the limit; path: of the checkpoint.

    Raises:
        LossLimitError: it names all that do, worst first.
    """
    over = sorted((table for table in tables if table.loss > limit), key=lambda table: table.loss, reverse=True)
    if not over:
        return
    if len(over) == 1:
        lose, them, excluded = "loses", "it as it is", quote(escape(over[0].name))
    else:
        lose, them, excluded = "lose", "them as they are", "NAME for each"
    losses = {table.name: table.loss for table in over}
    message = (
        f"{printable(path)}: {len(over)} of {len(tables)} tables {lose} more than the limit of {limit:.6g}, so nothing "
        f"was written; use a better method or more bits, leave {them} with --exclude {excluded}, or raise the limit; "
        "normalized l2 loss, worst first:"
    )
    lines = (f"  {loss:.6g}  {printable(name)}" for name, loss in losses.items())
    raise LossLimitError("\n".join([message, *lines]), limit, losses)

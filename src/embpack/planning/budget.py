"""How many bytes a packed checkpoint takes, before any row is packed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embpack.convert import count_file_bytes, read_file_size
from embpack.cutting import count_added, count_bytes, cut, cut_files, join_metadata, keep_files
from embpack.errors import naming
from embpack.formats import Checkpoint
from embpack.formats.safetensors import bound_bytes
from embpack.rules import Decision
from embpack.shard_writer import TableWriter
from embpack.sizes import parse_size


@dataclass(frozen=True)
class Budget:
    """The bytes of a packed checkpoint, of all its files together, as a sum over its tables; never too few.

    They are some too many: in a header, each tensor's place has as many digits here as it can have.

    Attributes:
        most: no file is larger.
        fixed: bytes without the tables.
        file_bytes: no file is to be larger.
        empty_bytes: of a file without tensors.
    """

    most: int
    fixed: int
    file_bytes: int
    empty_bytes: int

    @classmethod
    def make(
        cls, checkpoint: Checkpoint, decisions: Sequence[Decision], max_shard_size: int | str | None = None
    ) -> "Budget":
        """Find the bytes that do not depend on how tables are packed, given what was decided on all tensors.

        Args:
            checkpoint: that is packed.
            decisions: on all of its tensors.
            max_shard_size: as quantize_file takes it.
        """
        # Nobody packs a table, with all that describes it, into so many.
        most = 1_000_000 + 10 * sum(each.bytes_before for each in decisions)
        empty_bytes = count_bytes([], join_metadata(checkpoint), most)
        writers = keep_files(checkpoint, decisions) or cut_files(checkpoint, decisions, most)
        budget = cls(most, 0, read_file_size(max_shard_size), empty_bytes)
        fixed = sum(bound_bytes(writer.out_shard(""), most) for writer in writers)
        fixed -= sum(count_added(TableWriter(each).whole(), most) for each in decisions if each.variant)
        # If files are of a size, each tensor may be the first one of a file.
        return replace(budget, fixed=fixed + budget._is_cut * len(decisions) * empty_bytes)

    @property
    def _is_cut(self) -> bool:
        """Whether there may be more files than the source has."""
        return self.most > self.file_bytes

    def count_table(self, decision: Decision) -> int:
        """Count what a table adds, packed as decided: rows, what lies beside them, and the descriptions of both."""
        whole = TableWriter(decision).whole()
        pieces = cut(whole, self.file_bytes - self.empty_bytes) if self._is_cut else [whole]
        return sum(count_added(piece, self.most) for piece in pieces) + (len(pieces) - 1) * self.empty_bytes


def check_file_bytes(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    max_bytes: int | str,
    dst: Path | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Refuse a packed checkpoint that would be too large, before anything is packed.

    Args:
        checkpoint: that is packed.
        decisions: on all of its tensors.
        max_bytes: as embpack.plan takes it.
        dst: as count_file_bytes takes it.
        max_shard_size: as quantize_file takes it.

    Raises:
        ValueError: it would take more; or max_bytes is no size.
    """
    most, found = read_max_bytes(checkpoint, max_bytes), count_file_bytes(checkpoint, decisions, dst, max_shard_size)
    if found > most:
        raise ValueError(
            f"max_bytes is {max_bytes}, but the packed file would take {found:,} bytes by this plan; make the plan "
            "anew with --auto --save-plan, or allow that much"
        )


def read_max_bytes(checkpoint: Checkpoint, max_bytes: int | str) -> int:
    """Read a size; a share is of all files of a checkpoint."""
    with naming("max_bytes"):
        return parse_size(max_bytes, sum(shard.num_bytes for shard in checkpoint.shards))

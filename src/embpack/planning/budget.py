"""How many bytes a packed checkpoint takes, before any row is packed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from embpack.convert import count_file_bytes
from embpack.errors import naming
from embpack.formats import Checkpoint, OutShard
from embpack.formats.safetensors import bound_bytes
from embpack.rules import Decision
from embpack.shard_writer import PieceWriter, ShardWriter, TableWriter
from embpack.sizes import parse_size


@dataclass(frozen=True)
class Budget:
    """The bytes of a packed checkpoint, of all its files together, as a sum over its tables; never too few.

    They are some too many: in a header, each tensor's place has as many digits here as it can have.

    Attributes:
        most: no file is larger.
        fixed: bytes without the tables.
    """

    most: int
    fixed: int

    @classmethod
    def make(cls, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> "Budget":
        """Find the bytes that do not depend on how tables are packed, given what was decided on all tensors."""
        remaining = iter(decisions)
        shards = [
            ShardWriter(
                tuple(_write(each) if each.variant else each.tensor for each in islice(remaining, len(shard.tensors))),
                shard.metadata,
            ).out_shard("")
            for shard in checkpoint.shards
        ]
        # Nobody packs a table, with all that describes it, into so many.
        most = 1_000_000 + 10 * sum(each.bytes_before for each in decisions)
        whole = cls(most, sum(bound_bytes(shard, most) for shard in shards))
        return replace(whole, fixed=whole.fixed - sum(whole.count_table(each) for each in decisions if each.variant))

    def count_table(self, decision: Decision) -> int:
        """Count what a table adds, packed as decided: rows, what lies beside them, and the descriptions of both."""
        table = _write(decision)
        # JSON within JSON, as the metadata has it; two more for a comma and a space.
        entry = {decision.tensor.name: table.longest_entry.as_json()}
        room = 2 + len(json.dumps(json.dumps(entry))) - len(json.dumps(json.dumps({})))
        alone = OutShard("", tuple(table.out_tensors()), metadata_room=room)
        return bound_bytes(alone, self.most) - bound_bytes(OutShard("", ()), self.most)


def _write(decision: Decision) -> PieceWriter:
    return TableWriter(decision, lambda name, rows: None).whole()


def check_file_bytes(checkpoint: Checkpoint, decisions: Sequence[Decision], max_bytes: int | str) -> None:
    """Refuse a packed checkpoint that would be too large, before anything is packed.

    Args:
        checkpoint: that is packed.
        decisions: on all of its tensors.
        max_bytes: as embpack.plan takes it.

    Raises:
        ValueError: it would take more; or max_bytes is no size.
    """
    most, found = read_max_bytes(checkpoint, max_bytes), count_file_bytes(checkpoint, decisions)
    if found > most:
        raise ValueError(
            f"max_bytes is {max_bytes}, but the packed file would take {found:,} bytes by this plan; make the plan "
            "anew with --auto --save-plan, or allow that much"
        )


def read_max_bytes(checkpoint: Checkpoint, max_bytes: int | str) -> int:
    """Read a size; a share is of all files of a checkpoint."""
    with naming("max_bytes"):
        return parse_size(max_bytes, sum(shard.num_bytes for shard in checkpoint.shards))

"""How many bytes a packed checkpoint takes, before any row is packed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from embpack.formats import Checkpoint, OutShard
from embpack.formats.safetensors import bound_bytes
from embpack.rules import Decision
from embpack.shard_writer import ShardWriter, TableWriter


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
        """Find the bytes that do not depend on how tables are packed, given decisions on all tensors of a checkpoint."""
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

    def count_all(self, decisions: Sequence[Decision]) -> int:
        """Count the bytes of the whole."""
        return self.fixed + sum(self.count_table(each) for each in decisions if each.variant)


def _write(decision: Decision) -> TableWriter:
    return TableWriter(decision, lambda name, rows: None)

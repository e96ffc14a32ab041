"""Which tensors of a checkpoint are embedding tables.

A tensor is packed if it is a 2-D table of float32, float16 or bfloat16 and its name says embedding, or the file
format says that it holds vectors, or the user names it; and, unless the user names it, if it has at least MIN_ROWS rows
and packing makes them smaller.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from embpack.errors import naming
from embpack.files import METADATA_KEY
from embpack.formats import Checkpoint, SourceTensor
from embpack.formats.dtypes import count_bytes
from embpack.layouts import ArraySpec, RowFormat
from embpack.variant import Variant

# The types that can be packed, by their safetensors names.
PACKABLE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Each row of a small table (token types, say) is in a large part of all inputs: an error there costs the most, and
# packing it saves the least.
MIN_ROWS = 16

_EMBEDDING_WORDS = {"embedding", "embeddings", "embed", "embeds", "emb", "embs", "embeddingbag", "wte", "wpe"}
# After a first word such as "embed" or "embedding": what a table holds, never what a layer does.
_ITEM_WORDS = {
    *("token", "tokens", "word", "words", "position", "positions", "segment", "segments", "type", "types"),
    *(
        "user",
        "users",
        "item",
        "items",
        "id",
        "ids",
        "feature",
        "features",
        "category",
        "categories",
        "field",
    ),
    *("bag", "bags", "table", "tables", "entity", "entities", "relation", "relations", "l"),
}


def says_embedding(name: str) -> bool:
    """Whether a parameter's name says that it is an embedding table.

    The name before ``.weight``, numbers left out, must end with a word for embedding ("word_embeddings", "wte",
    "user_emb"), or begin with one and go on with what is embedded ("embed_tokens", "embedding_user", "emb_l");
    or the parameter lies in an ``embedding_bags`` module (TorchRec). Layers that only work on embeddings
    ("embed_proj", "embedding_hidden_mapping_in", "time_embedding.linear_1") do not match.
    """
    parts = [part for part in name.split(".") if not part.isdigit()]
    if parts and parts[-1] == "weight":
        parts = parts[:-1]
    if len(parts) > 1 and parts[-2] == "embedding_bags":
        return True
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", parts[-1]) if parts else ""
    words = [word for word in re.split(r"[^a-z]+", spaced.lower()) if word]
    if not words:
        return False
    if words[-1] in _EMBEDDING_WORDS:
        return True
    return words[0] in _EMBEDDING_WORDS and all(word in _ITEM_WORDS for word in words[1:])


@dataclass(frozen=True)
class Decision:
    """What happens to a tensor, and why.

    Attributes:
        variant: how it is packed; None if it is passed through as it is.
        reason: for the user to read.
    """

    tensor: SourceTensor
    variant: Variant | None
    reason: str

    @cached_property
    def row_format(self) -> RowFormat | None:
        """What its packed rows are; None if it is passed through."""
        return None if self.variant is None else self.variant.make_row_format(self.tensor.shape[1])

    @property
    def beside(self) -> tuple[ArraySpec, ...]:
        """What will lie beside its packed rows."""
        if self.variant is None or self.row_format is None:
            return ()
        rows = self.tensor.shape[0]
        num_codebooks = self.variant.parsed_method.num_codebooks(rows, self.row_format)
        return self.row_format.form.beside(rows, num_codebooks)

    @property
    def dtype(self) -> str:
        """What a table's weights are: "float32", "float16" or "bfloat16"."""
        return PACKABLE_DTYPES[self.tensor.dtype]

    @property
    def bytes_before(self) -> int:
        """Bytes of the tensor."""
        return count_bytes(self.tensor.dtype, self.tensor.shape)

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensor in the output, and of what lies beside it."""
        if self.variant is None:
            return self.bytes_before
        num_embeddings, embedding_dim = self.tensor.shape
        return self.variant.count_bytes(num_embeddings, embedding_dim)


@dataclass(frozen=True)
class Rules:
    """How tables are chosen and packed.

    Attributes:
        include: globs of names to pack whatever they say.
        exclude: globs of names never to pack.
        variant: how tables are packed.
        variants: by name, how tables are packed that have a variant of their own.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    variant: Variant = field(default_factory=Variant)
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def decide(self, tensor: SourceTensor) -> Decision:
        """Decide on one tensor."""
        included = _match(tensor.name, self.include)
        if _match(tensor.name, self.exclude):
            return Decision(tensor, None, "excluded")
        if len(tensor.shape) != 2:
            return Decision(tensor, None, f"{len(tensor.shape)}-D, a table is 2-D")
        if 0 in tensor.shape:
            return Decision(tensor, None, "empty")
        if tensor.dtype not in PACKABLE_DTYPES:
            return Decision(tensor, None, f"{tensor.dtype}, not float32, float16 or bfloat16")
        if not (included or tensor.is_vectors or says_embedding(tensor.name)):
            return Decision(tensor, None, "name does not say embedding")
        variant = self.variants.get(tensor.name, self.variant)
        if tensor.shape[0] < MIN_ROWS and not (included or tensor.is_vectors):
            return Decision(tensor, None, f"fewer than {MIN_ROWS} rows: much used, and little to save")
        with naming(tensor.name):
            growth = explain_growth(count_bytes(tensor.dtype, tensor.shape), variant, *tensor.shape)
        if growth is not None and not included:
            return Decision(tensor, None, growth)
        reason = "format holds vectors" if tensor.is_vectors else "name says embedding"
        return Decision(tensor, variant, "included" if included else reason)


def explain_growth(before: int, variant: Variant, num_embeddings: int, embedding_dim: int) -> str | None:
    """Say why a table is left as it is if packing makes it no smaller; None if it does.

    Args:
        before: bytes of its weights.
        variant: how it would be packed.
        num_embeddings: its rows.
        embedding_dim: values a row.

    Raises:
        TypeError, ValueError: it has no rows of this embedding_dim, as Variant.make_row_format says.
    """
    after = variant.count_bytes(num_embeddings, embedding_dim)
    return None if after < before else f"packed rows would be no smaller: {before:,} -> {after:,} bytes"


def _match(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def decide_all(checkpoint: Checkpoint, rules: Rules) -> list[Decision]:
    """Decide on every tensor of a checkpoint that is to be packed, in file order.

    Raises:
        ValueError: the checkpoint is packed already, a glob of ``include`` matches nothing that can be packed, or there
            is no table at all.
    """
    if any(METADATA_KEY in shard.metadata for shard in checkpoint.shards):
        raise ValueError(f"{checkpoint.path}: is packed already; unpack it first with: embpack dequantize")
    decisions = [rules.decide(tensor) for shard in checkpoint.shards for tensor in shard.tensors]
    packed = [decision.tensor.name for decision in decisions if decision.variant]
    for glob in rules.include:
        if not _match_any(glob, packed):
            named = [f"{d.tensor.name} ({d.reason})" for d in decisions if fnmatchcase(d.tensor.name, glob)]
            what = f"only matches {_list(named)}" if named else "matches no tensor"
            raise ValueError(f"{checkpoint.path}: include {glob!r} {what}")
    if not packed:
        tables = [f"{d.tensor.name} ({d.reason})" for d in decisions if len(d.tensor.shape) == 2]
        hint = f"its 2-D tensors are {_list(tables)}; name tables with --include" if tables else "it has no 2-D tensor"
        raise ValueError(f"{checkpoint.path}: nothing to pack among {len(decisions)} tensors; {hint}")
    return decisions


def _match_any(glob: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown

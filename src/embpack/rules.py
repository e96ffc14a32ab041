"""Which tensors of a checkpoint are embedding tables.

A tensor is packed if it is a 2-D table of float32, float16 or bfloat16, or of FP8 or INT8 with scales, and its name
says embedding, or the file format says that it holds vectors, or the user names it; and, unless the user names it, if
it has at least MIN_ROWS rows and packing makes them smaller. Tables that lie in several tensors (embpack.composites) go
by the name that they have together.
"""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from embpack.composites import Unit, list_units
from embpack.files import METADATA_KEY
from embpack.formats import Checkpoint, Shard, SourceTensor
from embpack.formats.base import name_first
from embpack.formats.dtypes import count_bytes
from embpack.layouts import ArraySpec, RowFormat
from embpack.readers import check_reader
from embpack.selection import refuse_unread
from embpack.table_names import says_embedding
from embpack.text import printable, quote
from embpack.variant import Variant

if TYPE_CHECKING:
    from embpack.unchanged import OldTable

# The types that can be packed, by their safetensors names.
PACKABLE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Other quantizers keep codes in these: numbers they are not.
_CODES_OF_OTHERS = ("U8", "I16", "I32", "U32", "F4")

# Each row of a small table (token types, say) is in a large part of all inputs: an error there costs the most, and
# packing it saves the least.
MIN_ROWS = 16


@dataclass(frozen=True)
class Decision:
    """What happens to a tensor, and why.

    Attributes:
        variant: how it is packed; None if it is passed through as it is.
        reason: for the user to read.
        path: of the file that has it, if it is known.
        shard: which of the checkpoint's it is in, by number; the first of its parts is.
        is_chosen: whether the variant is its own, as Rules.variants say.
        keeps_checksums: whether its file keeps checksums of the rows that it is read from.
        old: what an earlier run has made of it, if that is to be used; None if not.
    """

    tensor: SourceTensor
    variant: Variant | None
    reason: str
    path: Path | None = None
    is_chosen: bool = False
    shard: int = 0
    keeps_checksums: bool = False
    old: "OldTable | None" = None

    @property
    def place(self) -> str:
        """The file and the tensor, for messages."""
        name = printable(self.tensor.name)
        return name if self.path is None else f"{printable(self.path)}: {name}"

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
        """What a table's weights are unpacked to: "float32", "float16" or "bfloat16"."""
        return self.tensor.weight_dtype or PACKABLE_DTYPES[self.tensor.dtype]

    @property
    def bytes_before(self) -> int:
        """Bytes of the tensor, or of all its parts."""
        if self.tensor.parts:
            return sum(part.nbytes for part in self.tensor.parts)
        return count_bytes(self.tensor.dtype, self.tensor.shape)

    @property
    def is_left_out(self) -> bool:
        """Whether the output does not have it: it is not packed, and cannot be copied."""
        return self.variant is None and not self.tensor.can_be_copied

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensor in the output, and of what lies beside it."""
        if self.variant is None:
            return 0 if self.is_left_out else self.bytes_before
        num_embeddings, embedding_dim = self.tensor.shape
        return self.variant.count_bytes(num_embeddings, embedding_dim)


@dataclass(frozen=True)
class Rules:
    """How tables are chosen and packed.

    Attributes:
        include: globs of names to pack whatever they say.
        exclude: globs of names never to pack.
        variant: how tables are packed.
        variants: by name or glob, how tables are packed that have a variant of their own; of several that match, the
            last counts. A name of a tensor is no glob, whatever its characters.
        readable_by: names in embpack.readers.READERS, all of which are to read packed rows as they are.
        keep_checksums: whether files keep checksums of the rows that tables are read from.

    Raises:
        TypeError: include, exclude or readable_by is one string.
        ValueError: there is no such reader.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    variant: Variant = field(default_factory=Variant)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    readable_by: Sequence[str] = ()
    keep_checksums: bool = False

    def __post_init__(self) -> None:
        for name, what in (("include", "globs"), ("exclude", "globs"), ("readable_by", "readers")):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"{name} is {values!r}; give a list of {what}: [{values!r}]")
            object.__setattr__(self, name, tuple(values))
        for reader in self.readable_by:
            check_reader(reader)

    def decide(self, tensor: SourceTensor, path: Path | None = None, fault: str | None = None) -> Decision:
        """Decide on one tensor, which is in the file at path.

        Raises:
            ValueError: it is a table, but there is a fault, as a Unit has it; or its variant has no rows of this
                embedding_dim, or none that are readable_by all that are to read them.
        """
        reason = self.why_no_table(tensor)
        if reason is not None:
            return Decision(tensor, None, reason, path)
        included = _match(tensor.name, self.include)
        variant = self.variants.get(tensor.name, self.variant)
        is_chosen = tensor.name in self.variants
        decision = Decision(tensor, variant, "included", path, is_chosen, keeps_checksums=self.keep_checksums)
        try:
            if fault is not None:
                raise ValueError(fault)
            growth = explain_growth(decision.bytes_before, variant, *tensor.shape)
            if growth is None or included:
                refuse_unread(variant, tensor.shape[1], self.readable_by)
        except (TypeError, ValueError) as error:
            advice = f"leave it as it is with --exclude {quote(glob.escape(tensor.name))}"
            raise type(error)(f"{decision.place}: {error}; {advice}") from error
        if growth is not None and not included:
            return Decision(tensor, None, growth, path)
        reason = "format holds vectors" if tensor.is_vectors else "name says embedding"
        return decision if included else replace(decision, reason=reason)

    def why_no_table(self, tensor: SourceTensor) -> str | None:
        """Say why a tensor is not to be packed, in whatever way; None if it is."""
        if _match(tensor.name, self.exclude):
            return "excluded"
        if len(tensor.shape) != 2:
            return f"{len(tensor.shape)}-D, a table is 2-D"
        if 0 in tensor.shape:
            return "empty"
        if tensor.dtype in _CODES_OF_OTHERS and says_embedding(tensor.name):
            return f"{tensor.dtype}: codes of an encoding that is not read"
        if tensor.dtype not in PACKABLE_DTYPES:
            return f"{tensor.dtype}, not float32, float16 or bfloat16"
        if tensor.is_vectors or _match(tensor.name, self.include):
            return None
        if not says_embedding(tensor.name):
            return "name does not say embedding"
        if tensor.shape[0] < MIN_ROWS:
            return f"fewer than {MIN_ROWS} rows: much used, and little to save"
        return None

    def can_include(self, tensor: SourceTensor) -> bool:
        """Whether a tensor would be packed if it were named."""
        return replace(self, include=(*self.include, glob.escape(tensor.name))).why_no_table(tensor) is None


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
    return any(fnmatchcase(name, pattern) for pattern in globs)


def decide_all(checkpoint: Checkpoint, rules: Rules) -> list[Decision]:
    """Decide on every tensor of a checkpoint that is to be packed, in file order.

    Returns:
        One decision for each table that is packed, whatever it is made of, and for each other tensor.

    Raises:
        ValueError: the checkpoint is packed already; a table lacks a piece or a scale, or they do not fit; a glob of
            ``include`` or ``exclude``, or a name or glob in ``variants``, matches nothing; what ``include`` or
            ``variants`` name is not packed; a reader cannot take packed rows; or there is no table at all.
    """
    path = printable(checkpoint.path)
    if any(METADATA_KEY in shard.metadata for shard in checkpoint.shards):
        raise ValueError(f"{path}: is packed already; unpack it first with: embpack dequantize")
    units = list_units(checkpoint.tensors)
    tables = list(dict.fromkeys(units))
    _check_globs(path, rules, tables, checkpoint.left_out)
    rules = replace(rules, variants=name_variants(path, rules, tables, checkpoint.left_out))
    places = [
        (number, _find_path(checkpoint, shard)) for number, shard in enumerate(checkpoint.shards) for _ in shard.tensors
    ]
    first = dict(zip(reversed(units), reversed(places), strict=True))
    decided = {
        unit: replace(rules.decide(unit.tensor, first[unit][1], unit.fault), shard=first[unit][0]) for unit in tables
    }
    whole = list(decided.values())
    for pattern in rules.include:
        matched = [each for each in whole if fnmatchcase(each.tensor.name, pattern)]
        if not any(each.variant for each in matched):
            advice = "; convert to float32 what is a table" if any(map(_is_other_float, matched)) else ""
            said = "; ".join([f"{_list_reasons(matched)}{advice}", *_say_left_out(checkpoint.left_out)])
            raise ValueError(f"{path}: include {pattern!r} only matches {said}")
    if not any(each.variant for each in whole):
        raise ValueError(f"{path}: nothing to pack; {_explain_none(rules, whole, checkpoint.left_out)}")
    return _list_decisions(decided, units, checkpoint.tensors, places)


def _find_path(checkpoint: Checkpoint, shard: Shard) -> Path:
    return checkpoint.path if checkpoint.index_name is None else checkpoint.path.parent / shard.file_name


def _list_decisions(
    decided: Mapping[Unit, Decision],
    units: Sequence[Unit],
    tensors: Sequence[SourceTensor],
    places: Sequence[tuple[int, Path]],
) -> list[Decision]:
    """List what is packed where its first part is, and of what is not each part where it is."""
    decisions: dict[int, Decision] = {}
    for unit, tensor, (shard, path) in zip(units, tensors, places, strict=True):
        decision = decided[unit]
        if decision.variant is None:
            decisions[id(tensor)] = replace(decision, tensor=tensor, path=path, shard=shard)
        else:
            decisions.setdefault(id(unit), decision)
    return list(decisions.values())


def split_decisions(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> list[list[Decision]]:
    """Return what was decided on each file of a checkpoint: tables that go there, and tensors that are copied."""
    of_shards: list[list[Decision]] = [[] for _ in checkpoint.shards]
    for decision in decisions:
        if not decision.is_left_out:
            of_shards[decision.shard].append(decision)
    return of_shards


def list_left_out(checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[str, ...]:
    """Say what of a checkpoint the output will not have, in words."""
    groups: dict[str, list[str]] = {}
    for each in decisions:
        if each.is_left_out:
            why = f"{each.tensor.stored_as}, for which safetensors has no type; {each.reason}"
            groups.setdefault(why, []).append(each.tensor.name)
    return (*(f"tensor {name_first(names)} ({why})" for why, names in groups.items()), *checkpoint.left_out)


def _explain_none(rules: Rules, decisions: Sequence[Decision], left_out: Sequence[str]) -> str:
    """Say why no tensor of a checkpoint is packed, and what to do: first of those that would be if they were named."""
    can: list[Decision] = []
    convert: list[Decision] = []
    others: list[Decision] = []
    for each in decisions:
        (can if rules.can_include(each.tensor) else convert if _is_other_float(each) else others).append(each)
    # Of many tensors the likely ones come first: tables are longer than they are wide.
    can.sort(key=lambda each: each.tensor.shape[1] / each.tensor.shape[0])
    said = [f"name those that are tables with --include: {_list_reasons(can)}"] if can else []
    said += [f"convert to float32 what is a table: {_list_reasons(convert)}"] if convert else []
    if not said:
        said = [f"its tensors are {_list_reasons(others)}" if others else "it has no tensor that can be read"]
    return "; ".join([*said, *_say_left_out(left_out)])


def _say_left_out(left_out: Sequence[str]) -> list[str]:
    """Name what the file has beside tensors that can be read, if it has anything: that may be what is looked for."""
    return [f"left out: {list_names(left_out)}"] if left_out else []


def _is_other_float(decision: Decision) -> bool:
    """Whether a tensor would be a table if it were of another type."""
    dtype = decision.tensor.dtype
    return dtype.startswith("F") and dtype not in PACKABLE_DTYPES and len(decision.tensor.shape) == 2


def _check_globs(path: str, rules: Rules, units: Sequence[Unit], left_out: Sequence[str]) -> None:
    """Raise ValueError if a glob matches no tensor: somebody has mistyped it, or means what cannot be read."""
    for option in ("include", "exclude"):
        for pattern in getattr(rules, option):
            if any(fnmatchcase(unit.tensor.name, pattern) for unit in units):
                continue
            whole = _find_whole(pattern, units)
            if whole is None:
                raise ValueError(f"{path}: {option} {pattern!r} matches no tensor; {_advise(pattern, units, left_out)}")
            # The scales of a layer may be excluded, for they are copied anyway.
            if option == "include" or rules.why_no_table(whole) is None:
                raise ValueError(f"{path}: {option} {pattern!r} only matches parts of {whole.name!r}; name that")


def _find_whole(pattern: str, units: Iterable[Unit]) -> SourceTensor | None:
    """Find a tensor that has parts which a glob matches."""
    parts = ((unit.tensor, part) for unit in units for part in unit.tensor.parts)
    return next((whole for whole, part in parts if fnmatchcase(part.name, pattern)), None)


def name_variants(path: str, rules: Rules, units: Sequence[Unit], left_out: Sequence[str] = ()) -> dict[str, Variant]:
    """Make variants by name of rules.variants, which are by name or glob.

    Args:
        path: of the checkpoint, for messages.
        rules: what chooses tables.
        units: what is meant, each once.
        left_out: of the checkpoint, for messages.

    Raises:
        ValueError: a name or glob matches no tensor, or none that can be packed.
    """
    tensors = {unit.tensor.name: unit.tensor for unit in units}
    variants: dict[str, Variant] = {}
    for pattern, variant in rules.variants.items():
        matched = [pattern] if pattern in tensors else [name for name in tensors if fnmatchcase(name, pattern)]
        where = f"{path}: variants (--set) name {pattern!r}"
        whole = None if matched else _find_whole(pattern, units)
        if whole is not None:
            raise ValueError(f"{where}, which is but a part of {whole.name!r}; name that")
        if not matched:
            raise ValueError(f"{where}, but there is no such tensor; {_advise(pattern, units, left_out)}")
        reasons = {name: rules.why_no_table(tensors[name]) for name in matched}
        # A plan may be used without some of its tables.
        if not {None, "excluded"} & set(reasons.values()):
            others = list_names([f"{name} ({reason})" for name, reason in reasons.items()])
            raise ValueError(f"{where}, which is no table: {others}; include or drop it")
        variants |= dict.fromkeys(matched, variant)
    return variants


def _advise(wrong: str, units: Sequence[Unit], left_out: Sequence[str]) -> str:
    """Say what is most like a name or glob that matches nothing, and what is there but cannot be read."""
    names = [unit.tensor.name for unit in units]
    wide = f"*{wrong.strip('*')}*"
    matched = sum(fnmatchcase(name, wide) for name in names)
    said = f"a glob matches whole names: {wide!r} matches {matched:,}" if matched else suggest(wrong, names)
    return "; ".join([said, *_say_left_out(left_out)])


def suggest(wrong: str, names: Sequence[str]) -> str:
    """Say which names are most like one that is not there."""
    if not names:
        return "there are none"
    like = sorted(names, key=lambda name: SequenceMatcher(None, wrong, name).ratio(), reverse=True)
    return f"nearest: {', '.join(map(printable, like[:3]))}"


def _list_reasons(decisions: Sequence[Decision]) -> str:
    return list_names([f"{each.tensor.name} ({each.reason})" for each in decisions])


def list_names(names: Sequence[str], most: int = 8) -> str:
    """List names for a message, if there are many the first of them."""
    shown = ", ".join(map(printable, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown

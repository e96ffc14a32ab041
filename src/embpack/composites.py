"""Tables that a checkpoint has in several tensors: pieces of their rows, and codes of a byte with their scales.

`X.shard_0.weight`, `X.shard_1.weight`, ... are pieces of one table, `X.weight`. A table of FP8 or INT8 has its scales
in a tensor of its own, such as `X.weight_scale`, or in one for each piece; a value is code times scale.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from embpack.formats import SourceTensor
from embpack.formats.dtypes import PACKED_DTYPES
from embpack.formats.pieces import Piece, join_pieces
from embpack.formats.scaled import CODE_VALUES, fit_scales, multiply

_PIECE = re.compile(r"(.+)\.shard_([0-9]{1,9})\.weight", re.DOTALL)
_SCALE_NAMES = ("weight_scale", "scale", "weight_scale_inv")
# What other encodings have beside codes: with these, a value is more than code times scale.
_MORE = re.compile(r"weight_.*|.*zero.*|scales|biases|offsets?", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Unit:
    """What is decided on as one: a tensor of a checkpoint, or a table with all that belongs to it.

    Attributes:
        tensor: if it is a table of several tensors, those are its parts.
        fault: why it cannot be read as a table, for whoever wants it; None if it can.
    """

    tensor: SourceTensor
    fault: str | None = None


class _UnreadableError(Exception):
    """What keeps a table from being read."""


def list_units(tensors: Sequence[SourceTensor]) -> list[Unit]:
    """Find for each tensor of a checkpoint, in order, what it belongs to: all parts of a table have the same unit."""
    units: dict[int, Unit] = {}
    for unit in _Finder(tensors).find():
        units |= dict.fromkeys(map(id, unit.tensor.parts), unit)
    return [units.get(id(tensor)) or Unit(tensor) for tensor in tensors]


class _Finder:
    """Looks up by their names what belongs to a table."""

    def __init__(self, tensors: Sequence[SourceTensor]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        # By what names have before their last dot.
        self._beside: dict[str, list[SourceTensor]] = {}
        self._pieces: dict[str, list[tuple[int, SourceTensor]]] = {}
        for tensor in tensors:
            self._beside.setdefault(_stem(tensor.name), []).append(tensor)
            found = _PIECE.fullmatch(tensor.name)
            if found and len(tensor.shape) == 2 and tensor.dtype not in PACKED_DTYPES:
                self._pieces.setdefault(found[1], []).append((int(found[2]), tensor))

    def find(self) -> Iterator[Unit]:
        """Find the tables of codes, and those in pieces; those in pieces come last, for their scales are theirs."""
        in_pieces = {tensor.name for numbered in self._pieces.values() for _, tensor in numbered}
        for name, tensor in self._tensors.items():
            if tensor.dtype in CODE_VALUES and len(tensor.shape) == 2 and name not in in_pieces:
                yield self._make(name, name.removesuffix(".weight"), [(0, tensor)])
        for stem, numbered in self._pieces.items():
            yield self._make(f"{stem}.weight", stem, sorted(numbered, key=lambda each: each[0]))

    def _make(self, name: str, stem: str, numbered: Sequence[tuple[int, SourceTensor]]) -> Unit:
        """Make a table of its pieces, in the order of their numbers; of one that is whole, it is the only piece."""
        pieces = [piece for _, piece in numbered]
        dtype = pieces[0].dtype
        scales = self._list_scales(stem, pieces) if dtype in CODE_VALUES else []
        parts = (*pieces, *chain.from_iterable(scales))
        shape = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
        try:
            table = pieces[0]
            if table.name != name:
                self._check_pieces(name, stem, numbered)
                table = join_pieces(stem, name, shape, dtype, _place(pieces))
            if dtype in CODE_VALUES:
                table = self._multiply(table, stem, pieces, scales)
        except _UnreadableError as fault:
            read_as = "F32" if dtype in CODE_VALUES else dtype
            nothing = SourceTensor(name, shape, read_as, lambda start, stop, n: iter(()), None, parts=parts)
            return Unit(replace(nothing, num_pieces=len(pieces)), str(fault))
        return Unit(replace(table, parts=parts))

    def _check_pieces(self, name: str, stem: str, numbered: Sequence[tuple[int, SourceTensor]]) -> None:
        """Refuse pieces that do not make a table."""
        first, last = numbered[0][1], numbered[-1][1]
        if name in self._tensors:
            raise _UnreadableError(f"there is a tensor of that name, and {first.name!r}, which would be a piece of it")
        for expected, (number, piece) in enumerate(numbered):
            if number > expected:
                missing = f"{stem}.shard_{expected}.weight"
                raise _UnreadableError(
                    f"its piece {missing!r} is missing; {len(numbered)} are there, the last is {last.name!r}"
                )
            if number < expected:
                raise _UnreadableError(f"its piece {number} is there twice, once as {piece.name!r}")
            if (piece.dtype, piece.shape[1]) != (first.dtype, first.shape[1]):
                raise _UnreadableError(f"its pieces differ: {_describe(first)}, but {_describe(piece)}")
            rows, usual = piece.shape[0], first.shape[0]
            if rows > usual or (rows < usual and piece is not last):
                raise _UnreadableError(
                    f"only its last piece may have fewer rows: {_describe(first)}, but {_describe(piece)}"
                )

    def _list_scales(self, stem: str, pieces: Sequence[SourceTensor]) -> list[list[SourceTensor]]:
        """List the scales that there are, under each name: one tensor for the table, or one for each piece."""
        found = [[self._tensors[f"{stem}.{own}"]] for own in _SCALE_NAMES if f"{stem}.{own}" in self._tensors]
        if _stem(pieces[0].name) != stem:
            for own in _SCALE_NAMES:
                names = [f"{_stem(piece.name)}.{own}" for piece in pieces]
                found.append([self._tensors[name] for name in names if name in self._tensors])
        return [scales for scales in found if scales]

    def _multiply(
        self,
        codes: SourceTensor,
        stem: str,
        pieces: Sequence[SourceTensor],
        candidates: Sequence[Sequence[SourceTensor]],
    ) -> SourceTensor:
        """Make a table of values of its codes, and of what are its scales if that can be told."""
        stems = dict.fromkeys([stem, *(_stem(piece.name) for piece in pieces)])
        known = {piece.name for piece in pieces}
        beside = [each for own in stems for each in self._beside.get(own, ()) if each.name not in known]
        if len(candidates) != 1:
            found = [scale[0] for scale in candidates] or beside
            described = ", ".join(map(_describe, found[:4])) or "nothing"
            what = "more than one scale" if candidates else "no scale"
            wanted = f"one of {', '.join(f'{stem}.{own}' for own in _SCALE_NAMES)}"
            raise _UnreadableError(f"it is {codes.dtype} with {what}: there must be {wanted}, and there is {described}")
        [scales] = candidates
        known = {scale.name for scale in scales}
        more = [each for each in beside if each.name not in known and _MORE.fullmatch(each.name.rpartition(".")[2])]
        if more:
            raise _UnreadableError(
                f"its values are more than code x scale, for there is {_describe(more[0])}; that is not read"
            )
        is_whole = _stem(scales[0].name) == stem
        if not is_whole and len(scales) < len(pieces):
            there = {_stem(scale.name) for scale in scales}
            without = next(piece for piece in pieces if _stem(piece.name) not in there)
            raise _UnreadableError(
                f"its piece {without.name!r} is {codes.dtype} without a scale, others have {_describe(scales[0])}"
            )
        fitted = [_fit(scale, part) for scale, part in zip(scales, [codes] if is_whole else pieces, strict=True)]
        blocks = fitted[0].shape[1]
        differing = next((scale for scale, own in zip(scales, fitted, strict=True) if own.shape[1] != blocks), None)
        if differing is not None:
            raise _UnreadableError(f"its pieces differ: {_describe(scales[0])}, but {_describe(differing)}")
        rows = fitted[0] if is_whole else join_pieces(stem, stem, (codes.shape[0], blocks), "F32", _place(fitted))
        stored_as = f"{codes.dtype} x {'F8_E8M0' if scales[0].dtype == 'U8' else scales[0].dtype}"
        return replace(multiply(codes, rows), weight_dtype="bfloat16", stored_as=stored_as)


def _fit(scale: SourceTensor, codes: SourceTensor) -> SourceTensor:
    rows, columns = codes.shape
    fitted = fit_scales(scale, (rows, columns))
    if fitted is None:
        raise _UnreadableError(
            f"its scale {_describe(scale)} does not fit {_describe(codes)}: one scale, one for each row, or [rows, "
            "blocks of columns] of F32, F16, BF16 or F8_E8M0 would (U8 is F8_E8M0, and for blocks alone)"
        )
    return fitted


def _place(pieces: Sequence[SourceTensor]) -> list[Piece]:
    """Place pieces one under the other."""
    placed, row = [], 0
    for piece in pieces:
        placed.append(Piece(row, 0, piece))
        row += piece.shape[0]
    return placed


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _describe(tensor: SourceTensor) -> str:
    return f"{tensor.name!r} ({tensor.dtype}, {list(tensor.shape)})"

"""Tables that a checkpoint has in several tensors: pieces of their rows, and codes of a byte with their scales.

`X.shard_0.weight`, `X.shard_1.weight`, ... are pieces of one table, `X.weight`. A table of FP8 or INT8 has its scales
in a tensor of its own, such as `X.weight_scale`, or in one for each piece; a value is code times scale.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter

from embpack.formats import SourceTensor
from embpack.formats.dtypes import PACKED_DTYPES
from embpack.formats.pieces import Piece, join_pieces
from embpack.formats.scaled import CODE_VALUES, fit_scales, multiply
from embpack.text import printable

_PIECE = re.compile(r"(.+)\.shard_([0-9]{1,9})\.weight", re.DOTALL)
_SCALE_NAMES = ("weight_scale", "scale", "weight_scale_inv")
# What other encodings have beside codes: with these, a value is more than code times scale.
_MORE = re.compile(r"weight_.*|.*zero.*|zps?|scales|biases|offsets?|mins?|absmax|SCB", re.DOTALL)


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
    for table in _find_tables(tensors):
        unit = table.make_unit()
        units |= dict.fromkeys(map(id, unit.tensor.parts), unit)
    return [units.get(id(tensor)) or Unit(tensor) for tensor in tensors]


@dataclass(frozen=True)
class _Table:
    """What seems to be a table, by the names and types of tensors.

    Attributes:
        stem: its name without ".weight".
        pieces: by rising numbers; one that is whole is its own only piece.
        numbers: of the pieces; None if it is whole.
        scales: that there are, under each name that they may have: one tensor for the table, or one for each piece.
        beside: the other tensors whose names begin as those of its parts, up to the last dot.
        has_namesake: whether it is in pieces, and there is a tensor of its name, too.
        odd: a tensor that has the name of a piece, but is no 2-D one; None if there is none.
    """

    stem: str
    pieces: Sequence[SourceTensor]
    numbers: Sequence[int] | None
    scales: Sequence[Sequence[SourceTensor]]
    beside: Sequence[SourceTensor]
    has_namesake: bool
    odd: SourceTensor | None

    @property
    def name(self) -> str:
        return self.pieces[0].name if self.numbers is None else f"{self.stem}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        return sum(piece.shape[0] for piece in self.pieces), self.pieces[0].shape[1]

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    def make_unit(self) -> Unit:
        """Make what is decided on; whether it can be read counts only if it is to be packed."""
        has_codes, fault = self.dtype in CODE_VALUES, None
        try:
            tensor = self.pieces[0] if self.numbers is None else self._join(self.numbers)
            tensor = self._multiply(tensor) if has_codes else tensor
        except _UnreadableError as error:
            fault, read_as = str(error), "F32" if has_codes else self.dtype
            tensor = SourceTensor(self.name, self.shape, read_as, lambda start, stop, n: iter(()), None)
        parts = (*self.pieces, *chain.from_iterable(self.scales))
        return Unit(replace(tensor, parts=parts, num_pieces=max(tensor.num_pieces, len(self.pieces))), fault)

    def _join(self, numbers: Sequence[int]) -> SourceTensor:
        """Make one tensor of pieces, each of which must be there once."""
        first, last = self.pieces[0], self.pieces[-1]
        if self.has_namesake:
            raise _UnreadableError(f"there is a tensor of that name, and {first.name!r}, which would be a piece of it")
        if self.odd is not None:
            raise _UnreadableError(f"its pieces differ: {_describe(first)}, but {_describe(self.odd)}")
        for expected, (number, piece) in enumerate(zip(numbers, self.pieces, strict=True)):
            if number > expected:
                missing = f"{self.stem}.shard_{expected}.weight"
                raise _UnreadableError(
                    f"its piece {missing!r} is missing; {len(numbers)} are there, the last is {last.name!r}"
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
        return join_pieces(self.stem, self.name, self.shape, self.dtype, _place(self.pieces))

    def _multiply(self, codes: SourceTensor) -> SourceTensor:
        """Make a table of the values of codes."""
        scales = self._choose_scales()
        is_whole = _stem(scales[0].name) == self.stem
        fitted = [_fit(scale, part) for scale, part in zip(scales, [codes] if is_whole else self.pieces, strict=True)]
        blocks = fitted[0].shape[1]
        other = next((scale for scale, own in zip(scales, fitted, strict=True) if own.shape[1] != blocks), None)
        if other is not None:
            raise _UnreadableError(f"its pieces differ: {_describe(scales[0])}, but {_describe(other)}")
        shape = self.shape[0], blocks
        joined = fitted[0] if is_whole else join_pieces(self.stem, scales[0].name, shape, "F32", _place(fitted))
        stored_as = f"{codes.dtype} x {'F8_E8M0' if scales[0].dtype == 'U8' else scales[0].dtype}"
        return replace(multiply(codes, joined), weight_dtype="bfloat16", stored_as=stored_as)

    def _choose_scales(self) -> Sequence[SourceTensor]:
        """Return the scales of codes, one for the table or one for each piece, if it can be told which they are."""
        if len(self.scales) != 1:
            found = [each[0] for each in self.scales] or self.beside
            described = ", ".join(map(_describe, found[:4])) or "nothing"
            what = "more than one scale" if self.scales else "no scale"
            wanted = ", ".join(f"{printable(self.stem)}.{own}" for own in _SCALE_NAMES)
            raise _UnreadableError(
                f"it is {self.dtype} with {what}: there must be one of {wanted}, and there is {described}"
            )
        [scales] = self.scales
        more = next((each for each in self.beside if _MORE.fullmatch(each.name.rpartition(".")[2])), None)
        if more is not None:
            raise _UnreadableError(
                f"its values are more than code x scale, for there is {_describe(more)}, which is not read"
            )
        stems = {_stem(scale.name) for scale in scales}
        without = next((piece for piece in self.pieces if _stem(piece.name) not in stems), None)
        if stems != {self.stem} and without is not None:
            raise _UnreadableError(
                f"its piece {without.name!r} is {self.dtype} without a scale, and there is {_describe(scales[0])}"
            )
        return scales


def _find_tables(tensors: Sequence[SourceTensor]) -> Iterator[_Table]:
    """Find tables of codes, and then those in pieces: what is part of such a one is no table of its own."""
    by_name, by_stem = {tensor.name: tensor for tensor in tensors}, dict[str, list[SourceTensor]]()
    whole, in_pieces = list[SourceTensor](), dict[str, list[tuple[int, SourceTensor]]]()
    odd = dict[str, SourceTensor]()
    for tensor in tensors:
        by_stem.setdefault(_stem(tensor.name), []).append(tensor)
        found = _PIECE.fullmatch(tensor.name)
        if len(tensor.shape) != 2 or tensor.dtype in PACKED_DTYPES:
            if found:
                odd[found[1]] = tensor
        elif found:
            in_pieces.setdefault(found[1], []).append((int(found[2]), tensor))
        elif tensor.dtype in CODE_VALUES:
            whole.append(tensor)

    def make(stem: str, pieces: Sequence[SourceTensor], numbers: Sequence[int] | None) -> _Table:
        # Under each name there may be one scale for all, and one for each piece.
        stems = [[stem]] if numbers is None else [[stem], [_stem(piece.name) for piece in pieces]]
        named = [[f"{each}.{own}" for each in group] for group in stems for own in _SCALE_NAMES]
        scales = [[by_name[name] for name in names if name in by_name] for names in named]
        scales = [each for each in scales if each] if pieces[0].dtype in CODE_VALUES else []
        known = {part.name for part in (*pieces, *chain.from_iterable(scales))}
        near = chain.from_iterable(by_stem.get(each, ()) for each in dict.fromkeys(chain.from_iterable(stems)))
        beside = [each for each in near if each.name not in known]
        is_whole = numbers is None
        has_namesake = not is_whole and f"{stem}.weight" in by_name
        return _Table(stem, pieces, numbers, scales, beside, has_namesake, None if is_whole else odd.get(stem))

    for tensor in whole:
        yield make(tensor.name.removesuffix(".weight"), [tensor], None)
    for stem, numbered in in_pieces.items():
        numbered.sort(key=itemgetter(0))
        yield make(stem, [piece for _, piece in numbered], [number for number, _ in numbered])


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

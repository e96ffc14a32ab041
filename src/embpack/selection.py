"""What a plan may choose from: ways to pack a table, and those of them that others read."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from embpack.layouts import PARAM_BYTES, ROTATIONS, RowFormat
from embpack.layouts.base import BITS
from embpack.methods import DEFAULT_METHOD, Method, parse_method
from embpack.readers import READER_TITLES, explain_unread
from embpack.variant import Variant

# The methods that a plan chooses from if none are named, with the numbers of bits of each.
_BITS_OF: dict[str, tuple[float, ...]] = {
    DEFAULT_METHOD: (2, 4, 8),
    "kmeans": (2, 4),
    "trellis": (2, 2.5, 3, 3.5, 4, 5, 6, 7),
}


def select_variants(
    methods: str | Method | Sequence[str | Method] | None = None,
    bits: float | Sequence[float] | None = None,
    param_dtype: str | None = None,
    rotate: str | Sequence[str | None] | None = (None, *ROTATIONS),
) -> list[Variant]:
    """List the ways to pack a table that a plan is to choose from.

    Args:
        methods: one or more, as quantize takes them; None is those that a plan tries by default.
        bits: one or more numbers; None is for each method those that a plan tries by default.
        param_dtype: "float16" or "float32"; None is quantize's default for the method and bits.
        rotate: one or more of None and "hadamard".

    Returns:
        Every combination that there is, method by method.

    Raises:
        ValueError: there is no such method, param_dtype or rotation; a method that is named has none of these ways; no
            method has a number of bits; or nothing is named.
    """
    for rotation in as_list(rotate):
        RowFormat(1, param_dtype=param_dtype or "float16", rotation=rotation)  # refuses what there is not
    names = list(_BITS_OF) if methods is None else list(as_list(methods))
    found: list[Variant] = []
    for name in names:
        numbers = _BITS_OF.get(parse_method(name).name, BITS) if bits is None else as_list(bits)
        ways = [Variant(name, number, param_dtype, rotation) for number in numbers for rotation in as_list(rotate)]
        possible = [way for way in ways if way.find_refusal() is None]
        if methods is not None and ways and not possible:
            raise ValueError(ways[0].find_refusal())
        found += possible
    for number in [] if bits is None else as_list(bits):
        if all(way.bits != number for way in found):
            raise ValueError(Variant(names[-1], number, param_dtype).find_refusal())
    if not found:
        raise ValueError("there is nothing to choose from; give at least one method, number of bits and rotation")
    return list(dict.fromkeys(found))


def as_list(values: Any) -> Iterable[Any]:
    """Make an argument that is one or more values a list of them."""
    return values if isinstance(values, Iterable) and not isinstance(values, str) else (values,)


def keep_readable(variants: Iterable[Variant], embedding_dim: int, readers: Sequence[str]) -> list[Variant]:
    """Keep the ways to pack a table whose rows others read as they are.

    Args:
        variants: the ways; one that names no param_dtype may get one that can be read.
        embedding_dim: values a row.
        readers: names in embpack.readers.READERS, all of which are to read the rows; none keeps all.

    Raises:
        ValueError: there is no such reader.
    """
    return [kept for each in variants if (kept := _make_readable(each, embedding_dim, readers)) is not None]


def _make_readable(variant: Variant, embedding_dim: int, readers: Sequence[str]) -> Variant | None:
    if not readers:
        return variant
    dtypes = (None, *PARAM_BYTES) if variant.param_dtype is None else (variant.param_dtype,)
    for way in (replace(variant, param_dtype=dtype) for dtype in dtypes):
        try:
            row_format = way.make_row_format(embedding_dim)
        except (TypeError, ValueError):  # it has no such rows
            continue
        if find_unread(row_format, readers) is None:
            return way
    return None


def find_unread(row_format: RowFormat, readers: Iterable[str]) -> str | None:
    """Say of rows why one of the readers cannot take them, as readers.explain_unread; None if all can."""
    return next(filter(None, (explain_unread(row_format, reader) for reader in readers)), None)


def refuse_unread(variant: Variant, embedding_dim: int, readers: Sequence[str]) -> None:
    """Refuse a way to pack a table if one of the readers cannot take its rows.

    Args:
        variant: the way.
        embedding_dim: values a row.
        readers: names in embpack.readers.READERS.

    Raises:
        ValueError: one cannot; it says of a table, which it does not name, why, and what would do.
    """
    if readers:
        reason = find_unread(variant.make_row_format(embedding_dim), readers)
        if reason is not None:
            raise ValueError(f"{reason}; {_propose(variant, embedding_dim, readers)}")


def _propose(variant: Variant, embedding_dim: int, readers: Sequence[str]) -> str:
    """Say which way to pack a table, as near to the one that was chosen as there is, all of the readers take."""
    near = [(variant.method, variant.bits), (DEFAULT_METHOD, variant.bits)]
    near += [(method, bits) for method in (variant.method, DEFAULT_METHOD) for bits in (4, 8, 2)]
    ways = keep_readable([Variant(*way) for way in near], embedding_dim, readers)
    titles = " and ".join(READER_TITLES[reader] for reader in readers)
    return f"{titles} can read {ways[0]}" if ways else f"there are no rows that {titles} can read"


def list_ways(
    embedding_dim: int, variants: Sequence[Variant], chosen: Variant | None, readers: Sequence[str]
) -> Sequence[Variant]:
    """List the ways to pack a table that a plan chooses from.

    Args:
        embedding_dim: values a row.
        variants: the ways, at least one.
        chosen: the only way, if it is chosen already.
        readers: names in embpack.readers.READERS, all of which are to read the rows.

    Raises:
        ValueError: there is no way that all of them read.
    """
    if chosen is not None:
        refuse_unread(chosen, embedding_dim, readers)
        return [chosen]
    ways = keep_readable(variants, embedding_dim, readers)
    if not ways:
        refuse_unread(variants[0], embedding_dim, readers)
    return ways

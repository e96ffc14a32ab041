"""Sizes as users write them."""

import re
from fractions import Fraction

# Of what follows a number, upper or lower case: decimal units, and binary ones.
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power}
    _UNITS |= {f"{_letter}I": 1024**_power, f"{_letter}IB": 1024**_power}
# The exponent has two digits at most: more would take all memory there is.
_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?(?:E\+?[0-9]{1,2})?)\s*(%|[A-Z]{0,3})\s*", re.ASCII)


def parse_size(text: float | str, whole: int | None = None) -> int:
    """Read a number of bytes.

    Args:
        text: a number, "1e5", with a unit, "1k", "1.5 MB", "100KiB", or with "%", a share of the whole, "12.5 %";
            upper or lower case.
        whole: bytes that a share is of; None if there are none, and a share is refused.

    Returns:
        The bytes, rounded down.

    Raises:
        ValueError: it is something else; or a fraction of a byte, which looks like a share without "%".
    """
    match = _SIZE.fullmatch(str(text).upper())
    example = "give bytes, 1e5, or a size such as '100 KiB' or '2 GB'"
    share = "" if whole is None else ", or a share of what is read, '12.5 %'"
    if not match or not (match[2] in _UNITS or (match[2] == "%" and whole is not None)):
        raise ValueError(f"{text!r} is no size; {example}{share}")
    number = Fraction(match[1])
    if match[2] == "%" and whole is not None:
        return int(whole * number / 100)
    size = number * _UNITS[match[2]]
    if match[2] == "" and size.denominator != 1:
        meant = f"{float(size if size >= 1 else 100 * size):g} %"
        hint = f"for a share of what is read write '{meant}'" if whole is not None else "write a whole number"
        raise ValueError(f"{text!r} is no whole number of bytes; {hint}, or give a unit, '{text} MB'")
    return int(size)


def write_size(count: int) -> str:
    """Bytes for a person to read, in decimal units: "950 B", "4.0 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"

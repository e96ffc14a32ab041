"""What the options of embpack compare may be."""

import typer

from embpack.cli.options import checking, split_bits, split_methods, split_rotations
from embpack.comparison.choice import PREFERENCES
from embpack.comparison.variants import make_variants
from embpack.variant import Variant


def _refuse_param_dtypes(text: str) -> None:
    try:
        make_variants(param_dtype=text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}; choose float16, float32 or float16,float32") from None


def _refuse_rotations(text: str) -> None:
    try:
        make_variants(rotate=split_rotations(text))
    except ValueError:
        raise ValueError(f"{text!r}; choose none, hadamard or none,hadamard") from None


check_param_dtype = checking(_refuse_param_dtypes)
check_rotate = checking(_refuse_rotations)


def parse_rows(text: str) -> int | None:
    """Read the number of rows; None is all."""
    if text in ("all", "0"):
        return None
    return int(text)


def check_rows(text: str | None) -> str | None:
    """Refuse what is no number of rows."""
    if text is not None and text != "all" and not (text.isascii() and text.isdigit()):
        raise typer.BadParameter(f"{text!r}; give a number of rows, or all")
    return text


def check_preference(text: str) -> str:
    """Refuse what nobody can prefer."""
    if text not in PREFERENCES:
        raise typer.BadParameter(f"{text!r}; choose {' or '.join(PREFERENCES)}")
    return text


def list_variants(methods: str | None, bits: str | None, param_dtype: str | None, rotate: str | None) -> list[Variant]:
    """List what is to be compared.

    Raises:
        BadParameter: no method has such bits.
    """
    try:
        return make_variants(
            split_methods(methods) if methods else None,
            split_bits(bits) if bits else None,
            param_dtype.split(",") if param_dtype else None,
            split_rotations(rotate) if rotate else None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bits") from None

"""What the options of embpack compare may be."""

import typer

from embpack.cli.options import split_methods, split_rotations
from embpack.comparison.choice import PREFERENCES
from embpack.comparison.variants import make_variants


def check_methods(text: str | None) -> str | None:
    """Refuse what are no methods."""
    if text is not None:
        try:
            make_variants(split_methods(text))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return text


def check_param_dtype(text: str | None) -> str | None:
    """Refuse what are no types of parameters."""
    if text is not None:
        try:
            make_variants(param_dtype=text.split(","))
        except ValueError:
            raise typer.BadParameter(f"{text!r}; choose float16, float32 or float16,float32") from None
    return text


def check_rotate(text: str | None) -> str | None:
    """Refuse what are no rotations."""
    if text is not None:
        try:
            make_variants(rotate=split_rotations(text))
        except ValueError:
            raise typer.BadParameter(f"{text!r}; choose none, hadamard or none,hadamard") from None
    return text


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

"""What options of several commands say: read from text, checked, put together."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from embpack.comparison.choice import PREFERENCES
from embpack.formats.paths import as_path
from embpack.layouts import PARAM_BYTES, ROTATIONS
from embpack.methods import DEFAULT_METHOD, METHODS, parse_method
from embpack.readers import READER_TITLES, check_reader
from embpack.rows import ROW_DTYPES
from embpack.selection import select_variants
from embpack.variant import Variant, parse_bits, parse_variant

# Groups of options in a help.
WHAT, HOW, LIMITS, OUTPUT = "What", "How", "Limits", "Output"

# Options of several commands.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.", rich_help_panel=OUTPUT)]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Threads to use; otherwise OMP_NUM_THREADS, or all CPUs.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


def of_names(help: str) -> Any:
    """Make an option of globs that choose tensors by their names."""
    return typer.Option(metavar="GLOB", show_default=False, help=help, rich_help_panel=WHAT)


def path(text: str) -> Path:  # some typer show this name
    """Read a path, of this machine or a URI, of which Path would make "s3:/..."."""
    try:
        return as_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def of_place(name: str, help: str) -> Any:
    """Make an argument that is a path, of this machine or a URI.

    Args:
        name: of the argument, as a help has it.
        help: what to say of it.
    """
    return typer.Argument(metavar=name, show_default=False, help=help, parser=path)


Completions = list[tuple[str, str]]


def split_methods(text: str) -> list[str]:
    """Split "greedy:b=1000,r=0.5,asym": a comma also lies between the parameters of one method."""
    methods: list[str] = []
    for part in text.split(","):
        if methods and ":" in methods[-1] and "=" in part and ":" not in part:
            methods[-1] += f",{part}"
        else:
            methods.append(part)
    return methods


def split_bits(text: str) -> list[float]:
    """Split "2,3.5".

    Raises:
        ValueError: a part is no number.
    """
    return [parse_bits(part) for part in text.split(",")]


def split_rotations(text: str) -> list[str | None]:
    """Split "none,hadamard"."""
    return [None if part == "none" else part for part in text.split(",")]


def checking(check: Callable[[str], object]) -> Callable[[str | None], str | None]:
    """Make a callback of an option that refuses the text that check refuses."""

    def checked(text: str | None) -> str | None:
        if text is not None:
            try:
                check(text)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        return text

    return checked


def _refuse_rotation(text: str) -> None:
    if any(rotation not in (None, *ROTATIONS) for rotation in split_rotations(text)):
        raise ValueError(f"{text!r}; choose none, {', '.join(ROTATIONS)}")


def _refuse_param_dtype(text: str) -> None:
    if text not in PARAM_BYTES:
        raise ValueError(f"{text!r}; choose float16 or float32")


check_methods = checking(lambda text: list(map(parse_method, split_methods(text))))
check_bits = checking(split_bits)
check_rotations = checking(_refuse_rotation)
check_param_dtype = checking(_refuse_param_dtype)


def check_readers(readers: list[str] | None) -> list[str] | None:
    """Refuse readers that there are not."""
    list(map(checking(check_reader), readers or ()))
    return readers


def _completing(choices: Mapping[str, str]) -> Callable[[str], Completions]:
    """Make what a shell asks how a word may go on: the last one where there are several, with commas between.

    Args:
        choices: what there is, and what to say of it; "" for nothing.
    """

    def complete(incomplete: str) -> Completions:
        before, comma, last = incomplete.rpartition(",")
        return [(f"{before}{comma}{name}", said) for name, said in choices.items() if name.startswith(last)]

    return complete


complete_methods = _completing({name: method.summary for name, method in METHODS.items()})
complete_bits = _completing(dict.fromkeys(("2", "4", "8"), ""))
complete_param_dtype = _completing(dict.fromkeys(PARAM_BYTES, ""))
complete_dtype = _completing(dict.fromkeys(ROW_DTYPES, ""))
complete_rotations = _completing(dict.fromkeys(("none", *ROTATIONS), ""))
complete_readers = _completing(READER_TITLES)
complete_preference = _completing(dict.fromkeys(PREFERENCES, ""))


def read_setting(text: str) -> tuple[str, Variant]:
    """Read "user_*=trellis:bits=3.5": a glob, and how the tables are packed that it matches."""
    # Names of tensors may have equals signs, too.
    signs = [found.start() for found in re.finditer("=", text)]
    at = next((sign for sign in signs if text[sign + 1 :].partition(":")[0] in METHODS), signs[0] if signs else 0)
    if not at:
        raise typer.BadParameter(f"{text!r}; give a glob of names and a method, 'user_*=trellis:bits=3.5'")
    try:
        return text[:at], parse_variant(text[at + 1 :])
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from None


@dataclass(frozen=True)
class Ways:
    """What --method, --bits, --param-dtype and --rotate say; None is what is not given.

    With --auto they restrict what is measured, and may have several values, with commas between.
    """

    method: str | None
    bits: str | None
    param_dtype: str | None
    rotate: str | None

    def only(self) -> Variant:
        """How tables are packed without --auto; what does not go together, whatever the tables, is refused."""
        method = self._one("--method", split_methods(self.method) if self.method else [DEFAULT_METHOD])
        bits = self._one("--bits", split_bits(self.bits) if self.bits else [4])
        rotate = self._one("--rotate", split_rotations(self.rotate) if self.rotate else [None])
        variant = Variant(method, bits, self.param_dtype, rotate)
        for option, part in (("--bits", Variant(method, bits)), ("--param-dtype", variant)):
            refusal = part.find_refusal()
            if refusal is not None:
                raise typer.BadParameter(refusal, param_hint=option)
        return variant

    @staticmethod
    def _one(option: str, values: list[Any]) -> Any:
        if len(values) > 1:
            raise typer.BadParameter("give one, or add --auto, which chooses among several", param_hint=option)
        return values[0]

    def all(self) -> list[Variant]:
        """What --auto chooses from."""
        restrictions: dict[str, Any] = {"param_dtype": self.param_dtype}
        if self.method is not None:
            restrictions["methods"] = split_methods(self.method)
        if self.bits is not None:
            restrictions["bits"] = split_bits(self.bits)
        if self.rotate is not None:
            restrictions["rotate"] = split_rotations(self.rotate)
        try:
            return select_variants(**restrictions)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--auto") from None

"""What all commands have in common: help in which flags look like flags."""

from itertools import pairwise
from typing import Any

from typer.core import TyperCommand, TyperGroup


def _hide_types_of_flags(params: list[Any]) -> list[Any]:
    """Leave the type of what takes no value out of the help: --json, not --json <bool>."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


# Options whose value may be left out, which Typer has none of.
_WITHOUT_VALUE = ("--ray",)


class Command(TyperCommand):
    """A command; its help lists --help last, in the last group of options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read arguments; an option whose value is left out, at the end or before another option, has "" as one."""
        filled = [
            f"{arg}=" if arg in _WITHOUT_VALUE and following.startswith("-") else arg
            for arg, following in pairwise([*args, "--"])
        ]
        return super().parse_args(ctx, filled)

    def get_params(self, ctx: Any) -> list[Any]:
        """List arguments and options."""
        *params, asking = _hide_types_of_flags(super().get_params(ctx))
        asking.rich_help_panel = getattr(params[-1], "rich_help_panel", None) if params else None
        return [*params, asking]


class Group(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """List options."""
        return _hide_types_of_flags(super().get_params(ctx))

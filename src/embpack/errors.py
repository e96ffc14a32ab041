"""The exceptions that are embpack's own, and what messages say of values; arguments raise Python's built-in ones."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from embpack.text import printable


class FormatError(ValueError):
    """A file is not what it should be: damaged, truncated, of another kind or of a future version.

    The message is one line, whatever names and contents of the file are in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class LossLimitError(ValueError):
    """Tables lose more than they may, so nothing was written.

    Attributes:
        limit: the largest normalized l2 loss that a table may have.
        losses: of the tables that have a larger one, by name, worst first.
    """

    def __init__(self, message: str, limit: float, losses: Mapping[str, float]) -> None:
        super().__init__(message, limit, losses)  # all of them, so that it goes from process to process
        self.limit, self.losses = limit, dict(losses)

    def __str__(self) -> str:
        return str(self.args[0])


class EngineError(OSError):
    """What is to run functions elsewhere cannot: no cluster, workers of another version, a task that nobody ends."""


def kind_of(value: object) -> str:
    """Name the type of a value, with an article, for a message."""
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the name of what something is done with in front of an error's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{printable(what)}: {error}") from error


class MissingExtraError(ImportError):
    """An optional package is needed; the message has the command that installs it: an extra's packages, or just it."""

    def __init__(self, what: str, package: str, extra: str | None) -> None:
        requirements = [package] if extra is None else _list_requirements(extra)
        super().__init__(f"{what} needs {package}: pip install {' '.join(map(repr, requirements))}")
        self._made_of = what, package, extra

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made of, for it goes from process to process."""
        return type(self), self._made_of, self.__dict__


def _list_requirements(extra: str) -> list[str]:
    """What pip is to install for an extra: its packages, for no index need have embpack itself."""
    from importlib import metadata  # takes longer to import than most of embpack, and is for those who lack one

    try:
        requirements = metadata.requires("embpack") or []
    except metadata.PackageNotFoundError:  # it runs from a checkout, where pip finds the extra
        return [f".[{extra}]"]
    listed: list[str] = []
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", marker):
            own = re.fullmatch(r"embpack\[(.*)\]", package.strip())
            listed += (
                [each for name in own[1].split(",") for each in _list_requirements(name)] if own else [package.strip()]
            )
    return list(dict.fromkeys(listed))

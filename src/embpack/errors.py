"""The exceptions that are embpack's own, and what messages say of values; arguments raise Python's built-in ones."""

from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file is not what it should be: damaged, truncated, of another kind or of a future version."""


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
        raise type(error)(f"{what}: {error}") from error


class MissingExtraError(ImportError):
    """An optional package is needed; the message has the command that installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'embpack[{extra}]'")

"""The exceptions that are embpack's own; arguments raise Python's built-in ones."""

from embpack.text import printable


class FormatError(ValueError):
    """A file is not what it should be: damaged, truncated, of another kind or of a future version.

    The message is one line, whatever names and contents of the file are in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingExtraError(ImportError):
    """An optional package is needed; the message has the command that installs it."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'embpack[{extra}]'")

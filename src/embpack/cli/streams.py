"""Standard streams that are closed, that lack characters, or that are on a full disk."""

import io
import os
import sys
from pathlib import Path
from typing import Any


class _NamedStream(io.FileIO):
    """A standard stream whose first error names it, for a full disk may be that of a log; the rest goes nowhere."""

    def __init__(self, descriptor: int, called: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._called = called

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # What is buffered still would fail again when Python ends.
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            raise OSError(error.errno, error.strerror, self._called) from None


def mend_streams() -> None:
    """See to it that printing fails neither where a stream is closed (``>&-``) nor where it lacks a character.

    Where it does fail, on a full disk, the error names the stream.
    """
    for name, called in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))
        elif stream is getattr(sys, f"__{name}__"):
            buffer = io.BufferedWriter(_NamedStream(stream.fileno(), called))
            named = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
            setattr(sys, name, named)
        elif isinstance(stream, io.TextIOWrapper):  # a program has put its own there
            stream.reconfigure(errors="backslashreplace")

"""Text of others, such as names in a file: shown, never obeyed."""

import shlex

# Spaces that names may have. What else str.isprintable refuses is nothing to look at: controls (C0, DEL, C1), what
# formats text (such as the direction of writing), the ends of lines, lone surrogates.
_KEPT = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}"


def printable(text: object) -> str:
    """Write text as one line that a terminal, a log or a page shows, and that does nothing to it.

    Characters that cannot be seen become their escapes in Python: a terminal would take orders from some of them, and
    others end a line or turn what follows around, so that a name could pass for a message of ours.
    """
    content = str(text)
    if content.isprintable():
        return content
    return "".join(c if c.isprintable() or c in _KEPT else repr(c)[1:-1] for c in content)


def quote(word: str) -> str:
    """Write a word for a shell, such as Bash, so that it is printable too."""
    if printable(word) == word:
        return shlex.quote(word)
    return f"$'{''.join(map(_quote_character, word))}'"


def _quote_character(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if printable(character) == character:
        return character
    # A byte of a file name that is not UTF-8 comes as a surrogate; others are in no file name.
    handler = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", handler))

"""Names of others: shown, never obeyed."""

import subprocess

import pytest

from embpack import FormatError
from embpack.text import printable, quote

SHOWN = {
    "\x1b[31mred": r"\x1b[31mred",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "a\nerror: forged": r"a\nerror: forged",
    "a\r\tb\x00": r"a\r\tb\x00",
    "\x7f\x80\x9b2J": r"\x7f\x80\x9b2J",
    "\u202egpj.exe\u2066\u2069": r"\u202egpj.exe\u2066\u2069",
    "a\u2028b\u2029c\u0085d": r"a\u2028b\u2029c\x85d",
    "\udce9t\ud800": r"\udce9t\ud800",
    "\ufeffa\u200bb": r"\ufeffa\u200bb",
    "été 日本\u3000語 🙂 a\u00a0b [red] \\": "été 日本\u3000語 🙂 a\u00a0b [red] \\",
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.items(), ids=ascii)
def test_what_cannot_be_seen_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    assert printable(text).encode()  # no lone surrogate is left


@pytest.mark.parametrize(
    "word", [*(word.encode("utf-8", "ignore").decode() for word in SHOWN), "a b", "it's \x1b'", ""]
)
def test_a_quoted_word_is_printable_and_what_the_shell_reads(word):
    word = word.replace("\x00", "")
    assert printable(quote(word)) == quote(word)
    done = subprocess.run(["bash", "-c", f"printf %s {quote(word)}"], capture_output=True)
    assert done.stdout == word.encode()


def test_a_file_name_that_is_not_utf_8_is_quoted_by_its_bytes():
    assert quote("\udce9t") == r"$'\xe9t'"
    assert quote("\ud800") == r"$'\xed\xa0\x80'"


def test_the_message_of_a_format_error_is_one_printable_line():
    assert str(FormatError("a\x1b[31m.safetensors: table 'b\n' is damaged")) == (
        r"a\x1b[31m.safetensors: table 'b\n' is damaged"
    )

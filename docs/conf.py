"""The manual: python -m sphinx -W --keep-going docs build/manual."""

import re
import subprocess
import sys
from typing import Any

from sphinx.application import Sphinx

import embpack

project = author = copyright = "embpack"
version = release = embpack.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
smartquotes = False  # it would make dashes of --options

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"embpack {release}"
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = "$ "


def write_command_line(app: Sphinx, page: str, source: list[str]) -> None:
    """Put what the commands say of themselves on their page."""
    if page == "command_line":
        command = [sys.executable, "-m", "typer", "embpack.cli", "utils", "docs", "--name", "embpack"]
        written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        written = written.replace("# `embpack`\n", "", 1)
        written = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", written)  # cut in the middle; the sections say more
        written = re.sub(r"<span [^>]*>(embpack .*?)</span>", r"`\1`", written)
        # Typer reads its markup in helps, but not in epilogs.
        source[0] += re.sub(r"\[bold\](.*?)\[/(?:bold)?\]", r"`\1`", written)


def escape_names(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep names that end in an underscore, such as quantize_, from being taken for links."""
    lines[:] = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Tell Sphinx what is not in the pages' files."""
    app.connect("source-read", write_command_line)
    app.connect("autodoc-process-docstring", escape_names)

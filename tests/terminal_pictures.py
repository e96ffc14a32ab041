"""Pictures of what commands print, for people to look at: python -m tests.terminal_pictures FOLDER [--columns 80].

Each is an SVG of a real terminal of that width, which was given the command.
"""

import argparse
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.text import Text
from safetensors.numpy import save_file

FOLDER = "sparse_arch.embedding_bag_collection.embedding_bags."
COMMANDS = {
    "help": "--help",
    "help-quantize": "quantize --help",
    "help-compare": "compare --help",
    "help-inspect": "inspect --help",
    "quantize": "quantize model.safetensors packed.safetensors",
    "quantize-auto": "quantize model.safetensors --auto --dry-run --exclude *_??.weight --exclude *_[3-9].weight",
    "inspect": "inspect packed.safetensors",
    "dequantize": "dequantize packed.safetensors plain.safetensors",
    "compare": "compare model.safetensors --exclude *_[0-9]?.weight --rows 1000 --methods asym,optimal,trellis,kmeans",
    "methods": "methods",
    "methods-greedy": "methods greedy",
    "wrong-method": "quantize model.safetensors packed.safetensors --method trelis",
    "wrong-glob": "quantize model.safetensors packed.safetensors --include t_cat_1*",
}


def run_on_terminal(columns: int, command: list[str], folder: Path) -> list[bytes]:
    """Run a command on a pseudo-terminal, and return what that got, ten times a second."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    chunks = []
    while True:
        try:
            chunks.append(os.read(leader, 1 << 16))
        except OSError:  # the other end is closed
            break
        time.sleep(0.1)
    process.wait()
    return chunks


def draw(lines: list[str], columns: int, path: Path, title: str) -> None:
    """Write a picture of lines that a terminal has got."""
    console = Console(record=True, width=columns, file=Path(os.devnull).open("w"), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), overflow="fold")
    path.write_text(console.export_svg(title=title))


def show_screen(text: str) -> list[str]:
    """What a terminal shows that has got a text: lines that were drawn over or wiped out are gone."""
    lines, row = [""], 0
    for part in re.split(r"(\r\n|\n|\r|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", text):
        if part in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part in ("\r", "\x1b[2K"):
            lines[row] = ""
        elif not part.startswith("\x1b[?25"):
            lines[row] += part
    return lines


def take_bars(chunks: list[bytes]) -> list[str]:
    """The bars in the middle of the work."""
    screens = [show_screen(b"".join(chunks[: i + 1]).decode(errors="ignore")) for i in range(len(chunks))]
    bars = [[line for line in screen if "━" in line] for screen in screens]
    drawn = [lines for lines in bars if len(lines) > 1] or [lines for lines in bars if lines] or [[]]
    return drawn[len(drawn) // 2]


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.terminal_pictures", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--columns", type=int, default=80)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{FOLDER}t_cat_{i}.weight" for i in range(26)]
    weights = {name: rng.standard_normal((500 * (1 + i % 7), 32), np.float32) for i, name in enumerate(names)}
    with TemporaryDirectory() as folder:
        save_file({**weights, "over_arch.weight": np.ones((4, 4), np.float32)}, Path(folder) / "model.safetensors")
        for name, arguments in COMMANDS.items():
            command = [sys.executable, "-m", "embpack", *arguments.split()]
            chunks = run_on_terminal(options.columns, command, Path(folder))
            draw(
                show_screen(b"".join(chunks).decode()),
                options.columns,
                options.folder / f"{name}.svg",
                f"embpack {arguments}",
            )
            if name == "quantize":
                draw(take_bars(chunks), options.columns, options.folder / "bars.svg", f"embpack {arguments}")


if __name__ == "__main__":
    main()

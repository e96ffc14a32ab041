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
    "quantize-auto": "quantize model.safetensors packed.safetensors --auto --dry-run",
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


def draw(text: str, columns: int, path: Path, title: str) -> None:
    """Write a picture of lines that a terminal has got."""
    console = Console(record=True, width=columns, file=Path(os.devnull).open("w"), force_terminal=True)
    for line in text.splitlines():
        console.print(Text.from_ansi(line), soft_wrap=True)
    path.write_text(console.export_svg(title=title))


def take_final(chunks: list[bytes]) -> str:
    """What is left on the terminal: bars have been wiped out."""
    text = b"".join(chunks).decode().replace("\r\n", "\n")
    return re.sub(r"(?m)^.*\x1b\[2K", "", re.sub(r"\x1b\[\?25[lh]|\x1b\[\d*A", "", text).replace("\r", ""))


def take_bars(chunks: list[bytes]) -> str:
    """The bars in the middle of the work."""
    frames = re.split(r"\r(?:\x1b\[2K(?:\x1b\[1A)?)+", b"".join(chunks).decode().replace("\r\n", "\n"))
    bars = [frame for frame in frames if " tables" in frame and "━" in frame]
    return bars[2 * len(bars) // 3] if bars else ""


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
            draw(take_final(chunks), options.columns, options.folder / f"{name}.svg", f"embpack {arguments}")
            if name == "quantize":
                draw(take_bars(chunks), options.columns, options.folder / "bars.svg", f"embpack {arguments}")


if __name__ == "__main__":
    main()

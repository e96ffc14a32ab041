"""Small C++ files of this folder, compiled when they are needed."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory


def load_compiled(source: str, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Compile a file of this folder and load it.

    Args:
        source: its name.
        mode: of dlopen.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise OSError("there is no C++ compiler; install one, or name it in CXX")
    path = Path(__file__).with_name(source)
    with TemporaryDirectory() as folder:
        library = Path(folder, path.stem).with_suffix(".so")
        command = [compiler, "-O2", "-std=c++20", "-pthread", "-shared", "-fPIC", str(path), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{compiler} fails: {done.stderr.strip().partition(chr(10))[0]}")
        return ctypes.CDLL(str(library), mode)

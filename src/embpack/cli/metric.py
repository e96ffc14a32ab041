"""The function that --metric names, and what is said of its mistakes."""

import importlib
import sys
import traceback
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from embpack.comparison.metric import Metric


def load_metric(text: str) -> Metric:
    """Import "module:function", of the current folder or installed.

    Raises:
        typer.BadParameter: there is no such module or function.
        ValueError: importing the module failed; says where.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name or "/" in module_name or module_name.endswith(".py"):
        raise _refuse(f"{text!r}; give module:function, such as my_metrics:auc for my_metrics.py in this folder")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise _refuse(f"there is no module {error.name!r}, neither in {folder} nor installed") from None
        raise ValueError(f"--metric: importing {module_name} failed: {_explain(error)}") from error
    for part in name.split("."):
        if not hasattr(function, part):
            raise _refuse(f"{module_name} ({getattr(function, '__file__', 'built in')}) has no {part!r}")
        function = getattr(function, part)
    if not callable(function):
        raise _refuse(f"{text} is {function!r}; it must be a function of tables by name")
    return _explaining(text, function)


def _refuse(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--metric")


def _explaining(text: str, function: Any) -> Metric:
    """Have errors in a function say where in it they are."""

    @wraps(function)
    def call(tables: Mapping[str, NDArray[np.float32]]) -> float:
        try:
            value: float = function(tables)
        except Exception as error:
            raise ValueError(f"--metric: {text} failed: {_explain(error)}") from error
        return value

    return call


def _explain(error: Exception) -> str:
    """Say what an error is, and where it was raised, in the user's files if it passed through one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
    said = f"{type(error).__name__}: {error}"
    last = (own or frames)[-1]
    return f"{said} ({last.filename}, line {last.lineno}, in {last.name})"

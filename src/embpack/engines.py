"""Engines: what runs functions in other processes, on any number of machines; embpack.ray has the one for Ray."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Workers(Protocol):
    """Processes that run functions, of which some may die: their work is done again by others."""

    @property
    def count(self) -> int:
        """How many tasks run at the same time, now; at least one."""

    def share(self, value: Any) -> Any:
        """Send a value to each machine once; what is returned, as an argument of a task, is that value there."""

    def submit(self, function: Callable[..., Any], *args: Any, memory: int) -> Any:
        """Have a function run in one thread of a worker, and return at once.

        Args:
            function: of a module of embpack; run again, and perhaps twice at the same time, where a worker dies.
            args: which can be pickled, or were returned by share.
            memory: bytes that it takes at most, beside what a worker has anyway.

        Returns:
            What next_done calls the task: hashable.
        """

    def next_done(self) -> tuple[Any, Any]:
        """Wait for any task that was submitted; return it and its result.

        Raises:
            EngineError: it could not be run.
            Exception: what the function has raised, of the same type.
        """

    def run_everywhere(self, function: Callable[..., Any], *args: Any) -> Mapping[str, Any]:
        """Run a function once on each machine; return the results, or what it raised there, by names of machines."""


class Engine(Protocol):
    """Where a checkpoint is packed, if not in this process."""

    def connect(self) -> AbstractContextManager[Workers]:
        """Find the workers. At the end of the block no task is left: after an exception they are cancelled.

        Raises:
            EngineError: there are none, or they cannot do this: another embpack or Python, say.
        """

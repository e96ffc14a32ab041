"""Ray: checkpoints packed by the processes of a cluster, or by those of this machine.

    embpack.quantize_file(src, dst, engine=embpack.ray.Engine("auto"))

Tasks are small and the object store carries no table: workers read and write files that all of them see.
"""

import logging
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import embpack
from embpack.errors import EngineError, MissingExtraError
from embpack.threads import get_num_threads, set_num_threads

try:
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise MissingExtraError("embpack.ray", "Ray", "ray") from error

# What a worker has beside what its task takes: Ray, NumPy and embpack are 135 MB, pyarrow some 60 MB more.
_WORKER_BYTES = 200 << 20
# Ray takes no less than 75 MiB.
_STORE_BYTES = 100 << 20
# How often a task is run again whose worker or machine died. One that is out of memory is always run again.
_RETRIES = 50
# Seconds: until something answers at an address; until a machine answers; until one that has just joined is asked
# again; until tasks end by themselves, and then that are cancelled; for how long it is known what machines there are.
_CONNECT_SECONDS, _ANSWER_SECONDS, _AGAIN_SECONDS, _CANCEL_SECONDS, _NODES_SECONDS = 5, 60, 0.5, 3, 2
# Of a Ray that is started here: it tells nobody, and a terminal's Ctrl-C goes to this process alone, which cancels the
# tasks. Where it ends them as they are cancelled, Ray 2.60 may end this process with a failed check of its own.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_process_group_cleanup_enabled": "1"}

_ADDRESS = re.compile(r"auto|local|(?:ray://)?(\[[0-9a-fA-F:]+\]|[^\s/:]+):(\d{1,5})")
_WAYS = "give 'host:port' of a cluster's head node, 'ray://host:port' of its Ray Client server, or 'auto'"

Versions = Mapping[str, str]


@dataclass(frozen=True)
class Engine:
    """Packs on Ray.

    Attributes:
        address: "host:6379", of a cluster that this machine is a node of; "auto", for the one that runs on this
            machine; "ray://host:10001", from outside of it. None is what RAY_ADDRESS says, and otherwise "local": Ray
            is started on this machine, with as many workers as embpack has threads, and stopped at the end. Where
            this process has connected to Ray before (ray.init), None is that, which goes on afterwards.

    Raises:
        ValueError: it is no address.
    """

    address: str | None = None

    def __post_init__(self) -> None:
        if self.address is not None and not _ADDRESS.fullmatch(self.address):
            raise ValueError(f"{self.address!r} is no address of a Ray cluster; {_WAYS}")

    @contextmanager
    def connect(self) -> Iterator["_Workers"]:
        """Find the workers, as embpack.engines.Engine says.

        Raises:
            EngineError: there is no cluster, or a machine of it has another version of embpack, NumPy, Python or Ray.
        """
        with _connected(self.address):
            workers = _Workers()
            workers.check_versions()
            try:
                yield workers
            finally:
                workers.cancel()


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, if this process is not connected."""
    if ray.is_initialized():
        if address is not None:
            raise EngineError(f"{address}: this process is connected to Ray before; leave out the address to use that")
        yield
        return
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or "local"
        if not _ADDRESS.fullmatch(address):
            raise EngineError(f"RAY_ADDRESS is {address!r}, no address of a Ray cluster; {_WAYS}")
    try:
        if address == "local":
            with _started():
                yield
        else:
            _join(address)
            yield
    finally:
        ray.shutdown()


@contextmanager
def _started() -> Iterator[None]:
    """Start Ray on this machine alone; nothing of it is left."""
    # Not in the folder for temporary files, whose name may be too long: sockets have names of 107 bytes at most.
    folder = tempfile.mkdtemp(prefix="embpack-ray-", dir="/tmp")
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        _initialize(
            "local",
            num_cpus=get_num_threads(),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _join(address: str) -> None:
    if (found := _ADDRESS.fullmatch(address)) and found[1]:
        _check_answer(address, found[1].strip("[]"), int(found[2]))
    _initialize(address)


def _initialize(address: str, **options: Any) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (RayError, RuntimeError, OSError, ValueError, SystemExit) as error:
        # SystemExit is what comes of a cluster that does not answer.
        raise EngineError(f"{address}: cannot be used: {' '.join(str(error).split())}; {_WAYS}") from error


def _check_answer(address: str, host: str, port: int) -> None:
    """Raise unless a gRPC server answers, as all of Ray's are: Ray itself waits for two minutes, and ends the process.

    A client of HTTP/2, on which gRPC is, begins with a fixed line and its settings, and a server with its settings.
    """
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    try:
        with socket.create_connection((host, port), _CONNECT_SECONDS) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            answer = connection.recv(9)
    except OSError as error:
        raise EngineError(f"{address}: there is no Ray cluster ({error.strerror or error}); {_WAYS}") from None
    if answer[3:4] != b"\4":
        raise EngineError(f"{address}: what answers there is not Ray; {_WAYS}")


@dataclass(frozen=True)
class _Task:
    """A task that was submitted.

    Attributes:
        number: what its submitter calls it.
        memory: that it is declared to take.
        call: a function, and its arguments.
        tries: how often it was started again.
    """

    number: int
    memory: int
    call: tuple[Any, ...]
    tries: int = 0


class _LostArgumentError(EngineError):
    """What was shared did not get to a task, as where a machine goes that had it: Ray does not run that again."""


@dataclass
class _Workers:
    """The workers of the cluster that this process is connected to: embpack.engines.Workers."""

    _running: dict[Any, "_Task"] = field(default_factory=dict)
    _waiting: deque["_Task"] = field(default_factory=deque)
    _started: int = 0
    _ready: list[Any] = field(default_factory=list)
    _nodes: list[Mapping[str, Any]] = field(default_factory=list)
    _nodes_until: float = -1.0
    _versions: Versions = field(default_factory=lambda: _list_versions())

    @property
    def count(self) -> int:
        return max(1, sum(int(node["Resources"]["CPU"]) for node in self._list_nodes()))

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def submit(self, function: Callable[..., Any], *args: Any, memory: int) -> Any:
        memory += _WORKER_BYTES
        most = max((node["Resources"].get("memory", 0) for node in self._list_nodes()), default=0)
        if memory > most:
            raise EngineError(
                f"a task takes {memory:,} bytes of memory, and no machine of the cluster has more than {most:,.0f}"
            )
        self._started += 1
        self._waiting.append(_Task(self._started, memory, (function, *args)))
        self._fill()
        return self._started

    def next_done(self) -> tuple[Any, Any]:
        while True:
            self._fill()
            if not self._ready:
                ray.wait(list(self._running), num_returns=1)
                self._ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            done = self._ready.pop()
            task = self._running.pop(done)
            try:
                return task.number, _get(done)
            except _LostArgumentError:
                if task.tries == _RETRIES:
                    raise
                self._waiting.appendleft(replace(task, tries=task.tries + 1))

    def _fill(self) -> None:
        """Give Ray as many tasks as can run; those that it queues it cannot cancel safely."""
        while self._waiting and len(self._running) - len(self._ready) < self.count:
            task = self._waiting.popleft()
            started = _run.options(memory=task.memory).remote(self._versions, *task.call)
            self._running[started] = task

    def run_everywhere(self, function: Callable[..., Any], *args: Any) -> Mapping[str, Any]:
        return self._run_everywhere(_run, self._versions, function, *args)

    def check_versions(self) -> None:
        """Raise an EngineError unless all machines have what this one has."""
        faults = []
        found = self._run_everywhere(_make_probe())
        for machine, versions in found.items():
            faults += [f"{machine} {fault}" for fault in find_faults(versions, self._versions)]
        if faults:
            raise EngineError(f"the cluster's machines differ from this one: {'; '.join(faults)}")
        if not found:
            raise EngineError("the cluster has no machine with a CPU for tasks")

    def cancel(self) -> None:
        """End all tasks: by an exception, and what then still runs by killing its process.

        Ray 2.60 ends this process by a failed check of its own (task_manager.cc, "Tried to complete task that was not
        pending") where a task is cancelled that it has just sent to a worker. A moment later that is past.
        """
        self._waiting.clear()
        self._ready.clear()
        self._wait_for_end()
        for force in (False, True):
            for task in self._running:
                ray.cancel(task, force=force)
            self._wait_for_end()

    def _wait_for_end(self) -> None:
        if self._running:
            count = len(self._running)
            _, left = ray.wait(list(self._running), num_returns=count, timeout=_CANCEL_SECONDS)
            self._running = {task: self._running[task] for task in left}

    def _run_everywhere(self, task: Any, *args: Any) -> dict[str, Any]:
        """Run a task once on each machine; return what came of it, by names of machines."""
        until, found = time.monotonic() + _ANSWER_SECONDS, dict[str, Any]()
        while True:
            self._nodes_until = -1.0
            nodes, asked = self._list_nodes(), {}
            for node in (node["NodeID"] for node in nodes if node["NodeID"] not in found):
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                asked[node] = task.options(num_cpus=0, max_retries=3, scheduling_strategy=there).remote(*args)
            if not asked:
                return {name: found[node["NodeID"]] for name, node in _name_nodes(nodes).items()}
            done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=max(0, until - time.monotonic()))
            for node, each in asked.items():
                try:
                    found[node] = _get(each) if each in done else EngineError(f"no answer in {_ANSWER_SECONDS} seconds")
                except Exception as error:
                    # Not all of Ray knows yet that it has joined, or has died: it is asked again if it is there.
                    if not isinstance(error.__cause__, TaskUnschedulableError) or time.monotonic() >= until:
                        found[node] = error
            if asked.keys() - found.keys():
                time.sleep(_AGAIN_SECONDS)

    def _list_nodes(self) -> list[Mapping[str, Any]]:
        """List the machines that run tasks, as they are or were a moment ago."""
        if time.monotonic() >= self._nodes_until:
            self._nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
            self._nodes_until = time.monotonic() + _NODES_SECONDS
        return self._nodes


def _name_nodes(nodes: list[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Name nodes by their machines; with several on one machine also by their ports."""
    hosts = [node["NodeManagerHostname"] for node in nodes]
    return {
        host if hosts.count(host) == 1 else f"{host}:{node['NodeManagerPort']}": node
        for host, node in zip(hosts, nodes, strict=True)
    }


def _get(task: Any) -> Any:
    """Return the result of a task that is done, or raise what it raised."""
    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, RayError):
            raise _LostArgumentError(_explain(error.cause)) from error
        raise error.cause from error
    except RayError as error:
        raise EngineError(_explain(error)) from error


def _explain(error: RayError) -> str:
    return f"a task could not be run: {str(error).partition(chr(10))[0]}"


def _list_versions() -> Versions:
    return {
        "embpack": embpack.__version__,
        "NumPy": np.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


def find_faults(versions: Versions | Exception, own: Versions) -> list[str]:
    """Say in what a machine differs from this one."""
    if isinstance(versions, Exception):
        return [f"does not run tasks ({versions})"]
    return [
        f"has {name} {versions[name]}, not {version}" if name in versions else f"has no {name}; install {version}"
        for name, version in own.items()
        if versions.get(name) != version
    ]


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _run(versions: Versions, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a worker, as embpack.engines.Workers says."""
    # A machine may have joined after all others were asked.
    faults = find_faults(_list_versions(), versions)
    if faults:
        raise EngineError(f"the machine {platform.node()} {', and '.join(faults)} as the one that packs")
    set_num_threads(1)
    try:
        return function(*args)
    except OSError as error:
        raise _name_machine(error) from error


def _name_machine(error: OSError) -> OSError:
    """Say on which machine the system failed."""
    where = f"on the machine {platform.node()}"
    if type(error).__module__.partition(".")[0] not in ("builtins", "embpack"):  # nobody knows what it is made of
        error.add_note(where)
        return error
    is_of_system = error.strerror is not None
    args = (error.errno, f"{error.strerror}, {where}", error.filename) if is_of_system else (f"{error}, {where}",)
    named = type(error)(*args)
    named.__dict__.update(error.__dict__)
    return named


def _make_probe() -> Any:
    """Make a task that says what versions there are; it is sent as it is, for embpack may not be there."""

    def list_versions() -> dict[str, str]:
        import sys
        from importlib import import_module

        found = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        for name, module in (("embpack", "embpack"), ("NumPy", "numpy")):
            with suppress(ImportError):
                found[name] = import_module(module).__version__
        return found

    return ray.remote(list_versions)

"""Fixtures that several test files use."""

import builtins
import os
import re
import signal
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import embpack
from embpack import _native
from embpack.cli import main

# The same examples in every run, and no time limit on one: the reference is slow on purpose. A test's `isa`
# stays the same for all of its examples.
settings.register_profile(
    "embpack",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("embpack")

# Shells start what runs in the background so that it ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What -n auto means: a process for each CPU, but no more than eight, for each loads PyTorch and TorchRec."""
    return min(8, len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Give each process of pytest-xdist its share of the CPUs; the core reads this when it is loaded."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(specs))
    for spec in specs:
        spec.env.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))


def use_isa(request):
    before = _native.isa()
    assert _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


@pytest.fixture(params=[name for name in _native.available_isas() if name != "avx512_gfni"])
def isa(request):
    """Each instruction set of this CPU in turn, in use for the test, but for those that share nearly all kernels."""
    yield from use_isa(request)


@pytest.fixture(params=_native.available_isas())
def trellis_isa(request):
    """Each instruction set that looks trellis-coded rows up in its own way."""
    yield from use_isa(request)


@pytest.fixture
def rng():
    return np.random.default_rng(2019)


@pytest.fixture
def restore_threads():
    """Puts the number of threads back after the test."""
    before = embpack.get_num_threads()
    yield
    embpack.set_num_threads(before)


@pytest.fixture
def hide_package(monkeypatch):
    """Makes a package look as if it were not installed; the modules that import it are imported anew."""

    def hide(package, *modules):
        real_import = builtins.__import__

        def without_package(name, *args, **kwargs):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}")
            return real_import(name, *args, **kwargs)

        for module in modules:
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(builtins, "__import__", without_package)

    return hide


@pytest.fixture
def embpack_command(monkeypatch, capsys):
    """Runs a command in this process; returns exit code, stdout and stderr, without colours."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["embpack", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        printed = capsys.readouterr()
        return exited.value.code or 0, plain(printed.out), plain(printed.err)

    return run


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)

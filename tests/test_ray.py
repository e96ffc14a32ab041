"""Packing on Ray: a cluster of several machines on this one, and what goes wrong with such."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors
from large_tables import make_qwen_fp8, write_tensors
from test_distribution import UNFINISHED, make_arrays, pack_twice, read_tree, small_ranges  # noqa: F401  (a fixture)

import embpack
from embpack.errors import EngineError, FormatError, MissingExtraError
from embpack.resuming import RECORD_NAME

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from embpack.ray import Engine, find_faults  # noqa: E402

# Workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """Two machines with a CPU each; one such cluster at a time, of all processes that test."""
    with (Path(tempfile.gettempdir()) / "embpack-tests-ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = tempfile.mkdtemp(prefix="embpack-tests-ray-", dir="/tmp")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("RAY_TMPDIR", folder)
            cluster = Cluster(initialize_head=True, head_node_args=NODE)
            cluster.add_node(**NODE)
            yield cluster
            ray.shutdown()
            cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def connected(cluster):
    """This process is connected to the cluster."""
    if not ray.is_initialized():
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield
    assert ray.is_initialized()


@pytest.fixture
def disconnected(cluster):
    """This process is not, but may."""
    ray.shutdown()
    return cluster.address


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("source"), make_arrays())


# The bytes


@pytest.mark.parametrize(
    "options",
    [
        {"max_shard_size": "100 kB"},
        {"method": "trellis", "bits": 3.5},
        {"method": "kmeans-cls:K=30", "max_shard_size": "120 kB"},
        {"method": "asym", "rotate": "hadamard"},
    ],
    ids=str,
)
def test_the_bytes_are_those_of_one_process(connected, src, tmp_path, options):
    pack_twice(src, tmp_path, Engine(), **options)


def test_sources_with_scales(connected, tmp_path):
    src = write_tensors(tmp_path / "model.safetensors", make_qwen_fp8().tensors)
    pack_twice(src, tmp_path, Engine(), method="asym")


def test_many_small_tables(connected, tmp_path):
    rng = np.random.default_rng(1)
    tables = {f"emb.{i}.weight": rng.standard_normal((20 + i, 8), np.float32) for i in range(60)}
    src = write_safetensors(tmp_path, Arrays(tables, {"top.weight": np.ones((4, 4), np.float32)}))
    pack_twice(src, tmp_path, Engine(), max_shard_size="4 kB")


def test_a_cluster_that_asks_for_a_token(monkeypatch):
    def refuse(*args, **options):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("embpack.ray._check_answer", lambda *args: None)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(EngineError, match=r"Failed to connect .*; where the cluster asks for a token .*, set RAY_AUTH"):
        Engine("head:6379").connect().__enter__()


# Workers


def die_once(mark):
    """Kill the worker, but only the first one."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return embpack.get_num_threads()


def test_a_task_is_run_again_where_its_worker_dies(connected, tmp_path):
    with Engine().connect() as workers:
        assert workers.count == 2
        task = workers.submit(die_once, tmp_path / "mark", memory=1 << 20)
        assert workers.next_done() == (task, 1)


def fail(error):
    raise error


ERRORS = [ValueError("row 3 is NaN"), FormatError("is damaged"), MissingExtraError("embpack.onnx", "ONNX", "onnx")]


@pytest.mark.parametrize("error", ERRORS)
def test_what_a_function_raises_is_raised_here(connected, error):
    error.add_note("but not row 4")
    with Engine().connect() as workers, pytest.raises(type(error)) as caught:
        workers.submit(fail, error, memory=1)
        workers.next_done()
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert caught.value.__notes__ == ["but not row 4"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data"), "[Errno 13] Permission denied, {}: '/data'"),
        (FileNotFoundError("/data: is gone"), "/data: is gone, {}"),
        (socket.herror(1, "no host"), "[Errno 1] no host"),
    ],
    ids=str,
)
def test_an_error_of_the_system_names_the_machine(connected, error, message):
    where = f"on the machine {platform.node()}"
    with Engine().connect() as workers, pytest.raises(type(error), match=re.escape(message.format(where))) as caught:
        workers.submit(fail, error, memory=1)
        workers.next_done()
    assert type(caught.value) is type(error)
    assert where in str(caught.value) or where in caught.value.__notes__


def write_past_the_limit(path):
    """Fill a disk that takes 10 kB."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        path.write_bytes(bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_the_machines(connected, tmp_path):
    with Engine().connect() as workers, pytest.raises(OSError, match=f"large, on the machine {platform.node()}"):
        workers.submit(write_past_the_limit, tmp_path / "part", memory=1)
        workers.next_done()


def work_for_long(mark):
    mark.write_text("started")
    try:
        for _ in range(600):
            time.sleep(0.1)
    except KeyboardInterrupt:
        mark.write_text("cancelled")
        raise


def ignore_all(mark):
    mark.write_text(str(os.getpid()))
    for _ in range(6000):
        try:
            time.sleep(0.01)
        except BaseException:
            pass


def wait_for(is_so, seconds=30):
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_alive(pid):
    return Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text()


def test_tasks_are_cancelled_after_an_exception(connected, tmp_path, monkeypatch):
    monkeypatch.setattr("embpack.ray._CANCEL_SECONDS", 1)
    marks = tmp_path / "first", tmp_path / "second"
    with pytest.raises(KeyboardInterrupt), Engine().connect() as workers:
        workers.submit(work_for_long, marks[0], memory=1)
        workers.submit(ignore_all, marks[1], memory=1)
        workers.submit(work_for_long, tmp_path / "never", memory=1)
        wait_for(lambda: all(mark.exists() and mark.read_text() for mark in marks))
        raise KeyboardInterrupt
    wait_for(lambda: marks[0].read_text() == "cancelled")
    wait_for(lambda: not is_alive(marks[1].read_text()))
    assert not (tmp_path / "never").exists()


def test_a_task_that_no_machine_has_memory_for(connected):
    with Engine().connect() as workers, pytest.raises(EngineError, match=r"takes 1,\d+,\d+,\d+,\d+ bytes .* more than"):
        workers.submit(fail, memory=1 << 40)


def say_who(text):
    return f"{text} of {os.getpid()}"


def test_every_machine_runs_a_function_and_says_what_went_wrong(connected):
    with Engine().connect() as workers:
        found = workers.run_everywhere(say_who, "greetings")
        assert len(set(found.values())) == len(found) == 2
        assert all(name.startswith(platform.node()) for name in found)
        faults = workers.run_everywhere(fail, ValueError("no"))
        assert list(map(type, faults.values())) == [ValueError, ValueError]


DRIVER = """
import sys, time
from embpack.ray import Engine

def work(path):
    import os, time
    open(path, "w").write(str(os.getpid()))
    time.sleep(600)

with Engine(sys.argv[1]).connect() as workers:
    workers.submit(work, sys.argv[2], memory=1)
    workers.next_done()
"""


def test_tasks_end_with_their_driver(disconnected, tmp_path):
    mark = tmp_path / "mark"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, disconnected, mark])
    wait_for(lambda: mark.exists() and mark.read_text())
    driver.kill()
    driver.wait()
    wait_for(lambda: not is_alive(mark.read_text()))


# Addresses


@pytest.mark.parametrize("address", ["model.safetensors", "10.0.0.1", "http://127.0.0.1:8265", "", "host:port"])
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match=f"'{address}' is no address of a Ray cluster; give 'host:port'"):
        Engine(address)


def test_an_environment_with_no_address(disconnected, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(EngineError, match=r"RAY_ADDRESS is 'http://127\.0\.0\.1:8265', no address"), Engine().connect():
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_without_a_cluster(disconnected, scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"^{address}: there is no Ray cluster .Connection refused.; give"):
        with Engine(address).connect():
            pass
    with pytest.raises(EngineError, match=r"no-such-host\.invalid:6379: there is no Ray cluster .* not known"):
        with Engine(f"{scheme}no-such-host.invalid:6379").connect():
            pass


def test_an_address_of_something_else(disconnected):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(EngineError, match=f"{address}: what answers there is not Ray"), Engine(address).connect():
            pass
        server.shutdown()


def test_an_address_beside_a_connection(connected):
    with pytest.raises(EngineError, match="this process is connected to Ray before"), Engine("auto").connect():
        pass


@pytest.mark.parametrize("way", ["address", "auto", "environment"])
def test_connections_end_if_they_are_ours(disconnected, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("RAY_ADDRESS", disconnected)
    address = {"address": disconnected, "auto": "auto", "environment": None}[way]
    with Engine(address).connect() as workers:
        assert workers.count == 2
    assert not ray.is_initialized()


# Versions


def test_a_driver_of_another_ray(disconnected, monkeypatch):
    version = ray.__version__
    monkeypatch.setattr("ray.__version__", "2.50.0")
    with pytest.raises(EngineError, match=rf"started with: .*Ray: {version} .*Ray: 2\.50\.0"):
        with Engine(disconnected).connect():
            pass


@contextmanager
def machine_with(cluster, path):
    """A machine of the cluster that has other packages."""
    node = cluster.add_node(**NODE, env_vars={"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    try:
        yield f"{platform.node()}:{node.node_manager_port}"
    finally:
        cluster.remove_node(node)


def make_package(folder, text):
    """Make an embpack whose __init__.py is another one."""
    (folder / "embpack").mkdir()
    for path in Path(embpack.__file__).parent.iterdir():
        if path.name != "__init__.py":
            (folder / "embpack" / path.name).symlink_to(path)
    (folder / "embpack" / "__init__.py").write_text(text)
    return folder


def test_a_machine_with_another_embpack(cluster, connected, src, tmp_path):
    text = Path(embpack.__file__).read_text()
    package = make_package(tmp_path, re.sub('__version__ = ".*"', '__version__ = "0.0.9"', text))
    with machine_with(cluster, package) as name:
        message = f"machines differ from this one: {name} has embpack 0.0.9, not {embpack.__version__}"
        with pytest.raises(EngineError, match=message):
            embpack.quantize_file(src, tmp_path / "packed", engine=Engine())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["embpack"]


def test_a_machine_without_embpack(cluster, connected, src, tmp_path):
    package = make_package(tmp_path, "raise ModuleNotFoundError('no module named embpack')")
    with machine_with(cluster, package) as name:
        message = f"machines differ from this one: {name} has no embpack; install {embpack.__version__}"
        with pytest.raises(EngineError, match=message):
            embpack.quantize_file(src, tmp_path / "packed", engine=Engine())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["embpack"]


def test_what_is_said_of_versions():
    own = {"embpack": "0.1.0", "NumPy": "2.3.1", "Python": "3.11"}
    assert find_faults(own, own) == []
    found = {"embpack": "0.1.0", "NumPy": "2.3.0", "Python": "3.12"}
    assert find_faults(found, own) == ["has NumPy 2.3.0, not 2.3.1", "has Python 3.12, not 3.11"]
    assert find_faults(EngineError("no answer in 60 seconds"), own) == ["does not run tasks (no answer in 60 seconds)"]


# Sources and destinations


def test_a_machine_that_does_not_see_the_source(cluster, connected, src, tmp_path):
    """It has another file system where the source lies."""
    hide = f"mount -t tmpfs tmpfs {src.parent} && exec ray start --address {cluster.address} --num-cpus 1 --block"
    started = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{hide} --object-store-memory {80 << 20}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        start_new_session=True,
    )
    try:
        wait_for(lambda: started.poll() is not None or sum(node["Alive"] for node in ray.nodes()) == 3)
        if started.poll() is not None:
            pytest.skip(f"this machine has no namespaces of its own: {started.stdout.read()}")
        with pytest.raises(EngineError, match=f"{platform.node()}:\\d+: {src}: No such file.*mounted at the same"):
            embpack.quantize_file(src, tmp_path / "packed", engine=Engine())
        assert not list(tmp_path.iterdir())
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait()
        started.stdout.close()
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)


def test_a_row_with_nan_is_named(connected, tmp_path):
    arrays = make_arrays()
    arrays.tables["user_emb.weight"][41_234, 3] = np.nan
    src, messages = write_safetensors(tmp_path, arrays), []
    for engine in (None, Engine()):
        with pytest.raises(ValueError, match="41234") as caught:
            embpack.quantize_file(src, tmp_path / "packed", engine=engine)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


# The command line


def test_the_command_uses_the_connection(connected, embpack_command, src, tmp_path):
    options = ["--auto", "--max-bytes", "16 %", "--method", "asym,kmeans", "--save-plan", tmp_path / "plan.json"]
    code, _, err = embpack_command("quantize", src, tmp_path / "packed", *options, "--ray")
    assert (code, err) == (0, "")
    plan = ["--plan", tmp_path / "plan.json"]
    code, out, err = embpack_command("quantize", src, tmp_path / "other", "--ray", *plan, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["tables"]) == 3
    assert embpack_command("quantize", src, tmp_path / "whole", *plan)[0] == 0
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "other") == read_tree(tmp_path / "whole")
    code, _, err = embpack_command("quantize", src, tmp_path / "lost", "--ray", "--max-loss", "0.001")
    assert code == 3
    assert "user_emb.weight" in err
    assert not (tmp_path / "lost").exists()


def test_a_dry_run_counts_workers(connected, embpack_command, src):
    code, out, _ = embpack_command("quantize", src, "--dry-run", "--ray", "--method", "asym")
    assert code == 0
    assert re.search(r"packing takes about \d+ s with 2 workers, and", out)


@pytest.mark.parametrize("given", [["--ray=127.0.0.1:1"], ["--ray", "127.0.0.1:1"]])
def test_the_command_takes_an_address(disconnected, embpack_command, src, tmp_path, given):
    for arguments in ([src, tmp_path / "packed", *given], [*given, src, tmp_path / "packed"]):
        code, _, err = embpack_command("quantize", *arguments)
        assert code == 1
        assert err.startswith("error: 127.0.0.1:1: there is no Ray cluster (Connection refused); give")
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_a_source_as_an_address(embpack_command, src, tmp_path):
    code, _, err = embpack_command("quantize", "--ray", src, tmp_path / "packed")
    assert code == 2
    assert "is no address of a Ray cluster" in err
    assert "--ray alone goes after SRC and DST" in err


def test_workers_write_no_lone_file(embpack_command, src, tmp_path):
    code, _, err = embpack_command("quantize", src, tmp_path / "packed.safetensors", "--ray")
    assert (code, err) == (
        1,
        f"error: {tmp_path}/packed.safetensors: workers write the files of a folder; leave .safetensors out\n",
    )


def test_without_ray(hide_package, embpack_command, src, tmp_path, monkeypatch):
    hide_package("ray", "embpack.ray")
    code, _, err = embpack_command("quantize", src, tmp_path / "packed", "--ray")
    assert code == 1
    assert re.match(r"error: embpack\.ray needs Ray: pip install ", err)


# Ray on this machine


def start_command(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "embpack", "quantize", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "", **environment},
        start_new_session=True,
    )


def list_session(process):
    """List the processes that it started and that are there."""
    found = subprocess.run(["ps", "-eo", "pid=,sid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if int(line.split()[1]) == process.pid]


def test_ray_is_started_here_and_nothing_is_left(cluster, src, tmp_path):
    before = set(Path("/tmp").glob("embpack-ray-*"))
    process = start_command(src, tmp_path / "packed", "--method", "asym", "--ray", "--threads", 2)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "user_emb.weight" in out
    embpack.quantize_file(src, tmp_path / "whole", method="asym")
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "whole")
    assert set(Path("/tmp").glob("embpack-ray-*")) == before
    assert not list_session(process)


def test_ctrl_c_leaves_what_resume_needs(cluster, tmp_path):
    """The terminal sends it to all processes, Ray's among them."""
    before = set(Path("/tmp").glob("embpack-ray-*"))
    rng = np.random.default_rng(0)
    tables = {f"emb.{i}.weight": rng.standard_normal((4096, 32), np.float32) for i in range(10)}
    src = write_safetensors(tmp_path, Arrays(tables))
    options = ["--method", "trellis", "--max-shard-size", "200 kB"]
    process = start_command(src, tmp_path / "packed", *options, "--ray", "--threads", 1)
    record = tmp_path / UNFINISHED / RECORD_NAME
    wait_for(lambda: record.exists() or process.poll() is not None, 60)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.fullmatch(
        rf"{tmp_path}/packed: \d+ of \d+ files, .* are done, and --resume .* goes on\n(Aborted.\n)?", err
    )
    assert set(Path("/tmp").glob("embpack-ray-*")) == before
    assert not list_session(process)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / UNFINISHED / "new").iterdir()}
    embpack.quantize_file(src, tmp_path / "packed", method="trellis", max_shard_size="200 kB", resume=True)
    embpack.quantize_file(src, tmp_path / "whole", method="trellis", max_shard_size="200 kB")
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "whole")
    for path, when in made.items():
        assert (tmp_path / "packed" / path.name).stat().st_mtime_ns == when

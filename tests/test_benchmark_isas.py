"""Benchmarks say which kernels everybody runs, hold them to AVX2, and say how busy the CPUs are."""

import ctypes.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import goals, isas
from benchmarks.compiled import load_compiled
from benchmarks.cores import Busyness, CpuLoss, Turns, judge, time_cpus, watch
from benchmarks.goals import LOOKUP_GOALS, find_search_goal
from benchmarks.harness import Spread
from benchmarks.isas import Dispatch, NotHeldError
from benchmarks.lookup import WIDTHS
from benchmarks.report import describe_ratio, print_busyness, print_machine
from embpack import _native

ROOT = Path(__file__).parent.parent

# A copy of FBGEMM on a CPU with AVX-512: it chooses as FBGEMM does.
FBGEMM_WITH_AVX512 = """
namespace fbgemm {
volatile bool yes = true;
__attribute__((noinline)) bool fbgemmHasAvx512Support() { return yes; }
__attribute__((noinline)) bool fbgemmHasAvx2Support() { return yes; }
int fbgemmInstructionSet() { return fbgemmHasAvx512Support() ? 2 : 1; }
}  // namespace fbgemm
extern "C" bool look_up_4_bits() { return fbgemm::fbgemmHasAvx512Support(); }
extern "C" bool look_up_8_bits() { return false; }
"""
ASK_IT = """
import ctypes, sys
from benchmarks import isas
if "hold" in sys.argv:
    isas.hold_to_avx2()
copy = ctypes.CDLL(sys.argv[1])
dispatch = isas.read_dispatch(sys.argv[1])
print(dispatch.chosen, dispatch.has_avx512, [dispatch.lookup_isa(bits) for bits in (4, 8, 32)], dispatch.packing_isa)
print(bool(copy.look_up_4_bits() & 1))
if "hold" in sys.argv:
    isas.require_asked("4 bits", copy.look_up_4_bits)
    isas.require_asked("8 bits", copy.look_up_8_bits)
"""


@pytest.fixture(scope="module")
def fbgemm_with_avx512(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fbgemm")
    source, library = folder / "copy.cpp", folder / "copy.so"
    source.write_text(FBGEMM_WITH_AVX512)
    compiler = os.environ.get("CXX", "c++")
    try:
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    except OSError as error:
        pytest.skip(str(error))
    return str(library)


def run_python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_a_copy_of_fbgemm_with_avx512_is_seen(fbgemm_with_avx512):
    done = run_python("-c", ASK_IT, fbgemm_with_avx512)
    assert done.stdout.splitlines() == ["2 True ['avx512', 'avx512', 'avx512'] avx2", "True"], done.stderr


@pytest.mark.skipif("avx2" not in _native.available_isas(), reason="this CPU or build lacks AVX2")
def test_a_copy_of_fbgemm_with_avx512_is_held_to_avx2(fbgemm_with_avx512):
    done = run_python("-c", ASK_IT, fbgemm_with_avx512, "hold")
    assert done.stdout.splitlines() == ["1 False ['avx2', 'avx2', 'avx2'] avx2", "False"], done.stderr
    assert "NotHeldError: 8 bits is not held to AVX2: it does not ask no_avx512.cpp" in done.stderr


def test_where_there_is_no_fbgemm_loops_are_portable():
    dispatch = isas.read_dispatch(ctypes.util.find_library("c"))
    assert (dispatch.lookup_isa(4), dispatch.lookup_isa(32), dispatch.packing_isa) == ("portable",) * 3


@pytest.mark.parametrize(
    ("chosen", "isa"), [(0, "portable"), (1, "avx2"), (2, "avx512"), (3, "avx2"), (4, "avx512"), (7, "unknown")]
)
def test_wide_values_run_what_fbgemm_has_chosen_and_4_bits_what_the_cpu_has(chosen, isa):
    dispatch = Dispatch(chosen, has_avx512=True, has_avx2=True)
    assert (dispatch.lookup_isa(8), dispatch.lookup_isa(32), dispatch.lookup_isa(4)) == (isa, isa, "avx512")
    assert Dispatch(chosen, has_avx512=False, has_avx2=True).lookup_isa(4) == "avx2"
    assert Dispatch(chosen, has_avx512=False, has_avx2=False).lookup_isa(4) == "portable"


@pytest.mark.parametrize("isa", ["avx512", "unknown", "oneDNN's", isas.name_mkl_isa("Architecture processors")])
def test_who_is_not_held_is_named(monkeypatch, isa):
    monkeypatch.setattr(isas, "cpu_has_avx512", lambda: True)
    isas.require_held({"FBGEMM": "avx2", "PyTorch": "portable"})
    with pytest.raises(NotHeldError, match=f"PyTorch 4 bits is not held to AVX2: its kernels are {isa}"):
        isas.require_held({"FBGEMM": "avx2", "PyTorch 4 bits": isa})
    monkeypatch.setattr(isas, "cpu_has_avx512", lambda: False)
    isas.require_held({"PyTorch 4 bits": isa})


def test_mkl_says_what_it_is_for():
    words = "Intel(R) Advanced Vector Extensions"
    assert isas.name_mkl_isa(f"{words} 2 (Intel(R) AVX2) enabled processors") == "avx2"
    assert isas.name_mkl_isa(f"{words} 512 (Intel(R) AVX-512) enabled processors") == "avx512"


def test_whoever_has_loaded_pytorch_is_not_held():
    pytest.importorskip("torch")
    with pytest.raises(NotHeldError, match="PyTorch is loaded already"):
        isas.hold_to_avx2()


@pytest.mark.skipif("avx2" not in _native.available_isas(), reason="this CPU or build lacks AVX2")
@pytest.mark.parametrize(
    ("benchmark", "some"),
    [
        ("lookup", ["--cases", "in-cache", "widths", "modules"]),
        ("quantize", ["--dims", "16", "--no-stream"]),
        ("linear", ["--tables", "4-bits", "--vectors", "1"]),
    ],
)
def test_everybody_is_held_to_avx2(tmp_path, benchmark, some):
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    done = run_python(
        "-m", f"benchmarks.{benchmark}", "--quick", "--rounds", "1", *some, "--isa", "avx2", "--json", path
    )
    if benchmark == "linear" and done.returncode:  # MKL does not say what it runs on AMD's CPUs, so it is not trusted.
        assert isas.cpu_has_avx512() and "NotHeldError: nn.Linear, float32 is not held to AVX2" in done.stderr
        return
    assert not done.returncode, done.stderr
    report = json.loads(path.read_text())
    assert report["machine"]["isa"] == "avx2"
    standings = [standing for race in report["races"] for standing in race["standings"]]
    held = {"avx2", "portable"} if isas.cpu_has_avx512() else {"avx2", "portable", "MKL's"}
    assert {standing["isa"] for standing in standings} <= held
    assert {standing["isa"] for standing in standings if standing["name"].startswith(("embpack", "4-bits"))} == {"avx2"}


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(OSError, match="false fails"):
        load_compiled("touch.cpp")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match="no C\\+\\+ compiler"):
        load_compiled("touch.cpp")


def test_a_cpu_that_another_process_shares_loses_half():
    alone, shared = Turns(shortest=0.0005, mean=0.000505), Turns(shortest=0.0005, mean=0.001)
    found = judge({0: alone, 1: alone}, {0: alone, 1: shared})
    assert not found.worth_quoting
    assert [(own.cpu, own.before, own.after) for own in found.cpus] == [
        (0, pytest.approx(0.0099, abs=1e-4), pytest.approx(0.0099, abs=1e-4)),
        (1, pytest.approx(0.0099, abs=1e-4), 0.5),
    ]
    assert judge({0: alone}, {0: alone}).worth_quoting


def test_a_cpu_that_is_slow_all_the_time_is_measured_by_its_best():
    fast, slow = Turns(shortest=0.0005, mean=0.0005), Turns(shortest=0.001, mean=0.001)
    assert judge({0: slow}, {0: fast}).cpus == [CpuLoss(0, 0.5, 0.0)]
    assert judge({0: slow}, {0: slow}).cpus == [CpuLoss(0, 0.0, 0.0)]


def test_each_cpu_is_timed_and_the_thread_may_run_on_all_of_them_again():
    allowed = os.sched_getaffinity(0)
    turns = time_cpus(seconds=0.01)
    assert set(turns) == allowed == os.sched_getaffinity(0)
    assert all(0 < own.shortest <= own.mean for own in turns.values())
    found, busyness = watch(lambda: "found")
    assert found == "found" and {own.cpu for own in busyness.cpus} == allowed == os.sched_getaffinity(0)


def test_reports_say_how_busy_the_cpus_were(capsys):
    print_busyness(Busyness([CpuLoss(0, 0.012, 0.5), CpuLoss(1, 0.0, 0.1)], worth_quoting=False))
    print_busyness(Busyness([CpuLoss(1, 0.0, 0.1)], worth_quoting=True))
    assert re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines() == [
        "lost to others, before and after: CPU 0 1 %, 50 %; CPU 1 0 %, 10 %",
        "A CPU lost more than 10 %: these figures are not worth quoting.",
        "lost to others, before and after: CPU 1 0 %, 10 %",
    ]


def test_reports_say_what_the_cpu_has_beside_what_was_used(capsys):
    machine = {"cpu": "AMD EPYC", "isa": "avx2", "best_isa": "avx512", "python": "3.11", "versions": {}}
    print_machine(machine, {})
    assert capsys.readouterr().out.startswith("AMD EPYC, avx2 (the CPU has avx512), Python 3.11\n")


def test_ratios_are_shown_with_three_digits():
    assert describe_ratio(Spread(1.046, 0.9, 12.34)) == ("1.05", "0.90..12.3")
    assert describe_ratio(Spread(348.2, 99.7, 1000.4)) == ("348", "99.7..1000")


def test_there_are_goals_for_each_instruction_set():
    assert set(_native.available_isas()) <= set(LOOKUP_GOALS)


def test_goals_are_by_width_and_by_peer():
    class Peer:
        def __init__(self, library, bits):
            self.library, self.bits = library, bits

    peers = [Peer("PyTorch", 4), Peer("FBGEMM", 4), Peer("PyTorch", 8), Peer("FBGEMM", 8), Peer("PyTorch", 32)]
    assert [goals.AVX2.by_pooler(peer, 32) for peer in peers] == [1.5, 1.5, None, None, 0.85]
    assert [goals.AVX2.by_pooler(peer, 64) for peer in peers] == [1.5, 1.5, 1.0, None, 1.0]
    assert [goals.AVX512.by_pooler(peer, 32) for peer in peers] == [1.5, 1.5, None, None, 1.0]
    searches = [find_search_goal(method, d) for method in ("greedy", "optimal", "trellis") for d in (64, 256)]
    assert searches == [40, None, 10, 10, None, None]
    assert WIDTHS == (48, 50, 96, 100, 160, 200, 300, 384)

"""Which instruction set the kernels of each contestant are for, and how everybody is held to AVX2.

All lookups of PyTorch and of FBGEMM, float32 too, are kernels of FBGEMM, which writes them when they are first called.
libtorch_cpu.so has one copy of FBGEMM and fbgemm_gpu's fbgemm.so another; each chooses for itself.
"""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compiled import load_compiled
from embpack import _native

# What libraries read when they are loaded, ours in processes that benchmarks start.
SWITCHES = {"EMBPACK_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# fbgemm::inst_set_t, by the kernels for lookups: those for 256 bits of AVX-512 are the ones for AVX2.
FBGEMM_ISAS = {0: "portable", 1: "avx2", 2: "avx512", 3: "avx2", 4: "avx512", 5: "avx2"}

EPILOG = """
The column isa says which instruction set the kernels of a contestant are for; portable ones are for any CPU. Lookups
of PyTorch and of FBGEMM, float32 too, are kernels that FBGEMM makes for AVX2 or AVX-512; it packs by AVX2 at most, and
PyTorch's greedy search is portable.

--isa avx2 holds everybody to AVX2, and fails where somebody is not: ours as EMBPACK_ISA=avx2 does, PyTorch's kernels
by ATEN_CPU_CAPABILITY=avx2, MKL's by MKL_ENABLE_INSTRUCTIONS=AVX2. FBGEMM's FBGEMM_ENABLE_INSTRUCTIONS=AVX2 holds its
lookups of 8 bits and of float32, but not those of 4 bits: these ask fbgemmHasAvx512Support() alone. So a library that
says no in its place, no_avx512.cpp, is compiled and loaded first. EMBPACK_ISA=avx2 without --isa holds ours alone.

Before the races and after, a loop of fixed work runs on each CPU. What it takes longer than in its shortest turn is
time that others took; where that is more than a tenth, on any CPU, the report says that its figures are not worth
quoting. taskset -c 1 python -m benchmarks... runs on one CPU, and looks at no other.
"""


class NotHeldError(RuntimeError):
    """Somebody runs other kernels than the option asks for."""


@dataclass(frozen=True)
class Dispatch:
    """By what one copy of FBGEMM chooses kernels.

    Attributes:
        chosen: its fbgemmInstructionSet(), an fbgemm::inst_set_t.
        has_avx512, has_avx2: what its functions get as an answer when they ask for these.
    """

    chosen: int
    has_avx512: bool
    has_avx2: bool

    def lookup_isa(self, bits: int) -> str:
        """Return the instruction set of lookups: of 4 bits by the CPU, of 8 and 32 by what it has chosen."""
        if bits == 4:
            return "avx512" if self.has_avx512 else self.packing_isa
        return FBGEMM_ISAS.get(self.chosen, "unknown")

    @property
    def packing_isa(self) -> str:
        """The instruction set of its quantizers."""
        return "avx2" if self.has_avx2 else "portable"


def read_dispatch(library: Path) -> Dispatch:
    """Ask the copy of FBGEMM in a library; where there is none, as for other CPUs, PyTorch's own loops are portable."""
    asked = ctypes.CDLL(str(library))

    def ask(name: str, kind: Any) -> Any:
        function = getattr(asked, f"_ZN6fbgemm{len(name)}{name}Ev", None)
        if function is None:
            return 0
        function.restype = kind
        return function()

    chosen = ask("fbgemmInstructionSet", ctypes.c_int)  # Before the others, which say no until it has looked.
    # Where no_avx512.cpp stands in for its function, the copy's own would still tell what the CPU has.
    has_avx512 = bool(ask("fbgemmHasAvx512Support", ctypes.c_bool)) and _times_asked() is None
    has_avx2 = bool(ask("fbgemmHasAvx2Support", ctypes.c_bool))
    return Dispatch(chosen, has_avx512, has_avx2)


def read_pytorch_dispatch() -> Dispatch:
    """Ask PyTorch's copy of FBGEMM."""
    return read_dispatch(_find_libtorch())


def _find_libtorch() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def read_fbgemm_dispatch() -> Dispatch:
    """Ask fbgemm_gpu's."""
    import fbgemm_gpu  # type: ignore[import-untyped]

    return read_dispatch(Path(fbgemm_gpu.__file__).parent / "fbgemm.so")


def read_pytorch_isa() -> str:
    """Return the instruction set of PyTorch's own kernels."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return "portable" if capability == "DEFAULT" else capability.lower()


class _MklVersion(ctypes.Structure):
    """MKLVersion."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("major", "minor", "update")),
        *((name, ctypes.c_char_p) for name in ("status", "build", "processor", "platform")),
    )


def read_mkl_isa() -> str:
    """Return the instruction set of the copy of MKL in PyTorch, as far as MKL says."""
    version = _MklVersion()
    ask = getattr(ctypes.CDLL(str(_find_libtorch())), "mkl_serv_get_version", None)
    if ask is not None:
        ask(ctypes.byref(version))
    return name_mkl_isa((version.processor or b"").decode())


def name_mkl_isa(processor: str) -> str:
    """Return the instruction set that MKL's words for a processor are for."""
    if "AVX-512" in processor:
        return "avx512"
    return "avx2" if "AVX2" in processor else "MKL's"


def switch_onednn_off() -> None:
    """Have PyTorch multiply without oneDNN, as it does bfloat16 on CPUs without AVX-512."""
    import torch

    torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]


def hold_to_avx2() -> None:
    """Hold everybody to AVX2: before PyTorch is loaded, or it would not heed it.

    Raises:
        NotHeldError: PyTorch is loaded, this CPU or build lacks AVX2, or there is no C++ compiler, or it fails.
    """
    if "torch" in sys.modules:
        raise NotHeldError("PyTorch is loaded already, and has chosen its kernels")
    if not _native.use_isa("avx2"):
        raise NotHeldError("this CPU lacks AVX2, or embpack was built without it")
    os.environ.update(SWITCHES)
    try:
        load_compiled("no_avx512.cpp", ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise NotHeldError(str(error)) from error


def cpu_has_avx512() -> bool:
    """Whether Linux says so."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512f" in cpuinfo.read_text().split()


def _times_asked() -> int | None:
    """How often no_avx512.cpp was asked; None if it is not loaded."""
    function = getattr(ctypes.CDLL(None), "times_asked_for_avx512", None)
    return None if function is None else int(function())


def require_held(isas: Mapping[str, str]) -> None:
    """Check that kernels, by who runs them, are for AVX2 at most, as all are where the CPU has no more.

    Raises:
        NotHeldError: somebody's are not, or nobody knows.
    """
    for name, isa in isas.items():
        if isa not in ("portable", "avx2") and cpu_has_avx512():
            raise NotHeldError(f"{name} is not held to AVX2: its kernels are {isa}")


def require_asked(name: str, call: Callable[[], Any]) -> None:
    """Check that a call asks our library, not the CPU, whether there is AVX-512.

    Raises:
        NotHeldError: it does not.
    """
    before = _times_asked()
    call()
    if _times_asked() == before:
        raise NotHeldError(f"{name} is not held to AVX2: it does not ask no_avx512.cpp")


def add_isa_option(parser: argparse.ArgumentParser) -> None:
    """Add --isa."""
    parser.add_argument("--isa", choices=("avx2",), help="hold everybody to AVX2, where the CPU has AVX-512: see below")

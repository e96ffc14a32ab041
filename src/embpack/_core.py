"""Loads the native core; imported before anything else of the package.

While OpenMP's threads wait for the next call they spin, so that calls in a row find them awake; waking one takes
longer than many calls do. But where another process has taken a CPU, a thread that spins keeps one that works from
running, and libgomp spins for many milliseconds. Ours sleep after less than one, unless the environment says otherwise;
OpenMP reads that only when it is loaded.
"""

import os

# Pauses of the CPU, of 15 to 50 ns each. libgomp itself spins less where there are more threads than CPUs.
_SPIN_COUNT = "20000"


def _load() -> None:
    policies = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    chosen_by_user = any(policy in os.environ for policy in policies)
    if not chosen_by_user:
        # There is no other way to tell libgomp, and it is told only while the core is loaded.
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        from embpack import _native
    finally:
        if not chosen_by_user:
            del os.environ["GOMP_SPINCOUNT"]
    isa = os.environ.get("EMBPACK_ISA")
    if isa and not _native.use_isa(isa):
        raise ImportError(
            f"EMBPACK_ISA is {isa!r}, which this CPU or build does not have; choose one of "
            f"{', '.join(_native.available_isas())}, or unset it"
        )


_load()

"""Loads the native core; imported before anything else of the package.

OpenMP's threads spin for milliseconds while they wait for each other. Where another process has taken a CPU, the one
that spins keeps the one that works from running, and two threads are several times slower than one. So ours sleep
while they wait, unless the environment says otherwise; OpenMP reads that only when it is loaded.
"""

import os


def _load() -> None:
    policies = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    chosen_by_user = any(policy in os.environ for policy in policies)
    if not chosen_by_user:
        os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        from embpack import _native
    finally:
        if not chosen_by_user:
            del os.environ["OMP_WAIT_POLICY"]
    isa = os.environ.get("EMBPACK_ISA")
    if isa and not _native.use_isa(isa):
        raise ImportError(
            f"EMBPACK_ISA is {isa!r}, which this CPU or build does not have; choose one of "
            f"{', '.join(_native.available_isas())}, or unset it"
        )


_load()

"""What is packed are the same bytes on every machine: whatever its CPU, its threads, and the way to the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import packed_digests
import pytest
from packed_digests import FILE_METHODS, make_weight

import embpack
from embpack import _native
from embpack.methods import METHODS
from embpack.variant import Variant

try:
    from numpy._core import _multiarray_umath as umath
except ImportError:  # NumPy 1
    from numpy.core import _multiarray_umath as umath

# What NumPy does in several ways, of which the CPU chooses one.
FEATURES = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
# Kernels of OpenBLAS by the CPUs that they are for; all run here, if these instruction sets do.
CORES = ["Prescott", *(["Haswell", "Zen"] if "avx2" in _native.available_isas() else [])]
ENVIRONMENTS = {
    "one thread, old CPU": {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott", "PYTHONHASHSEED": "1"},
    "three threads, no SIMD in NumPy": {
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": " ".join(FEATURES),
        "OPENBLAS_CORETYPE": CORES[-1],
        "PYTHONHASHSEED": "2",
    },
    **{name: {"EMBPACK_ISA": name, "OMP_NUM_THREADS": "2"} for name in _native.available_isas()},
}


def run(folder: Path, **environment: str) -> dict[str, str]:
    script = Path(packed_digests.__file__)
    done = subprocess.run(
        [sys.executable, script, folder], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    digests: dict[str, str] = json.loads(done.stdout)
    return digests


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """By what was packed, a digest of what it was packed to, as this machine does it by itself."""
    return run(tmp_path_factory.mktemp("here"))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_bytes_depend_on_no_machine(tmp_path, here, environment):
    elsewhere = run(tmp_path, **ENVIRONMENTS[environment])
    assert {name: digest for name, digest in elsewhere.items() if digest != here[name]} == {}
    assert elsewhere.keys() == here.keys()
    assert all(any(name.startswith(method) for name in here) for method in METHODS)


@pytest.fixture
def small_chunks(monkeypatch):
    for name, value in (("SPAN_VALUES", 96 * 40), ("SPANS_OF_A_FILE", 3), ("SPANS_OF_AN_ARRAY", 5)):
        monkeypatch.setattr(f"embpack.chunks.{name}", value)
    monkeypatch.setattr("embpack.methods.kmeans_cls.MOST_TRAINED_VALUES", 700 * 40)


@pytest.mark.parametrize("rotate", [None, "hadamard"])
@pytest.mark.parametrize("method", FILE_METHODS)
def test_bytes_depend_on_no_way_to_the_rows(tmp_path, small_chunks, method, rotate):
    """From an array in any order of memory, from a file, in pieces, and by ranges of rows in any order."""
    weight = make_weight(9000)
    table = embpack.quantize(weight, method, rotate=rotate)
    wanted = [array.tobytes() for array in (table.packed, *table.beside)]

    def check(other):
        assert [array.tobytes() for array in (other.packed, *other.beside)] == wanted
        assert other.method == table.method and other.loss == pytest.approx(table.loss, rel=1e-14)

    check(embpack.quantize(np.asfortranarray(weight), method, rotate=rotate))
    np.save(tmp_path / "large_emb.npy", weight)
    for name, size in (("whole.safetensors", None), ("pieces", 90_000)):
        how = {"method": method, "rotate": rotate, "max_shard_size": size}
        embpack.quantize_file(tmp_path / "large_emb.npy", tmp_path / name, **how)
        (loaded,) = embpack.load(tmp_path / name, verify=True).values()
        check(loaded)
    variant = Variant(method, rotate=rotate)
    row_format = variant.make_row_format(weight.shape[1])
    rows = embpack.rotation.rotate(weight) if rotate else weight
    packer = variant.parsed_method.fit(lambda: iter(np.split(rows, range(288, 9000, 288))), 9000, row_format)
    packed, by_row = np.empty_like(table.packed), packer.make_by_row(9000)
    for start in reversed(range(0, 9000, 4 * 96)):
        own = slice(start, start + 4 * 96)
        packer.pack(rows[own], packed[own], start, by_row=None if by_row is None else by_row[own])
    arrays = [packed, *([] if by_row is None else [by_row]), *packer.beside().values()]
    assert [array.tobytes() for array in arrays] == wanted

"""The package as a whole: what importing it does, and that its lists agree."""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import embpack
from embpack import _native
from embpack.layouts import LAYOUTS, RowFormat

ROOT = Path(__file__).parent.parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("package", ["torch", "pyarrow", "matplotlib", "ml_dtypes", "fbgemm_gpu", "ray"])
def test_importing_embpack_does_not_import(package):
    done = run_python(f"import sys, embpack; print({package!r} in sys.modules)")
    assert done.stdout == "False\n", done.stderr


# What they change holds for all threads of a process.
PROCESS_WIDE = {"catch_warnings", "simplefilter", "filterwarnings", "seterr", "setlocale", "umask", "chdir", "putenv"}


def test_the_library_changes_nothing_process_wide():
    """But the command line, whose process is its own."""
    package = Path(embpack.__file__).parent
    found = {
        (str(path.relative_to(package)), node.func.attr)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PROCESS_WIDE
    }
    assert found == {("cli/__init__.py", "filterwarnings")}


def test_quantizing_and_looking_up_does_not_import_torch():
    code = (
        "import sys, numpy, embpack; "
        "table = embpack.quantize(numpy.ones((2, 3), numpy.float16)); "
        "table[[0, 1]]; table.embedding_bag([0, 1], [0]); print('torch' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout == "False\n", done.stderr


WARNING_TESTS = """
import warnings
import pytest

@pytest.mark.parametrize("module", ["embpack", "embpack.torch.ops", "benchmarks.loss", "torch.nn", "numpy"])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning, UserWarning])
def test(category, module):
    exec("warnings.warn('old', category)", {"__name__": module, "warnings": warnings, "category": category})
"""


def test_warnings_are_errors_but_for_what_others_deprecate(tmp_path):
    (tmp_path / "test_warnings.py").write_text(WARNING_TESTS)
    arguments = ("-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-q", tmp_path)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    failed = re.findall(r"^FAILED .*::test\[(\w+)-(\S+)\]", done.stdout, re.MULTILINE)
    assert sorted(failed) == sorted(
        (category, module)
        for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning", "UserWarning")
        for module in ("embpack", "embpack.torch.ops", "benchmarks.loss", "torch.nn", "numpy")
        if category == "UserWarning" or module not in ("torch.nn", "numpy")
    ), done.stdout


def test_the_isa_fixture_is_what_runs(isa):
    assert _native.isa() == isa


@pytest.mark.parametrize("name", _native.available_isas())
def test_embpack_isa_forces(name):
    done = run_python("import embpack; print(embpack._native.isa())", EMBPACK_ISA=name)
    assert done.stdout == f"{name}\n", done.stderr


@pytest.mark.parametrize("unset", [{}, {"EMBPACK_ISA": ""}], ids=["unset", "empty"])
def test_without_embpack_isa_the_best_one_runs(unset, monkeypatch):
    monkeypatch.delenv("EMBPACK_ISA", raising=False)
    done = run_python("import embpack; print(embpack._native.isa())", **unset)
    assert done.stdout == f"{_native.available_isas()[0]}\n", done.stderr


def test_portable_is_always_available():
    assert _native.available_isas()[-1] == "portable"


def test_an_unknown_embpack_isa_is_an_error_that_names_the_choices():
    done = run_python("import embpack", EMBPACK_ISA="mmx")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: EMBPACK_ISA is 'mmx', which this CPU or build does not have; choose one of "
        f"{', '.join(_native.available_isas())}, or unset it"
    )


def test_an_unknown_isa_is_refused_and_changes_nothing():
    before = _native.isa()
    assert not _native.use_isa("mmx")
    assert _native.isa() == before


def list_modules() -> list[str]:
    return ["embpack", *(found.name for found in pkgutil.walk_packages(embpack.__path__, "embpack."))]


def test_no_module_is_hidden_by_what_has_its_name():
    for name in list_modules():
        package, _, own_name = name.rpartition(".")
        module = importlib.import_module(name)
        if package:
            assert getattr(importlib.import_module(package), own_name) is module, name


def list_imports(module: str, known: set[str]) -> set[str]:
    """Modules of the package that a module imports when it is imported itself; a package is not what lies in it."""
    path = Path(str(importlib.import_module(module).__file__))
    imports: set[str] = set()
    if path.suffix != ".py":
        return imports
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embpack"):
            of_names = {f"{node.module}.{alias.name}" for alias in node.names}
            imports |= of_names & known or {node.module}
    return imports & known - {module}


def test_imports_go_in_no_circle():
    known = set(list_modules())
    imports = {name: list_imports(name, known) for name in known}
    while leaves := {name for name in imports if not imports[name]}:
        imports = {name: found - leaves for name, found in imports.items() if name not in leaves}
    assert imports == {}, "modules that import each other, and those that import them"


def test_methods_and_native_searches_agree():
    assert {method.kernel for method in embpack.METHODS.values() if hasattr(method, "kernel")} == set(
        _native.searches()
    )


def test_every_way_to_quantize_has_every_field_of_variant():
    import embpack.torch
    from embpack.cli import quantize

    wanted = {field.name for field in dataclasses.fields(embpack.Variant)}
    for function in (embpack.quantize, embpack.quantize_file, embpack.torch.quantize_, quantize.quantize):
        assert wanted <= set(inspect.signature(function).parameters), function
    assert wanted <= {field.name for field in dataclasses.fields(embpack.Comparison)}


def test_every_instruction_set_is_listed():
    names = [path.name.removesuffix("_trellis-inl.h") for path in ROOT.glob("native/isa/*_trellis-inl.h")]
    assert len(names) >= 4
    for name in names:
        assert re.search(rf"\b{name}\b", (ROOT / "CMakeLists.txt").read_text()), name
        assert f"EMBPACK_HAS_{name}" in (ROOT / "native/dispatch.cpp").read_text(), name


def test_layouts_and_native_layouts_agree():
    assert list(LAYOUTS) == _native.layouts()
    assert {method.layout for method in embpack.METHODS.values()} == set(LAYOUTS)
    for layout in LAYOUTS:
        for bits in (2, 2.125, 3, 3.5, 4, 6.99, 7, 8):
            for dim in (4, 5, 31, 64, 100, 4096):
                for param_dtype in ("float16", "float32"):
                    try:
                        row_format = RowFormat(dim, bits, param_dtype, layout)
                    except (TypeError, ValueError):  # such as 3 bits of a uniform row
                        with pytest.raises(ValueError):
                            _native.row_bytes(f"{layout}:{dim}:{bits}:{param_dtype}")
                    else:
                        assert _native.row_bytes(str(row_format)) == row_format.row_bytes


def test_each_method_is_listed_under_its_name_and_says_what_it_is_for():
    for name, method in embpack.METHODS.items():
        assert method.name == name
        assert method.summary


def test_version_is_that_of_the_distribution():
    assert embpack.__version__ == importlib.metadata.version("embpack")


def test_public_names_exist():
    assert [name for name in embpack.__all__ if not hasattr(embpack, name)] == []


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    """By its packages, since no index need have embpack; those of an extra that it names too."""
    requirements = [
        "numpy>=1.26",
        'pyarrow>=15; extra == "parquet"',
        'fbgemm==1; extra == "fbgemm"',
        'embpack[fbgemm,parquet]; extra == "all"',
        "fbgemm==1; extra == 'all'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    error = embpack.MissingExtraError("Reading Parquet", "pyarrow", "parquet")
    assert isinstance(error, ImportError)
    assert str(error) == "Reading Parquet needs pyarrow: pip install 'pyarrow>=15'"
    assert str(embpack.MissingExtraError("It", "all", "all")) == "It needs all: pip install 'fbgemm==1' 'pyarrow>=15'"


def test_a_missing_extra_in_a_checkout_that_is_not_installed(monkeypatch):
    def refuse(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", refuse)
    error = embpack.MissingExtraError("Reading Parquet", "pyarrow", "parquet")
    assert str(error) == "Reading Parquet needs pyarrow: pip install '.[parquet]'"

"""A small part of what ``python -m tests.fuzz_files`` alters; docs/reliability.md has the figures of the whole."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")
pytest.importorskip("gguf")
from fuzz_files import run_batch


@pytest.mark.parametrize("first", [0, 100, 200])
def test_an_altered_file_is_refused_or_gives_what_was_written(first, capsys):
    outcomes = run_batch(first, 100, seed=1)
    assert outcomes["FAILED"] == 0, capsys.readouterr().err
    assert outcomes["refused"] > 50
    assert outcomes["read"] > 0

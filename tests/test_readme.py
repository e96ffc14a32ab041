"""README and the other pages: what they show runs, and what they point at is there."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import Arrays, run_embpack, write_safetensors

from embpack.formats import FORMATS
from embpack.layouts import RowFormat
from embpack.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MANUAL = {page.stem: page.read_text() for page in ROOT.glob("docs/*.md")}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def test_there_is_python_to_run():
    assert len(blocks("python")) >= 1


def run_and_compare(code: str, name: str, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """A comment after print(...) is what it prints, up to "..." or a colon with an explanation."""
    exec(compile(code, name, "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    comments = re.findall(r"^print\(.*\)  +# (.*)$", code, re.MULTILINE)
    expected = [re.split(r"\.\.\.|: ", comment)[0].rstrip(" ,") for comment in comments]
    assert [line[: len(start)] for line, start in zip(printed, expected, strict=True)] == expected


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_runs_and_prints_what_its_comments_say(tmp_path, monkeypatch, capsys, code):
    monkeypatch.chdir(tmp_path)
    run_and_compare(code, "README.md", {"__name__": "__main__"}, capsys)


# Pages that are read from top to bottom, and what they need. docs/static_encoders.md has a test of its own: its blocks
# need a model.
RUN_PAGES = {
    "rotation.md": [],
    "plans.md": [],
    "pytorch.md": ["torch"],
    "disk.md": [],
    "changing.md": [],
    "bridges.md": ["torchrec", "onnxruntime", "onnxscript"],
    "compare.md": [],
    "recommender.md": ["torch"],
    "language_models.md": ["torch", "transformers"],
    "researchers.md": [],
}


@pytest.mark.parametrize("page", RUN_PAGES)
def test_python_of_other_pages_does_so_too(tmp_path, monkeypatch, capsys, page):
    for package in RUN_PAGES[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks("python", (ROOT / "docs" / page).read_text()):
        run_and_compare(code, page, names, capsys)


def test_the_command_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_safetensors(tmp_path, Arrays({"user_emb.weight": np.ones((50, 64), np.float32)}))
    rows = pa.array([[0.5] * 64, [0.25] * 64], pa.list_(pa.float32()))
    changed = pa.table({"table_fqn": ["user_emb"] * 2, "key_id": [7, 3], "embedding": rows})
    pq.write_table(changed, tmp_path / "deltas.parquet")
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("embpack ")]
    assert {shlex.split(line)[1] for line in lines} == {"compare", "quantize", "inspect", "dequantize", "update"}
    for line in lines:
        done = run_embpack(*shlex.split(line, comments=True)[1:])
        assert done.returncode == 0, (line, done.stderr)


# The blocks that CI runs


def ci_block(name: str) -> str:
    [block] = re.findall(rf"^<!-- ci: {name} -->\n```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return block


CI_RUN = (ROOT / ".ci" / "run").read_text()


def test_ci_runs_the_blocks_that_there_are():
    named = re.findall(r"^<!-- ci: (\w+) -->$", README, re.MULTILINE)
    assert sorted(re.findall(r'\$\(readme_command (\w+)\)"$', CI_RUN, re.MULTILINE)) == sorted(named)
    assert named == ["install", "manual", "test"]


@pytest.mark.parametrize("name", ["install", "manual", "test"])
def test_ci_finds_the_whole_block(name):
    [function] = re.findall(r"^readme_command\(\) \{\n.*?^\}$", CI_RUN, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", f"{function}\nreadme_command {name}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ci_block(name)


def test_the_blocks_install_and_test():
    assert ".venv/bin/pip install ." in ci_block("install").splitlines()
    assert ".venv/bin/pip install 'embpack[test]'" in ci_block("test").splitlines()
    assert ".venv/bin/python -m pytest -n auto --dist worksteal" in ci_block("test").splitlines()


# Arithmetic


@pytest.mark.parametrize(("embedding_dim", "percent"), [(32, "15.62"), (64, "14.06"), (72, "13.89"), (128, "13.28")])
def test_the_share_of_float32_is_what_is_claimed(embedding_dim, percent):
    assert f"{100 * RowFormat(embedding_dim).row_bytes / (4 * embedding_dim):.2f}" == percent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shares_on_the_pages_are_right(page):
    """Wherever a page says "12.34 % at d=56", of float32 at 4 bits."""
    wrong = [
        (percent, dim)
        for percent, dim in re.findall(r"([\d.]+) % at d ?= ?(\d+)", page.read_text())
        if f"{100 * RowFormat(int(dim)).row_bytes / (4 * int(dim)):.2f}" != percent
    ]
    assert wrong == []


@pytest.mark.parametrize("embedding_dim", [1, 2, 63, 64])
def test_a_row_has_the_bytes_that_are_described(embedding_dim):
    assert "`ceil(embedding_dim / 2)` bytes of codes, low nibble first, then scale and bias as float16" in " ".join(
        MANUAL["checkpoints"].split()
    )
    assert RowFormat(embedding_dim).row_bytes == -(-embedding_dim // 2) + 2 * 2


# Links


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are files of ours."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    return [target.partition("#")[0] for target in targets if not re.match(r"https?:|mailto:|#", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_is_there(page):
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_readme_links_the_other_pages():
    pages = {"docs/format.md", "docs/kernels.md", "docs/design.md", "docs/reliability.md", "CONTRIBUTING.md"}
    assert pages <= set(links(ROOT / "README.md"))


def test_the_manual_names_every_method_and_every_file_format():
    assert [name for name in METHODS if f"`{name}`" not in MANUAL["methods"]] == []
    assert [suffix for suffix in FORMATS if suffix not in MANUAL["checkpoints"]] == []


def test_the_tests_that_pages_name_are_there():
    named = [name for page in PAGES for name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text())]
    sources = {path: (ROOT / path).read_text() for path, _ in named if (ROOT / path).exists()}
    assert [(path, name) for path, name in named if f"def {name}(" not in sources.get(path, "")] == []
    assert len(named) > 50


def test_the_map_of_contributing_is_right():
    [tree] = [block for block in blocks("", (ROOT / "CONTRIBUTING.md").read_text()) if "src/embpack/" in block]
    outer, missing = Path(), []
    for line in tree.splitlines():
        # Names, with a comma between them, up to two spaces; names in a folder are indented under it.
        indent, names = re.match(r"( *)([^\s,]+(?:, [^\s,]+)*)", line).groups()
        paths = [(outer if indent else Path()) / name for name in names.split(", ")]
        missing += [str(path) for path in paths if not (ROOT / path).exists()]
        if not indent:
            outer = paths[0]
    assert missing == []

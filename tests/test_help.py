"""What helps: help that reads well at 80 columns, suggestions for what is mistyped, completion in a shell."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors

import embpack
from embpack import _native
from embpack.cli import options
from embpack.files import FORMAT_VERSION
from embpack.methods import METHODS

COMMANDS = ("quantize", "compare", "methods", "inspect", "dequantize", "update", "demo")


def flat(text: str) -> str:
    """Text without frames and line ends."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def model(tmp_path):
    names = [f"model.towers.t_cat_{i}_emb.weight" for i in range(12)]
    return write_safetensors(tmp_path, Arrays({name: np.ones((40, 16), np.float32) for name in names}))


@pytest.fixture
def help_of(monkeypatch, embpack_command):
    """Returns the lines of a help at 80 columns."""

    def read(*command):
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = embpack_command(*command, "--help")
        assert code == 0
        return out.splitlines()

    return read


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_and_is_short(help_of, command):
    lines = help_of(*([command] if command else []))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 80
    # An option is explained in at most five lines, its default among them.
    starts = [i for i, line in enumerate(lines) if re.match(r"│ [* ]{0,5}(--\w|[A-Z]{3}\w* )", line)]
    ends = [i for i, line in enumerate(lines) if line.startswith("╰")]
    assert starts or command == ""
    for start in starts:
        assert min(end for end in [*starts, *ends] if end > start) - start <= 5, lines[start]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_flags_look_like_flags_and_values_have_names(help_of, command):
    text = "\n".join(help_of(*([command] if command else [])))
    assert "bool" not in text
    for kind in ("<str>", "<list", "<float>", "<int"):
        assert not re.search(rf"--[\w-]+ +{kind}", text)
    for flag in re.findall(r"--(?:json|auto|force|dry-run|verify|help|version|debug)\b.*", text):
        assert not re.match(r"--[\w-]+ +[A-Z]{2,} ", flag), flag


def test_the_flags_of_quantize_are_in_groups(help_of):
    text = "\n".join(help_of("quantize"))
    panels = dict(re.findall(r"╭─ (\w+) ─+╮\n(.*?)╰", text, re.DOTALL))
    assert list(panels) == ["Arguments", "What", "How", "Limits", "Output"]
    for panel, names in {
        "What": ("--include", "--exclude"),
        "How": ("--method", "--bits", "--param-dtype", "--rotate", "--set", "--auto", "--access-counts"),
        "Limits": ("--max-bytes", "--max-loss", "--readable-by"),
        "Output": ("--dry-run", "--force", "--json", "--threads", "--help"),
    }.items():
        assert [option for option in names if not re.search(rf"^│ {option} ", panels[panel], re.MULTILINE)] == []


def test_help_says_where_the_methods_are_and_what_codes_mean(help_of):
    assert "embpack methods" in "\n".join(help_of("quantize"))
    assert "embpack demo makes a checkpoint" in flat("\n".join(help_of()))
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a table loses more than" in flat("\n".join(help_of()))


def test_the_version_says_what_it_runs_on(embpack_command):
    code, out, _ = embpack_command("--version")
    assert code == 0
    assert re.fullmatch(
        rf"embpack {re.escape(importlib.metadata.version('embpack'))} \(file format {FORMAT_VERSION}, {_native.isa()}, "
        rf"NumPy {re.escape(np.__version__)}, Python 3\.[\d.]+\w*\)\n",
        out,
    )


def test_python_m_embpack(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "embpack", "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.startswith(f"embpack {embpack.__version__} (")
    done = subprocess.run(
        [sys.executable, "-m", "embpack", "inspect", "none.safetensors"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "no such file" in done.stderr


# Suggestions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "No such command 'quantise'. Did you mean 'quantize'"),
        (["method"], "Did you mean 'methods'"),
        (["quantize", "model", "--metod", "asym"], "--method"),
        (["quantize", "model", "--dry-run", "--method", "trelis"], "did you mean 'trellis'? Choose one of asym,"),
        (["quantize", "model", "--dry-run", "--set", "*=trelis"], "did you mean 'trellis'? Choose one of asym,"),
        (["compare", "model", "--methods", "asym,k-means"], "did you mean 'kmeans'? Choose one of asym,"),
        (["quantize", "model", "p", "--auto", "--max-bytes", "12.5"], "write '12.5 %'"),
        (["quantize", "model", "p", "--auto", "--max-bytes", "2 PB"], "a size such as '100 KiB' or '2 GB'"),
    ],
)
def test_wrong_usage_gets_a_suggestion(embpack_command, arguments, message):
    code, out, err = embpack_command(*arguments)
    assert (code, out) == (2, "")
    assert message in flat(err)


@pytest.mark.parametrize("option", ["--include", "--exclude", "--set"])
def test_a_glob_of_a_part_of_names_gets_the_one_of_whole_names(embpack_command, model, option):
    pattern = "t_cat_1*=asym" if option == "--set" else "t_cat_1*"
    code, _, err = embpack_command("quantize", model, "--dry-run", option, pattern)
    assert code == 1
    assert "a glob matches whole names: '*t_cat_1*' matches 3" in err


def test_a_mistyped_name_gets_those_most_like_it(embpack_command, tmp_path, model):
    code, _, err = embpack_command("quantize", model, "--dry-run", "--include", "model.towers.t_cta_7_emb.weight")
    assert code == 1 and "nearest: model.towers.t_cat_7_emb.weight, " in err


def test_a_mistyped_column_gets_those_most_like_it(embpack_command, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    vectors = arrow.array(np.ones((20, 8), np.float32).tolist(), arrow.list_(arrow.float32(), 8))
    parquet.write_table(arrow.table({"title": ["a"] * 20, "vector": vectors}), tmp_path / "items.parquet")
    code, _, err = embpack_command("quantize", tmp_path / "items.parquet", "--dry-run", "--include", "vetcor")
    assert code == 1 and "nearest: vector; left out: column 'title'" in err


# Completion


def complete(*words, shell="bash"):
    """What a shell is told when a user asks how the last word may go on."""
    line = " ".join(("embpack", *words))
    environment = {"_EMBPACK_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    environment |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = Path(sys.executable).with_name("embpack")
    done = subprocess.run([command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


def test_commands_methods_and_options_complete():
    assert complete("met").split() == ["methods"]
    assert complete("quantize", "m", "p", "--method", "asym,greedy-").split() == [
        "asym,greedy-paper",
        "asym,greedy-opt",
    ]
    assert complete("quantize", "m", "p", "--max-").split() == ["--max-bytes", "--max-loss", "--max-shard-size"]
    assert complete("quantize", "mod") == "\n"  # nothing of ours: the shell completes names of files


def test_values_complete():
    def names(completions):
        return [name for name, _ in completions]

    assert options.complete_methods("") == [(name, method.summary) for name, method in METHODS.items()]
    assert names(options.complete_methods("trellis,hist")) == ["trellis,hist-apprx", "trellis,hist-brute"]
    assert names(options.complete_readers("torch")) == ["torch", "torchrec"]
    assert names(options.complete_rotations("")) == ["none", "hadamard"]
    assert names(options.complete_param_dtype("float3")) == ["float32"]
    assert names(options.complete_bits("2,")) == ["2,2", "2,4", "2,8"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_what_methods_are(shell):
    told = complete("methods", "trel", shell=shell)
    assert "trellis" in told and "uniform rows" in told


def run_bash(script):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--norc", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )


def test_bash_completes_with_what_show_completion_prints():
    script = """
eval "$(embpack --show-completion)"
COMP_WORDS=(embpack methods trel) COMP_CWORD=2
_embpack_completion embpack
echo "${COMPREPLY[@]}"
complete -p embpack
"""
    done = run_bash(script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["trellis", "complete -o default -F _embpack_completion embpack"]


@pytest.mark.parametrize(
    ("shell", "line"),
    [("bash", "complete -o default"), ("zsh", "#compdef embpack"), ("fish", "complete --command embpack")],
)
def test_the_script_of_each_shell(shell, line):
    done = run_bash(f"_EMBPACK_COMPLETE=source_{shell} embpack")
    assert done.returncode == 0 and line in done.stdout

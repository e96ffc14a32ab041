"""The command line: what is printed where, exit codes, and that it does what the library does."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    Arrays,
    names_in,
    read_raw,
    run_embpack,
    run_python,
    write_npy,
    write_npz,
    write_safetensors,
    write_shards,
)
from golden.make import PACKED

import embpack
from embpack import formats
from embpack.cli import compare, plans, show
from embpack.methods import METHODS
from embpack.samples import make_table
from embpack.text import printable


def flat(text: str) -> str:
    """Text without the frames and line ends of a panel."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def make_arrays():
    rng = np.random.default_rng(0)
    return Arrays(
        {
            "user_emb.weight": rng.standard_normal((1500, 72), dtype=np.float32),
            "item_emb.weight": rng.standard_normal((40, 16)).astype(np.float16),
        },
        {"linear.weight": rng.standard_normal((8, 24), dtype=np.float32), "bias": np.ones(8, np.float32)},
    )


@pytest.fixture
def model(tmp_path):
    return write_safetensors(tmp_path, make_arrays())


@pytest.fixture
def packed(tmp_path, model):
    embpack.quantize_file(model, tmp_path / "packed.safetensors")
    return tmp_path / "packed.safetensors"


@pytest.fixture
def altered(packed):
    content = bytearray(packed.read_bytes())
    content[content.index(read_raw(packed).tensors["user_emb.weight"].payload) + 700] ^= 1
    packed.write_bytes(content)
    return packed


# As users run it


def test_a_success_exits_0_and_keeps_stderr_empty(tmp_path, model):
    done = run_embpack("quantize", model, tmp_path / "p.safetensors")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "user_emb.weight" in done.stdout
    assert set(embpack.load(tmp_path / "p.safetensors", verify=True)) == set(make_arrays().tables)


def test_auto_packs_what_another_method_would_not_make_smaller(tmp_path, embpack_command):
    weight = np.random.default_rng(0).standard_normal((200, 8), dtype=np.float32)
    src, dst = tmp_path / "user_embedding.npy", tmp_path / "p.safetensors"
    np.save(src, weight)
    code, _, _ = embpack_command("quantize", src, dst, "--auto", "--method", "kmeans")
    assert code == 0 and list(embpack.load(dst)) == ["user_embedding"]


def test_auto_looks_at_the_destination_before_it_measures(tmp_path, embpack_command, monkeypatch):
    monkeypatch.setattr(plans, "plan_checkpoint", lambda *_, **__: pytest.fail("it measured before it looked"))
    src = write_shards(tmp_path, make_arrays())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = embpack_command("quantize", src, tmp_path / "full", "--auto")
    assert code == 1
    assert "full is a folder that is not empty, and nothing says that embpack wrote file; choose another name" in err
    code, _, err = embpack_command("quantize", write_safetensors(tmp_path, make_arrays()), tmp_path / "x.pt", "--auto")
    assert code == 1
    assert "a packed checkpoint ends in .safetensors" in err


@pytest.mark.parametrize("options", [(), ("--auto",)])
def test_a_checkpoint_is_opened_once(tmp_path, monkeypatch, embpack_command, model, options):
    opened = []

    def open_once(path):
        opened.append(path)
        return formats.open_checkpoint(path)

    for module in ("cli.quantize", "convert", "planning.planner"):
        monkeypatch.setattr(f"embpack.{module}.open_checkpoint", open_once)
    code, _, _ = embpack_command("quantize", model, tmp_path / "p.safetensors", *options)
    assert code == 0 and opened == [model]


def test_a_failure_exits_1_with_one_line_on_stderr(tmp_path):
    missing = tmp_path / "missing.safetensors"
    done = run_embpack("quantize", missing, tmp_path / "p.safetensors")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"error: {re.escape(str(missing))}: no such file; [^\n]+\n", done.stderr)


def test_wrong_usage_exits_2(model):
    done = run_embpack("quantize", model)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "give a destination, or --dry-run" in flat(done.stderr)


def test_debug_shows_the_traceback(tmp_path):
    done = run_embpack("--debug", "inspect", tmp_path / "missing.safetensors")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "FileNotFoundError" in done.stderr
    done = run_embpack("--debug", "inspect", tmp_path / "\x1b[31mmissing.safetensors")
    assert r"\x1b[31mmissing.safetensors: no such file" in done.stderr and "\x1b" not in done.stderr


def test_a_demo_removes_what_one_that_was_killed_left(tmp_path):
    code = """
import os, signal, sys
from embpack.cli import demo
demo.make_checkpoint = lambda _: os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "kill" else sys.exit(3)
demo.demo()
"""
    for argument, code_at_end, number_left in (("kill", -signal.SIGKILL, 1), ("exit", 3, 0)):
        done = run_python(code, argument, TMPDIR=str(tmp_path))
        assert done.returncode == code_at_end, done.stderr
        assert len(names_in(tmp_path)) == number_left


def test_demo_needs_no_torch():
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyarrow", "ml_dtypes"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
sys.argv = ["embpack", "demo"]
from embpack.cli import main, show
main()
"""
    done = run_python(code, COLUMNS="200", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert "user_embedding.weight" in done.stdout
    for method in METHODS:
        assert re.search(rf"^{method} +0\.\d{{5}} ", done.stdout, re.MULTILINE), method


@pytest.mark.parametrize(("suffix", "package"), [(".pt", "torch"), (".parquet", "(pyarrow|parquet)")])
def test_a_missing_extra_says_how_to_install_it(tmp_path, suffix, package):
    (tmp_path / f"model{suffix}").write_bytes(b"something")
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyarrow"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
sys.argv = ["embpack", "quantize", sys.argv[1], "--dry-run"]
from embpack.cli import main, show
main()
"""
    done = run_python(code, tmp_path / f"model{suffix}")
    assert done.returncode == 1
    assert re.search(rf"pip install '.*{package}.*'", done.stderr)
    assert "Traceback" not in done.stderr


# quantize


def test_quantize_prints_plan_and_report(embpack_command, tmp_path, model):
    code, out, err = embpack_command("quantize", model, tmp_path / "p.safetensors")
    assert (code, err) == (0, "")
    assert f"Plan for {model}" in out
    assert re.search(r"^user_emb\.weight +1,500 x 72 +float32 +name says embedding$", out, re.MULTILINE)
    assert "copied: linear.weight (name does not say embedding)\n" in out
    # Rows of 72 float32 are 288 bytes; packed 36 + 4.
    loss = embpack.quantize(make_arrays().tables["user_emb.weight"]).loss
    row = rf"user_emb\.weight +1,500 +72 +432\.0 kB +60\.0 kB +13\.89 % +{loss:.5f} +[\d.]+( [kMG])?\n"
    assert re.search(row, out)
    size = (tmp_path / "p.safetensors").stat().st_size
    assert re.search(rf"-> {size / 1000:.1f} kB \({100 * size / model.stat().st_size:.2f} %\)", out)
    assert "2 other tensors copied" in out


def test_quantize_prints_json(embpack_command, tmp_path, model):
    code, out, err = embpack_command("quantize", model, tmp_path / "p.safetensors", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    tables = {table["name"]: table for table in report["tables"]}
    user = tables["user_emb.weight"]
    assert (user["weight_bytes"], user["packed_bytes"]) == (1500 * 288, 1500 * 40)
    assert user["loss"] == embpack.quantize(make_arrays().tables["user_emb.weight"]).loss
    assert user["rows_per_second"] == 1500 / user["seconds"]
    assert tables["item_emb.weight"]["dtype"] == "float16"
    assert {tensor["name"] for tensor in report["other_tensors"]} == {"linear.weight", "bias"}
    assert report["left_out"] == []
    assert report["totals"]["destination_bytes"] == (tmp_path / "p.safetensors").stat().st_size


@pytest.mark.parametrize("destination", [[], ["p.safetensors"]])
def test_a_dry_run_writes_nothing(embpack_command, tmp_path, monkeypatch, model, destination):
    monkeypatch.chdir(tmp_path)
    code, out, err = embpack_command("quantize", model, *destination, "--dry-run")
    assert (code, err) == (0, "")
    row = r"^item_emb\.weight +40 x 16 +float16 +optimal +4 +1,280 +480 +name says embedding$"  # 8 + 4 bytes a row
    assert re.search(row, out, re.MULTILINE)
    assert "with scales, with at least 16 rows, that gets smaller" in flat(out)
    assert "--include" in out
    assert names_in(tmp_path) == {model.name}


def test_a_dry_run_prints_json(embpack_command, tmp_path, model):
    code, out, _ = embpack_command("quantize", model, "--dry-run", "--json", "--bits", 8)
    tables = {table["name"]: table for table in json.loads(out)["tables"]}
    assert code == 0
    user = tables["user_emb.weight"]
    assert (user["method"], user["bits"], user["num_embeddings"]) == ("optimal:effort=normal", 8, 1500)
    assert (user["weight_bytes"], user["packed_bytes"]) == (1500 * 288, 1500 * (72 + 8))
    assert set(tables) == set(make_arrays().tables)
    assert names_in(tmp_path) == {model.name}


def test_a_dry_run_says_why_a_table_is_not_packed(embpack_command, tmp_path):
    weight = np.ones((40, 8))
    src = write_npz(tmp_path, Arrays({"a_emb": weight, "b_emb": weight.astype(np.float32)}))
    _, out, _ = embpack_command("quantize", src, "--dry-run")
    assert "copied: a_emb (F64, not float32, float16 or bfloat16)\n" in out


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ([], {"user_emb.weight", "item_emb.weight"}),
        (["--include", "linear.*"], {"user_emb.weight", "item_emb.weight", "linear.weight"}),
        (["--exclude", "user*"], {"item_emb.weight"}),
        (["--exclude", "user*", "--exclude", "item*", "--include", "lin*"], {"linear.weight"}),
        (["--include", "*", "--exclude", "*.weight", "--include", "user*"], None),
    ],
)
def test_include_and_exclude(embpack_command, tmp_path, model, options, packed):
    code, _, err = embpack_command("quantize", model, tmp_path / "p.safetensors", "--method", "asym", *options)
    if packed is None:
        assert code == 1
        assert "include '*' only matches" in err
        assert names_in(tmp_path) == {model.name}
    else:
        assert code == 0
        assert set(embpack.load(tmp_path / "p.safetensors")) == packed


@pytest.mark.parametrize(
    ("options", "row_bytes"),
    [
        (["--bits", "2"], 18 + 4),
        (["--bits", "4"], 36 + 4),
        (["--bits", "8"], 72 + 8),
        (["--bits", "8", "--param-dtype", "float16"], 72 + 4),
        (["--param-dtype", "float32"], 36 + 8),
    ],
)
def test_bits_and_param_dtype(embpack_command, tmp_path, model, options, row_bytes):
    code, _, _ = embpack_command("quantize", model, tmp_path / "p.safetensors", *options, "--method", "asym")
    assert code == 0
    assert embpack.load(tmp_path / "p.safetensors")["user_emb.weight"].row_bytes == row_bytes


@pytest.mark.parametrize("method", [*METHODS, "greedy:b=100,r=0.2"])
def test_every_method(embpack_command, tmp_path, model, method):
    code, _, _ = embpack_command("quantize", model, tmp_path / "p.safetensors", "--method", method)
    expected = embpack.quantize(make_arrays().tables["user_emb.weight"], method)
    table = embpack.load(tmp_path / "p.safetensors")["user_emb.weight"]
    assert code == 0
    assert table.method == expected.method
    assert table.packed.tobytes() == expected.packed.tobytes()


def test_threads(embpack_command, tmp_path, model, restore_threads):
    code, _, _ = embpack_command("quantize", model, tmp_path / "p.safetensors", "--threads", "1")
    assert code == 0
    assert embpack.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "best"], "there is no method 'best'; choose one of " + ", ".join(METHODS)),
        (["--method", "greedy:x=1"], "method 'greedy' has no parameter 'x'; it has: b, r"),
        (["--method", "greedy:b=many"], "b is 'many', which is not a whole number"),
        (["--bits", "3"], "3; choose 2, 4 or 8"),
        (["--bits", "four"], "Invalid value for '--bits'"),
        (["--param-dtype", "float64"], "'float64'; choose float16 or float32"),
        (["--param-dtype", "float16", "--method", "trellis"], "param_dtype is 'float16'; the trellis layout has"),
        (["--auto", "--max-bytes", "much"], "'much' is no size; give bytes, 1e5, or a size such as"),
        (["--max-loss", "0"], "0.0; give a positive, finite number"),
        (["--max-loss", "nan"], "nan; give a positive, finite number"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--nonsense"], "No such option: --nonsense"),
    ],
)
def test_wrong_options_exit_2_and_name_the_choices(embpack_command, tmp_path, model, options, message):
    code, out, err = embpack_command("quantize", model, tmp_path / "p.safetensors", *options)
    assert (code, out) == (2, "")
    assert message in flat(err)
    assert names_in(tmp_path) == {model.name}


@pytest.mark.parametrize(
    ("dst", "message"),
    [
        ("model.safetensors", "the destination is the source"),
        ("packed.npz", "a packed checkpoint ends in .safetensors"),
        ("missing/packed.safetensors", "does not exist; create it first"),
    ],
)
def test_wrong_destinations_exit_1(embpack_command, tmp_path, model, dst, message):
    code, _, err = embpack_command("quantize", model, tmp_path / dst)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert names_in(tmp_path) == {model.name}


def test_quantize_names_a_nan(embpack_command, tmp_path):
    weight = np.ones((40, 16), np.float32)
    weight[33, 5] = np.nan
    src = write_npy(tmp_path, Arrays({"vectors": weight}))
    code, _, err = embpack_command("quantize", src, tmp_path / "p.safetensors")
    assert code == 1
    assert err == f"error: {src}: vectors[33, 5] is nan; NaN and infinity cannot be packed, replace them first\n"
    code, _, err = embpack_command("compare", src, "--methods", "asym")
    assert code == 1
    assert err == f"error: {src}: vectors[33, 5] is nan; NaN and infinity cannot be packed, replace them first\n"


def test_max_loss_refuses_and_writes_nothing(embpack_command, tmp_path, model):
    loss = embpack.quantize(make_arrays().tables["user_emb.weight"]).loss
    code, _, err = embpack_command("quantize", model, tmp_path / "p.safetensors", "--max-loss", "0.08")
    assert code == 3
    assert err.startswith(
        f"error: {model}: 1 of 2 tables loses more than the limit of 0.08, so nothing was written; use a better method "
        "or more bits, leave it as it is with --exclude user_emb.weight, or raise the limit; "
    )
    assert err.endswith(f"\n  {loss:.6g}  user_emb.weight\n")
    assert names_in(tmp_path) == {model.name}


def test_max_loss_lets_better_tables_through(embpack_command, tmp_path, model):
    code, out, err = embpack_command("quantize", model, tmp_path / "p.safetensors", "--max-loss", "0.2", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["tables"]) == 2


def test_what_is_left_out_is_shown(embpack_command, tmp_path):
    np.savez(tmp_path / "model.npz", emb=np.ones((40, 8), np.float32), words=np.array(["a", "b"]))
    code, out, _ = embpack_command("quantize", tmp_path / "model.npz", "--dry-run")
    assert code == 0
    assert re.search(r"^left out: array 'words' \(.+\)$", out, re.MULTILINE)


@pytest.mark.parametrize("name", ["[red]emb", "emb[/]", "[bold]:smile:emb", "emb\\[x]"])
def test_names_are_printed_as_they_are(embpack_command, tmp_path, name):
    arrays = Arrays({name: np.ones((40, 64), np.float32)})
    folder = tmp_path / "[dim]folder"
    folder.mkdir()
    src, dst = write_safetensors(folder, arrays), folder / "[b]packed.safetensors"
    for command in (
        ["quantize", src, dst, "--include", "*"],
        ["compare", src, "--include", "*", "--methods", "asym", "--html", folder / "[b]report.html"],
        ["inspect", dst],
        ["dequantize", dst, folder / "plain.pt"],
    ):
        code, out, err = embpack_command(*command)
        assert (code, err) == (0, "")
        assert name in out
        assert "[dim]folder" in out
    _, out, _ = embpack_command("inspect", dst, "--json")
    assert [table["name"] for table in json.loads(out)["tables"]] == [name]
    _, _, err = embpack_command("inspect", folder / f"{name.replace('/', '')}.safetensors")
    assert f"[dim]folder/{name.replace('/', '')}.safetensors: no such file" in err


NASTY = {
    "color": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "clear screen": "\x1b[2J\x1b[H",
    "forged line": "a\nerror: forged",
    "carriage return": "a\rb",
    "C1": "\x9b31m",
    "DEL": "a\x7f",
    "direction": "\u202etxet\u2066 \u2069",
    "line separator": "a\u2028b\u2029c\x85d",
    "markup": "[red]:smile:[bold]",
    "tags": "<b>&amp;",
}


def check_printed(*texts):
    """What was printed has nothing but characters to look at, and no line that is not ours."""
    for text in texts:
        assert [c for c in text if not c.isprintable() and c != "\n"] == []
        assert not any(line.startswith("error: forged") for line in text.split("\n"))


@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY)
def test_no_name_does_anything_to_a_terminal(embpack_command, tmp_path, nasty):
    folder = tmp_path / nasty
    folder.mkdir()
    name, odd = f"{nasty}_emb", f"{nasty}_{nasty}.weight"
    arrays = Arrays({name: make_arrays().tables["item_emb.weight"]}, {odd: np.ones((20, 8), np.float32)})
    src, dst = write_safetensors(folder, arrays), folder / "packed.safetensors"
    for command in (
        ["quantize", src, dst],
        ["quantize", src, dst, "--auto"],
        ["quantize", src, "--dry-run"],
        ["compare", src, "--methods", "asym", "--html", folder / "report.html"],
        ["inspect", dst, "--verify"],
        ["dequantize", dst, folder / "plain.npz"],
    ):
        code, out, err = embpack_command(*command)
        assert (code, err) == (0, "")
        assert printable(name) in out and printable(folder) in out
        check_printed(out)
    _, out, _ = embpack_command("inspect", dst, "--json")
    assert [table["name"] for table in json.loads(out)["tables"]] == [name]
    assert out.isascii()
    check_printed(out)
    page = (folder / "report.html").read_text()
    check_printed(page.replace("\xa0", " "))
    assert "<b>" not in page
    for command in (
        ["quantize", src, dst, "--exclude", nasty],
        ["quantize", src, dst, "--include", "\x1b[31m"],
        ["quantize", src, dst, "--auto", "--access-counts", folder / "none.json"],
        ["quantize", src, folder / "no" / "packed.safetensors"],
        ["quantize", src, src],
        ["quantize", src, folder / "packed.npz"],
        ["compare", dst],
        ["inspect", src],
        ["inspect", folder / "none.safetensors"],
        ["dequantize", dst, folder / "plain.xyz"],
        ["dequantize", dst, folder / "plain.npz"],
    ):
        code, out, err = embpack_command(*command)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
        assert printable(folder) in err
        check_printed(out, err)


def test_what_a_file_says_of_itself_is_escaped(embpack_command, tmp_path):
    table = embpack.quantize(make_arrays().tables["user_emb.weight"])
    packed = embpack.PackedTable(table.packed, table.row_format, "float32", "\x1b[31masym\nerror: forged")
    embpack.save(tmp_path / "p.safetensors", {"emb": packed})
    code, out, _ = embpack_command("inspect", tmp_path / "p.safetensors")
    assert code == 0 and r"\x1b[31masym\nerror: forged" in out
    check_printed(out)


def test_a_progress_bar_shows_names_that_can_be_seen(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(show, "errors", show.Printer(file=terminal, force_terminal=True, width=100))
    with show.row_progress({"[red]\x1b]0;owned\x07": 3}, shown=True) as progress:
        progress("[red]\x1b]0;owned\x07", 2)
    assert r"[red]\x1b]0;owned\x07" in terminal.getvalue() and "\x1b]" not in terminal.getvalue()


@pytest.mark.filterwarnings("default:.*look")
def test_warnings_are_lines_on_stderr(embpack_command, monkeypatch, tmp_path, model):
    def warn(*args, **kwargs):
        warnings.warn("\x1b[31mlook\nout", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("embpack.cli.quantize.pack_checkpoint", warn)
    code, _, err = embpack_command("quantize", model, tmp_path / "p.safetensors")
    assert (code, err) == (1, "warning: \\x1b[31mlook\\nout\nerror: enough\n")


# Streams that take nothing, or not everything


def run_in_shell(command, *args):
    """Run embpack in a shell; command has a place for it."""
    program = " ".join(["embpack", *map(str, args)])
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return subprocess.run(
        ["bash", "-c", command.format(program)], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("closing", ["{} >&-", "{} <&- >&- 2>&-"])
def test_closed_streams_are_no_failure(tmp_path, model, closing):
    dst = tmp_path / "p.safetensors"
    for code, args in ((0, ["quantize", model, dst]), (0, ["--help"]), (1, ["inspect", "none"]), (2, ["nonsense"])):
        done = run_in_shell(closing, *args)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert set(embpack.load(dst, verify=True)) == set(make_arrays().tables)


@pytest.mark.parametrize("args", [["--help"], ["inspect", "{dst}"], ["dequantize", "{dst}", "{dst}.npz", "--json"]])
def test_what_cannot_be_printed_names_the_stream(tmp_path, model, args):
    dst = tmp_path / "p.safetensors"
    assert run_in_shell("{}", "quantize", model, dst).returncode == 0
    done = run_in_shell("{} > /dev/full", *(arg.format(dst=dst) for arg in args))
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def run_unread(*args):
    """Run embpack while nobody reads what it prints."""
    command = [Path(sys.executable).with_name("embpack"), *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr as errors:
        return process.wait(120), errors.read()


def test_what_writes_a_file_does_so_though_nobody_reads_what_it_prints(tmp_path, model):
    dst, plain, page = (tmp_path / name for name in ("p.safetensors", "plain.npz", "page.html"))
    assert run_unread("quantize", model, dst) == (0, "")
    assert run_unread("dequantize", dst, plain, "--json") == (0, "")
    assert run_unread("compare", model, "--methods", "asym", "--html", page) == (0, "")
    assert names_in(tmp_path) == {model.name, dst.name, plain.name, page.name}
    assert set(embpack.load(dst, verify=True)) == set(make_arrays().tables)
    assert run_unread("quantize", tmp_path / "none.npy", dst)[0] == 1


def test_what_only_prints_ends_as_other_programs_of_a_shell_do(packed):
    for args in (["inspect", packed], ["inspect", packed, "--json"], ["--help"]):
        assert run_unread(*args) == (-signal.SIGPIPE, "")


def test_an_encoding_that_lacks_characters_is_no_failure(tmp_path):
    name = "été_emb"
    src = write_safetensors(tmp_path, Arrays({name: np.ones((40, 64), np.float32)}))
    dst = tmp_path / "packed.safetensors"
    for args in (
        ["quantize", src, dst, "--auto"],
        ["inspect", dst],
        ["compare", src, "--methods", "asym"],
        ["dequantize", dst, tmp_path / "plain.npz"],
    ):
        done = run_embpack(*args, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii() and r"\xe9t\xe9_emb" in done.stdout
    for args in (["--help"], ["quantize", "--help"]):
        done = run_embpack(*args, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and done.stdout.isascii() and "quantize" in done.stdout
    done = run_embpack("inspect", tmp_path / "où.safetensors", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and r"o\xf9.safetensors: no such file" in done.stderr


# compare


def test_compare_prints_tables_total_and_commands(embpack_command, tmp_path, model):
    code, out, err = embpack_command("compare", model, "--rows", "100")
    assert (code, err) == (0, "")
    assert "user_emb.weight: 1,500 rows of 72 float32 values, 100 of them measured, evenly spread" in out
    assert "item_emb.weight: 40 rows of 16 float16 values, all measured" in out
    assert "All 2 tables" in out
    for method in METHODS:
        param_dtype = "float32" if method == "trellis" else "float16"
        assert len(re.findall(rf"^\*? +{method} +{param_dtype} +\w+ +4 +\d\.\d{{5}} ", out, re.MULTILINE)) == 3
    assert re.search(r"^ *embpack quantize .*model-\S+-4bit\S*\.safetensors --method ", out, re.MULTILINE)
    assert out.count("(recommended)") == 1
    assert names_in(tmp_path) == {model.name}


def test_compare_prints_json_with_the_figures_of_quantize(embpack_command, model):
    options = ["--methods", "greedy:b=100,r=0.2,asym", "--bits", "2,4", "--param-dtype", "float16,float32"]
    code, out, err = embpack_command("compare", model, *options, "--rows", "all", "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    asked = list(itertools.product(["greedy:b=100,r=0.2", "asym"], [2, 4], ["float16", "float32"]))
    assert [(r["method"], r["bits"], r["param_dtype"]) for r in value["results"]] == asked * 2
    assert [(r["method"], r["bits"], r["param_dtype"]) for r in value["overall"]] == asked
    weights = make_arrays().tables
    for result in value["results"]:
        weight = weights[result["table"]]
        table = embpack.quantize(weight, result["method"], result["bits"], result["param_dtype"])
        assert (result["layout"], result["loss"]) == (table.layout, table.loss)
        assert result["bytes_per_row"] * len(weight) == table.nbytes
        assert result["share_of_float32"] == table.nbytes / (4 * weight.size)
        assert 0 <= result["worst_row"] < len(weight)
        assert result["worst_row_loss"] == max(result["row_losses"])
        assert result["rows_per_second"] > 0
    assert {table["name"]: table["rows_measured"] for table in value["tables"]} == {
        name: len(weight) for name, weight in weights.items()
    }
    assert (value["readers"], value["prefer"]) == ([], "loss")
    reason = value["recommended"].pop("reason")
    assert value["recommended"] in value["front"]
    assert reason.startswith("greedy:b=100,r=0.2 at 4 bits has the least loss in about the bytes of uniform rows of 4 ")


@pytest.mark.parametrize(
    ("rows", "measured"), [("100", 100), ("all", 1500), ("0", 1500), ("1", 1), ("1500", 1500), ("9999999", 1500)]
)
def test_compare_measures_as_many_rows_as_asked(embpack_command, model, rows, measured):
    options = ["--methods", "asym", "--exclude", "item*", "--rows", rows, "--json"]
    code, out, _ = embpack_command("compare", model, *options)
    assert code == 0
    assert [table["rows_measured"] for table in json.loads(out)["tables"]] == [measured]


def test_compare_measures_20000_rows_of_large_tables(embpack_command, tmp_path):
    src = write_npy(tmp_path, Arrays({"vectors": np.ones((20001, 8), np.float32)}))
    code, out, _ = embpack_command("compare", src, "--methods", "asym")
    assert code == 0
    assert "vectors: 20,001 rows of 8 float32 values, 20,000 of them measured, evenly spread" in out


def test_compare_writes_a_page(embpack_command, tmp_path, model):
    code, out, err = embpack_command("compare", model, "--html", tmp_path / "report.html")
    assert (code, err) == (0, "")
    assert f"The page with pictures is {tmp_path / 'report.html'}" in out
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert names_in(tmp_path) == {model.name, "report.html"}


def test_compare_writes_pictures_and_rows(embpack_command, tmp_path, model):
    pytest.importorskip("matplotlib")
    names = {"--svg": "a.svg", "--png": "a.png", "--csv": "a.csv", "--html": "a.html"}
    options = [part for option, name in names.items() for part in (option, tmp_path / name)]
    code, out, err = embpack_command("compare", model, "--methods", "asym,trellis", *options)
    assert (code, err) == (0, "")
    assert all(f"is {tmp_path / name}\n" in out for name in names.values())
    assert names_in(tmp_path) == {model.name, *names.values()}
    starts = {"a.svg": b"<svg ", "a.png": b"\x89PNG", "a.csv": b"table,", "a.html": b"<!DOCTYPE html>"}
    assert all((tmp_path / name).read_bytes().startswith(start) for name, start in starts.items())
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * 2


@pytest.mark.parametrize(
    ("options", "said", "command"),
    [
        ([], "trellis at 4 bits has the least loss", "--method trellis --bits 4"),
        (
            ["--for", "fbgemm", "--for", "onnx"],
            "Of the ways that FBGEMM and ONNX Runtime can read, optimal at",
            "optimal",
        ),
        (["--prefer", "size"], "trellis at 3.5 bits takes the fewest bytes", "--method trellis --bits 3.5"),
        (["--prefer", "speed"], "optimal at 4 bits has the fastest lookups", "--method optimal --bits 4"),
    ],
)
def test_compare_recommends_by_readers_and_by_what_counts_most(
    embpack_command, tmp_path, monkeypatch, options, said, command
):
    # Which rows are looked up faster is measured, and a machine that does other work measures anything.
    monkeypatch.setattr(
        "embpack.comparison.array._time_lookups", lambda table: 2e7 if table.layout == "uniform" else 1e7
    )
    # So many rows that what all trellis-coded rows share is less than 1 % of them.
    src = write_npy(tmp_path, Arrays({"vectors": make_table(np.random.default_rng(0), 20_000, 64)}))
    asked = ["compare", src, "--methods", "optimal,trellis", "--bits", "3.5,4", "--rows", "400", *options]
    code, out, _ = embpack_command(*asked)
    assert code == 0
    recommended = out[out.index("Recommended:") : out.index("* least loss")]
    assert said in flat(recommended)
    assert command in recommended
    value = json.loads(embpack_command(*asked, "--json")[1])
    assert value["recommended"]["reason"].startswith(said)
    assert value["recommended"]["command"] in recommended
    assert value["prefer"] == (options[1] if "--prefer" in options else "loss")
    assert value["readers"] == (["fbgemm", "onnx"] if "--for" in options else [])


def test_compare_says_that_a_reader_reads_nothing(embpack_command, model):
    code, out, _ = embpack_command("compare", model, "--methods", "trellis", "--for", "fbgemm")
    assert code == 0
    assert "No way that was measured makes all of these tables smaller and is read by fbgemm." in out


def test_compare_into_pixels_needs_matplotlib_before_it_measures(embpack_command, tmp_path, model, monkeypatch):
    monkeypatch.setattr(compare, "compare_samples", lambda *_: pytest.fail("it measured before it looked"))
    monkeypatch.setattr("embpack.comparison.report.pictures.find_spec", lambda name: None)
    code, _, err = embpack_command("compare", model, "--png", tmp_path / "a.png")
    assert code == 1
    assert "a PNG picture needs matplotlib" in flat(err)
    assert names_in(tmp_path) == {model.name}


def test_compare_writes_no_two_files_over_each_other(embpack_command, tmp_path, model):
    options = ["--svg", tmp_path / "a.svg", "--csv", tmp_path / "b" / ".." / "a.svg"]
    code, _, err = embpack_command("compare", model, *options)
    assert code == 2
    assert "is what --svg writes; choose another name" in flat(err)


def test_compare_includes_and_excludes(embpack_command, model):
    options = ["--methods", "asym", "--include", "linear*", "--exclude", "user*"]
    code, out, _ = embpack_command("compare", model, *options, "--json")
    value = json.loads(out)
    assert code == 0
    assert {table["name"] for table in value["tables"]} == {"item_emb.weight", "linear.weight"}
    assert value["front"][0]["command"].endswith(" --include 'linear*' --exclude 'user*'")


def test_compare_says_what_a_method_does_not_support(embpack_command, tmp_path):
    weight = make_arrays().tables["user_emb.weight"]
    weight[700, 3] = 1e7
    src = write_npy(tmp_path, Arrays({"vectors": weight}))
    options = ["--methods", "asym", "--param-dtype", "float16,float32"]
    code, out, err = embpack_command("compare", src, *options)
    assert (code, err) == (0, "")
    assert "left out: asym at 4 bits with float16 parameters: vectors[700] has values from " in out
    _, out, _ = embpack_command("compare", src, *options, "--json")
    (skipped,) = json.loads(out)["skipped"]
    assert skipped.pop("reason").startswith("vectors[700] has values from ")
    assert skipped == {"table": "vectors", "method": "asym", "bits": 4, "param_dtype": "float16", "rotation": None}


def test_compare_of_tables_that_do_not_get_smaller(embpack_command, tmp_path):
    src = write_npy(tmp_path, Arrays({"v": np.ones((4, 1), np.float32)}))
    code, out, _ = embpack_command("compare", src, "--include", "*", "--html", tmp_path / "report.html")
    assert code == 0
    assert "No way that was measured makes all of these tables smaller." in out
    _, out, _ = embpack_command("compare", src, "--include", "*", "--json")
    assert json.loads(out)["recommended"] is None


def test_compare_fits_a_narrow_terminal(embpack_command, monkeypatch, model):
    monkeypatch.setattr(show.output, "_width", 80)
    code, out, _ = embpack_command("compare", model, "--exclude", "item*", "--rows", "100")
    table = out[: out.index("Recommended:")].splitlines()
    assert code == 0
    assert max(map(len, table[1:])) <= 80
    assert re.search(r"^ +asym +4 +0\.\d{5} +13\.89 % +\S+ \w +\S+ \w +all$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "best"], "there is no method 'best'; choose one of " + ", ".join(METHODS)),
        (["--methods", "asym,greedy:b=many"], "b is 'many', which is not a whole number"),
        (["--methods", ""], "there is no method ''"),
        (["--methods", "asym", "--bits", "3"], "bits is 3; choose 2, 4 or 8"),
        (["--bits", "4,four"], "bits is 'four'; give a number"),
        (["--rotate", "fourier"], "'fourier'; choose none, hadamard or none,hadamard"),
        (["--param-dtype", "float64"], "'float64'; choose float16, float32 or float16,float32"),
        (["--rows", "-1"], "'-1'; give a number of rows, or all"),
        (["--rows", "many"], "'many'; give a number of rows, or all"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--for", "faiss"], "there is no reader 'faiss'; choose one of torch, fbgemm, torchrec, onnx"),
        (["--prefer", "luck"], "'luck'; choose loss or size or speed"),
    ],
)
def test_wrong_options_of_compare_exit_2(embpack_command, model, options, message):
    code, out, err = embpack_command("compare", model, *options)
    assert (code, out) == (2, "")
    assert message in flat(err)


def test_compare_of_what_cannot_be_packed_exits_1(embpack_command, tmp_path, packed):
    code, _, err = embpack_command("compare", packed)
    assert code == 1
    assert "is packed already" in err
    code, _, err = embpack_command("compare", tmp_path / "missing.npy")
    assert code == 1
    assert "no such file" in err


def test_compare_writes_a_page_of_names_that_are_no_text(embpack_command, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.npy")
    with path.open("wb") as file:
        np.save(file, np.ones((20, 8), np.float32))
    page = tmp_path / "page.html"
    assert embpack_command("compare", path, "--methods", "asym", "--html", page, "--json")[0] == 0
    assert "caf\\udce9" in page.read_text()


def test_compare_into_a_folder_that_is_not_there_exits_1(embpack_command, tmp_path, model, monkeypatch):
    monkeypatch.setattr(compare, "compare_samples", lambda *_: pytest.fail("it measured before it looked"))
    code, _, err = embpack_command("compare", model, "--methods", "asym", "--html", tmp_path / "no" / "report.html")
    assert code == 1
    assert "does not exist; create it first" in err


def test_compare_does_not_write_its_page_over_the_checkpoint(embpack_command, model):
    before = model.read_bytes()
    code, _, err = embpack_command("compare", model, "--methods", "asym", "--html", model)
    assert code == 2
    assert "is the checkpoint; choose another name" in flat(err)
    assert model.read_bytes() == before


# inspect


def test_inspect_prints_a_table(embpack_command, packed):
    code, out, err = embpack_command("inspect", packed)
    assert (code, err) == (0, "")
    loss = embpack.load(packed)["user_emb.weight"].loss
    assert re.search(
        r"user_emb\.weight +uniform +4 +float16 +optimal:effort=normal +1,500 +72 +60\.0 kB +13\.89 % +float32 +"
        rf"{loss:.5f}",
        out,
    )
    assert "2 other tensors, not packed" in out
    assert "checksum" not in out


def test_inspect_prints_json(embpack_command, packed):
    code, out, _ = embpack_command("inspect", packed, "--json")
    value = json.loads(out)
    assert code == 0
    in_file = json.loads(read_raw(packed).metadata["embpack"])["tables"]
    tables = {table["name"]: table for table in value["tables"]}
    assert {name: {key: table[key] for key in in_file[name]} for name, table in tables.items()} == in_file
    assert {(table["row_bytes"], table["file"]) for table in tables.values()} == {(40, packed.name), (12, packed.name)}
    assert {tensor["name"] for tensor in value["other_tensors"]} == {"linear.weight", "bias"}
    assert value["verified"] is False


def test_inspect_verifies(embpack_command, packed):
    code, out, _ = embpack_command("inspect", packed, "--verify")
    assert code == 0
    assert "checksums of 2 tables, 2 other tensors and the header agree\n" in out
    _, out, _ = embpack_command("inspect", packed, "--verify", "--json")
    value = json.loads(out)
    assert value["verified"] is True
    assert value["checked"] == {"tables": 2, "other_tensors": 2, "headers": 1}
    assert value["unchecked"] == {"tables": 0, "other_tensors": 0, "headers": 0}


def test_inspect_says_what_version_1_has_no_checksums_of(embpack_command):
    path = PACKED / "uniform-optimal-4bits-float16-d64.safetensors"
    assert (
        "checksums of 1 table agree; version 1 has none for 1 other tensor and the header\n"
        in (embpack_command("inspect", path, "--verify")[1])
    )
    value = json.loads(embpack_command("inspect", path, "--verify", "--json")[1])
    assert value["checked"] == {"tables": 1, "other_tensors": 0, "headers": 0}
    assert value["unchecked"] == {"tables": 0, "other_tensors": 1, "headers": 1}


def test_inspect_counts_the_headers_of_shards(embpack_command, tmp_path):
    embpack.quantize_file(write_shards(tmp_path, make_arrays()), tmp_path / "packed")
    _, out, _ = embpack_command("inspect", tmp_path / "packed", "--verify")
    assert "checksums of 2 tables, 2 other tensors and 4 headers agree\n" in out


def test_inspect_finds_an_altered_table(embpack_command, altered):
    assert embpack_command("inspect", altered)[0] == 0
    code, out, err = embpack_command("inspect", altered, "--verify")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: {re.escape(str(altered))}: table 'user_emb.weight' was altered: [^\n]+\n", err)


@pytest.mark.parametrize("by_index", [False, True])
def test_inspect_shows_all_shards(embpack_command, tmp_path, by_index):
    src = write_shards(tmp_path, make_arrays())
    embpack.quantize_file(src, tmp_path / "packed")
    index = "model.embpack.safetensors.index.json" if by_index else ""
    code, out, _ = embpack_command("inspect", tmp_path / "packed" / index, "--json", "--verify")
    value = json.loads(out)
    assert code == 0
    assert {table["name"] for table in value["tables"]} == set(make_arrays().tables)
    assert len({table["file"] for table in value["tables"]}) == 2
    assert {tensor["name"] for tensor in value["other_tensors"]} == {"linear.weight", "bias"}


def test_inspect_shows_what_is_unknown(embpack_command, tmp_path):
    table = embpack.PackedTable.from_packed(np.zeros((3, 12), np.uint8), embedding_dim=16)
    embpack.save(tmp_path / "adopted.safetensors", {"adopted": table})
    _, out, _ = embpack_command("inspect", tmp_path / "adopted.safetensors")
    assert re.search(r"^adopted +uniform +4 +float16 +unknown +3 +16 .* unknown$", out, re.MULTILINE)


@pytest.mark.parametrize("command", ["inspect", "dequantize"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"garbage, and more of it", "truncated or not a safetensors file")],
)
def test_a_damaged_file_exits_1(embpack_command, tmp_path, command, content, message):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    more = [tmp_path / "plain.safetensors"] if command == "dequantize" else []
    code, out, err = embpack_command(command, path, *more)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_inspect_of_a_plain_checkpoint_says_how_to_pack_it(embpack_command, model):
    code, _, err = embpack_command("inspect", model)
    assert code == 1
    assert "holds no packed tables (no 'embpack' metadata); pack it with: embpack quantize" in err


# dequantize


def test_dequantize_prints_a_table(embpack_command, tmp_path, packed):
    code, out, err = embpack_command("dequantize", packed, tmp_path / "plain.safetensors")
    assert (code, err) == (0, "")
    assert re.search(r"user_emb\.weight +float32 +1,500 +72 +60\.0 kB +432\.0 kB", out)
    plain = read_raw(tmp_path / "plain.safetensors").tensors
    assert plain["user_emb.weight"].payload == embpack.load(packed)["user_emb.weight"].dequantize().tobytes()


def test_dequantize_prints_json(embpack_command, tmp_path, packed):
    code, out, _ = embpack_command("dequantize", packed, tmp_path / "plain.pt", "--json")
    assert code == 0
    assert {table["name"]: table["weight_bytes"] for table in json.loads(out)["tables"]} == {
        "user_emb.weight": 1500 * 288,
        "item_emb.weight": 40 * 32,
    }


def test_dequantize_refuses_an_altered_file(embpack_command, tmp_path, altered):
    before = names_in(tmp_path)
    code, _, err = embpack_command("dequantize", altered, tmp_path / "plain.safetensors")
    assert code == 1
    assert "was altered" in err
    assert names_in(tmp_path) == before


# Help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_commands(embpack_command, flag):
    code, out, _ = embpack_command(flag)
    assert code == 0
    for command in ("quantize", "compare", "methods", "inspect", "dequantize", "update", "demo"):
        assert re.search(rf"^[│ ]+{command} ", out, re.MULTILINE)


HELP = {
    "quantize": [
        *("SRC", "DST", "--method", "--bits", "--param-dtype", "--include", "--exclude", "--dry-run", "--threads"),
        "--max-loss",
        *(
            "--json",
            ".safetensors",
            ".pt/.pth/.bin/.ckpt",
            ".npy",
            ".npz",
            ".parquet",
            "2, 4 or 8",
            "float16 or float32",
        ),
        "embpack methods lists all",
        "embpack quantize model.safetensors model-4bit.safetensors",
    ],
    "compare": [
        *("SRC", "--methods", "--bits", "--param-dtype", "--rows", "--include", "--exclude", "--html", "--threads"),
        *("--json", "20000", "embpack compare model.safetensors --html report.html"),
        *("--svg", "--png", "--csv", "--for", "torch, fbgemm, torchrec or onnx", "--prefer", "loss|size|speed"),
    ],
    "inspect": ["FILE", "--verify", "--json", "embpack inspect model-4bit.safetensors --verify"],
    "dequantize": ["SRC", "DST", ".parquet", "--json", "embpack dequantize model-4bit.safetensors"],
    "update": [
        *("FILE", "DELTA", "--out", "--table-column", "--id-column", "--row-column", "--step-column", "--dry-run"),
        *("--json", "--threads", ".parquet", ".npz", "IDS.npy,ROWS.npy", "table_fqn", "key_id", "embedding"),
        "global_step, if there is one",
        "embpack update model-4bit.safetensors model_dir/delta_embedding_dump",
    ],
    "demo": ["Make a checkpoint"],
}


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_is_needed(embpack_command, command):
    code, out, _ = embpack_command(command, "--help")
    assert code == 0
    text = flat(out)
    assert [expected for expected in HELP[command] if expected.lower() not in text.lower()] == []


def test_no_arguments_show_the_help(embpack_command):
    code, out, err = embpack_command()
    assert code == 2
    assert "quantize" in out + err


def test_rows_that_float16_parameters_lose_are_shown(tmp_path, embpack_command):
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((40, 8), np.float32) * np.float32(1e-9))
    code, printed, _ = embpack_command("quantize", tmp_path / "vectors.npy", tmp_path / "packed.safetensors")
    assert code == 0
    assert "40 of its rows come back no better than zeros would" in printed
    assert "--param-dtype float32" in printed

"""What a person sees: one line a table, no line wider than the terminal, and bars while it works."""

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors
from rich.cells import cell_len

import embpack
from embpack.cli import show
from embpack.tables import cut_end, cut_middle, find_prefix, fit_table

FOLDER = "sparse_arch.embedding_bag_collection.embedding_bags."
WIDTHS = (60, 80, 120, 200)


def make_names(count):
    return [f"{FOLDER}t_cat_{i}.weight" for i in range(count)]


def write_model(folder, count):
    rng = np.random.default_rng(0)
    tables = {name: rng.standard_normal((20, 8), dtype=np.float32) for name in make_names(count)}
    return write_safetensors(folder, Arrays(tables, {"over_arch.layers.0.weight": np.ones((4, 4), np.float32)}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("26"), 26)


@pytest.fixture
def at_width(monkeypatch, embpack_command):
    """Runs a command in this process as on a terminal of so many columns, and returns the lines."""

    def run(width, *args):
        monkeypatch.setattr(show, "output", show.Printer(width=width, force_terminal=True))
        code, out, _ = embpack_command(*args)
        assert code == 0
        return out.splitlines()

    return run


def check_table(lines, names, width):
    """The lines fit the terminal, and each name has one, in a block; what all names begin with is shown once."""
    assert [line for line in lines if cell_len(line) > width] == []
    assert sum(FOLDER in line for line in lines) <= 1
    shorts = [name.removeprefix(FOLDER) for name in names]
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{shorts[0]} "))
    assert [line.split()[0] for line in lines[first : first + len(names)]] == shorts


# Commands on a terminal


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [26, 200])
def test_every_command_prints_one_line_a_table(tmp_path, at_width, width, count):
    src, names = write_model(tmp_path, count), sorted(make_names(count))
    packed = tmp_path / "packed.safetensors"
    for command in (
        ["quantize", src, "--dry-run", "--method", "asym"],
        ["quantize", src, packed, "--method", "asym"],
        ["inspect", packed],
        ["dequantize", packed, tmp_path / "plain.npz"],
    ):
        lines = at_width(width, *command)
        if command[-2:] == ["--method", "asym"] and packed in command:
            start = next(i for i, line in enumerate(lines) if line.startswith("Packed into"))
            check_table(lines[:start], names, width)
            lines = lines[start:]
        check_table(lines, names, width)


def test_at_80_columns_the_report_has_what_counts(tmp_path, at_width, model):
    lines = at_width(80, "quantize", model, tmp_path / "p.safetensors", "--method", "asym")
    assert f"tables under {FOLDER}" in lines
    header = next(line for line in lines if line.startswith("table  "))
    assert header.split() == ["table", "rows", "dim", "before", "after", "ratio", "l2", "loss", "rows/s"]
    lines = at_width(80, "inspect", tmp_path / "p.safetensors")
    header = next(line for line in lines if line.startswith("table  "))
    left_out = next(line for line in lines if line.startswith("no room for"))
    assert header.split() == ["table", "layout", "bits", "method", "rows", "dim", "bytes", "ratio", "l2", "loss"]
    assert left_out == "no room for: params, of"


def test_columns_that_do_not_fit_are_named(tmp_path, at_width, model):
    lines = at_width(60, "quantize", model, tmp_path / "p.safetensors", "--method", "asym")
    assert "no room for: dim, before" in lines
    assert "no room for: dim, before" not in "".join(at_width(120, "quantize", model, "--dry-run"))


def test_without_a_terminal_nothing_is_cut_or_folded(tmp_path, embpack_command, model):
    packed = tmp_path / "p.safetensors"
    for command in (["quantize", model, packed, "--method", "asym"], ["inspect", packed]):
        code, out, _ = embpack_command(*command)
        assert code == 0
        assert "no room for" not in out and "..." not in out
        for name in make_names(26):
            assert re.search(rf"^{re.escape(name)} .+[\dkMG]$", out, re.MULTILINE)


# A real terminal


def run_on_terminal(width, *args, stderr=None):
    """Run a command on a pseudo-terminal of so many columns; returns the code and what the terminal got."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "embpack", *map(str, args)],
        env={**environment, "TERM": "xterm-256color"},
        stdin=follower,
        stdout=follower,
        stderr=follower if stderr is None else stderr,
    )
    os.close(follower)
    chunks = []
    while True:
        try:
            chunks.append(os.read(leader, 65536))
        except OSError:  # the other end is closed
            break
    os.close(leader)
    return process.wait(60), b"".join(chunks).decode()


def split_lines(text):
    """Lines that a terminal got, those that were drawn over too, without colours."""
    lines = re.split(r"\r?\n|\r|\x1b\[\d*A", text)
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in lines]


def test_on_a_terminal_of_80_columns(tmp_path, model):
    code, text = run_on_terminal(80, "quantize", model, tmp_path / "p.safetensors", "--method", "asym")
    lines = split_lines(text)
    assert code == 0
    assert [line for line in lines if cell_len(line) > 80] == []
    assert any(re.match(r"\d+ of 26 tables", line) for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("Packed into"))
    check_table(lines[start:], sorted(make_names(26)), 80)
    assert "\x1b[1m" in text  # headers are bold


def test_a_pipe_gets_no_colours_and_whole_names(tmp_path, model):
    done = subprocess.run(
        [sys.executable, "-m", "embpack", "quantize", model, tmp_path / "p.safetensors", "--method", "asym"],
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for name in make_names(26):
        assert len(re.findall(rf"^{re.escape(name)} ", done.stdout, re.MULTILINE)) == 2  # of the plan, of the report


# Bars


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of so many columns gets on stderr."""

    def make(width):
        stream = io.StringIO()
        monkeypatch.setattr(show, "errors", show.Printer(file=stream, force_terminal=True, width=width))
        return stream

    return make


@pytest.mark.parametrize("width", WIDTHS)
def test_one_bar_of_everything_stands_above_those_of_current_tables(terminal, width):
    stream, names = terminal(width), make_names(26)
    with show.row_progress(dict.fromkeys(names, 1000), shown=True) as progress:
        for name in names[:12]:
            progress(name, 1000)
        for name in names[12:18]:
            progress(name, 500)
        progress.__self__.progress.refresh()
    lines = split_lines(stream.getvalue())
    assert [line for line in lines if cell_len(line) > width] == []
    # The last frame: six tables are half done, and the four worked on last are shown.
    start = max(i for i, line in enumerate(lines) if line.startswith("12 of 26 tables"))
    assert re.match(r"12 of 26 tables +[━╸╺ ]+ +57 % ", lines[start])
    shown = [line.split()[0] for line in lines[start + 1 : start + 5]]
    assert shown == [f"t_cat_{i}.weight" for i in range(14, 18)]
    assert all(" 50 %" in line for line in lines[start + 1 : start + 5])


def test_the_bar_of_everything_has_the_time_left(terminal, monkeypatch):
    stream, clock = terminal(80), iter(range(10_000))
    monkeypatch.setattr(show.errors, "get_time", lambda: next(clock) / 10)
    with show.row_progress({"a": 1000, "b": 10_000}, shown=True) as progress:
        for _ in range(8):
            progress("b", 1000)
        progress.__self__.progress.refresh()
    wanted = re.compile(r"0 of 2 tables +[━╸╺]+ +72 % [\d.]+ k rows/s 0:00:\d\d left")
    assert any(map(wanted.match, split_lines(stream.getvalue())))


def test_a_single_table_has_one_bar_with_its_name(terminal):
    stream, [name] = terminal(60), make_names(1)
    with show.row_progress({name: 10}, shown=True) as progress:
        progress(name, 5)
        progress.__self__.progress.refresh()
    lines = [line for line in split_lines(stream.getvalue()) if "50 %" in line]
    assert lines and all(re.match(r"spars\.\.\.0\.weight +━", line) for line in lines)
    assert "tables" not in stream.getvalue()


def test_where_there_is_no_terminal_nothing_is_drawn(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(show, "errors", show.Printer(file=stream))
    with show.row_progress({"a": 3, "b": 4}, shown=True) as progress:
        progress("a", 3)
    assert stream.getvalue() == ""


# Tables of text


def test_columns_are_left_out_in_order_and_come_back_where_they_fit():
    columns, rows = ["name", "wide", "x", "loss"], [["n" * 30, "w" * 40, "1", "0.1"]]
    fitted = fit_table(columns, rows, 50, drop=("x", "wide"))
    assert fitted.left_out == ("wide",)
    assert fitted.lines == (f"{'n' * 30}  1   0.1",)
    assert fit_table(columns, rows, 200, drop=("x", "wide")).left_out == ()
    assert fit_table(columns, rows, None, drop=("x", "wide")).left_out == ()
    assert fit_table(columns, rows, 40).lines[0] == f"...n  {'w' * 31}..."


@pytest.mark.parametrize("width", range(1, 90))
def test_no_line_is_ever_wider_than_the_terminal(width):
    rows = [["表" * 20, "1,234,567", "0.1"], ["été.weight", "1", "0.25"], ["e\u0301" * 30, "2", "0.5"]]
    fitted = fit_table(["table", "rows", "loss"], rows, width, left=["table"], drop=["rows"])
    assert all(cell_len(line) <= width for line in (fitted.header, *fitted.lines))
    assert len(fitted.lines) == 3


def test_names_keep_their_ends():
    assert cut_middle("abc", 3) == "abc"
    assert cut_middle("user_tower.embeddings.t_cat_17.weight", 24) == "user_to..._cat_17.weight"
    assert cut_end("a sentence that is long", 12) == "a sentenc..."
    assert [cut_middle("表" * 9, width) for width in (18, 17)] == ["表" * 9, "表表表...表表表表"]


def test_the_common_prefix_ends_with_a_dot():
    assert find_prefix(["model.emb_a", "model.emb_b"]) == "model."
    assert find_prefix(["model.emb_a"]) == find_prefix(["a.b", "c.d"]) == find_prefix(["emb1", "emb2"]) == ""
    assert find_prefix(["a.b.", "a.b.c"]) == ""  # one of them would be left without a name


def test_names_in_tables_can_be_seen():
    fitted = fit_table(["table"], [["\x1b[31ma\nb"]], 80)
    assert fitted.lines == (r"\x1b[31ma\nb",)


@pytest.mark.parametrize("width", WIDTHS)
def test_compare_prints_one_line_a_way(tmp_path, at_width, width):
    lines = at_width(
        width, "compare", write_model(tmp_path, 2), "--methods", "asym,optimal", "--bits", "4", "--rows", "20"
    )
    assert [line for line in lines if cell_len(line) > width and not line.startswith("  embpack quantize ")] == []
    said = sum(FOLDER in line for line in lines[: lines.index("Recommended:")])
    assert said == (3 if width == 200 else 1)  # there is room for the worst row of both tables
    assert any(line.startswith("t_cat_0.weight: 20 rows of 8 float32 values") for line in lines)
    tables, last = "\n".join(lines[: lines.index("Recommended:")]), " all" if width >= 80 else " [kMG]"
    for method in ("asym", "optimal"):
        assert len(re.findall(rf"^[* ] +{method} .*{last}$", tables, re.MULTILINE)) == 3  # of each table and of both
    if width == 200:
        assert "no room for" not in tables


# What Python prints


@pytest.fixture
def with_terminal(monkeypatch):
    """Makes stdout look like a terminal of so many columns to what is printed from Python."""

    def make(width):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    return make


def test_a_printed_plan_has_one_line_a_table(with_terminal):
    rng = np.random.default_rng(0)
    tables = {name: rng.standard_normal((30, 8), dtype=np.float32) for name in make_names(26)}
    plan = embpack.plan(tables, variants=[embpack.Variant("asym"), embpack.Variant("asym", 2)])
    assert [line.split()[0] for line in str(plan).splitlines()[1:27]] == list(tables)
    with_terminal(80)
    first, header, *lines = str(plan).splitlines()
    assert first == f"tables under {FOLDER}"
    assert header.split()[:1] + header.split()[-4:] == ["table", "bytes", "l2", "loss", "why"]
    check_table(lines[:26], tables, 80)


def test_a_printed_report_of_a_model_has_one_line_a_module(with_terminal):
    pytest.importorskip("torch")
    from embpack.torch.convert import ModelReport

    names = [f"sparse_arch.embedding_bags.t_cat_{i}" for i in range(26)]
    sizes = {"num_embeddings": 40_000, "embedding_dim": 64, "bytes_before": 10_240_000, "bytes_after": 1_440_000}
    of_each = sizes | {"dtype": "float32", "method": "asym", "loss": 0.1, "square_norm": 1.0, "seconds": 1.0}
    report = ModelReport(tuple(embpack.TableReport(name=name, **of_each) for name in names), ())
    assert str(report).splitlines()[1].startswith("sparse_arch.embedding_bags.t_cat_0   40,000   64  10,240,000  ")
    with_terminal(60)
    first, header, *lines = str(report).splitlines()
    assert first == "modules under sparse_arch.embedding_bags."
    assert header.split() == ["module", "rows", "before", "after", "ratio", "l2", "loss"]
    assert [line.split()[0] for line in lines[:26]] == [f"t_cat_{i}" for i in range(26)]
    assert lines[26] == "no room for: dim"
    assert max(map(len, lines)) <= 60

"""The benchmarks run, and refuse to time answers that differ."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import plain
from rich.cells import cell_len

import embpack
from benchmarks import disk, large_tables, opening, peers, pieces, planning, rates_per_core, small_tables, update
from benchmarks.bags import Expected, draw_power, make_table, make_uneven_bags, split_rows, widen_codes
from benchmarks.cores import Busyness, CpuLoss
from benchmarks.harness import AnswersDifferError, Contestant, Spread, Standing, Timing, Workload, measure_spread, race
from benchmarks.lookup_report import LookupReport, print_lookup_report
from benchmarks.lookups import CASES
from benchmarks.loss_report import LossReport, print_loss_report
from benchmarks.losses import EXACT, SPECS, Loss, TableLosses, Way, compare_ways, list_ours, make_tables, measure_table
from benchmarks.peers import LOSS_PEERS, Quantizer, Restored, load_quantizers
from benchmarks.races import find_other_bytes, find_worse_row
from benchmarks.report import RaceResult, Report, print_report
from benchmarks.streaming import MemoryUse
from benchmarks.touch import compile_touch, sum_touched
from embpack.cli import show

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
QUIET = Busyness([CpuLoss(0, 0.01, 0.02), CpuLoss(1, 0.0, 0.1)], worth_quoting=True)


def make_workload(ours, theirs, disagreement=find_other_bytes):
    def contestant(name, answer):
        return Contestant(name, lambda: answer, len(answer), lambda: None)

    others = [contestant("theirs", theirs)]
    return Workload({"method": "asym"}, contestant("ours", ours), others, disagreement, lambda _: 0.0)


def test_quick_run_writes_its_figures(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.quantize", "--quick", "--no-stream", "--rounds", "1"]
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True, timeout=120, capture_output=True)
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "busyness", "left_out", "races", "streaming"}
    assert set(report["machine"]) == {"cpu", "isa", "best_isa", "threads_available", "python", "versions"}
    assert report["streaming"] == []
    kinds = {(race["settings"]["method"], race["settings"]["threads"]) for race in report["races"]}
    searches = {("greedy", 1), ("optimal:effort=fast", 1), ("optimal", 1)}
    assert kinds == {("asym", 1), *searches, ("trellis", 1), ("kmeans", 1), ("asym", 2), ("greedy", 2)}
    for race_found in report["races"]:
        assert set(race_found["settings"]) == {"method", "embedding_dim", "table_bytes", "threads"}
        ours, *others = race_found["standings"]
        assert ours["ratio"] is None and others
        assert ours["isa"] == report["machine"]["isa"]
        for other in others:
            assert 0 < other["ratio"]["low"] <= other["ratio"]["median"] <= other["ratio"]["high"]
            assert other["isa"] in {"portable", "avx2", ours["isa"]}
            assert other["rows_per_second"] > 0 and 0 <= ours["loss"] <= other["loss"] * 1.0001
        method, embedding_dim = race_found["settings"]["method"], race_found["settings"]["embedding_dim"]
        assert (ours["loss"] == 0) == (method == "kmeans" and embedding_dim <= 16)


@pytest.mark.parametrize("dim", ["160", "100"])  # 100 is no multiple of 32
def test_large_tables_are_packed_in_pieces(monkeypatch, capsys, dim):
    monkeypatch.setattr(large_tables, "chunk_rows", lambda dim: 1000)
    large_tables.main(["--gb", "0.002", "--dim", dim, "--pieces", "3", "--rounds", "1", "--method", "asym"])
    out = capsys.readouterr().out
    assert out.count("% of the time of packing them by optimal") == 2
    assert re.search(
        r"^0\.00 GB of FP8 in 3 pieces by asym: [\d,]+ rows/s, at most \d+ MB of memory$", out, re.MULTILINE
    )


def test_every_case_of_lookup_runs(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.lookup", "--quick", "--rounds", "1", "--table-bytes", "1e6"]
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True, timeout=120, capture_output=True)
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "busyness", "left_out", "races"}
    assert {own["cpu"] for own in report["busyness"]["cpus"]} == os.sched_getaffinity(0)
    found = {race["settings"]["case"] for race in report["races"]}
    assert found == {case for case in CASES if case not in report["left_out"]}
    for race_found in report["races"]:
        ours, *others = race_found["standings"]
        assert ours["name"].startswith("embpack") and ours["ratio"] is None and ours["loss"] is None
        assert ours["isa"] == report["machine"]["isa"]
        for other in others:
            assert 0 < other["ratio"]["low"] <= other["ratio"]["median"] <= other["ratio"]["high"]
            assert other["isa"] in {"portable", "avx2", "avx512", ours["isa"]}
        names = {other["name"] for other in others}
        if race_found["settings"]["case"] == "in-cache":
            assert {"PyTorch 4 bits", "PyTorch 8 bits", "PyTorch fp32"} <= names


def test_losses_are_those_that_quantize_reports(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.loss", "--quick", "--tables", "demo", "laplace", "--dims", "16"]
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True, timeout=120, capture_output=True)
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "left_out", "tables"}
    assert {"torchao", "onnxruntime", "faiss-cpu"} <= set(report["machine"]["versions"])
    assert set(report["left_out"]) < set(LOSS_PEERS)
    weights = dict(make_tables(["demo", "laplace"], [16], 1000))
    for table in report["tables"]:
        weight = weights[table["table"]]
        assert (table["num_embeddings"], table["embedding_dim"]) == weight.shape
        assert table["losses"] == sorted(table["losses"], key=lambda own: (own["bytes_per_row"], own["loss"]))
        found = {own["method"]: own for own in table["losses"] if own["library"] == "embpack"}
        assert {*SPECS, 'trellis, rotate="hadamard"', "trellis, bits=3.5"} < set(found)
        for method in SPECS:
            packed = embpack.quantize(weight[:100] if method == EXACT else weight, method)
            assert found[method]["loss"] == pytest.approx(packed.loss, rel=1e-6, abs=1e-9)
            assert found[method]["bytes_per_row"] == packed.nbytes / packed.num_embeddings
            assert found[method]["rows"] == packed.num_embeddings
        assert table["common_rows"] == len(weight) // 100  # exllamav3's
        for own in table["losses"]:
            assert (own["loss"] == own["common_loss"]) == (own["rows"] == table["common_rows"])
        rotated = embpack.quantize(weight, "trellis", rotate="hadamard")
        assert found['trellis, rotate="hadamard"']["loss"] == pytest.approx(rotated.loss, rel=1e-6)


def test_peers_lose_what_we_do_by_the_same_method():
    [(_, weight)] = make_tables(["normal"], [64], 200)
    quantizers, left_out = load_quantizers()
    known = [own for own in quantizers if own.library in ("PyTorch", "FBGEMM")]
    assert "pytorch" not in left_out
    losses = {own.method: own for own in measure_table("normal", weight, list_ours(10), known).losses}
    theirs = ["embedding_bag_4bit_prepack", "embedding_bag_4bit_prepack, greedy"]
    theirs += [] if "fbgemm" in left_out else ["FusedNBitRowwiseQuantizedSBHalf"]
    for method, ours in zip(theirs, ["asym", "greedy-paper", "asym"], strict=False):
        assert losses[method].loss == pytest.approx(losses[ours].loss, rel=1e-6)
        assert losses[method].bytes_per_row == losses[ours].bytes_per_row == 36
    assert losses["embedding_bag_4bit_prepack, greedy"].by_baseline == 1
    # Beside the rows lie 16 and 32 levels, 256 scales and 64 means, float32.
    assert losses["trellis"].bytes_per_row == 36 + 4 * (16 + 32 + 256 + 64) / 200


def test_every_installed_peer_restores_rows():
    """Each loses more than anybody has to with so many bits for each value of N(0, 1), none eight times as much."""
    [(_, weight)] = make_tables(["normal"], [64], 300)
    quantizers = [own for own in load_quantizers()[0] if not own.method.startswith("PQ")]
    found = measure_table("normal", weight, [], quantizers)
    losses = [own for own in found.losses if own.library != "embpack"]
    assert len(losses) + len(found.left_out) == len(quantizers)
    for own in losses:
        assert 1 < own.loss / 2 ** (-8 * own.bytes_per_row / 64) < 8, own


def test_who_is_not_installed_is_left_out(hide_package, monkeypatch):
    monkeypatch.setattr(peers, "LOSS_PEERS", ("pytorch", "faiss"))
    hide_package("faiss", "benchmarks.peers.faiss_loss")
    quantizers, left_out = load_quantizers()
    assert {own.library for own in quantizers} == {"PyTorch"}
    assert left_out == {"faiss": "No module named 'faiss'"}


def test_who_cannot_quantize_a_table_is_left_out():
    def refuse(_):
        raise RuntimeError("no kernel for this CPU\nmore of it")

    weight = np.ones((4, 6), np.float32)
    half = Quantizer("theirs", "half", lambda rows: Restored(rows[:2] / 2, 48))
    peers = [Quantizer("theirs", "a", refuse), Quantizer("theirs", "b", refuse, 4), half]
    found = measure_table("ones", weight, [], peers)
    assert found.left_out == {
        "theirs: a": "no kernel for this CPU",
        "theirs: b": "6 values a row are no multiple of 4",
    }
    theirs, ours = found.losses
    assert theirs == Loss("theirs", "half", 2, 24.0, 0.5, 0.5, None, on_front=True)
    assert (ours.method, ours.rows, found.common_rows) == ("trellis, bits=7", 4, 2)


def test_the_front_is_of_rows_that_both_packed():
    """Nobody is beaten by what others lose on rows that he has not packed, nor by what he would lose on others."""
    weight = np.ones((9, 4), np.float32)

    def way(method, bytes_per_row, *errors):
        return Way("ours", method, bytes_per_row, np.array(errors, np.float64))

    ways = [way("more", 40, *[2] * 9), way("twice", 36, *[1] * 9), way("same", 36, *[1] * 9)]
    ways += [way("part", 38, 0.9, 0.9, 0.9), way("unlucky part", 32, 3, 3), way("few", 33, 1, *[4] * 8)]
    found = compare_ways(weight, [*ways, way("least", 64, *[0] * 9)])
    assert [own.method for own in found] == ["unlucky part", "few", "twice", "same", "part", "more", "least"]
    assert [own.method for own in found if own.on_front] == ["unlucky part", "few", "twice", "part", "least"]
    assert [own.rows for own in found] == [2, 9, 9, 9, 3, 9, 9]
    assert found[1].loss == pytest.approx(np.sqrt(33 / 36)) and found[1].common_loss == pytest.approx(np.sqrt(5 / 8))


def test_a_collection_with_small_tables_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(small_tables, "REPETITIONS", 1)
    small_tables.main(["--small", "3", "--batch", "2"])
    assert re.match(r"3 small tables of 26, 2 bags each: [\d,]+ us float, [\d,]+ packed and", capsys.readouterr().out)


def test_opening_says_what_it_took(capsys):
    opening.main(["--gigabytes", "0.5"])
    printed = capsys.readouterr().out
    assert printed.startswith("13,888,888 x 64: 499,999,968 bytes of packed rows, 3,555,555,328 of float32")
    assert re.search(
        r"^opened, and two rows looked up, in \d\.\d{4} s, with \d+\.\d MiB more in memory$", printed, re.M
    )


def test_updates_are_compared_and_measured(capsys, tmp_path):
    update.main(["--rows", "5000", "--dim", "16", "--rounds", "2", "--json", str(tmp_path / "u.json")])
    printed = capsys.readouterr().out
    assert (
        "5,000 x 16 by optimal" in printed and "50 rows change, and have the bytes of a table that is packed" in printed
    )
    assert re.search(
        r"^ratio    \d\.\d{3}, and \d\.\d{3} of CPUs; the goal, 0\.05 at most, is (met|missed)$", printed, re.M
    )
    assert len(json.loads((tmp_path / "u.json").read_text())["updates"]) == 2


def test_rows_from_a_disk_are_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "MEMORY_LOOKUPS", 500)
    try:
        disk.main(["--dir", str(tmp_path), "--gb", "0.02", "--dims", "16", "--batches", "40", "--rounds", "1"])
    except RuntimeError as error:  # in a folder whose files are in memory
        assert "stays in the page cache" in str(error)
        pytest.skip(str(error))
    printed = capsys.readouterr().out
    for case in ("nothing in the page cache", "prefetched 50 ms before", "all in the page cache"):
        assert f"{case}, d = 16, 40 rows" in printed
    assert re.search(
        r"^500 lookups, d = 16, 256 at a time: at most \d+ MB resident, \d+ MB of it before", printed, re.M
    )


def test_wrong_rows_are_found():
    table = make_table(50, 32)
    rows = table.gather([3, 4])
    assert disk.find_difference(table.row_format, rows, table.packed[[3]]) is None
    assert disk.find_difference(table.row_format, rows, table.packed[[3, 5]]) == "row 1 of the batch"
    assert disk.find_difference(table.row_format, rows, rows[[1]]) == "row 0 of the batch"


def test_sums_that_are_wrong_are_found():
    table, bags = make_table(50, 32), make_uneven_bags(50, 10, 20)
    expected = Expected([table], bags)
    answer = table.embedding_bag(bags.indices, bags.offsets, "sum", include_last_offset=True)
    assert expected.find_wrong(answer) is None
    one_less = bags.indices.copy()
    one_less[bags.offsets[7]] = (one_less[bags.offsets[7]] + 1) % 50
    wrong = table.embedding_bag(one_less, bags.offsets, "sum", include_last_offset=True)
    assert expected.find_wrong(wrong) == "1 of 20 bags, the first is bag 7"
    assert expected.find_wrong(answer[:-1]) == "sums are [19, 32], not [20, 32]"


def test_8_bit_tables_have_the_values_of_4_bit_ones():
    table = make_table(9, 6)
    params = split_rows(table)[1].view(np.float16).astype(np.float32)
    packed = np.concatenate([widen_codes(table), params.view(np.uint8)], axis=1)
    wide = embpack.PackedTable.from_packed(packed, 6, bits=8)
    np.testing.assert_array_equal(wide.dequantize(), table.dequantize())


@pytest.mark.parametrize("embedding_dim", [8, 64, 256])
def test_the_bare_loop_reads_each_line_once(embedding_dim):
    try:
        touch = compile_touch()
    except OSError as error:
        pytest.skip(str(error))
    table, bags = make_table(300, embedding_dim), make_uneven_bags(300, 10, 20)
    assert touch(table, bags.indices) == sum_touched(table, bags.indices)


def test_popular_rows_are_asked_for_by_a_power_law():
    counts = np.sort(np.bincount(draw_power(np.random.default_rng(0), 100, 100_000), minlength=100))[::-1]
    shares = np.arange(1, 101) ** -1.05
    shares /= shares.sum()
    assert counts[0] == pytest.approx(100_000 * shares[0], rel=0.05) and counts[-1] > 0


def test_answers_that_differ_do_not_race():
    ours = np.zeros((3, 8), np.uint8)
    theirs = ours.copy()
    theirs[1, 2] = 1
    with pytest.raises(AnswersDifferError, match="ours and theirs differ: 1 of 3 rows, the first is row 1"):
        race(make_workload(ours, theirs), Timing(1, 0.0))


def test_a_search_may_be_better_but_not_worse():
    weight = np.random.default_rng(0).standard_normal((40, 32), dtype=np.float32)
    better, worse = (embpack.quantize(weight, method).packed for method in ("greedy", "asym"))
    assert find_worse_row(better, worse, weight) is None
    assert "rows lose more" in find_worse_row(worse, better, weight)
    assert find_worse_row(better, worse[:, :-1], weight) == "20 and 19 bytes a row"


def test_ratios_are_paired_within_a_round():
    answer = np.zeros((5, 8), np.uint8)
    ours, theirs = race(make_workload(answer, answer), Timing(3, 0.001))
    assert ours.ratio is None and theirs.ratio.median > 0
    assert (ours.name, theirs.name, ours.rows) == ("ours", "theirs", 5)


def test_spread_is_median_and_quartiles():
    spread = measure_spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    spread = measure_spread([2.0, 1.0])
    assert (spread.low, spread.median, spread.high) == (1.0, 1.5, 2.0)


@pytest.mark.parametrize("width", [80, None])
def test_tables_of_benchmarks_have_one_line_a_contestant(monkeypatch, capsys, width):
    monkeypatch.setattr(
        show, "output", show.output if width is None else show.Printer(width=width, force_terminal=True)
    )
    ratio = Spread(10.31, 9.5, 11.99)
    names = ["embpack PackedEmbeddingBagCollection", "PyTorch quantized.EmbeddingBag", "FBGEMM"]
    standings = [Standing(name, 10, "avx2", 1e9, 0.08, None if name == names[0] else ratio, 1.5) for name in names]
    settings = {"case": "layouts-out-of-cache", "method": "optimal:effort=fast", "embedding_dim": 512}
    settings |= {"table_bytes": 320 << 20, "bag_size": 100, "distribution": "uniform", "threads": 2}
    races = [RaceResult(settings, standings)] * 3
    machine = {
        "cpu": "AMD EPYC",
        "isa": "avx2",
        "best_isa": "avx2",
        "python": "3.11",
        "versions": {"embpack": "1", "torch": None},
    }
    use = MemoryUse("optimal", 64, 4 << 30, 1e6, 1 << 26, 1 << 28, 1 << 29)
    loss = Loss("ONNX Runtime", 'm, rotate="hadamard"' * 3, 20_000, 36.0, 0.1, 0.1, 1.0, on_front=True)
    losses = TableLosses("demo", 20_000, 64, 20_000, [loss], {})
    print_report(Report(machine, QUIET, {}, races, [use]))
    print_lookup_report(LookupReport(machine, QUIET, {}, races))
    print_loss_report(LossReport(machine, {}, [losses]))
    lines = plain(capsys.readouterr().out).splitlines()
    if width is None:
        assert sum(line.startswith(names[0]) for line in lines) == 6
        assert any('m, rotate="hadamard"' * 3 in line for line in lines)
    else:
        assert [line for line in lines if cell_len(line) > width] == []
        assert len([line for line in lines if re.match(r"FBGEMM .*10\.3.*9\.50\.\.12\.0", line)]) == 6


def test_planning_says_what_few_rows_give_up(capsys, monkeypatch):
    monkeypatch.setattr(planning, "ROWS", (1500, 800, 20))
    monkeypatch.setattr(planning, "QUICK", 1)
    monkeypatch.setattr(planning, "VARIANTS", planning.VARIANTS[:6])
    monkeypatch.setattr(planning, "MAX_BYTES", ("25 %",))
    planning.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 tables, 2,320 rows, 50,880 values" and len(lines) == 3
    [given_up] = re.findall(r"can be in these bytes \(([+-][\d.]+) %?", lines[2].replace("%", " %"))
    assert abs(float(given_up)) < 1


def test_the_benchmark_of_pieces_runs(capsys, restore_threads):
    pieces.main(["--pieces", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["gather", "bags of 20"]
    assert all(re.search(r"2 pieces by one, 8,192 x 16, 98,304 bytes: \d+\.\d\d ", line) for line in lines)


def test_the_rates_of_a_core(monkeypatch, capsys, restore_threads):
    monkeypatch.setattr(rates_per_core, "RANGE_BYTES", 1 << 20)
    monkeypatch.setattr(rates_per_core, "LEAST_SECONDS", 0.0)
    rates_per_core.main(["--methods", "asym", "trellis", "--dims", "16", "64", "--no-fits"])
    out = capsys.readouterr().out
    for method in ("asym", "trellis"):
        assert re.search(rf"^{method} +[\d,]+ +[\d,]+ +[\d.,]+ M or more$", out, re.MULTILINE)


def test_workers_race_with_threads():
    command = [sys.executable, "-m", "benchmarks.distributed", "--gb", "0.01", "--rounds", "1", "--methods", "asym"]
    out = subprocess.run(command, cwd=ROOT, check=True, timeout=240, capture_output=True, text=True).stdout
    assert re.search(r"^asym: 41,943 x 64: Ray [\d,]+ rows a second, threads [\d,]+; ratio \d\.\d+ ", out, re.MULTILINE)
    assert re.search(r"^  driver: \d+ MB, [\d.]+ s of CPU time$", out, re.MULTILINE)

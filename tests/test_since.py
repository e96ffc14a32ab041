"""Packing again only what has changed: the bytes are those of packing all, whatever has changed, and how."""

import hashlib
import json
import pickle
import re
import shutil
import warnings

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Arrays, read_raw, write_safetensors, write_shards
from here import Here
from safetensors.torch import save_file
from test_resuming import Stopped, read_tree

import embpack
from embpack.chunks import chunk_rows, span_rows
from embpack.errors import FormatError
from embpack.kept import RANGE, SUFFIX, as_ranges, as_sums, count_ranges, forget_rows, set_sums
from embpack.methods import METHODS
from embpack.methods.base import Sums
from embpack.packed_files import open_packed

# Ranges have 4096 rows: the last one of the first table is short.
DIM, ROWS = 64, 14_000
SPAN = span_rows(DIM)


def make_arrays(rows=ROWS, dtype=np.float32):
    rng = np.random.default_rng(5)
    tables = {
        "user_emb.weight": rng.standard_normal((ROWS + 10_000, DIM), np.float32)[:rows].astype(dtype),
        "item_emb.weight": rng.standard_normal((300, 32), np.float32).astype(dtype),
    }
    return Arrays(tables, {"top.weight": np.ones((4, 4), np.float32)})


def alter(arrays, *rows):
    """Have a value of some rows of the first table be another."""
    table = arrays.tables["user_emb.weight"]
    for row in rows:
        table[row, row % table.shape[1]] += 1
    return arrays


def quantize(src, dst, **options):
    return embpack.quantize_file(src, dst, **{"method": "asym", **options})


def find_table(report, name="user_emb.weight"):
    return next(table for table in report.tables if table.name == name)


def as_tree(path):
    return read_tree(path) if path.is_dir() else path.read_bytes()


def compare(src, old, folder, *, suffix=".safetensors", **options):
    """Pack all and pack what has changed; return the report of the latter, whose bytes must be those of the former."""
    every = quantize(src, folder / f"all{suffix}", keep_checksums=True, **options)
    report = quantize(src, folder / f"new{suffix}", since=old, **options)
    assert as_tree(folder / f"new{suffix}") == as_tree(folder / f"all{suffix}")
    for table, whole in zip(report.tables, every.tables, strict=True):
        assert (table.loss, table.square_norm, table.warning) == (whole.loss, whole.square_norm, whole.warning)
        assert (whole.reused_rows, whole.packed_anew) == (None, None)
    return report


@pytest.fixture
def old(tmp_path):
    """What an earlier run has made of the arrays."""
    src = write_safetensors(tmp_path, make_arrays())
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True)
    return tmp_path / "old.safetensors"


@pytest.mark.parametrize(
    ("changed", "reused"),
    [
        ((), ROWS),
        ((0,), ROWS - SPAN),
        ((SPAN, SPAN + 1, 2 * SPAN - 1), ROWS - SPAN),
        ((SPAN - 1, SPAN), ROWS - 2 * SPAN),
        ((ROWS - 1,), 3 * SPAN),
        ((0, SPAN, 2 * SPAN, 3 * SPAN), 0),
    ],
)
def test_only_ranges_that_have_changed_are_packed(old, tmp_path, monkeypatch, changed, reused):
    src = write_safetensors(tmp_path, alter(make_arrays(), *changed))
    report = compare(src, old, tmp_path)
    assert find_table(report).reused_rows == reused and find_table(report).packed_anew is None
    assert find_table(report, "item_emb.weight").reused_rows == 300


def test_rows_that_are_left_alone_are_not_packed(old, tmp_path, monkeypatch):
    src = write_safetensors(tmp_path, alter(make_arrays(), SPAN))
    packed, pack = [], embpack.methods.Packer.pack

    def counted(self, rows, *args):
        packed.append(len(rows))
        return pack(self, rows, *args)

    monkeypatch.setattr(embpack.methods.Packer, "pack", counted)
    told = []
    quantize(src, tmp_path / "new.safetensors", since=old, progress=lambda name, rows: told.append(rows))
    assert packed == [SPAN] and sum(told) == ROWS + 300


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_the_bytes_are_those_of_packing_all_by_every_method(tmp_path, method, rotate):
    rows, dim = 280, 1000  # in two ranges
    assert span_rows(dim) == 256
    table = np.random.default_rng(7).standard_normal((rows, dim), np.float32)
    arrays, options = Arrays({"user_emb.weight": table}), {"method": method, "rotate": rotate}
    src = write_safetensors(tmp_path, arrays)
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True, **options)
    same = find_table(quantize(src, tmp_path / "same.safetensors", since=tmp_path / "old.safetensors", **options))
    assert (same.reused_rows, same.packed_anew) == (rows, None)
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "old.safetensors").read_bytes()
    table[270, 5] *= -0.5
    write_safetensors(tmp_path, arrays)
    report = find_table(compare(src, tmp_path / "old.safetensors", tmp_path, **options))
    if method in ("kmeans-cls", "trellis"):
        assert report.reused_rows == 0 and "what all its rows share" in report.packed_anew
    else:
        assert (report.reused_rows, report.packed_anew) == (256, None)


def test_a_table_whose_method_finds_another_range_is_packed_anew(tmp_path):
    arrays = make_arrays()
    src = write_safetensors(tmp_path, arrays)
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True, method="table")
    arrays.tables["user_emb.weight"][0, 0] = 100
    write_safetensors(tmp_path, arrays)
    report = find_table(compare(src, tmp_path / "old.safetensors", tmp_path, method="table"))
    assert report.reused_rows == 0
    assert re.fullmatch(r"it was packed by table:xmin=.* and is to be by table:xmin=.*,xmax=100.0", report.packed_anew)


@pytest.mark.parametrize("rows", [SPAN, SPAN + 1, ROWS - 1, ROWS + 1, ROWS + SPAN, 1000])
def test_tables_grow_and_shrink(old, tmp_path, rows):
    src = write_safetensors(tmp_path, make_arrays(rows))
    report = find_table(compare(src, old, tmp_path))
    # The last range of the old table is short; one that is cut off or goes on is another.
    assert report.reused_rows == min(rows, ROWS) // SPAN * SPAN


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrower_floats(tmp_path, dtype):
    src = write_safetensors(tmp_path, make_arrays(dtype=dtype))
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True)
    write_safetensors(tmp_path, alter(make_arrays(dtype=dtype), SPAN))
    assert find_table(compare(src, tmp_path / "old.safetensors", tmp_path)).reused_rows == ROWS - SPAN


def test_tables_of_codes_and_scales(tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)

    def write(codes, scales):
        tensors = {
            "a_emb.weight": torch.from_numpy(codes).to(torch.float8_e4m3fn),
            "a_emb.weight_scale": torch.from_numpy(scales),
        }
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    codes, scales = rng.standard_normal((ROWS, DIM), np.float32), np.ones((ROWS, 1), np.float32)
    src = write(codes, scales)
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True)
    scales[SPAN] = 2
    codes[-1] += 1
    write(codes, scales)
    report = find_table(compare(src, tmp_path / "old.safetensors", tmp_path), "a_emb.weight")
    assert report.reused_rows == 2 * SPAN


@pytest.mark.parametrize("size", ["200 kB", "300 kB"])
@pytest.mark.parametrize("dim", [DIM, 100])
def test_tables_in_pieces(tmp_path, dim, size):
    rng = np.random.default_rng(3)
    arrays = Arrays({"a_emb.weight": rng.standard_normal((20_000, dim), np.float32)})
    src, options = write_safetensors(tmp_path, arrays), {"max_shard_size": "300 kB", "rotate": "hadamard"}
    quantize(src, tmp_path / "old", keep_checksums=True, **options)
    arrays.tables["a_emb.weight"][9000] += 1
    write_safetensors(tmp_path, arrays)
    options["max_shard_size"] = size
    report = find_table(compare(src, tmp_path / "old", tmp_path, suffix="", **options), "a_emb.weight")
    assert sum(path.suffix == ".safetensors" for path in (tmp_path / "new").iterdir()) > 2
    if dim == DIM or size == "300 kB":
        assert report.reused_rows == 20_000 - span_rows(dim)
    else:  # pieces begin within ranges of the old ones
        assert 0 < report.reused_rows < 20_000
    assert max(path.stat().st_size for path in (tmp_path / "new").iterdir()) <= 300_000


def test_pieces_are_as_long_as_fits(tmp_path):
    rows = 200_000
    src = write_safetensors(tmp_path, Arrays({"a_emb.weight": np.ones((rows, 4), np.float32)}))
    quantize(src, tmp_path / "new", keep_checksums=True, max_shard_size="400 kB")
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    for path in files[:-1]:
        assert 400_000 - 4096 * 6 < path.stat().st_size <= 400_000


def test_a_folder_of_shards_and_its_own_place(tmp_path):
    src = write_shards(tmp_path, make_arrays())
    quantize(src, tmp_path / "old", keep_checksums=True)
    shutil.rmtree(src)
    src = write_shards(tmp_path, alter(make_arrays(), 5))
    compare(src, tmp_path / "old", tmp_path, suffix="")
    report = quantize(src, tmp_path / "old", since=tmp_path / "old")
    assert find_table(report).reused_rows == ROWS - SPAN
    assert read_tree(tmp_path / "old") == read_tree(tmp_path / "all")


def test_the_old_file_may_be_replaced_again_and_again(old, tmp_path):
    for night in range(3):
        src = write_safetensors(tmp_path, alter(make_arrays(), *range(night + 1)))
        report = quantize(src, old, since=old)
        assert find_table(report).reused_rows == ROWS - SPAN
        quantize(src, tmp_path / "all.safetensors", keep_checksums=True)
        assert old.read_bytes() == (tmp_path / "all.safetensors").read_bytes()


def test_the_loss_of_few_rows_that_are_left_is_exact(tmp_path):
    """Sums of ranges are summed up as those of all, whatever their sizes."""
    arrays = make_arrays()
    arrays.tables["user_emb.weight"] *= np.exp(np.linspace(-20, 8, ROWS, dtype=np.float32))[:, None]
    src = write_safetensors(tmp_path, arrays)
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True)
    write_safetensors(tmp_path, alter(arrays, 1))
    assert find_table(compare(src, tmp_path / "old.safetensors", tmp_path)).reused_rows == ROWS - SPAN


def test_rows_that_are_lost_are_warned_of_though_they_are_left_alone(tmp_path):
    arrays = make_arrays()
    arrays.tables["user_emb.weight"] *= np.float32(1e-9)
    src = write_safetensors(tmp_path, arrays)
    quantize(src, tmp_path / "old.safetensors", keep_checksums=True, method="optimal")
    arrays.tables["user_emb.weight"][1, 0] *= 2
    write_safetensors(tmp_path, arrays)
    report = find_table(compare(src, tmp_path / "old.safetensors", tmp_path, method="optimal"))
    assert report.reused_rows == ROWS - SPAN and f"{ROWS:,} of its rows come back no better" in report.warning


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 8}, "its rows were uniform:64:4:float16 and are to be uniform:64:8:float32"),
        ({"rotate": "hadamard"}, "its rows were uniform:64:4:float16 and are to be uniform:64:4:float16:hadamard"),
        ({"method": "sym"}, "it was packed by asym and is to be by sym"),
    ],
)
def test_tables_that_are_packed_in_another_way_are_packed_anew(old, tmp_path, options, reason):
    report = compare(tmp_path / "model.safetensors", old, tmp_path, **options)
    assert (find_table(report).reused_rows, find_table(report).packed_anew) == (0, reason)


def test_tables_of_another_type_or_name_or_version_are_packed_anew(old, tmp_path, monkeypatch):
    arrays = make_arrays()
    arrays.tables["user_emb.weight"] = arrays.tables["user_emb.weight"].astype(np.float16)
    arrays.tables["new_emb.weight"] = arrays.tables.pop("item_emb.weight")
    src = write_safetensors(tmp_path, arrays)
    report = compare(src, old, tmp_path)
    assert find_table(report).packed_anew == "its values were float32 and are float16"
    assert find_table(report, "new_emb.weight").packed_anew == "it was not packed before"
    monkeypatch.setattr(embpack, "__version__", "0.0.9")
    src = write_safetensors(tmp_path, make_arrays())
    report = compare(src, old, tmp_path)
    assert find_table(report).packed_anew == "it was packed by embpack 0.1.0, this is 0.0.9"


def test_a_plan_is_used_again(embpack_command, tmp_path):
    src, plan = write_safetensors(tmp_path, make_arrays()), tmp_path / "plan.json"
    way = ["--method", "asym", "--bits", "2,4,8", "--max-bytes", "15 %"]
    code, _, err = embpack_command(
        "quantize", src, tmp_path / "old.safetensors", "--auto", *way, "--save-plan", plan, "--keep-checksums"
    )
    assert (code, err) == (0, "")
    write_safetensors(tmp_path, alter(make_arrays(), 7))
    for dst, *options in (("all", "--keep-checksums"), ("new", "--since", tmp_path / "old.safetensors")):
        path = tmp_path / f"{dst}.safetensors"
        code, out, err = embpack_command(
            "quantize", src, path, "--plan", plan, "--max-bytes", "15 %", "--max-loss", "1", *options
        )
        assert (code, err) == (0, "")
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()
    assert (tmp_path / "new.safetensors").stat().st_size <= 0.15 * src.stat().st_size
    [line] = [line for line in out.splitlines() if re.search(r"user_emb.weight.*%", line)]
    assert f"{ROWS - SPAN:,}" in line and f"{SPAN:,}" in line


def test_a_table_that_loses_too_much_is_refused_and_the_old_file_stays(old, tmp_path):
    before = old.read_bytes()
    src = write_safetensors(tmp_path, alter(make_arrays(), 7))
    with pytest.raises(embpack.LossLimitError):
        quantize(src, old, since=old, max_loss=0.01)
    assert old.read_bytes() == before


@pytest.mark.parametrize("method", ["asym", "kmeans-cls"])
def test_workers_leave_rows_alone(tmp_path, monkeypatch, method):
    monkeypatch.setattr("embpack.ranges.chunk_rows", span_rows)
    monkeypatch.setattr("embpack.ranges._RANGE_VALUES", 1)
    src, options = write_safetensors(tmp_path, make_arrays()), {"max_shard_size": "300 kB", "method": method}
    quantize(src, tmp_path / "old", keep_checksums=True, engine=Here(), **options)
    if method == "asym":
        write_safetensors(tmp_path, alter(make_arrays(), 7))
    compare(src, tmp_path / "old", tmp_path, suffix="", **options)
    again = quantize(src, tmp_path / "again", since=tmp_path / "old", engine=Here(), **options)
    assert read_tree(tmp_path / "again") == read_tree(tmp_path / "all")
    assert find_table(again).reused_rows == ROWS - (SPAN if method == "asym" else 0)


def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    src, options = write_safetensors(tmp_path, make_arrays()), {"max_shard_size": "200 kB"}
    quantize(src, tmp_path / "packed", keep_checksums=True, **options)
    write_safetensors(tmp_path, alter(make_arrays(), 7))
    quantize(src, tmp_path / "all", keep_checksums=True, **options)
    stopped = Stopped(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize(src, tmp_path / "packed", since=tmp_path / "packed", **options)
    stopped.undo()
    report = quantize(src, tmp_path / "packed", since=tmp_path / "packed", resume=True, **options)
    assert read_tree(tmp_path / "packed") == read_tree(tmp_path / "all")
    assert find_table(report).reused_rows == ROWS - SPAN


def test_a_run_without_checksums_is_not_gone_on_with(tmp_path, monkeypatch):
    src, options = write_safetensors(tmp_path, make_arrays()), {"max_shard_size": "200 kB"}
    stopped = Stopped(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize(src, tmp_path / "packed", **options)
    stopped.undo()
    with pytest.raises(ValueError, match=r"the files get other tensors: .* or keep_checksums \(--keep-checksums\)"):
        quantize(src, tmp_path / "packed", resume=True, keep_checksums=True, **options)


def test_what_is_kept_is_little_and_as_documented(tmp_path):
    arrays = make_arrays()
    src = write_safetensors(tmp_path, arrays)
    quantize(src, tmp_path / "with.safetensors", keep_checksums=True, method="optimal", bits=2)
    quantize(src, tmp_path / "without.safetensors", method="optimal", bits=2)
    kept, plain = (read_raw(tmp_path / f"{name}.safetensors") for name in ("with", "without"))
    assert set(kept.tensors) - set(plain.tensors) == {f"{name}{SUFFIX}" for name in arrays.tables}
    for name in plain.tensors:
        assert kept.tensors[name] == plain.tensors[name]
    tensor = kept.tensors[f"user_emb.weight{SUFFIX}"]
    assert (tensor.dtype, tensor.shape) == ("U8", (1 + -(-ROWS // SPAN), 64))
    assert len(tensor.payload) < 0.002 * len(kept.tensors["user_emb.weight"].payload)
    assert tensor.payload[:32].rstrip(b"\0") == embpack.__version__.encode()
    first = tensor.payload[64:128]
    rows, packed = arrays.tables["user_emb.weight"][:SPAN], kept.tensors["user_emb.weight"].payload
    assert first[:16] == hashlib.sha256(rows.tobytes()).digest()[:16]
    assert first[16:32] == hashlib.sha256(packed[: SPAN * 20]).digest()[:16]
    table = embpack.quantize(rows, "optimal", 2)
    error, square = np.frombuffer(first[32:48], "<f8")
    assert table.loss == (error / square) ** 0.5


def test_readers_leave_what_is_kept_out(old, tmp_path, embpack_command):
    plain = tmp_path / "plain.safetensors"
    quantize(tmp_path / "model.safetensors", plain)
    tables = embpack.load(old, verify=True)
    assert list(tables) == list(embpack.load(plain))
    for path in (old, plain):
        embpack.dequantize_file(path, tmp_path / f"back-{path.name}")
    back = read_raw(tmp_path / f"back-{old.name}")
    assert back == read_raw(tmp_path / f"back-{plain.name}")
    code, out, _ = embpack_command("inspect", old, "--verify")
    assert code == 0 and "2 tables with checksums of the source's rows, for --since" in out
    code, out, _ = embpack_command("inspect", plain, "--json")
    assert [table["keeps_checksums"] for table in json.loads(out)["tables"]] == [False, False]
    code, out, _ = embpack_command("inspect", old, "--json")
    assert [table["keeps_checksums"] for table in json.loads(out)["tables"]] == [True, True]
    assert len(json.loads(out)["other_tensors"]) == 1


def test_models_are_loaded_from_files_that_keep_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(100, 16), "top": torch.nn.Linear(16, 2)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    quantize(tmp_path / "model.safetensors", tmp_path / "packed.safetensors", keep_checksums=True)
    from embpack.torch import load_checkpoint

    loaded = load_checkpoint(model, tmp_path / "packed.safetensors")
    assert type(loaded["emb"]).__name__ == "PackedEmbedding"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def find_tensor(path, name):
    """Where a tensor begins in its file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


def test_packed_rows_that_were_altered_are_not_copied(old, tmp_path):
    flip(old, find_tensor(old, "user_emb.weight") + 36 * (SPAN + 5))
    src = tmp_path / "model.safetensors"
    message = r"old.safetensors: table 'user_emb.weight': rows 4096 to 8191 were altered since .*leave out --since"
    with pytest.raises(FormatError, match=message):
        quantize(src, tmp_path / "new.safetensors", since=old)
    assert not (tmp_path / "new.safetensors").exists()
    # Rows that are packed anyway may be damaged.
    write_safetensors(tmp_path, alter(make_arrays(), SPAN))
    compare(src, old, tmp_path)


def test_clusters_that_were_altered_are_not_copied(tmp_path):
    src, old = write_safetensors(tmp_path, make_arrays(1000)), tmp_path / "old.safetensors"
    quantize(src, old, method="kmeans-cls", keep_checksums=True)
    flip(old, find_tensor(old, "user_emb.weight.cluster") + 5)
    with pytest.raises(FormatError, match=r"rows 0 to 999 were altered"):
        quantize(src, tmp_path / "new.safetensors", method="kmeans-cls", since=old)


def test_what_is_kept_is_not_used_if_it_was_altered(old, tmp_path):
    flip(old, find_tensor(old, f"user_emb.weight{SUFFIX}") + 70)
    with pytest.raises(FormatError, match=r"tensor 'user_emb.weight.embpack_ranges' was altered"):
        quantize(tmp_path / "model.safetensors", tmp_path / "new.safetensors", since=old)


def test_a_file_without_checksums_is_warned_of(tmp_path):
    src = write_safetensors(tmp_path, make_arrays())
    quantize(src, tmp_path / "old.safetensors")
    with pytest.warns(UserWarning, match=r"old.safetensors: keeps no checksums .* as with --keep-checksums"):
        report = quantize(src, tmp_path / "new.safetensors", since=tmp_path / "old.safetensors")
    assert find_table(report).packed_anew == "no checksums of its source were kept"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize(src, tmp_path / "new.safetensors", since=tmp_path / "new.safetensors")
    assert find_table(report).reused_rows == ROWS


def test_files_that_are_none_are_refused(old, tmp_path):
    src = tmp_path / "model.safetensors"
    with pytest.raises(FormatError, match=r"model.safetensors: holds no packed tables"):
        quantize(src, tmp_path / "new.safetensors", since=src)
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors"):
        quantize(src, tmp_path / "new.safetensors", since=tmp_path / "gone.safetensors")
    old.write_bytes(old.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"payload is"):
        quantize(src, tmp_path / "new.safetensors", since=old)
    assert not (tmp_path / "new.safetensors").exists()


def test_a_source_with_a_tensor_of_that_name_is_refused(tmp_path):
    arrays = make_arrays()
    arrays.others[f"user_emb.weight{SUFFIX}"] = np.zeros((3, 3), np.uint8)
    src = write_safetensors(tmp_path, arrays)
    quantize(src, tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match=r"'user_emb.weight.embpack_ranges' would be there twice"):
        quantize(src, tmp_path / "new.safetensors", keep_checksums=True)


def test_a_dry_run_says_what_would_be_packed(old, tmp_path, embpack_command):
    src = write_safetensors(tmp_path, alter(make_arrays(), 7))
    code, out, err = embpack_command("quantize", src, "--method", "asym", "--since", old, "--dry-run")
    assert (code, err) == (0, "")
    assert f"user_emb.weight: {ROWS - SPAN:,} rows left alone, {SPAN:,} to pack" in out
    assert "packing all rows takes about 1 s" in out
    code, out, err = embpack_command("quantize", src, "--method", "asym", "--since", old, "--dry-run", "--json")
    value = json.loads(out)
    assert {table["name"]: table["reused_rows"] for table in value["tables"]} == {
        "user_emb.weight": ROWS - SPAN,
        "item_emb.weight": 300,
    }
    code, out, err = embpack_command("quantize", src, tmp_path / "n.safetensors", "--method", "asym", "--since", old)
    assert code == 0 and value["totals"]["destination_bytes"] == (tmp_path / "n.safetensors").stat().st_size


def test_the_command_says_why_nothing_could_be_left_alone(old, tmp_path, embpack_command):
    code, out, _ = embpack_command(
        "quantize", tmp_path / "model.safetensors", tmp_path / "n.safetensors", "--method", "sym", "--since", old
    )
    assert code == 0
    assert "all rows packed: user_emb.weight and 1 more (it was packed by asym and is to be by sym)" in " ".join(
        out.split()
    ) or "all rows packed: item_emb.weight and 1 more (it was packed by asym and is to be by sym)" in " ".join(
        out.split()
    )


def test_rows_that_others_have_written_are_forgotten(old, tmp_path):
    with open_packed(old) as packed:
        [piece] = packed.tables["user_emb.weight"].pieces
        kept = piece.kept.read()
    known = forget_rows(kept, DIM, np.array([SPAN, 2 * SPAN - 1, ROWS - 1]))
    assert not known[[2, 4]].any() and np.array_equal(known[[0, 1, 3]], kept[[0, 1, 3]])
    assert kept[2].any()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200 kB"}])
def test_rows_that_were_updated_are_packed_again(tmp_path, options):
    name = "user_emb.weight"
    src, old = write_safetensors(tmp_path, make_arrays()), tmp_path / ("old" if options else "old.safetensors")
    quantize(src, old, keep_checksums=True, **options)
    rows = np.array([SPAN + 3, ROWS - 1])
    np.savez(tmp_path / "delta.npz", **{f"{name}.indices": rows, f"{name}.rows": np.ones((2, DIM), np.float32)})
    embpack.update_file(old, [tmp_path / "delta.npz"])
    embpack.load(old, verify=True)
    with open_packed(old) as packed:
        packed.verify()
    # The source is what it was: the updated rows are not.
    report = find_table(compare(src, old, tmp_path, suffix=old.suffix, **options))
    assert report.reused_rows == 2 * SPAN


def test_sums_are_kept_to_the_last_bit():
    sums = [Sums(0.1, 1e300, 7, 5e-324), Sums(np.pi, 0.0, 1 << 40, 3.0)]
    ranges = np.zeros(2, RANGE)
    set_sums(ranges, sums)
    assert as_sums(as_ranges(ranges.view(np.uint8).reshape(2, -1))) == sums


def test_chunks_are_whole_ranges():
    for dim in (1, 3, 64, 100, 1000, 5000, 100_000):
        assert chunk_rows(dim) % span_rows(dim) == 0
        assert count_ranges(span_rows(dim) + 1, dim) == 2


def test_what_was_found_can_be_sent_to_workers(old, tmp_path):
    from embpack.formats import open_checkpoint
    from embpack.rules import Rules, decide_all
    from embpack.shard_writer import TableWriter
    from embpack.unchanged import open_old

    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint, open_old(old) as find_old:
        rules = Rules(variant=embpack.Variant("asym"), keep_checksums=True)
        sent = pickle.dumps([each for each in find_old(decide_all(checkpoint, rules)) if each.variant])
    for decision in pickle.loads(sent):
        rows = list(TableWriter(decision).pack_rows(0, decision.tensor.shape[0]))
        assert sum(each.reused for each in rows) == decision.tensor.shape[0]

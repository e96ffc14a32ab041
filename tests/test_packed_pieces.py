"""Packed tables in pieces over the files of a folder: written, joined again, and refused where they do not fit."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    LENGTH_BYTES,
    Arrays,
    checksum_header,
    read_raw,
    run_python,
    write_raw,
    write_safetensors,
    write_shards,
)
from safetensors import safe_open
from torch import nn

import embpack
from embpack import FormatError
from embpack.files import PIECE_ROWS
from embpack.formats import mapped as mapping
from embpack.formats.mapped import is_mapped
from embpack.packed_files import open_packed
from embpack.torch import load_checkpoint

ROWS, DIM = 20_001, 24
# One of each layout, that with clusters and codebooks first.
METHODS = ["kmeans-cls", "asym", "trellis", "kmeans"]
SIZE, MOST = "200 kB", 200_000


def make_arrays(rows=ROWS, dim=DIM) -> Arrays:
    rng = np.random.default_rng(21)
    return Arrays(
        {
            "bottom.weight": rng.standard_normal((3, 5), np.float32),
            "user_emb.weight": rng.standard_normal((rows, dim), np.float32),
            "item_emb.weight": rng.standard_normal((300, 16), np.float32).astype(np.float16),
            "top.weight": rng.standard_normal((2, 2), np.float32),
        }
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("source"), make_arrays())


@pytest.fixture(scope="module")
def packed(tmp_path_factory, source):
    """By method: a folder with a table in pieces, and a file with the same table whole."""
    folder, made = tmp_path_factory.mktemp("packed"), {}
    for method in METHODS:
        made[method] = folder / method, folder / f"{method}.safetensors"
        embpack.quantize_file(source, made[method][0], method=method, max_shard_size=SIZE)
        embpack.quantize_file(source, made[method][1], method=method)
    return made


def read_entries(path):
    return json.loads(read_raw(path).metadata["embpack"])


def list_entries(raw):
    """Make the header's entries of a file's tensors."""
    entries, end = {}, 0
    for name, tensor in raw.tensors.items():
        start, end = end, end + len(tensor.payload)
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    return entries


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


# Written and joined


@pytest.mark.parametrize("access", ["mapped", "memory"])
@pytest.mark.parametrize("method", METHODS)
def test_a_table_in_pieces_is_the_table(packed, method, access):
    folder, file = packed[method]
    whole, joined = embpack.load(file), embpack.load(folder, verify=True, access=access)
    assert set(joined) == set(whole)
    for name, table in joined.items():
        assert table.packed.tobytes() == whole[name].packed.tobytes()
        assert [array.tobytes() for array in table.beside] == [array.tobytes() for array in whole[name].beside]
        assert (table.row_format, table.dtype, table.method) == (
            whole[name].row_format,
            whole[name].dtype,
            whole[name].method,
        )
        assert table.loss == pytest.approx(whole[name].loss, rel=1e-14)
        for array in (table.packed, *table.beside):
            assert is_mapped(array) is (access == "mapped") and array.flags.writeable is (access == "memory")
    indices = np.array([0, ROWS - 1, PIECE_ROWS - 1, PIECE_ROWS, 17])
    assert joined["user_emb.weight"][indices].tobytes() == whole["user_emb.weight"][indices].tobytes()
    if access == "mapped":
        assert joined["user_emb.weight"].packed.ctypes.data % 4096 == 0


@pytest.mark.parametrize("method", METHODS)
def test_files_keep_to_the_size_and_begin_with_a_piece_at_a_page(packed, method):
    versions = set()
    for path in files_of(packed[method][0]):
        assert path.stat().st_size <= MOST
        value, raw = read_entries(path), read_raw(path)
        pieces = [name for name, entry in value["tables"].items() if "piece" in entry]
        versions.add((value["version"], len(pieces)))
        if pieces:
            [name] = pieces
            assert next(iter(raw.tensors)) == name and (LENGTH_BYTES + raw.header_bytes) % 4096 == 0
    assert versions == {(2, 0), (3, 1)}


def test_the_metadata_of_pieces_are_those_of_the_format(packed):
    [folder, file] = packed["trellis"]
    entries = {}
    for path in files_of(folder):
        value = read_entries(path)
        assert value["checksum"] == checksum_header(value, list_entries(read_raw(path)))
        entries |= {name: entry for name, entry in value["tables"].items() if "piece" in entry}
    firsts = [entry["piece"]["first_row"] for entry in entries.values()]
    assert list(entries) == [f"user_emb.weight.piece_{number}" for number in range(len(entries))] and len(entries) > 2
    assert firsts == list(np.cumsum([0, *(entry["num_embeddings"] for entry in entries.values())])[:-1])
    weight = make_arrays().tables["user_emb.weight"].astype(np.float64)
    for entry in entries.values():
        piece, start = entry["piece"], entry["piece"]["first_row"]
        assert (piece["table"], piece["num_embeddings"]) == ("user_emb.weight", ROWS)
        own = weight[start : start + entry["num_embeddings"]]
        assert piece["square_norm"] == pytest.approx((own**2).sum(), rel=1e-6)
    squares = np.array([entry["piece"]["square_norm"] for entry in entries.values()])
    losses = np.array([entry["loss"] for entry in entries.values()])
    loss = embpack.load(file)["user_emb.weight"].loss
    assert np.sqrt((losses**2 * squares).sum() / squares.sum()) == pytest.approx(loss, rel=1e-12)


def test_other_programs_open_the_files(packed):
    for path in files_of(packed["asym"][0]):
        with safe_open(path, "numpy") as file:
            assert all(file.get_tensor(name).nbytes for name in file.keys())


def test_a_piece_can_be_looked_up_by_any_reader_of_rows(packed):
    [folder, file] = packed["asym"]
    raw = read_raw(files_of(folder)[1]).tensors["user_emb.weight.piece_0"]
    assert embpack.load(file)["user_emb.weight"].packed.tobytes().startswith(raw.payload)


@pytest.mark.parametrize("method", METHODS)
def test_unpacking_gives_whole_tensors(packed, tmp_path, method):
    folder, file = packed[method]
    tables = embpack.dequantize_file(folder, tmp_path / "plain")
    embpack.dequantize_file(file, tmp_path / "plain.safetensors")
    assert {table.name for table in tables} == set(embpack.load(file))
    [path] = files_of(tmp_path / "plain")
    assert path.name == "model.safetensors" and {each.name for each in (tmp_path / "plain").iterdir()} == {path.name}
    joined, whole = read_raw(path).tensors, read_raw(tmp_path / "plain.safetensors").tensors
    assert {name: tensor.payload for name, tensor in joined.items()} == {
        name: tensor.payload for name, tensor in whole.items()
    }


def test_unpacked_files_keep_to_a_size_too(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("embpack.unpacking.DEFAULT_SIZE", 100_000)
    embpack.dequantize_file(packed["asym"][0], tmp_path / "plain")
    names = [path.name for path in files_of(tmp_path / "plain")]
    assert names == [f"model-{k:05}-of-{len(names):05}.safetensors" for k in range(1, len(names) + 1)]
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(make_arrays().tensors) and len(names) > 1
    embpack.quantize_file(tmp_path / "plain", tmp_path / "again", method="asym")
    assert set(embpack.load(tmp_path / "again")) == {"user_emb.weight", "item_emb.weight"}


def test_groups_and_modules_take_it_as_any_table(packed):
    folder, file = packed["trellis"]
    joined, whole = embpack.load(folder), embpack.load(file)
    name, other = "user_emb.weight", "item_emb.weight"
    results = []
    for tables in (joined, whole):
        group = embpack.TableGroup([tables[name], tables[other]])
        results.append(group.embedding_bag(np.array([ROWS - 1, 4096, 4095, 299]), np.array([0, 3, 4])))
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("access", ["mapped", "memory"])
def test_a_model_is_loaded_from_pieces_and_written_to_without_harm(packed, access):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.user_emb = nn.Embedding(ROWS, DIM)
            self.item_emb = nn.Embedding(300, 16)
            self.bottom, self.top = nn.Linear(5, 3, bias=False), nn.Linear(2, 2, bias=False)

    folder, file = packed["kmeans-cls"]
    before = {path: path.read_bytes() for path in files_of(folder)}
    with torch.device("meta"):
        model = Model()
    load_checkpoint(model, folder, access=access)
    indices = torch.tensor([0, ROWS - 1, 5000])
    whole = embpack.load(file)["user_emb.weight"]
    assert model.user_emb(indices).numpy().tobytes() == whole[indices.numpy()].tobytes()
    model.user_emb.packed.zero_()
    model.user_emb.clusters.zero_()
    assert before == {path: path.read_bytes() for path in files_of(folder)}


def test_there_is_no_other_access(packed):
    with pytest.raises(ValueError, match="access is 'fast'; choose one of mapped, memory"):
        embpack.load(packed["asym"][1], access="fast")
    with pytest.raises(ValueError, match="access is 'fast'; choose one of"):
        load_checkpoint(nn.Sequential(nn.Embedding(3, 4)), packed["asym"][1], access="fast")


# Which files


def test_a_file_becomes_a_folder_if_the_name_has_no_suffix(source, tmp_path):
    report = embpack.quantize_file(source, tmp_path / "packed", method="asym")
    [path] = files_of(tmp_path / "packed")
    assert path.name == "model.embpack.safetensors" and read_entries(path)["version"] == 2
    assert report.file_bytes_after == path.stat().st_size
    embpack.quantize_file(source, tmp_path / "packed.safetensors", method="asym")
    assert path.read_bytes() == (tmp_path / "packed.safetensors").read_bytes()
    embpack.quantize_file(source, tmp_path / "packed", method="sym")  # embpack wrote what is there


def test_files_of_an_index_stay_unless_a_size_is_given(tmp_path):
    src = write_shards(tmp_path, make_arrays())
    embpack.quantize_file(src, tmp_path / "kept", method="asym")
    assert [path.name for path in files_of(tmp_path / "kept")] == [path.name for path in files_of(src)]
    embpack.quantize_file(src, tmp_path / "cut", method="asym", max_shard_size=SIZE)
    names = [path.name for path in files_of(tmp_path / "cut")]
    assert names == [f"model-{k:05}-of-{len(names):05}.safetensors" for k in range(1, len(names) + 1)]
    kept, cut = embpack.load(tmp_path / "kept"), embpack.load(tmp_path / "cut")
    assert {name: table.packed.tobytes() for name, table in kept.items()} == {
        name: table.packed.tobytes() for name, table in cut.items()
    }
    assert {name: tensor.nbytes for name, tensor in open_others(tmp_path / "kept").items()} == {
        name: tensor.nbytes for name, tensor in open_others(tmp_path / "cut").items()
    }


def open_others(path):
    with open_packed(path) as packed:
        return packed.others


def test_what_cannot_be_cut_makes_a_larger_file(source, tmp_path):
    embpack.quantize_file(source, tmp_path / "packed", method="asym", max_shard_size=1000)
    sizes = {
        entry["piece"]["first_row"]: entry["num_embeddings"]
        for path in files_of(tmp_path / "packed")
        for entry in read_entries(path)["tables"].values()
        if "piece" in entry
    }
    assert sizes == {row: min(PIECE_ROWS, ROWS - row) for row in range(0, ROWS, PIECE_ROWS)}
    assert embpack.load(tmp_path / "packed", verify=True)["item_emb.weight"].num_embeddings == 300


@pytest.mark.parametrize(
    ("dst", "size", "message"),
    [
        ("packed.safetensors", SIZE, "max_shard_size is of the files of a folder; leave .safetensors out"),
        ("packed", "0", "max_shard_size: '0' leaves no room in a file"),
        ("packed", "much", "max_shard_size: 'much' is no size"),
        ("packed", "10 %", "max_shard_size: '10 %' is no size"),
    ],
)
def test_a_size_that_cannot_be(source, tmp_path, dst, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        embpack.quantize_file(source, tmp_path / dst, max_shard_size=size)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", [SIZE, "60 kB", None])
def test_a_dry_run_says_the_bytes_that_are_then_written(embpack_command, source, tmp_path, size):
    options = ["--method", "trellis", *(["--max-shard-size", size] if size else []), "--json"]
    code, out, _ = embpack_command("quantize", source, tmp_path / "packed", *options, "--dry-run")
    assert code == 0 and not (tmp_path / "packed").exists()
    planned = json.loads(out)["totals"]["destination_bytes"]
    assert embpack_command("quantize", source, tmp_path / "packed", *options)[0] == 0
    assert planned == sum(path.stat().st_size for path in files_of(tmp_path / "packed"))


@pytest.mark.parametrize("size", ["60 kB", "200 kB", "2 MB", None])
def test_a_plan_counts_what_is_then_written_and_no_less(embpack_command, source, tmp_path, size):
    options = ["--auto", "--max-bytes", "18 %", "--method", "optimal,trellis", "--bits", "2,4"]
    options += ["--save-plan", tmp_path / "plan.json", *(["--max-shard-size", size] if size else [])]
    code, _, err = embpack_command("quantize", source, tmp_path / "packed", *options)
    assert (code, err) == (0, "")
    written = sum(path.stat().st_size for path in files_of(tmp_path / "packed"))
    planned = embpack.Plan.load(tmp_path / "plan.json").file_bytes
    assert written <= planned <= source.stat().st_size * 18 // 100
    # Each piece is counted as if its file were filled up by a whole page.
    assert planned - written < 4096 * len(files_of(tmp_path / "packed")) + 2000


def test_inspect_shows_one_table(embpack_command, packed):
    folder, file = packed["trellis"]
    code, out, _ = embpack_command("inspect", folder, "--verify")
    pieces = len([path for path in files_of(folder) if "piece" in str(read_entries(path))])
    assert code == 0 and len(re.findall(r"^user_emb\.weight .* 20,001 ", out, re.MULTILINE)) == 1
    assert f"user_emb.weight: in {pieces} pieces" in out
    assert f"checksums of 2 tables, 2 other tensors and {len(files_of(folder))} headers agree" in out
    value = json.loads(embpack_command("inspect", folder, "--json")[1])
    table = next(table for table in value["tables"] if table["name"] == "user_emb.weight")
    assert (table["file"], table["checksum"], len(table["pieces"])) == (None, None, pieces)
    assert sum(piece["num_embeddings"] for piece in table["pieces"]) == table["num_embeddings"] == ROWS
    [other] = [table for table in value["tables"] if table["name"] == "item_emb.weight"]
    assert other["pieces"] == [] and other["file"]
    assert json.loads(embpack_command("inspect", file, "--json")[1])["totals"]["num_tables"] == 2


# Mapped, as far as that goes


def rewrite(path):
    """Write a file again as another program may: with a header that does not end where a page does."""
    raw = read_raw(path)
    header = {"__metadata__": raw.metadata, **list_entries(raw)}
    write_raw(path, header, b"".join(tensor.payload for tensor in raw.tensors.values()))


def test_pieces_that_begin_at_no_page_are_read_into_their_place(packed, tmp_path):
    folder, file = packed["kmeans-cls"]
    shutil.copytree(folder, tmp_path / "packed")
    for path in files_of(tmp_path / "packed"):
        rewrite(path)
    name = "user_emb.weight"
    message = r"model-00002-of-.*: .user_emb.weight.piece_0.* does not begin at a page, so it is read into"
    with pytest.warns(RuntimeWarning, match=message):
        joined = embpack.load(tmp_path / "packed", verify=True)[name]
    assert joined.packed.tobytes() == embpack.load(file)[name].packed.tobytes()
    assert joined.clusters.tobytes() == embpack.load(file)[name].clusters.tobytes()


def test_pieces_that_cannot_be_mapped_are_read_into_memory(packed, monkeypatch):
    def refuse(*arguments):
        raise OSError(19, "No such device")

    folder, file = packed["asym"]
    monkeypatch.setattr("embpack.formats.joined.map_over", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be mapped here .No such device., so it is read into memory"):
        joined = embpack.load(folder)["user_emb.weight"]
    assert joined.packed.tobytes() == embpack.load(file)["user_emb.weight"].packed.tobytes()
    assert not is_mapped(joined.packed)


def test_pieces_are_mapped_where_no_memory_may_be_written(packed, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    folder, file = packed["asym"]
    monkeypatch.setattr(mapping, "PrivateMap", type("Refused", (), {"__new__": refuse}))
    joined = embpack.load(folder)["user_emb.weight"]
    assert joined.packed.tobytes() == embpack.load(file)["user_emb.weight"].packed.tobytes()
    assert not joined.packed.flags.writeable


def test_maps_go_with_the_tables_and_keep_no_descriptor(packed):
    script = """
import gc, os, sys
from pathlib import Path
import embpack

def count():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(sys.argv[1] in line for line in lines), len(os.listdir("/proc/self/fd"))

before = count()
tables = {"user": embpack.load(sys.argv[1])["user_emb.weight"]}
during = count()
row = tables["user"][20_000].sum()
view = tables["user"].packed[5000:]
tables.clear()
gc.collect()
kept = count()
view.sum()
del view
gc.collect()
print(before[0], during[0] >= 3, kept[0] == during[0], count()[0], during[1] == before[1])
"""
    done = run_python(script, packed["asym"][0])
    assert done.stdout.split() == ["0", "True", "True", "0", "True"], done.stdout + done.stderr


def test_mapped_pieces_outlive_their_files(packed, tmp_path):
    folder, file = packed["asym"]
    shutil.copytree(folder, tmp_path / "packed")
    joined = embpack.load(tmp_path / "packed")["user_emb.weight"]
    shutil.rmtree(tmp_path / "packed")
    assert joined.packed.tobytes() == embpack.load(file)["user_emb.weight"].packed.tobytes()


# Pieces that do not fit


@pytest.fixture
def copied(packed, tmp_path):
    shutil.copytree(packed["trellis"][0], tmp_path / "packed")
    return tmp_path / "packed"


def change_piece(path, change):
    """Change what a file says of its piece, and the checksum of the header with that."""
    raw = read_raw(path)
    value = json.loads(raw.metadata["embpack"])
    entries = list_entries(raw)
    [name] = [name for name, entry in value["tables"].items() if "piece" in entry]
    change(value["tables"][name])
    value["checksum"] = checksum_header(value, entries)
    payload = b"".join(tensor.payload for tensor in raw.tensors.values())
    write_raw(path, {"__metadata__": {**raw.metadata, "embpack": json.dumps(value)}, **entries}, payload)


def drop(folder, path):
    """Take a file out of a folder, and out of its index."""
    path.unlink()
    index = folder / "model.embpack.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"] = {name: own for name, own in value["weight_map"].items() if own != path.name}
    index.write_text(json.dumps(value))


def error_of(path):
    with pytest.raises(FormatError) as caught:
        embpack.load(path)
    return str(caught.value)


def test_a_missing_file_is_named(copied):
    path = files_of(copied)[2]
    path.unlink()
    message = error_of(copied)
    assert "'user_emb.weight.piece_" in message and f"{path.name}', but there is no such file" in message


@pytest.mark.parametrize("at", [1, 2, -1])
def test_missing_rows_are_named(copied, at):
    pieces = [path for path in files_of(copied) if "piece" in str(read_entries(path))]
    path = pieces[at]
    [entry] = [entry for entry in read_entries(path)["tables"].values() if "piece" in entry]
    start, number = entry["piece"]["first_row"], range(len(pieces))[at]
    drop(copied, path)
    assert (
        f"table 'user_emb.weight': piece_{number} (rows {start} to {start + entry['num_embeddings']}) is missing: "
        in (message := error_of(copied))
    )
    assert message.endswith(f"download {path.name}")


def test_one_file_alone_says_where_the_others_are(copied):
    path = next(path for path in files_of(copied) if "piece_1" in str(read_entries(path)))
    message = error_of(path)
    assert "'user_emb.weight': piece_0 (rows 0 to " in message
    assert message.endswith("model-00001-of-00006.safetensors is there, too: open the folder, or its index") or (
        "is there, too: open the folder, or its index" in message
    )


def set_value(key, value):
    return lambda entry: entry.update({key: value})


def set_piece(key, value):
    return lambda entry: entry["piece"].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("method", "asym"), "is of different runs|are of different runs"),
        (set_value("dtype", "float16"), "are of different runs"),
        (set_piece("num_embeddings", ROWS + 4096), "are of different runs"),
        (set_piece("first_row", 0), "which others have, too|which no piece has|is missing"),
        (set_piece("first_row", 1), "says piece is"),
        (set_piece("first_row", -4096), "says piece is"),
        (set_piece("first_row", 1 << 62), "which no piece has"),
        (set_piece("first_row", True), "says piece is"),
        (set_piece("num_embeddings", 5), "which no piece has"),
        (set_piece("num_embeddings", 1e9), "says piece is"),
        (set_piece("table", "other.weight"), "is a piece of 'other.weight', which its name does not"),
        (set_piece("table", 5), "says piece is"),
        (set_piece("square_norm", -1.0), "says piece is"),
        (set_piece("square_norm", 1e200), "says piece is"),
        (set_piece("square_norm", None), "says loss is"),
        (set_piece("more", 1), "says piece is"),
        (set_value("piece", None), "says piece is"),
        (set_value("piece", []), "says piece is"),
        (set_value("loss", None), "says loss is"),
        (set_value("loss", 1e200), "says loss is"),
        (lambda entry: entry["piece"].pop("table"), "says piece is"),
    ],
)
def test_a_piece_that_says_what_is_not_so(copied, change, message):
    path = next(path for path in files_of(copied) if "piece_1" in str(read_entries(path)))
    change_piece(path, change)
    assert re.search(message, error_of(copied)), error_of(copied)


def test_pieces_must_share_what_they_share(copied):
    path = next(path for path in files_of(copied) if "piece_1" in str(read_entries(path)))
    content = bytearray(path.read_bytes())
    content[content.index(read_raw(path).tensors["user_emb.weight.piece_1.codebook"].payload) + 2] ^= 1
    path.write_bytes(content)
    message = error_of(copied)
    assert f"{path}: 'user_emb.weight.piece_1.codebook' is not as in " in message
    with pytest.raises(FormatError, match="was altered"):
        embpack.load(copied, verify=True)
    with pytest.raises(FormatError, match="is not as in"):
        embpack.dequantize_file(copied, copied.with_name("plain"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_flipped_byte_of_a_piece_is_found(embpack_command, copied, number):
    path = next(path for path in files_of(copied) if f"piece_{number}" in str(read_entries(path)))
    content = bytearray(path.read_bytes())
    content[content.index(read_raw(path).tensors[f"user_emb.weight.piece_{number}"].payload) + 99] ^= 16
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"table 'user_emb.weight.piece_{number}' was altered"):
        embpack.load(copied, verify=True)
    code, _, err = embpack_command("inspect", copied, "--verify")
    assert code == 1 and f"'user_emb.weight.piece_{number}' was altered" in err
    with pytest.raises(FormatError, match=f"'user_emb.weight.piece_{number}' was altered"):
        embpack.dequantize_file(copied, copied.with_name("plain"))


def test_a_table_that_is_there_twice(copied):
    whole = embpack.load(copied)["item_emb.weight"]
    embpack.save(copied / "more.safetensors", {"user_emb.weight": whole})
    index = copied / "model.embpack.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["user_emb.weight"] = "more.safetensors"
    value["weight_map"]["user_emb.weight.codebook"] = "more.safetensors"
    index.write_text(json.dumps(value))
    assert "table 'user_emb.weight' is there in pieces and as a tensor of its own" in error_of(copied)


def test_a_name_that_a_piece_would_have_is_refused(tmp_path):
    weight = np.ones((9000, 16), np.float32)
    src = write_safetensors(
        tmp_path, Arrays({"emb.weight": weight, "emb.weight.piece_1": np.zeros((1, 1), np.float32)})
    )
    with pytest.raises(ValueError, match=r"emb\.weight\.piece_1"):
        embpack.quantize_file(src, Path(tmp_path) / "packed", method="asym", max_shard_size="60 kB")


def test_a_file_of_another_packing_is_refused(packed, tmp_path):
    # The same names, shapes and methods, other values: two nights of one table.
    shutil.copytree(packed["asym"][0], tmp_path / "packed")
    other = make_arrays()
    other.tables["user_emb.weight"] *= -1
    src = write_safetensors(tmp_path, other)
    embpack.quantize_file(src, tmp_path / "other", method="asym", max_shard_size=SIZE)
    name = sorted(path.name for path in (tmp_path / "other").glob("*.safetensors"))[1]
    shutil.copy(tmp_path / "other" / name, tmp_path / "packed" / name)
    with pytest.raises(FormatError, match=f"{name} is not the file that this index was written with"):
        embpack.load(tmp_path / "packed")


@pytest.mark.parametrize("said", [None, [], {}, {"headers": 3}, {"headers": {}}])
def test_an_index_that_says_nothing_of_its_files_is_damaged(packed, tmp_path, said):
    shutil.copytree(packed["asym"][0], tmp_path / "packed")
    [path] = (tmp_path / "packed").glob("*.index.json")
    index = json.loads(path.read_text())
    index["metadata"]["embpack"] = said
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="copy the folder"):
        embpack.load(tmp_path / "packed")


def test_an_index_of_another_program_is_read(packed, tmp_path):
    shutil.copytree(packed["asym"][0], tmp_path / "packed")
    [path] = (tmp_path / "packed").glob("*.index.json")
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert set(embpack.load(tmp_path / "packed")) == set(embpack.load(packed["asym"][0]))

"""quantize_file and dequantize_file: the bytes, what is copied, and failures that leave nothing behind."""

import json
import os
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import (
    LENGTH_BYTES,
    Arrays,
    Write,
    as_array,
    names_in,
    read_raw,
    run_python,
    write_compressed_npz,
    write_npy,
    write_npz,
    write_old_torch,
    write_parquet,
    write_safetensors,
    write_shards,
    write_shards_named_by_index,
    write_sparse_table,
    write_torch,
    write_wrapped_torch,
)
from safetensors.torch import load_file, save_file

import embpack
from embpack import FormatError, chunks
from embpack.errors import LossLimitError
from embpack.layouts import BITS, PARAM_BYTES
from embpack.methods import METHODS

ROWS = 150
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two spans of 32 rows at embedding_dim 24, so that small tables have several."""
    make_chunks_small(monkeypatch)


def make_chunks_small(monkeypatch):
    monkeypatch.setattr("embpack.chunks.SPAN_VALUES", 32 * 24)
    monkeypatch.setattr("embpack.chunks.SPANS_OF_A_FILE", 2)


def make_weight(dtype=np.float32, rows=ROWS, dim=24, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(dtype)


def make_others(rng):
    """Tensors of every kind that is not packed."""
    return {
        "linear.weight": rng.standard_normal((8, 24), dtype=np.float32),
        "linear.bias": rng.standard_normal(8).astype(BF16),
        "half": rng.standard_normal((3, 2, 5)).astype(np.float16),
        "double": rng.standard_normal(4),
        "position_ids": rng.integers(-(2**60), 2**60, (1, 9)),
        "bytes": rng.integers(0, 256, 31).astype(np.uint8),
        "mask": rng.random(17) < 0.5,
        "step": np.array(1234567890123),
        "temperature": np.array(-0.0, np.float32),
        "embedding.empty": np.zeros((0, 24), np.float32),
        "no columns": np.zeros((5, 0), np.float32),
    }


def make_numpy_others(rng):
    """The same without bfloat16, which NumPy's files cannot hold."""
    return {name: array for name, array in make_others(rng).items() if array.dtype != BF16}


def make_column_others(rng):
    return {"id": rng.permutation(ROWS), "weight": rng.standard_normal(ROWS), "seen": rng.random(ROWS) < 0.5}


@dataclass(frozen=True)
class Kind:
    """A kind of source: how it is written, with which tables and other tensors."""

    write: Write
    dtypes: tuple[type, ...]
    make_others: object = lambda rng: {}
    suffix: str = ".safetensors"

    def make_arrays(self) -> Arrays:
        names = ("word_embeddings.weight", "user_emb.weight", "wte.weight")
        tables = {
            name: make_weight(dtype, seed=i) for i, (name, dtype) in enumerate(zip(names, self.dtypes, strict=False))
        }
        return Arrays(tables, self.make_others(np.random.default_rng(1)))


FLOATS = (np.float32, np.float16, BF16)
KINDS = {
    "safetensors": Kind(write_safetensors, FLOATS, make_others),
    "shards in a folder": Kind(write_shards, FLOATS, make_others, suffix=""),
    "shards by index": Kind(write_shards_named_by_index, FLOATS, make_others, suffix=""),
    "pt": Kind(write_torch, FLOATS, make_others),
    "pt with state_dict": Kind(write_wrapped_torch, FLOATS, make_others),
    "pt before 1.6": Kind(write_old_torch, FLOATS, make_others),
    "npy": Kind(write_npy, FLOATS[:1]),
    "npz": Kind(write_npz, FLOATS[:2], make_numpy_others),
    "npz compressed": Kind(write_compressed_npz, FLOATS[:2], make_numpy_others),
    "parquet": Kind(write_parquet, FLOATS[:2], make_column_others),
}


@dataclass(frozen=True)
class Packed:
    """A checkpoint and what quantize_file made of it."""

    kind: Kind
    arrays: Arrays
    src: Path
    dst: Path
    report: embpack.Report
    told: list[tuple[str, int]]

    @property
    def files(self) -> list[Path]:
        return sorted(self.dst.glob("*.safetensors")) if self.dst.is_dir() else [self.dst]


def pack(kind: Kind, folder: Path, **options) -> Packed:
    src = kind.write(folder, kind.make_arrays())
    dst, told = folder / f"packed{kind.suffix}", []
    report = embpack.quantize_file(
        src, dst, progress=lambda name, rows: told.append((name, rows)), **{"method": "asym", **options}
    )
    return Packed(kind, kind.make_arrays(), src, dst, report, told)


@pytest.fixture(params=KINDS)
def packed(request, tmp_path, small_chunks):
    return pack(KINDS[request.param], tmp_path)


# Packing, of every kind of source, in chunks of 64 rows


def test_tables_are_those_of_quantize(packed):
    loaded = embpack.load(packed.dst, verify=True)
    assert set(loaded) == set(packed.arrays.tables)
    for name, weight in packed.arrays.tables.items():
        expected = embpack.quantize(weight, "asym")
        assert loaded[name].packed.tobytes() == expected.packed.tobytes()
        assert loaded[name].loss == expected.loss
        assert (loaded[name].method, loaded[name].dtype) == ("asym", weight.dtype.name)


def test_other_tensors_are_copied_bit_for_bit(packed):
    copied = {name: tensor for file in packed.files for name, tensor in load_file(file).items()}
    assert set(copied) == set(packed.arrays.tables) | set(packed.arrays.others)
    for name, array in packed.arrays.others.items():
        found = as_array(copied[name])
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_files_have_the_size_that_arithmetic_says(packed):
    row_bytes = 24 // 2 + 4
    expected = len(packed.arrays.tables) * ROWS * row_bytes
    expected += sum(array.nbytes for array in packed.arrays.others.values())
    for file in packed.files:
        expected += LENGTH_BYTES + int.from_bytes(file.read_bytes()[:LENGTH_BYTES], "little")
    assert sum(file.stat().st_size for file in packed.files) == expected


def test_the_report_has_the_figures(packed):
    report = packed.report
    assert {table.name for table in report.tables} == set(packed.arrays.tables)
    for table in report.tables:
        weight = packed.arrays.tables[table.name]
        assert (table.num_embeddings, table.embedding_dim) == weight.shape
        assert (table.dtype, table.method) == (weight.dtype.name, "asym")
        assert (table.bytes_before, table.bytes_after) == (weight.nbytes, ROWS * 16)
        assert table.loss == embpack.quantize(weight, "asym").loss
        assert 0 < table.seconds <= report.seconds
        assert table.rows_per_second == ROWS / table.seconds
    assert set(report.passed_through) == set(packed.arrays.others)
    assert report.file_bytes_after == sum(file.stat().st_size for file in packed.files)
    folder = packed.src if packed.src.is_dir() else packed.src.parent
    is_sharded = packed.kind.suffix == ""
    sources = folder.glob("*.safetensors") if is_sharded else [packed.src]
    assert report.file_bytes_before == sum(file.stat().st_size for file in sources)


def test_progress_adds_up_to_the_rows(packed):
    for name in packed.arrays.tables:
        assert sum(rows for told, rows in packed.told if told == name) == 150
        assert len([rows for told, rows in packed.told if told == name]) >= 3  # a chunk is told at its end, too
    assert {name for name, _ in packed.told} == set(packed.arrays.tables)


def test_nothing_else_is_left_in_the_folder(packed):
    source = packed.src.relative_to(packed.dst.parent).parts[0]
    assert names_in(packed.dst.parent) == {source, packed.dst.name}


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("safetensors", ()),
        ("pt with state_dict", ("entry 'epoch' (int)",)),
        ("parquet", ("column 'word' (string)",)),
    ],
)
def test_what_is_left_out_is_reported(tmp_path, kind, left_out):
    assert pack(KINDS[kind], tmp_path).report.left_out == left_out


def test_shards_stay_shards(tmp_path):
    packed = pack(KINDS["shards in a folder"], tmp_path)
    before = json.loads((packed.src / "model.safetensors.index.json").read_text())
    after = json.loads((packed.dst / "model.embpack.safetensors.index.json").read_text())
    shards = {file.name for file in packed.src.glob("*.safetensors")}
    assert names_in(packed.dst) == {*shards, "model.embpack.safetensors.index.json", "embpack.json"}
    assert after["weight_map"] == before["weight_map"]
    payloads = [t.payload for file in packed.files for t in read_raw(file).tensors.values()]
    assert after["metadata"]["total_size"] == sum(map(len, payloads))


def test_every_shard_has_the_version(tmp_path):
    for file in pack(KINDS["shards in a folder"], tmp_path).files:
        value = json.loads(read_raw(file).metadata["embpack"])
        assert value["version"] == 2
        assert set(value["tables"]) <= set(read_raw(file).tensors)


def test_a_file_beside_the_shards_is_not_counted(tmp_path):
    src = write_shards(tmp_path, Arrays({"emb.weight": make_weight()}))
    [shard] = src.glob("*.safetensors")
    (src / "consolidated.safetensors").write_bytes(b"not of this checkpoint")
    report = embpack.quantize_file(src, tmp_path / "packed", method="asym")
    assert report.file_bytes_before == shard.stat().st_size


def test_metadata_of_the_source_are_kept(tmp_path):
    metadata = {"format": "pt", "note": 'Wörter, "quotes" and \\', "empty": ""}
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight()}), metadata)
    embpack.quantize_file(src, tmp_path / "packed.safetensors", method="asym")
    kept = read_raw(tmp_path / "packed.safetensors").metadata
    assert {key: kept[key] for key in kept if key != "embpack"} == metadata
    embpack.dequantize_file(tmp_path / "packed.safetensors", tmp_path / "plain.safetensors")
    assert read_raw(tmp_path / "plain.safetensors").metadata == metadata


@pytest.mark.parametrize("param_dtype", [None, *PARAM_BYTES])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", [*METHODS, "greedy:b=50,r=0.3", "table:xmin=-1.0,xmax=1.5"])
def test_every_method_and_format(tmp_path, small_chunks, method, bits, param_dtype):
    weight = make_weight(dim=17)
    src = write_npz(tmp_path, Arrays({"emb.weight": weight}))
    options = {"method": method, "bits": bits, "param_dtype": param_dtype}
    if method == "trellis" and (bits == 8 or param_dtype == "float16"):
        with pytest.raises(ValueError, match="the trellis layout has"):
            embpack.quantize_file(src, tmp_path / "p.safetensors", include=["emb*"], **options)
        return
    embpack.quantize_file(src, tmp_path / "p.safetensors", include=["emb*"], **options)
    loaded = embpack.load(tmp_path / "p.safetensors", verify=True)["emb.weight"]
    expected = embpack.quantize(weight, **options)
    assert loaded.packed.tobytes() == expected.packed.tobytes()
    assert (loaded.row_format, loaded.method, loaded.loss) == (expected.row_format, expected.method, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_one_range_for_a_table_takes_two_passes(tmp_path, small_chunks, kind):
    packed = pack(KINDS[kind], tmp_path, method="table")
    for name, table in embpack.load(packed.dst).items():
        weight = packed.arrays.tables[name].astype(np.float32)
        assert table.method == f"table:xmin={float(weight.min())},xmax={float(weight.max())}"
        assert table.packed.tobytes() == embpack.quantize(packed.arrays.tables[name], "table").packed.tobytes()


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("write", [write_safetensors, write_npz, write_parquet])
def test_chunks_make_the_bytes_of_the_whole(tmp_path, monkeypatch, write, rows):
    make_chunks_small(monkeypatch)
    weight = make_weight(rows=rows)
    whole = embpack.quantize(weight)
    src = write(tmp_path, Arrays({"emb.weight": weight}))
    embpack.quantize_file(src, tmp_path / "p.safetensors", include=["emb*"])
    loaded = embpack.load(tmp_path / "p.safetensors")["emb.weight"]
    assert loaded.packed.tobytes() == whole.packed.tobytes()
    assert loaded.loss == whole.loss


def test_a_table_of_several_chunks_of_real_size(tmp_path):
    weight = make_weight(np.float16, rows=70_000, dim=128)
    assert len(weight) > 2 * chunks.chunk_rows(128)
    src = write_npy(tmp_path, Arrays({"vectors": weight}))
    embpack.quantize_file(src, tmp_path / "p.safetensors", method="asym")
    expected = embpack.quantize(weight, "asym")
    loaded = embpack.load(tmp_path / "p.safetensors", verify=True)["vectors"]
    assert loaded.packed.tobytes() == expected.packed.tobytes()
    assert loaded.loss == expected.loss


def test_include_and_exclude_choose(tmp_path):
    src = KINDS["safetensors"].write(tmp_path, KINDS["safetensors"].make_arrays())
    report = embpack.quantize_file(
        src, tmp_path / "p.safetensors", method="asym", include=["linear.w*"], exclude=["w*", "*bias"]
    )
    assert {table.name for table in report.tables} == {"linear.weight", "user_emb.weight"}


# Unpacking


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpacking_restores_the_type(tmp_path, dtype):
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight(dtype)}))
    embpack.quantize_file(src, tmp_path / "packed.safetensors", method="asym")
    [unpacked] = embpack.dequantize_file(tmp_path / "packed.safetensors", tmp_path / "plain.safetensors")
    plain = as_array(load_file(tmp_path / "plain.safetensors")["emb.weight"])
    expected = embpack.load(tmp_path / "packed.safetensors")["emb.weight"].dequantize().astype(dtype)
    assert plain.dtype == dtype
    assert plain.tobytes() == expected.tobytes()
    assert unpacked.dtype == np.dtype(dtype).name
    assert (unpacked.bytes_before, unpacked.bytes_after) == (ROWS * 16, expected.nbytes)


def load_npz(path):
    with np.load(path) as arrays:
        return dict(arrays)


def load_parquet(path):
    table = pq.read_table(path)
    arrays = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        is_vectors = hasattr(column.type, "list_size")
        arrays[name] = column.flatten().to_numpy().reshape(len(column), -1) if is_vectors else column.to_numpy(False)
    return arrays


def load_torch(path):
    return {name: as_array(tensor) for name, tensor in torch.load(path, weights_only=True).items()}


LOADERS = {
    ".safetensors": lambda path: {name: as_array(tensor) for name, tensor in load_file(path).items()},
    ".pt": load_torch,
    ".pth": load_torch,
    ".bin": load_torch,
    ".ckpt": load_torch,
    ".npy": lambda path: {"vectors": np.load(path)},
    ".npz": load_npz,
    ".parquet": load_parquet,
}
SOURCE_OF = {".npy": "npy", ".npz": "npz", ".parquet": "parquet"}


@pytest.mark.parametrize("suffix", LOADERS)
def test_unpacking_into_every_format(tmp_path, small_chunks, suffix):
    kind = KINDS[SOURCE_OF.get(suffix, "safetensors")]
    arrays = Arrays({"vectors": make_weight()}) if suffix == ".npy" else kind.make_arrays()
    src = kind.write(tmp_path, arrays)
    embpack.quantize_file(src, tmp_path / "packed.safetensors", method="asym")
    told = []
    embpack.dequantize_file(
        tmp_path / "packed.safetensors",
        tmp_path / f"plain{suffix}",
        progress=lambda name, rows: told.append((name, rows)),
    )
    loaded = LOADERS[suffix](tmp_path / f"plain{suffix}")
    tables = embpack.load(tmp_path / "packed.safetensors")
    expected = {name: tables[name].dequantize().astype(weight.dtype) for name, weight in arrays.tables.items()}
    expected |= arrays.others
    assert set(loaded) == set(expected)
    for name, array in expected.items():
        found = loaded[name]
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    assert {name: sum(n for told_name, n in told if told_name == name) for name, _ in told} == dict.fromkeys(
        arrays.tables, ROWS
    )


def test_unpacking_shards(tmp_path, small_chunks):
    packed = pack(KINDS["shards in a folder"], tmp_path)
    embpack.dequantize_file(packed.dst, tmp_path / "plain")
    assert names_in(tmp_path / "plain") == names_in(packed.src)
    tables = embpack.load(packed.dst)
    for file in packed.src.glob("*.safetensors"):
        [(name, before)] = load_file(file).items()
        [(same_name, after)] = load_file(tmp_path / "plain" / file.name).items()
        expected = as_array(before)
        if name in tables:
            expected = tables[name].dequantize().astype(expected.dtype)
        assert same_name == name
        assert as_array(after).tobytes() == expected.tobytes()
        assert read_raw(tmp_path / "plain" / file.name).metadata == {"format": "pt"}


def test_unpacking_what_save_wrote(tmp_path):
    table = embpack.quantize(make_weight())
    embpack.save(tmp_path / "tables.safetensors", {"user": table})
    embpack.dequantize_file(tmp_path / "tables.safetensors", tmp_path / "user.npy")
    assert np.load(tmp_path / "user.npy").tobytes() == table.dequantize().tobytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ".parquet"])
@pytest.mark.parametrize("byte", [0, ROWS * 16 // 2, ROWS * 16 - 1])
def test_altered_bytes_are_not_unpacked(tmp_path, byte, suffix):
    path = tmp_path / "packed.safetensors"
    embpack.save(path, {"user": embpack.quantize(make_weight())})
    content = bytearray(path.read_bytes())
    content[LENGTH_BYTES + read_raw(path).header_bytes + byte] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"{path}: table 'user' was altered"):
        embpack.dequantize_file(path, tmp_path / f"plain{suffix}")
    assert names_in(tmp_path) == {path.name}


def test_a_plain_checkpoint_is_not_unpacked(tmp_path):
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight()}))
    with pytest.raises(FormatError, match="holds no packed tables"):
        embpack.dequantize_file(src, tmp_path / "plain.safetensors")
    assert names_in(tmp_path) == {src.name}


@pytest.mark.parametrize(
    ("suffix", "message"), [(".npz", "BF16"), (".npy", "1 tensor"), (".txt", "what can be written"), ("", "written")]
)
def test_a_format_that_cannot_hold_it(tmp_path, suffix, message):
    packed = pack(KINDS["safetensors"], tmp_path)
    with pytest.raises(ValueError, match=message):
        embpack.dequantize_file(packed.dst, tmp_path / f"plain{suffix}")
    assert names_in(tmp_path) == {packed.src.name, packed.dst.name}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".json"])
def test_shards_are_not_unpacked_into_a_file(tmp_path, suffix):
    packed = pack(KINDS["shards in a folder"], tmp_path)
    with pytest.raises(ValueError, match="is sharded, so the destination is a folder"):
        embpack.dequantize_file(packed.dst / "model.embpack.safetensors.index.json", tmp_path / f"plain{suffix}")
    with pytest.raises(ValueError, match=f"{packed.dst} is a folder, so the destination is a folder; leave {suffix} o"):
        embpack.dequantize_file(packed.dst, tmp_path / f"plain{suffix}")
    assert names_in(tmp_path) == {packed.src.name, packed.dst.name}


# Names


def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    """A file's name in Latin-1; in a state dict any string may be a name."""
    weight = make_weight()
    npy, pt = tmp_path / os.fsdecode(b"caf\xe9.npy"), tmp_path / "model.pt"
    with npy.open("wb") as file:
        np.save(file, weight)
    torch.save({"emb.weight": torch.from_numpy(weight), "\ud800": torch.ones(3)}, pt)
    for src, name in ((npy, r"caf\\udce9"), (pt, r"\\ud800")):
        with pytest.raises(
            ValueError, match=f"out.safetensors: tensor '{name}' has a name that is not Unicode, .*rename"
        ):
            embpack.quantize_file(src, tmp_path / "out.safetensors", method="asym")
    assert names_in(tmp_path) == {npy.name, pt.name}


# Destinations


@pytest.mark.parametrize("name_it", ["folder", "link", "dot"])
def test_shards_go_into_an_empty_folder_however_it_is_named(tmp_path, monkeypatch, name_it):
    packed = pack(KINDS["shards in a folder"], tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    src, dst = packed.src.absolute(), {"folder": folder, "link": tmp_path / "link", "dot": Path()}[name_it]
    monkeypatch.chdir(folder)
    report = embpack.quantize_file(src, dst)
    assert names_in(folder) == names_in(packed.dst)
    assert report.file_bytes_after == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert embpack.load(dst, verify=True).keys() == embpack.load(packed.dst).keys()


def test_a_file_that_is_a_link_is_written_through_and_keeps_its_mode(tmp_path):
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight()}))
    dst, store = tmp_path / "dst.safetensors", tmp_path / "store"
    store.write_bytes(b"old")
    store.chmod(0o600)
    dst.symlink_to("store")
    embpack.quantize_file(src, dst, force=True)
    assert dst.is_symlink()
    assert store.stat().st_mode & 0o777 == 0o600
    assert list(embpack.load(dst, verify=True)) == ["emb.weight"]
    assert names_in(tmp_path) == {src.name, "dst.safetensors", "store"}


def content_of(path: Path):
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes()


def link_symbolically(src: Path) -> Path:
    link = src.with_name("link.safetensors")
    link.symlink_to(src)
    return link


def link_hard(src: Path) -> Path:
    link = src.with_name("link.safetensors")
    link.hardlink_to(src)
    return link


SAME_FILES = {
    "itself": lambda src: src,
    "another way to it": lambda src: src.parent / ".." / src.parent.name / src.name,
    "symbolic link": link_symbolically,
    "hard link": link_hard,
}


@pytest.mark.parametrize("same", SAME_FILES)
def test_the_source_is_not_overwritten(tmp_path, same):
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight()}))
    before = src.read_bytes()
    dst = SAME_FILES[same](src)
    with pytest.raises(ValueError, match="the destination is the source; choose another name"):
        embpack.quantize_file(src, dst)
    assert src.read_bytes() == before


@pytest.mark.parametrize("same", SAME_FILES)
def test_the_source_is_not_overwritten_by_unpacking(tmp_path, same):
    src = tmp_path / "packed.safetensors"
    embpack.save(src, {"user": embpack.quantize(make_weight())})
    before = src.read_bytes()
    dst = SAME_FILES[same](src)
    with pytest.raises(ValueError, match="the destination is the source; choose another name"):
        embpack.dequantize_file(src, dst)
    assert src.read_bytes() == before


def test_a_link_to_a_source_of_another_suffix_is_not_overwritten(tmp_path):
    src = write_npy(tmp_path, Arrays({"vectors": make_weight()}))
    with pytest.raises(ValueError, match="the destination is the source"):
        embpack.quantize_file(src, link_symbolically(src))


@pytest.mark.parametrize("write", [write_shards, write_shards_named_by_index])
@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_of_the_source_is_not_overwritten(tmp_path, write, linked):
    src = write(tmp_path, Arrays({"emb.weight": make_weight()}))
    folder = tmp_path / "sharded"
    before = content_of(folder)
    dst = folder
    if linked:
        dst = tmp_path / "link"
        dst.symlink_to(folder)
    with pytest.raises(ValueError, match="the destination is the source"):
        embpack.quantize_file(src, dst)
    assert content_of(folder) == before


@pytest.mark.parametrize("name", ["packed.v2", "packed.pt", "packed.npz", "packed.safetensors.bak", "packed.json"])
def test_a_packed_file_ends_in_safetensors(tmp_path, name):
    src = write_npy(tmp_path, Arrays({"vectors": make_weight()}))
    with pytest.raises(ValueError, match=f"{name}: a packed checkpoint ends in .safetensors"):
        embpack.quantize_file(src, tmp_path / name)
    assert names_in(tmp_path) == {src.name}


@pytest.mark.parametrize("name", ["packed.safetensors", "packed.json", "packed.pt"])
def test_packed_shards_are_a_folder(tmp_path, name):
    src = write_shards(tmp_path, Arrays({"emb.weight": make_weight()}))
    with pytest.raises(ValueError, match="is sharded, so the destination is a folder"):
        embpack.quantize_file(src / "model.safetensors.index.json", tmp_path / name)
    with pytest.raises(ValueError, match=f"{src} is a folder, so the destination is a folder; leave .* out"):
        embpack.quantize_file(src, tmp_path / name)
    assert names_in(tmp_path) == {src.name}


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path):
    src = write_shards(tmp_path, Arrays({"emb.weight": make_weight()}))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "precious").write_text("here")
    with pytest.raises(FileExistsError, match="not empty"):
        embpack.quantize_file(src, tmp_path / "packed")
    assert content_of(tmp_path / "packed") == {"precious": b"here"}
    assert names_in(tmp_path) == {src.name, "packed"}


def test_a_folder_that_is_empty_is_taken(tmp_path):
    src = write_shards(tmp_path, Arrays({"emb.weight": make_weight()}))
    (tmp_path / "packed").mkdir()
    embpack.quantize_file(src, tmp_path / "packed")
    assert set(embpack.load(tmp_path / "packed")) == {"emb.weight"}


@pytest.mark.parametrize("dst_name", ["new.safetensors", "old.safetensors"])
def test_the_destination_changes_only_at_the_end(tmp_path, small_chunks, dst_name):
    (tmp_path / "old.safetensors").write_bytes(b"old")
    src, dst = write_npy(tmp_path, Arrays({"vectors": make_weight()})), tmp_path / dst_name
    meanwhile = []

    def watch(*_):
        meanwhile.append(dst.read_bytes() if dst.exists() else None)

    embpack.quantize_file(src, dst, force=True, progress=watch)
    assert meanwhile == [b"old" if dst_name.startswith("old") else None] * 3
    assert set(embpack.load(dst, verify=True)) == {"vectors"}


def test_the_same_source_gives_the_same_bytes(tmp_path):
    src = KINDS["safetensors"].write(tmp_path, KINDS["safetensors"].make_arrays())
    for name in ("a.safetensors", "b.safetensors"):
        embpack.quantize_file(src, tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# Refusals and failures


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["asym", "table"])
@pytest.mark.parametrize("kind", ["safetensors", "npz compressed", "parquet", "pt", "shards in a folder"])
def test_a_value_that_is_not_finite_is_named(tmp_path, small_chunks, kind, method, value):
    weight = make_weight()
    weight[100, 7] = value
    kind = KINDS[kind]
    src = kind.write(tmp_path, Arrays({"fine_emb": make_weight(), "user_emb": weight}))
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"user_emb[100, 7] is {value}; NaN and infinity cannot be")):
        embpack.quantize_file(src, tmp_path / f"packed{kind.suffix}", method=method)
    assert names_in(tmp_path) == before


def test_a_parameter_that_overflows_is_named(tmp_path, small_chunks):
    weight = make_weight()
    weight[100, 7] = 1e9
    src = write_npy(tmp_path, Arrays({"vectors": weight}))
    with pytest.raises(ValueError, match=r"vectors\[100\] .* overflows float16 .*; use param_dtype='float32'"):
        embpack.quantize_file(src, tmp_path / "packed.safetensors")
    assert names_in(tmp_path) == {src.name}


@pytest.mark.parametrize("kind", ["safetensors", "shards in a folder", "pt", "npz compressed", "parquet"])
def test_a_table_over_the_largest_loss_is_named_and_nothing_is_written(tmp_path, small_chunks, kind):
    kind = KINDS[kind]
    fine, worse = make_weight(), make_weight()
    worse[:, 0] *= 3
    src = kind.write(tmp_path, Arrays({"fine_emb": fine, "user[0]_emb": worse}))
    before = names_in(tmp_path)
    losses = embpack.quantize(fine).loss, embpack.quantize(worse).loss
    limit = sum(losses) / 2
    assert losses[0] < limit < losses[1]
    message = f": 1 of 2 tables loses more than the limit of {limit:.6g}, so nothing was written; "
    with pytest.raises(LossLimitError, match=re.escape(message)) as refused:
        embpack.quantize_file(src, tmp_path / f"packed{kind.suffix}", max_loss=limit)
    assert names_in(tmp_path) == before
    exclude = shlex.split(str(refused.value).partition("--exclude ")[2].partition(", or")[0])
    embpack.quantize_file(src, tmp_path / f"packed{kind.suffix}", max_loss=limit, exclude=exclude)
    assert set(embpack.load(tmp_path / f"packed{kind.suffix}")) == {"fine_emb"}


def test_a_table_over_the_largest_loss_leaves_what_was_there(tmp_path):
    src, dst = write_npy(tmp_path, Arrays({"vectors": make_weight()})), tmp_path / "packed.safetensors"
    dst.write_bytes(b"old")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(src))}: 1 of 1 tables loses more than "):
        embpack.quantize_file(src, dst, max_loss=1e-3, force=True)
    assert dst.read_bytes() == b"old"
    assert names_in(tmp_path) == {src.name, dst.name}


def test_a_table_may_have_just_the_largest_loss(tmp_path):
    weight = make_weight()
    src, loss = write_npy(tmp_path, Arrays({"vectors": weight})), embpack.quantize(weight).loss
    report = embpack.quantize_file(src, tmp_path / "packed.safetensors", max_loss=loss)
    assert report.tables[0].loss == loss
    with pytest.raises(ValueError, match="loses more than the limit"):
        embpack.quantize_file(src, tmp_path / "packed.safetensors", max_loss=np.nextafter(loss, 0))


@pytest.mark.parametrize("write", [write_safetensors, write_npz, write_shards])
def test_a_packed_checkpoint_is_not_packed_again(tmp_path, write):
    src = write(tmp_path, Arrays({"emb.weight": make_weight()}))
    suffix = "" if src.is_dir() else ".safetensors"
    once, twice = tmp_path / f"once{suffix}", tmp_path / f"twice{suffix}"
    embpack.quantize_file(src, once)
    with pytest.raises(ValueError, match="is packed already; unpack it first with: embpack dequantize"):
        embpack.quantize_file(once, twice)
    assert names_in(tmp_path) == {src.name, once.name}


def test_a_float64_table_says_why_it_is_not_packed(tmp_path):
    src = write_npz(tmp_path, Arrays({"emb.weight": make_weight(np.float64)}))
    with pytest.raises(ValueError, match=r"emb\.weight \(F64, not float32, float16 or bfloat16\)"):
        embpack.quantize_file(src, tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match=r"include 'emb\*' only matches emb\.weight \(F64, not float32"):
        embpack.quantize_file(src, tmp_path / "packed.safetensors", include=["emb*"])
    assert names_in(tmp_path) == {src.name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "no method 'best'"),
        ({"bits": 3}, "bits is 3; choose 2, 4 or 8"),
        ({"param_dtype": "float64"}, "param_dtype is 'float64'"),
        ({"include": ["nothing*"]}, r"include 'nothing\*' matches no tensor"),
        ({"exclude": ["*"]}, "nothing to pack"),
        ({"exclude": ["nothing*"]}, r"exclude 'nothing\*' matches no tensor; nearest: emb\.weight"),
        ({"variants": {"nothing": embpack.Variant()}}, r"variants \(--set\) name 'nothing'"),
        ({"max_loss": 0}, "max_loss is 0; give a positive, finite number"),
        ({"max_loss": -0.1}, r"max_loss is -0\.1; give a positive, finite number"),
        ({"max_loss": np.inf}, "max_loss is inf; give a positive, finite number"),
        ({"max_loss": np.nan}, "max_loss is nan; give a positive, finite number"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight()}))
    with pytest.raises(ValueError, match=message):
        embpack.quantize_file(src, tmp_path / "packed.safetensors", **options)
    assert names_in(tmp_path) == {src.name}


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors: no such file"):
        embpack.quantize_file(tmp_path / "missing.safetensors", tmp_path / "packed.safetensors")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("unpacking", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, small_chunks, error, unpacking):
    src = write_safetensors(tmp_path, Arrays({"emb.weight": make_weight()}))
    convert = embpack.quantize_file
    if unpacking:
        embpack.quantize_file(src, tmp_path / "packed.safetensors")
        src, convert = tmp_path / "packed.safetensors", embpack.dequantize_file
    before = names_in(tmp_path)

    def interrupt(name, rows):
        raise error("now")

    with pytest.raises(error, match="now"):
        convert(src, tmp_path / "dst.safetensors", progress=interrupt)
    assert names_in(tmp_path) == before


KILLED = """
import os, signal, sys, embpack.chunks
embpack.chunks.SPAN_VALUES = 64 * 64
embpack.chunks.SPANS_OF_A_FILE = 1
told = []
def kill(name, rows):
    told.append(rows)
    if len(told) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
getattr(embpack, sys.argv[1])(sys.argv[2], sys.argv[3], force=True, progress=kill)
"""


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("function", ["quantize_file", "dequantize_file"])
def test_a_kill_leaves_what_was_there(tmp_path, function, old):
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    write_sparse_table(src, "emb.weight", 1000, 64)
    if function == "dequantize_file":
        embpack.quantize_file(src, tmp_path / "packed.safetensors", method="asym")
        src = tmp_path / "packed.safetensors"
    if old:
        dst.write_bytes(old)
    visible = names_in(tmp_path)
    done = run_python(KILLED, function, src, dst)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (dst.read_bytes() if dst.exists() else None) == old
    [left] = names_in(tmp_path) - visible - {dst.name}
    assert left.startswith(".embpack-")
    assert left.endswith(".tmp")
    getattr(embpack, function)(src, dst, force=True)
    assert names_in(tmp_path) == visible | {dst.name}


LIMITED = """
import resource, sys, embpack
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    getattr(embpack, sys.argv[1])(sys.argv[2], sys.argv[3])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npy", ".npz", ".parquet"])
def test_a_full_disk_leaves_nothing_of_what_is_unpacked(tmp_path, suffix):
    src, dst = tmp_path / "packed.safetensors", tmp_path / f"dst{suffix}"
    rng = np.random.default_rng(0)
    embpack.save(src, {"vectors": embpack.quantize(rng.standard_normal((8000, 64), dtype=np.float32), "asym")})
    done = run_python(LIMITED, "dequantize_file", src, dst)
    assert f"cannot write {dst}: the largest size allowed for a file is reached" in done.stdout, done.stderr
    assert names_in(tmp_path) == {src.name}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_leaves_nothing_of_a_file_and_of_a_folder_what_is_whole(tmp_path, sharded):
    arrays = Arrays({"small_emb": make_weight(), "user_emb": make_weight(rows=10_000, dim=64)})
    src = (write_shards if sharded else write_safetensors)(tmp_path, arrays)
    dst = tmp_path / ("dst" if sharded else "dst.safetensors")
    done = run_python(LIMITED, "quantize_file", src, dst)
    assert f"cannot write {dst}: the largest size allowed for a file is reached" in done.stdout, done.stderr
    kept = "1 of 2 files are done, and --resume (in Python resume=True) goes on" if sharded else "nothing was kept"
    assert f"; {kept}, make space or choose another folder" in done.stdout
    assert names_in(tmp_path) == {src.name} | ({".dst.embpack-unfinished"} if sharded else set())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    src = write_npy(tmp_path, Arrays({"vectors": make_weight()}))
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="no permission to write"):
        embpack.quantize_file(src, tmp_path / "closed" / "packed.safetensors")


def test_rows_that_float16_parameters_lose_are_reported(tmp_path, rng):
    weight = rng.standard_normal((100, 16), dtype=np.float32) * np.float32(1e-8)
    np.save(tmp_path / "vectors.npy", weight)
    report = embpack.quantize_file(tmp_path / "vectors.npy", tmp_path / "packed.safetensors")
    assert report.tables[0].loss == pytest.approx(1, abs=1e-6)
    assert str(report.tables[0].warning).startswith("100 of its rows come back no better than zeros would")
    report = embpack.quantize_file(tmp_path / "vectors.npy", tmp_path / "packed.safetensors", param_dtype="float32")
    assert report.tables[0].loss < 0.15
    assert report.tables[0].warning is None


def test_progress_is_told_while_a_chunk_is_packed(tmp_path, rng):
    np.save(tmp_path / "vectors.npy", rng.standard_normal((192, 96), dtype=np.float32))
    told = []
    embpack.quantize_file(
        tmp_path / "vectors.npy",
        tmp_path / "packed.safetensors",
        method="optimal:effort=exact",  # some ten milliseconds a row
        progress=lambda name, rows: told.append(rows),
    )
    assert sum(told) == 192
    assert len(told) > 1


CHANGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "rewritten": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_source_that_changes_while_it_is_converted(tmp_path, small_chunks, change, packed):
    """Once it has packed or unpacked its first rows."""
    src, dst = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file({f"{name}_emb": torch.from_numpy(make_weight()) for name in "ab"}, src)
    if packed:
        embpack.quantize_file(src, dst, method="asym")
        dst.replace(src)
    os.utime(src, (1, 1))
    left = [1]

    def progress(name, rows):
        if left:
            left.pop()
            CHANGES[change](src)

    convert = embpack.dequantize_file if packed else embpack.quantize_file
    with pytest.raises(FormatError, match=r"model.safetensors: was .* while tensor 'a_emb' was read; run again when"):
        convert(src, dst, progress=progress)
    assert names_in(tmp_path) <= {src.name}

"""Checkpoints behind URIs: what is read and written there is what is on this machine, whole or not at all."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
from object_store import ENVIRONMENT, serve_flaky, serve_s3
from safetensors.numpy import save_file
from test_pickling import WRITTEN, decide
from upath import UPath

import embpack
from embpack.errors import FormatError, LossLimitError, MissingExtraError
from embpack.formats import open_checkpoint, remote
from embpack.formats.paths import as_path, is_remote
from embpack.formats.remote import RemoteError

RNG = np.random.default_rng(0)
TABLES = {f"{name}_embedding.weight": RNG.standard_normal((3000, 32), np.float32) for name in ("user", "item", "tag")}
OTHERS = {"dense.weight": RNG.standard_normal((5, 3), np.float32)}
CUT = "70 KB"
STAGED = ".{}.embpack-unfinished"


@pytest.fixture(scope="module")
def endpoint():
    with serve_s3() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield url


@pytest.fixture
def place(endpoint, request):
    """A folder of its own for each test."""
    return f"s3://bucket/{abs(hash(request.node.nodeid))}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file with tables."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({**TABLES, **OTHERS}, path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A model's folder of two files with their index, and what goes along."""
    folder = tmp_path_factory.mktemp("shards") / "model"
    folder.mkdir()
    names = [*TABLES, *OTHERS]
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for name, own in files.items():
        save_file({key: {**TABLES, **OTHERS}[key] for key in own}, folder / name)
    weight_map = {key: name for name, own in files.items() for key in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("[]")
    (folder / "tokenizer" / ".hidden").write_text("[]")
    return folder


def upload(local: Path, uri: str) -> str:
    path = as_path(uri)
    files = [local] if local.is_file() else [file for file in local.rglob("*") if file.is_file()]
    for file in files:
        target = path if local.is_file() else path / file.relative_to(local).as_posix()
        target.fs.pipe_file(target.path, file.read_bytes())
    return uri


def read_back(uri: str) -> dict[str, bytes]:
    """All objects of a folder, by their paths in it, or of a file by ""."""
    path = as_path(uri)
    return {name.removeprefix(path.path).lstrip("/"): path.fs.cat_file(name) for name in path.fs.find(path.path)}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def list_staged(uri: str) -> list[str]:
    path = as_path(uri)
    return path.fs.find((path.parent / STAGED.format(path.name)).path)


# Paths


def test_what_is_a_uri(tmp_path):
    assert as_path("s3://bucket/a/b.safetensors").name == "b.safetensors"
    assert str(as_path("S3://bucket/a")) == "s3://bucket/a"
    assert is_remote(as_path(UPath("memory://a")))
    for local in ("a.safetensors", "a:b", tmp_path, UPath(tmp_path), "s3:/a"):
        assert not is_remote(as_path(local))
        assert as_path(local) == Path(local)
    assert as_path(f"file://{tmp_path}") == tmp_path


def test_files_of_this_machine_need_no_fsspec(model):
    program = f"import sys, embpack; embpack.plan({str(model)!r}, max_loss=1); print({{'fsspec', 'upath'}} & {{*sys.modules}})"
    found = {**os.environ, "PYTHONPATH": str(Path(embpack.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=found).stdout == b"set()\n"


def test_missing_packages(hide_package):
    with pytest.raises(MissingExtraError, match=r"gs:// needs gcsfs: pip install 'gcsfs'"):
        as_path("gs://bucket/a")
    with pytest.raises(MissingExtraError, match=r"abfs:// needs adlfs: pip install 'adlfs'"):
        embpack.load("abfs://container/a", access="memory")
    hide_package("upath")
    with pytest.raises(MissingExtraError, match=r"s3:// needs fsspec and universal_pathlib: pip install"):
        as_path("s3://bucket/a")


def test_s3fs_is_missing(monkeypatch):
    def refuse(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", refuse)
    with pytest.raises(MissingExtraError, match=r"s3:// needs s3fs: pip install"):
        as_path("s3://bucket/a")
    with pytest.raises(ImportError, match="hdfs://a/b: Install s3fs"):
        as_path("hdfs://a/b")


def test_protocols_that_there_are_not(embpack_command):
    with pytest.raises(ValueError, match="foo://a/b: fsspec knows no foo://; give s3://, gs:// or abfs://"):
        as_path("foo://a/b")
    code, _, err = embpack_command("inspect", "foo://a/b")
    assert code == 2
    assert "fsspec knows no foo://" in err


# Reading


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_is_read(tmp_path, endpoint, name):
    """All formats and kinds of tables in one test each: behind s3:// those of large models, the others in memory://."""
    local = WRITTEN[name](tmp_path / "a")
    is_large = name in ("aligned.safetensors", "index", "dcp", "groups.parquet", "Qwen3.8, FP8 by pieces")
    root = f"{'s3://bucket' if is_large else 'memory://'}/{abs(hash(name))}"
    if name == "index":
        upload(local.parent, root)
        uri = f"{root}/{local.name}"
    else:
        uri = upload(local, root if local.is_dir() else f"{root}/{local.name}")
    for mine, other in zip(decide(local), decide(uri), strict=True):
        assert (mine.tensor.name, mine.tensor.shape, mine.variant) == (other.tensor.name, other.tensor.shape, other.variant)
        assert mine.tensor.read().tobytes() == other.tensor.read().tobytes()
        chunks = np.concatenate([chunk.copy() for chunk in other.tensor.chunks(7, 2, 19)])
        assert chunks.tobytes() == mine.tensor.read(2, 19).tobytes()
        again = pickle.loads(pickle.dumps(other))
        assert again.tensor.read(3, 11).tobytes() == mine.tensor.read(3, 11).tobytes()


def test_long_reads_are_several_requests(place, monkeypatch):
    monkeypatch.setattr("embpack.formats.remote_source._REQUEST_BYTES", 1 << 16)
    table = RNG.standard_normal((5000, 32), np.float32)
    path = as_path(f"{place}/a.safetensors")
    embpack.save(path, {"a": embpack.quantize(table)}, others={"a.floats": table})
    with open_checkpoint(path) as checkpoint:
        [tensor] = [tensor for tensor in checkpoint.tensors if tensor.name == "a.floats"]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda start: tensor.read(start, start + 1250), range(0, 5000, 1250)))
    assert np.array_equal(np.concatenate(found), table)


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ("written to", lambda path: path.fs.pipe_file(path.path, bytes(path.stat().st_size))),
        ("changed from [0-9]+ to 3 bytes", lambda path: path.fs.pipe_file(path.path, b"abc")),
        ("deleted or moved", lambda path: path.fs.rm_file(path.path)),
    ],
)
def test_an_object_that_changes_while_it_is_read_is_refused(model, place, how, change):
    uri = upload(model, f"{place}/a.safetensors")
    with open_checkpoint(uri) as checkpoint:
        chunks = checkpoint.tensors[-1].chunks(100)
        next(chunks)
        change(as_path(uri))
        with pytest.raises(FormatError, match=f"^{uri}: was {how} while tensor 'user_embedding.weight' was read; run"):
            list(chunks)


def test_load_and_inspect(model, place, embpack_command):
    uri = f"{place}/packed.safetensors"
    embpack.quantize_file(model, uri)
    tables = embpack.load(uri, access="memory", verify=True)
    assert set(tables) == set(TABLES)
    for name, table in TABLES.items():
        assert np.array_equal(tables[name].packed, embpack.quantize(table).packed)
    for access in ("mapped", "disk"):
        with pytest.raises(ValueError, match=rf"^{uri}: access='{access}' is for files of this machine; load it with acc"):
            embpack.load(uri, access=access)
    code, out, _ = embpack_command("inspect", uri, "--verify")
    assert code == 0
    assert "checksums of 3 tables, 1 other tensor and the header agree" in out
    code, out, _ = embpack_command("inspect", uri, "--json")
    assert json.loads(out)["source"] == uri


# Writing


def test_a_file_is_that_of_this_machine(tmp_path, model, place):
    source = upload(model, f"{place}/model.safetensors")
    embpack.quantize_file(model, tmp_path / "packed.safetensors")
    report = embpack.quantize_file(source, f"{place}/to/packed.safetensors")
    assert read_back(f"{place}/to") == {"packed.safetensors": (tmp_path / "packed.safetensors").read_bytes()}
    assert report.file_bytes_after == (tmp_path / "packed.safetensors").stat().st_size
    embpack.dequantize_file(tmp_path / "packed.safetensors", tmp_path / "plain.npz")
    embpack.dequantize_file(f"{place}/to/packed.safetensors", f"{place}/plain.npz")
    with np.load(tmp_path / "plain.npz") as mine, np.load(as_path(f"{place}/plain.npz").open("rb")) as other:
        assert {name: mine[name].tobytes() for name in mine} == {name: other[name].tobytes() for name in other}


@pytest.mark.parametrize("size", [None, CUT])
def test_a_folder_is_that_of_this_machine(tmp_path, shards, place, size):
    source = upload(shards, f"{place}/model")
    embpack.quantize_file(shards, tmp_path / "packed", max_shard_size=size)
    report = embpack.quantize_file(source, f"{place}/packed", max_shard_size=size)
    assert report.copied_files == ("config.json", "tokenizer/vocab.json")
    packed = read_folder(tmp_path / "packed")
    assert len(packed) >= 6
    assert read_back(f"{place}/packed") == packed
    assert not list_staged(f"{place}/packed")
    tables, mine = embpack.load(f"{place}/packed", access="memory", verify=True), embpack.load(tmp_path / "packed")
    assert all(np.array_equal(mine[name].packed, tables[name].packed) for name in TABLES)
    embpack.dequantize_file(tmp_path / "packed", tmp_path / "plain")
    embpack.dequantize_file(f"{place}/packed", f"{place}/plain")
    assert read_back(f"{place}/plain") == read_folder(tmp_path / "plain")


def test_an_older_packing_is_replaced_and_its_other_files_removed(tmp_path, model, place):
    dst = f"{place}/packed"
    embpack.quantize_file(model, dst, max_shard_size=CUT)
    assert len(read_back(dst)) > 4
    embpack.quantize_file(model, dst, max_shard_size="1 GB", bits=8)
    embpack.quantize_file(model, tmp_path / "packed", max_shard_size="1 GB", bits=8)
    assert read_back(dst) == read_folder(tmp_path / "packed")


def test_what_nobody_says_embpack_wrote_is_refused(model, place):
    upload(model, f"{place}/a.safetensors")
    upload(model, f"{place}/folder/notes.txt")
    with pytest.raises(FileExistsError, match=f"^{place}/a.safetensors is there already, and nothing says that embpack"):
        embpack.quantize_file(model, f"{place}/a.safetensors")
    with pytest.raises(FileExistsError, match=f"^{place}/folder is a folder that is not empty, .* wrote notes.txt; cho"):
        embpack.quantize_file(model, f"{place}/folder")
    upload(model, f"{place}/b")
    with pytest.raises(FileExistsError, match=f"^{place}/b is a file, but a folder is to be written"):
        embpack.quantize_file(model, f"{place}/b")
    with pytest.raises(ValueError, match="the destination is the source"):
        embpack.quantize_file(f"{place}/a.safetensors", f"{place}/a.safetensors")
    embpack.quantize_file(model, f"{place}/a.safetensors", force=True)
    embpack.quantize_file(model, f"{place}/folder", force=True)
    assert set(read_back(f"{place}/folder")) == {"notes.txt", "embpack.json", "model.embpack.safetensors"}

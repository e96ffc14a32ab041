"""Checkpoints behind URIs: what is read and written there is what is on this machine, whole or not at all."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
def bucket(endpoint, tmp_path):
    """A folder of its own in S3 for each test."""
    return f"s3://bucket{tmp_path}"


@pytest.fixture
def place(tmp_path):
    """A folder of its own for each test in what fsspec keeps in memory, which answers sooner than S3."""
    return f"memory:/{tmp_path}"


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


def here() -> dict[str, str]:
    """The environment of a program that is to find this embpack."""
    return {**os.environ, "PYTHONPATH": str(Path(embpack.__file__).parents[1])}


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
    program = f"""
import sys, embpack
embpack.plan({str(model)!r}, max_loss=1)
sys.exit(bool({{'fsspec', 'upath'}} & {{*sys.modules}}))
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=here())


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
    is_large = name in ("aligned.safetensors", "index", "dcp", "groups.parquet")
    root = f"{'s3://bucket' if is_large else 'memory:/'}{tmp_path}"
    if name == "index":
        upload(local.parent, root)
        uri = f"{root}/{local.name}"
    else:
        uri = upload(local, root if local.is_dir() else f"{root}/{local.name}")
    for mine, other in zip(decide(local), decide(uri), strict=True):
        assert (mine.tensor.name, mine.tensor.shape, mine.variant) == (
            other.tensor.name,
            other.tensor.shape,
            other.variant,
        )
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


def test_since_what_lies_behind_a_uri(model, place, embpack_command):
    for options in (["--keep-checksums"], ["--since", f"{place}/old.safetensors"]):
        code, out, _ = embpack_command("quantize", model, f"{place}/old.safetensors", *options)
        assert code == 0
    assert "left alone" in out


def test_load_and_inspect(model, bucket, embpack_command):
    uri = f"{bucket}/packed.safetensors"
    embpack.quantize_file(model, uri)
    tables = embpack.load(uri, access="memory", verify=True)
    assert set(tables) == set(TABLES)
    for name, table in TABLES.items():
        assert np.array_equal(tables[name].packed, embpack.quantize(table).packed)
    for access in ("mapped", "disk"):
        with pytest.raises(ValueError, match=rf"^{uri}: access='{access}' is for files of this machine; load it with"):
            embpack.load(uri, access=access)
    code, out, _ = embpack_command("inspect", uri, "--verify")
    assert code == 0
    assert "checksums of 3 tables, 1 other tensor and the header agree" in out
    code, out, _ = embpack_command("inspect", uri, "--json")
    assert json.loads(out)["source"] == uri


def test_an_index_names_no_objects_elsewhere(place):
    upload_text = f'{{"weight_map": {{"a": "{place}/b.safetensors"}}}}'
    path = as_path(f"{place}/folder/model.safetensors.index.json")
    path.fs.pipe_file(path.path, upload_text.encode())
    with pytest.raises(FormatError, match="which is outside the index's folder; such files are not read"):
        embpack.load(path, access="memory")


def test_one_of_several_files_is_not_taken_for_all(shards, tmp_path):
    """A folder that is being copied or downloaded has no index yet; so on this machine, too."""
    name = "model-00002-of-00002.safetensors"
    shutil.copy(shards / name, tmp_path)
    with (
        pytest.raises(
            FileNotFoundError, match=f"{name} is one of 2 files, and the others and their index are not there"
        ),
        open_checkpoint(tmp_path),
    ):
        pass
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert len(checkpoint.tensors) == 2


@pytest.mark.parametrize("out", [None, "newer.safetensors", "s3://bucket/newer.safetensors"])
def test_files_that_are_updated_are_of_this_machine(model, tmp_path, embpack_command, out):
    file = "s3://bucket/packed.safetensors"
    if out is not None and out.startswith("s3://"):
        file = str(tmp_path / "packed.safetensors")
        embpack.quantize_file(model, file, method="asym")
    delta = {"user_embedding.weight.indices": np.array([0]), "user_embedding.weight.rows": np.ones((1, 32), np.float32)}
    np.savez(tmp_path / "delta.npz", **delta)
    message = "only files of this machine are updated; copy it here, and the new one back"
    with pytest.raises(ValueError, match=message):
        embpack.update_file(file, [tmp_path / "delta.npz"], out=out)
    code, _, err = embpack_command("update", file, str(tmp_path / "delta.npz"), *(("--out", out) if out else ()))
    assert code == 1 and "error: s3://bucket/" in err and message in " ".join(err.split())


def test_plan_and_compare(model, place, embpack_command):
    uri = upload(model, f"{place}/model.safetensors")
    limits = {"max_bytes": "20 %", "variants": embpack.select_variants(methods=["asym"], bits=[2, 4, 8])}
    assert embpack.plan(uri, **limits).variants == embpack.plan(model, **limits).variants
    code, out, err = embpack_command("compare", uri, "--methods", "asym", "--bits", "4")
    assert code == 0, err
    assert f"embpack quantize {uri} {place}/model-asym" in out


def test_load_into_a_model(model, place):
    torch = pytest.importorskip("torch")
    from embpack.torch import load_checkpoint

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in TABLES:
                setattr(self, name.removesuffix(".weight"), torch.nn.Embedding(3000, 32))
            self.dense = torch.nn.Linear(3, 5, bias=False)

    uri = f"{place}/packed.safetensors"
    embpack.quantize_file(model, uri)
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(ValueError, match="load it with access='memory'"):
        load_checkpoint(empty, uri)
    loaded = load_checkpoint(empty, uri, access="memory")
    rows = loaded.user_embedding(torch.arange(3000)).detach().numpy()
    assert np.array_equal(rows, embpack.load(uri, access="memory")["user_embedding.weight"].dequantize())


# Writing


def test_a_file_is_that_of_this_machine(tmp_path, model, bucket):
    source = upload(model, f"{bucket}/model.safetensors")
    embpack.quantize_file(model, tmp_path / "packed.safetensors")
    report = embpack.quantize_file(source, f"{bucket}/to/packed.safetensors")
    assert read_back(f"{bucket}/to") == {"packed.safetensors": (tmp_path / "packed.safetensors").read_bytes()}
    assert report.file_bytes_after == (tmp_path / "packed.safetensors").stat().st_size
    embpack.dequantize_file(tmp_path / "packed.safetensors", tmp_path / "plain.npz")
    embpack.dequantize_file(f"{bucket}/to/packed.safetensors", f"{bucket}/plain.npz")
    with np.load(tmp_path / "plain.npz") as mine, np.load(as_path(f"{bucket}/plain.npz").open("rb")) as other:
        assert {name: mine[name].tobytes() for name in mine} == {name: other[name].tobytes() for name in other}


@pytest.mark.parametrize(("store", "size"), [("memory:/", None), ("s3://bucket", CUT)])
def test_a_folder_is_that_of_this_machine(tmp_path, shards, endpoint, store, size):
    place = f"{store}{tmp_path}"
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


@pytest.mark.parametrize("alias", ["s3a://bucket{}", "s3://bucket{}/"])
def test_no_other_uri_of_the_source_is_written(model, bucket, alias):
    uri = f"{bucket}/source"
    upload(model, f"{uri}/model.safetensors")
    before = read_back(uri)
    name = "/source" if alias.endswith("/") else "/source/model.safetensors"
    dst = alias.format(bucket.removeprefix("s3://bucket") + name)
    src = uri if alias.endswith("/") else f"{uri}/model.safetensors"
    with pytest.raises(ValueError, match="the destination is the source"):
        embpack.quantize_file(src, dst, force=True)
    assert read_back(uri) == before


def test_an_older_packing_behind_a_uri_is_used(model, bucket, embpack_command):
    options = ("--method", "asym", "--max-shard-size", CUT)
    embpack.quantize_file(model, f"{bucket}/whole", method="asym", max_shard_size=CUT, keep_checksums=True)
    code, out, err = embpack_command("quantize", str(model), f"{bucket}/again", "--since", f"{bucket}/whole", *options)
    assert code == 0 and "left alone" in out, err
    assert read_back(f"{bucket}/again") == read_back(f"{bucket}/whole")


def test_an_older_packing_is_replaced_and_its_other_files_removed(tmp_path, model, bucket):
    dst = f"{bucket}/packed"
    embpack.quantize_file(model, dst, max_shard_size=CUT)
    assert len(read_back(dst)) > 4
    embpack.quantize_file(model, dst, max_shard_size="1 GB", bits=8)
    embpack.quantize_file(model, tmp_path / "packed", max_shard_size="1 GB", bits=8)
    assert read_back(dst) == read_folder(tmp_path / "packed")


def test_what_nobody_says_embpack_wrote_is_refused(model, place):
    upload(model, f"{place}/a.safetensors")
    upload(model, f"{place}/folder/notes.txt")
    with pytest.raises(
        FileExistsError, match=f"^{place}/a.safetensors is there already, and nothing says that embpack"
    ):
        embpack.quantize_file(model, f"{place}/a.safetensors")
    with pytest.raises(
        FileExistsError, match=f"^{place}/folder is a folder that is not empty, .* wrote notes.txt; cho"
    ):
        embpack.quantize_file(model, f"{place}/folder")
    upload(model, f"{place}/b")
    with pytest.raises(FileExistsError, match=f"^{place}/b is a file, but a folder is to be written"):
        embpack.quantize_file(model, f"{place}/b")
    with pytest.raises(ValueError, match="the destination is the source"):
        embpack.quantize_file(f"{place}/a.safetensors", f"{place}/a.safetensors")
    embpack.quantize_file(model, f"{place}/a.safetensors", force=True)
    embpack.quantize_file(model, f"{place}/folder", force=True)
    assert set(read_back(f"{place}/folder")) == {"notes.txt", "embpack.json", "model.embpack.safetensors"}


class StoppedError(Exception):
    """What the tests stop a run with."""


def stop_after(rows):
    """Make a progress that stops a run after so many rows, and counts them."""
    done = []

    def progress(name, count):
        done.append(count)
        if sum(done) > rows:
            raise StoppedError

    progress.done = done
    return progress


def test_a_limit_that_is_not_kept_leaves_what_is_there(model, place):
    for dst in (f"{place}/packed", f"{place}/packed.safetensors"):
        embpack.quantize_file(model, dst)
        before = read_back(dst)
        with pytest.raises(LossLimitError):
            embpack.quantize_file(model, dst, bits=2, max_loss=0.001)
        assert read_back(dst) == before
        assert not list_staged(dst)


@pytest.mark.parametrize("fails", [1, 3])
def test_a_file_that_cannot_be_put_leaves_what_is_there(model, place, monkeypatch, fails):
    dst, puts = f"{place}/packed", []
    embpack.quantize_file(model, dst, max_shard_size=CUT)
    before, really = read_back(dst), remote.put

    def put(local, path):
        puts.append(path)
        if len(puts) == fails:
            raise RemoteError(f"{path}: cannot be written: it is Monday")
        really(local, path)

    monkeypatch.setattr("embpack.formats.atomic.put", put)
    with pytest.raises(RemoteError, match="it is Monday") as caught:
        embpack.quantize_file(model, dst, bits=8, max_shard_size=CUT)
    assert read_back(dst) == before
    # What is whole is kept for --resume, and said to be.
    kept = [name for name in list_staged(dst) if name.endswith(".safetensors")]
    assert len(kept) == fails - 1
    notes = "".join(getattr(caught.value, "__notes__", ()))
    assert (f"{fails - 1} of" in notes and "--resume" in notes) == bool(kept)


def test_what_was_copied_is_removed_if_not_all_can_be(model, place, monkeypatch):
    dst, copies = f"{place}/packed", []
    embpack.quantize_file(model, dst, max_shard_size=CUT)
    really = remote.copy

    def copy(source, path):
        copies.append(path)
        if len(copies) == 3:
            raise RemoteError(f"{path}: cannot be written: it is Monday")
        really(source, path)

    monkeypatch.setattr("embpack.formats.new_folder.copy", copy)
    with pytest.raises(RemoteError, match="it is Monday") as caught:
        embpack.quantize_file(model, dst, bits=8, max_shard_size=CUT)
    assert any(
        "the files of the earlier packing were being replaced, and are gone" in each for each in caught.value.__notes__
    )
    with pytest.raises((FileNotFoundError, ValueError)):
        embpack.load(dst, access="memory")
    # All files are whole, so that going on is copying them.
    monkeypatch.undo()
    assert not read_back(dst)
    embpack.quantize_file(model, dst, bits=8, max_shard_size=CUT, resume=True)
    assert set(embpack.load(dst, access="memory", verify=True)) == set(TABLES)
    assert not list_staged(dst)


def test_readers_find_old_tables_or_none_or_new_ones(model, place, monkeypatch):
    """Look between any two steps of replacing a folder, and see which tables are there."""
    dst, found = f"{place}/packed", []
    embpack.quantize_file(model, dst, max_shard_size=CUT)
    expected = {
        bits: {name: embpack.quantize(table, bits=bits).packed.tobytes() for name, table in TABLES.items()}
        for bits in (4, 8)
    }

    def read():
        try:
            tables = embpack.load(dst, access="memory")
        except (FileNotFoundError, ValueError):
            return None
        [bits] = {table.row_format.bits for table in tables.values()}
        assert {name: table.packed.tobytes() for name, table in tables.items()} == expected[bits]
        return bits

    def looking(do):
        def step(*args):
            found.append(read())
            do(*args)
            found.append(read())

        return step

    for step in ("copy", "remove"):
        monkeypatch.setattr(f"embpack.formats.new_folder.{step}", looking(getattr(remote, step)))
    monkeypatch.setattr("embpack.formats.remote._AT_A_TIME", 1)
    embpack.quantize_file(model, dst, bits=8, max_shard_size=CUT)
    assert [bits for bits, before in zip(found, [0, *found], strict=False) if bits != before] == [4, None, 8]


def test_the_index_is_removed_first_and_written_last(model, bucket, monkeypatch):
    steps = []
    dst, index = f"{bucket}/packed", "model.embpack.safetensors.index.json"
    embpack.quantize_file(model, dst, max_shard_size=CUT)
    for step in ("copy", "remove"):
        really = getattr(remote, step)
        monkeypatch.setattr(
            f"embpack.formats.new_folder.{step}",
            lambda *paths, really=really, step=step: (steps.append((step, str(paths[-1]))), really(*paths)),
        )
    embpack.quantize_file(model, dst, max_shard_size="150 KB")
    inside = [(step, path.removeprefix(f"{dst}/")) for step, path in steps if path.startswith(f"{dst}/")]
    assert inside[0] == ("remove", index)
    assert inside[-1] == ("copy", index)
    assert ("remove", "model-00001-of-00003.safetensors") in inside
    assert set(embpack.load(dst, access="memory", verify=True)) == set(TABLES)


def test_an_interrupted_run_goes_on(tmp_path, model, place):
    dst = f"{place}/packed"
    first, second = stop_after(7000), stop_after(10**9)
    with pytest.raises(StoppedError) as caught:
        embpack.quantize_file(model, dst, max_shard_size=CUT, progress=first)
    assert f"{dst}: 2 of 3 files are done, and --resume" in "".join(caught.value.__notes__)
    assert not read_back(dst)
    embpack.quantize_file(model, dst, max_shard_size=CUT, resume=True, progress=second)
    embpack.quantize_file(model, tmp_path / "packed", max_shard_size=CUT)
    assert read_back(dst) == read_folder(tmp_path / "packed")
    assert not list_staged(dst)


def test_an_interrupted_run_of_other_options_is_not_gone_on_with(model, place):
    dst = f"{place}/packed"
    with pytest.raises(StoppedError):
        embpack.quantize_file(model, dst, max_shard_size=CUT, progress=stop_after(7000))
    with pytest.raises(ValueError, match=r"cannot be resumed, for table 'item_embedding.weight' was optimal"):
        embpack.quantize_file(model, dst, max_shard_size=CUT, resume=True, bits=8)
    with pytest.warns(UserWarning, match="an earlier run was interrupted with 2 of 3 files done, which are removed"):
        embpack.quantize_file(model, dst, max_shard_size=CUT)


def test_space_for_the_largest_file(model, place, monkeypatch):
    usage = shutil.disk_usage("/tmp")
    monkeypatch.setattr("embpack.formats.atomic.shutil.disk_usage", lambda folder: usage._replace(free=60_000))
    for dst in (f"{place}/packed.safetensors", f"{place}/packed"):
        with pytest.raises(
            OSError, match=rf"^cannot write {dst}: it takes at least [0-9]+ bytes, but 60000 bytes are free"
        ):
            embpack.quantize_file(model, dst)
    monkeypatch.setattr("embpack.formats.atomic.shutil.disk_usage", lambda folder: usage._replace(free=80_000))
    embpack.quantize_file(model, f"{place}/packed", max_shard_size=CUT)  # of three files


def test_a_full_disk_on_this_machine(model, place, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("embpack.formats.sharded.write_safetensors", write)
    with pytest.raises(
        OSError, match=r"the disk is full, after 0 bytes .*; set TMPDIR to a folder with more, make space"
    ):
        embpack.quantize_file(model, f"{place}/packed")
    assert not list_staged(f"{place}/packed")


def test_no_temporary_file_stays(model, place, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    embpack.quantize_file(model, f"{place}/packed", max_shard_size=CUT)
    with pytest.raises(StoppedError):
        embpack.quantize_file(model, f"{place}/other.safetensors", progress=stop_after(100))
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
import embpack
def progress(name, rows):
    if name.startswith("user"):
        os.kill(os.getpid(), signal.SIGKILL)
embpack.quantize_file(*sys.argv[1:], max_shard_size="70 KB", progress=progress)
"""


def test_a_run_that_was_killed_leaves_no_table_and_goes_on(tmp_path, model, bucket):
    dst = f"{bucket}/packed"
    found = subprocess.run([sys.executable, "-c", _KILLED, model, dst], check=False, env=here())
    assert found.returncode == -signal.SIGKILL
    assert not read_back(dst)
    assert len([name for name in list_staged(dst) if name.endswith(".safetensors")]) == 2
    embpack.quantize_file(model, dst, max_shard_size=CUT, resume=True)
    embpack.quantize_file(model, tmp_path / "packed", max_shard_size=CUT)
    assert read_back(dst) == read_folder(tmp_path / "packed")
    assert not list_staged(dst)


# Faults


@pytest.fixture
def flaky(endpoint):
    with serve_flaky(endpoint) as proxy:
        yield proxy


def test_an_s3_that_fails_now_and_then(tmp_path, shards, bucket, flaky, monkeypatch):
    """One request in twenty fails, others take their time: all that is written is as without that."""
    monkeypatch.setattr("embpack.formats.remote_source._REQUEST_BYTES", 1 << 15)
    upload(shards, f"{bucket}/model")
    source, dst = (UPath(f"{bucket}/{name}", endpoint_url=flaky.url) for name in ("model", "packed"))
    embpack.quantize_file(shards, tmp_path / "packed", max_shard_size=CUT)
    embpack.quantize_file(source, dst, max_shard_size=CUT)
    assert read_back(f"{bucket}/packed") == read_folder(tmp_path / "packed")
    assert flaky.failed >= 8
    assert set(embpack.load(dst, access="memory", verify=True)) == set(TABLES)


def test_requests_are_tried_again_if_that_may_help(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for error, tries in (
        (TimeoutError("slow"), 5),
        (OSError(errno.EBUSY, "slow down"), 5),
        (OSError(errno.EINVAL, "no"), 1),
        (PermissionError("no"), 1),
        (FileNotFoundError("no"), 1),
    ):
        calls = []

        def fail(error=error, calls=calls):
            calls.append(1)
            raise error

        with pytest.raises(type(error)):
            remote.trying(fail)
        assert len(calls) == tries


# Errors


def test_no_such_bucket_and_no_such_key(model, bucket):
    with pytest.raises(
        FileNotFoundError, match=r"^s3://none/a: cannot be read: there is no such bucket; check its name"
    ):
        embpack.load("s3://none/a", access="memory")
    with pytest.raises(
        FileNotFoundError, match=rf"^{bucket}/a: cannot be read: there is nothing of that name; check it$"
    ):
        embpack.load(f"{bucket}/a", access="memory")
    for name in ("packed", "packed.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"^s3://none/{name}: cannot be written: there is no such bucket"):
            embpack.quantize_file(model, f"s3://none/{name}")
    with pytest.raises(ValueError, match="names a bucket alone; give the name of a file or folder in it"):
        embpack.quantize_file(model, "s3://bucket")


def test_no_credentials(endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = UPath("s3://bucket/a", skip_instance_cache=True)
    with pytest.raises(
        PermissionError, match=r"^s3://bucket/a: cannot be read: there are no credentials \(.*set AWS_ACC"
    ):
        embpack.load(path, access="memory")


def test_access_denied(model, place, monkeypatch):
    path = as_path(f"{place}/a.safetensors")

    def refuse(*args, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(path.fs), "pipe_file", refuse)
    with pytest.raises(
        PermissionError, match=rf"^{path}: cannot be written: access is denied \(Access Denied\); check the"
    ):
        embpack.quantize_file(model, path)
    monkeypatch.setattr(type(path.fs), "info", refuse)
    with pytest.raises(
        PermissionError, match=rf"^{path}: cannot be read: access is denied \(Access Denied\); check the"
    ):
        embpack.load(path, access="memory")


def test_an_endpoint_that_cannot_be_reached(endpoint, monkeypatch, embpack_command):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    path = UPath("s3://bucket/a", skip_instance_cache=True)
    with pytest.raises(
        RemoteError, match=r"^s3://bucket/a: cannot be read: the endpoint cannot be reached \(.*check its U"
    ):
        embpack.load(path, access="memory")


def test_errors_of_the_command_are_one_line(endpoint, embpack_command):
    code, _, err = embpack_command("quantize", "s3://none/a.safetensors", "s3://bucket/b.safetensors")
    assert code == 1
    assert (
        err
        == "error: s3://none/a.safetensors: cannot be read: there is no such bucket; check its name, or make it first\n"
    )


def test_the_command_copies_rows_from_an_earlier_run_behind_a_uri(embpack_command, model, place, tmp_path):
    since = f"{place}/monday.safetensors"
    embpack.quantize_file(model, since, keep_checksums=True)
    code, out, err = embpack_command("quantize", model, tmp_path / "tuesday.safetensors", "--since", since, "--json")
    assert (code, err) == (0, "")
    assert [table["reused_rows"] for table in json.loads(out)["tables"]] == [3000] * 3

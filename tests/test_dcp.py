"""What several processes of PyTorch save: read without PyTorch, joined, packed; damage is told, nothing is run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from checkpoints import run_embpack, run_python
from damaged import Evil
from dcp_folders import write_dcp, write_pieces
from saving_processes import DIM, ROWS, SHARDINGS, TENSORS, make_values
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import embpack
from embpack.errors import FormatError
from embpack.formats import SourceTensor, dcp_metadata, open_checkpoint, sharded
from embpack.formats.blocks import Block, join_blocks
from embpack.table_names import is_optimizer_state

NUMPY_TYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
TABLE = make_values("table", (10, 6))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that four processes have saved."""
    folder = tmp_path_factory.mktemp("saved")
    done = subprocess.run(
        [sys.executable, "-m", "tests.saving_processes", folder],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def read_values(tensor, n=3):
    chunks = [chunk.copy() for chunk in tensor.chunks(n)]
    whole = np.concatenate(chunks) if tensor.shape else chunks[0]
    np.testing.assert_array_equal(tensor.read(), whole)
    return whole.view(NUMPY_TYPES.get(tensor.dtype, whole.dtype)).astype(np.float32)


def check_tensors(folder, prefix="", without=("square.weight",)):
    """Hold what is read of a folder against the values that were saved; returns what was left out."""
    with open_checkpoint(folder) as checkpoint:
        tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
        assert set(tensors) == {f"{prefix}{name}" for name in TENSORS if name not in without}
        for name, tensor in tensors.items():
            expected = make_values(name.removeprefix(prefix), tensor.shape)
            for n in (1, 5, 1000):
                np.testing.assert_array_equal(read_values(tensor, n), expected, err_msg=name)
            if tensor.shape:
                for start, stop in ((0, 1), (1, tensor.shape[0]), (tensor.shape[0] // 2, tensor.shape[0])):
                    rows = tensor.read(start, stop)
                    np.testing.assert_array_equal(rows, tensor.read()[start:stop])
        return checkpoint.left_out


def test_all_kinds_of_chunks_are_joined(saved):
    notes = check_tensors(saved / "dcp", "model.")
    assert notes == (
        "tensors of the optimizer: 11 ('optimizer.state.rows_embedding.weight.exp_avg', "
        "'optimizer.state.few_embedding.weight.exp_avg', 'optimizer.state.columns_embedding.weight.exp_avg' ...)",
        "objects, which are no tensors: 2 ('step', 'settings.lr')",
        "tensors that are cut along two dimensions beside their first: 1 ('model.square.weight')",
    )


def test_types_and_shapes_are_those_that_were_saved(saved):
    with open_checkpoint(saved / "dcp") as checkpoint:
        found = {tensor.name.removeprefix("model."): (tensor.shape, tensor.dtype) for tensor in checkpoint.tensors}
    tags = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64"}
    assert found == {name: (TENSORS[name][0], tags[TENSORS[name][1]]) for name in found}


def test_the_number_of_pieces_is_told(saved):
    with open_checkpoint(saved / "dcp") as checkpoint:
        found = {tensor.name.removeprefix("model."): tensor.num_pieces for tensor in checkpoint.tensors}
    pieces = {name: 1 if TENSORS[name][2] is None else 4 for name in found}
    assert found == {**pieces, "few_embedding.weight": 3}


def test_each_process_may_have_metadata_of_its_own(saved):
    names = {path.name for path in (saved / "apart").iterdir()}
    assert "__0.metadata" in names
    check_tensors(saved / "apart", "model.")
    with open_checkpoint(saved / "apart") as checkpoint:
        assert {source.path.name for source in checkpoint.sources} == names


def test_many_files_of_a_process_are_read(saved):
    assert len(list((saved / "threads").iterdir())) > 30
    check_tensors(saved / "threads")


@pytest.mark.parametrize("name", ["model.ckpt-7", "model.ckpt-7/model", "model.ckpt-7/model/.metadata"])
def test_the_layout_of_torcheasyrec(saved, name):
    notes = check_tensors(saved / name)
    assert ("folder 'optimizer'" in notes) == (name == "model.ckpt-7")


def test_an_optimizers_folder_has_nothing_to_pack(saved):
    with pytest.raises(
        ValueError, match=r"nothing to pack; it has no tensor that can be read; left out: tensors of the optimizer: 11"
    ):
        embpack.quantize_file(saved / "model.ckpt-7" / "optimizer", saved / "none.safetensors")


def test_files_with_pieces_for_hugging_face_are_joined(saved):
    without = ("square.weight", "fp8_embedding.weight", "turned_embedding.weight")
    assert check_tensors(saved / "pieces", without=without) == (
        "tensor 'square.weight' (it is cut along two dimensions beside its first)",
    )
    with open_checkpoint(saved / "pieces") as checkpoint:
        assert {source.path for source in checkpoint.sources} == set((saved / "pieces").iterdir())
    piece = next((saved / "pieces").iterdir())
    with pytest.raises(ValueError, match=f"{piece}: one of several files with pieces of tensors; give their folder"):
        open_checkpoint(piece).__enter__()


def test_whole_tensors_beside_pieces_are_those_that_are_read(saved):
    without = ("fp8_embedding.weight", "turned_embedding.weight", "count")
    assert check_tensors(saved / "consolidated", without=without) == ("folder 'sharded' (other weights)",)
    assert check_tensors(saved / "indexed", without=without) == ()


READ = """
import sys
import numpy as np
from embpack.formats import open_checkpoint
with open_checkpoint(sys.argv[1]) as checkpoint:
    np.savez(sys.argv[2], **{tensor.name: tensor.read() for tensor in checkpoint.tensors if tensor.dtype == "F32"})
assert not {"torch", "torchrec", "safetensors"} & set(sys.modules)
"""


@pytest.mark.skipif(find_spec("torchrec") is None, reason="TorchRec is not installed")
def test_torchrecs_tables_are_read_without_pytorch(saved, tmp_path):
    done = run_python(READ, saved / "torchrec", tmp_path / "read.npz")
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "read.npz")
    names = {f"model.ebc.embedding_bags.{sharding}.weight" for sharding in SHARDINGS}
    assert set(found) == names | {"model.over.weight", "model.over.bias"}
    for sharding in SHARDINGS:
        name = f"model.ebc.embedding_bags.{sharding}.weight"
        np.testing.assert_array_equal(found[name], make_values(sharding, (ROWS, DIM)))


@pytest.mark.skipif(find_spec("torchrec") is None, reason="TorchRec is not installed")
def test_torchrecs_tables_are_packed_and_looked_up(saved, tmp_path):
    shown = run_embpack("quantize", saved / "torchrec", "--dry-run")
    assert "left out: tensors of the optimizer: 5 (" in shown.stdout, shown.stderr
    assert shown.stdout.count("float32, 4 pieces") == 3
    done = run_embpack("quantize", saved / "torchrec", tmp_path / "out.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["left_out"]) == 1
    tables = embpack.load(tmp_path / "out.safetensors", verify=True)
    assert set(tables) == {f"model.ebc.embedding_bags.{sharding}.weight" for sharding in SHARDINGS}
    for sharding in SHARDINGS:
        values = make_values(sharding, (ROWS, DIM))
        expected = embpack.quantize(values)
        table = tables[f"model.ebc.embedding_bags.{sharding}.weight"]
        np.testing.assert_array_equal(table.packed, expected.packed)
        np.testing.assert_array_equal(table[[0, 18, 19, 36]], expected[[0, 18, 19, 36]])
        np.testing.assert_array_equal(
            table.embedding_bag([3, 36, 0], offsets=[0, 1]), expected.embedding_bag([3, 36, 0], offsets=[0, 1])
        )


def cut_rows(table, *bounds):
    """Cut a table into chunks at rows."""
    tensor = torch.from_numpy(table)
    return {(start, 0): tensor[start:stop].clone() for start, stop in pairwise((0, *bounds, len(table)))}


def write_table(folder, change=lambda metadata: metadata):
    return write_dcp(folder, {"item_embedding.weight": (TABLE.shape, cut_rows(TABLE, 4))}, change)


def test_what_is_written_by_hand_is_what_pytorch_reads(tmp_path):
    write_table(tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(state["item_embedding.weight"], TABLE)
    for path in (tmp_path / "dcp", tmp_path / "a.pt"):
        with open_checkpoint(path) as checkpoint:
            np.testing.assert_array_equal(checkpoint.tensors[0].read(), TABLE)
    write_pieces(tmp_path / "pieces", {"item_embedding.weight": cut_rows(TABLE, 4)})
    with open_checkpoint(tmp_path / "pieces") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), TABLE)


def test_metadata_of_older_versions_is_read(tmp_path):
    """Their properties are of another module, and some attributes were not there."""

    def make_old(metadata):
        for tensor in metadata.state_dict_metadata.values():
            tensor.properties = OldTensorProperties(dtype=torch.float32)
        for attribute in ("version", "storage_meta", "planner_data"):
            delattr(metadata, attribute)
        for key in metadata.storage_data:
            object.__setattr__(key, "index", None)
        return metadata

    write_table(tmp_path / "dcp", make_old)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), TABLE)


def test_processes_without_rows_may_repeat_a_place(tmp_path):
    empty = torch.empty(0, 6)

    def repeat(metadata):
        chunks = metadata.state_dict_metadata["item_embedding.weight"].chunks
        chunks.append(chunks[-1])
        return metadata

    chunks = {**cut_rows(TABLE, 4), (10, 0): empty}
    write_dcp(tmp_path / "dcp", {"item_embedding.weight": (TABLE.shape, chunks)}, repeat)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), TABLE)


def test_tensors_without_values_are_read(tmp_path):
    shapes = {"a": (0, 6), "b": (6, 0), "c": (0,)}
    write_dcp(tmp_path / "dcp", {name: (shape, {}) for name, shape in shapes.items()})
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert {tensor.name: tensor.read().shape for tensor in checkpoint.tensors} == shapes


def test_what_is_keyed_of_unknown_type_or_no_tensor_is_left_out(tmp_path):
    whole = {(0, 0): torch.from_numpy(TABLE)}
    names = [f"t{i}.weight" for i in range(3)]
    keyed = {f"bags.k.{part}": (TABLE.shape, whole) for part in ("weight", "weight_id", "bucket", "metadata")}
    plain = {name: (TABLE.shape, whole) for name in ("bags.metadata", "bags.bucket")}
    complex_ones = {name: ((2,), {(0,): torch.zeros(2, dtype=torch.complex128)}) for name in names}

    def add_object(metadata):
        metadata.state_dict_metadata["step"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("step")] = next(iter(metadata.storage_data.values()))
        return metadata

    write_dcp(tmp_path / "dcp", {**keyed, **plain, **complex_ones}, add_object)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert {tensor.name for tensor in checkpoint.tensors} == set(plain)
        assert checkpoint.left_out == (
            "objects, which are no tensors: 1 ('step')",
            "tables that find rows by key and not by number: 1 ('bags.k.weight')",
            "tensors of a type that safetensors files have not: 3 ('t0.weight', 't1.weight', 't2.weight')",
        )
    with pytest.raises(ValueError, match=r"left out: .*tables that find rows by key and not by number: 1 \('bags\.k"):
        embpack.quantize_file(tmp_path / "dcp", tmp_path / "a.safetensors", include=["bags.k.weight"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("state.model.embedding_bags.t.weight.t.momentum1", True),
        ("app.state.model.embedding_bags.t.weight.t.exp_avg", True),
        ("state.pos_embedding.exp_avg_sq", True),
        ("state.0.momentum_buffer", True),
        ("optimizer.state.w.weight.anything", True),
        ("optim.x", True),
        ("param_groups.w.weight.lr", True),
        ("model.embedding_bags.t.weight", False),
        ("state.model.embedding.weight", False),
        ("state.weight", False),
        ("model.state.bias", False),
        ("model.momentum1", False),
        ("model.optimizer", False),
    ],
)
def test_names_of_optimizers_tensors(name, expected):
    assert is_optimizer_state(name) == expected


SHAPES = [((7, 5, 4), (0, 2)), ((7, 5, 4), (0, 1)), ((7, 5, 4), (2,)), ((6, 2, 3, 4), (0, 3)), ((9,), (0,))]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_blocks_of_any_rank(shape, axes):
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    blocks = [((0,) * len(shape), values)]
    for axis in axes:
        cut = []
        for offsets, block in blocks:
            half = block.shape[axis] // 2
            first, second = np.split(block, [half], axis)
            cut += [(offsets, first), ((*offsets[:axis], offsets[axis] + half, *offsets[axis + 1 :]), second)]
        blocks = cut

    def make_tensor(block):
        def iter_rows(start, stop, n):
            return (np.ascontiguousarray(block[at : min(at + n, stop)]) for at in range(start, stop, n))

        return SourceTensor("x", block.shape, "F32", iter_rows, None)

    joined = join_blocks("here", "x", shape, "F32", [Block(offsets, make_tensor(block)) for offsets, block in blocks])
    for n in (1, 2, 100):
        for start, stop in ((0, shape[0]), (1, 3), (2, shape[0])):
            chunks = [chunk.copy() for chunk in joined.chunks(n, start, stop)]
            assert [len(chunk) for chunk in chunks[:-1]] == [n] * (len(chunks) - 1)
            np.testing.assert_array_equal(np.concatenate(chunks), values[start:stop])


# Damage


def edit(**fields):
    """Change the first place where values lie."""

    def change(metadata):
        key = next(iter(metadata.storage_data))
        metadata.storage_data[key] = replace(metadata.storage_data[key], **fields)
        return metadata

    return change


def edit_chunk(offsets, sizes):
    def change(metadata):
        chunk = metadata.state_dict_metadata["item_embedding.weight"].chunks[0]
        chunk.offsets, chunk.sizes = torch.Size(offsets), torch.Size(sizes)
        return metadata

    return change


def edit_tensor(**fields):
    def change(metadata):
        tensor = metadata.state_dict_metadata["item_embedding.weight"]
        metadata.state_dict_metadata["item_embedding.weight"] = replace(tensor, **fields)
        return metadata

    return change


def without_place(metadata):
    metadata.storage_data.popitem()
    return metadata


def overlap(metadata):
    first, second = metadata.storage_data
    metadata.storage_data[second] = metadata.storage_data[first]
    return metadata


def renamed(metadata):
    [tensor] = metadata.state_dict_metadata.values()
    metadata.state_dict_metadata = {b"a": tensor}
    return metadata


def half(metadata):
    tensor = metadata.state_dict_metadata["item_embedding.weight"]
    tensor.properties = replace(tensor.properties, dtype=torch.float16)
    return metadata


DAMAGE = {
    "a file that is not there": (edit(relative_path="__7_0.distcp"), "puts tensors into __7_0.distcp, but there is no"),
    "a file above": (
        edit(relative_path="../__0_0.distcp"),
        "'../__0_0.distcp', which is outside its folder; it is not read",
    ),
    "an absolute path": (edit(relative_path="/etc/passwd"), "'/etc/passwd', which is outside its folder"),
    "a path with a zero byte": (edit(relative_path="a\0b"), r"'a\\x00b', which is outside its folder"),
    "a folder": (edit(relative_path="."), r"'\.', which is outside its folder"),
    "an end after the file's": (edit(length=1 << 40), "has .* bytes, the metadata promises 1099511627776"),
    "a place before the file": (edit(offset=-1), r"at bytes \[-1, "),
    "too few bytes": (edit(length=90), r"the chunk at \[0, 0\] of .* takes 96 bytes, but has 90 in __0_0.distcp"),
    "an entry that is cut": (
        edit(length=1000),
        "entry of 'item_embedding.weight' at byte 0: begins as a zip file, but",
    ),
    "an entry that begins late": (edit(offset=8, length=1000), "at byte 8: not a file of torch.save, or damaged: "),
    "compressed": (
        edit(transform_descriptors=["stream.zstd/1"]),
        r"was compressed \(stream.zstd/1\), and such entries",
    ),
    "over each other": (overlap, "lie over each other at byte 0 of __0_0.distcp"),
    "no place": (without_place, r"does not say where the chunk at \[4, 0\] of tensor 'item_embedding.weight' lies"),
    "outside the tensor": (edit_chunk((8, 0), (4, 6)), r"of shape \[10, 6\] has a chunk that is no part of it"),
    "of other dimensions": (edit_chunk((0,), (4,)), "has a chunk that is no part of it"),
    "a hole": (edit_tensor(size=torch.Size((12, 6))), "table 'item_embedding.weight' has no piece.* with row 10"),
    "another shape": (edit_chunk((0, 0), (4, 5)), "has no piece, or more than one, with row 0, column 5"),
    "another type": (half, "holds 96 bytes for float32 .* the metadata promises float16 of shape"),
    "no chunks": (edit_tensor(chunks=7), "what it says of tensor 'item_embedding.weight' is damaged"),
    "no type": (edit_tensor(properties=None), "what it says of tensor 'item_embedding.weight' is damaged"),
    "a shape that is none": (edit_tensor(size=("a", 6)), "what it says of tensor 'item_embedding.weight' is damaged"),
    "a name that is no text": (renamed, "which is no text; rename it"),
    "a dict": (vars, "holds a dict, not metadata of torch.distributed.checkpoint"),
    "an object": (lambda metadata: OrderedDict(a=metadata), "holds a collections.OrderedDict object, not metadata"),
    "no storage": (lambda metadata: replace(metadata, storage_data=None), "does not say which tensors there are"),
    "other storage": (lambda metadata: replace(metadata, storage_data={"a": 1}), "an entry of storage_data is damaged"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_told(tmp_path, how):
    change, message = DAMAGE[how]
    folder = write_table(tmp_path / "dcp", change)
    with pytest.raises(FormatError, match=message) as caught, open_checkpoint(folder) as checkpoint:
        checkpoint.tensors[0].read()
    assert str(caught.value).startswith(f"{folder}/")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_is_told_before_anything_is_packed(tmp_path):
    folder = write_table(tmp_path / "dcp")
    path = folder / "__1_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match=f"{path}: has .* bytes, the metadata promises .*; it is truncated, copy it"):
        open_checkpoint(folder).__enter__()


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("rank", [0, 1])
def test_altered_values_are_told_however_many_rows_are_read_at_a_time(tmp_path, rank, n):
    folder = write_table(tmp_path / "dcp")
    path, value = folder / f"__{rank}_0.distcp", TABLE[(3, 9)[rank]].tobytes()
    path.write_bytes(path.read_bytes().replace(value, value[:-1] + bytes([value[-1] ^ 1])))
    with open_checkpoint(folder) as checkpoint:
        [tensor] = checkpoint.tensors
        tensor.read(8, 9)  # rows out of turn neither hide damage nor seem to be it
        for _ in range(2):
            with pytest.raises(FormatError, match=f"{path}: the .* bytes from .* on do not agree with their checksum"):
                list(tensor.chunks(n))


def test_values_of_another_checkpoint_are_told(tmp_path):
    """A file of another run, in which the table had other rows."""
    folder = write_table(tmp_path / "dcp")
    other = write_dcp(tmp_path / "other", {"x": ((8, 3), {(0, 0): torch.zeros(8, 3)})})
    shutil.copy(other / "__0_0.distcp", folder / "__0_0.distcp")
    with open_checkpoint(folder) as checkpoint, pytest.raises(FormatError, match=r"shape \[8, 3\], the metadata promi"):
        checkpoint.tensors[0].read()


def test_expanded_tensors_are_refused(tmp_path):
    """A few bytes that stand for many values are none that PyTorch saves."""
    folder = write_dcp(tmp_path / "dcp", {"x": ((8, 8), {(0, 0): torch.zeros(1).expand(8, 8)})})
    with open_checkpoint(folder) as checkpoint, pytest.raises(FormatError, match="holds 4 bytes for float32 of shape"):
        checkpoint.tensors[0].read()


def test_a_file_that_changes_is_refused(tmp_path):
    folder = write_table(tmp_path / "dcp")
    with open_checkpoint(folder) as checkpoint:
        checkpoint.tensors[0].read()
        os.utime(folder / "__1_0.distcp", (1, 1))
        with pytest.raises(FormatError, match=r"__1_0.distcp: was written to while it was read"):
            checkpoint.tensors[0].read()


def count_open():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def write_two_tables(folder, kind):
    rows = np.random.default_rng(0).standard_normal((9000, 16), np.float32)
    chunks = {name: cut_rows(rows, 5000) for name in ("user_emb.weight", "item_emb.weight")}
    if kind == "pieces":
        return write_pieces(folder, chunks)
    return write_dcp(folder, {name: (rows.shape, own) for name, own in chunks.items()})


def pack_one_file(src, dst, monkeypatch):
    """Pack, and end when the second file is to be written."""
    write, written = sharded.write_safetensors, []

    def stop(file, path, shard):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(file, path, shard)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sharded, "write_safetensors", stop)
        embpack.quantize_file(src, dst, max_shard_size="100 kB")


@pytest.mark.parametrize("kind", ["dcp", "pieces"])
def test_a_folder_is_written_and_a_run_resumed(tmp_path, monkeypatch, kind):
    src = write_two_tables(tmp_path / "src", kind)
    embpack.quantize_file(src, tmp_path / "whole", max_shard_size="100 kB")
    pack_one_file(src, tmp_path / "packed", monkeypatch)
    embpack.quantize_file(src, tmp_path / "packed", max_shard_size="100 kB", resume=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) > 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == files
    assert set(embpack.load(tmp_path / "packed", verify=True)) == {"user_emb.weight", "item_emb.weight"}


@pytest.mark.parametrize(
    "name", ["dcp/.metadata", "dcp/__1_0.distcp", "pieces/shard-00002-model-00001-of-00001.safetensors"]
)
def test_no_run_is_resumed_whose_source_was_written_to(tmp_path, monkeypatch, name):
    src = write_two_tables(tmp_path / Path(name).parts[0], Path(name).parts[0])
    pack_one_file(src, tmp_path / "packed", monkeypatch)
    os.utime(tmp_path / name, (1, 1))
    with pytest.raises(ValueError, match=f"cannot be resumed, for source '{name}' was written to since"):
        embpack.quantize_file(src, tmp_path / "packed", max_shard_size="100 kB", resume=True)


def test_files_are_open_one_at_a_time(tmp_path):
    folder = write_dcp(tmp_path / "dcp", {"x_embedding": (TABLE.shape, cut_rows(TABLE, *range(1, 10)))})
    before = count_open()
    with open_checkpoint(folder) as checkpoint:
        for _ in checkpoint.tensors[0].chunks(1):
            assert count_open() <= before + 1


@pytest.mark.parametrize("place", ["alone", "beside the tensors", "in an entry"])
def test_nothing_is_run(tmp_path, place):
    evil = Evil(tmp_path / "witness")

    def change(metadata):
        if place == "alone":
            return evil
        metadata.planner_data = evil
        return metadata

    folder = write_table(tmp_path / "dcp", change)
    if place == "in an entry":
        with (folder / "__0_0.distcp").open("r+b") as file:
            file.write(pickle.dumps(evil))
    if place == "beside the tensors":
        with open_checkpoint(folder) as checkpoint:
            checkpoint.tensors[0].read()
    else:
        with pytest.raises(
            FormatError, match=r"Path.touch object, not metadata|not one of torch.save; pickles are never"
        ):
            with open_checkpoint(folder) as checkpoint:
                checkpoint.tensors[0].read()
    assert not (tmp_path / "witness").exists()


HOSTILE = {
    "cut": lambda raw: raw[:-20],
    "nested": lambda raw: b"(" * 200_000 + b".",
    "nested tuples as a key": lambda raw: b"}N" + b"2\x86" * 60 + b"Ns.",
    "a number for a value that is large": lambda raw: b"Nr\xff\xff\xff\x7f.",
    "a string that is longer than the file": lambda raw: b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "objects of objects": lambda raw: b"ca\nb\n" + b")R" * 200_000 + b".",
    "itself": lambda raw: b"]\x94h\x00a.",
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_pickles_are_told(tmp_path, how):
    folder = write_table(tmp_path / "dcp")
    path = folder / ".metadata"
    path.write_bytes(HOSTILE[how](path.read_bytes()))
    with pytest.raises(FormatError, match=f"{path}: "):
        open_checkpoint(folder).__enter__()


def test_metadata_that_is_too_long_is_told(tmp_path, monkeypatch):
    folder = write_table(tmp_path / "dcp")
    monkeypatch.setattr(dcp_metadata, "MOST_STEPS", 100)
    with pytest.raises(FormatError, match=r"takes more than 100 steps; save the model's state dict alone, without the"):
        open_checkpoint(folder).__enter__()
    monkeypatch.setattr(dcp_metadata, "MOST_PICKLE_BYTES", 100)
    with pytest.raises(FormatError, match=r"and metadata of at most 100 is read; save the model's state dict alone"):
        open_checkpoint(folder).__enter__()


def test_processes_that_disagree_are_told(tmp_path):
    folder = write_table(tmp_path / "dcp")
    (folder / ".metadata").rename(folder / "__0.metadata")
    other = write_dcp(tmp_path / "other", {"item_embedding.weight": ((4, 5), {(0, 0): torch.zeros(4, 5)})})
    (other / ".metadata").rename(folder / "__1.metadata")
    with pytest.raises(
        FormatError, match=r"is float32 of shape \[10, 6\], in the metadata of another process float32 of"
    ):
        open_checkpoint(folder).__enter__()


def write_two_pieces(folder):
    return write_pieces(folder, {"item_embedding.weight": cut_rows(TABLE, 4)})


def change_header(path, **metadata):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {key: value for key, value in {**header["__metadata__"], **metadata}.items() if value}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_metadata_that_all_files_have_is_kept(tmp_path):
    folder = write_two_pieces(tmp_path / "pieces")
    change_header(folder / "shard-00002-model-00001-of-00001.safetensors", mine="2")
    with open_checkpoint(folder) as checkpoint:
        assert [shard.metadata for shard in checkpoint.shards] == [{"format": "pt"}]
        assert checkpoint.left_out == ("metadata 'mine' (it is not the same in all files)",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metadata DCP_SHARDING_INFO, which says where tensors begin; rename it if it is whole"),
        ("{}", "does not say where tensor 'item_embedding.weight' begins"),
        ('{"item_embedding.weight": {"saved_offsets": [4]}}', "does not say where tensor 'item_embedding.weight' be"),
        ('{"item_embedding.weight": {"saved_offsets": [4.0, 0]}}', "does not say where tensor"),
        ('{"item_embedding.weight": {"saved_offsets": [-4, 0]}}', "does not say where tensor"),
        ('{"item_embedding.weight": {"saved_offsets": [5, 0]}}', "has no piece, or more than one, with row 4"),
        ('{"item_embedding.weight": {"saved_offsets": [9223372036854775807, 0]}}', "which is too large; copy it again"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds a JSON list, not an object"),
    ],
)
def test_damaged_pieces_are_told(tmp_path, text, message):
    folder = write_two_pieces(tmp_path / "pieces")
    change_header(folder / "shard-00002-model-00001-of-00001.safetensors", DCP_SHARDING_INFO=text)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(folder).__enter__()


def test_a_piece_that_is_not_there_is_told(tmp_path):
    folder = write_two_pieces(tmp_path / "pieces")
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FormatError, match="has no piece, or more than one, with row 0, column 0; a file is missing"):
        open_checkpoint(folder).__enter__()


def test_pieces_of_two_types_are_told(tmp_path):
    rows = torch.from_numpy(TABLE)
    folder = write_pieces(tmp_path / "pieces", {"x": {(0, 0): rows[:4], (4, 0): rows[4:].half()}})
    with pytest.raises(FormatError, match="pieces of tensor 'x' are F32 with 2 dimensions and F16 with 2; they are of"):
        open_checkpoint(folder).__enter__()

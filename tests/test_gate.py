"""The limit on losses, and the size of a file before it is written."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Arrays, names_in, write_npy, write_npz, write_safetensors, write_shards, write_torch

import embpack
from embpack.convert import count_file_bytes
from embpack.errors import LossLimitError
from embpack.formats import open_checkpoint
from embpack.methods import METHODS
from embpack.rules import Rules, decide_all
from embpack.variant import Variant

# From the table that loses least to the one that loses most.
NAMES = ("fine", "bad", "worse", "worst")


def make_arrays():
    """Make tables with an ever larger column, the worst first in the file, and another tensor."""
    normal = np.random.default_rng(0).standard_normal((200, 32), dtype=np.float32)
    scales = np.ones((len(NAMES), 32), np.float32)
    scales[:, 0] = 1, 1.5, 2, 3
    tables = {f"{name}_emb": normal * scale for name, scale in zip(NAMES, scales, strict=True)}
    return Arrays(dict(reversed(tables.items())), {"bias": np.ones(8, np.float32)})


@pytest.mark.parametrize("write", [write_safetensors, write_shards, write_torch, write_npz])
def test_all_tables_over_the_limit_are_named_worst_first_and_nothing_is_written(tmp_path, write):
    arrays = make_arrays()
    src = write(tmp_path, arrays)
    before = names_in(tmp_path)
    losses = {f"{name}_emb": embpack.quantize(arrays.tables[f"{name}_emb"]).loss for name in NAMES}
    assert list(losses.values()) == sorted(losses.values())
    limit = losses["fine_emb"]
    packed = []
    with pytest.raises(LossLimitError) as refused:
        embpack.quantize_file(
            src,
            tmp_path / ("out" if src.is_dir() else "out.safetensors"),
            max_loss=limit,
            progress=lambda name, rows: packed.append(name),
        )
    assert set(packed) == set(losses)
    assert refused.value.limit == limit
    over = {name: loss for name, loss in reversed(losses.items()) if loss > limit}
    assert list(refused.value.losses.items()) == list(over.items())
    message, *lines = str(refused.value).split("\n")
    assert f"{src.name}" in message and f"3 of 4 tables lose more than the limit of {limit:.6g}" in message
    assert lines == [f"  {loss:.6g}  {name}" for name, loss in over.items()]
    assert names_in(tmp_path) == before


def test_the_command_line_lists_them_and_exits_with_3(embpack_command, tmp_path):
    src = write_shards(tmp_path, make_arrays())
    code, _, err = embpack_command("quantize", src, tmp_path / "out", "--max-loss", "0.01")
    message, *lines = err.splitlines()
    assert code == 3
    assert message.startswith(f"error: {src}/model.safetensors.index.json: 4 of 4 tables lose more than the limit of ")
    assert [line.split()[1] for line in lines] == [f"{name}_emb" for name in reversed(NAMES)]
    assert names_in(tmp_path) == {src.name}


def test_names_in_the_list_do_nothing_to_a_terminal(embpack_command, tmp_path):
    src = write_npz(tmp_path, Arrays({"a\x1b[31m\n_emb": make_arrays().tables["bad_emb"]}))
    code, _, err = embpack_command("quantize", src, tmp_path / "out.safetensors", "--max-loss", "0.01")
    assert code == 3
    assert err.splitlines()[1].endswith(r"  a\x1b[31m\n_emb")


def test_another_failure_still_exits_with_1(embpack_command, tmp_path):
    arrays = make_arrays()
    arrays.tables["fine_emb"][3, 4] = np.nan
    src = write_safetensors(tmp_path, arrays)
    code, _, err = embpack_command("quantize", src, tmp_path / "out.safetensors", "--max-loss", "0.01")
    assert code == 1 and "fine_emb[3, 4] is nan" in err


def test_a_refusal_goes_from_process_to_process():
    error = LossLimitError("a.npy: no", 0.1, {"b": 0.3, "a": 0.2})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.limit, copy.losses) == ("a.npy: no", 0.1, {"b": 0.3, "a": 0.2})


# Bytes of the file before it is written


def count_before(src, **variant):
    rules = Rules(include=["*_emb"], variant=Variant(**variant))
    with open_checkpoint(src) as checkpoint:
        return count_file_bytes(checkpoint, decide_all(checkpoint, rules))


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_known_before_anything_is_packed(tmp_path, method):
    src, dst = write_safetensors(tmp_path, make_arrays(), {"format": "pt"}), tmp_path / "out.safetensors"
    expected = count_before(src, method=method)
    report = embpack.quantize_file(src, dst, method=method, include=["*_emb"])
    assert report.file_bytes_after == dst.stat().st_size == expected


@pytest.mark.parametrize("write", [write_npy, write_npz, write_torch, write_shards])
@pytest.mark.parametrize("options", [{"bits": 2}, {"method": "trellis", "bits": 3.5, "rotate": "hadamard"}])
def test_bytes_are_known_of_every_kind_of_checkpoint(tmp_path, write, options):
    arrays = Arrays({"ä" * 7 + "_emb": np.random.default_rng(1).normal(size=(70, 33)).astype(ml_dtypes.bfloat16)})
    if write is write_npy:
        arrays = Arrays({name: array.astype(np.float32) for name, array in arrays.tables.items()})
    if write is write_npz:
        arrays = make_arrays()
    src = write(tmp_path, arrays)
    expected = count_before(src, **options)
    dst = tmp_path / ("out" if src.is_dir() else "out.safetensors")
    embpack.quantize_file(src, dst, include=["*_emb"], **options)
    files = dst.glob("*.safetensors") if dst.is_dir() else [dst]
    assert sum(file.stat().st_size for file in files) == expected

"""What is decided on tables goes to other processes, whatever format the tables are read from."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged import write_gguf
from dcp_folders import write_dcp, write_pieces
from gguf import GGMLQuantizationType, quants
from large_tables import MODELS, write_tensors
from safetensors.numpy import save_file
from test_reading import SOURCES, TABLE

import embpack
from embpack.errors import FormatError
from embpack.formats import FORMATS, open_checkpoint
from embpack.rules import Decision, Rules, decide_all

TENSOR = torch.from_numpy(TABLE)
CHUNKS = {(0, 0): TENSOR[:8, :2], (0, 2): TENSOR[:8, 2:].contiguous(), (8, 0): TENSOR[8:].contiguous()}


def write_index(folder):
    folder.mkdir()
    save_file({"a": TABLE}, folder / "model-1.safetensors")
    save_file({"b": TABLE}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    return index


def write_blocks(path):
    values = np.resize(TABLE, (20, 64))
    kind = GGMLQuantizationType.Q8_0
    write_gguf(path, {"a": (quants.quantize(values, kind), kind)})
    return path


def write_source(name):
    def write(path):
        path = path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        SOURCES[name](path)
        return path

    return write


def write_model(name):
    return lambda path: write_tensors(path.with_suffix(".safetensors"), MODELS[name]().tensors)


WRITTEN = {
    **{name: write_source(name) for name in SOURCES},
    **{name: write_model(name) for name in ("Qwen3.8, FP8 by pieces", "DeepSeek-V4.1", "Qwen3.8, INT8 by rows of all")},
    "blocks.gguf": lambda path: write_blocks(path.with_suffix(".gguf")),
    "index": write_index,
    "dcp": lambda path: write_dcp(path, {"a": ((20, 3), CHUNKS)}),
    "pieces": lambda path: write_pieces(path, {"a": CHUNKS}),
}

_READER = """
import pickle, sys
import numpy as np
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        decisions = pickle.load(file)
    np.savez(path, *[each.tensor.read(5, 17) for each in decisions])
"""


def decide(path) -> list[Decision]:
    with open_checkpoint(path) as checkpoint:
        is_small = any(tensor.name == "a" for tensor in checkpoint.tensors)
        decisions = decide_all(checkpoint, Rules(include=["a"] if is_small else []))
        return [each for each in decisions if each.variant]


def test_all_formats_are_here():
    assert {Path(name).suffix for name in SOURCES} >= set(FORMATS) - {".pth", ".bin", ".ckpt"}


def test_decisions_are_read_by_another_process(tmp_path):
    expected = {}
    for number, (name, write) in enumerate(WRITTEN.items()):
        decisions = decide(write(tmp_path / str(number)))
        assert decisions, name
        path = tmp_path / f"{number}.pickle"
        path.write_bytes(pickle.dumps(decisions))
        with open_checkpoint(write(tmp_path / f"again{number}")) as checkpoint:
            again = [each for each in decide_all(checkpoint, Rules(include=[decisions[0].tensor.name])) if each.variant]
            expected[path] = name, [each.tensor.read(5, 17) for each in again]
    found_here = {**os.environ, "PYTHONPATH": str(Path(embpack.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", _READER, *map(str, expected)], check=True, cwd="/", env=found_here)
    for path, (name, tables) in expected.items():
        found = np.load(f"{path}.npz")
        assert len(found) == len(tables), name
        for table, key in zip(tables, found, strict=True):
            assert found[key].tobytes() == table.tobytes(), name


@pytest.mark.parametrize("name", WRITTEN)
def test_a_pickled_decision_says_what_it_said(tmp_path, name):
    for decision in decide(WRITTEN[name](tmp_path / "a")):
        copied = pickle.loads(pickle.dumps(decision))
        assert copied.row_format == decision.row_format
        assert copied.place == decision.place
        assert copied.tensor.read(1, 9).tobytes() == decision.tensor.read(1, 9).tobytes()
        chunks = np.concatenate([chunk.copy() for chunk in copied.tensor.chunks(3)])
        assert chunks.tobytes() == decision.tensor.read().tobytes()


@pytest.mark.parametrize("name", ["aligned.safetensors", "deflated.npz", "groups.parquet", "dcp"])
def test_a_file_that_changed_since_is_refused(tmp_path, name):
    path = WRITTEN[name](tmp_path / "a")
    pickled = pickle.dumps(decide(path)[0])
    for file in [path] if path.is_file() else path.iterdir():
        os.utime(file, (1, 1))
    with pytest.raises(FormatError, match="was written to while"):
        pickle.loads(pickled).tensor.read()


def test_device_and_inode_are_those_of_one_machine(tmp_path):
    path = WRITTEN["aligned.safetensors"](tmp_path)
    pickled = pickle.dumps(decide(path)[0])
    shutil.copy2(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    decision = pickle.loads(pickled)
    assert decision.tensor.read().tobytes() == TABLE.tobytes()
    shutil.copy2(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    with pytest.raises(FormatError, match="was replaced by another file"):
        decision.tensor.read()


def test_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    WRITTEN["aligned.safetensors"](tmp_path)
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(decide("aligned.safetensors")[0])
    monkeypatch.chdir("/")
    assert pickle.loads(pickled).tensor.read().tobytes() == TABLE.tobytes()

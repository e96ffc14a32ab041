"""What an earlier embpack packed: today reads the same values from it, and packs the same weights to the same bytes."""

import json

import numpy as np
import pytest
from checkpoints import read_raw
from golden.make import (
    EXPECTED,
    INDICES,
    MANIFEST,
    PACKED,
    PIECES,
    PIECES_MANIFEST,
    POOLED,
    digest_files,
    digest_of_saved,
    digest_pieces,
    list_files,
    pack,
    pack_pieces,
    pool,
)
from safetensors.torch import load_file

import embpack
from embpack.files import FORMAT_VERSION, PIECES_VERSION
from embpack.layouts import LAYOUTS
from embpack.packed_folder import name_plain

GOLDEN = json.loads(MANIFEST.read_text())
# How a file was packed; one that was written by hand says nothing of it.
PACKED_BY_US = [name for name, entry in GOLDEN.items() if "method" in entry]


def read_expected(name):
    """The weights of each table of a golden file, as tensors, and what was read from it, as arrays."""
    weights, values = {}, {}
    for key, tensor in load_file(EXPECTED / f"{name}.safetensors").items():
        table, _, what = key.rpartition("/")
        if what == "weight":
            weights[table] = tensor
        else:
            values.setdefault(table, {})[what] = tensor.numpy()
    return weights, values


def read_version(path):
    """Which version of the format a file is in, or FORMAT_VERSION for an index, which has none."""
    return FORMAT_VERSION if path.suffix == ".json" else json.loads(read_raw(path).metadata["embpack"])["version"]


def list_said(path):
    """What a file holds whatever its version, in order: tensors, tables, other programs' metadata."""
    if path.suffix == ".json":
        return path.read_text()
    raw = read_raw(path)
    ours = json.loads(raw.metadata.pop("embpack"))
    return list(raw.tensors.items()), list(raw.metadata.items()), json.dumps(ours["tables"])


def test_every_layout_has_golden_files():
    written = {"1": set(), str(FORMAT_VERSION): set()}
    for golden in GOLDEN.values():
        version = str(read_version(list_files(PACKED / golden["file"])[0]))
        written[version] |= {table["row_format"].partition(":")[0] for table in golden["tables"].values()}
    assert written == {version: set(LAYOUTS) for version in written}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_read_as_they_did(trellis_isa, name):
    golden = GOLDEN[name]
    _, expected = read_expected(name)
    tables = embpack.load(PACKED / golden["file"], verify=True)
    assert sorted(tables) == sorted(golden["tables"]) == sorted(expected)
    for table_name, table in tables.items():
        told = {"row_format": str(table.row_format), "spec": table.method, "dtype": table.dtype, "loss": table.loss}
        assert told == golden["tables"][table_name]
        values = expected[table_name]["values"]
        assert table.dequantize().tobytes() == values.tobytes()
        assert table[INDICES].tobytes() == values[INDICES].tobytes()
        for how in POOLED:
            assert pool(table, how).tobytes() == expected[table_name][how].tobytes(), how


@pytest.mark.parametrize("name", PACKED_BY_US)
def test_golden_weights_pack_to_the_same_bytes(isa, tmp_path, name):
    golden = GOLDEN[name]
    weights, _ = read_expected(name)
    how = {key: golden[key] for key in ("method", "bits", "param_dtype")}
    kept = embpack.load(PACKED / golden["file"])
    tables = {table: embpack.quantize(weight, rotate=golden["rotation"], **how) for table, weight in weights.items()}
    for table_name, table in tables.items():
        for part in ("packed", "clusters", "codebooks"):
            assert np.array_equal(getattr(table, part), getattr(kept[table_name], part)), part
        told = {"row_format": str(table.row_format), "spec": table.method, "dtype": table.dtype, "loss": table.loss}
        assert told == golden["tables"][table_name]
    digests = golden["digests"][str(FORMAT_VERSION)]
    assert digest_of_saved(tmp_path, tables) == digests["saved"]
    written = pack(tmp_path, weights, rotation=golden["rotation"], **how)
    assert digest_files(written) == digests["packed"]
    for file, kept_file in zip(list_files(written), list_files(PACKED / golden["file"]), strict=True):
        assert name_plain(file.name) == kept_file.name or written == file
        assert list_said(file) == list_said(kept_file)
        if read_version(kept_file) == FORMAT_VERSION:
            assert file.read_bytes() == kept_file.read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_pieces_read_as_they_did_and_are_written_to_the_same_bytes(tmp_path, layout):
    expected = json.loads(PIECES_MANIFEST.read_text())[layout]
    versions = [read_version(path) for path in list_files(PIECES / layout)]
    assert versions == [PIECES_VERSION, PIECES_VERSION, FORMAT_VERSION]
    assert digest_pieces(PIECES / layout) == digest_pieces(pack_pieces(tmp_path, layout)) == expected

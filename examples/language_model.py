"""Pack the embedding of a small GPT-2 whose output layer has the same weight, and save and open it again.

python examples/language_model.py    # seconds; the model is made from a configuration, with random weights

Untied, the output layer keeps its floats beside the packed rows, and the model grows. With tied="share" both use one
packed table. The tokens that it generates are those of a float model with the unpacked rows. Needs embpack[torch] and
transformers.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from embpack.torch import ModelReport, load_checkpoint, quantize_

CONFIG = transformers.GPT2Config(
    vocab_size=20_000, n_embd=256, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
)


def make_model() -> Any:
    """Make the model; like trained ones, it does not repeat one token."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(CONFIG).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)
    return model


def generate(model: Any) -> list[int]:
    """Tokens that follow a prompt."""
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    tokens: list[int] = found[0].tolist()
    return tokens


def unpack(model: Any) -> Any:
    """The float model with a packed one's rows."""
    unpacked = make_model()
    with torch.no_grad():
        unpacked.transformer.wte.weight.copy_(model.transformer.wte.weight)
        unpacked.transformer.wpe.weight.copy_(model.transformer.wpe.weight)
    return unpacked


def main() -> None:
    """Run the example."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    transformers.utils.logging.disable_progress_bar()
    table = Table("model", box=None, title="GPT-2, 20,000 tokens, d = 256")
    for name in ("bytes", "of float32", "tokens as with its rows unpacked"):
        table.add_column(name, justify="right")
    trained = make_model()
    shared, untied = copy.deepcopy(trained), copy.deepcopy(trained)
    reports: dict[str, tuple[ModelReport, Any]] = {
        'tied="untie"': (quantize_(untied, tied="untie"), None),
        'tied="share"': (quantize_(shared, tied="share"), shared),
    }
    before = reports['tied="share"'][0].bytes_before
    table.add_row("float32", f"{before:,}", "100.0 %")
    for name, (report, model) in reports.items():
        alike = "" if model is None else "the same" if generate(model) == generate(unpack(model)) else "others"
        table.add_row(name, f"{report.bytes_after:,}", f"{report.bytes_after / before:.1%}".replace("%", " %"), alike)
    console = Console(width=100)
    console.print(table)
    with tempfile.TemporaryDirectory() as folder:
        shared.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        opened = load_checkpoint(transformers.GPT2LMHeadModel(CONFIG).eval(), file, tied="share")
        same = "the same" if generate(opened) == generate(shared) else "other"
        console.print(f"\nsaved in {file.stat().st_size:,} bytes; opened again, it generates {same} tokens")


if __name__ == "__main__":
    main()

"""embpack demo."""

import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import embpack
from embpack.cli import show
from embpack.convert import quantize_file
from embpack.formats.temporary import temporary_folder
from embpack.samples import make_checkpoint
from embpack.table import PackedTable
from embpack.table_names import says_embedding
from embpack.tables import cut_end


def demo() -> None:
    """Make a checkpoint of embedding tables that look trained, pack it, and read rows back; under a minute."""
    show.go_on_unread()  # and remove the folder
    # What a demo that was killed left there, the next one removes.
    with temporary_folder(Path(tempfile.gettempdir()), mode=0o700) as folder:
        src, dst = folder / "model.safetensors", folder / "model-4bit.safetensors"
        show.output.print("Making a checkpoint: heavy-tailed rows, norms by a power law ...", style="dim")
        tensors = make_checkpoint(np.random.default_rng(0))
        save_file(tensors, src)

        show.output.print()
        show.output.print("$ embpack quantize model.safetensors model-4bit.safetensors", style="bold cyan")
        totals = {name: len(weight) for name, weight in tensors.items() if says_embedding(name)}
        with show.row_progress(totals, shown=True) as progress:
            report = quantize_file(src, dst, progress=progress)
        show.print_report(dst.name, report)

        show.output.print()
        show.output.print('>>> tables = embpack.load("model-4bit.safetensors")', style="bold cyan")
        tables = embpack.load(dst, verify=True)
        _print_rows(tensors["user_embedding.weight"], tables["user_embedding.weight"])
        _print_bag(tensors["user_embedding.weight"], tables["user_embedding.weight"])
        _print_methods(tensors["user_embedding.weight"][:20000])


def _print_rows(weight: np.ndarray, table: PackedTable) -> None:
    show.output.print('>>> tables["user_embedding.weight"][[7, 42]]', style="bold cyan")
    indices = np.array([7, 42])
    columns = ["row", *(f"[{i}]" for i in range(5)), "cosine"]
    shown = show.start_table("", columns)
    for index, packed in zip(indices, table[indices], strict=True):
        original = weight[index]
        shown.add_row(f"{index}, trained", *(f"{value:.4f}" for value in original[:5]), "")
        shown.add_row(f"{index}, packed", *(f"{value:.4f}" for value in packed[:5]), f"{_cosine(original, packed):.5f}")
    show.output.print(shown)


def _print_bag(weight: np.ndarray, table: PackedTable) -> None:
    rng = np.random.default_rng(1)
    indices = rng.integers(0, len(weight), (1000, 20))
    pooled = table.embedding_bag(indices, mode="sum")
    cosine = _cosine(weight[indices].sum(axis=1).ravel(), pooled.ravel())
    show.output.print(f"1,000 bags of 20 rows, summed from packed bytes: cosine {cosine:.5f} to the trained table's")
    show.output.print()


def _print_methods(weight: np.ndarray) -> None:
    columns = ["method", "l2 loss", "what it does"]
    shown = show.start_table("The same rows by method", columns, left=columns[2:], cut="what it does", shorten=cut_end)
    for name, method in embpack.METHODS.items():
        shown.add_row(name, show.loss_text(embpack.quantize(weight, name).loss), method.summary)
    show.output.print(shown)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))

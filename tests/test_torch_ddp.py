"""DistributedDataParallel over packed models, in two processes that talk by gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import embpack
from embpack.torch import PackedEmbedding, PackedEmbeddingBag, leave_tables_out_of_ddp, load_checkpoint, quantize_

ROWS, DIM, STEPS = 20_000, 16, 3


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(ROWS, DIM)
        self.item_embedding = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.norm = nn.BatchNorm1d(2 * DIM)
        self.over = nn.Linear(2 * DIM, 1)

    def forward(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return self.over(self.norm(torch.cat([self.user_embedding(user), self.item_embedding(items)], dim=1)))


def count_copied(table: torch.Tensor) -> int:
    """How many kB of a mapped table this process has been given copies of, for they were written to."""
    start, copied, is_ours = table.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *values = line.split()
        if not field.endswith(":"):
            first, last = (int(address, 16) for address in field.split("-"))
            is_ours = first < start + table.nbytes and start < last
        elif is_ours and field == "Anonymous:":
            copied += int(values[0])
    return copied


def run_rank(rank: int, path: str, *, leave_out: bool) -> dict[str, object]:
    """What one of two processes does and sees."""
    torch.manual_seed(rank)
    model = load_checkpoint(Recommender(), path)
    model.own = PackedEmbedding.from_float(nn.Embedding(16, DIM), "asym")  # other rows in each process
    leave_tables_out_of_ddp(model)
    if not leave_out:
        del model._ddp_params_and_buffers_to_ignore
    tables = (model.user_embedding.packed, model.item_embedding.packed)
    before, pointers = model.own.packed.clone(), [buffer.data_ptr() for buffer in model.buffers()]
    wrapped = DistributedDataParallel(model)
    seen: dict[str, object] = {
        "copied at first": sum(map(count_copied, tables)),
        "weight": model.over.weight.sum().item(),
    }
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        found = wrapped(torch.arange(8) * 1000 + step, torch.arange(16).reshape(8, 2) + 100 * rank)
        found.square().sum().backward()
        optimizer.step()
    indices = torch.arange(0, ROWS, 997)
    wanted = embpack.load(path)["user_embedding.weight"][indices]
    return seen | {
        "sent": sorted(wrapped.named_module_buffers),
        "copied": sum(map(count_copied, tables)),
        "stays": pointers == [buffer.data_ptr() for buffer in model.buffers()],
        "rows": bool((model.user_embedding(indices).numpy() == wanted).all()),
        "own": torch.equal(model.own.packed, before),
        "trained": model.over.weight.sum().item(),
    }


def test_packed_buffers_stay_mapped_and_are_not_sent(tmp_path):
    path = tmp_path / "packed.safetensors"
    save_model(Recommender(), tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", path)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(path), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        found = [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    norm = ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    for left_out, sent in found:
        assert left_out["sent"] == norm and set(norm) < set(sent["sent"])
        assert left_out["copied at first"] == left_out["copied"] == 0 and left_out["own"]
        assert left_out["rows"] and left_out["stays"] and sent["rows"] and sent["stays"]
    for one, other in zip(*found, strict=True):
        assert one["weight"] == other["weight"] and one["trained"] == other["trained"] != one["weight"]
    # What this is about: the second process would have copies of all that it has mapped, and the first one's rows.
    (_, second) = found[1]
    assert second["copied at first"] * 1024 >= 2 * ROWS * DIM / 2 and not second["own"]


def ignored(model: nn.Module) -> set[str]:
    return set(model._ddp_params_and_buffers_to_ignore)


def test_quantize_and_load_checkpoint_leave_tables_out(tmp_path):
    names = {f"{table}_embedding.{buffer}" for table in ("user", "item") for buffer in ("packed", "row_format_ascii")}
    model = Recommender()
    model._ddp_params_and_buffers_to_ignore = ["norm.running_mean"]
    quantize_(model)
    assert names | {"norm.running_mean"} <= ignored(model)
    save_model(Recommender(), tmp_path / "float.safetensors")
    embpack.quantize_file(tmp_path / "float.safetensors", tmp_path / "packed.safetensors")
    assert names <= ignored(load_checkpoint(Recommender(), tmp_path / "packed.safetensors"))


def test_modules_made_by_hand_are_left_out_wherever_they_hang():
    bag = PackedEmbeddingBag(20, 4)
    model = nn.ModuleDict({"deep": nn.Sequential(nn.Sequential(bag)), "again": bag, "over": nn.Linear(4, 1)})
    leave_tables_out_of_ddp(model)
    assert {"deep.0.0.packed", "again.packed"} <= ignored(model)
    assert not any(name.startswith("over") for name in ignored(model))


if __name__ == "__main__":
    rank, path, meeting = int(sys.argv[1]), *sys.argv[2:]
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    print(json.dumps([run_rank(rank, path, leave_out=leave_out) for leave_out in (True, False)]))

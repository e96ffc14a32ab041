"""Four processes that save as PyTorch and TorchRec do: torch.distributed.checkpoint, and its Hugging Face writer.

    python -m tests.saving_processes FOLDER

The values are those of ``make_values``, which a test makes again.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORLD = 4
ROWS = 37
# The columns of TorchRec's tables; a grid has blocks of 128 columns.
DIM = 256
SHARDINGS = ("row", "column", "table", "grid", "table_row", "replicated")
# By name: shape, type, and along which dimension it is cut; a pair is cut along both.
TENSORS: dict[str, tuple[tuple[int, ...], str, int | tuple[int, int] | None]] = {
    "rows_embedding.weight": ((ROWS, 8), "float32", 0),
    "few_embedding.weight": ((5, 8), "float32", 0),  # the last process has none
    "columns_embedding.weight": ((ROWS, 16), "bfloat16", 1),
    "grid_embedding.weight": ((ROWS, 9), "float16", (0, 1)),
    "whole_embedding.weight": ((ROWS, 8), "float32", None),
    "turned_embedding.weight": ((ROWS, 8), "float32", None),  # its columns lie together
    "fp8_embedding.weight": ((ROWS, 8), "float8_e4m3fn", 0),
    "bias": ((ROWS,), "float32", 0),
    "conv.weight": ((10, 3, 2), "float32", 0),
    "cube.weight": ((10, 8, 2), "float32", 1),
    "deep.weight": ((6, 3, 8), "float32", (0, 2)),
    "square.weight": ((2, 4, 8), "float32", (1, 2)),
    "count": ((), "int64", None),
}


def make_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers, which all types have."""
    return np.random.default_rng(len(name)).integers(-8, 8, shape).astype(np.float32)


def _make_state(names: Iterator[str]) -> dict[str, object]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    line, square = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, WORLD // 2))
    state: dict[str, object] = {}
    for name in names:
        shape, dtype, cut = TENSORS[name]
        tensor = torch.from_numpy(make_values(name, shape))
        if name.startswith("turned"):
            tensor = tensor.t().contiguous().t()
        match cut:
            case None:
                pass
            case (one, other):
                tensor = distribute_tensor(tensor, square, [Shard(one), Shard(other)])
            case int():
                tensor = distribute_tensor(tensor, line, [Shard(cut)])
        state[name] = tensor.to(getattr(torch, dtype))
    return state


def _save(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    state = _make_state(iter(TENSORS))
    momenta = {f"{name}.exp_avg": value for name, value in state.items() if name.endswith(".weight")}
    dcp.save(
        {"model": state, "optimizer": {"state": momenta}, "step": 7, "settings": {"lr": 0.1}},
        checkpoint_id=folder / "dcp",
    )
    dcp.save({"model": state}, checkpoint_id=folder / "apart", use_collectives=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "threads", thread_count=2, single_file_per_rank=False))
    dcp.save(state, checkpoint_id=folder / "model.ckpt-7" / "model")
    dcp.save({"state": momenta}, checkpoint_id=folder / "model.ckpt-7" / "optimizer")
    # Hugging Face's files have no float8 here, and one piece of a name in a file.
    named = {name: value for name, value in state.items() if not name.startswith(("fp8", "turned"))}
    dcp.save(named, storage_writer=HuggingFaceStorageWriter(str(folder / "pieces"), save_distributed=True))
    del named["count"]  # PyTorch consolidates only floats
    dcp.save(
        named,
        storage_writer=HuggingFaceStorageWriter(
            str(folder / "consolidated"), save_distributed=True, enable_consolidation=True
        ),
    )
    whole = {name: torch.from_numpy(make_values(name, TENSORS[name][0])) for name in named}
    index = {name: 1 + number % 2 for number, name in enumerate(whole)}
    if dist.get_rank() == 0:  # so it wants whole tensors
        dcp.save(whole, storage_writer=HuggingFaceStorageWriter(str(folder / "indexed"), index), no_dist=True)


def _save_torchrec(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed import sharding_plan
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    device = torch.device("cpu")
    how = {
        "row": sharding_plan.row_wise(compute_kernel="fused"),
        "column": sharding_plan.column_wise(ranks=[0, 1, 1, 3], compute_kernel="fused"),
        "table": sharding_plan.table_wise(rank=1, compute_kernel="fused"),
        "grid": sharding_plan.grid_shard(host_indexes=[0, 1]),
        "table_row": sharding_plan.table_row_wise(host_index=1),
        "replicated": sharding_plan.data_parallel(),
    }
    configs = [EmbeddingBagConfig(num_embeddings=ROWS, embedding_dim=DIM, name=n, feature_names=[n]) for n in how]
    bags = EmbeddingBagCollection(configs, device=device)
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    # Two machines with two processes each.
    plan = sharding_plan.construct_module_sharding_plan(bags, how, sharder, WORLD // 2, WORLD, "cpu")
    for name in ("grid", "table_row"):
        plan[name].compute_kernel = "fused"
    model = DistributedModelParallel(
        torch.nn.ModuleDict({"ebc": bags, "over": torch.nn.Linear(4, 2)}),
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=ShardingPlan(plan={"ebc": plan}),
        sharders=[sharder],
    )
    state = model.state_dict()
    for name in how:
        _fill(state[f"ebc.embedding_bags.{name}.weight"], torch.from_numpy(make_values(name, (ROWS, DIM))))
    dcp.save({"model": state, "optimizer": model.fused_optimizer.state_dict()}, checkpoint_id=folder / "torchrec")


def _fill(tensor: object, values: object) -> None:
    """Give a tensor that is sharded, or replicated, its values; TorchRec sets others when it shards."""
    if not hasattr(tensor, "local_shards"):
        tensor.copy_(values)
        return
    for shard in tensor.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        shard.tensor.detach().copy_(values[row : row + rows, column : column + columns])


def _run(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    _save(folder)
    _save_torchrec(folder)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    import os

    import torch.multiprocessing

    with warnings.catch_warnings(action="ignore"):
        import torchrec  # noqa: F401 - once, not in each process
    os.environ["LOCAL_WORLD_SIZE"] = str(WORLD // 2)
    torch.multiprocessing.start_processes(_run, (Path(sys.argv[1]).absolute(),), WORLD, start_method="fork")


if __name__ == "__main__":
    main()

"""The peers: PEERS is the list of them."""

from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import TypeVar

from benchmarks.peers.base import Clustered, Clusterer, Lookup, Packed, Peer, Pooler, Quantizer, Restored

Entry = TypeVar("Entry")

# Modules of this package, each with a PEER.
PEERS = ("pytorch", "fbgemm", "kmeans1d", "ckwrap")
# Those that look rows up too: <name>_lookup has its POOLERS.
POOLING_PEERS = ("pytorch", "fbgemm")
# Those whose losses are compared: <name>_loss has its QUANTIZERS.
LOSS_PEERS = (
    *("pytorch", "fbgemm", "torchao", "bitsandbytes", "onnxruntime", "faiss"),
    *("gguf", "vllm", "mlx", "fp8", "exllamav3"),  # by formulas in NumPy: these need nothing
)


def load_peers() -> tuple[list[Peer | Clusterer], dict[str, str]]:
    """Return the peers that are installed, and of each other one why it is left out."""
    return _load(PEERS, "", lambda module: [module.PEER])


def load_poolers() -> tuple[list[Pooler], dict[str, str]]:
    """Return the ways to sum bags that are installed, and of each other library why it is left out."""
    return _load(POOLING_PEERS, "_lookup", lambda module: module.POOLERS)


def load_quantizers() -> tuple[list[Quantizer], dict[str, str]]:
    """Return the ways to quantize that are installed, and of each other library why it is left out."""
    return _load(LOSS_PEERS, "_loss", lambda module: module.QUANTIZERS)


def _load(
    names: Iterable[str], suffix: str, entries: Callable[[ModuleType], Iterable[Entry]]
) -> tuple[list[Entry], dict[str, str]]:
    found: list[Entry] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            found += entries(import_module(f"benchmarks.peers.{name}{suffix}"))
        except (ImportError, OSError) as error:  # OSError: its library does not load under this PyTorch.
            missing[name] = str(error).partition("\n")[0]
    return found, missing


__all__ = [
    "LOSS_PEERS",
    "PEERS",
    "POOLING_PEERS",
    "Clustered",
    "Clusterer",
    "Lookup",
    "Packed",
    "Peer",
    "Pooler",
    "Quantizer",
    "Restored",
    "load_peers",
    "load_poolers",
    "load_quantizers",
]

"""The peers: PEERS is the list of them."""

from importlib import import_module

from benchmarks.peers.base import Clustered, Clusterer, Lookup, Packed, Peer, Pooler

# Modules of this package, each with a PEER.
PEERS = ("pytorch", "fbgemm", "kmeans1d", "ckwrap")
# Those that look rows up too: <name>_lookup has its POOLERS.
POOLING_PEERS = ("pytorch", "fbgemm")


def load_peers() -> tuple[list[Peer | Clusterer], dict[str, str]]:
    """Return the peers that are installed, and of each other one why it is left out."""
    peers: list[Peer | Clusterer] = []
    missing: dict[str, str] = {}
    for name in PEERS:
        try:
            peers.append(import_module(f"benchmarks.peers.{name}").PEER)
        except (ImportError, OSError) as error:  # OSError: its library does not load under this PyTorch.
            missing[name] = str(error).partition("\n")[0]
    return peers, missing


def load_poolers() -> tuple[list[Pooler], dict[str, str]]:
    """Return the ways to sum bags that are installed, and of each other library why it is left out."""
    poolers: list[Pooler] = []
    missing: dict[str, str] = {}
    for name in POOLING_PEERS:
        try:
            poolers += import_module(f"benchmarks.peers.{name}_lookup").POOLERS
        except (ImportError, OSError) as error:  # OSError: its library does not load under this PyTorch.
            missing[name] = str(error).partition("\n")[0]
    return poolers, missing


__all__ = [
    "PEERS",
    "POOLING_PEERS",
    "Clustered",
    "Clusterer",
    "Lookup",
    "Packed",
    "Peer",
    "Pooler",
    "load_peers",
    "load_poolers",
]

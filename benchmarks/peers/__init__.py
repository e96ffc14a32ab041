"""The peers: PEERS is the list of them."""

from importlib import import_module

from benchmarks.peers.base import Clustered, Clusterer, Packed, Peer

# Modules of this package, each with a PEER.
PEERS = ("pytorch", "fbgemm", "kmeans1d", "ckwrap")


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


__all__ = ["PEERS", "Clustered", "Clusterer", "Packed", "Peer", "load_peers"]

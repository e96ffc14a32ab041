"""The races of python -m benchmarks.quantize: the tables, who packs them, which answers agree."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import embpack
from benchmarks.goals import ASYM_GOAL, THREADS, find_search_goal
from benchmarks.harness import Contestant, Workload
from benchmarks.peers import Clusterer, Packed, Peer
from benchmarks.peers.ours import Embpack
from embpack import _native

# Ours that race against PyTorch's greedy search.
SEARCHES = ("greedy", "optimal:effort=fast", "optimal")
THREADED_DIMS = (64, 128)
# The search is bound by arithmetic, so how large a table is does not matter to it; peers get fewer rows.
SEARCH_VALUES = 1 << 22
PEER_SEARCH_VALUES = 1 << 17
KMEANS_VALUES, PEER_KMEANS_VALUES = 1 << 18, 1 << 14
# Losses are measured and compared on that many values, which every contestant of a race packs.
LOSS_VALUES = PEER_SEARCH_VALUES

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Sizes:
    """The tables to race on.

    Attributes:
        dims: embedding_dim of each.
        asym_bytes: fp32 bytes of each table of the asym races: in cache, past it.
    """

    dims: Sequence[int]
    asym_bytes: Sequence[int]

    @property
    def most_values(self) -> int:
        """Values of the largest table."""
        return max(SEARCH_VALUES, *(table_bytes // 4 for table_bytes in self.asym_bytes))


def make_workloads(sizes: Sizes, libraries: Sequence[Peer | Clusterer]) -> Iterator[Workload[Any]]:
    """Make every race: asym, the searches, trellis and kmeans against the peers, then two threads against one.

    All tables are views of the same normal values, which is what Figure 1 of Guan et al. 2019 is drawn from.
    """
    values = np.random.default_rng(0).standard_normal(sizes.most_values, dtype=np.float32)
    peers = [library for library in libraries if isinstance(library, Peer)]
    clusterers = [library for library in libraries if isinstance(library, Clusterer)]
    for table_bytes in sizes.asym_bytes:
        for d in sizes.dims:
            yield _race_asym(_as_table(values, table_bytes // 4, d), peers)
    for method in SEARCHES:
        for d in sizes.dims:
            yield _race_search(_as_table(values, SEARCH_VALUES, d), method, peers)
    for d in sizes.dims:
        yield _race_trellis(_as_table(values, SEARCH_VALUES, d), peers)
    for d in sizes.dims:
        yield _race_kmeans(_as_table(values, KMEANS_VALUES, d), clusterers)
    for method in ("asym", "greedy"):
        for d in THREADED_DIMS:
            yield _race_threads(_as_table(values, SEARCH_VALUES, d), method)


def _as_table(values: Values, count: int, embedding_dim: int) -> Values:
    rows = count // embedding_dim
    return values[: rows * embedding_dim].reshape(rows, embedding_dim)


def _race_asym(weight: Values, peers: Sequence[Peer]) -> Workload[Packed]:
    others = [
        _contestant(peer, "asym", weight, goal=ASYM_GOAL if peer.name == "FBGEMM" else None)
        for peer in peers
        if "asym" in peer.methods
    ]
    return Workload(
        _settings("asym", weight),
        _contestant(Embpack(), "asym", weight),
        others,
        find_other_bytes,
        lambda packed: measure_loss(packed, weight),
    )


def _race_search(weight: Values, method: str, peers: Sequence[Peer]) -> Workload[Packed]:
    fewer = weight[: PEER_SEARCH_VALUES // weight.shape[1]]
    goal = find_search_goal(method, weight.shape[1])
    others = [_contestant(peer, "greedy", fewer, goal=goal) for peer in peers if "greedy" in peer.methods]
    return Workload(
        _settings(method, weight),
        _contestant(Embpack(), method, weight),
        others,
        lambda ours, theirs: find_worse_row(ours, theirs, weight),
        lambda packed: measure_loss(packed, weight),
    )


@dataclass(frozen=True)
class _Decodable:
    """An answer in rows of its own; ``levels`` makes of it what the values become, float64 [n, d]."""

    levels: Callable[[], NDArray[np.float64]]

    def row_errors(self, weight: Values) -> NDArray[np.float64]:
        levels = self.levels()
        errors: NDArray[np.float64] = np.square(levels - weight[: len(levels)]).sum(axis=1)
        return errors


def _race_trellis(weight: Values, peers: Sequence[Peer]) -> Workload[_Decodable]:
    """Trellis-coded rows, their codebook fitted, against the searches for uniform ones of as many bytes."""
    fewer = weight[: PEER_SEARCH_VALUES // weight.shape[1]]
    norm = float(np.square(fewer, dtype=np.float64).sum())

    def code() -> _Decodable:
        table = embpack.quantize(weight, "trellis")
        return _Decodable(lambda: table[np.arange(len(fewer))].astype(np.float64))

    def contestant(peer: Peer) -> Contestant[_Decodable]:
        call = peer.quantizer("greedy", fewer)

        def pack() -> _Decodable:
            packed = call()
            return _Decodable(lambda: _decode(packed, weight.shape[1]))

        return Contestant(peer.name, pack, len(fewer), lambda: peer.set_num_threads(1), peer.isa("greedy"))

    def measure(answer: _Decodable) -> float:
        return float(np.sqrt(answer.row_errors(weight).sum() / norm))

    def find_wrong(ours: _Decodable, theirs: _Decodable) -> str | None:
        our_loss, their_loss = measure(ours), measure(theirs)
        return None if our_loss < their_loss else f"the loss is {our_loss:.5f}, theirs {their_loss:.5f}"

    return Workload(
        _settings("trellis", weight),
        Contestant("embpack", code, len(weight), lambda: embpack.set_num_threads(1), _native.isa()),
        [contestant(peer) for peer in peers if "greedy" in peer.methods],
        find_wrong,
        measure,
    )


def _decode(packed: Packed, embedding_dim: int) -> NDArray[np.float64]:
    return embpack.PackedTable.from_packed(packed, embedding_dim).dequantize().astype(np.float64)


def _race_kmeans(weight: Values, clusterers: Sequence[Clusterer]) -> Workload[_Decodable]:
    fewer = weight[: PEER_KMEANS_VALUES // weight.shape[1]]

    def cluster_by_us() -> _Decodable:
        table = embpack.quantize(weight, "kmeans", param_dtype="float32")
        return _Decodable(lambda: table[np.arange(len(fewer))].astype(np.float64))

    def contestant(clusterer: Clusterer) -> Contestant[_Decodable]:
        call = clusterer.clusterer(fewer)

        def cluster() -> _Decodable:
            answer = call()
            return _Decodable(lambda: clusterer.levels(answer))

        return Contestant(clusterer.name, cluster, len(fewer), lambda: None, "portable")

    ours = Contestant("embpack", cluster_by_us, len(weight), lambda: embpack.set_num_threads(1), _native.isa())
    norm = float(np.square(fewer, dtype=np.float64).sum())
    return Workload(
        _settings("kmeans", weight),
        ours,
        [contestant(clusterer) for clusterer in clusterers],
        lambda ours, theirs: find_worse_clustering(ours.row_errors(weight), theirs.row_errors(weight), weight),
        lambda answer: float(np.sqrt(answer.row_errors(weight).sum() / norm)),
    )


def find_worse_clustering(ours: NDArray[np.float64], theirs: NDArray[np.float64], weight: Values) -> str | None:
    """Answers of k-means agree if no row of ours loses more; our centres are rounded to float32."""
    largest = np.abs(weight[: len(ours)]).max(axis=1).astype(np.float64)
    worse = np.flatnonzero(ours > theirs * (1 + 1e-12) + weight.shape[1] * (largest * 2.0**-24) ** 2)
    return f"{len(worse)} of {len(ours)} rows lose more, the first is row {worse[0]}" if len(worse) else None


def _race_threads(weight: Values, method: str) -> Workload[Packed]:
    """Two threads against one, and against two callers of one thread each: what the machine gives at most."""
    two = _contestant(Embpack(), method, weight, threads=2)
    others = [_contestant(Embpack(), method, weight, goal=THREADS), _two_callers(method, weight)]
    settings = _settings(method, weight) | {"threads": 2}
    return Workload(settings, two, others, find_other_bytes, lambda packed: measure_loss(packed, weight))


def _two_callers(method: str, weight: Values) -> Contestant[Packed]:
    """Both pack the whole table, wait for nothing but their own work, and share nothing but the memory."""
    pack = Embpack().quantizer(method, weight)
    callers = ThreadPoolExecutor(2)

    def call() -> Packed:
        first, second = (callers.submit(pack) for _ in range(2))
        second.result()
        return first.result()

    one = _contestant(Embpack(), method, weight)
    return replace(one, name="embpack, 2 callers", call=call, rows=2 * len(weight))


def _settings(method: str, weight: Values) -> dict[str, Any]:
    return {"method": method, "embedding_dim": weight.shape[1], "table_bytes": weight.nbytes, "threads": 1}


def _contestant(
    peer: Peer, method: str, weight: Values, *, threads: int = 1, goal: float | None = None
) -> Contestant[Packed]:
    name = peer.name if threads == 1 else f"{peer.name}, {threads} threads"
    call = peer.quantizer(method, weight)
    return Contestant(name, call, len(weight), lambda: peer.set_num_threads(threads), peer.isa(method), goal)


def measure_loss(packed: Packed, weight: Values) -> float:
    """Measure the normalized l2 loss ||X - Q(X)|| / ||X|| of the first rows, of LOSS_VALUES in all."""
    rows = min(len(packed), LOSS_VALUES // weight.shape[1])
    norm = np.square(weight[:rows], dtype=np.float64).sum()
    return float(np.sqrt(_row_losses(packed[:rows], weight).sum() / norm))


def _row_losses(packed: Packed, weight: Values) -> NDArray[np.float64]:
    """Squared error of each packed row."""
    table = embpack.PackedTable.from_packed(packed, weight.shape[1])
    errors = table.dequantize().astype(np.float64) - weight[: len(packed)]
    losses: NDArray[np.float64] = np.square(errors).sum(axis=1)
    return losses


def find_other_bytes(ours: Packed, theirs: Packed) -> str | None:
    """Answers of min/max agree if they are the same bytes."""
    if ours.shape != theirs.shape:
        return f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    rows = np.flatnonzero((ours != theirs).any(axis=1))
    return f"{len(rows)} of {len(ours)} rows, the first is row {rows[0]}" if len(rows) else None


def find_worse_row(ours: Packed, theirs: Packed, weight: Values) -> str | None:
    """Answers of a search agree if no row of ours loses more.

    A search compares float32 sums of d squares, which carry up to (d + 8) / 2 roundings each: losses that are
    closer than both together are the same to it.
    """
    if ours.shape[1] != theirs.shape[1]:
        return f"{ours.shape[1]} and {theirs.shape[1]} bytes a row"
    rows = min(len(ours), len(theirs), LOSS_VALUES // weight.shape[1])
    our_losses, their_losses = _row_losses(ours[:rows], weight), _row_losses(theirs[:rows], weight)
    worse = np.flatnonzero(our_losses > their_losses * (1 + (weight.shape[1] + 8) * 2.0**-24))
    return f"{len(worse)} of {rows} rows lose more, the first is row {worse[0]}" if len(worse) else None

"""What our rate by theirs should be. Goals are reported beside ratios, never enforced."""

from dataclasses import dataclass, field

from benchmarks.peers.base import Pooler


@dataclass(frozen=True)
class LookupGoals:
    """Goals of python -m benchmarks.lookup; None for none.

    Attributes:
        four_bits: by 4 bits of anybody, widths that are powers of two, in the cache.
        widths: the same for other widths.
        eight_bits: by PyTorch's 8 bits, from d = 64 on.
        fp32, narrow_fp32: by float32, from d = 64 on, and below.
        memory: by everybody, past the cache.
        bare_loop: by the bare loop, past the cache.
        layouts: of rows packed by a method, by uniform rows, in the cache.
        memory_layout: of trellis-coded rows by uniform ones, past the cache.
        group: many tables in one call.
        single_bag: one bag from Python, by PyTorch's operator.
        module: one bag through PackedEmbeddingBag, by nn.EmbeddingBag.
        threads: two threads by one.
    """

    four_bits: float | None = None
    widths: float | None = None
    eight_bits: float | None = None
    fp32: float | None = None
    narrow_fp32: float | None = None
    memory: float | None = None
    bare_loop: float | None = None
    layouts: dict[str, float] = field(default_factory=dict)
    memory_layout: float | None = None
    group: float | None = None
    single_bag: float | None = None
    module: float | None = None
    threads: float | None = None

    def by_pooler(self, peer: Pooler, embedding_dim: int) -> float | None:
        """Return the goal by a peer that looks up in the cache."""
        wide = embedding_dim >= 64
        if peer.bits == 8:
            return self.eight_bits if wide and peer.library == "PyTorch" else None
        return self.four_bits if peer.bits == 4 else self.fp32 if wide else self.narrow_fp32


# Two threads by one.
THREADS = 1.8
LAYOUTS = {"kmeans-lloyd": 0.8, "kmeans-cls:K=16": 0.8, "trellis": 0.45}
AVX2 = LookupGoals(
    four_bits=1.5,
    widths=1.3,
    eight_bits=1.0,
    fp32=1.0,
    narrow_fp32=0.85,
    memory=1.1,
    bare_loop=0.9,
    layouts=LAYOUTS,
    memory_layout=0.8,
    group=1.3,
    single_bag=1.5,
    module=0.9,
    threads=THREADS,
)
AVX512 = LookupGoals(
    four_bits=1.5,
    widths=1.3,
    fp32=1.0,
    narrow_fp32=1.0,
    memory=1.1,
    bare_loop=0.9,
    layouts=LAYOUTS,
    memory_layout=0.85,
    group=1.5,
    single_bag=1.0,
    threads=THREADS,
)
# By the instruction set of our kernels; the portable ones have no goals.
LOOKUP_GOALS = {"portable": LookupGoals(), "avx2": AVX2, "avx512": AVX512, "avx512_gfni": AVX512}

# Of packing: asym by FBGEMM's, the searches by PyTorch's greedy one at some widths, None for all.
ASYM_GOAL = 1.1
SEARCH_GOALS: dict[str, tuple[float, tuple[int, ...] | None]] = {"greedy": (40.0, (64, 128)), "optimal": (10.0, None)}

# Of products, by vectors a call.
LINEAR_GOALS = {1: 2.0, 64: 0.6}


def find_search_goal(method: str, embedding_dim: int) -> float | None:
    """Return the goal of a search, by PyTorch's greedy one."""
    goal, dims = SEARCH_GOALS.get(method, (None, None))
    return goal if dims is None or embedding_dim in dims else None

"""Rows that row quantizers get wrong, one of each kind, for the tests of kernels, methods and peers."""

from collections.abc import Callable

import numpy as np

MakeRow = Callable[[np.random.Generator, int, int], np.ndarray]


def _normal(scale: float) -> MakeRow:
    return lambda rng, d, bits: rng.standard_normal(d) * scale


def _constant(value: float) -> MakeRow:
    return lambda rng, d, bits: np.full(d, value)


def _near(centre: float, spacings: int) -> MakeRow:
    """A few float32 spacings wide, so that the steps of a search cannot move its ends."""
    spacing = float(np.spacing(np.float32(centre)))
    return lambda rng, d, bits: centre + spacing * rng.integers(0, spacings + 1, d)


def _ties(rng: np.random.Generator, d: int, bits: int) -> np.ndarray:
    """Every value but the ends half way between two codes, with scale 1 and bias 0."""
    top = 2**bits - 1
    row = rng.integers(0, top, d) + 0.5
    row[0] = 0
    row[-1] = top
    return row


def _on_the_grid(rng: np.random.Generator, d: int, bits: int) -> np.ndarray:
    """Every value a level of the grid with scale 1 and bias 0."""
    row = rng.integers(0, 2**bits, d)
    row[0] = 0
    row[-1] = 2**bits - 1
    return row


def _one_outlier(rng: np.random.Generator, d: int, bits: int) -> np.ndarray:
    row = rng.standard_normal(d)
    row[d // 2] = 100
    return row


KINDS: dict[str, MakeRow] = {
    **{f"normal x {scale:g}": _normal(scale) for scale in (1e-8, 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4)},
    "heavy tailed": lambda rng, d, bits: rng.standard_t(2, d),
    "one outlier": _one_outlier,
    "uniform": lambda rng, d, bits: rng.uniform(0, 1, d),
    "two values": lambda rng, d, bits: rng.choice([-1.0, 1.0], d),
    "zeros": _constant(0),
    "constant, exact in float16": _constant(2.5),
    "constant, float16 rounds it down": _constant(0.1),
    "constant, float16 rounds it up: negative scale": _constant(0.3),
    "below its float16 minimum: negative scale": _near(0.3, 4),
    "ties": _ties,
    "on the grid": _on_the_grid,
    "float16 subnormals": _normal(6e-8),
    "float32 subnormals": _normal(1e-40),
    "off centre": lambda rng, d, bits: 1000 + 0.01 * rng.standard_normal(d),
    "off centre, few spacings": _near(1000, 3),
    "negative, off centre": lambda rng, d, bits: -7 - rng.exponential(0.1, d),
}

# Beyond float16, and where float32 squares overflow or vanish.
FLOAT32_KINDS: dict[str, MakeRow] = {
    **{f"normal x {scale:g}": _normal(scale) for scale in (1e30, 1e15, 1e-15, 1e-21)},
    "constant, huge": _constant(3e37),
}


def hard_rows(embedding_dim: int, bits: int = 4, param_dtype: str = "float16") -> dict[str, np.ndarray]:
    """One row of each kind, float32 [embedding_dim], by the name of its kind; the same at each call."""
    kinds = KINDS | FLOAT32_KINDS if param_dtype == "float32" else KINDS
    rng = np.random.default_rng([embedding_dim, bits])
    # + 0 turns -0 into 0: the sign of a zero minimum is left open.
    return {kind: make(rng, embedding_dim, bits).astype(np.float32) + 0 for kind, make in kinds.items()}


def hard_table(embedding_dim: int, bits: int = 4, param_dtype: str = "float16") -> np.ndarray:
    """The rows of hard_rows as a table, float32 [N, embedding_dim]."""
    return np.stack(list(hard_rows(embedding_dim, bits, param_dtype).values()))

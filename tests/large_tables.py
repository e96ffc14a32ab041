"""Large tables as they are published, but small: their names, types and pieces, and what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from checkpoints import write_raw

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
}


class Stored(NamedTuple):
    """A tensor as a file has it."""

    dtype: str
    values: np.ndarray


@dataclass(frozen=True)
class Published:
    """A checkpoint.

    Attributes:
        tensors: all, by name.
        tables: what the large ones mean, by the names that they have together, float32.
        dtype: that they are unpacked to.
        stored_as: what they are stored as.
        pieces: of each.
    """

    tensors: dict[str, Stored]
    tables: dict[str, np.ndarray]
    dtype: str
    stored_as: str
    pieces: int = 1
    parts: set[str] = field(default_factory=set)


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> Path:
    """Write a safetensors file, of types too that its library may not know."""
    header, payload = {}, b""
    for name, (dtype, values) in tensors.items():
        own = np.ascontiguousarray(values).tobytes()
        offsets = [len(payload), len(payload) + len(own)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        payload += own
    write_raw(path, header, payload)
    return path


OTHERS = {
    "model.language_model.layers.1.mlp.gate_proj.weight": Stored(
        "BF16", np.random.default_rng(9).standard_normal((64, 96)).astype(DTYPES["BF16"])
    ),
    "model.language_model.norm.weight": Stored("F32", np.ones(64, np.float32)),
    # A layer in FP8, whose scale is of blocks of rows.
    "model.language_model.layers.1.mlp.down_proj.weight": Stored("F8_E4M3", np.ones((256, 256), DTYPES["F8_E4M3"])),
    "model.language_model.layers.1.mlp.down_proj.weight_scale_inv": Stored("F32", np.ones((2, 2), np.float32)),
}
_NGRAM = "model.language_model.layers.1.ple.ple_embedding."
_HASHES = {
    f"{_NGRAM}layer_multipliers": Stored("I64", np.array([23703573157769, 20109073645365, 8052911324071])),
    f"{_NGRAM}ngram_heads_offsets": Stored("I64", np.arange(16) * 200),
    f"{_NGRAM}ngram_heads_vocab_sizes": Stored("I64", np.full(16, 200)),
}
# 13 pieces, so that as text shard_10 comes before shard_2; the last is shorter.
_NUM_PIECES, _PIECE_ROWS, _LAST_ROWS = 13, 250, 175
_ROWS = (_NUM_PIECES - 1) * _PIECE_ROWS + _LAST_ROWS


def _draw(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, dim)) * rng.uniform(0.01, 0.05, (rows, 1))).astype(np.float32)


def _quantize(values: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Make codes; scales: float32, that broadcast."""
    scaled = values / scales
    return (np.clip(np.rint(scaled), -127, 127) if dtype == "I8" else scaled).astype(DTYPES[dtype])


def _cut(stem: str, dtype: str, values: np.ndarray, own: str = "weight") -> dict[str, Stored]:
    bounds = range(0, len(values), _PIECE_ROWS)
    # In the order of text, as writers sort names.
    names = sorted((f"{stem}.shard_{i}.{own}", start) for i, start in enumerate(bounds))
    return {name: Stored(dtype, values[start : start + _PIECE_ROWS]) for name, start in names}


def make_qwen_bf16() -> Published:
    values = _draw(_ROWS, 160).astype(DTYPES["BF16"])
    stem = f"{_NGRAM}ngram_embedding"
    pieces = _cut(stem, "BF16", values)
    tables = {f"{stem}.weight": values.astype(np.float32)}
    return Published({**_HASHES, **pieces, **OTHERS}, tables, "bfloat16", "bfloat16", _NUM_PIECES, set(pieces))


def make_qwen_fp8(scale_name: str = "weight_scale", shape: tuple[int, ...] = (1,)) -> Published:
    """One scale for all pieces."""
    scale = np.full(shape, 0.0006, DTYPES["BF16"])
    codes = _quantize(_draw(_ROWS, 160), scale.astype(np.float32).reshape(()), "F8_E4M3")
    stem = f"{_NGRAM}ngram_embedding"
    parts = {**_cut(stem, "F8_E4M3", codes), f"{stem}.{scale_name}": Stored("BF16", scale)}
    tables = {f"{stem}.weight": codes.astype(np.float32) * scale.astype(np.float32).reshape(())}
    return Published({**_HASHES, **parts, **OTHERS}, tables, "bfloat16", "F8_E4M3 x BF16", _NUM_PIECES, set(parts))


def make_qwen_by_rows(dtype: str, scale_dtype: str, *, is_flat: bool = False) -> Published:
    """A scale for each row, in a tensor for each piece."""
    values = _draw(_ROWS, 160)
    top = {"I8": 127, "F8_E4M3": 448, "F8_E5M2": 57344}[dtype]
    scales = (np.abs(values).max(axis=1, keepdims=True) / top).astype(DTYPES[scale_dtype])
    codes = _quantize(values, scales.astype(np.float32), dtype)
    stem = f"{_NGRAM}ngram_embedding"
    own_scales = scales.reshape(-1) if is_flat else scales
    parts = {**_cut(stem, dtype, codes), **_cut(stem, scale_dtype, own_scales, "weight_scale")}
    tables = {f"{stem}.weight": codes.astype(np.float32) * scales.astype(np.float32)}
    stored_as = f"{dtype} x {scale_dtype}"
    return Published({**_HASHES, **parts, **OTHERS}, tables, "bfloat16", stored_as, _NUM_PIECES, set(parts))


def make_qwen_by_pieces() -> Published:
    """A scale for each piece."""
    numbers = np.arange(_ROWS)[:, None] // _PIECE_ROWS
    scales = (0.0006 * (1 + numbers)).astype(np.float32)
    codes = _quantize(_draw(_ROWS, 160), scales, "F8_E4M3")
    stem = f"{_NGRAM}ngram_embedding"
    parts = _cut(stem, "F8_E4M3", codes)
    parts |= {f"{stem}.shard_{i}.scale": Stored("F32", scales[i * _PIECE_ROWS]) for i in range(_NUM_PIECES)}
    tables = {f"{stem}.weight": codes.astype(np.float32) * scales}
    return Published({**parts, **OTHERS}, tables, "bfloat16", "F8_E4M3 x F32", _NUM_PIECES, set(parts))


def make_qwen_by_rows_of_all(dtype: str = "I8") -> Published:
    """A scale for each row, in one tensor for all pieces."""
    whole = make_qwen_by_rows(dtype, "F32")
    stem = f"{_NGRAM}ngram_embedding"
    names = [f"{stem}.shard_{i}.weight_scale" for i in range(_NUM_PIECES)]
    scales = np.concatenate([whole.tensors[name].values for name in names])
    tensors = {name: each for name, each in whole.tensors.items() if name not in names}
    tensors[f"{stem}.weight_scale"] = Stored("F32", scales)
    parts = whole.parts - set(names) | {f"{stem}.weight_scale"}
    return Published(tensors, whole.tables, whole.dtype, whole.stored_as, _NUM_PIECES, parts)


def make_deepseek(own: str = "scale", prefix: str = "", scale_dtype: str = "F8_E8M0") -> Published:
    """A scale for each 32 values, a power of two."""
    tensors, tables, parts = dict(OTHERS), {}, set[str]()
    for number, rows in ((1, 1103), (14, 997)):
        values = _draw(rows, 256, number)
        blocks = values.reshape(rows, 8, 32)
        exponents = np.ceil(np.log2(np.abs(blocks).max(axis=2) / 448)).astype(np.int64) + 127
        scales = np.exp2((exponents - 127).astype(np.float32))
        codes = (blocks / scales[:, :, None]).astype(DTYPES["F8_E4M3"])
        stem = f"{prefix}layers.{number}.engram.embed"
        tensors[f"{stem}.weight"] = Stored("F8_E4M3", codes.reshape(rows, 256))
        tensors[f"{stem}.{own}"] = Stored(scale_dtype, exponents.astype(np.uint8))
        tables[f"{stem}.weight"] = (codes.astype(np.float32) * scales[:, :, None]).reshape(rows, 256)
        parts |= {f"{stem}.weight", f"{stem}.{own}"}
    return Published(tensors, tables, "bfloat16", "F8_E4M3 x F8_E8M0", 1, parts)


def _make_plain(names: Mapping[str, tuple[int, int]], others: Mapping[str, Stored], dtype: str = "BF16") -> Published:
    stored = {
        name: Stored(dtype, _draw(rows, dim, seed).astype(DTYPES[dtype]))
        for seed, (name, (rows, dim)) in enumerate(names.items())
    }
    tables = {name: each.values.astype(np.float32) for name, each in stored.items()}
    words = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    return Published({**stored, **others, **OTHERS}, tables, words, words, 1, set(stored))


def make_longcat() -> Published:
    names = {f"model.ngram_embeddings.embedders.{i}.weight": (780 + 2 * i + 1, 256) for i in range(12)}
    projections = {
        f"model.ngram_embeddings.post_projs.{i}.weight": Stored("BF16", np.ones((96, 256), DTYPES["BF16"]))
        for i in range(12)
    }
    return _make_plain({**names, "model.embed_tokens.weight": (500, 96)}, projections)


def make_gemma() -> Published:
    return _make_plain(
        {
            "model.language_model.embed_tokens_per_layer.weight": (600, 30 * 256),
            "model.language_model.embed_tokens.weight": (600, 128),
        },
        {"model.language_model.per_layer_model_projection.weight": Stored("BF16", np.ones((512, 128), DTYPES["BF16"]))},
    )


def make_torchrec() -> Published:
    return _make_plain(
        {
            "model.sparse.ebc.embedding_bags.t_user.weight": (1000, 64),
            "model.sparse.ec.embeddings.t_item.weight": (2000, 64),
        },
        {},
        "F32",
    )


MODELS = {
    "Qwen3.8, BF16": make_qwen_bf16,
    "Qwen3.8, FP8 with one scale": make_qwen_fp8,
    "Qwen3.8, FP8 with one scale, 0-d": lambda: make_qwen_fp8("scale", ()),
    "Qwen3.8, FP8 with one scale, 2-D": lambda: make_qwen_fp8("weight_scale_inv", (1, 1)),
    "Qwen3.8, FP8 by rows": lambda: make_qwen_by_rows("F8_E4M3", "F32"),
    "Qwen3.8, FP8 by rows, BF16": lambda: make_qwen_by_rows("F8_E4M3", "BF16", is_flat=True),
    "Qwen3.8, FP8 by pieces": make_qwen_by_pieces,
    "Qwen3.8, INT8 by rows of all": make_qwen_by_rows_of_all,
    "Qwen3.8, E5M2 by rows": lambda: make_qwen_by_rows("F8_E5M2", "F16"),
    "Qwen3.8, INT8 by rows": lambda: make_qwen_by_rows("I8", "BF16"),
    "DeepSeek-V4.1": make_deepseek,
    "DeepSeek-V4.1, U8": lambda: make_deepseek(scale_dtype="U8"),
    "DeepSeek-V4.1, copied": lambda: make_deepseek("weight_scale_inv", "model.", "U8"),
    "LongCat": make_longcat,
    "Gemma 4": make_gemma,
    "TorchRec": make_torchrec,
}

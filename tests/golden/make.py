"""Golden files: packed by an earlier embpack, with what it read from them. test_golden.py holds today's against them.

    python -m tests.golden.make

writes those of list_cases that are not there yet, and changes none that is. Add a case for whatever comes new to the
format; leave the old ones, for users have files like them. Of each case there are

- packed/NAME.safetensors, or a folder of shards: what quantize_file wrote, in the format's version of that time;
- expected/NAME.safetensors: of each table the weights, all values, and pooled bags;
- an entry of manifest.json: how it was packed, what it lost, and by version of the format the digests of what save and
  quantize_file write of it. A version that is no longer written is held by its files alone; for a new
  one, the command adds digests to all cases.

BY_HAND are files as another program may write them, of a case's bytes. pieces/LAYOUT is a folder with a table in
pieces, in version 3, and pieces.json has digests of its files and values.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import embpack
from embpack.files import FORMAT_VERSION, PIECE_ROWS
from embpack.layouts import LAYOUTS
from embpack.packed_folder import MANIFEST_NAME, name_plain

FOLDER = Path(__file__).parent
PACKED, EXPECTED, MANIFEST = FOLDER / "packed", FOLDER / "expected", FOLDER / "manifest.json"
PIECES, PIECES_MANIFEST = FOLDER / "pieces", FOLDER / "pieces.json"

DIMS, DTYPES, ROTATIONS = (64, 5, 130, 16, 40), ("float32", "bfloat16", "float16"), (None, "hadamard")
ROWS = 20
# Three bags and an empty one; one of them is as long as kernels that look several rows up at once have it.
INDICES = [3, 0, 3, 19, *range(18, -1, -1), 7]
OFFSETS = [0, 3, 3, 22]
# What an entry of the manifest says of how its tables were packed.
HOW = ("method", "bits", "param_dtype", "rotation")
POOLED = {"sum": "sum", "mean": "mean", "max": "max", "weighted": "sum"}
# By name: the version of the format.
BY_HAND, BY_HAND_OF = {"by-hand": 1, "by-hand-version2": 2}, "uniform-optimal-4bits-float16-d64"


@dataclass(frozen=True)
class Case:
    """Tables of one file and how they are packed. Several tables: a shard for each.

    Attributes:
        name: of the files.
        weights: "rows", "clusters" or "lattice" (make_weights).
        method, bits, param_dtype, rotation: as for quantize.
        dims, dtype: of the tables.
    """

    name: str
    weights: str
    method: str
    bits: float
    param_dtype: str | None
    rotation: str | None
    dims: tuple[int, ...]
    dtype: str


def make_weights(kind: str, dim: int, dtype: str) -> torch.Tensor:
    """Weights of a kind, [N, dim].

    rows: of different norms; the first three each of one value, by which scales become 1, subnormal and negative.
    clusters: around three points. lattice: one near each of 272 points of a lattice, which are as far apart. From these
    two, clusters come out the same whatever the order is in which distances are summed (check_clusters).
    """
    rng = np.random.default_rng(0)
    if kind == "rows":
        weights = rng.standard_normal((ROWS, dim)) * rng.lognormal(-1, 0.5, (ROWS, 1))
        weights[:3] = np.array([[0], [0.1], [0.3]])
    elif kind == "clusters":
        weights = 2 * rng.standard_normal((3, dim))[np.arange(ROWS) % 3] + 0.1 * rng.standard_normal((ROWS, dim))
    else:
        points = np.arange(272)[:, None] // 4 ** np.arange(dim).clip(max=15) % 4
        weights = points + 0.3 * rng.standard_normal(points.shape)
    return torch.from_numpy(weights).to(getattr(torch, dtype))


def list_cases() -> list[Case]:
    """Every layout, bits, parameters and rotation with each other; each dim and dtype with each layout somewhere."""
    cases: list[Case] = []

    def add(weights: str, layout: str, methods: Any, axes: Any, dims: tuple[int, ...] = DIMS) -> None:
        of_case = zip(axes, cycle(methods), cycle(dims), cycle(DTYPES), strict=False)
        for (bits, params, rotation), method, dim, dtype in of_case:
            parts = (layout, method, f"{bits}bits", params, rotation, f"d{dim}")
            name = "-".join(dict.fromkeys(part for part in parts if part)).replace(":", "-").replace("=", "")
            cases.append(Case(name, weights, method, bits, params, rotation, (dim,), dtype))

    axes = list(product((4, 8, 2), ("float16", "float32"), ROTATIONS))
    uniform = [name for name, method in embpack.METHODS.items() if method.layout == "uniform"]
    uniform += ["optimal:effort=exact", "optimal:effort=fast"]
    add("rows", "uniform", ["optimal"], axes)
    add("rows", "uniform", uniform, [axes[i % 4] for i in range(len(uniform))])
    add("rows", "codebook", ("kmeans", "kmeans-lloyd"), axes)
    add("clusters", "clustered", ("kmeans-cls:K=3", "kmeans-cls"), axes)
    add("lattice", "clustered16", ("kmeans-cls:K=260",), [axes[0], axes[3], axes[9], axes[10]], (5, 16))
    add("rows", "trellis", ("trellis",), product((4, 2, 3, 3.5, 5, 6, 7), (None,), ROTATIONS))
    cases.append(Case("sharded", "rows", "optimal", 4, None, None, (16, 40), "float32"))
    # All cases from here on were first written in version 2 of the format.
    cases += [
        Case("version2-uniform", "rows", "optimal", 4, None, None, (64,), "float32"),
        Case("version2-codebook-hadamard", "rows", "kmeans", 4, None, "hadamard", (16,), "bfloat16"),
        Case("version2-clustered", "clusters", "kmeans-cls:K=3", 4, None, None, (40,), "float16"),
        Case("version2-trellis-hadamard", "rows", "trellis", 3.5, None, "hadamard", (130,), "float32"),
        Case("version2-sharded", "rows", "optimal", 4, None, None, (16, 40), "float32"),
    ]
    return list({case.name: case for case in cases}.values())


def pack(
    folder: Path, tables: dict[str, torch.Tensor], method: str, bits: float, param_dtype: Any, rotation: Any
) -> Path:
    """Write tables as a checkpoint into a folder and pack it there by quantize_file, beside a tensor that is none."""
    if len(tables) == 1:
        src, dst = folder / "model.safetensors", folder / "packed.safetensors"
        save_file({**tables, "bias": torch.arange(3.0)}, src, metadata={"format": "pt"})
    else:
        src, dst = folder / "model", folder / "packed"
        src.mkdir()
        weight_map = {name: f"model-{i:05}-of-{len(tables):05}.safetensors" for i, name in enumerate(tables, start=1)}
        for name, file_name in weight_map.items():
            save_file({name: tables[name]}, src / file_name, metadata={"format": "pt"})
        (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    how = {"method": method, "bits": bits, "param_dtype": param_dtype, "rotate": rotation}
    embpack.quantize_file(src, dst, include=[*tables], **how)
    return dst


def list_files(path: Path) -> list[Path]:
    """A file, or the files of a folder but for their list, which the first folders did not have."""
    return sorted(file for file in path.iterdir() if file.name != MANIFEST_NAME) if path.is_dir() else [path]


def read_tree(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of each file of a folder, by the names that they have in a plain one."""
    return {name_plain(file.name) if path.is_dir() else "": file.read_bytes() for file in list_files(path)}


def pool(table: embpack.PackedTable, how: str) -> np.ndarray:
    """Pool the bags of every case; by "weighted" their sums, each row times another power of two or so."""
    indices, offsets = np.array(INDICES), np.array(OFFSETS)
    weights = np.linspace(-1, 2, len(indices), dtype=np.float32) if how == "weighted" else None
    return table.embedding_bag(indices, offsets, POOLED[how], weights)


def digest_files(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of all files of a folder."""
    digest = hashlib.sha256()
    for name, content in read_tree(path).items():
        digest.update(name.encode() + content)
    return digest.hexdigest()


def digest_of_saved(folder: Path, tables: dict[str, embpack.PackedTable]) -> str:
    """SHA-256 of the file that save makes of tables."""
    embpack.save(folder / "saved.safetensors", tables)
    return digest_files(folder / "saved.safetensors")


def digest_case(
    weights: dict[str, torch.Tensor], *, method: str, bits: float, param_dtype: str | None, rotation: str | None
) -> dict[str, str]:
    """Digests of what save and quantize_file write of a case's weights."""
    tables = {
        name: embpack.quantize(weight, method, bits=bits, param_dtype=param_dtype, rotate=rotation)
        for name, weight in weights.items()
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = pack(folder, weights, method, bits, param_dtype, rotation)
        return {"saved": digest_of_saved(folder, tables), "packed": digest_files(packed)}


def check_clusters(weights: torch.Tensor, table: embpack.PackedTable, how: dict[str, Any]) -> None:
    """Fail if weights that differ a little from these give other clusters: then rounding would, too."""
    rng = np.random.default_rng(0)
    noise = 1e-4 * torch.from_numpy(rng.standard_normal(weights.shape))
    for near in (weights.double() + noise, weights.double() - noise):
        clusters = embpack.quantize(near.float(), **how).clusters
        assert table.clusters is None or np.array_equal(clusters, table.clusters), f"clusters of {how} hang by a thread"


def weights_of(case: Case) -> dict[str, torch.Tensor]:
    """A case's tables before they are packed."""
    names = ["embedding.weight", "second_embedding.weight"]
    return {name: make_weights(case.weights, dim, case.dtype) for name, dim in zip(names, case.dims, strict=False)}


def make(case: Case) -> dict[str, Any]:
    """Write the files of a case; returns its entry of the manifest."""
    weights = weights_of(case)
    how = {"method": case.method, "bits": case.bits, "param_dtype": case.param_dtype, "rotate": case.rotation}
    expected: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as name:
        packed = pack(Path(name), weights, case.method, case.bits, case.param_dtype, case.rotation)
        packed.rename(PACKED / (case.name + packed.suffix))
    tables = embpack.load(PACKED / (case.name + packed.suffix), verify=True)
    for name, table in tables.items():
        check_clusters(weights[name], table, how)
        read = {"values": table.dequantize(), **{how: pool(table, how) for how in POOLED}}
        arrays = {"weight": weights[name], **{what: torch.from_numpy(array) for what, array in read.items()}}
        expected |= {f"{name}/{what}": array for what, array in arrays.items()}
    save_file(expected, EXPECTED / f"{case.name}.safetensors")
    entries = {
        name: {"row_format": str(table.row_format), "spec": table.method, "dtype": table.dtype, "loss": table.loss}
        for name, table in tables.items()
    }
    described = {key: value for key, value in asdict(case).items() if key in HOW}
    return {"file": case.name + packed.suffix, **described, "digests": {}, "tables": entries}


def write_by_hand(name: str, version: int, like: dict[str, Any]) -> dict[str, Any]:
    """Write the table of a case with nothing in its metadata that a reader could do without; returns its entry."""
    [(table, entry)] = like["tables"].items()
    packed = embpack.load(PACKED / like["file"])[table].packed
    layout, dim, bits, param_dtype = entry["row_format"].split(":")
    described = {
        "checksum": f"sha256:{hashlib.sha256(packed).hexdigest()}", "loss": None, "method": "", "dtype": "float32",
        "embedding_dim": int(dim), "num_embeddings": len(packed), "param_dtype": param_dtype, "bits": int(bits),
        "layout": layout,
    }  # fmt: skip
    value: dict[str, Any] = {"tables": {table: described}, "version": version}
    if version > 1:
        value["others"] = {}
        covered = {**value, "tensors": {table: ["U8", packed.shape]}}
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
        value["checksum"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    tensor = {"data_offsets": [0, packed.nbytes], "shape": packed.shape, "dtype": "U8"}
    header = json.dumps({table: tensor, "__metadata__": {"embpack": json.dumps(value)}}).encode()
    (PACKED / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + packed.tobytes())
    return {"file": f"{name}.safetensors", "tables": {table: {**entry, "spec": "", "loss": None}}}


def pack_pieces(folder: Path, layout: str) -> Path:
    """Write a table of two pieces around three points into a folder, pack it there in a layout, and return where."""
    methods = {"uniform": "greedy", "codebook": "kmeans", "clustered": "kmeans-cls:K=3", "trellis": "trellis"}
    rng = np.random.default_rng(0)
    centres, rows = 2 * rng.standard_normal((3, 4)), PIECE_ROWS + 9
    weights = centres[np.arange(rows) % 3] + 0.1 * rng.standard_normal((rows, 4))
    save_file({"embedding.weight": torch.from_numpy(weights).float()}, folder / "model.safetensors")
    src, dst = folder / "model.safetensors", folder / layout
    embpack.quantize_file(src, dst, method=methods[layout], bits=2, include=["*"], max_shard_size=1)
    return dst


def digest_pieces(path: Path) -> dict[str, str]:
    """Digests of a folder's files, and of the values that are read from it."""
    [table] = embpack.load(path, verify=True).values()
    return {"files": digest_files(path), "values": hashlib.sha256(table.dequantize()).hexdigest()}


def main() -> None:
    PACKED.mkdir(exist_ok=True)
    EXPECTED.mkdir(exist_ok=True)
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    for case in list_cases():
        if case.name not in manifest:
            manifest[case.name] = make(case)
            print(case.name)
        entry = manifest[case.name]
        if str(FORMAT_VERSION) not in entry["digests"]:
            how = {key: entry[key] for key in HOW}
            entry["digests"][str(FORMAT_VERSION)] = digest_case(weights_of(case), **how)
    for name, version in BY_HAND.items():
        if name not in manifest:
            manifest[name] = write_by_hand(name, version, manifest[BY_HAND_OF])
            shutil.copy(EXPECTED / f"{BY_HAND_OF}.safetensors", EXPECTED / f"{name}.safetensors")
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")
    pieces = json.loads(PIECES_MANIFEST.read_text()) if PIECES_MANIFEST.exists() else {}
    for layout in LAYOUTS:
        if layout not in pieces:
            with tempfile.TemporaryDirectory() as name:
                shutil.copytree(pack_pieces(Path(name), layout), PIECES / layout)
            pieces[layout] = digest_pieces(PIECES / layout)
    PIECES_MANIFEST.write_text(json.dumps(pieces, indent=1) + "\n")


if __name__ == "__main__":
    main()

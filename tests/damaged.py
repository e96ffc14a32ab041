"""Files that are not what they should be: each function writes one into a folder and returns its path."""

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from gguf import GGMLQuantizationType, GGUFWriter


def safetensors_bytes(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def f32_entry(shape: list[int], start: int = 0) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * int(np.prod(shape))]}


def _write(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def _npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return file.getvalue()


def _torch_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Evil:
    """Its pickle would create a file if it were run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.witness,)


def write_gguf(path: Path, tensors: dict[str, np.ndarray | tuple[np.ndarray, GGMLQuantizationType]]) -> None:
    """Write plain arrays, and bytes of blocks with their type."""
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["a", "bc"])
    writer.add_float64("float", 0.5)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_tensor(name: bytes, ne: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """What a header says of a tensor."""
    return _gguf_text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def gguf_key(name: bytes, kind: int, value: bytes) -> bytes:
    return _gguf_text(name) + struct.pack("<I", kind) + value


def gguf_bytes(
    *tensors: bytes,
    keys: tuple[bytes, ...] = (),
    payload: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    header = (
        b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join((*keys, *tensors))
    )
    return header + bytes(-len(header) % 32) + payload


def _safetensors_twice() -> bytes:
    entry = json.dumps(f32_entry([1]))
    return safetensors_bytes(f'{{"a":{entry},"a":{entry}}}'.encode(), b"\0" * 4)


def _corrupt_npz() -> bytes:
    raw = bytearray(_npz_bytes({"a.npy": _npy_bytes(np.arange(1000.0))}))
    raw[2000] ^= 0xFF
    return bytes(raw)


def _deflated_npz() -> bytes:
    noise = np.random.default_rng(0).normal(size=1000)
    raw = bytearray(_npz_bytes({"a.npy": _npy_bytes(noise)}, zipfile.ZIP_DEFLATED))
    raw[3000:3100] = b"\xff" * 100
    return bytes(raw)


def _corrupt_parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": np.random.default_rng(0).normal(size=10000)}), file, use_dictionary=False)
    raw = bytearray(file.getvalue())
    raw[4:1000] = b"\xff" * 996
    return bytes(raw)


_STATE = {"a": torch.arange(1000.0)}


def _truncated_zip() -> bytes:
    return _torch_bytes({"a": torch.zeros(1000)})[:2000]


def _old_torch_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _zipped_torch(compression: int = zipfile.ZIP_STORED, **members: bytes | None) -> bytes:
    """A file of torch.save as a zip tool packs it, with some of its members replaced, or removed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_torch_bytes(_STATE))) as saved, zipfile.ZipFile(file, "w", compression) as archive:
        kept = {name.removeprefix("archive/"): saved.read(name) for name in saved.namelist()}
        for name, raw in (kept | members).items():
            if raw is not None:
                archive.writestr(f"archive/{name}", raw)
    return file.getvalue()


def _twice_in_zip() -> bytes:
    file = io.BytesIO(_zipped_torch())
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("archive/data/0", b"")
    return file.getvalue()


def _corrupt(raw: bytes, found: bytes, instead: bytes) -> bytes:
    assert found in raw
    assert len(found) == len(instead)
    return raw.replace(found, instead)


class _Script(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


def _script_bytes() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(_Script()), file)
    return file.getvalue()


def _tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return file.getvalue()


class _View:
    """Pickled as a tensor that is a view of the only storage of _STATE."""

    def __init__(self, offset: int, shape: tuple[int, ...]) -> None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        self.arguments = (self, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    """The first time that it meets a view it pickles that, the second time its storage."""

    seen = False

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _View):
            return None
        again, self.seen = self.seen, True
        return ("storage", torch.FloatStorage, "0", "cpu", 1000) if again else None


def _pickle_of_view(offset: int, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 2).dump({"a": _View(offset, shape)})
    return file.getvalue()


def _expanded_bytes() -> bytes:
    return _torch_bytes({"a": torch.zeros(1).expand(1 << 30, 1 << 10), "b": torch.zeros(3)})


_TWO = f32_entry([2])
_NPY = _npy_bytes(np.arange(6, dtype=np.float32))
_GGUF = gguf_tensor(b"a", [3, 2])

# Name of the file, its bytes, and what the FormatError says.
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.safetensors", b"", "the file is empty, 0 bytes; copy it again"),
    "safetensors-tiny": ("a.safetensors", b"abc", "the file has 3 bytes, a safetensors file at least 8"),
    "safetensors-garbage": (
        "a.safetensors",
        b"x" * 100,
        "92 bytes are left for a header of 8680820740569200760; the file is truncated or not a safetensors",
    ),
    "safetensors-truncated": (
        "a.safetensors",
        safetensors_bytes({"a": f32_entry([40, 40])}, b"\0" * 4096),
        "payload is 4096 bytes, header promises 6400; the file is truncated, copy it again",
    ),
    "safetensors-longer": (
        "a.safetensors",
        safetensors_bytes({"a": _TWO}, b"\0" * 12),
        "payload is 12 bytes, header promises 8; the file is damaged, copy it again",
    ),
    "safetensors-hole": (
        "a.safetensors",
        safetensors_bytes({"a": f32_entry([2], start=4)}, b"\0" * 12),
        "tensor 'a' begins at byte 4 of the payload, but what is before it ends at 0",
    ),
    "safetensors-not-json": (
        "a.safetensors",
        safetensors_bytes(b"{'a': 1}", b""),
        "not valid JSON: Expecting property name",
    ),
    "safetensors-twice": ("a.safetensors", _safetensors_twice(), "'a' is there twice"),
    "torch-garbage": ("a.pt", b"neither zip nor pickle", "not a file of torch.save, or damaged: at position 0, opcode"),
    "torch-truncated": (
        "a.pt",
        _truncated_zip(),
        r"begins as a zip file, but its directory cannot be read \(File is not a zip file\); copy it again",
    ),
    "torch-deflated": (
        "a.pt",
        _zipped_torch(zipfile.ZIP_DEFLATED),
        r"data.pkl in it was compressed, which torch.save never does; write it again with torch.save\(torch.load\("
        r"path, weights_only=True\), path\)",
    ),
    "torch-twice": ("a.pt", _twice_in_zip(), "'data/0' is in it twice, and which one is meant cannot be told"),
    "torch-no-pickle": ("a.pt", _zipped_torch(**{"data.pkl": None}), "not one of torch.save: it has no data.pkl"),
    "torch-no-storage": ("a.pt", _zipped_torch(**{"data/0": None}), "it has no data/0, where values of"),
    "torch-short-storage": (
        "a.pt",
        _zipped_torch(**{"data/0": b"x" * 3999}),
        "data/0 has 3999 bytes, its pickle promises 4000; the file is damaged",
    ),
    "torch-long-storage": (
        "a.pt",
        _zipped_torch(**{"data/0": b"x" * 4001}),
        "data/0 has 4001 bytes, its pickle promises",
    ),
    "torch-byte-order": ("a.pt", _zipped_torch(byteorder=b"pdp-11"), "its byte order is b'pdp-11', not little or big"),
    "torch-checksum": (
        "a.pt",
        _corrupt(_torch_bytes(_STATE), np.float32(999).tobytes(), b"\0\0\0\0"),
        "the 4000 bytes from .* on do not agree with their checksum; the file is damaged, copy it again",
    ),
    "torch-pickle-checksum": (
        "a.pt",
        _corrupt(_torch_bytes(_STATE), b"FloatStorage", b"IntStorageXX"),
        "the bytes of data.pkl do not agree with its checksum",
    ),
    "torch-local-header": (
        "a.pt",
        b"PK" + _corrupt(_zipped_torch()[2:], b"PK\x03\x04", b"PK\x03\x05"),
        "is not where its directory says; the file is damaged",
    ),
    "torch-script": (
        "a.pt",
        _script_bytes(),
        "holds a TorchScript module, not a state dict; open it with torch.jit.load",
    ),
    "torch-tar": (
        "a.pt",
        _tar_bytes(),
        "a tar file, as PyTorch wrote before 0.1.10; save it again with a later PyTorch",
    ),
    "torch-old-truncated": (
        "a.pt",
        _old_torch_bytes(_STATE)[:-1],
        "the 4000 bytes of storage .* are not all there; it is truncated or damaged",
    ),
    "torch-old-cut": ("a.pt", _old_torch_bytes(_STATE)[:200], "not a file of torch.save, or damaged: "),
    "torch-out-of-storage": (
        "a.pt",
        _zipped_torch(**{"data.pkl": _pickle_of_view(500, (100, 6))}),
        r"tensor 'a' of shape \[100, 6\] and strides \[6, 1\] ends at byte 4400 of 4000; the file is damaged",
    ),
    "torch-expanded": (
        "a.pt",
        _expanded_bytes(),
        r"its tensors take 4398046511116 bytes, over 100 times the \d+ of the file; 'a' of shape \[1073741824, 1024\] "
        r"takes 4398046511104, but has 4 in the file; save the .contiguous\(\) of what was expanded",
    ),
    "torch-tensor": (
        "a.pt",
        _torch_bytes(torch.zeros(3, 2)),
        r"holds a tensor of shape \[3, 2\], not a dict of tensors by name; save the weights alone",
    ),
    "torch-list": ("a.pt", _torch_bytes([torch.zeros(2)]), "holds a list, not a dict of tensors by name"),
    "torch-numbers": (
        "a.pt",
        _torch_bytes({"epoch": 3, "model": {"lr": 0.1}}),
        "holds a dict with no tensors, but 'epoch' \\(int\\), 'model' \\(dict\\); save the weights alone",
    ),
    "torch-two-models": (
        "a.pt",
        _torch_bytes({"model": {"a": torch.zeros(2)}, "state_dict": {"a": torch.zeros(2)}}),
        r"holds dicts of tensors under 'model' and 'state_dict'; save the one that is meant by itself: "
        r"torch.save\(torch.load\(path, weights_only=True\)\['model'\], 'weights.pt'\)",
    ),
    "torch-number-as-name": (
        "a.pt",
        _torch_bytes({7: torch.zeros(2)}),
        "the name of a tensor is 7, not a string; rename it and save again",
    ),
    "torch-module": (
        "a.pt",
        _torch_bytes(torch.nn.Linear(2, 2)),
        "holds a torch.nn.modules.linear.Linear object, not a dict of tensors by name; only a pickle makes such "
        "objects, and pickles are never run; where their classes are installed, save the weights alone",
    ),
    "torch-legacy-pickle": ("a.pt", pickle.dumps({"a": print}), "a pickle, but not one of torch.save"),
    "dcp-garbage": (
        ".metadata",
        b"x" * 100,
        "not metadata of torch.distributed.checkpoint, or damaged: at position 0, opcode .* unknown; copy it again",
    ),
    "dcp-other": (
        ".metadata",
        pickle.dumps({"a": 1}),
        "holds a dict, not metadata of torch.distributed.checkpoint; it is never run",
    ),
    "npy-garbage": ("a.npy", b"x" * 100, "not an .npy file, or damaged: the magic string is not correct"),
    "npy-truncated": (
        "a.npy",
        _NPY[:-4],
        "payload is 20 bytes, header promises 24; it is truncated",
    ),
    "npy-two-arrays": ("a.npy", _NPY * 2, "payload is 176 bytes, header promises 24; is it several arrays"),
    "npy-header-cut": ("a.npy", _NPY[:50], "not an .npy file, or damaged: EOF: reading array header"),
    "npy-negative": (
        "a.npy",
        _NPY.replace(b"(6,), } ", b"(-6,), }"),
        r"the header has shape \[-6\]; the file is damaged",
    ),
    "npy-objects": (
        "a.npy",
        _npy_bytes(np.array([{}], object)),
        "the array is of Python objects, which take a pickle to read, and pickles are never run",
    ),
    "npy-structured": (
        "a.npy",
        _npy_bytes(np.zeros(2, [("x", "f4"), ("y", "f4")])),
        r"the array is of type \[\('x', '<f4'\), \('y', '<f4'\)\]; only arrays of numbers are read",
    ),
    "npy-raw": ("a.npy", _npy_bytes(np.zeros(2, "V2")), "raw bytes, of which only bfloat16 is read; save it as"),
    "npy-version-3": (
        "a.npy",
        b"\x93NUMPY\x03\x00" + b"\0" * 20,
        ".npy version 3.0 holds no plain array of numbers",
    ),
    "npz-garbage": (
        "a.npz",
        b"x" * 100,
        "not a zip file that can be read, or damaged: File is not a zip file",
    ),
    "npz-short-array": (
        "a.npz",
        _npz_bytes({"a.npy": _NPY[:-4]}),
        "a.npy: payload is 20 bytes, header promises 24",
    ),
    "npz-not-npy": ("a.npz", _npz_bytes({"a.npy": b"x" * 100}), "a.npy: not an .npy file, or damaged"),
    "npz-checksum": (
        "a.npz",
        _corrupt_npz(),
        "a.npy: not a zip file that can be read, or damaged: Bad CRC-32",
    ),
    "npz-deflate": ("a.npz", _deflated_npz(), "a.npy: not a zip file that can be read, or damaged"),
    "npz-name": (
        "a.npz",
        _npz_bytes({"\xe9.npy": _NPY}).replace("\xe9".encode(), b"\xff\xff"),
        "not a zip file that can be read, or damaged: 'utf-8' codec can't decode",
    ),
    "gguf-garbage": ("a.gguf", b"x" * 100, "not a GGUF file: it does not begin with GGUF"),
    "gguf-version": ("a.gguf", gguf_bytes(version=1), "GGUF of version 1; what is read: versions 2 and 3"),
    "gguf-big-endian": ("a.gguf", gguf_bytes(version=3 << 24), "is big-endian; convert it with: gguf-convert-endian"),
    "gguf-cut": ("a.gguf", gguf_bytes(_GGUF)[:60], "its header goes on past its 60 bytes; the file is truncated"),
    "gguf-truncated": (
        "a.gguf",
        gguf_bytes(_GGUF, payload=bytes(20)),
        "tensor 'a' ends at byte 120, the file at 116; it is truncated or damaged",
    ),
    "gguf-tensors": (
        "a.gguf",
        gguf_bytes(_GGUF, counts=(1 << 60, 0)),
        "its header promises 1152921504606846976 tensors, and at most 262144 are read",
    ),
    "gguf-keys": ("a.gguf", gguf_bytes(counts=(0, 1 << 20)), "its header promises 1048576 keys, and at most 262144"),
    "gguf-long-name": ("a.gguf", gguf_bytes(struct.pack("<Q", 1 << 60)), "its header goes on past its 32 bytes"),
    "gguf-name": ("a.gguf", gguf_bytes(gguf_tensor(b"\xff", [1])), r"a name in its header is not UTF-8: b'\\xff'"),
    "gguf-long-text": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"k", 8, struct.pack("<Q", 1 << 60)),)),
        "its header goes on past its 64 bytes",
    ),
    "gguf-long-array": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"k", 9, struct.pack("<IQ", 6, 1 << 60)),)),
        "its header goes on past its 64 bytes",
    ),
    "gguf-many-texts": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"k", 9, struct.pack("<IQ", 8, 1 << 60)),), payload=bytes(1000)),
        "its header goes on past its 1064 bytes",
    ),
    "gguf-array-of-arrays": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"k", 9, struct.pack("<IQ", 9, 1 << 60)),)),
        "its header has a value of type 9 before byte 49, which it may not",
    ),
    "gguf-value": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"k", 13, b""),)),
        "its header has a value of type 13 before byte",
    ),
    "gguf-alignment": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"general.alignment", 4, struct.pack("<I", 24)),)),
        "general.alignment is no power of 2",
    ),
    "gguf-alignment-type": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"general.alignment", 10, struct.pack("<Q", 32)),)),
        "general.alignment is no power of 2",
    ),
    "gguf-dimensions": (
        "a.gguf",
        gguf_bytes(gguf_tensor(b"a", [1] * 5)),
        "tensor 'a' has 5 dimensions, and at most 4 are allowed",
    ),
    "gguf-shape": (
        "a.gguf",
        gguf_bytes(gguf_tensor(b"a", [0, 1 << 60])),
        r"tensor 'a' has shape \[1152921504606846976, 0\]; the file is damaged",
    ),
    "gguf-blocks": (
        "a.gguf",
        gguf_bytes(gguf_tensor(b"a", [48, 2], 8), payload=bytes(200)),
        "tensor 'a' has rows of 48 values, which are no whole blocks of Q8_0, of 32",
    ),
    "gguf-offset": (
        "a.gguf",
        gguf_bytes(gguf_tensor(b"a", [1], offset=4), payload=bytes(64)),
        "tensor 'a' begins at byte 4 of the values, which is no multiple of 32",
    ),
    "gguf-overlap": (
        "a.gguf",
        gguf_bytes(gguf_tensor(b"a", [9]), gguf_tensor(b"b", [1], offset=32), payload=bytes(64)),
        "tensor 'b' begins at byte 128, but what is before it ends at 132",
    ),
    "gguf-tensor-twice": (
        "a.gguf",
        gguf_bytes(_GGUF, gguf_tensor(b"a", [1], offset=32), payload=bytes(64)),
        "tensor 'a' is there twice, and which one is meant cannot be told",
    ),
    "gguf-key-twice": (
        "a.gguf",
        gguf_bytes(keys=(gguf_key(b"k", 7, b"\0"), gguf_key(b"k", 7, b"\0"))),
        "key 'k' is there twice, and which one is meant cannot be told",
    ),
    "parquet-garbage": ("a.parquet", b"x" * 100, "not a Parquet file, or damaged"),
    "parquet-page": ("a.parquet", _corrupt_parquet(), "not a Parquet file, or damaged"),
}


def write_damaged(folder: Path, key: str) -> tuple[Path, str]:
    """Write one of FILES; returns its path and what the error must say."""
    name, raw, message = FILES[key]
    return _write(folder, name, raw), message


def write_evil_pickle(folder: Path, witness: Path) -> Path:
    return _write(folder, "evil.pt", _torch_bytes({"a": Evil(witness)}))


def write_evil_array(folder: Path, witness: Path) -> Path:
    return _write(folder, "evil.npy", _npy_bytes(np.array([Evil(witness)], object)))


def write_shards(folder: Path, weight_map: object, files: dict[str, list[str]] | None = None) -> Path:
    """Write an index, and files with a float32 tensor of two values under each name."""
    for file_name, names in (files or {}).items():
        header = {name: f32_entry([2], start=8 * i) for i, name in enumerate(names)}
        _write(folder, file_name, safetensors_bytes(header, b"\0" * 8 * len(names)))
    text = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
    return _write(folder, "model.safetensors.index.json", text)

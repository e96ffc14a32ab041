"""Who else reads packed rows: what is said beforehand is what PyTorch, FBGEMM, TorchRec and ONNX Runtime then do."""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest

import embpack
from embpack.layouts import LAYOUTS, ROTATIONS, RowFormat
from embpack.readers import READERS, explain_unread, find_readers

METHOD_OF = {"uniform": "asym", "codebook": "kmeans", "clustered": "kmeans-cls", "trellis": "trellis"}
BITS_OF = {layout: (2, 4, 8) if layout != "trellis" else (2, 2.5, 4, 7) for layout in LAYOUTS}
# Whole bytes of codes at all bits, at 8 and 4, at 8 alone.
DIMS = (16, 18, 13)
ROW_FORMATS = [
    RowFormat(dim, bits, param_dtype, layout.name, rotation)
    for layout in LAYOUTS.values()
    for dim, bits, param_dtype, rotation in itertools.product(
        DIMS, BITS_OF[layout.name], layout.param_dtypes, (None, *ROTATIONS)
    )
]


@pytest.fixture(scope="module")
def tables():
    weight = np.random.default_rng(0).standard_normal((20, max(DIMS)), np.float32)
    return [
        embpack.quantize(
            weight[:, : each.embedding_dim], METHOD_OF[each.layout], each.bits, each.param_dtype, rotate=each.rotation
        )
        for each in ROW_FORMATS
    ]


def assert_found(reader, tables, look_up):
    """Holds find_readers against a reader: look_up gives the rows of a table, or raises."""
    for table in tables:
        try:
            rows = look_up(table)
        except (ValueError, RuntimeError) as error:
            rows, refusal = None, str(error)
        wanted = table.dequantize()
        # Rotated rows are multiplied back, in another order of sums.
        agrees = rows is not None and rows.shape == wanted.shape and np.allclose(rows, wanted, atol=1e-5)
        said = explain_unread(table.row_format, reader)
        assert agrees == (said is None), f"{reader}, {table.row_format}: {said}"
        assert agrees == (reader in find_readers(table.row_format))
        if rows is None:
            assert said is not None and (said in refusal or reader == "torch")


def test_torch_reads_what_is_said(tables):
    torch = pytest.importorskip("torch")
    look_up = {
        2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
        4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
        8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
    }
    of_these_bits = [table for table in tables if table.bits in look_up]
    numbers = torch.arange(20)
    assert_found(
        "torch",
        of_these_bits,
        lambda table: look_up[table.bits](torch.from_numpy(table.packed), numbers, numbers).numpy(),
    )
    assert all("torch" not in find_readers(table.row_format) for table in tables if table.bits not in look_up)


def test_fbgemm_reads_what_is_said(tables):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what FBGEMM says while it is imported is not ours
        pytest.importorskip("fbgemm_gpu")
        from embpack import fbgemm
    numbers = torch.arange(20)
    assert_found("fbgemm", tables, lambda table: fbgemm.to_tbe([table])(numbers, torch.arange(21)).numpy())


def test_torchrec_reads_what_is_said(tables):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TorchRec says while it is imported is not ours
        pytest.importorskip("torchrec")
        from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

        from embpack import torchrec
    bags = KeyedJaggedTensor(["id"], torch.arange(20), lengths=torch.ones(20, dtype=torch.int32))

    def look_up(table):
        config = EmbeddingBagConfig(
            name="t", num_embeddings=20, embedding_dim=table.embedding_dim, feature_names=["id"]
        )
        return torchrec.from_tables({"t": table}, [config])(bags)["id"].numpy()

    assert_found("torchrec", tables, look_up)


def test_onnx_runtime_reads_what_is_said(tables, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from embpack.onnx import export

    def look_up(table):
        export(table, tmp_path / "table.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "table.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {"indices": np.arange(20)})[0]

    assert_found("onnx", tables, look_up)


def test_each_reader_reads_something_and_no_other_reads_all(tables):
    found = [find_readers(table.row_format) for table in tables]
    assert {reader for readers in found for reader in readers} == set(READERS)
    assert () in found  # trellis-coded rows
    assert all(readers == tuple(each for each in READERS if each in readers) for readers in found)


def test_what_is_said_of_a_reader_that_there_is_not():
    with pytest.raises(ValueError, match="there is no reader 'faiss'; choose one of torch, fbgemm, torchrec, onnx"):
        explain_unread(RowFormat(16), "faiss")


def test_readers_are_known_without_them():
    code = "import sys, embpack.readers; print({'torch', 'fbgemm_gpu', 'torchrec', 'onnx'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"

"""What methods become once they know a table: ranges of rows by themselves, and what is said of a table beforehand."""

import math
import pickle

import numpy as np
import pytest
from checkpoints import Arrays, write_safetensors

import embpack
from embpack.convert import pack_checkpoint
from embpack.formats import Checkpoint, Shard, SourceTensor, open_checkpoint
from embpack.methods import METHODS, measure_loss
from embpack.methods.base import Sums, condense
from embpack.packing import iter_packed
from embpack.rules import Rules, decide_all
from embpack.variant import Variant

# Not hist-brute, which takes minutes, and is packed by what packs hist-apprx.
SPECS = [name for name in METHODS if name != "hist-brute"]
ROWS, DIM = 150, 20


@pytest.fixture
def weight(rng, monkeypatch):
    """A table of five spans."""
    monkeypatch.setattr("embpack.chunks.SPAN_VALUES", 32 * DIM)
    return rng.standard_normal((ROWS, DIM), dtype=np.float32)


def fit(weight, variant):
    row_format = variant.make_row_format(weight.shape[1])
    return variant.parsed_method.fit(lambda: iter([weight[:64], weight[64:]]), len(weight), row_format, "user")


@pytest.mark.parametrize("method", SPECS)
def test_ranges_of_rows_are_packed_by_themselves(weight, method):
    """In any order, and by copies that went to another process: to the bytes and the loss of the whole."""
    whole = embpack.quantize(weight, method)
    packer = pickle.loads(pickle.dumps(fit(weight, Variant(method))))
    packed, by_row, sums = np.empty_like(whole.packed), packer.make_by_row(ROWS), {}
    for start, stop in ((96, 150), (0, 32), (32, 96)):
        own = None if by_row is None else by_row[start:stop]
        sums[start] = packer.pack(weight[start:stop], packed[start:stop], start, by_row=own)
    assert packed.tobytes() == whole.packed.tobytes()
    assert packer.spec == whole.method
    assert measure_loss(each for start in sorted(sums) for each in sums[start]) == whole.loss
    if by_row is not None:
        np.testing.assert_array_equal(by_row, whole.clusters, strict=True)
    for name, array in packer.beside().items():
        np.testing.assert_array_equal(array, getattr(whole, name), strict=True)


def test_weights_go_with_their_rows(weight):
    weights = np.random.default_rng(1).random((ROWS, DIM), dtype=np.float32)
    whole = embpack.quantize(weight, error_weights=weights)
    packer = fit(weight, Variant()).weigh_errors(weights, ROWS)
    packed = np.empty_like(whole.packed)
    for start in (64, 0):
        stop = start + 86 if start else 64
        packer.pack(weight[start:stop], packed[start:stop], start)
    assert packed.tobytes() == whole.packed.tobytes()


def test_a_range_that_comes_in_chunks(weight):
    packer = fit(weight, Variant("kmeans-cls:K=7"))
    whole = embpack.quantize(weight, "kmeans-cls:K=7")
    # The second chunk is longer than the first.
    chunks = iter_packed(packer, iter([weight[64:96], weight[96:]]), start=64)
    assert b"".join(packed.tobytes() for packed, _ in chunks) == whole.packed[64:].tobytes()


@pytest.mark.parametrize("method", ["optimal", "kmeans", "kmeans-cls", "table", "trellis"])
def test_values_that_are_not_finite_are_named(weight, method):
    weight[101, 3] = np.nan
    packed = np.empty((32, Variant(method).make_row_format(DIM).row_bytes), np.uint8)
    with pytest.raises(ValueError, match=r"^user\[101, 3\] is nan; NaN and infinity cannot be packed"):
        fit(weight, Variant(method)).pack(weight[96:128], packed, 96)


@pytest.mark.parametrize("method", SPECS)
def test_what_lies_beside_is_known_beforehand(tmp_path, weight, method):
    table = embpack.quantize(weight, method)
    path = write_safetensors(tmp_path, Arrays({"user_emb.weight": weight}))
    with open_checkpoint(path) as checkpoint:
        (decision,) = decide_all(checkpoint, Rules(variant=Variant(method)))
        specs = decision.beside
    assert [(spec.dtype, spec.known_shape) for spec in specs] == [(each.dtype, each.shape) for each in table.beside]
    assert decision.bytes_after == table.nbytes


@pytest.mark.parametrize(
    ("method", "times"),
    [("optimal", 1), ("kmeans", 1), ("table", 2), ("table:xmin=-9,xmax=9", 1), ("kmeans-cls", 2), ("trellis", 3)],
)
def test_how_often_a_file_is_read(tmp_path, weight, method, times):
    reads = []

    def iter_rows(start, stop, step):
        reads.append(step)
        return (weight[at : min(at + step, stop)] for at in range(start, stop, step))

    path = tmp_path / "model.npy"
    path.touch()
    tensor = SourceTensor("user_emb.weight", weight.shape, "F32", iter_rows, None)
    checkpoint = Checkpoint(path, (Shard(path.name, weight.nbytes, (tensor,)),))
    decisions = decide_all(checkpoint, Rules(variant=Variant(method)))
    pack_checkpoint(checkpoint, decisions, tmp_path / "packed.safetensors")
    assert len(reads) == times
    packed = embpack.load(tmp_path / "packed.safetensors", verify=True)["user_emb.weight"]
    assert packed.packed.tobytes() == embpack.quantize(weight, method).packed.tobytes()


def test_sums_of_many_spans_are_condensed_to_the_same(rng):
    """Whatever the order and the sizes: math.fsum of few is math.fsum of all."""
    values = rng.lognormal(0, 30, (5000, 3))
    spans = [Sums(a, b, int(n), c) for (a, b, c), n in zip(values, rng.integers(0, 9, 5000), strict=True)]
    few = []
    for start in range(0, len(spans), 16):
        few = condense([*few, *spans[start : start + 16]])
    assert len(few) < 300 and len(condense(spans)) < 40
    for name in Sums._fields:
        assert math.fsum(getattr(span, name) for span in few) == math.fsum(getattr(span, name) for span in spans)
    assert measure_loss(few) == measure_loss(spans)
    assert len(condense([Sums(0.0, 0.0)] * 1000)) == 1

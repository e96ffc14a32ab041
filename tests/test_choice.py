"""Which way is recommended: by readers and by what counts most, and what is said of it."""

import numpy as np
import pytest
from comparisons import make_file, make_result, make_table_comparison

import embpack
from embpack.comparison.choice import PREFERENCES, recommend
from embpack.comparison.front import find_front
from embpack.methods import DEFAULT_METHOD
from embpack.readers import READERS, find_readers
from embpack.samples import make_table

# The default takes 36 bytes a row of 64 values.
OPTIMAL = make_result(36.0, 0.1, method=DEFAULT_METHOD)
ASYM = make_result(36.0, 0.12, method="asym", rows_per_second=4e6)
NO_READERS = {"readers": ()}
TRELLIS = make_result(
    36.1, 0.06, method="trellis", param_dtype="float32", layout="trellis", lookups_per_second=3e7, **NO_READERS
)
SMALL = make_result(
    28.1, 0.09, method="trellis", bits=3, param_dtype="float32", layout="trellis", lookups_per_second=2e7, **NO_READERS
)
ROTATED = make_result(36.0, 0.08, method=DEFAULT_METHOD, rotate="hadamard", lookups_per_second=6e7, readers=("onnx",))
LARGE = make_result(64.0, 0.05, method="kmeans", layout="codebook", readers=("onnx",), lookups_per_second=2e8)
ALL = [OPTIMAL, ASYM, TRELLIS, SMALL, ROTATED, LARGE]


def test_recommended_is_the_least_loss_at_the_size_of_the_default():
    results = make_result(20, 0.3), make_result(36, 0.11), make_result(36, 0.1), make_result(40, 0.09)
    assert make_file(*results).recommended is results[2]
    assert make_file(results[0], results[3]).recommended is results[0]
    assert make_file(results[3], make_result(72, 0.01)).recommended is results[3]
    assert make_file(make_result(256, 0.0)).recommended is None


@pytest.mark.parametrize(
    ("readers", "prefer", "expected"),
    [
        ([], "loss", TRELLIS),
        ([], "size", SMALL),
        ([], "speed", OPTIMAL),
        (["onnx"], "loss", ROTATED),
        (["onnx"], "size", ROTATED),
        (["onnx"], "speed", OPTIMAL),
        (["onnx", "fbgemm"], "loss", OPTIMAL),
        (["torchrec"], "size", OPTIMAL),
        (["torch"], "speed", OPTIMAL),
    ],
)
def test_readers_and_what_counts_most_decide(readers, prefer, expected):
    assert recommend(ALL, readers, prefer).result is expected
    assert make_file(*ALL, readers=tuple(readers), prefer=prefer).recommended is expected


def test_rows_of_one_format_count_as_equally_fast():
    """One that was lucky when it was timed is not taken for the faster one."""
    lucky = make_result(36.0, 0.1005, method="greedy", lookups_per_second=3e8)
    assert recommend([OPTIMAL, lucky, ROTATED], prefer="speed").result is OPTIMAL


@pytest.mark.parametrize(
    ("results", "prefer", "expected"),
    [
        # Nothing loses as little as the default: the least loss.
        ([make_result(36.0, 0.1, readers=()), make_result(20.0, 0.3), make_result(28.0, 0.2)], "size", 2),
        ([make_result(36.0, 0.1, readers=()), make_result(20.0, 0.3), make_result(28.0, 0.2)], "speed", 2),
        # Nothing is as small: the smallest.
        ([make_result(40.0, 0.2), make_result(44.0, 0.1)], "speed", 0),
        ([make_result(40.0, 0.2, method="kmeans", layout="codebook"), make_result(44.0, 0.1)], "loss", 0),
    ],
)
def test_without_what_is_wished_what_comes_nearest(results, prefer, expected):
    assert recommend(results, ["torch"], prefer).result is results[expected]


def test_nothing_that_the_reader_reads():
    assert recommend([TRELLIS], ["fbgemm"]) is None
    comparison = make_file(TRELLIS, readers=("fbgemm", "onnx"))
    assert comparison.recommended is None and comparison.front == []
    assert comparison.explain_nothing() == (
        "No way that was measured makes all of these tables smaller and is read by fbgemm, onnx."
    )


def test_the_front_is_of_what_the_readers_read():
    assert make_file(*ALL, readers=("onnx",)).front == find_front([OPTIMAL, ASYM, ROTATED, LARGE])
    assert make_file(*ALL).front == find_front(ALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"readers": ["faiss"]}, "there is no reader 'faiss'; choose one of torch, fbgemm, torchrec, onnx"),
        ({"prefer": "luck"}, "prefer is 'luck'; choose one of loss, size, speed"),
    ],
)
def test_what_nobody_can_ask_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(ALL, **arguments)


@pytest.mark.parametrize(
    ("results", "readers", "prefer", "said"),
    [
        (
            ALL,
            [],
            "loss",
            "trellis at 4 bits has the least loss in about the bytes of uniform rows of 4 bits. Against optimal at 4 "
            "bits, quantize's default: 40 % less loss, as many bytes, lookups at 0.3 of the speed, packing as fast. "
            "Only embpack reads it.",
        ),
        (
            ALL,
            [],
            "size",
            "trellis at 3 bits takes the fewest bytes with no more loss than optimal at 4 bits. Against optimal at 4 "
            "bits, quantize's default: 10 % less loss, 21.9 % fewer bytes, lookups at 0.2 of the speed, packing as "
            "fast. Only embpack reads it.",
        ),
        (
            ALL,
            ["fbgemm", "torch"],
            "speed",
            "Of the ways that FBGEMM and PyTorch can read, optimal at 4 bits has the fastest lookups in about the "
            "bytes of uniform rows of 4 bits. Against asym at 4 bits: 16.7 % less loss, as many bytes, lookups as "
            "fast, packing takes 4.0 times as long. PyTorch, FBGEMM, TorchRec and ONNX Runtime can read it too.",
        ),
        (
            [OPTIMAL, ASYM],
            ["torch"],
            "size",
            "Of the ways that PyTorch can read, optimal at 4 bits takes the fewest bytes: nothing smaller loses as "
            "little. Against asym at 4 bits: 16.7 % less loss, as many bytes, lookups as fast, packing takes 4.0 times "
            "as long. PyTorch, FBGEMM, TorchRec and ONNX Runtime can read it too.",
        ),
        (
            [OPTIMAL, make_result(36.0, 0.0995, method=DEFAULT_METHOD, rotate="hadamard")],
            [],
            "loss",
            "optimal at 4 bits has the least loss in about the bytes of uniform rows of 4 bits, but for rotated rows "
            "that save less than 1 %. PyTorch, FBGEMM, TorchRec and ONNX Runtime can read it too.",
        ),
        (
            [make_result(40.0, 0.08, method="kmeans", layout="codebook", readers=("onnx",), rows_per_second=2e7), ASYM],
            ["onnx"],
            "loss",
            "Of the ways that ONNX Runtime can read, asym at 4 bits has the least loss in about the bytes of uniform "
            "rows of 4 bits. PyTorch, FBGEMM, TorchRec and ONNX Runtime can read it too.",
        ),
        (
            [make_result(40.0, 0.08, method="kmeans", layout="codebook", readers=()), make_result(72.0, 0.01)],
            [],
            "loss",
            "kmeans at 4 bits is the smallest of those that were measured. Against greedy at 4 bits: 700 % more loss, "
            "44.4 % fewer bytes, lookups as fast, packing as fast. Only embpack reads it.",
        ),
        (
            [make_result(20.0, 0.3, bits=2)],
            [],
            "size",
            "greedy at 2 bits takes the fewest bytes: nothing smaller loses as little. PyTorch, FBGEMM, TorchRec and "
            "ONNX Runtime can read it too.",
        ),
    ],
)
def test_what_is_said_of_the_recommended_one_is_so(results, readers, prefer, said):
    assert recommend(results, readers, prefer).reason == said


def test_no_loss_at_all_is_the_same_loss():
    none = make_result(36.0, 0.0, method=DEFAULT_METHOD), make_result(36.0, 0.0, method="asym")
    assert "the same loss" in recommend(none).reason


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dim", [64, 5])
def test_what_is_recommended_for_a_reader_is_read_by_it(dim, reader, prefer):
    weight = make_table(np.random.default_rng(0), 60, dim)
    results = embpack.compare(weight, ["asym", "trellis"], rotate=[None, "hadamard"]) + embpack.compare(
        weight, "sym", 8
    )
    recommendation = recommend(results, [reader], prefer)
    if recommendation is not None:
        result = recommendation.result
        assert reader in find_readers(result.variant.make_row_format(dim))
    assert (recommendation is None) == (not any(reader in r.readers and r.is_smaller for r in results))


def test_sizes_of_one_table_are_worked_out_as_those_of_a_file():
    results = [OPTIMAL, TRELLIS, make_result(36.5, 0.01, method="gss")]
    table = make_table_comparison(results)
    assert recommend(table.results).result is make_file(*results).recommended is TRELLIS

"""The binding level under arguments that no caller should pass: each call raises, returns a fault, or is right.

Nothing here may end the process; what lies after an output is watched for writes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embpack import _native

REFUSALS = (ValueError, TypeError, OverflowError)
SEEDS = range(4)
CALLS = 1500
GUARD = 64
INT64_EDGES = (-(2**63), -(2**32), -1, 0, 1, 2**31, 2**32, 2**62, 2**63 - 1)


def row_bytes(dim: int, bits: int, f16_params: bool, layout: str) -> int:
    codes = (dim * bits + 7) // 8
    param_bytes = 2 if f16_params else 4
    return codes + {"uniform": 2, "codebook": 2**bits, "clustered": 0}[layout] * param_bytes


class Chooser:
    """Arguments that are mostly right, so that a call gets past its first check, and otherwise wrong in some way."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def below(self, end: int) -> int:
        return int(self.random.integers(end))

    def one_in(self, n: int) -> bool:
        return self.below(n) == 0

    def among(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def bytes_of(self, *shape: int) -> NDArray[np.uint8]:
        return self.random.integers(0, 256, shape, dtype=np.uint8)

    def spoil(self, array: Any) -> Any:
        """An array of another shape, type or order in memory; now and then no array at all."""
        ways: list[Callable[[], Any]] = [
            lambda: array[:-1],
            lambda: np.concatenate([array, array[:1]]),
            lambda: array[:0],
            lambda: array[..., None],
            lambda: array.reshape(-1),
            lambda: array.reshape(-1)[0] if array.size else None,
            lambda: array[::-1],
            lambda: np.repeat(array, 2, axis=-1)[..., ::2],
            lambda: array[..., : array.shape[-1] // 2],
            lambda: array.astype(self.among("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "?")),
            lambda: array.astype(array.dtype.newbyteorder(">")),
            lambda: array.astype(object),
            lambda: array.astype(np.complex64),
            lambda: np.broadcast_to(array[..., :1], array.shape) if array.size else array,
            lambda: np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape),
            lambda: array.tolist(),
            lambda: self.among(None, 0, "rows", b"", object(), [], {}, np.float32(1)),
        ]
        with np.errstate(all="ignore"):
            return self.among(*ways)()

    def maybe_spoil(self, array: Any) -> Any:
        return self.spoil(array) if array is not None and self.one_in(12) else array

    def integer(self, right: int) -> Any:
        if self.one_in(12):
            return self.among(right - 1, right + 1, -right, 2**64, -(2**64), *INT64_EDGES, 1.5, None, "3")
        return right

    def integers(self, values: Any) -> NDArray[Any]:
        array = np.asarray(values, np.int64)
        if array.size and self.one_in(6):
            array[self.below(array.size)] = self.among(*INT64_EDGES, array.size, array.max() + 1)
        return array.astype(self.among(np.int32, np.int64))

    def offsets(self, num_bags: int, num_indices: int) -> NDArray[Any]:
        starts = np.sort(self.random.integers(0, num_indices + 1, num_bags))
        starts[:1] = 0
        if self.one_in(10):
            self.random.shuffle(starts)
        return self.integers(np.append(starts, num_indices) if self.one_in(2) else starts)

    def output(self, rows: int, dim: int) -> NDArray[Any]:
        """Room for values, with bytes after them that watch() looks at."""
        dtype = np.dtype(self.among(np.float32, np.float16, np.uint16))
        memory = np.full(rows * dim * dtype.itemsize + GUARD, 0xA5, np.uint8)
        return memory[: memory.size - GUARD].view(dtype).reshape(rows, dim)

    def table(self) -> tuple[_native.TableView, int, int]:
        """Packed rows, their number and their embedding_dim; raises if they are wrong."""
        dim, bits, f16_params = 1 + self.below(40), self.among(2, 4, 8), self.one_in(2)
        layout = self.among("uniform", "codebook", "clustered")
        num_rows = self.among(0, 1, 2, 7, 30)
        packed = self.bytes_of(num_rows, row_bytes(dim, bits, f16_params, layout))
        clusters = codebooks = None
        if (layout == "clustered") != self.one_in(20):
            num_codebooks = 1 + self.below(4)
            clusters = self.random.integers(0, num_codebooks, num_rows).astype(self.among(np.uint8, np.uint16))
            if num_rows and self.one_in(5):
                clusters[self.below(num_rows)] = self.among(num_codebooks, 255)
            codebooks = self.bytes_of(num_codebooks, 2**bits * (2 if f16_params else 4))
        parts = [
            layout if not self.one_in(20) else self.among("", "Uniform", "rows", None),
            self.integer(dim),
            bits if not self.one_in(20) else self.among(-4, 0, 1, 3, 3.5, 5, 16, 2**31, 2**40, "", "nan"),
            "float16" if f16_params else "float32",
            *(("hadamard",) if self.one_in(4) else ()),
        ]
        if self.one_in(20):
            parts.pop(self.below(len(parts)))
        rows = _native.TableView(
            self.maybe_spoil(packed),
            ":".join(map(str, parts)),
            self.maybe_spoil(clusters),
            self.maybe_spoil(codebooks),
        )
        return rows, num_rows, dim


def watch(out: Any) -> None:
    """Check that nothing has been written after an output of Chooser.output."""
    memory = out
    while isinstance(memory, np.ndarray) and memory.base is not None:
        memory = memory.base
    if isinstance(memory, np.ndarray) and memory.dtype == np.uint8 and memory.size >= GUARD:
        assert (memory[-GUARD:] == 0xA5).all()


def is_fault(fault: int, num_indices: int) -> bool:
    return fault == _native.bad_offsets or -2 - num_indices < fault < num_indices


def fuzz_gather(choose: Chooser) -> None:
    rows, num_rows, dim = choose.table()
    count = choose.among(0, 1, 5, 70)
    indices = choose.integers(choose.random.integers(0, max(1, num_rows), count))
    out = choose.output(count, dim)
    fault = rows.gather(choose.maybe_spoil(indices), choose.maybe_spoil(out))
    watch(out)
    assert is_fault(fault, max(count + 1, num_rows))


def fuzz_pool(choose: Chooser) -> None:
    rows, num_rows, dim = choose.table()
    num_bags, bag_size = choose.among(0, 1, 3, 9), choose.among(0, 1, 4, 66)
    count = num_bags * bag_size + choose.among(0, 0, 1)
    indices = choose.integers(choose.random.integers(0, max(1, num_rows), count))
    offsets = choose.offsets(num_bags, count) if choose.one_in(2) else None
    weights = choose.random.normal(size=count).astype(np.float32) if choose.one_in(3) else None
    out = choose.output(num_bags, dim)
    fault = rows.pool(
        choose.maybe_spoil(indices),
        choose.maybe_spoil(offsets),
        choose.integer(bag_size),
        choose.maybe_spoil(weights),
        choose.integer(choose.among(-1, 0, num_rows - 1)),
        choose.among("sum", "mean", "max") if not choose.one_in(20) else choose.among("", "prod", None),
        choose.maybe_spoil(out),
    )
    watch(out)
    assert is_fault(fault, count + 1)


def fuzz_group(choose: Chooser) -> None:
    tables = [choose.table() for _ in range(1 + choose.below(3))]
    features, batch = 1 + choose.below(4), choose.among(0, 1, 3)
    table_of = [choose.below(len(tables)) for _ in range(features)]
    modes = [choose.among("sum", "mean", "max") for _ in range(features)]
    if choose.one_in(12):
        table_of[0] = choose.among(len(tables), -1, 2**63, 2**64, None)
    if choose.one_in(12):
        modes = choose.among(modes[1:], [*modes, "sum"], ["prod"] * features, "sum")
    group = _native.TableGroup([rows for rows, _, _ in tables], table_of, modes)
    count = features * batch * choose.among(0, 1, 5)
    indices = choose.integers(choose.random.integers(0, max(1, min(rows for _, rows, _ in tables)), count))
    offsets = choose.offsets(features * batch, count)
    if len(offsets) == features * batch:
        offsets = np.append(offsets, offsets.dtype.type(count))
    weights = choose.random.normal(size=count).astype(np.float32) if choose.one_in(3) else None
    out = choose.output(batch, sum(tables[table][2] for table in table_of))
    feature, fault = group.pool(
        choose.maybe_spoil(indices), choose.maybe_spoil(offsets), choose.maybe_spoil(weights), choose.maybe_spoil(out)
    )
    watch(out)
    assert is_fault(fault, count + 1) and 0 <= feature <= features


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fuzz", [fuzz_gather, fuzz_pool, fuzz_group])
def test_calls_raise_or_return_a_fault(fuzz: Callable[[Chooser], None], seed: int) -> None:
    choose = Chooser(seed)
    refused = 0
    for _ in range(CALLS):
        try:
            fuzz(choose)
        except REFUSALS:
            refused += 1
    # Neither all calls nor none: otherwise the checks, or what comes after them, were not reached.
    assert CALLS // 10 < refused < CALLS * 9 // 10


def rows_of_zeros(num_rows: int = 5, dim: int = 8) -> _native.TableView:
    packed = np.zeros((num_rows, row_bytes(dim, 4, True, "uniform")), np.uint8)
    return _native.TableView(packed, f"uniform:{dim}:4:float16")


def pool(
    indices: Any, offsets: Any = None, bag_size: Any = 0, *, rows: Any = None, weights: Any = None, num_bags: int = 2
) -> int:
    out = np.empty((num_bags, 8), np.float32)
    return (rows or rows_of_zeros()).pool(indices, offsets, bag_size, weights, -1, "sum", out)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("offsets", [[0, 3, 2], [1, 2, 4], [0, 1, 5], [0, -1, 4], [-1, 0, 4], [0, 2, 2**31 - 1]])
def test_offsets_that_leave_the_indices_are_told(offsets: list[int], dtype: Any) -> None:
    assert pool(np.zeros(4, dtype), np.array(offsets, dtype)) == _native.bad_offsets


def test_offsets_of_a_group_that_leave_the_indices_are_told() -> None:
    group = _native.TableGroup([rows_of_zeros()], [0, 0], ["sum", "max"])
    for offsets in ([0, 2, 1], [0, 1, 5], [1, 1, 4], [0, -1, 4], [0, 2, 2**63 - 1], [0, 2, -(2**63)]):
        out = np.empty((1, 16), np.float32)
        assert group.pool(np.zeros(4, np.int64), np.array(offsets), None, out)[1] == _native.bad_offsets


@pytest.mark.parametrize("bag_size", [-1, -(2**63), 2**64, 3, 2**63, 2**64 - 1, 2**62, 0])
def test_bag_sizes_that_do_not_fit_the_indices_are_refused(bag_size: int) -> None:
    with pytest.raises(REFUSALS):
        pool(np.zeros(4, np.int64), None, bag_size)


@pytest.mark.parametrize("index", [-1, 5, 2**63 - 1, -(2**63), 2**32])
@pytest.mark.parametrize("at", [0, 1, 63, 64, 129])
def test_the_first_index_outside_is_told(index: int, at: int) -> None:
    indices = np.zeros(130, np.int64)
    indices[[at, 129]] = index
    assert pool(indices, None, 65) == at
    assert pool(indices, np.array([0, 1])) == at
    assert rows_of_zeros().gather(indices, np.empty((130, 8), np.float32)) == at


def test_the_position_of_a_row_without_a_codebook_is_told_beside_padding() -> None:
    clusters, codebooks = np.array([0, 1, 0], np.uint8), np.zeros((1, 32), np.uint8)
    rows = _native.TableView(np.zeros((3, 4), np.uint8), "clustered:8:4:float16", clusters, codebooks)
    out = np.empty((1, 8), np.float32)
    assert rows.pool(np.array([2, 2, 1, 1]), np.array([0]), 0, None, 2, "sum", out) == -2 - 2


def test_tables_without_rows_have_no_row_to_read() -> None:
    rows = rows_of_zeros(0)
    assert pool(np.zeros(4, np.int64), None, 2, rows=rows) == 0
    assert pool(np.zeros(0, np.int64), None, 0, rows=rows) == -1
    assert rows.gather(None, np.empty((0, 8), np.float32)) == -1
    assert rows.gather(np.array([0]), np.empty((1, 8), np.float32)) == 0
    group = _native.TableGroup([rows], [0], ["mean"])
    assert group.pool(np.array([0]), np.array([0, 1]), None, np.empty((1, 8), np.float32)) == (0, 0)


def test_truncated_tables_are_refused() -> None:
    packed = np.zeros((5, 8), np.uint8)
    with pytest.raises(ValueError):
        _native.TableView(packed[:, :-1].copy(), "uniform:8:4:float16")
    clustered = packed[:, :4].copy()
    clusters, codebooks = np.zeros(5, np.uint8), np.zeros((1, 32), np.uint8)
    for damaged in ((clusters[:-1], codebooks), (clusters, codebooks[:, :-1].copy()), (None, codebooks)):
        with pytest.raises(ValueError):
            _native.TableView(clustered, "clustered:8:4:float16", *damaged)


def test_codes_of_more_bytes_than_size_t_counts_are_refused() -> None:
    # 2^61 codes of 8 bits are 2^64 bits: the bytes of a row must not come out as those of its parameters alone.
    with pytest.raises(REFUSALS):
        _native.TableView(np.zeros((1, 4), np.uint8), f"uniform:{2**61}:8:float16")


def test_rows_of_clusters_need_a_codebook() -> None:
    with pytest.raises(ValueError):
        _native.TableView(
            np.zeros((5, 4), np.uint8), "clustered:8:4:float16", np.zeros(5, np.uint8), np.zeros((0, 32), np.uint8)
        )


def test_an_output_that_would_be_copied_is_refused() -> None:
    out = np.zeros((2, 16), np.float32)[:, ::2]
    with pytest.raises(TypeError):
        rows_of_zeros().pool(np.zeros(4, np.int64), None, 2, None, -1, "sum", out)


def test_a_group_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError):
        _native.TableGroup([None], [0], ["sum"])

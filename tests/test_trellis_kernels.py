"""The native encoder of trellis-coded rows against the specification, bit for bit."""

import numpy as np
import pytest

from embpack import _native
from embpack.layouts import trellis
from embpack.layouts.trellis import LEAST_BITS, MOST_BITS, TrellisFormat, TrellisParameters
from embpack.methods import trellis_search

F32 = np.float32


def encode(rows, packed_shape, parameters, span_rows=64):
    packed = np.full(packed_shape, 0xA5, np.uint8)
    of_table = (parameters.narrow, parameters.wide, parameters.scales, parameters.mean)
    return packed, _native.encode_trellis(np.ascontiguousarray(rows), *of_table, span_rows, packed)


def encode_quickly(rows, row_format, parameters):
    """What trellis.encode does."""
    return encode(rows, (len(rows), row_format.row_bytes), parameters)[0]


def row_sizes(d):
    least, most = -(-LEAST_BITS * d // 8) + 1, -(-MOST_BITS * d // 8) + 1
    return sorted({least, d // 2 + 4, (least + d // 2 + 4) // 2, (d // 2 + 4 + most) // 2, most, most + 3} - {0, 1})


def make_rows(rng, d):
    """33 rows of many kinds, and the mean that they have."""
    normal = rng.normal(size=(33, d))
    mean = rng.normal(size=d).astype(F32)
    normal[3] = rng.laplace(size=d)
    normal[4:8] = rng.laplace(size=(4, d)) * [[0.01], [0.1], [10], [300]]
    normal[9] = 0.7
    normal[10] *= 1e-6
    normal[11] *= 1e-30
    normal[12] = np.where(np.arange(d) == d // 2, 5.0, 0.0)
    normal[13] = np.where(np.arange(d) == 0, 5.0, 1e-3 * normal[13])
    normal[15] = np.sign(normal[15])
    normal[16] = np.linspace(-1, 1, d)
    rows = (normal + mean).astype(F32)
    rows[1] = mean
    rows[2] = 0.0
    rows[32] = 1.5
    return rows, mean


def fit(rows, row_format, mean):
    largest = np.abs(rows - mean).max(axis=1)
    bounds = float(largest[largest > 0].min()), float(largest.max())
    # Any levels will do, so long as they look like a table's.
    return trellis_search.fit(rows[:24], row_format, bounds, mean, encode_quickly)


def check(rows, row_format, parameters, wanted=None):
    values = rows if rows.dtype != np.uint16 else (rows.astype(np.uint32) << 16).view(F32)
    values = values.astype(F32)
    if wanted is None:
        wanted = trellis_search.encode(values, row_format, parameters)
    packed, (fault, _, sums) = encode(rows, wanted.shape, parameters)
    np.testing.assert_array_equal(packed, wanted)
    assert fault == 0
    assert len(sums) == -(-len(rows) // 64)
    wide = values.astype(np.float64)
    difference = values - trellis.decode(wanted, row_format, parameters)
    np.testing.assert_allclose(sum(span[0] for span in sums), np.square(difference, dtype=np.float64).sum(), 1e-12)
    np.testing.assert_allclose(sum(span[1] for span in sums), np.square(wide).sum(), 1e-12)
    return sums


@pytest.fixture(scope="module")
def fitted():
    """Rows and parameters by width and bytes of a row, which take long to fit."""
    known = {}

    def find(d, row_bytes):
        if (d, row_bytes) not in known:
            rows, mean = make_rows(np.random.default_rng(d), d)
            row_format = TrellisFormat(d, row_bytes)
            known[d, row_bytes] = rows, row_format, fit(rows, row_format, mean)
        return known[d, row_bytes]

    return find


@pytest.fixture(scope="module")
def wanted(fitted):
    """What the specification makes of these rows."""
    known = {}

    def find(d, row_bytes):
        if (d, row_bytes) not in known:
            known[d, row_bytes] = trellis_search.encode(*fitted(d, row_bytes))
        return known[d, row_bytes]

    return find


@pytest.mark.parametrize(
    ("d", "row_bytes"), [(d, size) for d in (4, 5, 16, 17, 31, 33, 64, 100, 130) for size in row_sizes(d)]
)
def test_bytes_are_the_specification_s(isa, fitted, wanted, d, row_bytes):
    rows, row_format, parameters = fitted(d, row_bytes)
    check(rows, row_format, parameters, wanted(d, row_bytes))


def make_wide(d, row_bytes, count):
    """Rows of one scale, which is all that is tried of them."""
    rng = np.random.default_rng(d)
    rows, mean, row_format = (
        rng.normal(size=(count, d)).astype(F32),
        rng.normal(size=d).astype(F32),
        TrellisFormat(d, row_bytes),
    )
    largest = float(np.abs(rows - mean).max())
    levels = trellis_search._make_shape(row_format, 0.45)
    scales = np.where(np.arange(256) > 0, F32(largest), F32(0))
    return rows, row_format, TrellisParameters(*levels, scales, mean)


@pytest.fixture(scope="module")
def of_language_models():
    """A row of 5,120 values and its bytes, by the specification: each walk takes it a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis_search, "MOST_TRIES", 2)
        wide = make_wide(5120, 2564 + 100, 1)
        return *wide, trellis_search.encode(*wide)


def test_a_row_of_5120_values(isa, of_language_models):
    check(*of_language_models)


@pytest.mark.parametrize(("d", "row_bytes"), [(10752, 5380), (65536, 32772), (65536, 1 << 15)])
def test_the_widest_rows(isa, d, row_bytes):
    wide = make_wide(d, row_bytes, 3)
    wanted = encode_quickly(*wide)
    check(*wide, wanted)
    _native.use_isa("portable")
    np.testing.assert_array_equal(encode_quickly(*wide), wanted)
    rows, row_format, parameters = wide
    errors = np.square(rows - trellis.decode(wanted, row_format, parameters))
    # The end of a path is as good as its beginning.
    np.testing.assert_allclose(errors[:, : d // 8].mean(), errors[:, -(d // 8) :].mean(), rtol=0.1)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32, 33])
def test_any_number_of_rows(isa, fitted, count):
    rows, row_format, parameters = fitted(17, 12)
    check(rows[:count], row_format, parameters)


def test_spans_and_threads(isa, fitted, restore_threads, rng):
    rows, row_format, parameters = fitted(33, 20)
    many = np.concatenate([rows * F32(scale) for scale in rng.uniform(0.5, 2.0, 8)])
    answers = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        answers.append(check(many, row_format, parameters))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_16_bit_rows(isa, fitted, dtype):
    rows, row_format, parameters = fitted(33, 20)
    narrow = rows.astype(np.float16) if dtype == np.float16 else (rows.view(np.uint32) >> 16).astype(np.uint16)
    check(narrow, row_format, parameters)


@pytest.mark.parametrize("row_bytes", [20, 26, 36, 43])
def test_rows_that_the_scales_do_not_reach(isa, fitted, row_bytes):
    """The nearest of levels is then a matter of how errors round."""
    _, row_format, parameters = fitted(33, row_bytes)
    rows, mean = make_rows(np.random.default_rng(1), 33)
    rows = (rows - mean) * F32(10.0) ** np.arange(-16, 17, dtype=F32)[:, None] * parameters.scales[-1] + mean
    check(rows, row_format, parameters)


@pytest.mark.parametrize("kind", ["equal", "zero", "close", "tiny", "huge"])
def test_levels_that_are_hard_to_tell_apart(isa, fitted, kind):
    rows, row_format, fitted_parameters = fitted(33, 20)
    made = []
    for levels in (fitted_parameters.narrow, fitted_parameters.wide):
        few = np.repeat(levels[::8], 8)
        close = few.copy()
        for k in range(1, len(close)):
            close[k] = max(close[k], np.nextafter(close[k - 1], F32(np.inf)))
        kinds = {
            "equal": few,
            "zero": 0 * levels,
            "close": close,
            "tiny": levels * F32(1e-25),
            "huge": levels * F32(1e25),
        }
        made.append(kinds[kind])
    check(rows, row_format, TrellisParameters(*made, fitted_parameters.scales, fitted_parameters.mean))


def test_values_next_to_every_boundary(isa, fitted):
    """The values next to and at equal distance from two levels of a subset, in units of the scale: 1, so exactly."""
    _, row_format, parameters = fitted(33, 20)
    scales = np.full(256, 1.0, F32)
    scales[0] = 0
    for levels in (parameters.narrow, parameters.wide):
        middle = (levels[:-4] + levels[4:]) * F32(0.5)
        ranks = middle.view(np.int32)[:, None] + np.arange(-16, 17, dtype=np.int32)
        rows = np.ascontiguousarray(np.resize(ranks.view(F32), (len(middle), 33)))
        check(rows, row_format, TrellisParameters(parameters.narrow, parameters.wide, scales, np.zeros(33, F32)))


def test_rows_that_are_all_the_mean(isa):
    row_format = TrellisFormat(16, 12)
    levels = [np.linspace(-1, 1, count, dtype=F32) for count in row_format.num_levels]
    parameters = TrellisParameters(*levels, np.zeros(256, F32), np.full(16, 0.3, F32))
    check(np.full((3, 16), 0.3, F32), row_format, parameters)
    check(np.full((3, 16), 0.4, F32), row_format, parameters)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 16, 37])
def test_values_that_are_not_finite(isa, fitted, bad, row):
    rows, row_format, parameters = fitted(17, 12)
    many = np.concatenate([rows, rows])
    many[row, 5] = bad
    many[50, 3] = bad
    _, (fault, faulty_row, _) = encode(many, (len(many), row_format.row_bytes), parameters)
    assert (fault, faulty_row) == (1, row)


def test_sizes_are_checked(fitted):
    rows, row_format, p = fitted(17, 12)
    good = [rows, p.narrow, p.wide, p.scales, p.mean, 64, np.zeros((len(rows), row_format.row_bytes), np.uint8)]
    _native.encode_trellis(*good)
    bad = {
        1: p.narrow[1:],
        2: p.wide[1:],
        3: p.scales[1:],
        4: p.mean[1:],
        5: 33,
        6: np.zeros((len(rows) - 1, row_format.row_bytes), np.uint8),
    }
    for position, value in bad.items():
        with pytest.raises(ValueError, match=r"must|wrong"):
            _native.encode_trellis(*good[:position], value, *good[position + 1 :])
    with pytest.raises(ValueError, match="too short"):
        _native.encode_trellis(*good[:-1], np.zeros((len(rows), 5), np.uint8))

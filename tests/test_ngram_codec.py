"""exllamav3's codec by its definition, bit by bit; the search for its codes; the errors that it is known to have."""

import numpy as np
import pytest

from benchmarks import ngram_codec
from benchmarks.ngram_codec import LEVELS, decode, encode, find_states

# Normalized l2 loss of N(0, 1), d = 160, of an encoder by the same formulas that somebody else wrote.
KNOWN = {2: 0.2600, 3: 0.1311, 4: 0.0657, 5: 0.0333, 6: 0.0167}


def decode_slowly(row, d, bits):
    """Read one row's states bit by bit: bit m of state i is bit m mod K of the code m // K places before code i."""
    words = np.frombuffer(row.tobytes(), "<u2")
    scale = float(words[:1].view("<f2")[0])
    ring = [int(words[1 + b // 16]) >> (b % 16) & 1 for b in range(d * bits)]
    values = []
    for i in range(d):
        state = sum(ring[(i - m // bits) % d * bits + m % bits] << m for m in range(16))
        product = state * 0x83DCD12D % 2**32
        total = sum(product.to_bytes(4, "little"))
        # Float64 has no need to round: this is one rounding to float16, as of a fused multiply-add.
        values.append(float(np.float16((1024 + total) * 0.00676727294921875 - 10.3828125)) * scale)
    return values


def test_levels_by_hand():
    assert LEVELS[0] == 1024 * 0.00676727294921875 - 10.3828125 == -3.453125  # exact
    # The bytes of 0x83DCD12D come to 605: 1629 * .006767... - 10.38... = .641075, to float16.
    assert LEVELS[1] == 0.64111328125
    assert len(np.unique(LEVELS)) == 913 and LEVELS.max() == 3.34765625
    assert LEVELS.mean() == pytest.approx(-0.0019, abs=1e-4) and LEVELS.std() == pytest.approx(1.0003, abs=1e-4)


def test_a_row_by_hand():
    """Four codes of 4 bits, 4, 3, 2, 1 from the lowest bit up; each state begins, at its top, one code later."""
    row = np.array([[0x4000, 0x1234]], "<u2").view(np.uint8)  # scale 2
    states = [0x3214, 0x2143, 0x1432, 0x4321]
    np.testing.assert_array_equal(decode(row, 4)[0], 2 * LEVELS[states])


@pytest.mark.parametrize("d", [16, 48, 160])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_decoded_by_definition(rng, bits, d):
    packed = rng.integers(0, 256, (2, 2 + d * bits // 8), np.uint8)
    packed[:, :2] = np.float16([[0.75], [-3e-5]]).view(np.uint8)
    np.testing.assert_array_equal(decode(packed, bits), [decode_slowly(row, d, bits) for row in packed])


@pytest.mark.parametrize(("bits", "row_bytes"), [(2, 42), (3, 62), (4, 82), (5, 102), (6, 122)])
def test_rows_have_the_bytes_and_the_error_that_are_known(rng, bits, row_bytes):
    """A row's error differs from another's by some per cent, so of twelve the mean by one."""
    rows = rng.standard_normal((12, 160), np.float32)
    packed = encode(rows, bits)
    assert packed.shape == (12, row_bytes) and packed.dtype == np.uint8
    loss = np.linalg.norm(decode(packed, bits) - rows) / np.linalg.norm(rows)
    assert loss == pytest.approx(KNOWN[bits], rel=0.03)


@pytest.mark.parametrize("bits", range(2, 7))
def test_the_costs_of_a_path_are_the_error_of_its_row(rng, bits):
    """The path ends where it began, and what is decoded is what it was chosen for."""
    rows = rng.standard_normal((3, 48), np.float32)
    states = find_states(rows, bits)
    nodes = states[:, -1] & ((1 << (16 - bits)) - 1)
    np.testing.assert_array_equal(states[:, 0] >> bits, nodes)
    start = np.full((3, 1 << (16 - bits)), np.inf, np.float32)
    start[np.arange(3), nodes] = 0
    costs = ngram_codec._walk(rows, start, bits)[-1, np.arange(3), nodes]
    codes = np.packbits((states[:, :, None] >> np.arange(bits) & 1).reshape(3, -1).astype(np.uint8), 1, "little")
    packed = np.concatenate([np.tile(np.float16([1]).view(np.uint8), (3, 1)), codes], axis=1)
    decoded = decode(packed, bits)
    np.testing.assert_array_equal(decoded, LEVELS[states])
    errors = np.square(decoded - rows, dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(costs, errors, rtol=48 * 2**-24)  # a sum of 48, each rounded


def test_no_other_code_is_better(rng):
    """Where the node that a path begins and ends in stays the same: that is what the search minimizes over."""
    d, bits = 32, 4
    rows = rng.standard_normal((2, d), np.float32)
    codes = find_states(rows, bits) & 15
    best = None
    for i in range(d - 3):  # the last three codes are the node
        for other in range(16):
            changed = codes.copy()
            changed[:, i] = other
            ring = (changed[:, :, None] >> np.arange(bits) & 1).reshape(2, -1).astype(np.uint8)
            packed = np.concatenate(
                [np.tile(np.float16([1]).view(np.uint8), (2, 1)), np.packbits(ring, 1, "little")], 1
            )
            errors = np.square(decode(packed, bits) - rows, dtype=np.float64).sum(axis=1)
            best = errors if best is None else np.minimum(best, errors)
    chosen = np.square(LEVELS[find_states(rows, bits)] - rows, dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(chosen, best, rtol=1e-6)


def test_rows_are_searched_alone(rng):
    """Whatever rows they are packed with."""
    rows = rng.standard_normal((6, 16), np.float32)
    np.testing.assert_array_equal(encode(rows, 3), np.concatenate([encode(rows[i : i + 1], 3) for i in range(6)]))


@pytest.mark.parametrize("factor", [0, 1e-12, 1e-3, 100])
def test_rows_of_any_size_are_packed(rng, factor):
    """Zeros too, and what is too small for a float16 scale."""
    rows = rng.standard_normal((2, 160), np.float32) * np.float32(factor)
    decoded = decode(encode(rows, 4), 4)
    if factor < 1e-6:
        np.testing.assert_array_equal(decoded, 0)
    else:
        assert np.linalg.norm(decoded - rows) < 0.08 * np.linalg.norm(rows)

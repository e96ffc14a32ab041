"""Sizes as users write them."""

import pytest

from embpack.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((7, 7), ("7", 7), (" 7 b ", 7), (1e5, 100_000), ("1e5", 100_000), ("1.5E+3", 1500)),
        *(("1k", 1000), ("1K", 1000), ("1 kB", 1000), ("1.5MB", 1_500_000), ("2 GB", 2 * 10**9), ("1t", 10**12)),
        *(("100KiB", 102_400), ("100 kib", 102_400), ("1Ki", 1024), ("1.5 MiB", 3 << 19), ("1GiB", 1 << 30)),
        *(("1TiB", 1 << 40), ("1e3 kB", 10**6), ("0.5 kB", 500), ("1.9999 kB", 1999)),
        *(("12.5 %", 125), ("12.5%", 125), ("0.1%", 1), ("100 %", 1000), ("0 %", 0), ("0", 0)),
    ],
)
def test_a_size_is_read(text, expected):
    assert parse_size(text, 1000) == expected


def test_a_share_is_exact():
    assert parse_size("14.07 %", 10_000) == 1407  # 1406.9999999999998 in floating point
    assert parse_size("100 %", 2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize(
    "wrong",
    ["", "much", "-1", "2 PB", "2 GBB", "1e", "1e-3", "1e999999999", "9" * 40, "1,000", "%", "\u0661", "nan", "k"],
)
def test_what_is_no_size_says_what_is(wrong):
    choices = r"give bytes, 1e5, or a size such as '100 KiB' or '2 GB', or a share of what is read, '12.5 %'"
    with pytest.raises(ValueError, match=f"is no size; {choices}"):
        parse_size(wrong, 1000)


def test_of_no_whole_there_is_no_share():
    with pytest.raises(
        ValueError, match=r"^'12 %' is no size; give bytes, 1e5, or a size such as '100 KiB' or '2 GB'$"
    ):
        parse_size("12 %")
    with pytest.raises(ValueError, match=r"no whole number of bytes; write a whole number, or give a unit, '12.5 MB'$"):
        parse_size("12.5")


@pytest.mark.parametrize(
    ("text", "meant"), [("12.5", "12.5 %"), (12.5, "12.5 %"), ("0.125", "12.5 %"), ("1.5", "1.5 %")]
)
def test_a_share_without_its_sign_gets_a_hint(text, meant):
    with pytest.raises(ValueError, match=rf"is no whole number of bytes; for a share of what is read write '{meant}'"):
        parse_size(text, 1000)

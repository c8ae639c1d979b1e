"""Texts with units: what is read, and that anything else is refused with the accepted forms."""

from __future__ import annotations

import pytest

from skipcost.bench.errors import BenchError
from skipcost.bench.units import MAX_SIDE, parse_bytes, parse_count, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("1.5 mib", 3 * 2**19),
        ("123B", 123),
        ("7kb", 7000),
        ("12 gb", 12 * 10**9),
        ("9007199254740993B", 2**53 + 1),
    ],
)
def test_bytes_are_read_with_their_unit(text: object, count: int) -> None:
    """GiB and GB differ, and both are taken at their word."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "GiB",
            "8 G i B",
            "-1GiB",
            "8TiB",
            "12GiBs",
            "1e400GB",
            "nanGB",
            "infB",
            "\uff18GiB",
            "0GiB",
            "0.4B",
        ),
        *("9" * 20 + "GiB", "9" * 5000 + "GiB"),
    ],
)
def test_other_sizes_in_bytes_are_refused(text: str) -> None:
    """Anything else is refused with the accepted forms."""
    with pytest.raises(BenchError, match="write 8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["12", 12, "1.5", 1.5, "12 "])
def test_bytes_without_a_unit_are_asked_for_one(text: object) -> None:
    """Who writes 12 means gigabytes, and either kind of them."""
    number = str(text).strip()

    with pytest.raises(BenchError, match=f"; {number} alone would be {number} bytes: write {number}GiB or {number}GB$"):
        parse_bytes(text)


def test_sizes_are_height_by_width() -> None:
    """One number is square, two are rows by columns."""
    assert (parse_size("512"), parse_size("480x640"), parse_size(64)) == ((512, 512), (480, 640), (64, 64))


@pytest.mark.parametrize(("text", "value"), [("15ms", 0.015), ("0.2s", 0.2), ("800us", 8e-4), ("800 µs", 8e-4)])
def test_times_are_read_with_their_unit(text: str, value: float) -> None:
    """Milliseconds, seconds and microseconds become seconds."""
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", "15", "15m", "-1ms", "0ms", "15msec", "infs", "nanms", "1e9s", "2000000s", "\u0661s"]
)
def test_other_times_are_refused(text: str) -> None:
    """A number without a unit could be seconds or milliseconds: it is refused with the accepted forms."""
    with pytest.raises(BenchError, match=r"write 15ms, 0\.2s or 800us"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "count"), [("50G", 50 * 10**9), ("31M", 31 * 10**6), ("7.5k", 7500), ("2T", 2 * 10**12), ("42", 42)]
)
def test_counts_are_read_in_powers_of_ten(text: str, count: int) -> None:
    """Parameters and MACs are counted in powers of ten."""
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "M", "31MB", "31Mi", "-3M", "1e6", "nan", "inf", "\u0663M", "9" * 20 + "G", "9" * 5000]
)
def test_other_counts_are_refused(text: str) -> None:
    """Anything else is refused with the accepted forms."""
    with pytest.raises(BenchError, match="write 50G"):
        parse_count(text)


@pytest.mark.parametrize(
    "text", ["", "x512", "512x", "5 12", "-512", "512x512x3", "31x", "0", "0x8", "8x0", "65537", "1e3", "nan", "\uff15"]
)
def test_other_image_sizes_are_refused(text: str) -> None:
    """Anything else than one or two whole numbers in range is refused with the accepted forms."""
    with pytest.raises(BenchError, match=f"write 512, or 480x640 .*, 1 to {MAX_SIDE} a side$"):
        parse_size(text)

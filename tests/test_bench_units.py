"""Texts with units: what is read, and that anything else is refused with the accepted forms."""

from __future__ import annotations

import pytest

from skipcost.bench.errors import BenchError
from skipcost.bench.units import parse_bytes, parse_count, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("1.5 mib", 3 * 2**19),
        ("123", 123),
        (123, 123),
        (1.5e9, 1_500_000_000),
        ("7kb", 7000),
    ],
)
def test_bytes_are_read_with_their_unit(text: object, count: int) -> None:
    """GiB and GB differ, and both are taken at their word."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 G i B", "-1GiB", "8TiB"])
def test_other_sizes_in_bytes_are_refused(text: str) -> None:
    """Anything else is refused with the accepted forms."""
    with pytest.raises(BenchError, match="write 8GiB"):
        parse_bytes(text)


def test_sizes_are_height_by_width() -> None:
    """One number is square, two are rows by columns."""
    assert (parse_size("512"), parse_size("480x640"), parse_size(64)) == ((512, 512), (480, 640), (64, 64))


@pytest.mark.parametrize(("text", "value"), [("15ms", 0.015), ("0.2s", 0.2), ("800us", 8e-4), ("800 µs", 8e-4)])
def test_times_are_read_with_their_unit(text: str, value: float) -> None:
    """Milliseconds, seconds and microseconds become seconds."""
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "15", "15m", "-1ms", "0ms", "15msec"])
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


@pytest.mark.parametrize("text", ["", "M", "31MB", "31Mi", "-3M", "1e6"])
def test_other_counts_are_refused(text: str) -> None:
    """Anything else is refused with the accepted forms."""
    with pytest.raises(BenchError, match="write 50G"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "x512", "512x", "5 12", "-512", "512x512x3"])
def test_other_image_sizes_are_refused(text: str) -> None:
    """Anything else than one or two whole numbers is refused with the accepted forms."""
    with pytest.raises(BenchError, match="write 512, or 480x640"):
        parse_size(text)

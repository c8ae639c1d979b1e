"""What the script prints and reads, beside what Python prints and reads: one rule, held on many values."""

from __future__ import annotations

import random
import statistics

import pytest
from live_page import LivePage
from places import ROOT
from selenium.webdriver import Chrome

from skipcost.bench import figures
from skipcost.bench.errors import BenchError
from skipcost.bench.units import parse_bytes, parse_count, parse_seconds

FIGURES = (ROOT / "reports/templates/figures.js").read_text()
READERS = {"bytes": parse_bytes, "seconds": parse_seconds, "count": parse_count, "macs": parse_count}


@pytest.fixture(scope="module")
def page(browser: Chrome, address: str) -> LivePage:
    """Any page: the functions are given with each call."""
    return LivePage(browser, address)


def values_of(unit: str) -> list[float]:
    """Numbers of a unit over its whole range; many that lie between two texts, and borders of prefixes."""
    luck = random.Random(unit)  # noqa: S311 - made-up numbers
    whole = [float(round(10 ** luck.uniform(0, 15))) for _ in range(600)]
    ties = [factor * (base + 0.125 * odd) for factor in (1.0, 2**10, 2**20, 2**30, 1e3, 1e6, 1e9)
            for base in (1, 2, 12, 15, 500) for odd in range(1, 8)]  # fmt: skip
    borders = [factor * near for factor in (1e3, 1e6, 1e9, 1e12, 2**10, 2**20, 2**30)
               for near in (1, 0.9994, 0.9995, 0.9996, 9.995, 99.95, 999.5)]  # fmt: skip
    if unit == "seconds":
        return [
            0.0,
            *(10 ** luck.uniform(-8, 4) for _ in range(900)),
            *(tie * 1e-3 for tie in ties if tie < 1e6),
            59.95,
            100.0,
            99.96,
        ]
    return [0.0, *whole, *(float(int(each)) for each in (*ties, *borders))]


@pytest.mark.parametrize("unit", ["count", "macs", "bytes", "seconds", "pixels"])
def test_numbers_are_written_as_python_writes_them(page: LivePage, unit: str) -> None:
    """Ties to the even digit, three significant ones, the same prefixes: text by text."""
    values = values_of(unit)

    written = page.js(f"{FIGURES}; return arguments[0].map((value) => FORMATS[arguments[1]](value))", values, unit)

    assert written == [figures.text(value, unit) for value in values]


@pytest.mark.parametrize("unit", READERS)
def test_limits_are_read_as_the_command_line_reads_them(page: LivePage, unit: str) -> None:
    """What is refused there is refused here, what is read is the same number."""
    numbers = ("64", "1.5", " 7 ", "0.25", "0", "1e3", "-1", "", "x", "12345678901234567890123", "1.", ".5", "٣")
    suffixes = (
        "",
        "B",
        "KB",
        "mb",
        "GiB",
        " MiB",
        "kib",
        "TiB",
        "us",
        "µs",
        "ms",
        "s",
        "S",
        "min",
        "k",
        "K",
        "M",
        "G",
        "t",
    )
    texts = [number + suffix for number in numbers for suffix in suffixes]

    read = page.js(f"{FIGURES}; return arguments[0].map((text) => parsed(text, arguments[1]))", texts, unit)

    assert read == [_by_python(text, unit) for text in texts]


def _by_python(text: str, unit: str) -> float | None:
    try:
        return READERS[unit](text)
    except BenchError:
        return None


def test_a_number_is_the_median_of_its_samples(page: LivePage) -> None:
    """Odd and even counts, in any order."""
    luck = random.Random(0)  # noqa: S311 - made-up numbers
    samples = [[luck.random() for _ in range(count)] for count in range(1, 30)]

    found = page.js(f"{FIGURES}; return arguments[0].map(median)", samples)

    assert found == [statistics.median(each) for each in samples]

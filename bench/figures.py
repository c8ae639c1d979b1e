"""Base units to words, for tables and messages. Nothing inside the suite is stored in any other unit than the base."""

from __future__ import annotations

import math
from collections.abc import Callable

DIGITS = 3  # significant ones, where nothing is compared
MOST_DIGITS = 17  # tell any two floating-point numbers apart
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _scaled(value: float, unit: str, digits: int) -> str:
    for factor, prefix in _DECIMAL:
        if abs(value) >= factor:
            return f"{_rounded(value / factor, digits)} {prefix}{unit}".rstrip()
    return f"{value:.{max(digits, 6)}g} {unit}".rstrip()


def _rounded(value: float, digits: int) -> str:
    """So many significant figures, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def seconds(value: float, digits: int = DIGITS) -> str:
    """1.23 ms, 45.6 s, 2 min 5 s."""
    if value < 1e-3:  # noqa: PLR2004 - a millisecond
        return f"{_rounded(value * 1e6, digits)} µs"
    if value < 1:
        return f"{_rounded(value * 1e3, digits)} ms"
    if value < 100 or digits > DIGITS:  # noqa: PLR2004 - beyond this minutes read better
        return f"{_rounded(value, digits)} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def size(value: float, digits: int = DIGITS) -> str:
    """Bytes in powers of two: 512 B, 1.50 KiB, 7.25 MiB, 23.9 GiB."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{_rounded(value / factor, digits)} {unit}"
    return f"{value:.0f} B"


FORMATS: dict[str, Callable[[float, int], str]] = {
    "count": lambda value, digits: _scaled(value, "", digits),
    "macs": lambda value, digits: _scaled(value, "MAC", digits),
    "bytes": size,
    "seconds": seconds,
    "pixels": lambda value, _: f"{value:.0f} px",
}


def text(value: float | None, unit: str, digits: int = DIGITS) -> str:
    """A value of METRICS's unit in words; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return FORMATS[unit](value, digits)


def apart(first: float, second: float, unit: str) -> tuple[str, str]:
    """Two values that a sentence compares, in words, with as many digits as it takes for unequal ones to differ."""
    for digits in range(DIGITS, MOST_DIGITS + 1):
        texts = text(first, unit, digits), text(second, unit, digits)
        if texts[0] != texts[1] or first == second:
            break
    return texts

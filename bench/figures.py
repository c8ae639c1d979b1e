"""Base units to words, for tables and messages. Nothing inside the suite is stored in any other unit than the base."""

from __future__ import annotations

import math
from collections.abc import Callable

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in _DECIMAL:
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}{unit}".rstrip()
    return f"{value:g} {unit}".rstrip()


def _three(value: float) -> str:
    """Three significant figures, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def seconds(value: float) -> str:
    """1.23 ms, 45.6 s, 2 min 5 s."""
    if value < 1e-3:  # noqa: PLR2004 - a millisecond
        return f"{_three(value * 1e6)} µs"
    if value < 1:
        return f"{_three(value * 1e3)} ms"
    if value < 100:  # noqa: PLR2004 - beyond this minutes read better
        return f"{_three(value)} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def size(value: float) -> str:
    """Bytes in powers of two: 512 B, 1.50 KiB, 7.25 MiB, 23.9 GiB."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


FORMATS: dict[str, Callable[[float], str]] = {
    "count": lambda value: _scaled(value, ""),
    "macs": lambda value: _scaled(value, "MAC"),
    "bytes": size,
    "seconds": seconds,
    "pixels": lambda value: f"{value:.0f} px",
}


def text(value: float | None, unit: str) -> str:
    """A value of METRICS's unit in words; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return FORMATS[unit](value)

"""Texts with units, as people write them, to base units: bytes, seconds, counts, and the sides of an image.

The way back, from a number to words, is `figures`. BenchError in one sentence, with the accepted forms, for anything
that is not understood: a limit read wrongly would answer another question. Digits are ASCII's: others look like them
and are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from skipcost.bench.errors import BenchError

MAX_SIDE = 65536  # pixels, of a case's image
MAX_BATCH, MAX_THREADS = 65536, 1024  # of a case
MOST = 2**63 - 1  # bytes, and whatever else is counted: what 64 bits hold
MOST_SECONDS = 10**6  # some twelve days
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*"


def parse_bytes(text: object) -> int:
    """Read "8GiB" (2**30 bytes each) or "8GB" (10**9); a bare number is refused: few who write 12 mean 12 bytes."""
    found = _read(str(text).upper(), _BYTES)
    if found is None or not 1 <= found <= MOST:
        bare = re.fullmatch(_NUMBER, str(text))
        asked = f"; {bare[1]} alone would be {bare[1]} bytes: write {bare[1]}GiB or {bare[1]}GB" if bare else ""
        message = f"{text!r} is not a size in bytes: write 8GiB (2**30 bytes each) or 8GB (10**9), 1B or more{asked}"
        raise BenchError(message)
    return int(found)


def parse_seconds(text: object) -> float:
    """Read "15ms", "0.2s" or "800us"; a bare number is refused, since nobody can tell its unit."""
    found = _read(str(text), _SECONDS)
    if not found or found > MOST_SECONDS:
        message = f"{text!r} is not a length of time: write 15ms, 0.2s or 800us, {MOST_SECONDS:.0f}s at most"
        raise BenchError(message)
    return found


def parse_count(text: object) -> int:
    """Read "50G", "31M", "1.5k" (powers of ten) or a whole number."""
    found = _read(str(text).upper(), _COUNTS)
    if found is None or found > MOST:
        message = f"{text!r} is not a count: write 50G (10**9 each), 31M (10**6), 7.5k (10**3), 2T, or a whole number"
        raise BenchError(message)
    return int(found)


def parse_number(name: str, text: str, low: float, high: float, kind: type[int | float] = int) -> float:
    """Read a number from `low` to `high`, which nan is not; `name` is the option's."""
    try:
        value = kind(text) if text.isascii() else math.nan
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        message = f"{name} {text!r} is not a {'whole ' if kind is int else ''}number from {low} to {high}"
        raise BenchError(message)
    return value


def _read(text: str, units: Mapping[str, float]) -> float | None:
    """A number with one of the units in base units; exact where it is whole. None for anything else."""
    match = re.fullmatch(_NUMBER + r"(\D*?)\s*", text)
    if not match or match[2] not in units:
        return None
    return (float(match[1]) if "." in match[1] else int(match[1])) * units[match[2]]


def parse_size(value: object) -> tuple[int, int]:
    """Read an image size: 512 is square, "480x640" is height x width."""
    match = re.fullmatch(r"([0-9]{1,20})(?:x([0-9]{1,20}))?", str(value))
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        message = f"size={value!r} is not an image size: write 512, or 480x640 (height x width), 1 to {MAX_SIDE} a side"
        raise BenchError(message)
    return height, width

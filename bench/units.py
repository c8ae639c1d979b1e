"""Texts with units, as people write them, to base units: bytes, seconds, counts, and the sides of an image.

The way back, from a number to words, is `figures`. BenchError in one sentence, with the accepted forms, for anything
that is not understood: a limit read wrongly would answer another question.
"""

from __future__ import annotations

import re

from skipcost.bench.errors import BenchError

_BYTES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_COUNTS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"


def parse_bytes(text: object) -> int:
    """Read "8GiB" (2**30 bytes each) or "8GB" (10**9)."""
    match = re.fullmatch(_NUMBER + r"([KMG]?I?B?)\s*", str(text).upper())
    if not match or match[2] not in _BYTES:
        message = (
            f"{text!r} is not a size in bytes: write 8GiB (2**30 bytes each) or 8GB (10**9), KiB, KB, MiB, MB, or bytes"
        )
        raise BenchError(message)
    return int(float(match[1]) * _BYTES[match[2]])


def parse_seconds(text: object) -> float:
    """Read "15ms", "0.2s" or "800us"; a bare number is refused, since nobody can tell its unit."""
    match = re.fullmatch(_NUMBER + r"(us|µs|ms|s)\s*", str(text))
    if not match or not float(match[1]):
        message = f"{text!r} is not a length of time: write 15ms, 0.2s or 800us"
        raise BenchError(message)
    return float(match[1]) * _SECONDS[match[2]]


def parse_count(text: object) -> int:
    """Read "50G", "31M", "1.5k" (powers of ten) or a whole number."""
    match = re.fullmatch(_NUMBER + r"([KMGT]?)\s*", str(text).upper())
    if not match:
        message = f"{text!r} is not a count: write 50G (10**9 each), 31M (10**6), 7.5k (10**3), 2T, or a whole number"
        raise BenchError(message)
    return int(float(match[1]) * _COUNTS[match[2]])


def parse_size(value: object) -> tuple[int, int]:
    """Read an image size: 512 is square, "480x640" is height x width."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
    if not match:
        message = f"size={value!r} is not an image size: write 512, or 480x640 (height x width)"
        raise BenchError(message)
    return int(match[1]), int(match[2] or match[1])

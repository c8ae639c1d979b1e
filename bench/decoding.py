"""What every reader of a file shares: JSON that a file can hold, and the kinds of the fields that are read of it.

A file may be of another version, or edited; what is wrong with it is a ValueError here, and one sentence with the
file's name where it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any

LARGEST = 2**63  # what tables hold of a whole number


def parse_json(text: str) -> Any:
    """Read JSON; ValueError where it is none, and for nesting that no file of ours has."""
    try:
        return json.loads(text)
    except RecursionError:
        message = "it is nested too deeply"
        raise ValueError(message) from None
    except TypeError:
        message = f"{text!r:.40} is no text"
        raise ValueError(message) from None


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that can be computed with, NaN and infinities among them."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, float)


def is_finite(value: object) -> bool:
    """Whether a value of JSON is a number, and neither NaN nor infinite."""
    return is_number(value) and math.isfinite(float(value))  # type: ignore[arg-type]  # a number, then


def check_kind(name: str, value: object, kind: type | UnionType) -> None:
    """Refuse a value of another kind; float takes any finite number, and a bool is no number."""
    if kind is int:
        fits = is_finite(value) and isinstance(value, int)
    elif kind in (float, float | None):
        fits = is_finite(value) or (value is None and kind is not float)
    else:
        fits = isinstance(value, kind)
    if not fits:
        words = getattr(kind, "__name__", str(kind))
        message = f"{name} is {value!r:.60}, not of the kind {words}"
        raise ValueError(message)


def check_fields(values: Any, kinds: Mapping[str, type | UnionType], needed: tuple[str, ...] = ()) -> None:
    """Refuse what is no JSON object, lacks a field of `needed`, or has a field of `kinds` of another kind."""
    check_kind("it", values, dict)
    for name in needed:
        if name not in values:
            message = f"it has no {name}"
            raise ValueError(message)
    for name, kind in kinds.items():
        if name in values:
            check_kind(name, values[name], kind)


def check_members(name: str, values: Any, kind: type | UnionType) -> None:
    """Refuse a list, or the values of an object, in which a member is of another kind."""
    check_kind(name, values, list | tuple | dict)
    for each in values.values() if isinstance(values, dict) else values:
        check_kind(f"a value in {name}", each, kind)

"""A package's door: its public names, each imported from its module when it is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def door(package: str, names: Mapping[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__`; `names` has those of each module, which lies within the package."""
    where = {name: module for module, each in names.items() for name in each}

    def find(name: str) -> Any:
        if name not in where:
            message = f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(where))}"
            raise AttributeError(message)
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    return find, lambda: sorted(where)

"""What the tests of compiled models share: nothing compiled before, and a list of what ran at low resolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from skipcost.kernels.low_resolution.composed import add_composed
from skipcost.kernels.low_resolution.tap_first import tap_first
from skipcost.kernels.rewriting import enlarged


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test compile anew, and rewrite maps that are small enough for tests."""
    for name in ("FEWEST_MACS", "FEWEST_SAVED", "FEWEST_PIXELS"):
        monkeypatch.setattr(enlarged, name, 0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the small maps that are convolved at low resolution, in order."""
    found: list[tuple[int, ...]] = []

    def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(tuple(x.shape))
        return tap_first(x, *args, **kwargs)

    monkeypatch.setattr(enlarged, "tap_first", record)
    return found


@pytest.fixture
def composing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the small maps that composed weights are run on, in order; small weights are composed as well."""
    for name in ("FEWEST_SAVED", "FEWEST_PIXELS"):
        monkeypatch.setattr(enlarged, name, 0)
    found: list[tuple[int, ...]] = []

    def record(result: Tensor, x: Tensor, *given: Any) -> None:
        found.append(tuple(x.shape))
        add_composed(result, x, *given)

    monkeypatch.setattr(enlarged, "add_composed", record)
    return found

"""A pytest plugin: the fixture `assert_cost` holds any module to absolute budgets, in one line of anybody's tests.

def test_cost(assert_cost):
    assert_cost(MyNet(), torch.zeros(1, 3, 256, 256), params="2M", conv_macs="5G", peak_bytes="300MiB")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn


@pytest.fixture
def assert_cost() -> Callable[..., None]:
    """Hold `model(*inputs)` to budgets: `params`, `conv_macs`, `activations`, `peak_bytes`; see `bench.budget`.

    `mode` is "inference" or "training". Fails with a sentence for each budget that is passed, which names the layer
    that costs most; ValueError where no budget is given or one is no number.
    """
    from skipcost.bench.measure import budget as costs  # noqa: PLC0415 - imports torch, which not every user's run needs

    def check(model: nn.Module, *inputs: Any, mode: str = "inference", **budgets: int | str) -> None:
        __tracebackhide__ = True
        unknown = [name for name in budgets if name not in costs.UNITS]
        if unknown or not budgets:
            given = f"{unknown[0]!r} is no metric" if unknown else "no budget is given"
            message = f"assert_cost: {given}; accepted: {', '.join(costs.UNITS)}"
            raise ValueError(message)
        limits = {name: costs.read_budget(name, value) for name, value in budgets.items()}
        sentences = costs.passed(costs.cost_of(model, inputs, mode), limits, type(model).__name__)
        if sentences:
            pytest.fail("\n".join(sentences), pytrace=False)

    return check

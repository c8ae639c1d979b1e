"""A network of an answer in a line of its table: figures in words, and what nobody can tell."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.console import Screen
from skipcost.bench.fitting.limits import LIMITS, Standing
from skipcost.bench.fitting.table import cells, columns_of, print_left_out, standing_facts
from skipcost.unet_models import ModelSpec

MEMORY, LATENCY = LIMITS["memory"], LIMITS["latency"]
ROW: dict[str, Any] = {"label": "unet/d2/w8/concat", "backend": "eager", "batch": 4}


@pytest.mark.parametrize(
    ("known", "shown"),
    [
        ({"memory_bytes": 3 * 2**20}, ["3.00 MiB", "not run"]),
        ({"memory_bytes": 3 * 2**20, "memory_bytes_middle": 2**20}, ["1.00 MiB (3.00 MiB)", "not run"]),
        ({"memory_bytes": 3 * 2**20, "latency_s": None}, ["3.00 MiB", "unknown"]),
        ({"memory_bytes": 2**30 + 1}, ["1.000000001 GiB", "not run"]),  # breaks the limit by a byte
    ],
)
def test_figures_are_words_with_the_digits_that_they_need(known: dict[str, Any], shown: list[str]) -> None:
    """A middle one stands before the one that is checked; what breaks its limit is seen to."""
    line = cells(ROW | known, [MEMORY, LATENCY], {"memory_bytes": 2**30})

    assert line == ["unet/d2/w8/concat", "4", *shown]


def test_a_backend_is_named_unless_it_is_the_usual_one() -> None:
    """Two rows of one network differ by it."""
    assert cells(ROW | {"backend": "rewritten"}, [], {}) == ["unet/d2/w8/concat, rewritten", "4"]


def test_columns_are_those_that_an_answer_has() -> None:
    """In the order of LIMITS."""
    assert columns_of({"origins": {"latency_s": "measured", "params": "counted"}}) == [LIMITS["params"], LATENCY]


def test_an_infinite_figure_is_none_in_json() -> None:
    """JSON has no infinity."""
    standing = Standing(Case(spec=ModelSpec(depth=2, width=8), height=64, width=64), {"latency": math.inf}, {})

    assert standing_facts(standing)["latency_s"] is None


def test_what_was_left_out_is_counted_by_its_reason() -> None:
    """One line a reason, with the first network that it holds for."""
    written = io.StringIO()

    print_left_out({"a": "too small", "b": "too large", "c": "too small"}, Screen(file=written))

    assert written.getvalue().splitlines() == ["left out: a and 1 more: too small", "left out: b: too large"]

"""Two figures that are compared never look the same, wherever a command puts them side by side."""

from __future__ import annotations

import io
from typing import Any

import pytest

from skipcost.bench.commands.plan import print_preview
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.console import Screen
from skipcost.bench.figures import apart
from skipcost.bench.fitting.limits import LIMITS
from skipcost.bench.fitting.table import cells

LIMIT, PEAK = 12 * 2**30, int(12.03 * 2**30)


@pytest.mark.parametrize(
    ("first", "second", "unit", "shown"),
    [
        (12 * 2**30, 12.03 * 2**30, "bytes", ("12.00 GiB", "12.03 GiB")),
        (12 * 2**30, 12 * 2**30 + 1, "bytes", ("12.000000000 GiB", "12.000000001 GiB")),
        (8 * 2**30, 24 * 2**30, "bytes", ("8.00 GiB", "24.0 GiB")),
        (1_000_000, 1_000_400, "count", ("1.0000 M", "1.0004 M")),
        (0.0150, 0.01501, "seconds", ("15.00 ms", "15.01 ms")),
        (125.0, 125.4, "seconds", ("125.0 s", "125.4 s")),
        (5990, 5990, "count", ("5.99 k", "5.99 k")),
    ],
)
def test_figures_that_are_compared_have_the_digits_that_tell_them_apart(
    first: float, second: float, unit: str, shown: tuple[str, str]
) -> None:
    """Three digits, or as many as it takes for unequal values to look unequal."""
    assert apart(first, second, unit) == shown


def test_times_of_a_verdict_have_the_digits_of_their_difference() -> None:
    """A regression from 12.3 ms to 12.3 ms would explain nothing; counts are whole."""
    slower = Verdict("case", "latency_s", "regressed", 0.01231, 0.01234)

    assert slower.cells()[2:4] == ("12.31 ms", "12.34 ms")
    assert Verdict("case", "latency_s", "new", None, 0.01234).cells()[2:4] == ("-", "12.3 ms")
    assert Verdict("case", "params", "regressed", 1_000_000, 1_000_001).cells()[2:4] == ("1,000,000", "1,000,001")


def test_a_figure_that_breaks_its_limit_is_seen_to() -> None:
    """Under a limit of 12.0 GiB, 12.03 GiB is not written as 12.0 GiB."""
    memory = LIMITS["memory"]
    row: dict[str, Any] = {"label": "unet/d1/w8/sum", "backend": "eager", "batch": 1, memory.key: PEAK}

    assert cells(row, [memory], {memory.key: LIMIT}) == ["unet/d1/w8/sum", "1", "12.03 GiB"]
    assert cells(row, [memory], {}) == ["unet/d1/w8/sum", "1", "12.0 GiB"]


def test_a_peak_that_will_not_fit_is_seen_to() -> None:
    """`plan` names the limit below the table."""
    case = {"name": "unet", "aliases": [], "refused": "", "note": "", "predicted_bytes": PEAK, "will_not_fit": True}
    facts = {"cases": [case], "planned": 1, "left_out": {}, "memory_limit_bytes": LIMIT, "time_s": 1.0, "slow": []}
    console = Screen(file=io.StringIO(), width=120)

    print_preview(facts, console)

    assert "12.03 GiB" in console.file.getvalue()  # type: ignore[attr-defined]

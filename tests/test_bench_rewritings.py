"""`skipcost rewritings`: both forms of every edge, and the sum of what runs."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from skipcost.bench.cases import Case
from skipcost.bench.cli import app
from skipcost.bench.errors import BenchError
from skipcost.bench.metrics import METRICS
from skipcost.bench.rewritings_command import facts_of, print_rewritings
from skipcost.kernels.timing import Budget
from skipcost.unet_models import VARIANTS, ModelSpec


def _case(variant: str, **values: Any) -> Case:
    return Case(ModelSpec(variant, 2, 32, upsample="bilinear"), 3, 64, 48, backend="rewritten", **values)


def _shown(facts: dict[str, Any]) -> str:
    text = io.StringIO()
    print_rewritings(facts, Console(file=text, width=300))
    return text.getvalue()


@pytest.mark.parametrize("variant", VARIANTS)
def test_edges_add_up_to_what_runs(variant: str) -> None:
    """The metric's number is conv_macs less what the edges save."""
    case = _case(variant)

    facts = facts_of(case)

    saved = sum(each["direct_macs"] - each["tap_macs"] for each in facts["edges"] if each["taken"])
    assert facts["edges"]
    assert facts["executed_macs"] == facts["conv_macs"] - saved
    assert METRICS["executed_macs"].measure(case, Budget())[0].samples == (facts["executed_macs"],)


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_shows_every_edge_with_its_reason(variant: str) -> None:
    """Also those that are left as they are."""
    facts = facts_of(_case(variant))

    shown = _shown(facts)

    assert all(each["edge"] in shown and each["why"] in shown for each in facts["edges"])


def test_a_network_without_such_edges_says_so() -> None:
    """Transposed convolutions are not rewritten."""
    case = Case(ModelSpec("unet", 2, 8), backend="rewritten")

    assert "nothing can be rewritten" in _shown(facts_of(case))


def test_command_prints_json() -> None:
    """The same facts for a program."""
    arguments = ["rewritings", "unet3+/d2/w32/concat", "--size", "64x48", "--batch", "3", "--json"]

    result = CliRunner().invoke(app, arguments)

    assert json.loads(result.stdout) == facts_of(_case("unet3+"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet3+/d4/w64"], "is not a label"),
        (["unet3+/d4/w64/concat", "--precision", "bf61"], "unknown precision 'bf61'; did you mean 'bf16'"),
        (["unet3+/d4/w64/concat", "--size", "8"], "this network needs at least"),
        (["unet3+/d4/w64/concat", "--batch", "0"], "batch=0 is not a whole number"),
    ],
)
def test_bad_input_gets_a_sentence(arguments: list[str], message: str) -> None:
    """What was received and what is accepted."""
    result = CliRunner().invoke(app, ["rewritings", *arguments])

    assert isinstance(result.exception, BenchError)
    assert message in str(result.exception)

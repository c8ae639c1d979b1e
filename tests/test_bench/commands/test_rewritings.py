"""`skipcost rewritings`: both forms of every edge, and the sum of what runs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke_cli

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.commands.rewritings import facts_of, print_rewritings
from skipcost.bench.console import Screen
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.kernels import forms as tap_measuring
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.timing import Budget
from skipcost.kernels.dispatch import winners
from skipcost.unet_models import VARIANTS, ModelSpec

NETWORKS = [(variant, upsample) for variant, row in VARIANTS.items() for upsample in row.upsamples]


def _case(variant: str, upsample: str = "bilinear", **values: Any) -> Case:
    return Case(ModelSpec(variant, 2, 32, upsample=upsample), 3, 64, 48, backend="rewritten", **values)


def _shown(facts: dict[str, Any]) -> str:
    text = io.StringIO()
    print_rewritings(facts, Screen(file=text, width=300))
    return text.getvalue()


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize(("variant", "upsample"), NETWORKS)
def test_edges_add_up_to_what_runs(variant: str, upsample: str, mode: str) -> None:
    """The metric's number is conv_macs less what the edges save, in either mode."""
    case = _case(variant, upsample, mode=mode)

    facts = facts_of(case)

    saved = sum(each["direct_macs"] - each["tap_macs"] for each in facts["edges"] if each["taken"])
    assert facts["edges"]
    assert facts["executed_macs"] == facts["conv_macs"] - saved
    assert METRICS["executed_macs"].measure(case, Budget())[0].samples == (facts["executed_macs"],)


@pytest.mark.parametrize(("variant", "upsample"), NETWORKS)
def test_table_shows_every_edge_with_its_form_and_reason(variant: str, upsample: str) -> None:
    """Also those that are left as they are."""
    facts = facts_of(_case(variant, upsample))

    shown = _shown(facts)

    rows = [(each["edge"], each["form"], each["why"]) for each in facts["edges"]]
    lines = shown.splitlines()
    assert all(any(all(part in line for part in row) for line in lines) for row in rows)


def test_transposed_convolutions_are_composed_at_inference_alone() -> None:
    """`--mode training` shows the same edges, direct, and says why."""
    made = {mode: facts_of(_case("unet", "transpose", mode=mode)) for mode in CHOICES["mode"]}

    forms = {mode: {each["form"] for each in facts["edges"]} for mode, facts in made.items()}
    assert forms == {"inference": {"composed"}, "training": {"direct"}}
    assert made["training"]["executed_macs"] == made["training"]["conv_macs"]
    assert "would be made anew in every step of training" in _shown(made["training"])


def test_a_network_without_such_edges_says_so() -> None:
    """What is added to other maps, and not concatenated, is not rewritten."""
    case = Case(ModelSpec("unet", 2, 8, "sum"), backend="rewritten")

    assert "nothing can be rewritten" in _shown(facts_of(case))


def test_command_prints_json() -> None:
    """The same facts for a program."""
    arguments = ["rewritings", "unet3+/d2/w32/concat", "--size", "64x48", "--batch", "3", "--json"]

    result = invoke_cli(arguments)

    assert json.loads(result.stdout) == facts_of(_case("unet3+"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unet3+/d4/w64"], "is not a label"),
        (["unet3+/d4/w64/concat", "--precision", "bf61"], "unknown precision 'bf61'; did you mean 'bf16'"),
        (["unet3+/d4/w64/concat", "--mode", "train"], "unknown mode 'train'; did you mean 'training'"),
        (["unet3+/d4/w64/concat", "--size", "8"], "this network needs at least"),
        (["unet3+/d4/w64/concat", "--batch", "0"], "--batch '0' is not a whole number"),
    ],
)
def test_bad_input_gets_a_sentence(arguments: list[str], message: str) -> None:
    """What was received and what is accepted."""
    result = invoke_cli(["rewritings", *arguments])

    assert isinstance(result.exception, BenchError)
    assert message in str(result.exception)


@pytest.fixture
def own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which nothing was measured, and measuring that takes no time."""
    monkeypatch.setenv("SKIPCOST_KERNELS", str(tmp_path))
    short = Budget(seconds=0.001, least=2, warmup_seconds=0)
    monkeypatch.setattr(tap_measuring, "measure", partial(tap_measuring.measure, budget=short))
    winners.table.cache_clear()
    yield
    winners.table.cache_clear()


@pytest.mark.usefixtures("one_thread", "own_rows")
@pytest.mark.parametrize("label", ["unet3+/d2/w4/concat", "unet++/d2/w4/concat/upsample=bilinear"])
def test_measured_edges_say_so(label: str) -> None:
    """What was timed once decides in every later call of the command."""
    words = ["rewritings", label, "--size", "16"]

    before, measuring, after = (
        invoke_cli([*words, *more, "--json"]) for more in ([], ["--measure"], [])
    )  # fmt: skip

    edges = [json.loads(each.stdout)["edges"] for each in (before, measuring, after)]
    assert edges[1] == edges[2]
    assert not any(each["why"].startswith("measured here") for each in edges[0])
    assert all(each["why"].startswith("measured here") for each in edges[1])
    assert "1 of " in measuring.stderr
    assert str(winners.own_file()) in measuring.stderr.replace("\n", "")


@pytest.mark.usefixtures("own_rows")
def test_a_gpu_is_measured_by_another_command() -> None:
    """Which is named; a network without such maps has nothing to time, and that is no error."""
    with pytest.raises(BenchError, match="skipcost kernels bench --ops tap_first"):
        invoke_cli(["rewritings", "unet3+/d2/w4/concat", "--measure", "--device", "cuda"], catch_exceptions=False)

    nothing = invoke_cli(["rewritings", "unet/d2/w4/concat", "--size", "16", "--measure"])

    assert nothing.exit_code == 0
    assert "nothing to time" in nothing.stderr


@pytest.mark.usefixtures("own_rows")
def test_a_wrong_result_ends_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an error of the machine, not of the input."""
    monkeypatch.setattr(tap_measuring, "tap_first", lambda x, *_, **__: x.new_zeros(()))

    with pytest.raises(MachineError, match="nothing was timed"):
        invoke_cli(["rewritings", "unet3+/d2/w4/concat", "--size", "16", "--measure"], catch_exceptions=False)

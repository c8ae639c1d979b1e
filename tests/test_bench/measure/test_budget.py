"""Budgets: any module, exact totals, and a failure that names the layer and by how much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipcost.bench.cases.case import CHOICES
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.budget import UNITS, Cost, cost_of, read_budget
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, build

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = torch.zeros(2, 1, 32, 32)


class Looking(nn.Module):
    """A model that looks at values, which a model without data cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Branch on the data."""
        return self.conv(x) if float(x.sum()) >= 0 else x


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_totals_equal_the_graphs(variant: str, skip: str) -> None:
    """For networks whose cost is known by arithmetic, what is counted from the outside is the same."""
    spec = ModelSpec(variant=variant, skip=skip, depth=2, width=4)

    cost = cost_of(build(spec), [IMAGE])

    graph = spec.graph()
    assert cost.totals["params"] == sum(cost.layers["params"].values()) == graph.params()
    assert cost.totals["conv_macs"] == sum(cost.layers["conv_macs"].values()) == 2 * graph.conv_macs(32, 32)
    assert cost.totals["activations"] == 2 * graph.activations(32, 32)


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_a_copy_without_data_costs_the_same_as_a_run(mode: str) -> None:
    """A model that cannot be traced is run on the tensors given, and counts the same as one that can."""
    plain = nn.Sequential(nn.Conv2d(1, 4, 3))
    looking = Looking()

    traced, run = cost_of(plain, [IMAGE], mode), cost_of(looking, [IMAGE], mode)

    assert traced.totals == run.totals
    assert run.layers["conv_macs"] == {"conv": 2 * 30 * 30 * 4 * 9}


def test_training_holds_gradients_and_activations() -> None:
    """The peak of a training step is above that of inference, and the model is left as it was."""
    network = build(ModelSpec(depth=1, width=4)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    inference, training = (cost_of(network, [IMAGE], mode).totals["peak_bytes"] for mode in ("inference", "training"))

    assert training > inference > sum(each.nbytes for each in network.parameters())
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_peak_of_one_convolution_is_known_by_hand() -> None:
    """Weights, bias, input and output: nothing else lives in inference."""
    layer = nn.Conv2d(1, 4, 3)

    cost = cost_of(layer, [IMAGE])

    assert cost.totals["peak_bytes"] == 4 * (36 + 4 + 2 * 32 * 32 + 2 * 4 * 30 * 30)


def test_budgets_that_are_kept_pass(assert_cost: Callable[..., None]) -> None:
    """At the exact cost, as a number or as text with a unit, nothing fails."""
    layer = nn.Conv2d(1, 4, 3)

    assert_cost(layer, IMAGE, params=40, conv_macs=2 * 30 * 30 * 36, activations="7.2k", peak_bytes="37KiB")


@pytest.mark.parametrize("metric", UNITS)
def test_a_passed_budget_names_the_layer_and_by_how_much(assert_cost: Callable[..., None], metric: str) -> None:
    """The second of two layers costs most in everything; the failure says so, with the share."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 16, 3))
    total = cost_of(model, [IMAGE]).totals[metric]

    with pytest.raises(pytest.fail.Exception) as told:
        assert_cost(model, IMAGE, **{metric: total // 2})

    said = str(told.value)
    assert f"Sequential has {metric} = {total:,}" in said
    assert f"{total / (total // 2) - 1:.1%} over its budget of {total // 2:,}" in said
    assert "; 1 " in said


def test_every_passed_budget_has_its_sentence(assert_cost: Callable[..., None]) -> None:
    """Two budgets that are passed are two sentences; a budget of nothing is passed by anything."""
    with pytest.raises(pytest.fail.Exception) as told:
        assert_cost(nn.Conv2d(1, 4, 3), IMAGE, params=0, conv_macs=1, activations="1M")

    assert len(str(told.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ({}, "no budget is given"),
        ({"flops": 1}, "'flops' is no metric; accepted: params"),
        ({"params": -1}, "params=-1 is no budget"),
        ({"params": True}, "params=True is no budget"),
        ({"params": 1.5}, "params=1.5 is no budget"),
        ({"peak_bytes": "3 apples"}, "'3 apples' is not a size in bytes"),
        ({"params": 1, "mode": "test"}, "mode"),
    ],
)
def test_a_bad_budget_is_refused(assert_cost: Callable[..., None], budgets: dict[str, Any], said: str) -> None:
    """A budget that is misspelt or no number must not hold by accident."""
    with pytest.raises((ValueError, BenchError), match=said):
        assert_cost(nn.Conv2d(1, 4, 3), IMAGE, **budgets)


def test_a_budget_reads_counts_and_bytes_in_their_own_units() -> None:
    """M is a million of things; MiB and MB are bytes and differ."""
    assert read_budget("params", "31M") == 31_000_000
    assert read_budget("peak_bytes", "1MiB") == 2**20
    assert read_budget("peak_bytes", "1MB") == 10**6


def test_a_model_that_fails_raises_its_own_error() -> None:
    """A wrong input is the model's to complain about, not hidden by the attempts to count."""
    with pytest.raises(RuntimeError, match="channels"):
        cost_of(nn.Conv2d(3, 4, 3), [IMAGE])


@pytest.mark.slow
def test_a_users_own_test_finds_the_fixture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The plugin comes with the distribution: a file of a user's that imports nothing of ours can use it."""
    file = tmp_path / "test_mine.py"
    file.write_text(
        "import torch\n"
        "def test_cost(assert_cost):\n"
        "    assert_cost(torch.nn.Conv2d(1, 4, 3), torch.zeros(1, 1, 8, 8), params=39)\n"
    )

    plugins = ("cacheprovider", "xdist", "faulthandler")
    code = pytest.main(["-q", "--rootdir", str(tmp_path), *(f"-pno:{name}" for name in plugins), str(file)])

    assert code == 1
    assert (
        "Conv2d has params = 40 (40), 2.6% over its budget of 39 (39); Conv2d costs most, 40 (40)"
        in capfd.readouterr().out
    )


def test_costs_are_data() -> None:
    """Every total has a unit and a split."""
    cost: Cost = cost_of(nn.Conv2d(1, 4, 3), [IMAGE])

    assert set(cost.totals) == set(cost.layers) == set(UNITS)

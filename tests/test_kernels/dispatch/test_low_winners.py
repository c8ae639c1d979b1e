"""What was measured on a machine decides there between both forms of a convolution over an up-sampled map."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipcost.bench.cases.case import Case
from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import forms as tap_measuring
from skipcost.bench.measure.timing import Budget
from skipcost.bench.memory import liveness
from skipcost.kernels.dispatch import low_winners, winners
from skipcost.kernels.dispatch.low_resolution import calls_to_measure, choose, executed_macs, rewritings
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.tap_first import tap_first
from skipcost.kernels.rewriting import low as rewritten
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.unet_models import VARIANTS, ModelSpec, build

pytestmark = pytest.mark.usefixtures("one_thread")

CARD = "NVIDIA H100 80GB HBM3"
SHORT = Budget(seconds=0.001, least=2, warmup_seconds=0)
SPEC = ModelSpec("unet3+", 2, 4)


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of a machine's own rows, empty at first, and a machine with one GPU."""
    gpu = tmp_path / "gpus" / "0000:01:00.0" / "information"
    gpu.parent.mkdir(parents=True)
    gpu.write_text(f"IRQ:   17\nModel: \t\t {CARD}\n")
    monkeypatch.setenv("SKIPCOST_KERNELS", str(tmp_path))
    monkeypatch.setattr(low_winners, "GPUS", gpu.parents[1])
    _forget()
    yield winners.own_file()
    _forget()


def _forget() -> None:
    for cached in (winners.table, low_winners.card_here, rewritten._counted, liveness._taken):
        cached.cache_clear()


def _axis(**changes: object) -> Axis:
    whole = {"extent": 8, "factor": 2, "mode": "bilinear", "align_corners": False, "start": 0, "length": 16}
    return Axis(**(whole | {"kernel": 3, "padding": 1} | changes))


def _write(rows: Path, kind: str, device: str, **milliseconds: float) -> None:
    call = low_winners.call_of(_axis(), _axis(), (64, 32), kind, device)
    card = {"cpu": "cpu", "cuda": CARD}[device]
    lines = [
        {"call": call.key, "implementation": name, "outcome": "ok", "seconds": [each / 1e3], "device": {"name": card}}
        for name, each in milliseconds.items()
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _forget()


@pytest.mark.parametrize("kind", ["fp32", "tf32", "16 bits"])
@pytest.mark.parametrize(("device", "ours"), low_winners.TAP_FIRST.items())
def test_the_faster_form_is_taken(rows: Path, device: str, ours: str, kind: str) -> None:
    """Whatever counting says, for every batch; the reason has both times."""
    for direct, tap, taken in ((3, 2, True), (2, 3, False)):
        _write(rows, kind, device, reference=direct, **{ours: tap})
        verdict = "less" if taken else "not less"

        for batch in (1, 7):
            choice = choose(_axis(), _axis(), (64, 32), batch, kind=kind, device=device)

            assert choice.taken == taken
            assert choice.why == f"measured here: {tap} ms, {verdict} than the direct form's {direct} ms"


@pytest.mark.parametrize(
    ("device", "measured"), [("cpu", {"reference": 1}), ("cpu", {"blocks": 1}), ("cuda", {"reference": 1, "blocks": 2})]
)
def test_half_a_measurement_decides_nothing(rows: Path, device: str, measured: dict[str, float]) -> None:
    """Both forms of that device are needed; else counting decides."""
    counted = choose(_axis(), _axis(), (64, 32), device=device)
    _write(rows, "fp32", device, **measured)

    assert choose(_axis(), _axis(), (64, 32), device=device) == counted


def test_no_gpu_no_rows(rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a GPU goes by counting for one, whatever was measured elsewhere."""
    _write(rows, "fp32", "cuda", reference=1, triton=9)
    assert not choose(_axis(), _axis(), (64, 32), device="cuda").taken

    monkeypatch.setattr(low_winners, "GPUS", tmp_path / "nothing")
    _forget()

    assert "measured here" not in choose(_axis(), _axis(), (64, 32), device="cuda").why


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "nearest"},
        {"align_corners": True},
        {"length": 15},
        {"start": 1, "length": 15},
        {"kernel": 5, "padding": 2},
        {"padding": 2},
    ],
    ids=str,
)
def test_other_calls_have_no_rows(changes: dict[str, object]) -> None:
    """Rows are of whole maps, up-sampled bilinearly, and of the kernels that the networks have."""
    assert low_winners.call_of(_axis(), _axis(**changes), (64, 32), "fp32", "cpu") is None
    assert low_winners.call_of(_axis(**changes), _axis(), (64, 32), "fp32", "cpu") is None
    assert low_winners.call_of(_axis(**changes), _axis(**changes), (64, 32), "fp32", "cpu") is None


@pytest.mark.parametrize(("variant", "upsample"), [(name, up) for name in VARIANTS for up in VARIANTS[name].upsamples])
def test_every_interpolated_call_can_be_measured(variant: str, upsample: str) -> None:
    """At sizes that crop nothing; each once, and none where maps are nearest or transposed convolutions' ."""
    graph = ModelSpec(variant, 3, 4, upsample=upsample).graph()

    calls = calls_to_measure(graph, 32, 32, precision="fp32", device="cpu")

    edges = [each for each in rewritings(graph, 32, 32) if each.choice.rewritten == "tap-first"]
    assert bool(calls) == (upsample == "bilinear")
    assert len(set(calls)) == len(calls) <= len(edges)
    assert {call.op for call in calls} <= {"tap_first"}


def test_measuring_decides_for_ops_and_predictions_alike(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of both forms are written, the number of threads is put back, and what then runs is what is foretold."""
    calls = calls_to_measure(SPEC.graph(), 16, 16, precision="fp32", device="cpu")
    before = torch.get_num_threads()

    assert list(tap_measuring.measure(calls, 2, SHORT)) == list(calls)

    written = list(winners.read_rows(rows.read_text()))
    assert [(row["call"], row["implementation"]) for row in written] == [
        (call.key, name) for call in calls for name in ("reference", "blocks")
    ]
    assert all(row["seconds"] and row["threads"] == 2 and row["device"] == {"name": "cpu"} for row in written)
    assert torch.get_num_threads() == before
    made = rewritings(SPEC.graph(), 16, 16)
    assert all(each.choice.why.startswith("measured here") for each in made)
    assert executed_macs(SPEC.graph(), 16, 16) == SPEC.graph().conv_macs(16, 16) - sum(
        each.choice.direct_macs - each.choice.macs for each in made
    )
    ran: list[tuple[int, ...]] = []

    def noted(x: Tensor, *args: Any, **given: Any) -> Tensor:
        ran.append(tuple(x.shape))
        return tap_first(x, *args, **given)

    monkeypatch.setattr("skipcost.kernels.low_resolution.tap_first.tap_first", noted)
    _forget()
    with torch.no_grad():
        build(SPEC, RewrittenOps().ops()).eval()(torch.randn(1, 1, 16, 16))
    foretold = liveness.low_calls(Case(SPEC, 1, 16, 16, backend="rewritten"))
    assert len(ran) == len(foretold) == sum(each.choice.taken for each in made)


def test_each_form_has_its_own_rows(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer is filed as taking longer."""
    pause = 0.02

    def late(*args: Any, **given: Any) -> Tensor:
        time.sleep(pause)
        return tap_first(*args, **given)

    monkeypatch.setattr(tap_measuring, "tap_first", late)
    calls = calls_to_measure(SPEC.graph(), 16, 16, precision="fp32", device="cpu")

    list(tap_measuring.measure(calls[:1], 1, SHORT))

    reference, ours = winners.read_rows(rows.read_text())
    assert (reference["implementation"], ours["implementation"]) == ("reference", "blocks")
    assert min(ours["seconds"]) >= pause


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forms_that_differ_are_not_timed(rows: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong result is no form of the same convolution."""
    monkeypatch.setattr(tap_measuring, "tap_first", lambda *args, **given: 1.1 * tap_first(*args, **given))
    calls = calls_to_measure(SPEC.graph(), 16, 16, precision=precision, device="cpu")

    with pytest.raises(MachineError, match=r"both forms of tap_first n1 .* differ by 0\.\d+ .* nothing was timed"):
        list(tap_measuring.measure(calls, 1, SHORT))

    assert rows.read_text() == ""

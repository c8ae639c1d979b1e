"""A case made real: what it runs, what its loss is, and how many bytes are alive while it does."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairwise import each_value

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.measure.counting import fvcore_count, predicted_peaks
from skipcost.bench.measure.live_bytes import LiveBytes, trace_peaks
from skipcost.bench.measure.subject import make_subject, total_loss
from skipcost.unet_models import VARIANTS, ModelSpec

SMALL = Case(spec=ModelSpec(depth=2, width=4, in_channels=3), height=16, width=24, batch=2)
LOSSES = CHOICES["loss"]
HEADS = [
    replace(SMALL, spec=ModelSpec.parse(f"{variant}/d2/w4/concat/classes={classes}/head={head}"), mode="training")
    for variant in VARIANTS
    for head in VARIANTS[variant].heads
    for classes in ((1,) if head == "guided" else (1, 3))
]


def name_of(case: Case) -> str:
    """Short name for test ids."""
    return case.spec.label


@pytest.mark.parametrize("loss", CHOICES["loss"])
@pytest.mark.parametrize("case", HEADS, ids=name_of)
def test_a_training_step_trains_every_parameter(case: Case, loss: str) -> None:
    """One step changes every parameter, for every head, class count and loss (the images judged to hold an organ)."""
    subject = make_subject(replace(case, loss=loss), "cpu")
    if case.spec.head == "guided":
        subject.network.get_parameter("classifier.conv.bias").data = torch.tensor([-9.0, 9.0])
    before = [each.detach().clone() for each in subject.network.parameters()]

    subject.step()

    names = [name for name, _ in subject.network.named_parameters()]
    same = [n for n, a, b in zip(names, before, subject.network.parameters(), strict=True) if torch.equal(a, b)]
    assert same == []


@pytest.mark.parametrize(("case", "loss"), [(case, LOSSES[at % len(LOSSES)]) for at, case in enumerate(HEADS)], ids=str)
def test_training_lowers_the_loss(case: Case, loss: str) -> None:
    """Twenty SGD steps on the fixed targets bring the loss down: the sign and the wiring are right."""
    case = replace(case, loss=loss)
    subject = make_subject(case, "cpu")
    image, target = subject.tensors[-2:]

    def loss_now() -> float:
        with torch.no_grad():
            return float(total_loss(loss, subject.network(image), target))

    before = loss_now()
    for _ in range(20):
        subject.step()

    assert loss_now() < before


def test_gradients_do_not_add_up_over_steps() -> None:
    """A second step from the same weights has the same gradients, not twice as much."""
    subject = make_subject(replace(SMALL, mode="training"), "cpu")
    weights = [each.detach().clone() for each in subject.network.parameters()]
    subject.step()
    once = [each.grad.clone() for each in subject.network.parameters() if each.grad is not None]

    for each, weight in zip(subject.network.parameters(), weights, strict=True):
        each.data.copy_(weight)
    subject.step()

    assert all(torch.equal(a, b.grad) for a, b in zip(once, subject.network.parameters(), strict=True))


def test_inference_changes_nothing() -> None:
    """An inference step leaves weights and statistics as they are and needs no gradient."""
    subject = make_subject(SMALL, "cpu")
    before = {name: each.clone() for name, each in subject.network.state_dict().items()}

    output: Any = subject.step()

    assert not output.requires_grad
    assert all(torch.equal(before[name], each) for name, each in subject.network.state_dict().items())


def test_subjects_are_repeatable() -> None:
    """The same case gets the same weights and inputs every time."""
    one, other = make_subject(SMALL, "cpu"), make_subject(SMALL, "cpu")

    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_precision_and_layout_are_the_cases(precision: str, dtype: torch.dtype, layout: str) -> None:
    """Weights and image have the case's dtype and memory format."""
    subject = make_subject(replace(SMALL, precision=precision, layout=layout), "cpu")

    output: Any = subject.step()

    assert output.dtype == dtype
    last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert subject.tensors[-1].is_contiguous(memory_format=last)


def test_amp_casts_convolutions_and_keeps_weights() -> None:
    """Under autocast the output is 16-bit and the weights stay 32-bit."""
    subject = make_subject(replace(SMALL, precision="amp-bf16"), "cpu")

    output: Any = subject.step()

    assert output.dtype == torch.bfloat16
    assert {each.dtype for each in subject.network.parameters()} == {torch.float32}


def test_final_outputs_drop_what_only_other_heads_read() -> None:
    """The deployed form of a deep network has one output and fewer weights."""
    deep = replace(SMALL, spec=ModelSpec.parse("unet3+/d2/w4/concat/in_channels=3/head=deep"))

    final: Any = make_subject(replace(deep, outputs="final"), "cpu").step()
    every: Any = make_subject(replace(deep, outputs="all"), "cpu").step()

    assert isinstance(final, torch.Tensor)
    assert len(every) == 3


def test_live_bytes_follow_a_program_by_hand() -> None:
    """Peak and live bytes of a small program are what counting its tensors gives; views own nothing."""
    first = torch.zeros(100)

    with LiveBytes([first]) as tracker:
        second = first + 1
        third = second.view(10, 10) * 2
        del second
        del third
        view = first[10:]

    assert view.numel() == 90
    assert tracker.peak == 3 * 400
    assert tracker.live == 400


@each_value
def test_the_meta_trace_equals_a_real_run(variant: str, skip: str, mode: str) -> None:
    """Predicted peaks are those of the same step on real CPU tensors, to the byte, first step and later ones."""
    case = replace(SMALL, spec=ModelSpec(variant=variant, skip=skip, depth=2, width=4), mode=mode)
    subject = make_subject(case, "cpu", traced=True)

    real = trace_peaks(subject.step, subject.tensors, 2)

    assert predicted_peaks(case)[:2] == (real[0], real[-1] if mode == "training" else real[0])


def test_mixed_precision_is_predicted_and_saves_activations() -> None:
    """A training step under autocast is traced too, and keeps fewer bytes than fp32."""
    case = replace(SMALL, spec=ModelSpec(depth=2, width=8), height=64, width=64, mode="training")

    full = predicted_peaks(case)[1]
    mixed = predicted_peaks(replace(case, precision="amp-bf16"))[1]

    assert mixed < full


def test_a_missing_fvcore_is_an_unsupported_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fvcore the metric says what to install; nothing fails."""
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)

    result = fvcore_count(SMALL)

    assert result.outcome == "unsupported"
    assert "pip install skipcost[fvcore]" in result.note


def test_fvcore_agrees_on_convolutions_and_names_what_it_left_out() -> None:
    """The `conv` entry of fvcore is our conv_macs, and max pooling, which it cannot count, is in the list beside it."""
    case = replace(SMALL, batch=3)

    result = fvcore_count(case)

    assert result.outcome == "ok"
    assert result.detail["by_operator"]["conv"] == case.graph().conv_macs(case.height, case.width)
    assert result.samples == (3 * sum(result.detail["by_operator"].values()),)
    assert result.detail["not_counted"] == {"aten::max_pool2d": 2}

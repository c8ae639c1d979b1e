"""Which form an edge takes under `backend=rewritten`: the rule and its reasons, and the sum, which is what runs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cells import by_label, label_of
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.dispatch.low_resolution import Choice, choose, choose_composed, executed_macs, rewritings
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.composed import composed
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, build
from skipcost.unet_models.spec import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = [
    ModelSpec(variant, 2, 24, skip, upsample=upsample)
    for (variant, row), skip in itertools.product(VARIANTS.items(), SKIPS)
    for upsample in row.upsamples
]
COUNTED = [*WIDE, *(replace(spec, padding="valid") for spec in WIDE if spec.skip == "concat")]


SETTINGS = (("inference", 64, 64), ("training", 61, 58), ("training", 64, 64), ("inference", 61, 58))


@pytest.mark.parametrize(
    ("spec", "setting"), [(spec, SETTINGS[at % 4]) for at, spec in enumerate(COUNTED)], ids=label_of
)
def test_executed_macs_are_what_torch_counts(spec: ModelSpec, setting: tuple[str, int, int]) -> None:
    """FlopCounterMode / 2 on the meta device, banded products included, as an integer; left alone, it is conv_macs."""
    mode, *size = setting
    graph, training = spec.graph(), mode == "training"
    with torch.device("meta"):
        network, image = build(spec, RewrittenOps().ops()).train(training), torch.empty(3, 1, *size)

    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        network(image)

    taken = [each for each in rewritings(graph, *size, batch=3, mode=mode) if each.choice.taken]
    executed = executed_macs(graph, *size, batch=3, mode=mode)
    assert counter.get_total_flops() == 2 * executed
    assert (executed < 3 * graph.conv_macs(*size)) == bool(taken)


@pytest.mark.parametrize("padding", CHOICES["padding"])
@by_label(WIDE)
def test_an_edge_is_listed_as_it_runs(spec: ModelSpec, padding: str) -> None:
    """Interpolated edges are tap-first or direct, transposed ones composed or direct; gated and summed ones are not."""
    graph = replace(spec, padding=padding).graph()

    made = rewritings(graph, 64, 64)

    transposed = {edge.name for edge in graph.edges if edge.up}
    assert {each.choice.rewritten for each in made if each.edge in transposed} <= {"composed"}
    assert {each.choice.rewritten for each in made if each.edge not in transposed} <= {"tap-first"}
    assert all(each.form == (each.choice.rewritten if each.choice.taken else "direct") for each in made)
    if transposed:
        nodes = [node for node in graph.nodes if node.deeper and node.merge == "concat"]
        plain = [node.deeper.name for node in nodes if not any(edge.gate for edge in node.inputs)]
        assert [each.edge for each in made] == plain


def _call(factor: int, channels: tuple[int, int], extent: int = 16, **where: Any) -> Choice:
    axis = Axis(extent, factor, "bilinear", False, 0, extent * factor, 3, 1)
    return choose(axis, axis, channels, **where)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["fp32", "tf32", "16 bits"])
def test_choice_turns_once_with_the_channels(kind: str, device: str) -> None:
    """More input channels are always in favour of tap-first, and at some number it is taken."""
    taken = [_call(16, (channels, 64), kind=kind, device=device).taken for channels in (1, 4, 16, 64, 256, 1024)]

    assert taken == sorted(taken)
    assert not taken[0]
    assert taken[-1]


def test_choice_says_why_in_numbers() -> None:
    """MACs of both forms, and which is less."""
    few, many = _call(2, (4, 8)), _call(2, (512, 256))

    assert few.why.endswith("are not less than the direct form's 0.3 M")
    assert "M MACs over channels and 2.5 times" in many.why
    assert many.why.endswith("are less than the direct form's 1,208.0 M")
    assert "all times 3.0 for products in fp32" in _call(2, (512, 256), kind="16 bits").why


def test_on_a_gpu_the_choice_is_predicted_time() -> None:
    """Products at the precision's rate, tap maps written and read in fp32: 320 channels pay at x2, 128 do not."""
    wide, narrow = (_call(2, (channels, 64), 256, kind="16 bits", device="cuda") for channels in (320, 128))

    pixels, sheet = 256 * 256, (494e12, 3.35e12)
    ours = 9 * 320 * 64 * pixels / sheet[0] + 2 * 4 * 9 * 64 * pixels / sheet[1]
    theirs = 9 * 320 * 64 * 4 * pixels / sheet[0] + 2 * 2 * 320 * 4 * pixels / sheet[1]
    assert (wide.taken, narrow.taken) == (True, False)
    assert wide.why.startswith(f"{ours * 1e6:,.1f} us for products")
    assert f"less than {theirs * 1e6:,.1f} us" in wide.why
    assert "not measured" in wide.why


def test_tap_first_never_holds_or_moves_more() -> None:
    """It forms no up-sampled map: bytes and live bytes are the direct form's without that map."""
    choice = _call(4, (10, 6), batch=2)

    up = 2 * 10 * 64 * 64 * 4
    assert choice.direct_live_bytes - choice.tap_live_bytes == up
    assert choice.direct_bytes - choice.tap_bytes == 2 * up


def _composed_call(
    size: tuple[int, int] = (64, 64), channels: tuple[int, int, int] = (128, 64, 64), **where: Any
) -> Any:
    return choose_composed(size, channels, 1, **where)


def test_composed_form_is_counted_as_two_convolutions_and_one() -> None:
    """36 M O + 4 C M MACs for a pixel of the small map against 16 C O for a position between its pixels."""
    choice = choose_composed((3, 5), (8, 6, 7), 1, 2)

    assert choice.direct_macs == 2 * 3 * 5 * (36 * 6 * 7 + 4 * 8 * 6)
    assert choice.tap_macs == 2 * 4 * 6 * 16 * 8 * 7
    assert choose_composed((3, 5), (8, 6, 7), 0, 2).tap_macs == 2 * 2 * 4 * 16 * 8 * 7


def test_composed_form_moves_its_phases_and_no_up_sampled_map() -> None:
    """Direct: read, up-sampled, copied beside other maps, convolved; composed: read, phases, added to the result."""
    choice, alone = (choose_composed((3, 5), (8, 6, 7), 1, 2, alone=alone) for alone in (False, True))

    low, up, out, phases = (4 * 2 * each for each in (8 * 15, 6 * 60, 7 * 60, 4 * 7 * 4 * 6))
    assert (choice.direct_bytes, choice.tap_bytes) == (low + 4 * up + out, low + 2 * phases + 3 * out)
    assert (alone.direct_bytes, alone.tap_bytes) == (low + 2 * up + out, choice.tap_bytes)
    assert (choice.direct_live_bytes, choice.tap_live_bytes) == (up + out, phases + out)


@pytest.mark.parametrize(("channels", "why"), [((64, 64, 64), "are less"), ((64, 16, 64), "are not less")])
def test_composed_form_loses_with_few_channels_in_between(channels: tuple[int, int, int], why: str) -> None:
    """Then the two convolutions have fewer MACs than the one."""
    choice = _composed_call(channels=channels)

    assert why in choice.why
    assert choice.form == ("composed" if why == "are less" else "direct")


def test_composed_weights_must_not_be_larger_than_the_map_that_they_save() -> None:
    """They are kept: a larger map or batch decides for them, and the reason is in bytes."""
    small, large, many = _composed_call((16, 16)), _composed_call((32, 32)), _composed_call((16, 16), batch=16)

    assert small.kept_bytes == large.kept_bytes == many.kept_bytes
    assert [each.form for each in (small, large, many)] == ["direct", "composed", "composed"]
    assert small.why.endswith("and the 0.5 MiB of weights kept are more than the map's 0.2 MiB")
    assert large.why.endswith("and the 0.5 MiB of weights kept are not more than the map's 1.0 MiB")


def test_copies_of_both_weights_are_kept_bytes_too() -> None:
    """Where they are compared: of the convolution those for the up-sampled map, and both biases."""
    bare, copied = (_composed_call(channels=(8, 6, 7), copied=copied) for copied in (False, True))

    assert copied.kept_bytes - bare.kept_bytes == 4 * (8 * 6 * 4 + 6 + 7 * 6 * 9 + 7)


@pytest.mark.parametrize("kind", ["fp32", "16 bits"])
def test_composed_weights_take_what_is_counted(kind: str) -> None:
    """All three tensors of them, to the byte."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    up, conv = torch.nn.ConvTranspose2d(12, 6, 2, stride=2), torch.nn.Conv2d(10, 5, 3)

    made = composed(up, conv, dtype)

    kept = sum(each.numel() * each.element_size() for each in (made.kernel, made.bias, made.border))
    assert kept == choose_composed((4, 4), (12, 6, 5), 1, kind=kind).kept_bytes


def test_composed_form_is_not_taken_everywhere() -> None:
    """On a GPU; in training; and where nothing is concatenated, so that it would take more memory: with the reason."""
    untaken = [_composed_call(device="cuda"), _composed_call(mode="training"), _composed_call(alone=True)]

    assert [each.form for each in untaken] == ["direct"] * 3
    assert untaken[0].why == "nobody has measured the composed form on this device"
    assert "have no gradients" in untaken[1].why
    assert untaken[2].why.startswith("nothing is concatenated")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_trace_chooses_as_the_device_that_it_stands_for(device: str) -> None:
    """On meta tensors, in 16 bits, where CPUs and GPUs choose by different rules."""
    spec = ModelSpec("unet3+", 2, 64)
    with torch.device("meta"):
        network = build(spec, RewrittenOps(device).ops()).eval().bfloat16()
        image = torch.empty(1, 1, 32, 32, dtype=torch.bfloat16)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)

    assert counter.get_total_flops() == 2 * executed_macs(spec.graph(), 32, 32, precision="bf16", device=device)

"""`backend=fused`: networks on the suite's ops, on a CPU: what they compute, what they keep, and what is asked for.

The choice of implementation is made here by the tests: dispatch leaves a CPU to the reference. Without the interpreter
the ops run their reference paths, so what is tested is how the network is put together from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from model_cells import label_of, outputs_of
from torch import Tensor

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.dispatch.network_calls import network_calls
from skipcost.kernels.recompute import Recipes, saved_bytes
from skipcost.kernels.rewriting.fused import FusedOps, dispatched
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, SkipNet, build

Choose = Callable[[Call, Tensor], str]


def _always(name: str) -> Choose:
    """One implementation everywhere: "triton" for every op, or what else there is for each."""
    other = {"up_conv": "reference", "crop_concat": "reference", "conv_bn_relu_train": "cudnn"}

    def choose(call: Call, _x: Tensor) -> str:
        return name if name in ("triton", "reference") else other.get(call.op, name)

    return choose


pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("reference", "cudnn", "triton")
SPECS = [
    *(ModelSpec(variant, 2, 4, skip) for variant in VARIANTS for skip in SKIPS),
    *(ModelSpec(name, 2, 4, classes=1, head=head) for name, row in VARIANTS.items() for head in row.heads[1:]),
    ModelSpec("unet", 2, 4, padding="valid"),
    ModelSpec("unet++", 2, 4, padding="valid", upsample="bilinear"),
    ModelSpec("unet++", 2, 4, norm="instance"),
    ModelSpec("unet", 2, 4, norm="group"),
    ModelSpec("unet3+", 2, 4, norm="none", upsample="nearest"),
    ModelSpec("unet", 2, 4, bias=False, max_width=8),
]
# Two kinds for each: every variant, and every skip scheme, with all of them.
BY_TURNS = [(spec, KINDS[(at + at // len(SKIPS) + more) % 3]) for at, spec in enumerate(SPECS) for more in (0, 1)]


def _pair(spec: ModelSpec, choose: Choose) -> tuple[SkipNet, SkipNet]:
    torch.manual_seed(0)
    reference, fused = build(spec), build(spec, FusedOps(choose).ops())
    for name, buffer in reference.named_buffers():  # statistics as after training: a fresh norm folds to nothing
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    fused.load_state_dict(reference.state_dict())
    return reference, fused


def _image(spec: ModelSpec) -> Tensor:
    return torch.randn(2, 1, 60, 57) if spec.padding == "valid" else torch.randn(2, 1, 14, 17)


@pytest.mark.parametrize(("spec", "kind"), BY_TURNS, ids=label_of)
def test_inference_is_the_references(spec: ModelSpec, kind: str) -> None:
    """Every variant, skip scheme, head, norm and padding, on every implementation; at odd sizes maps are cropped."""
    reference, fused = (net.eval() for net in _pair(spec, _always(kind)))
    image = _image(spec)

    with torch.inference_mode():
        results, expected = outputs_of(fused(image)), outputs_of(reference(image))

    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spec", "kind"), BY_TURNS, ids=label_of)
def test_training_is_the_references(spec: ModelSpec, kind: str) -> None:
    """Outputs, every gradient and every running statistic of a step, in float64: differences are roundings of it."""
    reference, fused = (net.double().train() for net in _pair(spec, _always(kind)))
    image = _image(spec).double()

    torch.manual_seed(1)  # of the classifier's dropout
    expected = outputs_of(reference(image))
    torch.manual_seed(1)
    results = outputs_of(fused(image))
    for outputs in (results, expected):
        sum(each.square().sum() for each in outputs).backward()

    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    for (name, wanted), actual in zip(reference.named_parameters(), fused.parameters(), strict=True):
        assert actual.grad is not None, name
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-6, atol=1e-7, msg=name)
    for (name, wanted), actual in zip(reference.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuning_with_frozen_statistics_learns_the_same(variant: str, kind: str) -> None:
    """A network in evaluation whose weights want gradients folds nothing away from them."""
    reference, fused = (net.double().eval() for net in _pair(ModelSpec(variant, 2, 4), _always(kind)))
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)

    for net in (reference, fused):
        net(image).square().sum().backward()

    for (name, wanted), actual in zip(reference.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_network_asks_for_the_calls_that_are_listed(variant: str, training: bool) -> None:  # noqa: FBT001
    """What `explain` shows is what dispatch is asked: the same calls, each as often."""
    spec = ModelSpec(variant, 2, 16)
    asked: Counter[str] = Counter()

    def choose(call: Call, x: Tensor) -> str:
        asked[call.key] += 1
        return _always("triton")(call, x)

    net = build(spec, FusedOps(choose).ops()).train(training)
    with torch.set_grad_enabled(training):
        net(torch.randn(2, 1, 16, 24))

    mode = "training" if training else "inference"
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
    listed = Counter(call.key for _, call in network_calls(spec, 2, 16, 24, mode, precision))
    assert set(listed) <= set(asked)


@pytest.mark.parametrize(("variant", "most"), [("unet", 0.5), ("unet++", 0.5), ("unet3+", 0.35)])
def test_training_keeps_half_of_what_eager_keeps(variant: str, most: float) -> None:
    """Bytes that autograd holds between forward and backward: raw outputs of convolutions, and recipes for the rest."""
    eager, fused = _pair(ModelSpec(variant, 3, 16), _always("cudnn"))
    image = torch.randn(2, 1, 64, 64).contiguous(memory_format=torch.channels_last)

    kept, all_of_it = saved_bytes(partial(fused, image)), saved_bytes(partial(eager, image))

    assert kept <= most * all_of_it


def test_recipes_change_no_bit() -> None:
    """A map that is made again for backward is the map: gradients with recipes equal those without, bit by bit."""
    spec = ModelSpec("unet++", 2, 8)
    kept, made = _pair(spec, _always("cudnn"))
    kept = build(spec, FusedOps(_always("cudnn"), _NoRecipes()).ops())
    kept.load_state_dict(made.state_dict())
    image = torch.randn(2, 1, 16, 16)

    for net in (kept, made):
        net.train()(image).square().sum().backward()

    for wanted, actual in zip(kept.parameters(), made.parameters(), strict=True):
        assert torch.equal(actual.grad, wanted.grad)


class _NoRecipes(Recipes):
    """Recipes that remember nothing, so that autograd keeps every map."""

    def remember(self, *_: object, **__: object) -> None:
        """Do nothing."""


def test_autocast_runs_in_its_type() -> None:
    """Maps are bfloat16 as eager's are, weights and statistics stay in fp32, and losses agree within its digits."""
    reference, fused = _pair(ModelSpec("unet", 2, 8), _always("cudnn"))
    image = torch.randn(2, 1, 16, 16)

    with torch.autocast("cpu", torch.bfloat16):
        result, expected = fused.train()(image), reference.train()(image)

    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.1, atol=0.1)


def test_a_cpu_is_left_to_the_reference() -> None:
    """Dispatch says so for any call, and the network's bits are the reference's."""
    reference, fused = (net.eval() for net in _pair(ModelSpec("unet", 2, 4), dispatched))
    image = torch.randn(1, 1, 16, 16)

    with torch.inference_mode():
        assert torch.equal(fused(image), reference(image))


def test_an_empty_batch_and_a_new_type_take_the_reference() -> None:
    """Nothing is asked of dispatch that no kernel takes."""
    asked: list[Call] = []

    def choose(call: Call, _x: Tensor) -> str:
        asked.append(call)
        return "triton"

    net = build(ModelSpec("unet", 1, 2), FusedOps(choose).ops()).eval()
    with torch.inference_mode():
        net(torch.randn(0, 1, 8, 8))
        net.double()(torch.randn(1, 1, 8, 8).double())

    assert asked == []

"""Whole networks on the kernels themselves, in Triton's interpreter: inference and a step of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.unet_models import VARIANTS, ModelSpec, SkipNet, build

FACTOR = 4.0  # of eager's own error against float64: sums are added in another order, and rounded as often


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager PyTorch on a CPU keeps fp32 whole; by PyTorch's default the kernels would cut operands as a GPU's do."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _triton(_call: Call, _x: Tensor) -> str:
    return "triton"


def _networks(spec: ModelSpec) -> tuple[SkipNet, SkipNet, SkipNet]:
    """The network on the kernels, the same one eagerly, and eagerly in float64."""
    torch.manual_seed(0)
    nets = build(spec, FusedOps(_triton).ops()), build(spec), build(spec).double()
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    return nets


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_as_exact_as_eager(variant: str, padding: str) -> None:
    """Crops of any remainder, every node's convolution over maps that are never concatenated, pools in epilogues."""
    size = 46 if padding == "valid" else 19
    image = torch.randn(1, 1, size, size + 2)
    fused, eager, exact = (net.eval() for net in _networks(ModelSpec(variant, 2, 4, padding=padding)))

    with torch.inference_mode():
        result, expected, truth = fused(image), eager(image), exact(image.double())

    assert _distance(result, truth) <= FACTOR * _distance(expected, truth)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_training_is_as_exact_as_eager(variant: str) -> None:
    """Statistics from epilogues, recipes for the maps, and the gradient of every parameter."""
    image = torch.randn(2, 1, 14, 11)
    fused, eager, exact = (net.train() for net in _networks(ModelSpec(variant, 2, 4, bias=False)))

    for net, given in ((fused, image), (eager, image), (exact, image.double())):
        net(given).square().mean().backward()

    flat = [torch.cat([each.grad.flatten() for each in net.parameters()]) for net in (fused, eager, exact)]
    assert _distance(flat[0], flat[2]) <= FACTOR * _distance(flat[1], flat[2])
    for (name, wanted), actual in zip(exact.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-6, msg=name)

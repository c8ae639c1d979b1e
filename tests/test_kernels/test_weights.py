"""Weights made ready for inference: what they come to, and that they follow every change of what they are made from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from skipcost.kernels.weights import ATTRIBUTE, affine, pack, run_folded, why_not_fold


def _layers(*, bias: bool = True, affine: bool = True) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, padding=1, bias=bias), nn.BatchNorm2d(5, affine=affine)
    norm.running_mean, norm.running_var = torch.randn(5), torch.rand(5) + 0.1
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return conv, norm.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine_norm", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_folded_layers_are_the_layers(bias: bool, affine_norm: bool, relu: bool) -> None:  # noqa: FBT001 - parameters
    """Convolution, norm and ReLU equal one convolution with the folded weights, negative scales included."""
    conv, norm = _layers(bias=bias, affine=affine_norm)
    x = torch.randn(2, 3, 6, 7)
    expected = norm(conv(x))

    made = pack(conv, norm, torch.float32)

    result = run_folded(x, made, 1, relu=relu)
    torch.testing.assert_close(result, expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)
    raw = functional.conv2d(x, made.weight, padding=1)
    unfolded = raw * made.scale.view(-1, 1, 1) + made.shift.view(-1, 1, 1)
    torch.testing.assert_close(unfolded, expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_without_a_norm_has_its_bias_as_shift() -> None:
    """Nothing is scaled, so nothing is rounded: the folded weight has the weight's bits."""
    conv = nn.Conv2d(3, 5, 1)

    made = pack(conv, None, torch.float32)

    assert made.scale is None
    assert torch.equal(made.shift, conv.bias)
    assert torch.equal(made.folded, conv.weight)


def test_gradients_flow_through_scale_and_shift() -> None:
    """Frozen statistics, trained weights: gamma, beta and bias learn as in PyTorch."""
    conv, norm = _layers()
    x = torch.randn(2, 3, 6, 7)
    wanted = torch.autograd.grad(norm(conv(x)).square().sum(), [norm.weight, norm.bias, conv.bias])

    scale, shift = affine(conv, norm)
    result = functional.conv2d(x, conv.weight, padding=1) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    grads = torch.autograd.grad(result.square().sum(), [norm.weight, norm.bias, conv.bias])
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


# ruff: noqa: ARG001 - all changes take both layers


def _step(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    with torch.no_grad():
        conv.weight.add_(1)


def _fused_step(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv(torch.randn(1, 3, 5, 5)).square().sum().backward()
    torch.optim.AdamW(conv.parameters(), 0.1, fused=True).step()  # which leaves the weight's version as it was


def _statistics(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    norm.train()(torch.randn(2, 5, 3, 3))
    norm.eval()


def _load(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    norm.load_state_dict({name: value + 1 for name, value in norm.state_dict().items()})


def _replace(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def _data(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv.weight.data = torch.randn_like(conv.weight)


def _epsilon(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    norm.eps = 0.5


def _double(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    conv.double()
    norm.double()


@pytest.mark.parametrize("change", [_step, _fused_step, _statistics, _load, _replace, _data, _epsilon, _double])
def test_a_pack_follows_every_change(change: Callable[[nn.Conv2d, nn.BatchNorm2d], None]) -> None:
    """Training, loading, replacing, converting: the next pack is of the new weights."""
    conv, norm = _layers()
    before = pack(conv, norm, torch.float32)

    change(conv, norm)

    after = pack(conv, norm, conv.weight.dtype)
    assert after is not before
    x = torch.randn(1, 3, 5, 5, dtype=conv.weight.dtype)
    torch.testing.assert_close(run_folded(x, after, 1, relu=False), norm(conv(x)), rtol=1e-4, atol=1e-4)


def test_weights_made_under_inference_mode_are_packed_anew() -> None:
    """They have no version that would tell of a change."""
    with torch.inference_mode():
        conv, norm = _layers()
        pack(conv, norm, torch.float32)
        conv.weight.mul_(2)

        after = pack(conv, norm, torch.float32)

        x = torch.randn(1, 3, 5, 5)
        torch.testing.assert_close(run_folded(x, after, 1, relu=False), norm(conv(x)), rtol=1e-4, atol=1e-4)


def test_a_weight_at_the_address_of_its_predecessor_is_another_weight() -> None:
    """Memory that was let go is given out again, and a new weight there starts at the same version."""
    conv, norm = _layers()
    for _ in range(50):
        pack(conv, norm, torch.float32)
        del conv.weight
        conv.weight = nn.Parameter(torch.randn(5, 3, 3, 3))

        made = pack(conv, norm, torch.float32)

        assert torch.equal(made.weight, conv.weight)


def test_a_copied_or_saved_layer_leaves_its_packs_behind() -> None:
    """They are made again from the copy's own weights, and no file holds them."""
    conv, norm = _layers()
    size = len(pickle.dumps(conv))
    pack(conv, norm, torch.float32)

    again = pickle.loads(pickle.dumps(conv))  # noqa: S301 - written on this line

    assert len(pickle.dumps(conv)) < size + 200
    assert torch.equal(pack(again, norm, torch.float32).weight, conv.weight)


def test_a_pack_is_made_once() -> None:
    """As long as nothing changes, the same tensors are used again; another type of map is another pack."""
    conv, norm = _layers()

    first = pack(conv, norm, torch.float32)

    assert pack(conv, norm, torch.float32) is first
    assert pack(conv, norm, torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_pack_is_no_state() -> None:
    """Neither the state_dict nor the parameters show it, and a copied layer makes its own."""
    conv, norm = _layers()
    keys = list(conv.state_dict())
    pack(conv, norm, torch.float32)

    again = copy.deepcopy(conv)
    with torch.no_grad():
        again.weight.mul_(2)

    assert list(conv.state_dict()) == keys
    assert ATTRIBUTE in conv.__dict__
    assert torch.equal(pack(again, norm, torch.float32).weight, again.weight)


def test_a_pack_made_under_inference_mode_serves_afterwards() -> None:
    """Its tensors are ordinary ones: a later call outside may save them or differentiate past them."""
    conv, norm = _layers()

    with torch.inference_mode():
        made = pack(conv, norm, torch.float32)

    assert not any(each.is_inference() for each in (made.weight, made.scale, made.shift, made.folded, made.bias))


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (None, ""),
        (nn.BatchNorm2d(2).eval(), ""),
        (nn.BatchNorm2d(2), "in training"),
        (nn.BatchNorm2d(2, track_running_stats=False).eval(), "keeps no running statistics"),
        (nn.InstanceNorm2d(2), "InstanceNorm2d takes its statistics from each image"),
        (nn.InstanceNorm2d(2, track_running_stats=True).eval(), "InstanceNorm2d is no BatchNorm2d"),
        (nn.SyncBatchNorm(2).eval(), "SyncBatchNorm is no BatchNorm2d"),
        (nn.GroupNorm(1, 2), "GroupNorm takes its statistics from each image"),
    ],
    ids=str,
)
def test_what_cannot_be_folded_says_why(norm: nn.Module | None, reason: str) -> None:
    """Statistics that are not known beforehand are no scale and shift."""
    assert reason in why_not_fold(norm)
    assert bool(reason) == bool(why_not_fold(norm))
    if reason:
        with pytest.raises(ValueError, match=f"cannot be folded into it: .*{reason}"):
            affine(nn.Conv2d(2, 2, 1), norm)

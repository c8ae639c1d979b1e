"""What `conv_bn_relu_train` takes from layers and surroundings: what it refuses, autocast, and types of parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_blocks import CHANNELS, make_layers, make_maps, reference, state

from skipcost.kernels.ops.conv_bn_relu_train import conv_bn_relu_train

GOOD = {"kernel_size": 3, "padding": 1}


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        ({"kernel_size": 3, "stride": 2}, r"Conv2d\(9, 6, .*stride=\(2, 2\)\): stride, dilation and groups must"),
        ({"kernel_size": 3, "dilation": 2}, "stride, dilation and groups must be 1, the padding one number, of zeros"),
        ({"kernel_size": 3, "padding": (1, 0)}, "the padding one number, of zeros"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "the padding one number, of zeros"),
        ({"kernel_size": 5}, r"has shape \(6, 9, 5, 5\): \(O, C, 3, 3\) and \(O, C, 1, 1\) are supported"),
        ({"kernel_size": 3, "padding": 2}, "padding=2 of conv_bn_relu_train is not supported; accepted: 0, 1"),
    ],
    ids=["stride", "dilation", "uneven", "reflect", "5x5", "padding"],
)  # fmt: skip
def test_other_convolutions_are_refused(conv: dict[str, Any], message: str) -> None:
    """One sentence says what the convolution is and what is accepted."""
    with pytest.raises(ValueError, match=message):
        conv_bn_relu_train(make_maps(torch.float32), nn.Conv2d(CHANNELS, 6, **conv), nn.BatchNorm2d(6))


@pytest.mark.parametrize(
    ("conv", "norm", "message"),
    [
        (nn.Linear(9, 6), nn.BatchNorm2d(6), "got Linear and BatchNorm2d: it takes an nn.Conv2d and"),
        (nn.Conv2d(9, 6, 3), nn.GroupNorm(2, 6), "got Conv2d and GroupNorm: .* and an nn.BatchNorm2d"),
        (nn.Conv2d(9, 6, 3), nn.BatchNorm2d(6).eval(), r"in evaluation, .* call norm.train\(\), or conv_bn_relu"),
        (nn.Conv2d(9, 6, 3), nn.BatchNorm2d(6, eps=0.0), "a norm with eps=0.0: it must be positive in training"),
        (nn.Conv2d(9, 6, 3), nn.BatchNorm2d(4), r"gamma of .* has shape \(4,\): one number for each of 6"),
        (nn.Conv2d(7, 6, 3), nn.BatchNorm2d(6), r"weight .* has shape \(6, 7, 3, 3\), the maps have 9 channels"),
    ],
    ids=["linear", "group norm", "evaluation", "eps", "channels of the norm", "channels of the maps"],
)  # fmt: skip
def test_layers_that_do_not_fit_are_refused(conv: Any, norm: Any, message: str) -> None:
    """One sentence says what was given and what is needed."""
    with pytest.raises(ValueError, match=message):
        conv_bn_relu_train(make_maps(torch.float32), conv, norm)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], r"conv_bn_relu_train got no maps: give it at least one of shape \(N, C, H, W\)"),
        ([torch.ones(1, 9, 5, 5), torch.ones(9, 5, 5)], r"map 1 .* has shape \(9, 5, 5\)"),
        ([torch.ones(1, 5, 5, 5), torch.ones(2, 4, 5, 5)], "map 1 .* has batch size 2, map 0 has 1"),
        ([torch.ones(1, 5, 5, 5), torch.ones(1, 4, 5, 5).half()], "map 1 .* is torch.float16 on cpu, map 0 is torch"),
        ([torch.ones(1, 9, 5, 5).half()], "the weight .* is torch.float32 on cpu, the maps are torch.float16 on cpu"),
        ([torch.ones(1, 9, 5, 5, dtype=torch.int32)], "map 0 .* is torch.int32, which the kernel does not take"),
        ([torch.ones(1, 9, 2, 5)], "got maps of 2x5: after cropping, nothing is left of a 3x3 convolution"),
    ],
    ids=["none", "rank", "batch", "types", "weight's type", "integers", "too small"],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(maps: list[Tensor], message: str) -> None:
    """One sentence says which map, what it is, and what is needed."""
    with pytest.raises(ValueError, match=message):
        conv_bn_relu_train(maps, nn.Conv2d(9, 6, 3), nn.BatchNorm2d(6))


def test_an_unknown_implementation_is_refused() -> None:
    """Nothing falls back: the accepted names are in the message."""
    with pytest.raises(ValueError, match=r"implementation='cudnn' .* is unknown; accepted: aten, triton"):
        conv_bn_relu_train(make_maps(), *make_layers(), implementation="cudnn")


def test_one_value_per_channel_is_refused_in_pytorchs_words() -> None:
    """A variance of one value says nothing; running statistics stay as they were."""
    layers, x = make_layers(padding=0), torch.randn(1, CHANNELS, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        reference([x], *copy.deepcopy(layers))
    before = copy.deepcopy(state(layers))

    with pytest.raises(ValueError, match="Expected more than 1 value") as ours:
        conv_bn_relu_train([x], *layers)

    assert str(ours.value) == str(theirs.value)
    torch.testing.assert_close(state(layers), before)


def test_a_norm_without_statistics_uses_those_of_the_batch_in_evaluation_too() -> None:
    """That is what PyTorch's module does; there is nothing to update."""
    maps, layers = make_maps(), make_layers(track_running_stats=False).eval()

    result = conv_bn_relu_train(maps, *layers)

    torch.testing.assert_close(result, reference(maps, *layers))


def test_statistics_that_are_not_tracked_any_more_stay() -> None:
    """A norm whose tracking was switched off after it was made trains as before, and leaves its buffers alone."""
    maps, layers = make_maps(), make_layers()
    vars(layers[1])["track_running_stats"] = False
    before = copy.deepcopy(state(layers))

    result = conv_bn_relu_train(maps, *layers)

    torch.testing.assert_close(result, reference(maps, *layers))
    torch.testing.assert_close(state(layers), before)


def _step(function: Any, dtype: torch.dtype, *, autocast: bool = False) -> list[Tensor]:
    """Return result, gradients of a block's maps and parameters, and its running statistics."""
    layers, maps = make_layers(dtype=dtype), [each.to(dtype).detach().requires_grad_() for each in make_maps()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(maps, *layers)
    leaves = [*maps, layers[0].weight, *layers[1].parameters()]
    return [out, *torch.autograd.grad(out.double().square().sum(), leaves), *list(state(layers).values())[:2]]


@pytest.mark.numeric
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 parameters"])
def test_sixteen_bits_are_as_exact_as_pytorchs(autocast: bool) -> None:  # noqa: FBT001 - parametrised
    """Types are those of PyTorch, and no error against float64 is more than twice its own; statistics stay in fp32."""
    dtype = torch.float32 if autocast else torch.bfloat16

    ours, theirs = (_step(function, dtype, autocast=autocast) for function in (conv_bn_relu_train, reference))

    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert ours[0].dtype == torch.bfloat16
    for actual, pytorch, exact in zip(ours, theirs, _step(reference, torch.float64), strict=True):
        error, allowed = ((each.double() - exact).norm() for each in (actual, pytorch))
        assert error <= 2 * allowed + 2**-8 * exact.norm()


def test_autocast_leaves_float64_alone() -> None:
    """As conv2d does: a network that is checked in float64 is not rounded."""
    with torch.autocast("cpu", torch.bfloat16):
        result = conv_bn_relu_train(make_maps(), *make_layers())

    assert result.dtype == torch.float64


def test_autocast_keeps_maps_and_weight_in_16_bits() -> None:
    """The weight and the maps that the gradients need are kept in 16 bits; the norm's vectors in 32."""
    maps, layers, sizes = make_maps(torch.float32), make_layers(dtype=torch.float32), []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.itemsize)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        conv_bn_relu_train(maps, *layers)

    assert sorted(sizes) == [2] * 5 + [4] * 4  # weight, y, three maps; four vectors

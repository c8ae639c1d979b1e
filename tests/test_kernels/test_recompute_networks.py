"""`Recipes` through whole networks: less is kept, and every gradient is the one without, to the last bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Self

import pytest
import torch
from kernel_checks import assert_same
from model_cells import layered
from recompute_cases import FORMATS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.recompute import Recipes, remembering, saved_bytes
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.unet_models import REFERENCE, ModelSpec, build
from skipcost.unet_models.ops import ConvNormAct, Ops, Step
from skipcost.unet_models.program import Op

pytestmark = pytest.mark.usefixtures("one_thread")


def normalized(y: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, act: bool) -> Tensor:
    """Batch norm as in training, and ReLU."""
    z = torch.native_batch_norm(y, gamma, beta, None, None, True, 0.0, eps)[0]
    return z.relu_() if act else z


class _NormAct(torch.autograd.Function):
    """`normalized`, which keeps y and not its result: what PyTorch does in two ops, with the same gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, norm: nn.BatchNorm2d, act: bool) -> Tensor:  # noqa: FBT001
        running = norm.running_mean, norm.running_var
        z, mean, rstd = torch.native_batch_norm(y, gamma, beta, *running, True, norm.momentum or 0.0, norm.eps)
        ctx.eps, ctx.act = norm.eps, act
        ctx.save_for_backward(y, gamma, beta, mean, rstd)
        return z.relu_() if act else z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (y, gamma, beta, mean, rstd) = grads, ctx.saved_tensors
        if ctx.act:
            z = normalized(y, gamma, beta, eps=ctx.eps, act=True)
            grad = torch.ops.aten.threshold_backward(grad, z, 0)
        of_norm = torch.ops.aten.native_batch_norm_backward
        return *of_norm(grad, y, gamma, None, None, mean, rstd, True, ctx.eps, [True] * 3), None, None


def lean_ops(recipes: Recipes) -> Ops:
    """Replace what PyTorch keeps too much for, by PyTorch's own ops."""

    def conv_norm_act(_: Step, layers: list[ConvNormAct], maps: list[Tensor]) -> Tensor:
        (layer,) = layers
        y: Tensor = layer.conv(maps.pop())
        if not isinstance(norm := layer.norm, nn.BatchNorm2d):
            return y
        z: Tensor = _NormAct.apply(y, norm.weight, norm.bias, norm, layer.act)
        recipes.remember(z, partial(normalized, eps=norm.eps, act=layer.act), y, norm.weight, norm.bias)
        return z

    return remembering(replace(REFERENCE.replacing(layer=conv_norm_act), rewrite=layered), recipes)


@pytest.mark.parametrize(
    ("label", "ratio"),
    [("unet/d4/w16/concat", 0.47), ("unet++/d3/w16/concat", 0.44), ("unet3+/d3/w16/concat", 0.26)],
)
def test_a_training_step_keeps_less_and_has_the_same_gradients(label: str, ratio: float) -> None:
    """Of what eager PyTorch keeps for backward, at most half is kept, and every gradient equals PyTorch's."""
    spec, recipes = ModelSpec.parse(label), Recipes()
    eager, lean = build(spec), build(spec, lean_ops(recipes))
    lean.load_state_dict(eager.state_dict())
    image, target = torch.randn(2, 1, 64, 64), torch.randint(0, 2, (2, 64, 64))

    def step(net: nn.Module) -> Tensor:
        with recipes:
            return functional.cross_entropy(net(image), target)

    kept, kept_eagerly = saved_bytes(lambda: step(lean)), saved_bytes(lambda: step(eager))
    loss, expected = step(lean), functional.cross_entropy(eager(image), target)
    loss.backward()
    expected.backward()

    assert torch.equal(loss, expected)
    assert kept <= ratio * kept_eagerly
    for actual, wanted in zip(lean.parameters(), eager.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert torch.equal(actual.grad, wanted.grad)


@pytest.mark.parametrize(
    "label", ["unet/d2/w4/sum/padding=valid", "unet++/d2/w4/gated", "unet3+/d2/w4/concat/head=deep"]
)
def test_every_way_through_the_executor_keeps_its_gradients(label: str) -> None:
    """Sums, crops, gates and several heads; 45 is no multiple of 4, so that pooling and up-sampling lose pixels."""
    spec, recipes = ModelSpec.parse(label), Recipes()
    eager, lean = build(spec), build(spec, lean_ops(recipes))
    lean.load_state_dict(eager.state_dict())
    image = torch.randn(2, 1, 45, 45)

    def step(net: nn.Module) -> Tensor:
        maps = net(image)
        return sum((each.square().mean() for each in ([maps] if isinstance(maps, Tensor) else maps)), torch.zeros(()))

    with recipes:
        loss = step(lean)
    loss.backward()
    step(eager).backward()

    for actual, wanted in zip(lean.parameters(), eager.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert torch.equal(actual.grad, wanted.grad)


def _on_our_kernels(call: Call, _: Tensor) -> str:
    return "aten" if call.op == "conv_bn_relu_train" else "reference"


class _Forgetful(Recipes):
    """Passes in which nothing is remembered."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing."""


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("label", "ratio"),
    [("unet/d3/w8/concat", 0.48), ("unet++/d2/w8/concat", 0.47), ("unet3+/d2/w8/concat", 0.33)],
)
def test_the_fused_ops_keep_half_with_the_gradients_they_have_without(label: str, ratio: float, bf16: bool) -> None:  # noqa: FBT001
    """`conv_bn_relu_train` and its relatives, against eager PyTorch in bytes, against themselves in bits."""
    spec = ModelSpec.parse(label)
    eager = build(spec)
    lean, plain = (build(spec, FusedOps(_on_our_kernels, each).ops()) for each in (Recipes(), _Forgetful()))
    for net in (lean, plain):
        net.load_state_dict(eager.state_dict())
    image, target = torch.randn(2, 1, 48, 48), torch.randint(0, 2, (2, 48, 48))

    def step(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return functional.cross_entropy(net(image), target)

    kept, kept_eagerly = saved_bytes(lambda: step(lean)), saved_bytes(lambda: step(eager))
    step(lean).backward()
    step(plain)  # the running statistics of `lean` have seen two batches
    step(plain).backward()

    weights = 2 * sum(each.numel() for each in eager.parameters() if each.ndim == 4) if bf16 else 0  # autocast's copies
    assert kept - weights <= ratio * (kept_eagerly - weights)
    for actual, wanted in zip(lean.parameters(), plain.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert_same(actual.grad, wanted.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])  # noqa: S301
def test_a_copy_of_a_network_remembers_as_well(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Networks are copied to average their weights, and pickled to save them."""
    net = build(ModelSpec.parse("unet/d2/w4/concat"), FusedOps(_on_our_kernels).ops())
    image = torch.randn(1, 1, 32, 32)

    again = copied(net)

    assert saved_bytes(lambda: again(image)) == saved_bytes(lambda: net(image))


def test_a_deep_copy_is_the_same_object() -> None:
    """Of a network's functions, closures are not copied and methods are: both must talk to one object."""
    recipes = Recipes()

    assert copy.deepcopy([recipes])[0] is recipes


def test_saved_bytes_needs_no_memory_to_count() -> None:
    """Networks on the meta device and of fake tensors say what a real one would keep, recipes included, every time."""
    kept = []

    for device, mode in (("cpu", nullcontext()), ("meta", nullcontext()), ("cpu", FakeTensorMode())):
        recipes = Recipes()
        with torch.device(device), mode:
            net, image = build(ModelSpec.parse("unet/d2/w4/concat"), lean_ops(recipes)), torch.ones(1, 1, 32, 32)

            def forward(recipes: Recipes = recipes, net: nn.Module = net, image: Tensor = image) -> Any:
                with recipes:
                    return net(image)

            kept += [saved_bytes(forward), saved_bytes(forward)]

    outputs = 4 * (2 * 4 * 32**2 + 2 * 8 * 16**2 + 2 * 16 * 8**2)  # of the encoder's convolutions
    outputs += 4 * (3 * 8 * 16**2 + 3 * 4 * 32**2)  # of the decoder's, transposed ones included
    assert kept == [outputs + 4 * 2 * 2 * (4 + 8 + 16 + 8 + 4)] * 6  # mean and deviation of each norm


def _call(table: Ops, op: Op, *maps: Tensor) -> Tensor:
    function = table.functions[op.kind]
    result: Tensor = function(Step(function, op, (), ()), [], list(maps))
    return result


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_has_the_same_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Pooled, up-sampled, joined and cropped maps are made again to the bit, on shapes that no tile divides."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 131, 77, device="cuda", dtype=dtype).to(memory_format=memory_format).requires_grad_()
    ops = remembering(REFERENCE, recipes := Recipes())

    def forward(table: Ops) -> Tensor:
        z = x * 3
        low = _call(table, Op("pool", "", "", (), factor=2, how="floor"), z)
        up = _call(table, Op("up_sample", "", "", (), factor=2, how="nearest"), low.relu())
        joined = _call(table, Op("join", "", "", (), how="concat"), z, up, z)
        return (joined * joined.sin()).float().mean() + (low * low).float().mean()

    with recipes:
        result = forward(ops)
    (grad,) = torch.autograd.grad(result, x)

    assert_same(grad, torch.autograd.grad(forward(REFERENCE), x)[0])

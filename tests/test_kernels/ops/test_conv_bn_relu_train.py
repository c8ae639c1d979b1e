"""`conv_bn_relu_train` on a CPU, where formulas run: that it trains as PyTorch's modules do, and what it keeps.

The kernels behind it are checked in `..._interpreted.py`, their parts in `test_kernels_batch_norm_interpreted.py` and
`test_kernels_weight_gradient_interpreted.py`; tracing in `..._traced.py`; refusals and autocast in `..._front.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from train_blocks import CHANNELS, EXACT, make_layers, make_maps, make_vectors, reference, state

from skipcost.kernels.ops import conv_bn_relu_train as module
from skipcost.kernels.ops.batch_norm import normalized
from skipcost.kernels.ops.conv_bn_relu_train import conv_bn_relu_train, train_step
from skipcost.kernels.ops.launch import Launch

OP = torch.ops.skipcost.conv_bn_relu_train


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("side", "padding"), [(3, 1), (3, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("relu", [True, False])
def test_it_computes_what_the_modules_do(side: int, padding: int, relu: bool) -> None:  # noqa: FBT001 - parametrised
    """Result, gradients of maps and parameters, and running statistics are those of Conv2d, BatchNorm2d and ReLU."""
    layers, maps = make_layers(side, padding), make_maps()
    twins = copy.deepcopy(layers)

    result, expected = conv_bn_relu_train(maps, *layers, relu=relu), reference(maps, *twins, relu=relu)

    torch.testing.assert_close(result, expected, **EXACT)
    assert result.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(result, [*maps, *layers.parameters()], grad)
    wanted = torch.autograd.grad(expected, [*maps, *twins.parameters()], grad)
    for actual, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, want, **EXACT)
    torch.testing.assert_close(state(layers), state(twins), **EXACT)


@pytest.mark.parametrize("norm", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_several_steps_of_training_stay_together(norm: dict[str, Any]) -> None:
    """After three steps of gradient descent, parameters and running statistics are still the modules' own."""
    layers = make_layers(**norm)
    twins = copy.deepcopy(layers)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (layers, twins)]

    for step in range(3):
        maps = [each.detach() * (step + 1) for each in make_maps()]
        for out, optimizer in zip(
            (conv_bn_relu_train(maps, *layers), reference(maps, *twins)), optimizers, strict=True
        ):
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()

    torch.testing.assert_close(layers.state_dict(), twins.state_dict(), rtol=1e-9, atol=1e-11)


def test_the_bias_of_the_convolution_has_a_gradient_of_zeros_and_moves_the_running_mean() -> None:
    """Batch norm takes it away again: it is not in the output, and an optimizer sees that it has no effect."""
    layers, maps = make_layers(), make_maps(grad=False)
    nn.init.constant_(layers[0].bias, 1e6)

    result = conv_bn_relu_train(maps, *layers)
    result.sum().backward()

    with torch.no_grad():
        nn.init.zeros_(layers[0].bias)
    assert torch.equal(result, conv_bn_relu_train(maps, *layers))
    assert torch.equal(layers[0].bias.grad, torch.zeros(6, dtype=torch.float64))
    assert float(layers[1].running_mean.min()) > 8e4


def test_relu_is_what_functional_relu_is() -> None:
    """Nothing below 0 is left, and something was there to clip."""
    result = conv_bn_relu_train(make_maps(), *make_layers())

    assert torch.equal(result, functional.relu(result))
    assert bool((result == 0).any())


def test_an_empty_batch_is_treated_as_pytorch_treats_it() -> None:
    """The result is empty, gradients are zeros, running statistics stay, and the batch counts."""
    layers, x = make_layers(), torch.randn(0, CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True)
    twins = copy.deepcopy(layers)

    result, expected = conv_bn_relu_train([x], *layers), reference([x], *twins)
    result.sum().backward()
    expected.sum().backward()

    assert result.shape == expected.shape
    torch.testing.assert_close(state(layers), state(twins))
    for each in layers.parameters():
        assert torch.equal(each.grad, torch.zeros_like(each))


@pytest.mark.parametrize("where", ["weight", "upstream"])
@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_spread_as_in_pytorch(where: str, special: float) -> None:
    """A channel that is no number any more is no number in result and gradients, and no other channel is."""
    layers, maps = make_layers(padding=0), make_maps()
    grad = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    if where == "weight":
        layers[0].weight.data[1] = special
    else:
        grad[0, 1, 1, :] = special
    twins = copy.deepcopy(layers)
    leaves, twin_leaves = ([*maps, *(value for _, value in each.named_parameters())] for each in (layers, twins))

    result, expected = conv_bn_relu_train(maps, *layers), reference(maps, *twins)
    grads, wanted = torch.autograd.grad(result, leaves, grad), torch.autograd.grad(expected, twin_leaves, grad)

    assert not all(bool(each.isfinite().all()) for each in (expected, *wanted))
    for index, (actual, want) in enumerate(zip((result, *grads), (expected, *wanted), strict=True)):
        if index != 5:  # the bias, whose gradient PyTorch sums up and which is 0 by definition
            assert torch.equal(actual.isfinite(), want.isfinite()), index


def test_a_cpu_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter a CPU runs ATen and formulas, whichever implementation is asked for."""

    def refuse(launches: Iterable[Launch]) -> None:
        pytest.fail(f"launched {list(launches)}")

    monkeypatch.setattr(module, "run", refuse)
    maps, layers = make_maps(), make_layers()

    results = [conv_bn_relu_train(maps, *layers, implementation=name) for name in module.IMPLEMENTATIONS]
    results[1].sum().backward()

    assert torch.equal(*results)


def test_the_result_follows_from_what_a_step_returns() -> None:
    """A map that is dropped can be made again from the convolution's output, which the gradients need anyway."""
    maps = make_maps(torch.float32)

    result, y, norm = train_step(maps, *make_layers(dtype=torch.float32))

    assert torch.equal(normalized(y, norm), result)
    assert not y.requires_grad


def _kept_bytes(maps: Sequence[Tensor], layers: nn.ModuleList, function: Any) -> int:
    """Bytes of all storages that autograd keeps for a block, its input maps, parameters and buffers aside."""
    storages = {}
    own = {each.untyped_storage().data_ptr() for each in (*maps, *layers.parameters(), *layers.buffers())}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(maps, *layers)
    assert out.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_only_the_output_of_the_convolution_is_kept() -> None:
    """Autograd keeps y and its mean and variance; eagerly also the joined map, and what ReLU gave."""
    maps, layers = make_maps(torch.float32), make_layers(dtype=torch.float32)
    y, joined, vector = 4 * 2 * 6 * 7 * 8, 4 * 2 * CHANNELS * 7 * 8, 4 * 6

    kept = _kept_bytes(maps, layers, conv_bn_relu_train)

    assert kept == y + 2 * vector
    assert _kept_bytes(maps, layers, reference) == joined + 2 * y + 2 * vector


def test_only_the_result_has_gradients() -> None:
    """The convolution's output and its statistics are constants to autograd: what is added to them changes nothing."""
    maps, vectors = make_maps(torch.float32), make_vectors(grad=True)
    options = (1, 1e-5, True, False, "aten")

    out, *others = OP(maps, *vectors, *options)
    (grad,) = torch.autograd.grad(out.sum() + sum(each.sum() for each in others), maps[:1])

    (expected,) = torch.autograd.grad(OP(maps, *vectors, *options)[0].sum(), maps[:1])
    assert [each.requires_grad for each in (out, *others)] == [True, False, False, False]
    assert torch.equal(grad, expected)


def test_a_second_derivative_is_refused() -> None:
    """The gradients have none themselves: a clear error, not a wrong number."""
    maps, layers = make_maps(), make_layers()
    result = conv_bn_relu_train(maps, *layers)

    (grad,) = torch.autograd.grad(result.sum(), [layers[0].weight], create_graph=True)

    with pytest.raises(RuntimeError, match=r"conv_bn_relu_train_backward.* no autograd formula was registered"):
        grad.sum().backward()


class _Blocks(torch.autograd.Function):
    """Passes a map on, and no gradient back."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> None:
        return None


def test_without_a_gradient_from_above_there_is_none_below() -> None:
    """A function behind the op that passes no gradient back leaves all of its arguments without one."""
    maps, layers = make_maps(), make_layers()

    _Blocks.apply(conv_bn_relu_train(maps, *layers)).sum().backward()

    assert [each.grad for each in (*maps, *layers.parameters())] == [None] * 7


@pytest.mark.parametrize("needed", [(0, 2), (1,), ()], ids=str)
def test_only_what_needs_a_gradient_gets_one(needed: tuple[int, ...]) -> None:
    """An image has no gradient, a frozen convolution neither; the others' are what they are with all of them."""
    maps, layers = make_maps(grad=False), make_layers()
    for index in needed:
        maps[index].requires_grad_()
    layers[0].requires_grad_(requires_grad=False)

    with FlopCounterMode(display=False) as counter:
        conv_bn_relu_train(maps, *layers).square().sum().backward()

    every = make_maps()
    conv_bn_relu_train(every, *make_layers()).square().sum().backward()
    for index, (each, full) in enumerate(zip(maps, every, strict=True)):
        assert (each.grad is None) == (index not in needed)
        if index in needed:
            torch.testing.assert_close(each.grad, full.grad, **EXACT)
    convolutions = 1 + bool(needed)
    assert counter.get_total_flops() == convolutions * 2 * 2 * 6 * CHANNELS * 9 * 7 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", module.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_is_as_exact_as_pytorch(dtype: torch.dtype, implementation: str) -> None:
    """A decoder's first block: errors against float64 are at most twice those of PyTorch's own modules in this type."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 64, size, size, device="cuda", dtype=dtype) for size in (136, 104)]
    maps = [each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in maps]
    layers = nn.ModuleList([nn.Conv2d(128, 64, 3), nn.BatchNorm2d(64)]).cuda()
    grad = torch.randn(2, 64, 102, 102, device="cuda")

    def step(function: Any, dtype: torch.dtype) -> list[Tensor]:
        own = copy.deepcopy(layers)
        own[0].to(dtype)
        if dtype == torch.float64:
            own.double()
        leaves = [each.detach().to(dtype).requires_grad_() for each in maps]
        out = function(leaves, *own)
        return [out, *torch.autograd.grad(out, [*leaves, own[0].weight, *own[1].parameters()], grad.to(dtype))]

    exact = step(reference, torch.float64)
    ours = step(lambda *each: conv_bn_relu_train(*each, implementation=implementation), dtype)
    theirs = step(reference, dtype)

    for actual, pytorch, want in zip(ours, theirs, exact, strict=True):
        error, allowed = ((each.double() - want).norm() for each in (actual, pytorch))
        assert error <= 2 * allowed + 1e-6 * want.norm()

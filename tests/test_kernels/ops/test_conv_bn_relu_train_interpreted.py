"""`conv_bn_relu_train` in Triton's interpreter: all of its kernels together, against float64 and against PyTorch.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_conv_bn_relu_train_interpreted.py
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_same
from torch import Tensor
from train_blocks import EXACT, make_layers, make_maps, reference, state

from skipcost.kernels.ops import batch_norm
from skipcost.kernels.ops import conv_bn_relu_train as module
from skipcost.kernels.ops.conv_bn_relu_train import IMPLEMENTATIONS, conv_bn_relu_train, train_step
from skipcost.kernels.ops.launch import Launch, run
from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA, amid

OP, BACKWARD = torch.ops.skipcost.conv_bn_relu_train, torch.ops.skipcost.conv_bn_relu_train_backward
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """A block: maps (2, C_i, H_i, W_i) -> (2, O, H', W')."""

    sizes: tuple[tuple[int, int, int], ...]
    outputs: int = 18
    side: int = 3
    padding: int = 1
    layout: str = "channels_last"
    data: str = "normal"
    relu: bool = True


CASES = (
    Case(((1, 12, 11),), layout="contiguous"),  # an image, channels first; 264 pixels, tiles of 128: the last of 8
    Case(((2, 9, 10),), padding=0, layout="sliced"),
    Case(((3, 9, 9),), outputs=70, data="positive"),  # two tiles of output channels, the second of 6
    Case(((5, 1, 70),), layout="window"),  # one row, whose neighbours above and below are NaN
    Case(((24, 9, 8),), padding=0, layout="channel_slice", relu=False),  # 8 of 32 channels are none
    Case(((24, 1, 75),), outputs=5, data="large"),  # the input's gradient reads few channels
    Case(((24, 12, 9), (5, 10, 11), (1, 11, 9)), layout="window"),  # cropped by even and odd remainders: 10 x 9
    Case(((3, 8, 8), (2, 6, 9)), padding=0, layout="contiguous"),
    Case(((24, 8, 9),), side=1, padding=0, data="positive"),
    Case(((5, 8, 9), (16, 8, 9)), side=1, padding=1),  # a frame of zeros round a 1x1 convolution
)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what is allocated with NaN: what a kernel should have written and has not shows."""
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let batch norm have several tiles to combine, and to sum in each program."""
    monkeypatch.setattr(batch_norm, "TILE", 1024)
    monkeypatch.setattr(batch_norm, "STATISTICS_TILE", 2048)
    monkeypatch.setattr(batch_norm, "PROGRAMS", 4)


def make_arguments(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Maps amid canaries, weight, gamma, beta, and a gradient from above that lies in a slice of a wider map."""
    make = DATA[case.data]
    maps = [amid(make((2, *size), dtype, seed), case.layout) for seed, size in enumerate(case.sizes)]
    weight = make((case.outputs, sum(size[0] for size in case.sizes), case.side, case.side), dtype, 10)
    gamma, beta = (DATA["normal"]((case.outputs,), torch.float32, seed) for seed in (11, 12))
    shrink = case.side - 1 - 2 * case.padding
    height, width = (min(size[axis] for size in case.sizes) - shrink for axis in (1, 2))
    grad = amid(DATA["normal"]((2, case.outputs, height, width), dtype, 13), "channel_slice")
    return maps, weight, gamma, beta, grad


def step(case: Case, precision: str, implementation: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the op does, and the gradients of maps, weight, gamma and beta."""
    maps, weight, gamma, beta, grad = make_arguments(case, PRECISIONS[precision])
    leaves = [each.detach().requires_grad_() for each in (*maps, weight, gamma, beta)]
    options = (case.padding, EPS, case.relu, precision == "tf32", implementation)
    results = OP(leaves[: len(maps)], leaves[-3], None, *leaves[-2:], *options)
    return [each.detach() for each in results], list(torch.autograd.grad(results[0], leaves, grad))


def errors(case: Case, precision: str, implementation: str) -> dict[str, float]:
    """Return, for all that the op computes, the worst error over what a right kernel may err.

    What follows from the convolution's output is judged by that output as it was stored: see `validate`.
    """
    maps, weight, gamma, beta, grad = make_arguments(case, PRECISIONS[precision])
    (out, y, mean, variance), grads = step(case, precision, implementation)
    tf32 = precision == "tf32"
    normal = validate.batch_norm(y, gamma, beta, eps=EPS, relu=case.relu)
    of_all = validate.conv_bn_relu_gradients(
        maps, weight, y, gamma, beta, grad, padding=case.padding, eps=EPS, relu=case.relu
    )
    judged: list[tuple[str, Tensor, validate.Exact]] = [
        ("y", y, validate.conv(maps, weight, padding=case.padding)),
        ("mean", mean, normal.mean),
        ("variance", variance, normal.variance),
        ("out", out, normal.result),
    ]
    names = [*(f"grad of map {index}" for index in range(len(maps))), "grad of weight", "grad of gamma", "grad of beta"]
    judged += zip(names, grads, of_all, strict=True)
    products = {name for name, *_ in judged if name == "y" or "map" in name or "weight" in name}
    return {name: _worst(actual, exact, tf32=tf32 and name in products) for name, actual, exact in judged}


def _worst(actual: Tensor, exact: validate.Exact, *, tf32: bool) -> float:
    allowed = validate.allowed(exact, actual.dtype, tf32=tf32)
    return validate.worst(actual, exact.value.reshape(actual.shape), allowed.reshape(actual.shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_results_meet_their_bounds(case: Case) -> None:
    """Output, statistics, result, and every gradient, over one map and several, of few channels and many."""
    found = errors(case, "fp32", "triton")

    assert max(found.values()) <= 1, found


@pytest.mark.parametrize(
    ("precision", "case"),
    [
        *(("bf16", CASES[number]) for number in (3, 6)),
        *(("tf32", CASES[number]) for number in (2, 8)),
        *(("fp16", CASES[number]) for number in (2, 7)),
    ],
    ids=str,
)
def test_other_precisions_meet_theirs(precision: str, case: Case) -> None:
    """The same in 16 bits, and with products in tf32, where of a sum of positive numbers every term is cut."""
    found = errors(case, precision, "triton")

    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_convolutions_by_aten_meet_them_too(case: Case) -> None:
    """Then the statistics come from a pass over the stored map; the rest is the same kernels."""
    found = errors(case, "fp32", "aten")

    assert max(found.values()) <= 1, found


@pytest.mark.parametrize(("implementation", "tolerance"), [("aten", 2e-6), ("triton", 2e-6)])
def test_a_large_mean_does_not_blur_the_variance(implementation: str, tolerance: float) -> None:
    """Outputs of 1000 +- 1: the mean square less the squared mean would be off by 1 % and more, in either way."""
    x = DATA["normal"]((2, 16, 40, 40), torch.float32, 0).add(1000).contiguous(memory_format=torch.channels_last)
    weight, vectors = torch.eye(16).view(16, 16, 1, 1), (torch.ones(16), torch.zeros(16))

    _, y, _, variance = OP([x], weight, None, *vectors, 0, EPS, True, False, implementation)

    expected = x.double().var((0, 2, 3), correction=0)
    assert torch.equal(y, x)
    torch.testing.assert_close(variance.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", [CASES[3], CASES[7]], ids=str)
def test_runs_are_repeatable(case: Case) -> None:
    """Two runs agree in every bit of every result and gradient."""
    first, second = ([*results, *grads] for results, grads in (step(case, "bf16", "triton") for _ in range(2)))

    for actual, expected in zip(first, second, strict=True):
        assert_same(actual, expected)


def _launched(monkeypatch: pytest.MonkeyPatch, implementation: str) -> list[str]:
    names: list[str] = []

    def record(launches: Sequence[Launch]) -> None:
        names.extend(each.kernel for each in launches)
        run(launches)

    monkeypatch.setattr(module, "run", record)
    step(CASES[4], "fp32", implementation)
    return names


def test_no_pass_over_memory_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics come with the convolution; ATen's leave none, and are followed by a pass for them."""
    ours, with_aten = _launched(monkeypatch, "triton"), _launched(monkeypatch, "aten")

    norm = ["batch_norm.finish", "batch_norm.backward_reduce", "batch_norm.add", "batch_norm.backward_apply"]
    convolutions = ["conv.conv", "weight_gradient.weight_gradient", "batch_norm.add"]
    assert ours == ["conv.conv", *norm, *convolutions]
    assert with_aten == ["batch_norm.tile_statistics", *norm]


@pytest.mark.parametrize(("implementation", "momentum"), [("triton", 0.1), ("aten", None)])
def test_it_trains_as_the_modules_do(implementation: str, momentum: float | None) -> None:
    """In float64: result, gradients and running statistics of a step are those of PyTorch's modules."""
    maps, layers = make_maps(), make_layers(momentum=momentum)
    twins = copy.deepcopy(layers)

    result, expected = conv_bn_relu_train(maps, *layers, implementation=implementation), reference(maps, *twins)

    grads = torch.autograd.grad(result.square().sum(), [*maps, *layers.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [*maps, *twins.parameters()])
    for actual, want in zip((result, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state(layers), state(twins), **EXACT)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of which GPUs have none
@pytest.mark.parametrize(("where", "special"), [("map", math.inf), ("weight", math.inf), ("upstream", math.nan)])
def test_nan_and_infinity_spread_as_in_pytorch(where: str, special: float) -> None:
    """A channel that is no number any more is no number in result and gradients, and no other channel is."""
    maps, layers = make_maps(), make_layers(padding=0)
    grad = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    {"map": maps[1].data[0, 1], "weight": layers[0].weight.data[1, 2], "upstream": grad[0, 1]}[where][1] = special
    twins = copy.deepcopy(layers)
    leaves, others = ([*maps, each[0].weight, *each[1].parameters()] for each in (layers, twins))

    result, expected = conv_bn_relu_train(maps, *layers, implementation="triton"), reference(maps, *twins)

    grads, wanted = torch.autograd.grad(result, leaves, grad), torch.autograd.grad(expected, others, grad)
    assert not all(bool(each.isfinite().all()) for each in (expected, *wanted))
    for index, (actual, want) in enumerate(zip((result, *grads), (expected, *wanted), strict=True)):
        assert torch.equal(actual.isfinite(), want.isfinite()), index


def test_gradcheck_passes_in_float64() -> None:
    """All gradients agree with finite differences of the kernels themselves."""
    torch.manual_seed(0)
    shapes = ((1, 2, 3, 4), (1, 1, 4, 3), (2, 3, 3, 3), (2,), (2,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(first: Tensor, second: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        result: Tensor = OP([first, second], weight, None, gamma, beta, 1, EPS, True, False, "triton")[0]
        return result

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_the_result_follows_from_what_a_step_returns() -> None:
    """A map that is dropped can be made again, bit by bit, from the convolution's output."""
    result, y, norm = train_step(make_maps(), *make_layers(), implementation="triton")

    assert_same(batch_norm.normalized(y, norm), result)


def test_an_empty_batch_has_gradients_of_zeros() -> None:
    """Nothing was convolved and nothing summed: zeros, not what was in memory; running statistics stay."""
    layers, x = make_layers(), torch.randn(0, 9, 4, 4, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(state(layers))

    conv_bn_relu_train([x], *layers, implementation="triton").sum().backward()

    for each in layers.parameters():
        assert each.grad is not None
        assert not each.grad.any()
    before["1.num_batches_tracked"] += 1
    torch.testing.assert_close(state(layers), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck_passes(implementation: str) -> None:
    """Schema, fake tensors, autograd and tracing of both ops are sound where kernels run."""
    maps = [torch.randn(2, 2, 4, 3), torch.randn(2, 1, 3, 4)]
    weight, bias, gamma, beta = (torch.randn(shape) for shape in ((3, 3, 1, 1), (3,), (3,), (3,)))
    options = (0, EPS, True, False, implementation)
    out, *kept = OP(maps, weight, bias, gamma, beta, *options)
    given = (torch.randn_like(out), maps, weight, *kept, gamma, beta, *options, True, True)

    torch.library.opcheck(BACKWARD.default, given)

    vectors = [each.requires_grad_() for each in (weight, bias, gamma, beta)]
    torch.library.opcheck(OP.default, ([each.requires_grad_() for each in maps], *vectors, *options))

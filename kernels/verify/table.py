"""KERNELS: every op, what can run it, and how to tell whether what ran is right.

Checks, benchmarks and tuning go through this table and know nothing of single ops: a kernel that is not a row here is
not checked on a GPU, not timed, and not dispatched to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.low_resolution.tap_first import tap_first
from skipcost.kernels.ops import conv_bn_relu, conv_bn_relu_train, up_conv
from skipcost.kernels.ops.conv import pack_weight, why_not_few
from skipcost.kernels.ops.crop_concat import crop_concat
from skipcost.kernels.ops.launch import run
from skipcost.kernels.ops.tiles import Tile
from skipcost.kernels.precision import rounding
from skipcost.kernels.verify import exact as validate
from skipcost.kernels.weights import Pack, run_folded
from skipcost.unet_models.ops import crop_all

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5
LAST = torch.channels_last


@dataclass(frozen=True, slots=True)
class Operands:
    """Random arguments of a call. scale and shift are gamma and beta in training; grad is what comes from above."""

    call: Call
    maps: tuple[Tensor, ...]  # (N, C_i, H_i, W_i), channels_last
    weight: Tensor  # (O, C, k, k); (C, O, 2, 2) of an up_conv; empty for crop_concat
    scale: Tensor  # (O,)
    shift: Tensor  # (O,)
    grad: Tensor  # of the result's shape, in training
    pack: Pack  # what a network prepares once, and no call is charged for
    mean: Tensor  # (O,), zeros: with `variance`, ones, and no eps, batch norm is scale and shift
    variance: Tensor

    @property
    def tf32(self) -> bool:
        """Whether products of 32-bit operands may be rounded to tf32."""
        return self.call.precision == "tf32"

    def joined(self) -> Tensor:
        """The maps cropped and concatenated, as PyTorch does it; one map as it is."""
        return torch.cat(crop_all(self.maps), 1) if len(self.maps) > 1 else self.maps[0]


Results = tuple[Tensor, ...]
Run = Callable[[Operands, Tile | None], Results]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A row of KERNELS.

    implementations: by name, what takes operands and a tile (None for the shipped one; PyTorch's own have none).
    errors: takes operands, results, and whether they are one of our kernels'; returns the worst error over its bound
    by quantity, at most 1 where it is right.
    """

    title: str
    replaces: str
    implementations: dict[str, Run]
    errors: Callable[[Operands, Results, bool], dict[str, float]]


def operands(call: Call, device: str, seed: int = 0, kind: str = "normal") -> Operands:
    """Return random operands of a call; `kind` is a row of `canaries.DATA`: "positive" shows lost digits."""
    from skipcost.kernels.verify.canaries import DATA  # noqa: PLC0415 - only checks and benchmarks need it

    dtype = DTYPES[call.precision]
    sizes = [(call.batch, *source) for source in call.sources]
    maps = tuple(_made(DATA[kind], size, dtype, seed + at, device) for at, size in enumerate(sizes))
    shape = (call.out_channels, call.in_channels, call.kernel, call.kernel)
    if call.op == "up_conv":
        shape = (call.in_channels, call.out_channels, 2, 2)
    fan = max(call.in_channels * max(call.kernel, 1) ** 2, 1)
    weight = _made(DATA[kind], shape, torch.float32, seed + 100, device).div(fan**0.5).to(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    scale = torch.rand(call.out_channels, generator=generator, device=device) + 0.5
    shift = torch.randn(call.out_channels, generator=generator, device=device)
    out = (call.batch, call.out_channels, *call.out_size)
    grad = _made(DATA[kind], out if call.mode == "training" else (0, 1, 1, 1), dtype, seed + 200, device)
    weight = weight.contiguous(memory_format=LAST)
    return Operands(
        call, maps, weight, scale, shift, grad,
        _pack(call, weight, scale, shift), torch.zeros_like(shift), torch.ones_like(scale),
    )  # fmt: skip


def _pack(call: Call, weight: Tensor, scale: Tensor, shift: Tensor) -> Pack:
    axis = 1 if call.op == "up_conv" else 0
    shape = [-1 if at == axis else 1 for at in range(weight.ndim)]
    folded = (weight.float() * scale.view(shape)).to(weight.dtype) if call.out_channels else weight
    return Pack(weight, scale, shift, folded.contiguous(memory_format=LAST), shift.to(weight.dtype))


def _made(
    make: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str
) -> Tensor:  # fmt: skip
    return make(shape, dtype, seed, device).contiguous(memory_format=LAST)


def _eager(given: Operands, _tile: Tile | None) -> Results:
    """What a U-Net in PyTorch does: concatenate, convolve without the redundant bias, batch norm, ReLU, pool."""
    call = given.call
    x = functional.conv2d(given.joined(), given.weight, padding=call.padding)
    x = functional.batch_norm(x, given.mean, given.variance, given.scale, given.shift, eps=0.0)
    return _pooled(call, functional.relu(x, inplace=True) if call.relu else x)


def _folded(given: Operands, _tile: Tile | None) -> Results:
    """Batch norm folded into the weights, bias and ReLU in cuDNN's convolution."""
    call = given.call
    return _pooled(call, run_folded(given.joined(), given.pack, call.padding, relu=call.relu))


def _pooled(call: Call, full: Tensor) -> Results:
    return (full, functional.max_pool2d(full, 2)) if call.op == "conv_bn_relu_pool" else (full,)


def _by(form: str) -> Run:
    """The convolution kernel in one form; "pointer" gives way to "few" where the channels are few."""

    def convolve(given: Operands, tile: Tile | None) -> Results:
        call = given.call
        out, pooled = conv_bn_relu.empty_results(given.maps, given.weight, call.padding, call.op == "conv_bn_relu_pool")
        chosen = form
        if form == "pointer" and not why_not_few(given.maps, pack_weight(given.weight)):
            chosen = "few"
        made = conv_bn_relu.launches(
            given.maps, given.weight, given.scale, given.shift, out,
            padding=call.padding, relu=call.relu, pooled=pooled, tf32=given.tf32, form=chosen, tile=tile,
        )  # fmt: skip
        run(made)
        return (out,) if pooled is None else (out, pooled)

    return convolve


def _worst(given: Operands, actual: Tensor, exact: validate.Exact, *, roundings: int) -> float:
    allowed = validate.allowed(exact, actual.dtype, tf32=given.tf32, roundings=roundings)
    return validate.worst(actual, exact.value, allowed)


def _convolution_errors(given: Operands, results: Results, ours: bool) -> dict[str, float]:
    """PyTorch's ways round the convolution's result, or the folded weight, once more than the kernel does."""
    call = given.call
    exact = validate.conv(given.maps, given.weight, given.scale, given.shift, padding=call.padding, relu=call.relu)
    full = results[0]
    found = {"out": _worst(given, full, exact, roundings=0 if ours else 2)}
    if len(results) > 1:
        found["pooled"] = 0.0 if torch.equal(results[1], functional.max_pool2d(full, 2)) else float("inf")
    return found


def _up_conv(given: Operands, tile: Tile | None) -> Results:
    x, weight, bias = given.maps[0], given.weight, given.pack.bias
    out = x.new_empty((x.shape[0], weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])).contiguous(memory_format=LAST)
    run(up_conv.launches(x, weight, bias, out, tf32=given.tf32, tile=tile))
    return (out,)


def _up_conv_eager(given: Operands, _tile: Tile | None) -> Results:
    return (functional.conv_transpose2d(given.maps[0], given.weight, given.pack.bias, stride=2),)


def _up_conv_errors(given: Operands, results: Results, ours: bool) -> dict[str, float]:
    exact = validate.up_conv(given.maps[0], given.weight, given.pack.bias)
    return {"out": _worst(given, results[0], exact, roundings=0 if ours else 1)}


def _tap_first(given: Operands, _tile: Tile | None) -> Results:
    x, weight, bias = given.maps[0], given.weight, given.pack.bias
    return (tap_first(x, weight, bias, factor=given.call.factor, padding=given.call.padding),)


def _tap_first_eager(given: Operands, _tile: Tile | None) -> Results:
    up = functional.interpolate(given.maps[0], scale_factor=given.call.factor, mode="bilinear")
    return (functional.conv2d(up, given.weight, given.pack.bias, padding=given.call.padding),)


def _tap_first_errors(given: Operands, results: Results, ours: bool) -> dict[str, float]:
    """PyTorch's way rounds the up-sampled map too."""
    x, weight, bias, call = given.maps[0], given.weight, given.pack.bias, given.call
    exact = validate.up_sampled_conv(x, weight, bias, factor=call.factor, padding=call.padding)
    return {"out": _worst(given, results[0], exact, roundings=0 if ours else 2)}


def _crop_concat_errors(given: Operands, results: Results, _ours: bool) -> dict[str, float]:
    return {"out": 0.0 if torch.equal(results[0], given.joined()) else float("inf")}


def _step(forward: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    """Forward and backward pass of a layer: result, convolution's output, gradients of maps, weight, gamma, beta."""

    def step(given: Operands, _tile: Tile | None) -> Results:
        leaves = [each.detach().requires_grad_() for each in (*given.maps, given.weight, given.scale, given.shift)]
        with torch.enable_grad(), rounding(tf32=given.call.precision == "tf32"):
            out, stored = forward(given.call, leaves[:-3], *leaves[-3:])
            grads = torch.autograd.grad(out, leaves, given.grad)
        return out.detach(), stored.detach(), *grads

    return step


def _train_eager(
    call: Call, maps: list[Tensor], weight: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    joined = torch.cat(crop_all(maps), 1) if len(maps) > 1 else maps[0]
    stored = functional.conv2d(joined, weight, padding=call.padding)
    out = functional.batch_norm(stored, None, None, gamma, beta, training=True, eps=EPS)
    return (functional.relu(out) if call.relu else out), stored


def _train(implementation: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        call: Call, maps: list[Tensor], weight: Tensor, gamma: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        op = getattr(torch.ops.skipcost, conv_bn_relu_train.OP)
        tf32 = call.precision == "tf32"
        out, stored, _, _ = op(maps, weight, None, gamma, beta, call.padding, EPS, call.relu, tf32, implementation)
        return out, stored

    return forward


def _train_errors(given: Operands, results: Results, ours: bool) -> dict[str, float]:
    """What follows from the convolution's output is judged by that output as it was stored; see `validate`."""
    call, (out, stored, *grads) = given.call, results
    roundings = 0 if ours else 1
    raw = validate.conv(given.maps, given.weight, padding=call.padding)
    normal = validate.batch_norm(stored, given.scale, given.shift, eps=EPS, relu=call.relu).result
    found = {
        "convolution": _worst(given, stored, raw, roundings=roundings),
        "out": validate.worst(out, normal.value, validate.allowed(normal, out.dtype)),
    }
    exact = validate.conv_bn_relu_gradients(
        given.maps, given.weight, stored, given.scale, given.shift, given.grad,
        padding=call.padding, eps=EPS, relu=call.relu,
    )  # fmt: skip
    names = [*(f"gradient of map {at}" for at in range(len(given.maps))), "gradient of weight", "of gamma", "of beta"]
    for name, grad, each in zip(names, grads, exact, strict=True):
        found[name] = _worst(given, grad, each, roundings=roundings)
    return found


_CONVOLUTIONS: dict[str, Run] = {
    "reference": _eager,
    "cudnn": _folded,
    "triton": _by("pointer"),
    "tma": _by("tma"),
}
KERNELS: dict[str, Kernel] = {
    "conv_bn_relu": Kernel(
        "convolution, batch norm, ReLU", "conv2d, batch_norm, relu", _CONVOLUTIONS, _convolution_errors
    ),
    "conv_bn_relu_pool": Kernel(
        "convolution, batch norm, ReLU and its pooled map",
        "conv2d, batch_norm, relu, max_pool2d",
        _CONVOLUTIONS,
        _convolution_errors,
    ),
    "concat_conv_bn_relu": Kernel(
        "convolution over maps that are never concatenated",
        "cat of crops, conv2d, batch_norm, relu",
        _CONVOLUTIONS,
        _convolution_errors,
    ),
    "conv_bn_relu_train": Kernel(
        "training step of convolution, batch norm, ReLU",
        "cat of crops, conv2d, batch_norm, relu and their gradients",
        {"reference": _step(_train_eager), "cudnn": _step(_train("aten")), "triton": _step(_train("triton"))},
        _train_errors,
    ),
    "up_conv": Kernel(
        "2x2 transposed convolution",
        "conv_transpose2d",
        {"reference": _up_conv_eager, "triton": _up_conv},
        _up_conv_errors,
    ),
    "tap_first": Kernel(
        "convolution over an up-sampled map, at low resolution",
        "interpolate, conv2d",
        {"reference": _tap_first_eager, "triton": _tap_first},
        _tap_first_errors,
    ),
    "crop_concat": Kernel(
        "crop and concatenate",
        "cat of crops",
        {
            "reference": lambda given, _tile: (given.joined(),),
            "triton": lambda given, _tile: (crop_concat(given.maps),),
        },
        _crop_concat_errors,
    ),
}

"""Convolution, batch norm with the statistics of the batch, and ReLU, as one op with its gradients.

The reference is `unet_models.ops`: merge the maps by concatenation, then `conv_norm_act` in training.

What is fused: forwards, the concatenation into the convolution (the maps are cropped and read side by side), the
statistics into its epilogue, and the normalisation with ReLU. Backwards, ReLU's gradient into both passes of batch
norm's, and the concatenation into the weight's. Implementation "triton" does all of that; "aten" leaves convolutions to
cuDNN, on a joined map that lives only while they run, and takes one more pass for the statistics. The kernels read
every map through its own window; the joined map's gradient is made, and its parts are the maps' own.

Bytes saved: forwards, per output map one read (with "triton", two) and the copy of the joined map; backwards, ReLU's
read and write. Kept for the gradients are maps, weight, the convolution's output and four vectors, but no joined map:
fp32, 128 x 128, U-Net (depth 4, width 16) keeps 91 % of what it keeps eagerly, UNet++ (3, 16) 80 %, UNet 3+ (3, 16)
88 %; the result itself follows from what is kept, see `recompute`. Sums are added in a fixed order, without atomics:
with "triton", the same input gives the same bits.

When it loses: where the product decides, which is from 512 channels or below 32x32 pixels on, cuDNN is faster: "aten".

Tried on no GPU yet: checked in Triton's interpreter, and compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels.ops.batch_norm import (
    Norm,
    gradient_launches,
    normalized,
    precise,
    statistics_launches,
    write_gradients,
    write_statistics,
)
from skipcost.kernels.ops.checks import check_maps, check_weight, output_size
from skipcost.kernels.ops.conv import (
    NHWC,
    aten_grads,
    aten_output,
    channels_last,
    conv_launch,
    need_of,
    pack_weight,
    padding_of,
    statistics_tiles,
)
from skipcost.kernels.ops.conv_bn_relu import pick_form
from skipcost.kernels.ops.crop_concat import gradients as window_gradients
from skipcost.kernels.ops.crop_concat import like_channels_last
from skipcost.kernels.ops.launch import Launch, architecture_of, on_triton, run
from skipcost.kernels.ops.tiles import FEW_CHANNELS, tile_for
from skipcost.kernels.ops.weight_gradient import weight_gradient_launches
from skipcost.kernels.precision import computing_type, tf32_allowed
from skipcost.unet_models.ops import crop, crop_all

OP = "conv_bn_relu_train"
IMPLEMENTATIONS = ("aten", "triton")


def conv_bn_relu_train(
    maps: Sequence[Tensor],
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    *,
    relu: bool = True,
    implementation: str = "aten",
) -> Tensor:
    """Return relu(norm(conv(maps))), (N, O, H', W') in channels_last, and update the norm's running statistics.

    maps: (N, C_i, H_i, W_i), centre-cropped to the smallest, channels side by side. conv: 3x3 or 1x1, stride 1,
    padding 0 or 1. norm: in training, or without running statistics. implementation: who convolves, "aten" (cuDNN on a
    GPU) or "triton"; on a CPU it is ATen in any case. Under autocast, maps and weight are cast as conv2d would cast
    them. The convolution's bias, which batch norm takes away again, is not added; it moves the running mean, and its
    gradient is exactly 0.
    """
    return train_step(maps, conv, norm, relu=relu, implementation=implementation)[0]


def train_step(
    maps: Sequence[Tensor],
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    *,
    relu: bool = True,
    implementation: str = "aten",
) -> tuple[Tensor, Tensor, Norm]:
    """Like `conv_bn_relu_train`, and return what its result follows from: `batch_norm.normalized(y, norm)`, bit by bit.

    y: (N, O, H', W'), the convolution's output, which is kept for the gradients anyway. It has no gradient itself.
    """
    padding = _checked_padding(conv, norm, implementation)
    *maps, weight = (each.to(computing_type(each)) for each in (*maps, conv.weight))
    check_maps(OP, maps)
    wanted = precise(weight)
    gamma = weight.new_ones(len(weight), dtype=wanted) if norm.weight is None else norm.weight.to(wanted)
    beta = weight.new_zeros(len(weight), dtype=wanted) if norm.bias is None else norm.bias.to(wanted)
    check_weight(OP, maps, weight, padding, {"gamma": gamma, "beta": beta})
    shape = (maps[0].shape[0], len(weight), *output_size(maps, weight.shape[2], padding))
    values = shape[0] * shape[2] * shape[3]
    if values == 1:
        message = f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}"
        raise ValueError(message)
    options = (padding, norm.eps, relu, tf32_allowed(), implementation)
    out, y, mean, variance = _forward(maps, weight, conv.bias, gamma, beta, *options)
    _update_running(norm, mean, variance, values, conv.bias)
    return out, y, Norm(mean, variance, gamma, beta, norm.eps, relu)


def _checked_padding(conv: nn.Module, norm: nn.Module, implementation: str) -> int:
    """Return the convolution's padding; refuse layers, and implementations, that there are no kernels for."""
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        message = (
            f"{OP} got {type(conv).__name__} and {type(norm).__name__}: it takes an nn.Conv2d and an nn.BatchNorm2d"
        )
        raise ValueError(message)  # noqa: TRY004 - every input that is refused raises ValueError
    plain = (conv.stride, conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    rows, columns = padding_of(conv)
    if not plain or rows != columns:
        message = f"{OP} got {conv}: stride, dilation and groups must be 1, the padding one number, of zeros"
        raise ValueError(message)
    if not norm.training and norm.running_mean is not None:
        message = (
            f"{OP} got a norm in evaluation, which uses its running statistics: call norm.train(), or conv_bn_relu"
        )
        raise ValueError(message)
    if norm.eps <= 0:
        message = f"{OP} got a norm with eps={norm.eps}: it must be positive in training"
        raise ValueError(message)
    if implementation not in IMPLEMENTATIONS:
        message = f"implementation={implementation!r} of {OP} is unknown; accepted: {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(message)
    return rows


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, values: int, bias: Tensor | None) -> None:
    """Do to the running statistics what the module itself does: the variance unbiased, nothing for an empty batch."""
    if not (norm.training and norm.track_running_stats):
        return
    factor: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    if norm.running_mean is None or norm.running_var is None or not values:
        return
    mean = mean if bias is None else mean + bias
    for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (values / (values - 1)))):
        running.copy_(torch.lerp(running.to(batch.dtype), batch, factor))


@torch.library.custom_op("skipcost::conv_bn_relu_train", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    maps: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001 - neither in y nor in the mean: it is here to get its gradient, of zeros
    gamma: Tensor,
    beta: Tensor,
    padding: int,
    eps: float,
    relu: bool,
    tf32: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, the convolution's output y, its mean and biased variance; only the result has gradients."""
    partials = None
    if on_triton(weight) and implementation == "triton":
        y = empty_output(maps, weight, padding)
        launch, partials = output_launch(maps, weight, y, padding=padding, tf32=tf32)
        run([launch])
    else:
        y = aten_output(maps, weight, padding=padding)
    mean, variance = (y.new_empty(y.shape[1], dtype=precise(y)) for _ in range(2))
    if on_triton(y):
        run(statistics_launches(y, mean, variance, partials))
    else:
        write_statistics(y, mean, variance)
    return normalized(y, Norm(mean, variance, gamma.contiguous(), beta.contiguous(), eps, relu)), y, mean, variance


@_forward.register_fake
def _(
    maps: list[Tensor], weight: Tensor, _bias: Any, _gamma: Any, _beta: Any, padding: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, variance = (weight.new_empty(weight.shape[0], dtype=precise(weight)) for _ in range(2))
    return empty_output(maps, weight, padding), empty_output(maps, weight, padding), mean, variance


@torch.library.custom_op("skipcost::conv_bn_relu_train_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    grad: Tensor, maps: list[Tensor], weight: Tensor, y: Tensor,
    mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor,
    padding: int, eps: float, relu: bool, tf32: bool, implementation: str, joined_wanted: bool, weight_wanted: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of the joined map and of the weight, where wanted, and those of beta and gamma, (2, O)."""
    norm = Norm(mean, variance, gamma.contiguous(), beta.contiguous(), eps, relu)
    sums, y_grad = y.new_empty((2, y.shape[1]), dtype=precise(y)), torch.empty_like(y)
    if on_triton(y):
        run(gradient_launches(y, adjacent(grad), norm, sums, y_grad))
    else:
        write_gradients(y, grad, norm, sums, y_grad)
    joined_grad, weight_grad = None, None
    if on_triton(y) and implementation == "triton":
        if joined_wanted:
            joined_grad = empty_joined(maps)
            run([joined_grad_launch(weight, y_grad, joined_grad, padding=padding, tf32=tf32)])
        if weight_wanted:
            packed = weight.new_empty([weight.shape[axis] for axis in NHWC])
            run(weight_grad_launches(maps, y_grad, packed, padding=padding, tf32=tf32))
            weight_grad = packed.permute(0, 3, 1, 2)
    else:
        wanted = (joined_wanted, weight_wanted)
        joined_grad, weight_grad = aten_grads(maps, weight, y_grad, padding=padding, wanted=wanted)
    if weight_grad is not None and weight_grad.stride() != weight.stride():
        weight_grad = torch.empty_like(weight).copy_(weight_grad)
    return [each for each in (joined_grad, weight_grad, sums) if each is not None]


@_backward.register_fake
def _(_grad: Any, maps: list[Tensor], weight: Tensor, y: Tensor, *others: Any) -> list[Tensor]:
    *_, joined_wanted, weight_wanted = others
    sums = y.new_empty((2, y.shape[1]), dtype=precise(y))
    joined = [empty_joined(maps)] if joined_wanted else []
    return [*joined, *([torch.empty_like(weight)] if weight_wanted else []), sums]


@register_flop_formula(torch.ops.skipcost.conv_bn_relu_train)
def _flops(_maps: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """As many as conv2d over the joined maps: 2 per element of the weight and output pixel."""
    batch, _, *size = out_shape[0]
    return 2 * int(prod(weight)) * int(batch) * int(prod(size))


@register_flop_formula(torch.ops.skipcost.conv_bn_relu_train_backward)
def _backward_flops(grad: Any, _maps: Any, weight: Any, *others: Any, **_: Any) -> int:
    """As many as convolution_backward: those of conv2d for each of its two gradients that is wanted."""
    batch, _, *size = grad
    return 2 * int(prod(weight)) * int(batch) * int(prod(size)) * int(sum(others[-2:]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep maps, weight, y and four vectors. What is no gradient's business says so: y, its mean and its variance."""
    maps, weight, bias, gamma, beta, *ctx.options = inputs
    _, *rest = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, *rest, gamma, beta, *maps)
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)  # else zeros are made for the gradient of y
    ctx.shapes = [each.shape for each in maps]
    ctx.channels_last = [like_channels_last(each) for each in maps]
    ctx.size = crop_all(maps)[0].shape[-2:]


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    """Return a gradient for each argument of the op: of maps that were not cropped, views of one joined gradient."""
    nothing = [None] * len(ctx.options)
    if grad is None:
        return [None] * len(ctx.shapes), None, None, None, None, *nothing
    weight, y, mean, variance, gamma, beta, *maps = ctx.saved_tensors
    maps_need, weight_needs, bias_needs, *_ = ctx.needs_input_grad
    wanted = (any(maps_need), weight_needs)
    *grads, sums = _backward(grad, maps, weight, y, mean, variance, gamma, beta, *ctx.options, *wanted)
    weight_grad = grads.pop() if weight_needs else None
    map_grads = window_gradients(ctx, grads[0]) if grads else [None] * len(maps)
    bias_grad = weight.new_zeros(len(weight), dtype=ctx.bias_dtype) if bias_needs else None
    return map_grads, weight_grad, bias_grad, sums[1], sums[0], *nothing


_forward.register_autograd(_gradients, setup_context=_keep)


def empty_output(maps: Sequence[Tensor], weight: Tensor, padding: int) -> Tensor:
    """Allocate what the convolution of weight (O, sum of C_i, k, k) writes: (N, O, H', W') in channels_last."""
    return _empty(maps[0], weight.shape[0], *output_size(maps, weight.shape[2], padding))


def empty_joined(maps: Sequence[Tensor]) -> Tensor:
    """Allocate the maps (N, C_i, H_i, W_i), cropped and side by side: (N, sum of C_i, h, w) in channels_last."""
    height, width = (min(each.shape[axis] for each in maps) for axis in (2, 3))
    return _empty(maps[0], sum(each.shape[1] for each in maps), height, width)


def output_launch(
    maps: Sequence[Tensor], weight: Tensor, y: Tensor, *, padding: int, tf32: bool
) -> tuple[Launch, Tensor]:
    """Convolve the maps into y (N, O, H', W'); also return where statistics of its tiles go, (tiles, 3, O)."""
    launch = _convolution(crop_all(maps), pack_weight(weight), y, padding, tf32=tf32, summarized=True)
    return launch, launch.arguments["partials"]


def joined_grad_launch(weight: Tensor, grad: Tensor, joined_grad: Tensor, *, padding: int, tf32: bool) -> Launch:
    """Write the gradient of the joined map (N, C, h, w), given that of the output (N, O, H', W') in channels_last.

    It is a convolution too: the taps turned round, input and output channels exchanged, padded by what is missing.
    """
    turned = pack_weight(weight.flip(2, 3).transpose(0, 1))
    around = weight.shape[2] - 1 - padding
    if around < 0:  # the frame that a padded 1x1 convolution adds depends on no input
        grad = crop(grad, *joined_grad.shape[2:])
    return _convolution([grad], turned, joined_grad, max(around, 0), tf32=tf32)


def weight_grad_launches(
    maps: Sequence[Tensor], grad: Tensor, weight_grad: Tensor, *, padding: int, tf32: bool
) -> list[Launch]:
    """Write the gradient of the weight, as (O, k, k, sum of C_i), given that of the output in channels_last."""
    windows = crop_all(maps)
    if len(windows) > 1 or windows[0].shape[1] > FEW_CHANNELS:
        windows = [adjacent(each) for each in windows]
    return weight_gradient_launches(windows, grad, weight_grad, padding=padding, tf32=tf32)


def adjacent(x: Tensor) -> Tensor:
    """Return the map (N, C, H, W), with its channels next to each other: a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else channels_last(x)


def _convolution(
    sources: Sequence[Tensor], packed: Tensor, out: Tensor, padding: int, *, tf32: bool, summarized: bool = False
) -> Launch:
    architecture = architecture_of(out.device)
    form = pick_form(sources, packed, out, architecture, tf32=tf32)
    if form != "few":
        sources = [adjacent(each) for each in sources]
    tile = tile_for(need_of(sources, packed, out, tf32=tf32), form, architecture)
    partials = None
    if summarized:
        partials = out.new_empty((statistics_tiles(out, tile), 3, out.shape[1]), dtype=precise(out))
    return conv_launch(sources, packed, out, padding=padding, partials=partials, tf32=tf32, tile=tile)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

"""`backend=rewritten`: the executor's ops, with convolutions over up-sampled maps computed at low resolution.

It runs the ops that `low` makes of several: an edge's up-sampling and convolution (`tap_first`), a node's convolution
over a concatenation with an up-sampled map (`split_concat`), and at inference over one with the map of a transposed
convolution (`composed_up_conv`). Every call counts both forms and takes the cheaper. Maps that edges
convolve for a concatenation go through ReLU into their place (`relu_concat`). At inference in 32 bits a
batch norm goes into the weights in front of it, anew in every call, where they are few beside the map's values
(`folds`): a pass over the map less, and nothing kept. The functions are the reference's but for rounding;
parameters and state_dict stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.compilers import constant
from skipcost.kernels.dispatch.low_resolution import choose, choose_composed, folds
from skipcost.kernels.low_resolution.composed import composed, composed_up_conv
from skipcost.kernels.low_resolution.tap_first import axes, seen_of, split_concat
from skipcost.kernels.ops.relu_concat import relu_concat
from skipcost.kernels.precision import tf32_allowed
from skipcost.kernels.programs.low import low
from skipcost.kernels.weights import affine, why_not_fold
from skipcost.unet_models.ops import REFERENCE, ConvNormAct, Ops, Step, merge, run, take, up_conv, up_sample
from skipcost.unet_models.sizes import follow
from skipcost.unet_models.topology import INTERPOLATIONS

HALF = 2  # bytes
AUTOCAST = ("cpu", "cuda")  # PyTorch refuses the question for others


@dataclass(frozen=True, slots=True)
class RewrittenOps:
    """The ops of a network. device: whose rates the choice is counted with, "cpu" or "cuda"; None: where the maps are.

    A trace without data names the device that it stands for; without one it counts as on a CPU.
    """

    device: str | None = None

    def ops(self) -> Ops:
        """Return the functions to build a network on."""
        functions = {
            "layer": self._run_layer,
            "up_layer": self._run_up_layer,
            "up_join_layer": self._run_up_layer,
            "up_conv_layer": self._run_up_conv_layer,
            "relu_join": self._run_relu_join,
        }
        return replace(REFERENCE.replacing(**functions), rewrite=low)

    def _run_layer(self, step: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        return self.conv_norm_act(_layer(step, layers), maps)

    def _run_up_layer(self, step: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        up = step.op.parts[0]
        return self.up_concat_conv(_layer(step, layers), maps, up.factor, up.how)

    def _run_up_conv_layer(self, step: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        return self.up_conv_concat_conv(_layer(step, layers), maps, layers[0])

    def _run_relu_join(self, step: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        find = dict(zip(step.layers, layers, strict=True)).__getitem__
        if torch.compiler.is_compiling():  # no generators there
            run(step.inside, find, maps)
            joined: Tensor = maps.pop()
            return joined
        shapes: list[tuple[int, ...]] = [tuple(map(int, each.shape[1:])) for each in maps]
        follow(step.op.parts, shapes)
        return relu_concat(_arriving(step, find, maps), cast("tuple[int, int, int]", shapes[-1]))

    def conv_norm_act(self, layer: ConvNormAct, maps: list[Tensor]) -> Tensor:
        """Convolve the last of the maps, then norm and ReLU; out of the list, so that only this frame has the map."""
        x = maps.pop()
        if not _folds(layer, x, (int(x.shape[2]), int(x.shape[3]))):
            held = [layer.conv(x)]
            del x
            return _norm_act(layer, held)
        weight, bias = _folded(layer)
        x = functional.conv2d(x, weight, bias, padding=_padding(layer))
        return _act(layer, x)

    def up_concat_conv(self, layer: ConvNormAct, maps: list[Tensor], factor: int, how: str) -> Tensor:
        """Up-sample the last of the maps, concatenate, if there are others, and convolve. It empties the list."""
        x = maps.pop()
        window = seen_of((x.shape[2], x.shape[3]), factor, [(each.shape[2], each.shape[3]) for each in maps])
        if not self._takes(layer, x, factor, how, window):
            maps.append(up_sample(x, factor, how))
            del x
            merged = [merge(maps, "concat")]
            maps.clear()
            return self.conv_norm_act(layer, merged)
        folded = _folds(layer, x, window[2:])
        x, weight, bias = _cast(layer, x, folded=folded)
        dtype = x.dtype
        others = [each.to(dtype) for each in maps]
        maps.clear()
        mode, align_corners = INTERPOLATIONS[how]
        settings: dict[str, Any] = {"factor": factor, "mode": mode, "align_corners": align_corners}
        held = [split_concat(others, x, weight, bias, padding=_padding(layer), **settings)]
        del others
        return _norm_act(layer, held, normed=folded)

    def up_conv_concat_conv(self, layer: ConvNormAct, maps: list[Tensor], up: nn.ConvTranspose2d) -> Tensor:
        """Up-sample the last of the maps by `up`, concatenate, if there are others, and convolve."""
        if not self._composes(layer, maps, up):
            maps.append(up_conv(up, maps.pop()))
            merged = [merge(maps, "concat")]
            maps.clear()
            return self.conv_norm_act(layer, merged)
        x, weight, _ = _cast(layer, maps.pop())
        others = [each.to(x.dtype) for each in maps]
        maps.clear()
        made = composed(up, layer.conv, x.dtype)
        of_maps = weight[:, : weight.shape[1] - up.out_channels]
        held = [composed_up_conv(others, x, of_maps, made, padding=_padding(layer))]
        del x
        return _norm_act(layer, held)

    def _composes(self, layer: ConvNormAct, maps: list[Tensor], up: nn.ConvTranspose2d) -> bool:
        """Whether the composed form can run and is counted as the cheaper: not for a compiler, nor with gradients."""
        if torch.compiler.is_compiling() or layer.training or _needs_gradients(maps, layer.conv, up):
            return False
        *others, x = maps
        batch, in_channels, height, width = (int(size) for size in x.shape)
        if any(each.shape[2] < 2 * height or each.shape[3] < 2 * width for each in others):
            return False  # the up-sampled map would be cropped
        size, channels = (height, width), (in_channels, up.out_channels, layer.conv.out_channels)
        kind, device = self._rates(x)
        alone = not others
        choice = choose_composed(size, channels, _padding(layer), batch, kind=kind, device=device, alone=alone)
        return choice.taken

    def _rates(self, x: Tensor) -> tuple[str, str]:
        """Return what the rates are filed under, for convolutions of a map: the kind of number, and the device."""
        kind = "16 bits" if _computing(x).itemsize == HALF else "tf32" if tf32_allowed() else "fp32"
        return kind, self.device or ("cuda" if x.is_cuda else "cpu")

    def _takes(
        self, layer: ConvNormAct, x: Tensor, factor: int, how: str, window: tuple[int, int, int, int]
    ) -> bool:  # fmt: skip
        """Whether tap-first is counted as the cheaper form of a call."""
        batch, in_channels, height, width = (int(size) for size in x.shape)
        kind, device = self._rates(x)
        settings = (factor, *INTERPOLATIONS[how], _padding(layer), tuple(int(each) for each in window))
        channels = in_channels, layer.conv.out_channels
        taken: bool = _taken((height, width), layer.conv.kernel_size, settings, channels, batch, kind, device)
        return taken


def _layer(step: Step, layers: list[Any]) -> ConvNormAct:
    """The layer of a step; without its ReLU where that is left to what follows."""
    layer: ConvNormAct = layers[-1]
    return layer if step.op.parts[-1].kind == "relu" else layer.without_act()


def _arriving(step: Step, find: Callable[[tuple[str, ...]], Any], maps: list[Any]) -> Iterator[Tensor]:
    """Make the maps of a concatenation one after the other, each without its ReLU, and keep none."""
    *inside, join = step.inside
    for each in inside:
        if each.op.kind == "relu":
            maps.append(take(each, maps).pop())
        else:
            run([_without_relu(each)], find, maps)
        if len(maps) - 1 in join.op.reads:
            yield _let_go(maps)


def _without_relu(step: Step) -> Step:
    parts = step.op.parts
    ends = parts and parts[-1].kind == "relu"
    return step._replace(op=step.op._replace(parts=parts[:-1])) if ends else step


def _let_go(maps: list[Any]) -> Any:
    """Return the last of the maps, and keep its place alone."""
    last, maps[-1] = maps[-1], None
    return last


@constant  # sizes are constants to a compiler here
def _taken(*call: Any) -> bool:
    return _counted(*call)


@lru_cache(maxsize=1024)  # the same few in every step
def _counted(
    size: tuple[int, ...], kernel: tuple[int, ...], settings: tuple[int, str, bool, int, tuple[int, ...]],
    channels: tuple[int, int], batch: int, kind: str, device: str,
) -> bool:  # fmt: skip
    return choose(*axes(size, kernel, *settings), channels, batch, kind=kind, device=device).taken


def _padding(layer: ConvNormAct) -> int:
    return int(layer.conv.padding[0])


def _computing(x: Tensor) -> torch.dtype:
    """Return the type that convolutions of a map compute in: autocast's, where it is on."""
    device = x.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _needs_gradients(maps: list[Tensor], *layers: nn.Module) -> bool:
    given = (*maps, *(each for layer in layers for each in layer.parameters()))
    return torch.is_grad_enabled() and any(each.requires_grad for each in given)


def _folds(layer: ConvNormAct, x: Tensor, size: tuple[int, int]) -> bool:
    """Whether the layer's norm goes into its weights, for a convolution over (H, W) pixels."""
    weight = layer.conv.weight
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(layer.norm, nn.BatchNorm2d):
        return False
    if why_not_fold(layer.norm) or weight.itemsize == HALF or _computing(x) != weight.dtype:
        return False
    height, width = (side + 2 * _padding(layer) - layer.conv.kernel_size[0] + 1 for side in size)
    return folds(weight.numel(), layer.conv.out_channels * height * width)


def _folded(layer: ConvNormAct) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias with its norm in them."""
    scale, shift = affine(layer.conv, layer.norm)
    assert scale is not None
    assert shift is not None
    return layer.conv.weight * scale.view(-1, 1, 1, 1), shift


def _cast(layer: ConvNormAct, x: Tensor, *, folded: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring a map, the weight and the bias to the type that PyTorch's convolution would bring them to."""
    if folded:
        return x, *_folded(layer)
    dtype, bias = _computing(x), layer.conv.bias
    return x.to(dtype), layer.conv.weight.to(dtype), None if bias is None else bias.to(dtype)


def _norm_act(layer: ConvNormAct, held: list[Tensor], *, normed: bool = False) -> Tensor:
    """Do what is behind a convolution; out of a list, so that only this frame has the map."""
    x = held.pop()
    if layer.norm is not None and not normed:
        x = layer.norm(x)
    return _act(layer, x)


def _act(layer: ConvNormAct, x: Tensor) -> Tensor:
    return functional.relu(x, inplace=True) if layer.act else x

"""`backend=fused`: the executor's ops on the suite's kernels, each call on the implementation that dispatch chooses.

`FusedOps.ops()` is the reference with functions replaced, and with those of the ops that `fuse` makes of several: a
convolution with its norm and ReLU, that with the concatenation in front of it (no concatenated map, or one written in
place), and that with the pool behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipcost.kernels.batch_norm import Norm, normalized
from skipcost.kernels.calls import Call
from skipcost.kernels.conv import pack_weight, padding_of, why_not_few
from skipcost.kernels.conv_bn_relu import concat_conv_bn_relu, conv_bn_relu_pool
from skipcost.kernels.conv_bn_relu_train import train_step
from skipcost.kernels.crop_concat import merge
from skipcost.kernels.devices import Device, device_or_guess
from skipcost.kernels.dispatch import choose
from skipcost.kernels.fused_program import fuse
from skipcost.kernels.launch import architecture_of
from skipcost.kernels.max_pool import pool
from skipcost.kernels.precision import computing_type, tf32_allowed
from skipcost.kernels.prepack import affine, pack, run_folded, why_not_fold
from skipcost.kernels.recompute import Recipes, remembering
from skipcost.kernels.up_conv import up_conv, up_conv_concat
from skipcost.unet_models.ops import REFERENCE, ConvNormAct, Ops, Step, conv_norm_act
from skipcost.unet_models.ops import merge as reference_merge
from skipcost.unet_models.ops import pool as reference_pool
from skipcost.unet_models.ops import up_conv as reference_up_conv

OURS = ("triton", "tma")
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def dispatched(call: Call, x: Tensor) -> str:
    """Name the implementation that dispatch chooses on the device of `x`."""
    return choose(call, card_of(x)).implementation


@dataclass(frozen=True, slots=True)
class FusedOps:
    """The ops of one network.

    choose: takes a call and one of its maps, and names the implementation. recipes: what training does not keep for
    its backward pass, because it can be made again.
    """

    choose: Callable[[Call, Tensor], str] = dispatched
    recipes: Recipes = field(default_factory=Recipes)

    def ops(self) -> Ops:
        """Return the table to build a network on."""
        functions = {
            "up_conv": self._run_up_conv,
            "join": self._run_join,
            "layer": self._run_layer,
            "layer_pool": self._run_layer_pool,
            "join_layer": self._run_join_layer,
            "join_up": self._run_join_up,
        }
        ours = replace(REFERENCE.replacing(**functions), rewrite=fuse, around=self.around)
        return remembering(ours, self.recipes)

    def _run_up_conv(self, _: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        return self.up_conv(layers[0], maps.pop())

    def _run_join(self, step: Step, _: list[Any], maps: list[Any]) -> Tensor:
        return self.merge(maps, step.op.how)

    def _run_layer(self, _: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        return self.conv_norm_act(layers[0], maps.pop())

    def _run_layer_pool(self, _: Step, layers: list[Any], maps: list[Any]) -> tuple[Tensor, Tensor]:
        return self.conv_pool(layers[0], maps.pop())

    def _run_join_layer(self, _: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        *ups, layer = layers
        return self.merge_conv(layer, maps, ups[0] if ups else None)

    def _run_join_up(self, _: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        return self._joined(maps, layers[0])

    def around(self) -> AbstractContextManager[object]:
        """Return what a forward pass runs in: with gradients, where maps are filed under how they are made."""
        filed = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return self.recipes if filed else nullcontext()

    def conv_norm_act(self, layer: ConvNormAct, x: Tensor) -> Tensor:
        """Convolve one map, with norm and ReLU."""
        return self._convolve(layer, [x], "conv_bn_relu")

    def up_conv(self, layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
        """2x2 transposed convolution, stride 2."""
        x, weight = _cast(x, layer.weight)
        if self._ask("up_conv", _sizes([x]), x, layer) == "triton":
            return up_conv(x, weight, _bias(layer, x))
        return reference_up_conv(layer, x)

    def merge(self, maps: list[Tensor], how: str) -> Tensor:
        """Crop and concatenate, with the crop-concat kernel where it wins, or add."""
        if how == "concat" and len(maps) > 1 and self._ask("crop_concat", _sizes(maps), maps[0]) == "triton":
            return merge(maps, how)
        return reference_merge(maps, how)

    def merge_conv(self, layer: ConvNormAct, maps: list[Tensor], up: nn.ConvTranspose2d | None) -> Tensor:
        """Concatenate, the last map up-sampled before where `up` is given, and convolve. It empties the list."""
        if self._reads_apart(layer, maps, up):
            if up is not None:
                maps.append(self.up_conv(up, maps.pop()))
            return self._convolve(layer, maps, "concat_conv_bn_relu")
        merged = [self._joined(maps, up)]
        maps.clear()
        return self._convolve(layer, merged, "conv_bn_relu")

    def conv_pool(self, layer: ConvNormAct, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve; return the map and its 2x2 maximum, floored."""
        if why_not_fold(layer.norm) or _needs_gradients(layer, [x]):
            full = self.conv_norm_act(layer, x)
            return full, self.recipes.make(partial(pool, factor=2, ceil=False), full)
        (x,) = _cast(x)
        made, padding = pack(layer.conv, layer.norm, x.dtype), padding_of(layer.conv)[0]
        chosen = self._ask("conv_bn_relu_pool", _sizes([x]), x, layer.conv, relu=layer.act)
        if chosen in OURS:
            form = form_of(chosen, [x], made.weight)
            weights = (made.weight, made.scale, made.shift)
            return conv_bn_relu_pool(x, *weights, padding=padding, relu=layer.act, form=form)
        full = run_folded(x, made, padding, relu=layer.act) if chosen == "cudnn" else conv_norm_act(layer, x)
        return full, reference_pool(full, 2, ceil=False)

    def _joined(self, maps: list[Tensor], up: nn.ConvTranspose2d | None) -> Tensor:
        """Concatenate the maps; a transposed convolution writes into its part of the concatenated map."""
        if up is None:
            return self.merge(maps, "concat")
        deeper, weight, *others = _cast(maps.pop(), up.weight, *maps)
        fits = all(_fits(deeper, each) for each in others)
        if fits and self._ask("up_conv", _sizes([deeper]), deeper, up) == "triton":
            return up_conv_concat(others, deeper, weight, _bias(up, deeper))
        return self.merge([*others, self.up_conv(up, deeper)], "concat")

    def _reads_apart(self, layer: ConvNormAct, maps: list[Tensor], up: nn.ConvTranspose2d | None) -> bool:
        """Whether the convolution is to read the maps where they are, rather than concatenated."""
        if _trains(layer):
            return True  # the op joins them where it must, and keeps only the maps
        if why_not_fold(layer.norm):
            return False
        sizes = _sizes(maps)
        if up is not None:
            sizes[-1] = (up.out_channels, 2 * sizes[-1][1], 2 * sizes[-1][2])
        return self._ask("concat_conv_bn_relu", sizes, maps[0], layer.conv, relu=layer.act) in OURS

    def _convolve(self, layer: ConvNormAct, maps: list[Tensor], op: str) -> Tensor:
        """Convolve one map, or several as if they were concatenated, with norm and ReLU."""
        maps = _cast(*maps)
        if _trains(layer):
            return self._train(layer, maps)
        if why_not_fold(layer.norm):
            return conv_norm_act(layer, self.merge(maps, "concat"))
        chosen = self._ask(op, _sizes(maps), maps[0], layer.conv, relu=layer.act)
        if chosen in OURS:
            return self._on_kernels(layer, maps, chosen)
        joined = self.merge(maps, "concat")
        if chosen == "cudnn" and not _needs_gradients(layer, maps):
            made = pack(layer.conv, layer.norm, joined.dtype)
            return run_folded(joined, made, padding_of(layer.conv)[0], relu=layer.act)
        return conv_norm_act(layer, joined)

    def _train(self, layer: ConvNormAct, maps: list[Tensor]) -> Tensor:
        """A step of training: batch norm takes the statistics of the batch."""
        chosen = self._ask("conv_bn_relu_train", _sizes(maps), maps[0], layer.conv, relu=layer.act)
        if chosen == "reference":
            return conv_norm_act(layer, self.merge(maps, "concat"))
        implementation = "aten" if chosen == "cudnn" else chosen
        batch_norm = cast("nn.BatchNorm2d", layer.norm)
        out, y, norm = train_step(maps, layer.conv, batch_norm, relu=layer.act, implementation=implementation)
        vectors = (norm.mean, norm.variance, norm.gamma, norm.beta)
        self.recipes.remember(out, partial(_normalized, eps=norm.eps, relu=norm.relu), y, *vectors)
        return out

    def _on_kernels(self, layer: ConvNormAct, maps: list[Tensor], chosen: str) -> Tensor:
        if _needs_gradients(layer, maps):
            scale, shift = affine(layer.conv, layer.norm)
            weight = layer.conv.weight.to(maps[0].dtype)
        else:
            made = pack(layer.conv, layer.norm, maps[0].dtype)
            weight, scale, shift = made.weight, made.scale, made.shift
        form, padding = form_of(chosen, maps, weight), padding_of(layer.conv)[0]
        return concat_conv_bn_relu(maps, weight, scale, shift, padding=padding, relu=layer.act, form=form)

    def _ask(
        self,
        op: str,
        sizes: list[tuple[int, int, int]],
        x: Tensor,
        conv: nn.Module | None = None,
        *,
        relu: bool = False,
    ) -> str:
        """Name the implementation for an op over maps of these sizes, in the type and on the device of `x`."""
        precision = PRECISIONS.get(x.dtype)
        if precision is None or not x.shape[0]:
            return "reference"
        if precision == "fp32" and tf32_allowed():
            precision = "tf32"
        training = torch.is_grad_enabled()
        shape: tuple[int, ...] = ()
        if isinstance(conv, nn.Conv2d):
            shape = (conv.out_channels, conv.kernel_size[0], padding_of(conv)[0])
        elif isinstance(conv, nn.ConvTranspose2d):
            shape = (conv.out_channels,)
        return self.choose(_call(op, int(x.shape[0]), tuple(sizes), precision, training, relu, *shape), x)


@lru_cache(maxsize=4096)  # the same few in every step
def _call(
    op: str, batch: int, sizes: tuple[tuple[int, int, int], ...], precision: str, training: bool, relu: bool,
    out_channels: int = 0, kernel: int = 3, padding: int = 1,
) -> Call:  # fmt: skip
    mode = "training" if training else "inference"
    return Call(op, batch, sizes, out_channels, kernel, padding, relu, precision, mode)


@cache
def _card(name: str, architecture: str) -> Device:
    return device_or_guess(name, architecture)


def card_of(x: Tensor) -> Device | None:
    """Return the card that a map lies on; None on a machine's own memory."""
    if not x.is_cuda:
        return None
    return _card(torch.cuda.get_device_name(x.device), architecture_of(x.device))


def form_of(chosen: str, maps: list[Tensor], weight: Tensor) -> str:
    """Return the form of the kernel that an implementation's name stands for."""
    if chosen == "tma":
        return "tma"
    return "pointer" if why_not_few(maps, pack_weight(weight)) else "few"


def _sizes(maps: list[Tensor]) -> list[tuple[int, int, int]]:
    sizes = [tuple(map(int, each.shape[1:])) for each in maps]  # a tracer's sizes are no numbers
    return cast("list[tuple[int, int, int]]", sizes)


def _cast(*maps: Tensor) -> list[Tensor]:
    """Bring maps and weights to autocast's type, as PyTorch's convolutions would."""
    return [each.to(computing_type(each)) for each in maps]


def _normalized(
    y: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, relu: bool
) -> Tensor:  # fmt: skip
    return normalized(y, Norm(mean, variance, gamma, beta, eps, relu))


def _bias(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(x.dtype)


def _trains(layer: ConvNormAct) -> bool:
    return isinstance(layer.norm, nn.BatchNorm2d) and layer.norm.training


def _needs_gradients(layer: ConvNormAct, maps: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in (*maps, *layer.parameters()))


def _fits(deeper: Tensor, other: Tensor) -> bool:
    """Whether a map is at least as large as the deeper one will be: then only the map is cropped."""
    return other.shape[2] >= 2 * deeper.shape[2] and other.shape[3] >= 2 * deeper.shape[3]

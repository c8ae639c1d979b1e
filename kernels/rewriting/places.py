"""What fused models call: `Place`, the executor's fused ops for layers that a user has put together.

Layers are looked up in each call, so that weights are where the user left them, and each method does exactly what the
layers one by one would do, errors included. Only inference: `blocks` sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.precision import computing_type
from skipcost.kernels.rewriting.fused import FusedOps, dispatched
from skipcost.kernels.weights import pack
from skipcost.unet_models.ops import ConvNormAct, conv_norm_act, pool

Choose = Callable[[Call, Tensor], str]
DEVICES = ("cpu", "cuda")  # what our ops run on


def folded_or_dispatched(call: Call, x: Tensor) -> str:
    """Name the implementation of a call: what dispatch chooses on a GPU; on a CPU, batch norm folded into PyTorch's."""
    if x.is_cuda:
        return dispatched(call, x)
    return "cudnn" if call.op.startswith(("conv", "concat")) else "reference"


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, its norm and whether ReLU follows: what the executor has in one module."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    act: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what gradients could be asked of."""
        yield from self.conv.parameters()
        if self.norm is not None:
            yield from self.norm.parameters()


@dataclass(frozen=True, slots=True)
class Later:
    """The map that a 2x2 transposed convolution of stride 2 will give, made where it is concatenated."""

    layer: nn.ConvTranspose2d
    x: Tensor

    @property
    def shape(self) -> torch.Size:
        """(N, O, 2H, 2W)."""
        batch, _, height, width = self.x.shape
        return torch.Size((batch, self.layer.out_channels, 2 * height, 2 * width))

    def made(self) -> Tensor:
        """Return the map."""
        result: Tensor = self.layer(self.x)
        return result


@dataclass(frozen=True, slots=True)
class Place:
    """A convolution of a model, its norm and ReLU, or an up-sampling, or a concatenation alone.

    ops: what runs; its `choose` names the implementation of each call. find: gives a module of the model by its name.
    conv, norm: names, None where there is none. geometry: stride, padding, dilation and groups as the model calls it.
    """

    ops: FusedOps
    find: Callable[[str], nn.Module]
    conv: str | None = None
    norm: str | None = None
    relu: bool = False
    geometry: tuple[Any, ...] = ()

    def _layer(self) -> ConvNormAct:
        assert self.conv is not None
        norm = None if self.norm is None else self.find(self.norm)
        made = Layer(cast("nn.Conv2d", self.find(self.conv)), cast("nn.BatchNorm2d | None", norm), self.relu)
        return cast("ConvNormAct", made)

    def convolve(self, read: Tensor | list[Tensor]) -> Tensor:
        """Convolve a map, or what `join` gave, with the norm and ReLU that follow."""
        layer = self._layer()
        if isinstance(read, list):
            return self.ops._convolve(layer, read, "concat_conv_bn_relu")  # noqa: SLF001 - one idea in two files
        return self.ops.conv_norm_act(layer, read) if _fits([read], layer.conv) else conv_norm_act(layer, read)

    def convolve_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, then also return the 2x2 maximum."""
        layer = self._layer()
        if not _fits([x], layer.conv):
            full = conv_norm_act(layer, x)
            return full, pool(full, 2, ceil=False)
        return self.ops.conv_pool(layer, x)

    def fold(self, x: Tensor) -> Tensor:
        """Convolve with any stride, groups and dilation, the norm folded into the weights."""
        layer = self._layer()
        conv, norm = layer.conv, layer.norm
        assert norm is not None
        if _fits([x], conv):
            made = pack(conv, norm, computing_type(x))
            result = functional.conv2d(x, made.folded, made.bias, *self.geometry)
        else:
            result = norm(functional.conv2d(x, conv.weight, conv.bias, *self.geometry))
        return functional.relu(result, inplace=True) if self.relu else result

    def later(self, x: Tensor) -> Tensor | Later:
        """Put off an up-sampling until its map is concatenated."""
        assert self.conv is not None
        layer = cast("nn.ConvTranspose2d", self.find(self.conv))
        return Later(layer, x) if _fits([x], layer) else cast("Tensor", layer(x))

    def join(self, maps: list[Tensor | Later]) -> Tensor | list[Tensor]:
        """Concatenate the channels, or return the maps where the convolution had better read them apart.

        The graph lets go of the maps after this and before the convolution, as it would after torch.cat.
        """
        *others, last = maps
        ready = [each.made() if isinstance(each, Later) else each for each in others]
        known = last.x if isinstance(last, Later) else last
        up = last.layer if isinstance(last, Later) else None
        same = _alike([*ready, known]) and all(each.shape[2:] == last.shape[2:] for each in ready)
        if not same or (up is not None and known.dtype != computing_type(known)):
            return torch.cat([*ready, last.made() if isinstance(last, Later) else last], 1)
        layer = None if self.conv is None else self._layer()
        together = layer is None or not _fits(ready, layer.conv)
        if together or not self.ops._reads_apart(cast("ConvNormAct", layer), [*ready, known], up):  # noqa: SLF001
            return self.ops._joined([*ready, known], up)  # noqa: SLF001
        return [*ready, known if up is None else self.ops.up_conv(up, known)]


def pad_later(x: Tensor | Later, pad: Sequence[int], *args: Any, **kwargs: Any) -> Tensor | Later:
    """Pad a map that will be concatenated; by nothing, it is not copied."""
    if not any(pad):
        return x
    return functional.pad(x.made() if isinstance(x, Later) else x, pad, *args, **kwargs)


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Return a map as the model would have it in memory: ops of ours give channels_last."""
    return x.contiguous(memory_format=layout)


def _fits(maps: Sequence[Tensor], conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether fused ops may take over: maps (N, C, H, W) beside weights that PyTorch would convolve them with.

    For anything else the layers themselves are called, and say what they have to say.
    """
    weight = conv.weight
    if weight.device.type not in DEVICES or type(weight) not in (nn.Parameter, Tensor):
        return False
    if any(each.ndim != 4 or each.device != weight.device for each in maps):  # noqa: PLR2004 - N, C, H, W
        return False
    dtypes = {weight.dtype, *(each.dtype for each in maps)}
    if torch.is_autocast_enabled(weight.device.type):
        return torch.float64 not in dtypes  # which autocast leaves alone
    return len(dtypes) == 1


def _alike(maps: Sequence[Tensor]) -> bool:
    """Whether maps (N, C, H, W) are of one batch, type and device."""
    first = maps[0]
    facts = (first.shape[:1], first.dtype, first.device)
    return all(each.ndim == 4 and (each.shape[:1], each.dtype, each.device) == facts for each in maps)  # noqa: PLR2004

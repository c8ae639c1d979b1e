"""What fused models call: `LayerOps`, the executor's fused ops for layers that a user has put together.

Each method takes the layers themselves, so that weights are where the user left them, and does exactly what calling
the layers one by one would do, errors included. Only inference: `rewiring` sees to that.
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
from skipcost.kernels.rewriting.rewiring import dense
from skipcost.kernels.weights import pack
from skipcost.unet_models.ops import ConvNormAct, conv_norm_act, pool

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
    """The map that a 2x2 transposed convolution of stride 2 will give, made where it is concatenated.

    Until then a model only asks for its shape.
    """

    layer: nn.ConvTranspose2d
    x: Tensor

    @property
    def shape(self) -> torch.Size:
        """(N, O, 2H, 2W)."""
        batch, _, height, width = self.x.shape
        return torch.Size((batch, self.layer.out_channels, 2 * height, 2 * width))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def made(self) -> Tensor:
        """Return the map."""
        result: Tensor = self.layer(self.x)
        return result


@dataclass(frozen=True, slots=True)
class LayerOps(FusedOps):
    """The ops of a fused model; `choose` as for `FusedOps`."""

    choose: Callable[[Call, Tensor], str] = folded_or_dispatched

    def convolve(self, read: Tensor | list[Tensor], conv: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool) -> Tensor:
        """Convolve a map, or what `join` gave, with the norm and ReLU that follow."""
        if isinstance(read, list):
            return self._convolve(_layer(conv, norm, relu), read, "concat_conv_bn_relu")
        if not _fits([read], conv):
            return conv_norm_act(_layer(conv, norm, relu), read)
        return self._convolve(_layer(conv, norm, relu), [read], "conv_bn_relu")

    def convolve_pool(
        self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Convolve, then also return the 2x2 maximum."""
        if not _fits([x], conv):
            full = conv_norm_act(_layer(conv, norm, relu), x)
            return full, pool(full, 2, ceil=False)
        return self.conv_pool(_layer(conv, norm, relu), x)

    def fold(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
        """Convolve with any stride, groups, dilation and padding, the norm folded into the weights."""
        if not _fits([x], conv):
            return conv_norm_act(_layer(conv, norm, relu), x)
        made = pack(conv, norm, computing_type(x))
        result = conv._conv_forward(x, made.folded, made.bias)  # noqa: SLF001 - where PyTorch pads by mode
        return functional.relu(result, inplace=True) if relu else result

    def later(self, layer: nn.ConvTranspose2d, x: Tensor) -> Tensor | Later:
        """Put off an up-sampling until its map is concatenated."""
        return Later(layer, x) if _fits([x], layer) else cast("Tensor", layer(x))

    def pad(self, x: Tensor | Later, pad: Sequence[int], *args: Any, **kwargs: Any) -> Tensor | Later:
        """Pad a map that will be concatenated; by nothing, it is not copied."""
        if not any(pad):
            return x
        return functional.pad(x.made() if isinstance(x, Later) else x, pad, *args, **kwargs)

    def join(
        self,
        maps: list[Tensor | Later],
        conv: nn.Conv2d | None = None,
        norm: nn.BatchNorm2d | None = None,
        relu: bool = False,  # noqa: FBT002 - from a graph
    ) -> Tensor | list[Tensor]:
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
        layer = None if conv is None else _layer(conv, norm, relu)
        if layer is None or not _fits(ready, layer.conv) or not self._reads_apart(layer, [*ready, known], up):
            return self._joined([*ready, known], up)
        return [*ready, known if up is None else self.up_conv(up, known)]

    def dense(self, *given: Any) -> bool:
        """Whether all maps that the model was given are contiguous."""
        return dense(*given)

    def restored(self, x: Any, contiguous: bool) -> Any:
        """Return a map as modules of the user's own expect it, which may call .view: contiguous where the input was."""
        return x.contiguous() if contiguous and isinstance(x, Tensor) else x


def _layer(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool) -> ConvNormAct:
    return cast("ConvNormAct", Layer(conv, norm, relu))


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

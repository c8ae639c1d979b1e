"""What inference makes of weights once, and again whenever they change: batch norm folded, reduction along memory.

It is kept on the layer that it belongs to, outside of parameters, buffers and the state_dict, and nothing of it goes
into a copy or a file. It is made again as soon as a weight has another version, place or type: an optimizer's step,
`load_state_dict`, `.to()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

ATTRIBUTE = "_skipcost_pack"


@dataclass(frozen=True, slots=True)
class Pack:
    """What a convolution and its norm come to at inference: conv(x, weight) * scale + shift.

    weight: (O, C, k, k), channels_last. scale, shift: (O,) in fp32 (fp64 beside fp64), None for 1 and 0.
    folded, bias: the same with the scale in the weight and the shift as a bias of the weight's type: one rounding more.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    folded: Tensor
    bias: Tensor | None


def why_not_fold(norm: nn.Module | None) -> str:
    """Say why a norm is no scale and shift known beforehand; empty where it is, or where there is none."""
    if norm is None:
        return ""
    if not isinstance(norm, nn.BatchNorm2d):
        own = isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "track_running_stats", False)
        return f"{type(norm).__name__} {'is no BatchNorm2d' if own else 'takes its statistics from each image'}"
    if norm.running_mean is None:
        return "this batch norm keeps no running statistics and takes those of each batch"
    return "the batch norm is in training and takes its statistics from each batch" if norm.training else ""


def affine(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Return scale and shift (O,) of a convolution's bias and norm, as differentiable functions of their weights.

    y = gamma * (x + bias - mean) / sqrt(var + eps) + beta (Ioffe and Szegedy, 2015, alg. 2), computed in fp32.
    ValueError where `why_not_fold` has a reason.
    """
    if reason := why_not_fold(norm):
        message = f"the norm after {conv} cannot be folded into it: {reason}"
        raise ValueError(message)
    precise = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    bias = None if conv.bias is None else conv.bias.to(precise)
    if norm is None:
        return None, bias
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.to(precise) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(precise)
    shift = (0 if bias is None else bias) - norm.running_mean.to(precise)
    shift = shift * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(precise)


def pack(conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> Pack:
    """Return the pack of a convolution and its norm for maps of `dtype`; no gradient flows through it."""
    tensors: list[Tensor | None] = [conv.weight, conv.bias]
    if isinstance(norm, nn.BatchNorm2d):
        # A training step writes the running statistics behind their versions' back; the count of batches tells.
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked]
    packs = kept(conv, ATTRIBUTE, tensors, getattr(norm, "eps", None))
    if dtype not in packs:
        packs[dtype] = _make(conv, norm, dtype)
    made: Pack = packs[dtype]
    return made


def _make(conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> Pack:
    with torch.inference_mode(mode=False), torch.no_grad():
        scale, shift = affine(conv, norm)
        weight = conv.weight.detach()
        folded = weight if scale is None else weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)
        last = torch.channels_last
        return Pack(
            weight=weight.to(dtype).contiguous(memory_format=last),
            scale=scale,
            shift=shift,
            folded=folded.to(dtype).contiguous(memory_format=last),
            bias=None if shift is None else shift.to(dtype),
        )


def run_folded(x: Tensor, made: Pack, padding: int, *, relu: bool) -> Tensor:
    """Convolve (N, C, H, W) with the folded weights: on a GPU in one call of cuDNN's, with bias and ReLU in it."""
    if relu and x.is_cuda and x.numel():
        bias = made.bias if made.bias is not None else made.folded.new_zeros(made.folded.shape[0])
        geometry = ([1, 1], [padding, padding], [1, 1], 1)
        result: Tensor = torch.ops.aten.cudnn_convolution_relu(x, made.folded, bias, *geometry)
        return result
    result = functional.conv2d(x, made.folded, made.bias, padding=padding)
    return functional.relu(result, inplace=True) if relu else result


class _Kept:
    """What was made, by type of map, and from what; an empty one in a copy or a file."""

    __slots__ = ("by_type", "setting", "sources")

    def __init__(self) -> None:
        self.setting: object = None
        self.sources: tuple[_Source | None, ...] = ()
        self.by_type: dict[torch.dtype, Any] = {}

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


@dataclass(frozen=True, slots=True)
class _Source:
    """A weight at a version. `alias` keeps its memory, so that no other weight can come to lie at its address."""

    tensor: Tensor
    alias: Tensor
    version: int

    def is_still(self, x: Tensor | None) -> bool:
        """Whether `x` is that weight, unchanged; nothing tells of one made under inference_mode."""
        if x is not self.tensor or x.is_inference():
            return False
        return x.data_ptr() == self.alias.data_ptr() and x._version == self.version  # noqa: SLF001 - no public name


def kept(
    owner: nn.Module, attribute: str, weights: Sequence[Tensor | None], setting: object = None
) -> dict[torch.dtype, Any]:
    """Return what was made of these weights so far, by type of map, for the caller to add to.

    It is under `attribute` of the owner, and empty where a weight or the setting, which is compared, is another now.
    """
    found: _Kept = owner.__dict__.setdefault(attribute, _Kept())
    setting = (setting, _steps())
    if found.setting != setting or not _same(found.sources, weights):
        found.setting = setting
        found.sources = tuple(
            None if each is None else _Source(each, each.detach(), _version(each)) for each in weights
        )
        found.by_type = {}
    return found.by_type


def _same(sources: Sequence[_Source | None], weights: Sequence[Tensor | None]) -> bool:
    if len(sources) != len(weights):
        return False
    pairs = zip(sources, weights, strict=True)
    return all(x is None if source is None else source.is_still(x) for source, x in pairs)


@cache
def _counting() -> list[None]:
    """Return a list that grows with each step of any optimizer: those with fused=True leave a weight's version."""
    steps: list[None] = []
    register_optimizer_step_post_hook(lambda *_: steps.append(None))
    return steps


def _steps() -> int:
    return len(_counting())


def _version(x: Tensor) -> int:
    """Return what changes with a tensor that something is written to; one made under inference_mode has no version."""
    return -1 if x.is_inference() else x._version  # noqa: SLF001 - no public name

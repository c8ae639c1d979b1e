"""What rewritten models call: a map that is up-sampled only if no convolution can read it at low resolution.

`enlarge` and `enlarge_by` take the place of `interpolate` and of an up-sampling layer. They give an `Enlarged`, which
PyTorch's functions accept like a tensor: a crop narrows it, a concatenation holds on to it, and a convolution of the
user's own, called as it is, counts and takes the cheaper form of it: `tap_first` over the small map, or
the map itself. To any other function it is the map, made there and then by the call that it stands for.

Left out: what is no whole factor, the same for both axes, bilinear or nearest, is up-sampled at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from skipcost.kernels.compilers import constant
from skipcost.kernels.low_resolution.tap_first import DTYPES, tap_first
from skipcost.kernels.precision import computing_type, tf32_allowed
from skipcost.kernels.rewriting.enlarged import DEVICES, MODES, Window, counted, rows_are_exact


class _Unmade:
    """What PyTorch's functions take for a tensor: they call `_called` with it."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(function, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        raise NotImplementedError

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def made(self) -> Tensor:
        """Return the map."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Enlarged(_Unmade):
    """The map that an up-sampling of x (N, C, h, w) gives, cropped.

    call: makes all of it as the model would. mode, align_corners: as of `tap_first`. window: (top, left, height, width)
    of what is left.
    """

    x: Tensor
    call: Callable[[], Tensor]
    factor: int
    mode: str
    align_corners: bool
    window: Window

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((*self.x.shape[:2], *self.window[2:]))

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        """Crop by [:, :, rows, columns], slices of step 1: all that a rewritten graph asks for."""
        spans = (*index[2:], slice(None), slice(None))[:2]
        rows, columns = (range(size)[span] for size, span in zip(self.window[2:], spans, strict=True))
        if not rows or not columns:
            return self.made()[index]
        return self.cropped(rows.start, columns.start, len(rows), len(columns))

    def cropped(self, top: int, left: int, height: int, width: int) -> Enlarged:
        """Return what is left of it."""
        top, left, height, width = _numbers((self.window[0] + top, self.window[1] + left, height, width))
        return replace(self, window=(top, left, height, width))

    def made(self) -> Tensor:
        """Return the map."""
        whole, (top, left, height, width) = self.call(), self.window
        if whole.shape[2:] == self.window[2:]:
            return whole
        return whole[:, :, top : top + height, left : left + width]


@dataclass(frozen=True, slots=True, eq=False)
class Joined(_Unmade):
    """Maps side by side in their channels, not concatenated yet; at least one of them is an `Enlarged`."""

    parts: tuple[Tensor | Enlarged, ...]

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        batch, _, height, width = self.parts[0].shape
        return torch.Size((batch, sum(each.shape[1] for each in self.parts), height, width))

    def made(self) -> Tensor:
        """Return the concatenation."""
        return torch.cat([_made(each) for each in self.parts], 1)


def enlarge(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    *rest: Any,
    **more: Any,
) -> Tensor | Enlarged:
    """Take the place of torch.nn.functional.interpolate, with its arguments."""
    call = partial(functional.interpolate, x, size, scale_factor, mode, align_corners, *rest, **more)
    antialias = more.get("antialias", rest[1] if len(rest) > 1 else False)
    return call() if antialias else _enlarged(x, call, size, scale_factor, mode, align_corners)


def enlarge_by(layer: nn.Upsample, x: Tensor) -> Tensor | Enlarged:
    """Take the place of a call of an up-sampling layer."""
    return _enlarged(x, partial(layer, x), layer.size, layer.scale_factor, layer.mode, layer.align_corners)


def _enlarged(
    x: Tensor, call: Callable[[], Tensor], size: Any, scale: Any, mode: str, align_corners: bool | None
) -> Tensor | Enlarged:  # fmt: skip
    if type(x) not in (Tensor, nn.Parameter) or x.ndim != 4 or x.device.type not in DEVICES or x.dtype not in DTYPES:  # noqa: PLR2004 - N, C, H, W
        return call()
    known = MODES.get(mode)
    height, width = _numbers(x.shape[2:])
    factor = whole_factor(size, scale, (height, width))
    if factor is None or known is None or (known == "nearest" and (align_corners is not None or not _exact(factor))):
        return call()
    return Enlarged(x, call, factor, known, bool(align_corners), (0, 0, height * factor, width * factor))


def whole_factor(size: Any, scale: Any, small: tuple[int, int] | None = None) -> int | None:
    """Return the whole factor, 2 or more, by which both sides grow; None where there is none.

    size, scale: as of `interpolate`, one of them None. small: the sides (h, w); without them a size tells nothing.
    """
    if size is not None and small is not None:
        sides = size if isinstance(size, Sequence) else (size, size)
        factors = [side / each for side, each in zip(_numbers(sides), small, strict=False)]
    elif scale is not None:
        factors = [float(each) for each in (scale if isinstance(scale, Sequence) else (scale,))]
    else:
        return None
    same = len(factors) in (1, 2) and len(set(factors)) == 1 and factors[0].is_integer()
    return int(factors[0]) if same and factors[0] > 1 else None


@constant
def _exact(factor: int) -> bool:
    """Whether PyTorch's fp32 arithmetic finds the nearest pixel of every row up to 16,384, as whole numbers would."""
    return rows_are_exact(factor)


def _made(value: Any) -> Any:
    return value.made() if isinstance(value, _Unmade) else value


def _called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of PyTorch that was given a map that is not made."""
    if function in KNOWN and not isinstance(result := KNOWN[function](*args, **kwargs), NotImplementedType):
        return result
    args, kwargs = tree_map(_made, (args, kwargs))
    return function(*args, **kwargs)


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:  # noqa: ARG001 - torch's signature
    """Pad by nothing, or crop, which is to pad by less, in any mode; only constants pad columns alone."""
    lengths = (2, 4) if mode == "constant" else (4,)
    if not isinstance(x, Enlarged) or len(pad) not in lengths or any(each > 0 for each in pad):
        return NotImplemented
    left, right, top, bottom = (*(-each for each in pad), 0, 0)[:4]
    height, width = x.window[2] - top - bottom, x.window[3] - left - right
    return x.cropped(top, left, height, width) if min(height, width) > 0 else NotImplemented


def _dropout(x: Any, *, training: bool, **_: Any) -> Any:
    return x if not training else NotImplemented


def _join(maps: Sequence[Any], dim: int = 0) -> Any:
    if dim != 1 or any(len(each.shape) != 4 for each in maps):  # noqa: PLR2004 - N, C, H, W
        return NotImplemented
    same = len({(each.shape[0], *each.shape[2:]) for each in maps}) == 1
    return Joined(tuple(maps)) if same else NotImplemented


def _convolve(
    x: Any, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    """Convolve, each `Enlarged` in the form that counts fewer MACs; all that are made in one convolution."""
    if not isinstance(x, _Unmade) or unsuited(weight.shape[2:], stride, padding, dilation, groups):
        return NotImplemented
    parts = x.parts if isinstance(x, Joined) else (cast("Enlarged", x),)
    pad = _side(padding, weight.shape[2])
    assert pad is not None
    if not _fit(parts, weight, bias, pad):
        return NotImplemented
    taken = [_taken(each, weight, pad) for each in parts]
    if not any(taken):
        return NotImplemented
    shares = list(zip(parts, weight.split([each.shape[1] for each in parts], 1), taken, strict=True))
    result = None
    if not all(taken):
        rest = [(_made(each), own) for each, own, tap in shares if not tap]
        read, over = (each[0] if len(each) == 1 else torch.cat(each, 1) for each in zip(*rest, strict=True))
        result = functional.conv2d(read, over, bias, padding=pad)
        del rest, read
    for each, own, tap in shares:
        if tap:
            term = _tap_first(each, own, bias if result is None else None, pad)
            result = term if result is None else result.add_(term)
    return result


def _tap_first(map_: Any, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Call the op in the type that PyTorch's convolution would compute in."""
    dtype = computing_type(weight)
    return tap_first(
        map_.x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), factor=map_.factor,
        mode=map_.mode, align_corners=map_.align_corners, padding=padding, window=map_.window,
    )  # fmt: skip


def unsuited(kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> str:
    """Say what about a convolution keeps it from reading at low resolution; empty where nothing does."""
    reasons = [
        f"{name} {value}" for name, value in (("stride", stride), ("dilation", dilation)) if _side(value, 1) != 1
    ]
    if groups != 1:
        reasons.append(f"{groups} groups")
    pad = _side(padding, kernel[0]) if padding != "same" or len(set(kernel)) == 1 else None
    if pad is None or pad >= min(kernel):
        reasons.append(f"padding {padding!r} beside a kernel of {'x'.join(map(str, kernel))}")
    return f"{', '.join(reasons)}: it takes stride 1, no dilation, no groups, zeros for padding" if reasons else ""


def _side(value: Any, kernel: int) -> int | None:
    """Return what a setting is for both axes; None where they differ, or a padding is not the same on both sides."""
    if isinstance(value, str):
        return 0 if value == "valid" else kernel // 2 if kernel % 2 else None
    values = set(value) if isinstance(value, Sequence) else {value}
    return int(values.pop()) if len(values) == 1 else None


def _fit(parts: Sequence[Tensor | Enlarged], weight: Tensor, bias: Tensor | None, padding: int) -> bool:
    """Whether PyTorch itself would convolve these; if not, it is asked, and says what it has to say."""
    maps = [each.x if isinstance(each, Enlarged) else each for each in parts]
    given = [*maps, weight] if bias is None else [*maps, weight, bias]
    if any(type(each) not in (Tensor, nn.Parameter) or each.device != weight.device for each in given):
        return False
    rows, columns = parts[0].shape[2:]
    too_small = rows + 2 * padding < weight.shape[2] or columns + 2 * padding < weight.shape[3]
    if too_small or sum(each.shape[1] for each in parts) != weight.shape[1]:
        return False
    dtypes = {each.dtype for each in given}
    cast_here = computing_type(weight) != weight.dtype
    return dtypes <= set(DTYPES) - {torch.float64} if cast_here else len(dtypes) == 1


def _taken(part: Tensor | Enlarged, weight: Tensor, padding: int) -> bool:
    """Whether tap-first is counted as the cheaper form of a map's share of a convolution."""
    if not isinstance(part, Enlarged):
        return False
    batch, in_channels, height, width = _numbers(part.x.shape)
    size = computing_type(weight).itemsize
    kind = {2: "16 bits", 4: "tf32" if tf32_allowed() else "fp32", 8: "fp32"}[size]
    device = "cuda" if weight.is_cuda else "cpu"
    settings = (part.factor, part.mode, part.align_corners, padding, part.window)
    channels, kernel = (in_channels, weight.shape[0]), _numbers(weight.shape[2:])
    taken: bool = _chosen((height, width), kernel, settings, channels, batch, kind, device)
    return taken


def _numbers(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes as plain numbers, for which a compiler then makes its code; int() leaves them symbols to Dynamo."""
    return tuple(len(range(each)) for each in sizes)


@constant  # sizes are constants to a compiler here
def _chosen(*call: Any) -> bool:
    return _counted(*call)


def _counted(*call: Any) -> bool:
    return counted(*call).taken


NotImplementedType = type(NotImplemented)
KNOWN: dict[Any, Callable[..., Any]] = {  # what can be done with a map that is not made; NotImplemented: not this
    functional.pad: _pad,
    functional.dropout: _dropout,
    functional.dropout2d: _dropout,
    torch.cat: _join,
    torch.concat: _join,
    torch.concatenate: _join,
    torch.conv2d: _convolve,
}

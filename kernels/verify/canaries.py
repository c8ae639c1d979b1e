"""What kernels are fed in checks: data of several kinds, in memory whose surroundings tell of every stray access.

A map lies amid canaries, in the strides that real maps have: as a slice of the channels of a wider one, as the window
that a crop leaves. Canaries are NaN with a bit pattern that no arithmetic gives: what reads one has NaN in its result,
and what writes one changes bits. Results are judged by `validate.py`. Needs torch only, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

MARGIN = 97  # canaries on each side of a storage: odd, so that maps do not start at a multiple of 16 bytes
ALIGNED_MARGIN = 128  # so that they do, as descriptors and wide loads want it
CANARY = -1  # as an integer of the element's size, so all bits are set: NaN in floats, where processors make others
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@dataclass(frozen=True, slots=True)
class Layout:
    """How the dimensions lie in memory, outermost first; how much surrounds each; how far apart its elements are."""

    order: tuple[int, ...]
    margins: tuple[int, ...] = (0, 0, 0, 0)  # elements of canaries on either side of each dimension
    steps: tuple[int, ...] = (1, 1, 1, 1)  # 0: all its elements are one


LAYOUTS: dict[str, Layout] = {  # of N, C, H, W
    "contiguous": Layout((0, 1, 2, 3)),
    "channels_last": Layout((0, 2, 3, 1)),
    "transposed": Layout((0, 1, 3, 2)),
    "sliced": Layout((0, 1, 2, 3), margins=(1, 1, 1, 1), steps=(1, 1, 2, 1)),
    "expanded": Layout((0, 1, 2, 3), steps=(1, 0, 1, 1)),
    "channel_slice": Layout((0, 2, 3, 1), margins=(0, 16, 0, 0)),
    "window": Layout((0, 2, 3, 1), margins=(0, 0, 2, 3)),
}
CHANNELS_ADJACENT = ("channels_last", "channel_slice", "window")  # what kernels that read NHWC take as it is


def blank(
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str,
    *,
    device: torch.device | str = "cpu",
    aligned: bool = False,
) -> Tensor:
    """Return a map (N, C, H, W) of canaries amid canaries, for a kernel to write all of and nothing else.

    layout: a key of LAYOUTS; of any other shape than a map's, such as a vector's, only "contiguous". aligned: start at
    a multiple of 16 bytes. Strides are multiples of 16 bytes where the channels are multiples of 16.
    """
    form = _form(shape, layout)
    margin = ALIGNED_MARGIN if aligned else MARGIN
    reach = [max(step * (size - 1) + 1, 0) for size, step in zip(shape, form.steps, strict=True)]
    box = [extent + 2 * around for extent, around in zip(reach, form.margins, strict=True)]
    strides = [prod(box[inner] for inner in form.order[form.order.index(axis) + 1 :]) for axis in range(len(box))]
    start = margin + sum(around * stride for around, stride in zip(form.margins, strides, strict=True))
    storage = torch.empty(prod(box) + 2 * margin, dtype=dtype, device=device)
    storage.view(INTEGERS[storage.itemsize]).fill_(CANARY)
    return storage.as_strided(
        tuple(shape), [step * stride for step, stride in zip(form.steps, strides, strict=True)], start
    )


def amid(values: Tensor, layout: str, canary: float | None = None, *, aligned: bool = False) -> Tensor:
    """Copy values (N, C, H, W), or of any shape as "contiguous", amid canaries, on their device, in a layout.

    In "expanded" the first channel stands for all. canary: another number in place of the canaries; a stray write is
    then not found.
    """
    view = blank(values.shape, values.dtype, layout, device=values.device, aligned=aligned)
    if canary is not None:
        _storage(view).fill_(canary)
    own = tuple(slice(None if step else 1) for step in _form(values.shape, layout).steps)
    view[own].copy_(values[own])
    return view


def written_beside(view: Tensor) -> str:
    """Return "" if all canaries round a view from `amid` or `blank` are there, or a sentence with how many are not."""
    return _complaint(view, inside=False)


def unwritten(view: Tensor) -> str:
    """Return "" if no element of a view from `blank` is a canary any more, or a sentence with how many are."""
    return _complaint(view, inside=True)


def _complaint(view: Tensor, *, inside: bool) -> str:
    storage = _storage(view.detach())
    canary = storage.view(INTEGERS[storage.itemsize]) == CANARY
    own = torch.zeros_like(canary)
    own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    wrong = (canary & own) if inside else ~(canary | own)
    count = int(wrong.sum())
    if not count:
        return ""
    first = int(wrong.int().argmax())
    what = "of the map were never written" if inside else "beside the map were written"
    return (
        f"{count} elements {what}, the first at element {first} of a storage of {storage.numel()}, in which a map of "
        f"shape {tuple(view.shape)} and strides {view.stride()} starts at {view.storage_offset()}"
    )


def _form(shape: Sequence[int], layout: str) -> Layout:
    if layout not in LAYOUTS:
        message = f"layout {layout!r} is unknown; accepted: {', '.join(LAYOUTS)}"
        raise ValueError(message)
    rank = len(shape)
    if rank == len(LAYOUTS[layout].order):
        return LAYOUTS[layout]
    if layout == "contiguous":
        return Layout(tuple(range(rank)), (0,) * rank, (1,) * rank)
    message = f"a tensor of shape {tuple(shape)} has no layout {layout!r}, which is one of N, C, H, W; use 'contiguous'"
    raise ValueError(message)


def _storage(view: Tensor) -> Tensor:
    """Everything that a view's storage holds, as one dimension."""
    return view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0)


def _normal(shape: Sequence[int], seed: int, device: str) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)


def _one_hot(shape: Sequence[int], dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    values = torch.zeros(tuple(shape), dtype=dtype, device=device)
    if values.numel():
        rows = values.view(len(values), -1)
        generator = torch.Generator(device).manual_seed(seed)
        rows.scatter_(1, torch.randint(rows.shape[1], (len(rows), 1), generator=generator, device=device), 1)
    return values


# Made where they are used: a map's millions of numbers take a CPU seconds. Errors of random sign cancel in "normal"
# sums; only "positive" ones, which are ever larger than what is added, show tf32 and sums in 16 bits where K is large.
DATA: dict[str, Callable[..., Tensor]] = {  # (shape, dtype, seed, device="cpu")
    "normal": lambda shape, dtype, seed, device="cpu": _normal(shape, seed, device).to(dtype),
    "positive": lambda shape, dtype, seed, device="cpu": _normal(shape, seed, device).abs().to(dtype),
    "large": lambda shape, dtype, seed, device="cpu": (_normal(shape, seed, device) * 1e3).to(dtype),
    "small": lambda shape, dtype, seed, device="cpu": (_normal(shape, seed, device) * 1e-3).to(dtype),
    "one-hot": _one_hot,  # a single 1 in each image, or in each output channel of a weight: finds what is mixed up
}

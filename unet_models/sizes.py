"""Sizes: what every map measures, what is cropped, what the convolutions cost, how far an output pixel sees.

Folds over a `Program`, for images of any number of dimensions. The rules: pooling floors in the encoder and takes the
ceiling on skip edges; where maps meet with different sizes, all are centre-cropped to the smallest, after an edge's
own convolution; without padding a 3x3 convolution takes 2 off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from skipcost.unet_models.program import Op, Program, near

if TYPE_CHECKING:
    from skipcost.unet_models.topology import Conv

SEARCH_LIMIT = 65536  # pixels a side, the most that a case has: beyond it no workable size is looked for

Size = tuple[int, ...]
Shape = tuple[int, ...]  # channels, then the sizes


class _VanishedError(Exception):
    """A map has no pixel left; the argument says where."""


def _conv(op: Op, reads: list[Shape]) -> Shape:
    assert op.conv is not None
    lost = op.conv.kernel - 1 - 2 * op.padding
    return op.conv.out_channels, *[side - lost for side in reads[0][1:]]


def _up_conv(op: Op, reads: list[Shape]) -> Shape:
    assert op.conv is not None
    return op.conv.out_channels, *[side * op.conv.kernel for side in reads[0][1:]]


def _pool(op: Op, reads: list[Shape]) -> Shape:
    more = op.factor - 1 if op.how == "ceil" else 0
    return reads[0][0], *[(side + more) // op.factor for side in reads[0][1:]]


def _up_sample(op: Op, reads: list[Shape]) -> Shape:
    return reads[0][0], *[side * op.factor for side in reads[0][1:]]


def _smallest(reads: list[Shape]) -> Size:
    return tuple(map(min, *(each[1:] for each in reads)))


def _join(op: Op, reads: list[Shape]) -> Shape:
    channels = sum(each[0] for each in reads) if op.how == "concat" else reads[0][0]
    return channels, *_smallest(reads)


def _point(_op: Op, reads: list[Shape]) -> Shape:
    return reads[0][0], *(1 for _ in reads[0][1:])


def _pick(op: Op, reads: list[Any]) -> Shape:
    shape: Shape = reads[0][op.factor]  # of an op with several results, whose "shape" has one for each
    return shape


SHAPES: dict[str, Callable[[Op, list[Shape]], Shape]] = {  # kinds that are not here keep the shape that they read
    "conv": _conv,
    "up_conv": _up_conv,
    "pool": _pool,
    "up_sample": _up_sample,
    "crop": lambda _, reads: (reads[0][0], *_smallest(reads)),
    "join": _join,
    "amax": _point,
    "present": lambda _, reads: (1, *(1 for _ in reads[0][1:])),
    "pick": _pick,
}


Measured = tuple[Op, list[Shape], Shape, Op]  # an op, the shapes that it reads, its result's, what it is a part of


@lru_cache(maxsize=256)  # many folds ask for the same few
def _sized(program: Program, size: Size) -> tuple[tuple[Shape, ...], tuple[Measured, ...]]:
    """The shapes of the program's results, and all that is measured of it."""
    made: list[Any] = [(program.in_channels, *size)]
    told: list[Measured] = []
    follow(program.ops[1:], made, told)
    return tuple(made), tuple(told)


def follow(
    ops: Iterable[Op], made: list[Any], told: list[Measured] | None = None, whole: Op | None = None
) -> None:  # fmt: skip
    """Add the shape of every op's result to those that are there; an op with several has a tuple of theirs.

    told: takes every op with its sizes, one that stands for several before its parts. whole: what the ops are parts of.
    """
    told = [] if told is None else told
    for op in ops:
        at, reads = len(told), [made[x] for x in op.reads]
        if op.parts:
            inside = reads[:]
            follow(op.parts, inside, told, op)
            shape = tuple(inside[x] for x in op.outputs) if op.outputs else inside[-1]
        else:
            function = SHAPES.get(op.kind)
            shape = function(op, reads) if function else reads[0]
            if min(shape) < 1:
                raise _VanishedError(op.where.replace("head of", "the head on"))
        made.append(shape)
        told.insert(at, (op, reads, shape, whole or op))


def measured(program: Program, size: Size) -> tuple[Measured, ...]:
    """Return every op with its sizes, one that stands for several before its parts, in the order in which they run.

    The last of each is the op that it is a part of, itself where it is none's. ValueError as of `shapes`.
    """
    return _of_size(program, size)[1]


def shapes(program: Program, size: Size) -> tuple[Shape, ...]:
    """Return the shape (channels, *sizes) of every op's result for one image of a size of any number of dimensions.

    ValueError with the nearest sizes that work where a map would vanish.
    """
    return _of_size(program, size)[0]


def _of_size(program: Program, size: Size) -> tuple[tuple[Shape, ...], tuple[Measured, ...]]:
    try:
        return _sized(program, size)
    except _VanishedError:
        raise ValueError(_why_not(program, size)) from None


def _why_not(program: Program, size: Size) -> str:
    """Say where the first of the axes that are too short loses its last pixel, and which sizes would do."""
    vanished = next(where for where in (_vanishes(program, side) for side in size) if where)
    smallest = smallest_size(program)
    fits = tuple(max(side, smallest) for side in size)
    neat = tuple(lossless_size(program, side) for side in fits)
    message = (
        f"an input of {by(size)} leaves no pixel at {vanished}: this network needs at least "
        f"{smallest} pixels a side; the nearest size that works is {by(fits)}"
    )
    return message if neat == fits else f"{message}, the nearest at which no pooling drops a row {by(neat)}"


def by(size: Size) -> str:
    """Write a size as people do: 512x512."""
    return "x".join(map(str, size))


def _vanishes(program: Program, side: int) -> str:
    """Where an axis of so many pixels loses its last one; empty where it does not."""
    try:
        _sized(program, (side,))
    except _VanishedError as vanished:
        return str(vanished)
    return ""


def smallest_size(program: Program) -> int:
    """Return the smallest side at which no map vanishes; every larger one works too."""
    low, high = 0, 1
    while _vanishes(program, high):
        low, high = high, high * 2
        if high > SEARCH_LIMIT:
            message = f"no input of up to {SEARCH_LIMIT} pixels keeps every map of this network"
            raise ValueError(message)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _vanishes(program, middle) else (low, middle)
    return high


def _floors(program: Program, side: int) -> bool:
    """Whether some pooling drops what is left over of an axis."""
    made, _ = _sized(program, (side,))
    pools = (op for op in program.ops if op.kind == "pool" and op.how == "floor")
    return any(made[op.reads[0]][1] % op.factor for op in pools)


def lossless_size(program: Program, side: int) -> int:
    """Return the nearest side, `side` or above, at which no pooling drops a row."""
    candidate = max(side, smallest_size(program))
    while _floors(program, candidate):
        candidate += 1
    return candidate


def output_size(program: Program, size: Size) -> Size:
    """Return the size of the output for an input of a size."""
    return shapes(program, size)[program.outputs[0]][1:]


def size_note(program: Program, size: Size) -> str:
    """Say what the crop rule does to this size, and the size that avoids it; empty where nothing is dropped."""
    output = output_size(program, size)
    if not any(_floors(program, side) for side in size):
        return ""
    neat = tuple(lossless_size(program, side) for side in size)
    return (
        f"{by(size)} gives {by(output)}: pooling drops a row or column of an odd map and the "
        f"others are cropped to match; pad to {by(neat)} to avoid it"
    )


class PlacedConv(NamedTuple):
    """One convolution at its place, with the sizes of what it reads and writes."""

    op: Op
    conv: Conv
    read: Size
    size: Size

    @property
    def owner(self) -> str:
        """The edge, node or head that it belongs to."""
        return self.op.where

    @property
    def height(self) -> int:
        """Rows of the output."""
        return self.size[0]

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.size[1]

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        at = self.read if self.conv.transposed else self.size
        return self.conv.in_channels * self.conv.out_channels * math.prod(self.conv.kernel * side for side in at)

    @property
    def outputs(self) -> int:
        """Elements of the output for one image."""
        return self.conv.out_channels * math.prod(self.size)


CONVOLUTIONS = ("conv", "up_conv")


@lru_cache(maxsize=256)  # several figures of a case ask for the same
def placed(program: Program, size: Size) -> tuple[PlacedConv, ...]:
    """Return every convolution of a program for one image, in the order in which they run."""
    return tuple(
        PlacedConv(op, op.conv, reads[0][1:], shape[1:])
        for op, reads, shape, _ in measured(program, size)
        if op.kind in CONVOLUTIONS and op.conv and not op.parts
    )


def conv_macs(program: Program, size: Size) -> int:
    """Multiply-adds of every convolution for one image, exactly."""
    return sum(each.macs for each in placed(program, size))


def activations(program: Program, size: Size) -> int:
    """Elements of every convolution's output for one image, exactly (fvcore's definition of activations)."""
    return sum(each.outputs for each in placed(program, size))


def norm_note(program: Program, batch: int, size: Size, *, training: bool) -> str:
    """Say why a norm cannot run on a batch of images of a size; empty where it can."""
    for each in placed(program, size):
        norm = each.conv.norm
        if math.prod(each.size) > 1 or not _refused(each.conv, norm, batch, training=training):
            continue
        remedy = "" if norm == "instance" else ", a batch of 2 or more"
        if not _refused(each.conv, "group", batch, training=training):
            remedy += ", or norm=group"
        return (
            f"{norm} norm at {each.owner} would normalise over a single value, because {by(size)} leaves a "
            f"{by(each.size)} map there; use {by(tuple(2 * side for side in size))}{remedy}"
        )
    return ""


def _refused(conv: Conv, norm: str, batch: int, *, training: bool) -> bool:
    """Whether PyTorch refuses to normalise a map of one pixel, where a channel or group may have one value alone.

    Batch norm in training; instance norm always; group norm, in PyTorch's own check, at batch 1 where each group has
    one channel, which is so up to 32 channels if they are a power of two.
    """
    match norm:
        case "batch":
            return training and batch == 1
        case "instance":
            return True
        case "group":
            return batch * conv.out_channels == conv.norm_groups
    return False


Span = tuple[int, int]  # the first and the last position along an axis


def _reach_up_sample(op: Op, low: int, high: int) -> Span:
    if op.how == "nearest":
        return low // op.factor, high // op.factor
    # Bilinear, align_corners=False: output o reads floor((o + 1/2) / f - 1/2) and, unless that leaves no fraction, as
    # it never does for an even f, the pixel after it. With corners aligned that is so in the middle of an image, where
    # both put a pixel in the same place; towards the borders maps move against each other by up to (f - 1) / 2.
    last, fraction = divmod(2 * high + 1 - op.factor, 2 * op.factor)
    return (2 * low + 1 - op.factor) // (2 * op.factor), last + (fraction > 0)


REACH: dict[
    str, Callable[[Op, int, int], Span]
] = {  # which positions of maps those of a resampled or joined one depend on
    "up_conv": lambda op, low, high: (low // _kernel(op), high // _kernel(op)),
    "pool": lambda op, low, high: (low * op.factor, high * op.factor + op.factor - 1),
    "up_sample": _reach_up_sample,
    "join": lambda _, low, high: (low, high),
}
WHOLE = ("amax", "present")  # what depends on the whole map, wherever it is looked at


def _kernel(op: Op) -> int:
    assert op.conv is not None
    return op.conv.kernel


def receptive_field(program: Program) -> int:
    """Side of the window that holds every input pixel which one output pixel of the deployed head depends on.

    Worked out by running intervals backwards through convolutions, pooling and resampling, for every phase of the
    output grid, and taking the widest. Statistics over the whole map (instance and group norm, batch norm in
    training, the classification-guided mask) are left out, and maps are taken as aligned where they are cropped.
    """
    begin, path = _path(program)
    widest = 0
    for phase in range(_period(program)):
        spans = {number: (phase - more, phase + more) for number, more in begin.items()}
        for number, reach, op, sources in path:
            low, high = reach(op, *spans[number])
            for source, more in sources:
                known = spans.get(source)
                if known is None:
                    spans[source] = low - more, high + more
                elif known[0] > low - more or known[1] < high + more:
                    spans[source] = min(known[0], low - more), max(known[1], high + more)
        widest = max(widest, spans[0][1] - spans[0][0] + 1)
    return widest


Step = tuple[int, Callable[[Op, int, int], Span], Op, list[tuple[int, int]]]


def _path(program: Program) -> tuple[dict[int, int], list[Step]]:
    """The maps of REACH that the deployed head looks at and how far around a position, and how they go on, backwards.

    Each is followed by the maps of REACH, or the image, that it is made of, and how far around a position it looks.
    """
    windows, steps = [{0: 0}], list[Step]()
    for number, op in enumerate(program.ops[1:], 1):
        own: dict[int, int] = {}
        more = _kernel(op) // 2 if op.kind == "conv" else 0
        for read in near(op):
            for source, known in windows[read].items():
                own[source] = max(own.get(source, 0), known + more)
        if op.kind in REACH:
            steps.append((number, REACH[op.kind], op, list(own.items())))
        windows.append({number: 0} if op.kind in REACH else {} if op.kind in WHOLE else own)
    begin, path = windows[program.outputs[0]], list[Step]()
    seen = set(begin)
    for step in reversed(steps):
        if step[0] in seen:
            seen |= {source for source, _ in step[3]}
            path.append(step)
    return begin, path


def _period(program: Program) -> int:
    """After how many output positions the pattern of what they see repeats."""
    steps = [Fraction(1)]  # by op, pixels of the image from one position of its result to the next
    for op in program.ops[1:]:
        step = steps[op.reads[0]]
        if op.kind == "pool":
            step *= op.factor
        elif op.kind in ("up_conv", "up_sample"):
            step /= _kernel(op) if op.kind == "up_conv" else op.factor
        steps.append(step)
    return math.lcm(*((step / steps[program.outputs[0]]).numerator for step in set(steps)))

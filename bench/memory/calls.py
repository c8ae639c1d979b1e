"""What a schedule is made of: calls, the numbers beside them, and the few steps that every walk is composed of.

Which steps a network takes in which order is `schedule`'s business, what they make and keep that of `derivatives`.
"""

from __future__ import annotations

from typing import NamedTuple

from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import shapes
from skipcost.unet_models.topology import Conv, SkipGraph

MAP, CHANNELS, WEIGHTS, GROUPS, ONE = range(5)  # columns of the table of numbers
Place = tuple[int, int, int]  # where a convolution's weights are registered: sorting gives the parameters' order
Shape = tuple[int, int, int]  # channels, height, width
OWNERS = ("conv", "weight", "layer")  # calls that have a layer's parameters


class Call(NamedTuple):
    """One step: `reads` are the numbers of the calls whose results it takes, `detail` what else `op` must know."""

    op: str
    where: str
    reads: tuple[int, ...]
    detail: tuple[object, ...] = ()


class ConvDetail(NamedTuple):
    """What a call that has a layer's parameters, or runs its norm, must know of its record."""

    bias: bool
    norm: str
    act: bool
    flat: bool  # its result has one channel or one position, or is laid out by such a map: all layouts are the same
    first: bool  # reads the image, and that has several channels
    place: Place
    narrow: bool = False  # one channel goes in: its weight is the same in all layouts
    tap: bool = False  # its result is tap_first's alone, which keeps the weight's layout without data, too


class Calls:
    """The calls so far, with their results' sizes; a map is the number of the call that makes it."""

    def __init__(self, graph: SkipGraph, height: int, width: int) -> None:
        """Begin with the image; ValueError where a map would vanish."""
        shapes(lower(graph), (height, width))
        self.calls: list[Call] = []
        self.numbers: list[tuple[int, int, int, int, int]] = []  # the columns above
        self.shapes: list[Shape] = []
        self.image = self.call("image", "", (), (graph.in_channels, height, width))

    def call(
        self,
        op: str,
        where: str,
        reads: tuple[int, ...],
        shape: Shape,
        detail: tuple[object, ...] = (),
        weights: int = 0,
        groups: int = 0,
    ) -> int:
        """Add a call and return its number; `shape` is its result's."""
        self.calls.append(Call(op, where, reads, detail))
        self.numbers.append((shape[0] * shape[1] * shape[2], shape[0], weights, groups, 1))
        self.shapes.append(shape)
        return len(self.calls) - 1

    def hold(self, *maps: int) -> None:
        """Say that maps are referred to up to here."""
        self.call("hold", "", maps, self.shapes[maps[0]])

    def convolved(self, x: int, conv: Conv, padding: int) -> Shape:
        """The shape of a convolution's result."""
        _, height, width = self.shapes[x]
        if conv.transposed:
            return conv.out_channels, height * conv.kernel, width * conv.kernel
        lost = conv.kernel - 1 - 2 * padding
        return conv.out_channels, height - lost, width - lost

    def conv(self, x: int, conv: Conv, where: str, place: Place, padding: int) -> int:
        """Convolve, normalise and activate, in one call."""
        shape = self.convolved(x, conv, padding)
        flat = shape[0] == 1 or shape[1] * shape[2] == 1
        detail = ConvDetail(conv.bias, conv.norm, conv.act, flat, x == self.image and self.shapes[x][0] > 1, place)
        groups = conv.norm_groups if conv.norm == "group" else 0
        return self.call("conv", where, (x,), shape, detail, conv.weights, groups)

    def crop_all(self, maps: list[int], where: str, *, first: bool = False) -> list[int]:
        """Crop all maps, or the first alone, to the smallest height and width among them."""
        height, width = min(self.shapes[x][1] for x in maps), min(self.shapes[x][2] for x in maps)
        return [self.crop(x, height, width, where) for x in (maps[:1] if first else maps)]

    def crop(self, x: int, height: int, width: int, where: str) -> int:
        """Slice rows, then columns; a slice that takes everything is left out, as Python's indexing does."""
        channels, rows, columns = self.shapes[x]
        if rows > height:
            x = self.call("slice", f"{where}: crop", (x,), (channels, height, columns))
        return x if columns == width else self.call("slice", f"{where}: crop", (x,), (channels, height, width))

    def merge(self, maps: list[int], how: str, where: str) -> int:
        """Crop, then concatenate or add; a single map stays what it is."""
        cropped = self.crop_all(maps, where)
        if len(cropped) == 1:
            return cropped[0]
        channels, height, width = self.shapes[cropped[0]]
        if how == "concat":
            channels = sum(self.shapes[x][0] for x in cropped)
            return self.call("cat", f"{where}: concatenation", tuple(cropped), (channels, height, width))
        first, more = ("add", "add_") if how == "sum" else (how, how)
        result = self.call(first, f"{where}: {how}", (cropped[0], cropped[1]), (channels, height, width))
        for other in cropped[2:]:
            result = self.call(more, f"{where}: {how}", (result, other), (channels, height, width))
        return result

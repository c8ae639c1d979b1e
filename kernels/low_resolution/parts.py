"""How tap-first up-sampling is cut on a GPU, and what a call allocates there forwards: arithmetic alone, no torch.

`tap_upsample_add` follows it. What a matrix product allocates inside is not in it: a library's workspace. Backwards a
GPU runs the blocks of `blocks`, which `costs.workspace_bytes` counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.costs import FLOAT
from skipcost.kernels.ops.tiles import up_to

TAP_BYTES = 2**28  # of the tap maps that exist at a time, but for those of one row of the result
DEPTH = 16  # of the product with the columns' weights, the least that Triton multiplies
COLUMNS = 8  # of the small map whose pixels a tile holds: with the two beside them, and 3 taps, 30 products of 32
MOST = 64  # outputs of a tile

Part = tuple[int, int, tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True)
class Inside:
    """Bytes that a call makes inside: packed weights for all of it, then part by part a copy of pixels and tap maps.

    The copy goes with its product, the tap maps with their part.
    """

    packed: int
    parts: tuple[tuple[int, int], ...]

    @property
    def fullest(self) -> int:
        """The most that is alive at a time."""
        return self.packed + max(map(sum, self.parts), default=0)


def parts(batch: int, rows: Axis, row: int, room: int = TAP_BYTES) -> Iterator[Part]:
    """Yield (start, stop) of images, and of rows: (start, stop) of the result, (first, last) of the small map.

    row: bytes of the tap maps of a row of the small map. room: bytes of them that may exist at a time.
    """
    images = room // max(row * rows.extent, 1)
    if images:
        for start in range(0, batch, images):
            yield start, min(start + images, batch), (0, rows.output, 0, rows.extent)
        return
    step = max((room // row - 2) * rows.factor - rows.kernel + 2, 1)  # pixels of either end lie between two rows
    for image in range(batch):
        for band in rows.blocks(step):
            yield image, image + 1, (band.start, band.stop, band.first, band.last)


def inside(
    rows: Axis, columns: Axis, channels: tuple[int, int], batch: int, value: int, *, last: bool, room: int = TAP_BYTES
) -> Inside:  # fmt: skip
    """Count what a call makes inside, for maps of `value` bytes (2 or 4) and `channels` = (in, out).

    last: whether the map is channels_last. Otherwise the pixels of several images are no matrix until they are copied.
    """
    in_channels, out_channels = channels
    taps = rows.kernel * columns.kernel
    packed = value * taps * in_channels * out_channels if min(taps, out_channels) > 1 else 0  # else a view
    row = FLOAT * columns.extent * taps * out_channels
    made = []
    for start, stop, (_, _, first, end) in parts(batch, rows, row, room):
        images, pixels = stop - start, (end - first) * columns.extent
        copied = not last and min(images, pixels, in_channels) > 1
        made.append((value * images * pixels * in_channels * copied, images * (end - first) * row))
    return Inside(packed, tuple(made))


def tile_pixels(columns: Axis) -> int:
    """Return how many outputs of a row a tile holds."""
    return up_to(min(COLUMNS * columns.factor, columns.output), MOST)


def corners(rows: Axis) -> int:
    """Return how many pixels of a column a tap reads: two, or one where no mean of two is taken."""
    return 2 if rows.reads[1][..., 1].any() else 1


@lru_cache(maxsize=512)  # a prediction asks for those of each call several times
def tables(rows: Axis, columns: Axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the bytes of the tables of rows, and of columns, which are kept between calls: pixels, then weights."""
    entries = FLOAT * rows.output * rows.kernel * corners(rows)
    tile = tile_pixels(columns)
    bands = columns.blocks(tile)
    depth = band_depth(max(band.last - band.first for band in bands) * columns.kernel)
    return (entries, entries), (FLOAT * len(bands), FLOAT * len(bands) * tile * depth)


def band_depth(read: int) -> int:
    """Return how many columns a tile's weights have for so many products that are read."""
    return -(-read // DEPTH) * DEPTH

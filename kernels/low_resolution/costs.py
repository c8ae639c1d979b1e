"""What tap-first up-sampling costs, counted: MACs of its products, and bytes alive inside of it, forward and backward.

Arithmetic alone; the op's FLOP formulas, the choice of `backend=rewritten` and `executed_macs` all read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipcost.kernels.low_resolution.axis import Axis

KERNEL_SUMS = 44  # MACs in fp32 for each output of the GPU's kernel: 12 in rows, 32 in columns; at factor 2 the most

FLOAT = 4  # bytes of a value inside the op, whatever the maps have
SUMS = 2**20  # bytes of sums that are made at a time, before they go into the result: half of a core's cache


@dataclass(frozen=True, slots=True)
class Products:
    """MACs of one pass: `taps` in the products over channels at low resolution, `bands` in the banded ones."""

    taps: int
    bands: int

    @property
    def macs(self) -> int:
        """All of them."""
        return self.taps + self.bands


def forward(rows: Axis, columns: Axis, channels: tuple[int, int], batch: int = 1) -> Products:
    """Count the op forwards for `channels` = (in, out); tap maps that two blocks read are computed once."""
    in_channels, out_channels = channels
    read = sum(band.last - band.first for band in rows.bands) - sum(rows.shared)
    taps = read * columns.extent * rows.kernel * columns.kernel * in_channels * out_channels
    across = columns.extent * columns.kernel * out_channels
    down = sum((band.stop - band.start) * rows.kernel * (band.last - band.first) for band in rows.bands) * across
    along = sum((band.stop - band.start) * (band.last - band.first) for band in columns.bands)
    return Products(batch * taps, batch * (down + rows.output * along * columns.kernel * out_channels))


def backward(
    rows: Axis, columns: Axis, channels: tuple[int, int], batch: int = 1, *, of_map: bool = True, of_weight: bool = True
) -> Products:  # fmt: skip
    """Count the op backwards: the banded products once, those over channels for each gradient that is asked for."""
    if not (of_map or of_weight):
        return Products(0, 0)
    in_channels, out_channels = channels
    taps = rows.extent * columns.extent * rows.kernel * columns.kernel * in_channels * out_channels
    along = sum((band.stop - band.start) * (band.last - band.first) for band in columns.adjoint_bands)
    read = sum(band.last - band.first for band in rows.adjoint_bands)
    across = columns.extent * columns.kernel * out_channels
    down = (
        sum((band.stop - band.start) * rows.kernel * (band.last - band.first) for band in rows.adjoint_bands) * across
    )
    bands = read * along * columns.kernel * out_channels + down
    return Products(batch * taps * (of_map + of_weight), batch * bands)


def direct(rows: Axis, columns: Axis, channels: tuple[int, int], batch: int = 1) -> int:
    """Count the convolution over the up-sampled map."""
    return batch * rows.output * columns.output * rows.kernel * columns.kernel * channels[0] * channels[1]


def workspace_bytes(
    rows: Axis, columns: Axis, channels: tuple[int, int], value: int = FLOAT, *, backward: bool = False
) -> int:  # fmt: skip
    """Count the bytes that a call has alive at its fullest beyond its arguments and results, for two images or more.

    value: bytes of a map's values, 2 or 4. Counted is what runs in blocks of 16 rows (on a CPU, and backwards
    everywhere): packed weights, fp32 copies of 16 bits, and a block's pixels, tap maps and sums; what a block makes
    stands beside what the block before made until it is there. What a matrix product allocates inside is not in it, nor
    the matrices of the bands, which are kept between calls: some 0.1 MiB for each side of a map.
    """
    elements = channels[0] * channels[1] * rows.kernel * columns.kernel
    packed, copied = FLOAT * elements, FLOAT * elements if value < FLOAT else 0
    if not backward:
        return packed + max(copied, _fullest(_forward_steps(rows, columns, channels, value))[0])
    fullest, last = _fullest(_backward_steps(rows, columns, channels, value))
    rounded = value * elements if value < FLOAT else 0  # beside the result, which is made of it
    return 2 * packed + max(fullest - value * elements, last + rounded)


def spans(rows: int, values: int) -> list[slice]:
    """Cut rows into spans of whose sums, `values` for each row, SUMS bytes are alive at a time, or one row's."""
    step = max(SUMS // (FLOAT * values), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _fullest(steps: list[tuple[str, int]]) -> tuple[int, int]:
    """Bytes at the fullest, and at the end, of steps that put a size in the place of a name's last; all of it twice."""
    held: dict[str, int] = {}
    most = 0
    for name, size in steps * 2:
        most = max(most, sum(held.values()) + size)
        held[name] = size
    return most, sum(held.values())


def _forward_steps(
    rows: Axis, columns: Axis, channels: tuple[int, int], value: int
) -> list[tuple[str, int]]:  # fmt: skip
    """What every block makes, in bytes: pixels are copies where maps have 16 bits, and sums go part by part."""
    copies, across = FLOAT * (value < FLOAT), FLOAT * columns.extent * columns.kernel * channels[1]
    steps = []
    for band, shared in zip(rows.bands, rows.shared, strict=True):
        read, made = band.last - band.first, band.stop - band.start
        steps += [("pixels", copies * (read - shared) * columns.extent * channels[0])]
        steps += [("taps", read * rows.kernel * across), ("pixels", 0), ("half", made * across)]
        for along in columns.bands:
            values = (along.stop - along.start) * channels[1]
            steps += [("sums", FLOAT * values * (part.stop - part.start)) for part in spans(made, values)]
        steps += [("sums", 0)]
    return steps


def _backward_steps(
    rows: Axis, columns: Axis, channels: tuple[int, int], value: int
) -> list[tuple[str, int]]:  # fmt: skip
    """What every block makes backwards, in bytes; its copy of the gradient goes before the products over channels."""
    copies, across = FLOAT * (value < FLOAT), FLOAT * columns.extent * columns.kernel * channels[1]
    steps = []
    for band in rows.adjoint_bands:
        read, made = band.last - band.first, band.stop - band.start
        pixels = made * columns.extent * channels[0]
        steps += [("gradient", copies * read * columns.output * channels[1]), ("half", read * across)]
        for along in columns.adjoint_bands:
            values = (along.stop - along.start) * columns.kernel * channels[1]
            sums = [FLOAT * values * (part.stop - part.start) for part in spans(read, values)]
            steps += [step for size in sums for step in (("sums", size), ("sums", 0))]
        steps += [("gradient", 0), ("taps", made * rows.kernel * across), ("half", 0)]
        steps += [("pixels", copies * pixels), ("products", FLOAT * pixels)]
    return steps

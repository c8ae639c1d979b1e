"""What tap-first up-sampling costs, counted: MACs of its products, forward and backward.

Arithmetic alone; the op's FLOP formulas, the choice of `backend=rewritten` and `executed_macs` all read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipcost.kernels.tap_axis import Axis


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
    """Count the op forwards for `channels` = (in, out); rows that two blocks read are counted, and computed, twice."""
    in_channels, out_channels = channels
    read = sum(band.last - band.first for band in rows.bands)
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

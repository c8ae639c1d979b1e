"""What the interpreter checks of `up_conv` share: a case, how far off it was, and products without tf32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, amid, maps_amid_nan
from torch import Tensor

from skipcost.kernels.ops.tiles import Tile
from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA
from skipcost.unet_models.ops import crop

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
TILES = (  # at the sizes below, several programs along either axis, several steps of depth, ragged edges of each
    Tile("pointer", 16, 64, 16),
    Tile("pointer", 32, 32, 16),
    Tile("pointer", 64, 16, 32),
)
CHANNELS = (1, 2, 3, 5, 16, 24, 33)  # below, at, between and beyond the multiples of 16 that tiles are made of


@pytest.fixture(scope="module")
def no_tf32() -> Iterator[None]:
    """Operands of fp32 stay fp32 where a check does not say otherwise; PyTorch's own default lets them be cut."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True, slots=True)
class Case:
    """What a check up-samples, and what beside it; `beyond` is by how much the other maps are larger."""

    batch: int
    size: tuple[int, int, int]  # C, H, W of x
    outputs: int
    precision: str
    layouts: tuple[str, str] = ("channels_last", "contiguous")  # of x and of the weight
    data: str = "normal"
    bias: bool = True
    beyond: tuple[tuple[int, int, int], ...] = ()  # channels, rows, columns of each other map
    tile: Tile = TILES[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps and weights."""
        return DTYPES[self.precision]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, weight and bias, each amid NaN."""
        channels, *size = self.size
        shapes = ((self.batch, channels, *size), (channels, self.outputs, 2, 2), (self.outputs,))
        values = [DATA[self.data](shape, self.dtype, seed) for seed, shape in enumerate(shapes)]
        x, weight = (amid(*each) for each in zip(values, self.layouts, strict=False))
        return x, weight, amid(values[2], "contiguous") if self.bias else None

    def maps(self) -> list[Tensor]:
        """The other maps, amid NaN."""
        _, height, width = self.size
        sizes = [(channels, 2 * height + y, 2 * width + x) for channels, y, x in self.beyond]
        return maps_amid_nan(self.batch, sizes, self.dtype, layouts=LAYOUTS)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Maps from one pixel on, and crops of odd and even remainders, of the other maps and of the up-sampled one."""
    beyond = st.tuples(st.sampled_from((1, 3, 16)), st.integers(0, 9), st.integers(0, 9))
    return Case(
        batch=draw(st.integers(0, 2)),
        size=(draw(st.sampled_from(CHANNELS)), draw(st.integers(1, 5)), draw(st.integers(1, 7))),
        outputs=draw(st.sampled_from(CHANNELS)),
        precision=draw(st.sampled_from(tuple(DTYPES))),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        data=draw(st.sampled_from(("normal", "positive"))),
        bias=draw(st.booleans()),
        beyond=tuple(draw(st.lists(beyond, max_size=3))),
        tile=draw(st.sampled_from(TILES)),
    )


def error(actual: Tensor, case: Case, inputs: Sequence[Tensor | None]) -> float:
    """Worst error of a centre-cropped up-sampled map over the allowed one."""
    x, weight, bias = inputs
    assert x is not None
    assert weight is not None
    exact = validate.up_conv(x, weight, bias)
    value, magnitude = (crop(each, *actual.shape[2:]) for each in (exact.value, exact.magnitude))
    seen = replace(exact, value=value, magnitude=magnitude)
    return validate.worst(actual, value, validate.allowed(seen, actual.dtype, tf32=case.precision == "tf32"))

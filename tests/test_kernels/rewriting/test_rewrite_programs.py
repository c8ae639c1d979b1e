"""`rewrite` on random programs of layers: whatever reads, writes and shares what, results and gradients stay.

A program is a list of steps over maps of two sizes; some write in place to maps that have other readers, and names of
one map are many. What rewriting may not do shows as another result.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_checks import always, assert_same, run
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels import rewrite

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")
CHANNELS = 3
ENLARGING = {
    "up": lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "up nearest": lambda x: functional.interpolate(x, scale_factor=2.0),
    "up to a size": lambda x: functional.interpolate(
        x, [2 * x.size(2), 2 * x.size(3)], mode="bilinear", align_corners=True
    ),
}
SAME = {  # functions of two maps of one size
    "relu": lambda x, _: torch.relu(x),
    "relu in place": lambda x, _: functional.relu_(x),
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.add_(y),
    "view": lambda x, _: x.view(x.size()),
    "double in place": lambda x, _: x.mul_(2),
    "another name": lambda x, _: x,
    "crop in place": lambda x, _: (x[:, :, 1:, :-1].zero_(), x)[1],
}
Step = tuple[str, bool, int, int]  # what, of small maps or of large ones, and how many maps back its operands are
PLACES = (  # a map that nobody else can read
    "conv of up",
    "cat with up",
    "cat with up first",
    "cropped up",
    "cat with transposed",
    "cat with zeros around transposed",
    "pointwise of up",
    "cat with pointwise of up",
)
NAMES = (*ENLARGING, *SAME, "pool", "conv", "cat", *PLACES * 3)
STEP = st.tuples(st.sampled_from(NAMES), st.booleans(), st.integers(0, 3), st.integers(0, 3))


def _place(name: str, layer: nn.Module, small: Tensor, large: Tensor, grow: nn.ModuleDict) -> Tensor:
    if "transposed" in name:
        up, sides = grow["transposed"](small), [1, 0, 0, 2] if "zeros" in name else [0, 0, 0, 0]
        both = torch.cat([functional.pad(large, sides), functional.pad(up, sides)], 1)
        return layer(both)[:, :, : large.size(2), sides[0] :]
    if "pointwise" in name:
        up = grow["pointwise"](ENLARGING["up"](small))
        return layer(torch.cat([up, large], 1)) if "cat" in name else up
    if "cat" in name:
        up = ENLARGING["up nearest"](small)
        return layer(torch.cat([up, large] if "first" in name else [large, up], 1))
    up = ENLARGING["up" if "conv" in name else "up to a size"](small)
    return layer(up) if "conv" in name else functional.pad(layer(up[:, :, 1:, :-1]), [0, 1, 1, 0])


class Program(nn.Module):
    """Runs steps; the results are the last maps of both sizes."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        torch.manual_seed(1)
        self.layers = nn.ModuleList(
            nn.Conv2d(2 * CHANNELS if "cat" in name else CHANNELS, CHANNELS, 3, padding=1) for name, *_ in steps
        )
        self.grow = nn.ModuleDict(
            {
                "transposed": nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2),
                "pointwise": nn.Conv2d(CHANNELS, CHANNELS, 1),
            }
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> two maps (N, 3, H, W) and (N, 3, H / 2, W / 2)."""
        large, small = [x * 1], [functional.avg_pool2d(x, 2) * 1]
        for (name, of_small, back, other), layer in zip(self.steps, self.layers, strict=True):
            maps = small if of_small else large
            a, b = maps[-1 - min(back, len(maps) - 1)], maps[-1 - min(other, len(maps) - 1)]
            source = small[-1 - min(back, len(small) - 1)]
            if name in ENLARGING:
                large.append(ENLARGING[name](source))
            elif name in PLACES:
                large.append(_place(name, layer, source, large[-1 - min(other, len(large) - 1)], self.grow))
            elif name == "pool":
                small.append(functional.max_pool2d(large[-1 - min(back, len(large) - 1)], 2))
            elif name == "conv":
                maps.append(layer(a))
            elif name == "cat":
                maps.append(layer(torch.cat([a, b], 1)))
            else:
                maps.append(SAME[name](a, b))
        return [large[-1] + 0, small[-1] + 0]


def passes(steps: list[Step], *, training: bool) -> None:
    """Compare a program with what it is rewritten to; where PyTorch refuses its backward, nothing is compared."""
    model = Program(steps).double()
    x = torch.randn(1, CHANNELS, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        expected = run(model, x, training=training)
    except RuntimeError as error:
        assert "inplace operation" in str(error)  # noqa: PT017 - of the model itself
        return

    faster, _ = rewrite(model)

    assert_same(expected, run(faster, x, training=training), 1e-10)
    with torch.no_grad():  # where transposed convolutions are composed
        for ours, its in zip(faster(x), model(x), strict=True):
            assert (ours - its).abs().max() <= 1e-10 * its.abs().max()


@settings(max_examples=15)
@given(st.lists(STEP, min_size=2, max_size=14), st.booleans())
def test_a_program_of_layers_gives_what_it_gave(steps: list[Step], training: bool) -> None:  # noqa: FBT001 - hypothesis passes by position
    """With every call in its tap-first form, to 1e-10 of the largest number."""
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        passes(steps, training=training)

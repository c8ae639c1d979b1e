"""Decoders whose up-sampling has weights, or a 1x1 convolution behind it, in models that do unusual things."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels import rewrite
from skipcost.kernels.rewriting import composing as kept

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")
ASKED = "gradients may be asked for"


class Decoder(nn.Module):
    """(N, 8, H, W) and a skip (N, 4, 2H, 2W) -> (N, 8, 2H, 2W)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(12, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Any:
        """By weights."""
        return self.conv(torch.cat([skip, self.up(x)], 1))


class ToTheSkip(Decoder):
    """Pads or crops the enlarged map to the skip, then mixes its channels."""

    def forward(self, x: Tensor, skip: Tensor) -> Any:
        """By pixels."""
        up = functional.interpolate(x, scale_factor=2, mode="bilinear")
        more = skip.shape[2] - up.shape[2]
        return self.point(functional.pad(up, [0, 0, 0, more])) + skip


class AutocastInside(Decoder):
    """Computes in another type inside than outside."""

    def forward(self, x: Tensor, skip: Tensor) -> Any:
        """By pixels."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.point(functional.interpolate(self.conv(skip.repeat(1, 3, 1, 1)), scale_factor=2.0)) + x.mean()


class Mapped(Decoder):
    """Takes images one by one, through torch.func."""

    def forward(self, x: Tensor, skip: Tensor) -> Any:
        """By weights."""
        each = torch.vmap(lambda one: super(Mapped, self).forward(one[None], skip[:1])[0])
        return each(x)


def maps(side: int = 6, more: int = 0, **how: Any) -> tuple[Tensor, Tensor]:
    """Return a map (2, 8, side, side) and a skip of twice the size, or `more` rows."""
    return torch.randn(2, 8, side, side, **how), torch.randn(2, 4, 2 * side + more, 2 * side, **how)


@pytest.mark.parametrize("dynamic", [True, None])
def test_a_map_that_is_padded_by_a_size_of_the_call(*, dynamic: bool | None) -> None:
    """Whether it is padded or cropped is known in each call alone, and zeros would get the bias."""
    model = ToTheSkip().double().eval()
    run_it = torch.compile(model, backend="skipcost", dynamic=dynamic)

    with torch.no_grad():
        for side, more in ((6, -1), (7, -2), (8, 2), (9, 0), (10, 3)):
            given = maps(side, more, dtype=torch.float64)
            torch.testing.assert_close(run_it(*given), model(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("around", [False, True])
def test_autocast_that_is_switched_on_inside(*, around: bool) -> None:
    """What a copied node would give there is not known."""
    model, given = AutocastInside().eval(), maps()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        faster, _ = rewrite(model, *given)
        assert torch.equal(faster(*given), model(*given))


def test_a_part_that_runs_through_torch_func() -> None:
    """It stays, and the list says so."""
    model, given = Mapped().eval(), maps()

    with torch.no_grad():
        faster, changes = rewrite(model, *given)
        assert torch.equal(faster(*given), model(*given))

    assert [each.why for each in changes] == ["a part of it runs through torch.func"]


@pytest.mark.parametrize("last", [(False, True), (True, False), (True, True)])
def test_a_result_lies_in_memory_as_the_models(last: tuple[bool, bool], composing: list[tuple[int, ...]]) -> None:
    """A concatenation is in channels_last only where all of its maps are."""
    model, layouts = Decoder().eval(), (torch.contiguous_format, torch.channels_last)
    given = [each.contiguous(memory_format=layouts[way]) for each, way in zip(maps(), last, strict=True)]

    with torch.no_grad():
        faster, _ = rewrite(model, *given)
        result, wanted = faster(*given), model(*given)

    assert len(composing) > 0
    assert result.stride() == wanted.stride()


def test_twins_and_graphs_share_what_is_composed(composing: list[tuple[int, ...]]) -> None:
    """However often a model is rewritten, and in whatever mode it is called, its weights are composed once."""
    model, given = Decoder().eval(), maps()

    for mode in (torch.no_grad, torch.inference_mode) * 2:
        with mode():
            rewrite(model, *given)[0](*given)
        gc.collect()

    assert len(composing) == 4 * 2  # the example is run, too
    assert len(kept._KEPT[model.up.weight]) == 1


class Switching(Decoder):
    """Records gradients or not, whatever it is called in."""

    def __init__(self, *, on: bool) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: Tensor, skip: Tensor) -> Any:
        """By weights."""
        with torch.set_grad_enabled(self.on):
            return super().forward(x, skip)


@pytest.mark.parametrize("inside", [False, True])
def test_the_list_goes_by_what_the_model_switches(composing: list[tuple[int, ...]], *, inside: bool) -> None:
    """Not by what it is called in."""
    model, given = Switching(on=inside).eval(), maps()

    with torch.set_grad_enabled(not inside):
        faster, (change,) = rewrite(model, *given)
        faster(*given)

    assert change.why.startswith(ASKED) == inside
    assert (change.after == "composed_up_conv") == bool(composing) == (not inside)

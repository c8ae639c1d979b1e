"""What the tests of `rewrite` share: models with inputs, a comparison in float64, and the choice taken out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import reference_models
import torch
import user_models
from fusion_checks import within
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from user_models import trained

from skipcost.kernels.rewriting import enlarged, graph
from skipcost.kernels.rewriting.rewrite import Running


class UNet3Plus(reference_models.UNet3Plus):
    """The hand-written one, with logits for results: probabilities would hide differences."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of five sides, and of two classes."""
        return self.supervise(image)


class Supervised(user_models.NestedUNet):
    """All maps in training; in evaluation it stops at the first. Dropout by a function that is told the mode."""

    def forward(self, x: Tensor) -> Any:
        """(N, 3, H, W) -> logits."""
        x = functional.dropout(x, 0.25, self.training)
        if self.training:
            return super().forward(x)
        x0_0 = self.conv0_0(x)
        return self.final1(self.conv0_1(torch.cat([x0_0, self.up(self.conv1_0(self.pool(x0_0)))], 1)))


class SkipBlock(nn.Module):
    """Up-samples, concatenates a skip where there is one, convolves."""

    def __init__(self, channels: int, skip_channels: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Identity())
        self.conv = nn.Conv2d(channels + skip_channels, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(N, C, h, w) and (N, C', 2h, 2w) -> (N, 8, 2h, 2w)."""
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x = self.attention(torch.cat([x, skip], dim=1))
        return torch.relu(self.conv(x))


class Skipping(nn.Module):
    """A decoder whose Python counts the skips: only its blocks can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 32, 2, stride=2)
        self.deep = nn.Conv2d(32, 64, 2, stride=2)
        self.blocks = nn.ModuleList([SkipBlock(64, 32), SkipBlock(8, 4), SkipBlock(8, 0)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 8, 2H, 2W)."""
        skips = [self.stem(x)]
        skips.append(self.down(skips[0]))
        x = self.deep(skips[1])
        if x.shape[2] < 2:
            message = "too small"
            raise RuntimeError(message)
        for block in self.blocks:
            x = block(x, skips.pop() if skips else None)
        return x


class Pointwise(nn.Module):
    """Up-samples, then halves the channels at each pixel, as decoders without transposed convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 64, 2, stride=2)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(64, 32, 1, bias=mode == "nearest"))
            for mode in ("nearest", "bilinear")
        )
        self.conv = nn.Conv2d(8 + 64, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, H, W)."""
        skip = torch.relu(self.stem(x))
        deep = torch.relu(self.down(skip))
        return self.conv(torch.cat([skip, *(up(deep) for up in self.ups)], 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with the shape of an input
    "padding": (lambda: user_models.PaddingUNet(bilinear=True), (2, 3, 19, 24)),
    "pointwise": (Pointwise, (2, 3, 16, 12)),
    "transposed": (user_models.PaddingUNet, (2, 3, 19, 24)),
    "dividing": (lambda: user_models.PaddingUNet(bilinear=True), (1, 3, 16, 24)),
    "nested": (user_models.NestedUNet, (2, 3, 16, 12)),
    "supervised": (Supervised, (2, 3, 16, 12)),
    "skipping": (Skipping, (2, 3, 12, 16)),
    "unet3+": (UNet3Plus, (1, 3, 32, 48)),
    "resnet": (user_models.ResNet, (2, 3, 33, 32)),
    "branching": (lambda: user_models.BranchingUNet(bilinear=True), (1, 3, 16, 24)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model in float64 by its name, and an input."""
    factory, shape = MODELS[name]
    torch.manual_seed(1)
    return trained(factory()).double(), torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Pass:
    """What one pass, forwards and backwards, gives: results, gradients by name, buffers, MACs forwards."""

    results: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: list[Tensor]
    macs: int


def run(model: nn.Module, x: Tensor, *, training: bool, through: Callable[..., Any] | None = None) -> Pass:
    """Run a pass of the sum of squares on a copy, in a mode, with its random numbers.

    through: makes of the copy what is called; None: the copy itself.
    """
    model = copy.deepcopy(model).train(training)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    counter = FlopCounterMode(display=False)
    flops: list[int] = []
    compiled = through or isinstance(model.forward, Running)
    with within(counter, lambda _: flops.append(counter.get_total_flops())) if compiled else counter:
        results = tree_leaves((through(model) if through else model)(x))
    torch.stack([each.square().sum() for each in results]).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert x.grad is not None
    macs = (sum(flops) or counter.get_total_flops()) // 2
    return Pass([each.detach() for each in results], {**gradients, "x": x.grad}, list(model.buffers()), macs)


def assert_same(one: Pass, other: Pass, bound: float = 1e-12) -> None:
    """Compare to a bound, relative to the largest result, and to the largest gradient of all.

    A bias before a norm has a gradient of rounding errors alone, which is why gradients share a scale.
    """
    largest = max(each.abs().max() for each in one.gradients.values())
    assert list(one.gradients) == list(other.gradients)
    for name, each in one.gradients.items():
        assert (each - other.gradients[name]).abs().max() <= bound * largest, name
    for ours, its in zip(
        (*one.results, *one.buffers), (*other.results, *other.buffers), strict=True
    ):  # fmt: skip
        assert ours.shape == its.shape
        assert (ours - its).abs().max() <= bound * ours.abs().max()


def sizes_that_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out of the hand-written models the trimming that looks at sizes, which divide here."""
    monkeypatch.setattr(reference_models, "trimmed", lambda *maps: list(maps))


def always(monkeypatch: pytest.MonkeyPatch, *, taken: bool = True) -> None:
    """Let every call take the one form, whatever it counts."""
    for module in (enlarged, graph):
        monkeypatch.setattr(module, "choice_of", lambda *_: SimpleNamespace(taken=taken, why="for a test"))

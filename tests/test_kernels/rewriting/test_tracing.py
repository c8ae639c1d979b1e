"""Models whose Python is more than a list of layers: what is followed, and what is called as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_checks import assert_as_good, made, ours, outputs, refused, small
from torch import Tensor, nn
from torch.nn import functional
from user_models import DoubleConv, trained

from skipcost.kernels import fuse

pytestmark = pytest.mark.usefixtures("one_thread")


class Writing(nn.Module):
    """Writes to the map that its convolution has read, and to one that has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, H / 2, W / 2)."""
        x = x.abs()
        y = self.conv(x)
        x += 1
        y = self.norm(y)
        kept = y
        y += x
        y *= 2
        return functional.max_pool2d(kept, 2)


def test_a_write_is_seen_by_later_readers_only_and_under_every_name() -> None:
    """The convolution has read its map before `x += 1`; the pool of the other name comes after `y *= 2`."""
    model = trained(Writing())

    fused, changes = fuse(model)

    assert ours(changes) == ["conv_bn_relu"]
    assert_as_good(fused, model, torch.randn(2, 3, 6, 8))


class Modal(nn.Module):
    """Asks for its mode in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.block = DoubleConv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the same."""
        x = functional.dropout(self.block(x), 0.5, self.training)
        return x if self.training else 2 * x


def test_python_that_asks_for_the_mode_gets_the_right_one() -> None:
    """A trace made in one mode is not used in the other, even for a part of the model."""
    model, x = nn.Sequential(trained(Modal())), torch.randn(2, 3, 6, 7)
    fused, _ = fuse(model.eval())

    assert_as_good(fused, model, x)
    for each in (model, fused):
        each.get_submodule("0").training = True
    torch.manual_seed(3)
    expected = outputs(model, x)
    torch.manual_seed(3)
    assert torch.equal(*outputs(fused, x), *expected)


class Viewing(nn.Module):
    """Needs contiguous maps, and looks at shapes so that its Python cannot be followed."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C)."""
        return x.view(len(x), x.shape[1], -1).mean(2) if x.shape[2] > 1 else x.flatten(1)


def test_modules_that_cannot_be_followed_find_the_layout_they_know() -> None:
    """`view` in a user's module works behind a fused convolution, and behind a pool of one."""
    model, x = small(DoubleConv(3, 6), nn.MaxPool2d(2), Viewing()), torch.randn(2, 3, 6, 8)

    fused, changes = fuse(model)

    assert_as_good(fused, model, x)
    assert str(changes[-1]) == (
        "2: Viewing stays as it is: it is only fused inside, since its Python decides by values or shapes of tensors"
    )


class Flagged(nn.Module):
    """Takes options, has an argument that may be missing, gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.block = DoubleConv(3, 3)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, twice: bool = False) -> dict[str, Tensor]:
        """(N, 3, H, W) -> the same, under a name."""
        x = self.block(x)
        if skip is not None:
            x = x + skip
        return {"map": self.block(x) if twice else x}


@pytest.mark.parametrize("options", [{}, {"twice": True}, {"skip": torch.ones(1)}, {"skip": None}], ids=str)
def test_arguments_with_a_default_are_free(options: dict[str, Any]) -> None:
    """Whichever are given, the result is the original's; the graph is for the call that gives none."""
    model, x = trained(Flagged()), torch.randn(2, 3, 6, 7)
    fused, changes = fuse(model)

    with torch.no_grad():
        ours, expected = fused(x, **options)["map"], model(x, **options)["map"]

    assert len(changes) == 2
    torch.testing.assert_close(ours, expected)


class Noisy(nn.Module):
    """Draws numbers that depend on no argument."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return x + torch.randn(1)


class ByKeyword(nn.Module):
    """Wants its argument by name."""

    def forward(self, *, x: Tensor) -> Tensor:
        """Anything."""
        return x


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Noisy(), "it makes a tensor that depends on no argument"),
        (ByKeyword(), "its argument x can only be given by keyword"),
        (Viewing(), "its Python decides by values or shapes of tensors"),
    ],
    ids=["noise", "keyword", "shape"],
)
def test_what_cannot_be_followed_says_why(module: nn.Module, why: str) -> None:
    """One sentence, and no constants in place of what is new in each call."""
    fused, changes = fuse(module)

    assert why in refused(changes)
    assert type(fused) is type(module)


def test_hooks_are_called() -> None:
    """Those that a block had are called round its fused form, and those put anywhere later are called too."""
    model, x = made("dividing")
    seen: list[str] = []
    model.get_submodule("inc").register_forward_hook(lambda *_: seen.append("before"))

    fused, changes = fuse(model)
    outputs(fused, x)
    fused.get_submodule("up1.conv.double_conv.4").register_forward_hook(lambda *_: seen.append("after"))
    outputs(fused, x)

    assert seen == ["before", "before", "after"]
    assert len(ours(changes)) == 10
    assert_as_good(fused, model, x)


class Keywords(nn.Module):
    """Gives all arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, H / 2, W / 2)."""
        x = self.norm(self.conv(torch.cat(tensors=[x, x], dim=1)))
        return functional.max_pool2d(input=functional.relu(input=x), kernel_size=2)


def test_what_is_called_by_keywords_works_as_before() -> None:
    """torch.nn.functional gives names back their places; other functions are left alone."""
    model = trained(Keywords())

    fused, changes = fuse(model)

    assert [change.before for change in changes] == ["Conv2d -> BatchNorm2d -> relu"]
    assert_as_good(fused, model, torch.randn(2, 3, 6, 8))


def test_dropout_is_nothing_in_evaluation_and_itself_otherwise() -> None:
    """Convolutions are fused across it; where only dropout is in training, as for estimates of doubt, it drops."""
    model = small(nn.Conv2d(3, 6, 3), nn.Dropout2d(0.5), nn.BatchNorm2d(6), nn.Identity(), nn.ReLU())
    x = torch.randn(4, 3, 9, 9)
    fused, changes = fuse(model)

    assert str(changes[0]) == "0, 2, 4: Conv2d -> BatchNorm2d -> ReLU runs as conv_bn_relu"
    assert_as_good(fused, model, x)
    for each in (model, fused):
        each.get_submodule("1").train()
    torch.manual_seed(3)
    expected = outputs(model, x)
    torch.manual_seed(3)
    assert torch.equal(*outputs(fused, x), *expected)
    assert not torch.equal(*outputs(fused, x), *expected)

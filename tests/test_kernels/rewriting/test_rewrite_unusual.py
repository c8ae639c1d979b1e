"""`rewrite` and `fuse` of models that do unusual things: results are the model's, or the list says what stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_checks import fuse_at, ours, refused
from torch import Tensor, nn
from torch.nn import functional
from user_models import trained

from skipcost.kernels import fuse, rewrite

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore:a fused model runs:RuntimeWarning"),
]


def image() -> Tensor:
    """Return maps (2, 64, 16, 16)."""
    return torch.randn(2, 64, 16, 16)


class Block(nn.Module):
    """Convolution, norm, ReLU, with hooks for what is unusual."""

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = conv(64, 64, 3, padding=1), norm(64)

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> the same."""
        return functional.relu(self.norm(self.conv(x)))


class Broken(Block):
    """Breaks the graph."""

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> the same."""
        torch._dynamo.graph_break()
        return super().forward(x)


class WithBroken(Block):
    """Has a block of the same names that breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Broken()

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> the same."""
        return self.block(super().forward(x))


TEACHER = trained(Block())


class Student(Block):
    """Calls a model that is not its own, with layers of the same names."""

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> two of the same."""
        return super().forward(x), TEACHER(x)


class OwnBias(nn.Conv2d):
    """Scales its bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        assert self.bias is not None
        return functional.conv2d(x, self.weight, self.bias * 3, self.stride, self.padding)


class OwnWeight(nn.BatchNorm2d):
    """Shifts its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, False)


class Writing(Block):
    """Writes to the norm's weight behind the convolution."""

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> the same."""
        x = self.conv(x)
        with torch.no_grad():
            self.norm.weight.copy_(self.norm.weight.flip(0))
        return functional.relu(self.norm(x))


class Listed(Block):
    """Writes to a list of maps between ReLU and pool."""

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> half of it."""
        x = super().forward(x)
        torch._foreach_mul_([x], -1.0)
        return functional.max_pool2d(x, 2) + x.mean()


class Growing(nn.Module):
    """Up-samples to the size of another map by a transposed convolution that is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.norm = nn.ConvTranspose2d(64, 8, 2, stride=2), nn.Conv2d(9, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, H, W) -> (N, 4, 2H - 1, 2W - 1)."""
        skip = x.new_ones((x.shape[0], 1, 2 * x.shape[2] + 1, 2 * x.shape[3] + 1))
        return self.norm(self.conv(torch.cat([skip, self.up(x, output_size=skip.shape[-2:])], 1)))


class Named(Block):
    """Gives functions their arguments by name."""

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> the same."""
        return super().forward(functional.dropout(input=x, p=0.5, training=False))


class Slotted(Block):
    """Keeps a number in a slot."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "scale", 2.0)

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> the same."""
        return self.scale * super().forward(x)


FUSED = {
    "break in a block": WithBroken,
    "another model": Student,
    "own bias": lambda: Block(OwnBias),
    "own weight": lambda: Block(norm=OwnWeight),
    "weights written": Writing,
    "list written": Listed,
    "output size": Growing,
    "by name": Named,
    "slots": Slotted,
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_gives_what_the_model_gives(name: str) -> None:
    """Wherever weights are not the layer's own, or not those of the moment, the layers run by themselves."""
    model, x = trained(FUSED[name]()), image()
    with torch.no_grad():
        fused, state = fuse(model)[0], {key: value.clone() for key, value in model.state_dict().items()}

        result = fused(x)
        model.load_state_dict(state)
        wanted = model(x)

    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Block(OwnBias), "OwnBias has a way of its own"),
        (lambda: Block(norm=OwnWeight), "OwnWeight has a way of its own"),
        (Writing, "copy_ writes in between to what is read"),
    ],
)
def test_the_list_says_why_layers_stay(make: Callable[[], nn.Module], why: str) -> None:
    """One line for the place."""
    _, changes = fuse_at(trained(make()), image())

    assert refused(changes) == why


def test_a_fused_optimizer_is_seen() -> None:
    """Its step leaves the version of a weight as it was."""
    model, x = trained(Block()), image()
    fused, changes = fuse_at(model, x)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)

    model(x).square().mean().backward()
    optimizer.step()

    assert ours(changes)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_weights_made_under_inference_mode_are_seen() -> None:
    """They have no version, and are written to all the same."""
    with torch.inference_mode():
        model, x = trained(Block()), image()
        fused, _ = fuse(model, x)
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})

        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


class Up(nn.Module):
    """A function, then a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.conv, self.function = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 32, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, H, W) -> (N, 32, 2H, 2W)."""
        return self.conv(self.function(self.first(x)))


def _frozen(x: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.interpolate(x, scale_factor=2.0)


def _written(x: Tensor) -> Tensor:
    up = functional.interpolate(x, scale_factor=2.0)
    with torch.no_grad():
        torch._foreach_add_([x], 1.0)
    return up


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.interpolate(x, scale_factor=2.05, mode="bilinear"),  # to twice the size all the same
        lambda x: functional.interpolate(x, scale_factor=(2.0, 2.05)),
        _frozen,
        _written,
    ],
    ids=["factor", "factors", "no_grad", "list written"],
)
def test_a_rewritten_model_gives_what_the_model_gives(
    function: Callable[[Tensor], Tensor], taken: list[tuple[int, ...]]
) -> None:
    """Results and gradients; these are no places."""
    model, x = Up(function), image()
    faster, _ = rewrite(model)

    results, gradients = [], []
    for each in (model, faster):
        model.zero_grad()
        results.append(each(x))
        results[-1].square().mean().backward()
        gradients.append(None if model.first.weight.grad is None else model.first.weight.grad.clone())

    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients) if gradients[0] is not None else None
    assert (gradients[0] is None) is (gradients[1] is None)
    assert not taken


@pytest.mark.parametrize("tool", [rewrite, fuse])
def test_weights_go_with_the_last_model(tool: Callable[..., tuple[nn.Module, list[Any]]]) -> None:
    """What Dynamo keeps of a model keeps no weights alive."""
    model = trained(Block())
    weight = weakref.ref(model.conv.weight)
    with torch.no_grad():
        made = tool(model, image())

    del model, made
    gc.collect()

    assert weight() is None


def test_an_example_leaves_the_given_model_as_it_is() -> None:
    """Also where its train() does more than set a mode."""

    class Freezing(Block):
        def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
            for each in self.parameters():
                each.requires_grad = mode
            return super().train(mode)

    model = Freezing().train()

    faster, _ = rewrite(model, image())

    assert all(each.requires_grad for each in model.parameters())
    assert all(each.training for each in faster.modules())

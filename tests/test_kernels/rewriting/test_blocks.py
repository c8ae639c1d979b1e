"""What `fuse` takes for a group: every way to write one, and what is none, with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusion_checks import FOLDED, JOINED, assert_as_good, fuse_at, ours, outputs, refused, small
from torch import Tensor, nn
from torch.nn import functional
from user_models import trained

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")


class Functional(nn.Module):
    """Convolution and norm, then a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), function

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 5, H, W)."""
        return self.function(self.norm(self.conv(x)))


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": functional.relu,
    "in place": lambda x: functional.relu(x, inplace=True),
    "in place by position": lambda x: functional.relu(x, True),
    "underscore": functional.relu_,
    "torch": torch.relu,
    "torch in place": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
}


@pytest.mark.parametrize("name", RELUS)
def test_every_way_to_write_relu_is_known(name: str) -> None:
    """As a function of two modules, a method, in place or not."""
    model, x = trained(Functional(RELUS[name])), torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x)

    assert [change.before.split(" -> ")[:2] for change in changes] == [["Conv2d", "BatchNorm2d"]]
    assert changes[0].where[2].startswith("relu")
    assert_as_good(fused, model, x)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5),
        nn.BatchNorm2d(5, affine=False),
        nn.BatchNorm2d(5, eps=0.3),
        nn.BatchNorm2d(5, momentum=None),
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_norms_of_known_statistics_are_folded(norm: nn.Module | None, bias: bool, relu: bool) -> None:  # noqa: FBT001
    """Any batch norm with running statistics, with or without weights, ReLU and bias; without a norm, ReLU alone."""
    layers = [nn.Conv2d(3, 5, 3, padding=1, bias=bias), *([norm] if norm else []), *([nn.ReLU()] if relu else [])]
    model, x = small(*layers), torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x)

    assert ours(changes) == (["conv_bn_relu"] if norm or relu else [])
    assert_as_good(fused, model, x)


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_a_word_is_read(padding: str, side: int) -> None:
    """PyTorch's own words for a layer's padding mean numbers that the kernels have."""
    model, x = small(nn.Conv2d(3, 5, side, padding=padding), nn.BatchNorm2d(5), nn.ReLU()), torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x, choose=lambda _call, _x: "triton")

    assert ours(changes) == ["conv_bn_relu"]
    assert_as_good(fused, model, x)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(3, 6, 3, stride=2, padding=1), "stride 2"),
        (nn.Conv2d(3, 6, 3, stride=(1, 2), padding=1), "stride (1, 2)"),
        (nn.Conv2d(3, 6, 3, padding=2, dilation=2), "padding (2, 2), dilation 2"),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), "3 groups"),
        (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (nn.Conv2d(3, 6, 5, padding=2), "kernel 5x5"),
        (nn.Conv2d(3, 6, (1, 3), padding=(0, 1)), "kernel 1x3"),
        (nn.Conv2d(3, 6, 1, padding=1), "padding (1, 1)"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_no_kernel_does_is_folded_only(conv: nn.Conv2d, why: str) -> None:
    """The norm still costs no pass of its own, and the reason is given; without a norm there is nothing to gain."""
    model, x = small(conv, nn.BatchNorm2d(6), nn.ReLU()), torch.randn(2, 3, 9, 8)

    fused, changes = fuse_at(model, x)
    _, bare_changes = fuse_at(small(conv, nn.ReLU()), x)

    assert ours(changes) == [FOLDED]
    assert changes[0].why == f"{why}: the kernels do 3x3 and 1x1, stride 1, zeros for padding"
    assert_as_good(fused, model, x)
    assert refused(bare_changes) == changes[0].why


class OwnConv(nn.Conv2d):
    """Standardizes its weight, as some do."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def hooked(layer: nn.Module) -> nn.Module:
    """Return a layer that somebody listens to."""
    layer.register_forward_hook(lambda _module, _args, result: 2 * result)
    return layer


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([nn.GroupNorm(2, 6)], "GroupNorm takes its statistics from each image"),
        ([nn.InstanceNorm2d(6)], "InstanceNorm2d takes its statistics from each image"),
        ([nn.BatchNorm2d(6, track_running_stats=False)], "keeps no running statistics"),
        ([nn.LeakyReLU(), nn.BatchNorm2d(6)], "LeakyReLU stands between"),
        ([hooked(nn.BatchNorm2d(6))], "BatchNorm2d is not only called: it has hooks"),
    ],
    ids=lambda each: "" if isinstance(each, str) else type(each[0]).__name__,
)
def test_what_cannot_be_fused_stays_and_says_why(layers: list[nn.Module], why: str) -> None:
    """The layers are called as before, and one line tells the reason."""
    model, x = small(nn.Conv2d(3, 6, 3, padding=1), *layers, nn.ReLU()), torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x)

    assert why in refused(changes)
    assert torch.equal(*outputs(model, x), *outputs(fused, x))


class Borrowing(nn.Conv2d):
    """Convolves with the weight of another layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 6, H - 2, W - 2)."""
        return functional.conv2d(x, self.other.weight, self.bias)


def borrowing() -> nn.Module:
    """Return such a layer."""
    layer = Borrowing(3, 6, 3)
    layer.other = nn.Conv2d(3, 6, 3)
    return layer


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (borrowing(), "Borrowing has the weight of another layer"),
        (OwnConv(3, 6, 3), "the weight of OwnConv is computed in each call, or no layer's own"),
        (hooked(nn.Conv2d(3, 6, 3)), "Conv2d stands between"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), "computed in each call"),
    ],
    ids=["borrowed", "subclass", "hook", "weight norm"],
)
def test_a_convolution_that_does_more_stays(conv: nn.Module, why: str) -> None:
    """A subclass with a way of its own, one with hooks, one whose weight is computed."""
    model, x = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()).eval(), torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x)

    assert why in refused(changes)
    assert torch.equal(*outputs(model, x), *outputs(fused, x))


def test_a_subclass_that_changes_nothing_is_a_convolution() -> None:
    """People subclass Conv2d to fix its arguments."""

    class Conv3x3(nn.Conv2d):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o, 3, padding=1)

    model = small(Conv3x3(3, 6), nn.BatchNorm2d(6), nn.ReLU())
    x = torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x)

    assert str(changes[0]) == "0, 1, 2: Conv3x3 -> BatchNorm2d -> ReLU runs as conv_bn_relu"
    assert_as_good(fused, model, x)


class ReadTwice(nn.Module):
    """Somebody else reads the map of the convolution, of the norm, or writes to the one that is pooled."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.conv, self.norm, self.where = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), where

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> a map of the same size, or half of it."""
        raw = self.conv(x)
        normal = self.norm(raw)
        clipped = functional.relu(normal)
        if self.where == "conv":
            return raw + clipped
        if self.where == "norm":
            return normal * clipped
        if self.where == "conv, not normal":
            return raw + functional.relu(raw)
        if self.where == "pool":
            clipped += 1
        else:
            clipped.mul_(2)
        return functional.max_pool2d(clipped, 2) + clipped.mean()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("conv", []),
        ("conv, not normal", []),
        ("norm", ["Conv2d -> BatchNorm2d"]),
        ("pool", ["Conv2d -> BatchNorm2d -> relu"]),
        ("pool, by a method", ["Conv2d -> BatchNorm2d -> relu"]),
    ],
)
def test_a_map_that_others_need_is_there(where: str, expected: list[str]) -> None:
    """What is read by others is not fused over; what is written to before the pool is not pooled before."""
    model = trained(ReadTwice(where))
    x = torch.randn(2, 3, 6, 8)

    fused, changes = fuse_at(model, x)

    assert [change.before for change in changes if change.after] == expected
    assert_as_good(fused, model, x)
    if not expected:
        assert "the map of the convolution is read by others too: " in refused(changes)


class Concatenating(nn.Module):
    """Concatenates an up-sampled map with another in some way, and convolves."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.conv, self.way = nn.ConvTranspose2d(3, 3, 2, stride=2), nn.Conv2d(6, 3, 3, padding=1), way

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, 2H, 2W), or twice the batch."""
        x = x + 1
        up = self.up(x)
        other = functional.interpolate(x, scale_factor=2.0)
        if self.way == "written":
            x *= 2
            other = functional.interpolate(x, scale_factor=2.0)
        maps = [up, other] if self.way == "first" else [up, up] if self.way == "twice" else [other, up]
        if self.way == "read":
            maps[0] = maps[0] + up
        if self.way == "batch":
            return self.conv(torch.cat([torch.cat(maps), torch.cat(maps)], dim=1))
        if self.way == "written behind its pad":
            maps = [functional.pad(other, [0, 0, 0, 0]), up]
            other.mul_(2)
        if self.way == "padded":
            maps[1] = functional.pad(functional.pad(maps[1], [1, 1, 0, 2], "reflect"), [-1, -1, 0, -2])
        if self.way == "pooled":
            x = torch.relu(self.conv(torch.cat(maps, 1)))
            return x + functional.interpolate(functional.max_pool2d(x, 2), scale_factor=2.0)
        joined = torch.cat(maps, axis=1) if self.way == "axis" else torch.cat(tuple(maps), 1)  # type: ignore[call-arg]
        return self.conv(joined) + (joined.mean() if self.way == "joined" else 0)


@pytest.mark.parametrize("chosen", ["cudnn", "triton"])
@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("last", [JOINED]),
        ("pooled", [JOINED]),  # no op does all of that
        ("first", ["concat_conv_bn_relu"]),
        ("twice", ["concat_conv_bn_relu"]),
        ("written", ["concat_conv_bn_relu"]),  # before the map would be made
        ("read", ["concat_conv_bn_relu"]),
        ("padded", ["concat_conv_bn_relu"]),  # by two pads, of which the last is of nothing but crops
        ("written behind its pad", [JOINED]),
        ("batch", ["concat_conv_bn_relu"]),  # of two that are concatenated along the batch
        ("axis", [JOINED]),
        ("joined", ["up_conv_concat"]),  # the concatenated map is needed
    ],
)
def test_concatenations_are_joined_as_far_as_they_allow(way: str, expected: list[str], chosen: str) -> None:
    """The up-sampled map is put off only where it comes last, is read once, and its source stays as it is."""
    model = trained(Concatenating(way))
    x = torch.randn(2, 3, 5, 6)

    fused, changes = fuse_at(model, x, choose=lambda _call, _x: chosen)

    assert ours(changes) == expected
    assert_as_good(fused, model, x)


class Shared(nn.Module):
    """One convolution at two places, with a norm at each, registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.same = self.conv
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the same."""
        return functional.relu(self.norms[1](self.same(functional.relu(self.norms[0](self.conv(x))))))


def test_a_shared_layer_is_fused_at_each_place() -> None:
    """Each place folds its own norm, in turns over two calls, and the layer stays one."""
    model, x = trained(Shared()), torch.randn(2, 3, 6, 7)

    fused, changes = fuse_at(model, x)

    assert ours(changes) == ["conv_bn_relu"] * 2
    assert list(fused.state_dict()) == list(model.state_dict())
    for _ in range(2):
        assert_as_good(fused, model, x)

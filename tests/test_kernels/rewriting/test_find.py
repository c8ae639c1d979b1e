"""What `rewrite` takes for a convolution over up-sampled maps: every way to write one, and what is none, with why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_checks import Called, ours, refused
from rewrite_checks import always, assert_same, run
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from skipcost.kernels import rewrite

pytestmark = pytest.mark.usefixtures("one_thread")
Function = Callable[[nn.Module, Tensor], Tensor]


class Written(nn.Module):
    """A model whose forward is a function of it and a map; it has a convolution, and one over six channels."""

    def __init__(self, function: Function, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.conv = conv or nn.Conv2d(3, 2, 3, padding=1)
        self.wide = nn.Conv2d(6, 2, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.corners, self.more = nn.UpsamplingBilinear2d(scale_factor=2), nn.Upsample(scale_factor=1.5)
        self.empty = nn.Identity()
        self.before, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, h, w) -> whatever."""
        return self.function(self, x)


def made(function: Function, conv: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    """Return the model in float64, and an input."""
    torch.manual_seed(1)
    return Written(function, conv).double(), torch.randn(2, 3, 5, 6, dtype=torch.float64)


def doubled(x: Tensor, mode: str = "bilinear") -> Tensor:
    """Up-sample by 2."""
    return functional.interpolate(x, scale_factor=2, mode=mode)


class Own(nn.Conv2d):
    """Makes its weight in a forward of its own, which can be followed."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Centre the weight first."""
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Inside(nn.Conv2d):
    """Convolves in a way of its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 - torch's name
        return super()._conv_forward(input.relu(), weight, bias)


TAKEN: dict[str, Function] = {
    "layer": lambda m, x: m.conv(m.up(x)),
    "bilinear layer": lambda m, x: m.conv(m.corners(x)),
    "nearest function": lambda m, x: m.conv(functional.interpolate(x, None, 2)),
    "nearest-exact": lambda m, x: m.conv(doubled(x, "nearest-exact")),
    "aligned": lambda m, x: m.conv(functional.interpolate(x, scale_factor=3.0, mode="bilinear", align_corners=True)),
    "two factors": lambda m, x: m.conv(functional.interpolate(x, scale_factor=(2, 2))),
    "recomputed": lambda m, x: m.conv(
        functional.interpolate(x, scale_factor=2, mode="bilinear", recompute_scale_factor=True)
    ),
    "size": lambda m, x: m.conv(functional.interpolate(x, (15, 18), mode="bilinear")),
    "size of another": lambda m, x: m.conv(functional.interpolate(x, (2 * x.shape[2], x.shape[3] * 2))),
    "twice": lambda m, x: m.conv(doubled(x)) + m.conv(doubled(x, "nearest")),
    "function": lambda m, x: functional.conv2d(doubled(x), m.conv.weight, None, 1, 1),
    "function by keyword": lambda m, x: functional.conv2d(
        doubled(x), weight=m.conv.weight, bias=m.conv.bias, padding="same"
    ),
    "concatenated last": lambda m, x: m.wide(torch.cat([m.before(doubled(x).relu()), m.up(x)], 1)),
    "concatenated first": lambda m, x: m.wide(torch.cat((m.up(x), torch.tanh(doubled(x))), dim=1)),
    "concatenated alone": lambda m, x: m.wide(torch.concat([m.up(x), doubled(x, "nearest")], 1)),
    "cropped": lambda m, x: m.conv(m.up(x)[:, :, 1:, 2:-1]),
    "cropped rows": lambda m, x: m.conv(m.up(x)[:, :, :-3]),
    "cropped to a size": lambda m, x: m.conv(m.up(x)[:, :, : x.size(2) + 1, : x.shape[3]]),
    "cropped twice": lambda m, x: m.conv(m.up(x)[:, :, 1:, :-1][:, :, 1:-1, 1:]),
    "cropped by a pad": lambda m, x: m.conv(functional.pad(m.up(x), (-1, -2, 0, -3))),
    "padded by nothing": lambda m, x: m.conv(
        functional.pad(m.up(x), [0, x.size(3) - x.shape[3], 0, 0], mode="replicate")
    ),
    "cropped, then concatenated": lambda m, x: m.wide(
        torch.cat([m.up(x)[:, :, 1:-1], torch.tanh(doubled(x))[:, :, 2:]], 1)
    ),
    "identity": lambda m, x: m.conv(m.empty(m.up(x))),
    "asked for its size": lambda m, x: _with(m.up(x), lambda u: m.conv(u) * u.size(2) + u.shape[3] + u.size()[2]),
    "unrelated writes": lambda m, x: _with(m.up(x), lambda u: (torch.relu_(m.before(x)), m.conv(u))[1]),
}
KINDS = {
    "1x1": nn.Conv2d(3, 2, 1),
    "without bias": nn.Conv2d(3, 2, 3, padding=1, bias=False),
    "valid": nn.Conv2d(3, 2, 3),
    "5x5": nn.Conv2d(3, 2, 5, padding=2),
    "3x5": nn.Conv2d(3, 2, (3, 5), padding=1),
    "same": nn.Conv2d(3, 2, 3, padding="same"),
    "own forward": Own(3, 2, 3),
    "computed weight": parametrizations.weight_norm(nn.Conv2d(3, 2, 3, padding=1)),
}


def _with(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(x)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", TAKEN)
def test_every_way_to_write_it_is_known(name: str, *, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs for it, in both modes, and gives the same to 1e-12."""
    always(monkeypatch)
    model, x = made(TAKEN[name])

    faster, changes = rewrite(model)

    with Called() as called:
        faster.train(training)(x)
    assert ours(changes)
    assert "tap_first" in called.names
    assert_same(run(model, x, training=training), run(faster, x, training=training))


@pytest.mark.parametrize("name", KINDS)
def test_every_convolution_with_stride_1_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of any size, weights computed in each call too."""
    always(monkeypatch)
    model, x = made(TAKEN["layer"], KINDS[name])

    faster, _ = rewrite(model)

    with Called() as called:
        faster(x)
    assert "tap_first" in called.names
    assert_same(run(model, x, training=True), run(faster, x, training=True))


def _hooked(way: str) -> nn.Module:
    conv = nn.Conv2d(3, 2, 3, padding=1)
    getattr(conv, way)(lambda *_: None)
    return conv


REFUSED: dict[str, tuple[Function, nn.Module | None, str]] = {
    "norm": (lambda m, x: m.conv(m.norm(m.up(x))), None, "BatchNorm2d stands between"),
    "relu": (lambda m, x: m.conv(m.relu(m.up(x))), None, "ReLU stands between"),
    "both": (lambda m, x: m.conv(m.relu(m.norm(m.up(x)))), None, "BatchNorm2d and ReLU stand between"),
    "function": (lambda m, x: m.conv(torch.sigmoid(m.up(x))), None, "sigmoid stands between"),
    "sum": (lambda m, x: m.conv(m.up(x) + 1), None, "add stands between"),
    "norm of a concatenation": (
        lambda m, x: m.wide(torch.tanh(torch.cat([doubled(x).abs(), m.up(x)], 1))), None,
        "abs and cat and tanh stand between",
    ),
    "no convolution": (lambda m, x: torch.sigmoid(m.up(x)), None, "sigmoid reads its map, which is no convolution"),
    "result": (lambda m, x: m.up(m.conv(x)), None, "its map is a result: no convolution reads it"),
    "unused": (lambda m, x: (m.up(x), m.conv(x))[1], None, "nobody reads its map"),
    "two readers": (
        lambda m, x: _with(m.up(x), lambda u: m.conv(u) * torch.tanh(m.before(u))[:, :2]), None,
        "its map has 2 readers, conv, before",
    ),
    "twice in a concatenation": (
        lambda m, x: _with(m.up(x), lambda u: m.wide(torch.cat([u, u], 1))), None, "cat stands between",
    ),
    "other dimension": (lambda m, x: m.conv(torch.cat([m.up(x), m.up(x).relu()], 2)), None, "cat stands between"),
    "part of the batch": (lambda m, x: m.conv(m.up(x)[1:, :, 1:]), None, "getitem stands between"),
    "one image": (lambda m, x: m.conv(m.up(x)[:1]), None, "getitem stands between"),
    "every other row": (lambda m, x: m.conv(m.up(x)[:, :, ::2]), None, "getitem stands between"),
    "some channels": (lambda m, x: m.conv(m.up(torch.cat([x, x], 1))[:, 1:4, :]), None, "getitem stands between"),
    "bicubic": (lambda m, x: m.conv(doubled(x, "bicubic")), None, "mode 'bicubic': only bilinear and nearest"),
    "antialias": (
        lambda m, x: m.conv(functional.interpolate(x, scale_factor=2, mode="bilinear", antialias=True)), None,
        "antialias=True filters the map",
    ),
    "half": (
        lambda m, x: m.conv(functional.interpolate(x, scale_factor=0.5)), None,
        "scale_factor=0.5 is no whole number from 2 on for both axes",
    ),
    "one and a half": (lambda m, x: m.conv(m.more(x)), None, "scale_factor=1.5 is no whole"),
    "two and three": (
        lambda m, x: m.conv(functional.interpolate(x, scale_factor=(2.0, 3.0))), None, r"scale_factor=\(2.0, 3.0\) is",
    ),
    "stride": (TAKEN["layer"], nn.Conv2d(3, 2, 3, stride=2), r"stride \(2, 2\): it takes stride 1"),
    "dilation": (TAKEN["layer"], nn.Conv2d(3, 2, 3, dilation=2), r"dilation \(2, 2\): it takes"),
    "groups": (TAKEN["layer"], nn.Conv2d(3, 6, 3, groups=3), "3 groups: it takes"),
    "wide padding": (TAKEN["layer"], nn.Conv2d(3, 2, 1, padding=1), r"padding \(1, 1\) beside a kernel of 1x1"),
    "uneven padding": (TAKEN["layer"], nn.Conv2d(3, 2, 3, padding=(0, 1)), r"padding \(0, 1\) beside a kernel of 3x3"),
    "uneven same": (TAKEN["layer"], nn.Conv2d(3, 2, (3, 5), padding="same"), "padding 'same' beside a kernel of 3x5"),
    "reflect": (TAKEN["layer"], nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
    "own way": (TAKEN["layer"], Inside(3, 2, 3), "Inside convolves in a way of its own"),
    "hook": (TAKEN["layer"], _hooked("register_forward_pre_hook"), "the convolution is not only called: it has hooks"),
    "hook on gradients": (
        TAKEN["layer"], _hooked("register_full_backward_hook"), "the convolution is not only called: it has hooks",
    ),
    "transposed": (TAKEN["layer"], nn.ConvTranspose2d(3, 2, 3), "its map is a result|ConvTranspose2d reads its map"),
    "written source": (
        lambda m, x: _with(m.before(x), lambda y: _with(m.up(y), lambda u: (y.relu_(), m.conv(u))[1])), None,
        "a map that it would read is written to later",
    ),
    "written behind": (
        lambda m, x: _with(m.before(x), lambda y: m.conv(m.up(y))[:, :, :5, :6] + y.relu_()[:, :2]), None,
        "a map that it would read is written to later",
    ),
    "written view of the source": (
        lambda m, x: _with(m.before(x), lambda y: _with(m.up(y), lambda u: (y.flatten(1).relu_(), m.conv(u))[1])), None,
        "a map that it would read is written to later",
    ),
    "written behind another name": (
        lambda m, x: _with(
            x * 0,
            lambda y: _with(m.up(torch.cat([x], 1, out=y)), lambda u: (y.relu_(), m.conv(u))[1]),
        ), None,
        "a map that it would read is written to later",
    ),
    "written other": (
        lambda m, x: _with(
            m.before(torch.cat([x, x], 2).repeat(1, 1, 1, 2)),
            lambda y: _with(torch.cat([y, m.up(x)], 1), lambda both: (m.relu(y), m.wide(both))[1]),
        ), None,
        "a map that it would read is written to later",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_stays_and_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit the model's results, and the reason in one sentence."""
    always(monkeypatch)
    function, conv, why = REFUSED[name]
    model, x = made(function, conv)

    faster, changes = rewrite(model)

    assert ours(changes) == []
    assert [change for change in changes if change.why.startswith("it ")] == []
    torch.testing.assert_close(faster(x), model(x), rtol=0, atol=0)
    (first, *_) = (change.why for change in changes)
    with pytest.raises(ValueError, match=why):
        raise ValueError(first)


def test_a_norm_that_stands_between_is_named_with_its_place() -> None:
    """From the up-sampling to the convolution behind."""
    _, changes = rewrite(nn.Sequential(nn.Upsample(scale_factor=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)))

    assert [str(each) for each in changes] == [
        "0, 1, 2, 3: Upsample -> BatchNorm2d -> ReLU -> Conv2d stays as it is: BatchNorm2d and ReLU stand between"
    ]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_dropout_between_is_empty_in_evaluation_and_drops_in_training(
    *, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers are drawn, and the op runs only where nothing is dropped."""
    always(monkeypatch)
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Dropout2d(0.5), nn.Dropout(0.5), nn.Conv2d(3, 2, 3)).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)

    faster, _ = rewrite(model)

    with Called() as called:
        faster.train(training)(x)
    assert called.names == ([] if training else ["tap_first"])
    assert_same(run(model, x, training=training), run(faster, x, training=training))


class Around(nn.Module):
    """Runs its block under something that a graph would lose."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.around = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3)), around
        self.calls: Any = 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, h, w) -> (N, 2, 2h - 2, 2w - 2)."""
        return self.around(self, x)


def _without_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.block(x)


def _cast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module.block(x)


def _checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module.block, x, use_reentrant=False)


def _counting(module: Any, x: Tensor) -> Tensor:
    module.calls += 1
    return module.block(x)


def _asking(module: nn.Module, x: Tensor) -> Tensor:
    return module.block(x) if isinstance(x, Tensor) else x


@pytest.mark.parametrize(
    ("around", "why"),
    [
        (_without_gradients, "it switches gradients, autocast or what is saved for backward inside"),
        (_cast, "it switches gradients, autocast or what is saved for backward inside"),
        (_checkpointed, "it switches gradients, autocast or what is saved for backward inside"),
        (_counting, "its forward keeps calls on the module"),
        (_asking, "its Python asks for the type of what it is given"),
    ],
)
def test_what_a_graph_would_lose_is_kept(around: Function, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own Python runs, and what it calls is rewritten inside."""
    always(monkeypatch)
    model, x = Around(around), torch.randn(2, 3, 5, 6)

    faster, changes = rewrite(model)

    with Called() as called:
        result = faster(x)
    assert refused(changes).startswith(f"it is only rewritten inside, since {why}")
    assert called.names == ["tap_first"]
    assert result.requires_grad == model(x).requires_grad
    assert result.dtype == model(x).dtype
    assert faster.calls == (around is _counting)

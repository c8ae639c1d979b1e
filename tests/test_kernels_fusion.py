"""`fuse`: the same numbers, names and tensors, whatever a model is made of and whatever is done with it afterwards."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from user_models import MODELS, BranchingUNet, DoubleConv, PaddingUNet, trained

from skipcost.kernels.calls import Call
from skipcost.kernels.fusion import Change, fuse
from skipcost.kernels.rewiring import Rewired
from skipcost.unet_models import VARIANTS, ModelSpec, build

pytestmark = pytest.mark.usefixtures("one_thread")
Model = tuple[nn.Module, Tensor]
JOINED = "up_conv, concat_conv_bn_relu"
FOLDED = "convolution of PyTorch with the norm folded in"


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> Model:
    """A model in evaluation and an input for it."""
    return made(request.param)


def made(name: str) -> Model:
    """Return a model by its name, and an input."""
    factory, shape = MODELS[name]
    torch.manual_seed(1)
    return trained(factory()), torch.randn(shape)


def small(*layers: nn.Module) -> nn.Sequential:
    """Return layers for maps of 3 channels as a model in evaluation."""
    torch.manual_seed(2)
    model = nn.Sequential(*layers)
    trained(model)
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all maps that a model gives."""
    return tree_leaves(model(x))


def assert_as_good(
    fused: nn.Module, model: nn.Module, x: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> None:  # fmt: skip
    """Compare both with the model in float64; the fused one reads its input in `layout`.

    The rule: the fused model's largest error is at most twice that of the original, plus 4 units in the last place of
    the largest number, which is there for models whose own error is 0 by luck.
    """
    exact = outputs(copy.deepcopy(model).double(), x.double())
    for ours, its, truth in zip(
        outputs(fused, x.contiguous(memory_format=layout)), outputs(model, x), exact, strict=True
    ):  # fmt: skip
        floor = 4 * torch.finfo(x.dtype).eps * truth.abs().max()
        assert ours.dtype == its.dtype
        assert (ours - truth).abs().max() <= 2 * (its - truth).abs().max() + floor


def ours(changes: list[Change]) -> list[str]:
    """Return what runs now, place by place."""
    return [change.after for change in changes if change.after]


def refused(changes: list[Change]) -> str:
    """Return why the only place that stays as it is does so."""
    (change,) = (each for each in changes if not each.after)
    return change.why


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("chosen", ["default", "triton", "reference"])
def test_a_fused_model_is_as_exact_as_the_original(
    pair: Model, layout: torch.memory_format, chosen: str
) -> None:  # fmt: skip
    """Whichever implementation runs: on a CPU, "triton" is the reference of each op, as the ops do without a GPU."""
    model, x = pair

    fused, _ = fuse(model) if chosen == "default" else fuse(model, choose=lambda _call, _x: chosen)

    assert_as_good(fused, model, x, layout)


@pytest.mark.parametrize("fill", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_stay_sixteen_bits(fill: torch.dtype) -> None:
    """The type of the result is the model's, and folding costs no more than the factor of 2."""
    model, x = made("padding")
    model, x = model.to(fill), x.to(fill)

    fused, _ = fuse(model)

    assert_as_good(fused, model, x)


def test_names_and_tensors_are_the_very_same(pair: Model) -> None:
    """state_dict, parameters, buffers and modules: same keys in the same order, same objects behind the tensors."""
    model, _ = pair

    fused, _ = fuse(model)

    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    for kind in ("named_parameters", "named_buffers"):
        theirs, its = dict(getattr(fused, kind)()), dict(getattr(model, kind)())
        assert list(theirs) == list(its)
        assert all(theirs[name] is its[name] for name in its)
    assert list(fused.state_dict()) == list(model.state_dict())


def test_a_fused_model_is_still_what_it_was() -> None:
    """Class, attributes and signature stay: training scripts read model.n_classes."""
    fused, _ = fuse(PaddingUNet())

    assert isinstance(fused, PaddingUNet)
    assert fused.n_classes == 2
    assert type(fused).__name__ == "FusedPaddingUNet"
    with torch.no_grad():
        assert fused.eval()(x=torch.ones(1, 3, 8, 8)).shape == (1, 2, 8, 8)


def test_the_given_model_is_left_alone() -> None:
    """It keeps its class, its mode and its hooks, whatever is done with the fused one."""
    model = PaddingUNet()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}

    fused, _ = fuse(model)
    fused.eval()
    outputs(fused, torch.ones(1, 3, 8, 8))
    fused.inc.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]

    assert type(model) is PaddingUNet
    assert {name: module.__dict__ for name, module in model.named_modules()} == before


def test_the_u_net_of_tutorials_is_fused_as_a_whole() -> None:
    """Convolutions, pools beside skips, transposed convolutions through the pad: each place, in words."""
    _, changes = fuse(PaddingUNet())

    layers, up = "Conv2d -> BatchNorm2d -> ReLU", "ConvTranspose2d -> pad -> cat"
    first, second = (
        ("double_conv.0", "double_conv.1", "double_conv.2"),
        ("double_conv.3", "double_conv.4", "double_conv.5"),
    )
    expected = [
        ("inc", first, (), layers, "conv_bn_relu"),
        ("inc", second, ("down1.0",), f"{layers} -> MaxPool2d", "conv_bn_relu_pool"),
        ("down1.1", first, (), layers, "conv_bn_relu"),
        ("down1.1", second, ("down2.0",), f"{layers} -> MaxPool2d", "conv_bn_relu_pool"),
        ("down2.1", first, (), layers, "conv_bn_relu"),
        ("down2.1", second, (), layers, "conv_bn_relu"),
        ("up1", ("up", "pad", "cat", *(f"conv.{each}" for each in first)), (), f"{up} -> {layers}", JOINED),
        ("up1.conv", second, (), layers, "conv_bn_relu"),
        ("up2", ("up", "pad", "cat", *(f"conv.{each}" for each in first)), (), f"{up} -> {layers}", JOINED),
        ("up2.conv", second, (), layers, "conv_bn_relu"),
    ]
    assert changes == [
        Change((*(f"{block}.{each}" for each in inside), *after), before, op, "")
        for block, inside, after, before, op in expected
    ]
    assert str(changes[1]) == (
        "inc.double_conv.3, inc.double_conv.4, inc.double_conv.5, down1.0: "
        "Conv2d -> BatchNorm2d -> ReLU -> MaxPool2d runs as conv_bn_relu_pool"
    )


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("valid", {"conv_bn_relu": 6, "conv_bn_relu_pool": 2, JOINED: 2}),
        ("nested", {"conv_bn_relu": 7, "conv_bn_relu_pool": 2, "concat_conv_bn_relu": 3}),
        ("resnet", {"conv_bn_relu": 3, FOLDED: 3}),
        ("mlp", {}),
    ],
)
def test_what_other_models_become(name: str, counts: dict[str, int]) -> None:
    """Crops are views that the convolution reads apart; pools of a nested model too; stride 2 is only folded."""
    _, changes = fuse(made(name)[0])

    assert {each: ours(changes).count(each) for each in ours(changes)} == counts


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the names of our ops as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "skipcost":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (  # everything on kernels: the convolutions read apart, so the transposed ones stand alone
            {"conv_bn_relu", "conv_bn_relu_pool", "concat_conv_bn_relu", "up_conv", "crop_concat"},
            {"conv_bn_relu": 8, "conv_bn_relu_pool": 2, "up_conv": 2},
        ),
        ({"up_conv"}, {"up_conv_concat": 2}),  # these write into the concatenated map
        ({"crop_concat"}, {"crop_concat": 2}),
        ({"conv_bn_relu_pool"}, {"conv_bn_relu_pool": 2}),
        (set(), {}),
    ],
    ids=lambda each: "+".join(sorted(each)) or "nothing",
)
def test_each_call_runs_what_was_chosen_for_it(chosen: set[str], expected: dict[str, int]) -> None:
    """The choice is made call by call, in a size where nothing needs a pad."""
    model, x = made("dividing")
    fused, _ = fuse(model, choose=lambda call, _x: "triton" if call.op in chosen else "cudnn")

    with Called() as called:
        outputs(fused, x)

    assert {name: called.names.count(name) for name in called.names} == expected


def test_the_choice_is_asked_for_the_shapes_that_run() -> None:
    """Calls name every map that is read, the up-sampled one with the size that it will have."""
    asked: list[Call] = []

    def choose(call: Call, _x: Tensor) -> str:
        asked.append(call)
        return "reference"

    outputs(fuse(made("dividing")[0], choose=choose)[0], torch.ones(1, 3, 16, 24))

    keys = [call.key.removesuffix(" inference") for call in asked]
    assert "conv_bn_relu_pool n1 8x16x24>8 k3 p1 relu fp32" in [key.replace("tf32", "fp32") for key in keys]
    assert "concat_conv_bn_relu n1 8x16x24+8x16x24>8 k3 p1 relu fp32" in [key.replace("tf32", "fp32") for key in keys]


def _sum(model: nn.Module, x: Tensor) -> Tensor:
    return sum((each.square().sum() for each in tree_leaves(model(x))), torch.zeros(()))


def test_training_is_the_originals_bit_by_bit(pair: Model) -> None:
    """Gradients and running statistics of a step in training mode are those of a copy that was not fused."""
    model, x = pair
    other = copy.deepcopy(model).train()
    fused, _ = fuse(model)
    fused.train()

    for each in (fused, other):
        _sum(each, x).backward()

    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name
    assert all(torch.equal(*buffers) for buffers in zip(model.buffers(), other.buffers(), strict=True))


def test_a_model_that_was_trained_is_fused_for_evaluation() -> None:
    """The mode in which it is given does not matter, and both models have a mode of their own."""
    model, x = made("padding")
    model.train()

    fused, changes = fuse(model)
    was_training = fused.training
    fused.eval()

    assert was_training
    assert model.training
    assert len(ours(changes)) == 10
    assert_as_good(fused, model.eval(), x)


def test_gradients_in_evaluation_are_the_originals_and_a_warning_says_so() -> None:
    """Fine-tuning with frozen statistics works, and who forgets no_grad learns why nothing is faster."""
    model, x = made("padding")
    other = copy.deepcopy(model)
    fused, _ = fuse(model)

    with pytest.warns(RuntimeWarning, match=r"^FusedPaddingUNet runs as the original where gradients may be asked"):
        _sum(fused, x).backward()

    _sum(other, x).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_a_gradient_for_the_input_is_the_originals() -> None:
    """Frozen weights, as when looking for what a network sees."""
    model, x = made("padding")
    fused, _ = fuse(model.requires_grad_(False))

    with pytest.warns(RuntimeWarning, match="gradients may be asked for"):
        (gradient,) = torch.autograd.grad(_sum(fused, x.requires_grad_()), x)

    assert torch.equal(gradient, torch.autograd.grad(_sum(model, x), x)[0])


def test_frozen_weights_need_no_no_grad() -> None:
    """Where nothing can ask for a gradient the ops run, and the result has none."""
    model, x = made("dividing")
    fused, _ = fuse(model.requires_grad_(False), choose=lambda _call, _x: "triton")

    with Called() as called:
        result = fused(x)

    assert called.names
    assert not result.requires_grad


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

    fused, changes = fuse(model)

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

    fused, changes = fuse(model)

    assert ours(changes) == (["conv_bn_relu"] if norm or relu else [])
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
        (nn.Conv2d(3, 6, 3, padding="same"), "padding 'same'"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_no_kernel_does_is_folded_only(conv: nn.Conv2d, why: str) -> None:
    """The norm still costs no pass of its own, and the reason is given; without a norm there is nothing to gain."""
    model, x = small(conv, nn.BatchNorm2d(6), nn.ReLU()), torch.randn(2, 3, 9, 8)

    fused, changes = fuse(model)
    _, bare_changes = fuse(small(conv, nn.ReLU()))

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

    fused, changes = fuse(model)

    assert why in refused(changes)
    assert torch.equal(*outputs(model, x), *outputs(fused, x))


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (OwnConv(3, 6, 3), "OwnConv convolves in a way of its own"),
        (hooked(nn.Conv2d(3, 6, 3)), "the convolution is not only called: it has hooks"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), "computed in each call"),
    ],
    ids=["subclass", "hook", "weight norm"],
)
def test_a_convolution_that_does_more_stays(conv: nn.Module, why: str) -> None:
    """A subclass with a way of its own, one with hooks, one whose weight is computed."""
    model, x = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()).eval(), torch.randn(2, 3, 6, 7)

    fused, changes = fuse(model)

    assert why in refused(changes)
    assert torch.equal(*outputs(model, x), *outputs(fused, x))


def test_a_subclass_that_changes_nothing_is_a_convolution() -> None:
    """People subclass Conv2d to fix its arguments."""

    class Conv3x3(nn.Conv2d):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o, 3, padding=1)

    model = small(Conv3x3(3, 6), nn.BatchNorm2d(6), nn.ReLU())

    fused, changes = fuse(model)

    assert str(changes[0]) == "0, 1, 2: Conv3x3 -> BatchNorm2d -> ReLU runs as conv_bn_relu"
    assert_as_good(fused, model, torch.randn(2, 3, 6, 7))


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
        clipped += 1
        return functional.max_pool2d(clipped, 2) + clipped.mean()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("conv", []),
        ("conv, not normal", []),
        ("norm", ["Conv2d -> BatchNorm2d"]),
        ("pool", ["Conv2d -> BatchNorm2d -> relu"]),
    ],
)
def test_a_map_that_others_need_is_there(where: str, expected: list[str]) -> None:
    """What is read by others is not fused over; what is written to before the pool is not pooled before."""
    model = trained(ReadTwice(where))

    fused, changes = fuse(model)

    assert [change.before for change in changes if change.after] == expected
    assert_as_good(fused, model, torch.randn(2, 3, 6, 8))
    if not expected:
        assert "the map of the convolution is read by others too: " in refused(changes)


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
        ("batch", ["concat_conv_bn_relu"]),  # of two that are concatenated along the batch
        ("axis", []),
        ("joined", ["up_conv_concat"]),  # the concatenated map is needed
    ],
)
def test_concatenations_are_joined_as_far_as_they_allow(way: str, expected: list[str], chosen: str) -> None:
    """The up-sampled map is put off only where it comes last, is read once, and its source stays as it is."""
    model = trained(Concatenating(way))

    fused, changes = fuse(model, choose=lambda _call, _x: chosen)

    assert ours(changes) == expected
    assert_as_good(fused, model, torch.randn(2, 3, 5, 6))


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

    fused, changes = fuse(model)

    assert ours(changes) == ["conv_bn_relu"] * 2
    assert list(fused.state_dict()) == list(model.state_dict())
    for _ in range(2):
        assert_as_good(fused, model, x)


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


def test_a_norm_in_training_takes_the_batchs_statistics() -> None:
    """Also where the rest is in evaluation: result and running statistics are the original's."""
    model, x = made("padding")
    other = copy.deepcopy(model)
    fused, _ = fuse(model)
    for each in (fused, other):
        each.get_submodule("up1.conv.double_conv.1").train()

    results = [*outputs(fused, x), *outputs(other, x)]

    assert torch.equal(*results)
    assert all(torch.equal(*buffers) for buffers in zip(model.buffers(), other.buffers(), strict=True))


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


def changed(model: nn.Module) -> nn.Module:
    """Return a model of the same kind with other weights."""
    return trained(copy.deepcopy(model), seed=5)


def _load(model: nn.Module, fused: nn.Module) -> None:
    fused.load_state_dict(changed(model).state_dict())


def _assign(model: nn.Module, fused: nn.Module) -> None:
    fused.load_state_dict(changed(model).state_dict(), assign=True)


@torch.no_grad()
def _in_place(model: nn.Module, _fused: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.mul_(2)


def _step(model: nn.Module, fused: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    _sum(model, torch.ones(2, 3, 8, 8)).backward()
    optimizer.step()
    model.eval()
    fused.zero_grad()


def _data(model: nn.Module, fused: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(2)
    fused.eval()


def _wider(_model: nn.Module, fused: nn.Module) -> None:
    fused.double()


def _narrower(_model: nn.Module, fused: nn.Module) -> None:
    fused.bfloat16().float()


@pytest.mark.parametrize("change", [_load, _assign, _in_place, _step, _data, _wider, _narrower])
def test_results_follow_the_weights(change: Callable[[nn.Module, nn.Module], None]) -> None:
    """After loading, steps, writes and conversions on either of the two, the fused model is the model."""
    model, x = made("padding")
    fused, _ = fuse(model)
    before = outputs(fused, x)

    change(model, fused)

    x = x.to(next(model.parameters()).dtype)
    assert_as_good(fused, model, x)
    assert not torch.equal(outputs(fused, x)[0].float(), before[0])


def test_buffers_and_weights_move_with_the_model() -> None:
    """What is moved in one of the two is moved in both, so that none is left between two devices."""
    model, x = made("padding")
    fused, _ = fuse(model)
    outputs(fused, x)

    fused.to("meta")

    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"meta"}
    assert outputs(fused, x.to("meta"))[0].shape == (2, 2, 19, 22)


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("name", ["padding", "branching", "resnet"])
def test_a_copy_is_fused_and_has_weights_of_its_own(duplicate: Callable[[nn.Module], nn.Module], name: str) -> None:
    """Deep copies and pickles, of models fused as a whole and of those fused inside."""
    model, x = made(name)
    fused, _ = fuse(model)
    expected = outputs(fused, x)

    twin = duplicate(fused)
    _in_place(model, fused)

    assert type(twin).__name__ == type(fused).__name__
    assert [type(each) for each in twin.modules() if isinstance(each, Rewired)] != []
    assert torch.equal(outputs(twin, x)[0], expected[0])
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_as_good(twin, changed(_loaded(twin, model)), x)


def _loaded(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Give the twin the weights that `changed` gives to models, and return a model."""
    twin.load_state_dict(changed(model).state_dict())
    return model


def test_results_are_laid_out_as_the_originals() -> None:
    """.view and .numpy work on them; channels_last inputs give channels_last results."""
    model, x = made("padding")
    fused, _ = fuse(model)

    plain, last = outputs(fused, x)[0], outputs(fused, x.contiguous(memory_format=torch.channels_last))[0]

    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


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


def test_a_model_that_looks_at_its_input_is_fused_inside() -> None:
    """Its own Python runs, its error included, and its blocks are fused one by one."""
    model, x = made("branching")
    fused, changes = fuse(model)

    assert type(fused) is BranchingUNet
    assert str(changes[0]) == (
        "the model: BranchingUNet stays as it is: it is only fused inside, "
        "since its Python decides by values or shapes of tensors"
    )
    assert len(ours(changes)) == 10
    assert_as_good(fused, model, x)
    with pytest.raises(RuntimeError, match="a size that 4 divides"):
        fused(x[..., 1:])


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


class Wrong(nn.Module):
    """Concatenates what does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Fails."""
        return self.conv(torch.cat([x, x[..., 1:]], 1)).relu()


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (Wrong(), torch.ones(1, 3, 6, 6), "Sizes of tensors must match except in dimension 1"),
        (small(DoubleConv(3, 3)), torch.ones(1, 3, 6, 6).double(), "should be the same|expected scalar type"),
        (small(DoubleConv(3, 3)), torch.ones(1, 3, 6, 6).bfloat16(), "should be the same|expected scalar type"),
        (small(DoubleConv(3, 3)), torch.ones(1, 4, 6, 6), "to have 3 channels, but got 4"),
        (small(DoubleConv(3, 3)), torch.ones(3, 6, 6), "expected 4D input"),
    ],
    ids=["sizes", "64 bits", "16 bits", "channels", "batch"],
)
def test_errors_are_the_originals(model: nn.Module, x: Tensor, says: str) -> None:
    """Nothing is cropped, converted or guessed where PyTorch would complain."""
    fused, changes = fuse(model.eval())

    assert ours(changes)
    for each in (model, fused):
        with pytest.raises((RuntimeError, ValueError), match=says):
            outputs(each, x)


def test_a_single_image_needs_no_batch() -> None:
    """Conv2d takes (C, H, W), and so does a fused one without a norm."""
    model, x = small(nn.Conv2d(3, 6, 3), nn.ReLU()), torch.randn(3, 6, 7)

    fused, _ = fuse(model)

    assert torch.equal(*outputs(fused, x), *outputs(model, x))


@pytest.mark.parametrize("name", ["padding", "valid", "resnet"])
def test_autocast_computes_in_its_type(name: str) -> None:
    """The result has the original's type, and is no further from float64 than the rule says of 16 bits."""
    model, x = made(name)
    fused, _ = fuse(model)
    (truth,) = outputs(copy.deepcopy(model).double(), x.double())

    with torch.autocast("cpu", torch.bfloat16):
        (ours,), (its,) = outputs(fused, x), outputs(model, x)

    assert ours.dtype == its.dtype
    floor = 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (its - truth).abs().max() + floor


class Mixed(nn.Module):
    """Gives the concatenation of a map in 32 bits with one that autocast has made."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 6, 2H, 2W)."""
        return torch.cat([functional.interpolate(x, scale_factor=2.0), self.up(x)], 1)


def test_autocast_widens_what_is_concatenated() -> None:
    """As PyTorch does: 32 bits beside 16 stay 32."""
    model, x = trained(Mixed()), torch.randn(1, 3, 4, 4)
    fused, changes = fuse(model)

    with torch.autocast("cpu", torch.bfloat16):
        (result,), (expected,) = outputs(fused, x), outputs(model, x)

    assert ours(changes) == ["up_conv_concat"]
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def _compile(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def _export(model: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(model, (x,))
    assert all("skipcost" not in str(node.target) for node in program.graph.nodes)
    return program.module()(x)


def _script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,))(x)  # type: ignore[no-untyped-call]


def _symbolic(model: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(model)(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [_compile, _export, _script, _symbolic])
def test_compilers_and_tracers_see_the_original(way: Callable[[nn.Module, Tensor], Any]) -> None:
    """They get PyTorch's own operators, whole, and the result is the original's."""
    model, x = made("dividing")
    fused, _ = fuse(model)

    with torch.no_grad():
        result = way(fused, x)

    torch.testing.assert_close(result, *outputs(model, x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_suites_own_networks_are_for_their_backend(variant: str) -> None:
    """Their executor decides by shapes, so torch.fx cannot follow it; they stay as they are, and say so."""
    model = build(ModelSpec(variant=variant, depth=2, width=4)).eval()
    x = torch.randn(1, 1, 16, 16)

    fused, changes = fuse(model)

    assert "its Python decides by values or shapes of tensors" in refused(changes)
    assert torch.equal(outputs(fused, x)[0], outputs(model, x)[0])


def test_fusing_twice_changes_nothing_more() -> None:
    """The second finds what the first left, and the result is the same model."""
    model, x = made("dividing")
    once, _ = fuse(model, choose=lambda _call, _x: "triton")

    twice, changes = fuse(once)
    expected = outputs(once, x)
    once.train()
    with Called() as called:
        result = outputs(twice, x)

    assert changes == []
    assert called.names
    assert torch.equal(*result, *expected)


def test_a_model_with_a_compiled_call_is_fused_all_the_same() -> None:
    """What `model.compile()` left on it calls the original, and stays with that."""
    model, x = made("dividing")
    model.compile(backend="eager")

    fused, _ = fuse(model, choose=lambda _call, _x: "triton")

    with Called() as called:
        outputs(fused, x)
    assert called.names


class Branching(nn.Module):
    """Looks at shapes, then calls a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the same."""
        return self.block(x) if x.shape[2] > 1 else x


def test_a_block_that_two_modules_share_is_fused_once() -> None:
    """Each place is in the list once, also where nothing can be done."""
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.InstanceNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = small(Branching(block), Branching(block))

    fused, changes = fuse(model)

    assert [change.before for change in changes] == [
        "Branching",
        "Conv2d -> InstanceNorm2d",
        "Conv2d -> BatchNorm2d",
        "Branching",
    ]
    assert_as_good(fused, model, torch.randn(2, 3, 6, 7))


@pytest.mark.parametrize("given", [None, 3, torch.relu, torch.nn.Conv2d, "unet/d4"], ids=str)
def test_only_modules_are_fused(given: Any) -> None:
    """Anything else is refused with what it is."""
    with pytest.raises(ValueError, match=rf"^fuse got a {type(given).__name__}, whose code it cannot change: give it"):
        fuse(given)

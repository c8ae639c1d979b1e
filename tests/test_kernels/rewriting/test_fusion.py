"""`fuse` as a whole: the same numbers whatever runs, and a list of what became of each place."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from fusion_checks import FOLDED, JOINED, Called, assert_as_good, made, ours, outputs, refused, small
from torch import Tensor, nn
from torch.nn import functional
from user_models import MODELS, BranchingUNet, DoubleConv, PaddingUNet, trained

from skipcost.bench.measure.live_bytes import trace_peaks
from skipcost.kernels import Change, fuse
from skipcost.kernels.dispatch.call import Call
from skipcost.unet_models import VARIANTS, ModelSpec, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.numeric
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("chosen", ["default", "triton", "reference"])
def test_a_fused_model_is_as_exact_as_the_original(
    name: str, layout: torch.memory_format, chosen: str
) -> None:  # fmt: skip
    """Whichever implementation runs: on a CPU, "triton" is the reference of each op, as the ops do without a GPU."""
    model, x = made(name)

    fused, _ = fuse(model) if chosen == "default" else fuse(model, choose=lambda _call, _x: chosen)

    assert_as_good(fused, model, x, layout)


@pytest.mark.parametrize("fill", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_stay_sixteen_bits(fill: torch.dtype) -> None:
    """The type of the result is the model's, and folding costs no more than the factor of 2."""
    model, x = made("padding")
    model, x = model.to(fill), x.to(fill)

    fused, _ = fuse(model)

    assert_as_good(fused, model, x)


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


@pytest.mark.parametrize("name", ["dividing", "bilinear", "valid", "nested", "resnet"])
def test_no_map_lives_longer_than_before(name: str) -> None:
    """The peak of live bytes is lower: norms and ReLUs leave no second map, and joined maps are let go of."""
    model, x = made(name)
    x = torch.randn(1, x.shape[1], 96, 96)  # maps outweigh the folded weights that the first call leaves
    peaks = []

    for each in (model, fuse(model)[0]):
        outputs(each, x)
        present = [x, *model.parameters(), *model.buffers()]
        peaks += trace_peaks(partial(outputs, each, x), present, 1)

    assert peaks[1] < peaks[0]


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


@pytest.mark.numeric
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


@pytest.mark.parametrize(
    "given", [None, 3, torch.relu, torch.nn.Conv2d, "unet/d4"], ids=["nothing", "number", "function", "class", "label"]
)
def test_only_modules_are_fused(given: Any) -> None:
    """Anything else is refused with what it is."""
    with pytest.raises(ValueError, match=rf"^fuse got a {type(given).__name__}, whose code it cannot change: give it"):
        fuse(given)


class AsksForAType(nn.Module):
    """Takes the sum where it is given a tensor, as MONAI's BasicUNet decides on its concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        """Convolve, and add the other where there is one."""
        x = self.layers(x)
        return x + other if isinstance(other, torch.Tensor) else x


class Asked(nn.Module):
    """Has a block that asks for a type."""

    def __init__(self) -> None:
        super().__init__()
        self.block = AsksForAType()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the block its input twice."""
        return self.block(x, x)


def test_python_that_asks_for_a_type_is_called_as_it_is() -> None:
    """A Proxy is no tensor, so that the other branch would be traced: the block stays, and is fused inside."""
    model = Asked().eval()
    fused, changes = fuse(model)
    x = torch.randn(1, 4, 8, 8)

    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))

    assert any(each.after and "block.layers.0" in each.where for each in changes)

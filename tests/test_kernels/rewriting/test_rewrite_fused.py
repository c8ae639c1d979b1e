"""`fuse` as a whole: the same numbers whatever runs, and a list of what became of each place."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import rewrite_checks
import torch
from fusion_checks import FOLDED, JOINED, Called, assert_as_good, fuse_at, graph_of, made, ours, outputs, refused, small
from torch import Tensor, nn
from torch.nn import functional
from user_models import MODELS, BranchingUNet, DoubleConv, PaddingUNet, trained

from skipcost.bench.measure.live_bytes import trace_peaks
from skipcost.kernels import Change, fuse, rewrite
from skipcost.kernels.dispatch.call import Call
from skipcost.unet_models import VARIANTS, ModelSpec, build

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    ("name", "layout", "chosen"),
    [
        pytest.param(name, LAYOUTS[(at + way) % 2], chosen, marks=[pytest.mark.numeric] * (chosen == "triton"))
        for at, name in enumerate(MODELS)
        for way, chosen in enumerate(("default", "triton", "reference"))
        if (at + way) % 3 < 2
    ],
    ids=str,
)
def test_a_fused_model_is_as_exact_as_the_original(
    name: str, layout: torch.memory_format, chosen: str
) -> None:  # fmt: skip
    """Whichever implementation runs: on a CPU, "triton" is the reference of each op, as the ops do without a GPU."""
    model, x = made(name)
    if name == "resnet":  # its .view takes no channels_last
        layout = torch.contiguous_format

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
    _, changes = fuse_at(PaddingUNet().eval(), torch.randn(1, 3, 19, 24))

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
    _, changes = fuse_at(*made(name))

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


def test_a_model_that_looks_at_its_input_is_fused_as_a_whole() -> None:
    """Its Python decides in each call, its error included."""
    model, x = made("branching")
    fused, changes = fuse_at(model, x)

    assert type(fused) is BranchingUNet
    assert len(ours(changes)) == 10
    assert_as_good(fused, model, x)
    with pytest.raises(RuntimeError, match="a size that 4 divides"):
        fused(x[..., 1:])


@pytest.mark.parametrize("name", ["dividing", "bilinear", "valid", "nested", "resnet"])
def test_no_map_lives_longer_than_before(name: str) -> None:
    """The peak of live bytes is lower: norms and ReLUs leave no second map, and joined maps are let go of."""
    model, x = made(name)
    x = torch.randn(1, x.shape[1], 96, 96)  # maps outweigh the folded weights that the first call leaves
    present = [x, *model.parameters(), *model.buffers()]

    peaks = [trace_peaks(each, present, 1) for each in (partial(outputs, model, x), graph_of(fuse(model)[0], x))]

    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_suites_own_networks_run_the_program_of_their_backend(variant: str) -> None:
    """Layer by layer; the list names what stands for several ops."""
    model = build(ModelSpec(variant=variant, depth=2, width=4)).eval()
    x = torch.randn(1, 1, 16, 16)

    fused, changes = fuse(model)

    assert ours(changes) == [each.kind for each in fused.program.ops if each.parts]
    assert {"layer", "join_layer"} & set(ours(changes))
    for one, other in zip(outputs(fused, x), outputs(model, x), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_can_be_fused_and_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """In either order: both lists, and the same result."""
    rewrite_checks.always(monkeypatch)
    model, x = rewrite_checks.made("dividing")
    lists = []

    for first, second in ((fuse, rewrite), (rewrite, fuse)):
        with torch.no_grad():
            both, changes = second(first(model)[0], x)
        lists.append({each.after for each in changes if each.after})
        torch.testing.assert_close(outputs(both, x), outputs(model, x), rtol=1e-12, atol=1e-12)

    assert lists == [{"tap_first", "conv_bn_relu", "conv_bn_relu_pool"}] * 2


def test_fusing_twice_is_fusing_once() -> None:
    """The second finds what the first found."""
    model, x = made("dividing")
    once, first = fuse_at(model, x)

    twice, second = fuse_at(once, x)

    assert second == first
    assert torch.equal(*outputs(twice, x), *outputs(once, x))


def test_gradients_are_the_originals_with_a_warning() -> None:
    """Where they may be asked for, the model's own operators run, and the list says so."""
    model, x = made("dividing")
    fused, changes = fuse(model)

    with pytest.warns(RuntimeWarning, match="runs as the original where gradients may be asked for: call it under"):
        result = fused(x)

    assert torch.equal(result, model(x))
    assert result.requires_grad
    assert refused(changes).startswith("gradients may be asked for")
    assert_as_good(fused, model, x)
    assert ours(changes)


def test_training_statistics_and_weights_are_those_of_the_call() -> None:
    """Steps of the model, in place, behind the versions' back, or by loading: the folded weights are made anew."""
    model, x = made("dividing")
    fused, _ = fuse_at(model, x)
    state = copy.deepcopy(model.state_dict())

    model.train()(x)  # writes statistics that the fused model shares
    model.eval()
    assert_as_good(fused, model, x)
    with torch.no_grad():
        model.inc.double_conv[0].weight.mul_(2)
    assert_as_good(fused, model, x)
    model.inc.double_conv[0].weight.data.mul_(2)
    outputs(fused.train(), x)
    assert_as_good(fused.eval(), model.eval(), x)
    model.load_state_dict(state)
    assert_as_good(fused, model, x)
    fused.inc.double_conv[1] = model.inc.double_conv[1] = trained(nn.BatchNorm2d(8))  # type: ignore[assignment]
    assert_as_good(fused, model, x)


def test_writes_through_data_show_after_training() -> None:
    """They leave no trace of their own, and a convolution without a norm counts no batches."""
    model, x = small(nn.Conv2d(3, 6, 3), nn.ReLU()), torch.randn(2, 3, 6, 7)
    fused, _ = fuse_at(model, x)

    fused.train()
    model[0].weight.data.mul_(2)
    outputs(fused, x)
    fused.eval()

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
    fused, _ = fuse(model.eval())

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
    fused, changes = fuse_at(model, x)

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
    with pytest.raises(ValueError, match=rf"^fuse got a {type(given).__name__}, whose code it cannot follow: give it"):
        fuse(given)

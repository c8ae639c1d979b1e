"""The executor: gradients, deep supervision, the classification-guided module."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from model_cells import by_label, cells, maps_of, outputs_of
from torch import nn
from torch.nn import functional

from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, SkipNet, build
from skipcost.unet_models.ops import ConvNormAct

pytestmark = pytest.mark.usefixtures("one_thread")

SUPERVISED = [spec for spec in cells((3,)) if spec.head != "single"]
GUIDED = [spec for spec in SUPERVISED if spec.head == "guided"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _idle_parameters(spec: ModelSpec) -> tuple[set[str], set[str]]:
    """Names of the parameters that a generic loss does not feel, and of the biases directly in front of a norm.

    In 64 bits, in which rounding stays below 1e-8, with 2x2 pixels or more in the deepest map and a batch of 2: over
    two values alone a batch norm returns two signs and passes next to no gradient. Without a norm all weights are
    positive, so that no ReLU closes by chance.
    """
    net = build(spec).double()
    with torch.no_grad():
        for parameter in net.parameters() if spec.norm == "none" else ():
            parameter.fill_(1 / parameter[0].numel())
        if net.classifier is not None:  # an organ in every image: the maps of one without are constant
            cast("nn.Conv2d", net.classifier.conv).bias[1:] += 9.0
    side = max(8, 2 << spec.depth)
    outputs = outputs_of(net(torch.randn(2, spec.in_channels, side, side, dtype=torch.float64)))
    torch.stack([(each * torch.randn_like(each)).sum() for each in outputs]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    felt = {name for name, each in gradients.items() if each is not None and each.isfinite().all()}
    felt -= {name for name, each in gradients.items() if each is not None and each.abs().max() < 1e-8}
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, ConvNormAct)}
    in_front = {f"{name}.conv.bias" for name, layer in layers.items() if layer.norm is not None}
    return gradients.keys() - felt, in_front & gradients.keys()


@by_label(
    [
        # Two depths each; a gate of width 2 has one channel inside, which its norm makes scale-free.
        *(replace(each, depth=1 + (at + more) % 5) for at, each in enumerate(cells((1,), width=4)) for more in (0, 2)),
        *cells((2,), width=4, norm="none"),
        *cells((2,), width=4, bias=False),
        ModelSpec("unet", 7, 4, "gated"),
        ModelSpec("unet++", 7, 2, "sum", head="deep"),
        ModelSpec("unet3+", 7, 2, "none", classes=1, head="guided"),
    ]
)
def test_every_parameter_gets_a_gradient(spec: ModelSpec) -> None:
    """All are finite, and only biases in front of a norm get none: it subtracts the mean, and with it the bias."""
    idle, in_front_of_a_norm = _idle_parameters(spec)

    assert idle == in_front_of_a_norm


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (48, 16), (20, 4), (5, 1)])
def test_a_group_norm_has_32_groups_or_the_largest_power_of_two_below(width: int, groups: int) -> None:
    """Wu & He (2018) take 32; where that does not divide the channels, what is left of it does."""
    net = build(ModelSpec(depth=1, width=width, norm="group"))

    norms = [layer.norm for layer in cast("nn.ModuleList", net.nodes["x0_0"])]

    assert [(type(norm), norm.num_groups) for norm in norms] == [(nn.GroupNorm, groups)] * 2


def test_an_instance_norm_has_a_scale_and_a_shift() -> None:
    """As in nnU-Net; PyTorch's default has none."""
    net = build(ModelSpec(depth=1, width=2, norm="instance"))

    norms = [layer.norm for layer in cast("nn.ModuleList", net.nodes["x0_0"])]

    assert [(type(norm), norm.affine, norm.track_running_stats) for norm in norms] == [
        (nn.InstanceNorm2d, True, False)
    ] * 2


@by_label(SUPERVISED)
def test_supervision_does_not_change_the_deployed_output(spec: ModelSpec) -> None:
    """With the same weights, the first of all heads returns what the only head of the single network returns."""
    supervised, single = build(spec).eval(), build(replace(spec, head="single")).eval()
    single.load_state_dict({name: supervised.state_dict()[name] for name in single.state_dict()})
    if supervised.classifier is not None:
        _decide(supervised, 0.0, 9.0)
    image = torch.randn(2, 1, 16, 24)

    first = maps_of(supervised, image)[0]

    logits = single(image)
    assert torch.equal(first, logits if spec.head == "deep" else logits.sigmoid())


@by_label(SUPERVISED)
def test_the_final_output_is_the_first_of_all(spec: ModelSpec) -> None:
    """The deployed form has a subset of the weights and returns one map instead of a list; class logits stay."""
    everything, final = build(spec).eval(), build(spec, outputs="final").eval()
    final.load_state_dict({name: everything.state_dict()[name] for name in final.state_dict()})
    image = torch.randn(2, 1, 16, 24)

    result = final(image)

    expected = everything(image)
    if spec.head == "guided":
        assert torch.equal(result[1], expected[1])
        result, expected = result[0], expected[0]
    assert torch.equal(result, expected[0])


@by_label(SUPERVISED)
def test_a_supervised_network_returns_a_list(spec: ModelSpec) -> None:
    """One map for each head, all of one size; with a classifier, two class logits for each image beside them."""
    net, image = build(spec), torch.randn(2, 1, 19, 24)

    result = net(image)

    maps = result[0] if spec.head == "guided" else result
    assert isinstance(maps, list)
    assert {each.shape for each in maps} == {(2, 1, 16, 24)}
    assert len(maps) == len(net.graph.heads)
    assert spec.head != "guided" or result[1].shape == (2, 2)


def test_an_unknown_choice_of_outputs_is_refused() -> None:
    """The two that exist are named."""
    with pytest.raises(ValueError, match=r"^outputs='first' is unknown; accepted: final, all$"):
        build(ModelSpec(width=2), outputs="first")


def _decide(net: SkipNet, no_organ: float, organ: float) -> None:
    """Make the classifier return these two logits for every image."""
    assert net.classifier is not None
    nn.init.zeros_(net.classifier.conv.weight)
    net.classifier.conv.bias = nn.Parameter(torch.tensor([no_organ, organ]))


@by_label(GUIDED)
@pytest.mark.parametrize("logits", [(1.0, -1.0), (0.5, 0.5)], ids=["no organ", "tie"])
def test_an_image_without_organ_is_exactly_zero(spec: ModelSpec, logits: tuple[float, float]) -> None:
    """Not the 0.5 everywhere that masked logits give; a tie counts as no organ."""
    net = build(spec).eval()
    _decide(net, *logits)

    maps = maps_of(net, torch.randn(2, 1, 16, 24))

    assert all(not each.any() for each in maps)


def test_two_sure_logits_are_told_apart() -> None:
    """Sigmoids of 90 and 100 are the same 32-bit number; the decision is made before."""
    net = build(GUIDED[0]).eval()
    _decide(net, 90.0, 100.0)

    maps = maps_of(net, torch.randn(2, 1, 16, 24))

    assert all(each.all() for each in maps)


def test_each_image_of_a_batch_is_judged_by_itself() -> None:
    """With the threshold between the scores of two images, one is masked and the other is not."""
    net, image = build(GUIDED[0]).eval(), torch.randn(2, 1, 16, 24)
    _decide(net, 0.0, 0.0)
    assert net.classifier is not None
    nn.init.ones_(net.classifier.conv.weight[1:])
    scores = net(image)[1][:, 1]
    net.classifier.conv.bias = nn.Parameter(torch.stack((scores.mean(), torch.tensor(0.0))))

    maps, _ = net(image)

    assert sorted(bool(each.any()) for each in maps[0]) == [False, True]
    assert maps[0][scores.argmax()].all()


def test_the_classifier_learns_from_its_own_loss() -> None:
    """Cross-entropy on the class logits reaches the classifier and, through it, the encoder."""
    net = build(GUIDED[0])

    _, class_logits = net(torch.randn(2, 1, 16, 24))
    functional.cross_entropy(class_logits, torch.tensor([0, 1])).backward()

    assert net.classifier.conv.weight.grad.any()
    assert net.nodes["x0_0"][0].conv.weight.grad.any()


def test_the_classifier_does_not_learn_from_the_segmentation() -> None:
    """The decision is a comparison, through which no gradient passes."""
    net = build(GUIDED[0])
    _decide(net, 0.0, 9.0)

    torch.stack([each.sum() for each in maps_of(net, torch.randn(2, 1, 16, 24))]).sum().backward()

    assert net.classifier.conv.weight.grad is None


def test_the_classifier_drops_out_half_in_training_alone() -> None:
    """Sec. 2.4 of the paper: two passes differ in training, and do not at inference."""
    net, image = build(replace(GUIDED[0], norm="none")), torch.randn(1, 1, 16, 24)

    equal = [torch.equal(net.train(mode)(image)[1], net(image)[1]) for mode in (True, False)]

    assert equal == [False, True]


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_image_is_not_written_to(variant: str, skip: str) -> None:
    """Ops that work in place do so on maps of their own."""
    net, image = build(ModelSpec(variant, 2, 2, skip)), torch.randn(2, 1, 8, 12)
    before = image.clone()

    net(image)

    assert torch.equal(image, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_of_ten_levels_runs(variant: str) -> None:
    """Names of two digits, a map of one pixel at the bottom, and a factor of 512 on the way back."""
    spec = ModelSpec(variant, depth=9, width=1, max_width=2)
    image = torch.rand(1, 1, 512, 512)

    with torch.no_grad():
        output = build(spec).eval()(image)

    assert output.shape == (1, 2, 512, 512)
    assert output.isfinite().all()

"""The executor against textbook networks with the same weights: the outputs are the same numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference_models as textbook
import torch
from model_cells import outputs_of
from torch import Tensor, nn
from torch.nn import functional

from skipcost.unet_models import ModelSpec, build

pytestmark = pytest.mark.usefixtures("one_thread")


def _conv(ours: str, theirs: str) -> dict[str, str]:
    """Where the weights of a convolution and its norm are in the one, and in the other."""
    return {f"{ours}.conv": f"{theirs}.conv", f"{ours}.norm": f"{theirs}.norm"}


def _block(ours: str, theirs: str) -> dict[str, str]:
    return _conv(f"nodes.{ours}.0", f"{theirs}.one") | _conv(f"nodes.{ours}.1", f"{theirs}.two")


def _gate(edge: str, theirs: str) -> dict[str, str]:
    halves = {"x": "skip", "signal": "signal"}
    names = {f"edges.{edge}.gate.{ours}.conv": f"{theirs}.from_{half}" for ours, half in halves.items()}
    names |= {f"edges.{edge}.gate.{ours}.norm": f"{theirs}.norm_{half}" for ours, half in halves.items()}
    return names | {f"edges.{edge}.gate.psi.conv": f"{theirs}.psi", f"edges.{edge}.gate.psi.norm": f"{theirs}.norm_psi"}


UNET_NAMES = (
    _block("x0_0", "left0")
    | _block("x1_0", "left1")
    | _block("x2_0", "left2")
    | _block("x3_0", "left3")
    | _block("x4_0", "bottom")
    | {"edges.x4_0->x3_1.up": "up3"}
    | _block("x3_1", "right3")
    | {"edges.x3_1->x2_2.up": "up2"}
    | _block("x2_2", "right2")
    | {"edges.x2_2->x1_3.up": "up1"}
    | _block("x1_3", "right1")
    | {"edges.x1_3->x0_4.up": "up0"}
    | _block("x0_4", "right0")
    | {"heads.x0_4.conv": "head"}
)
GATED_NAMES = (
    UNET_NAMES
    | _gate("x3_0->x3_1", "gate3")
    | _gate("x2_0->x2_2", "gate2")
    | _gate("x1_0->x1_3", "gate1")
    | _gate("x0_0->x0_4", "gate0")
)
NESTED = ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 3), (0, 4))  # the decoder nodes X^{i,j}
PLUS_PLUS_NAMES = {
    **{ours: theirs for level in range(5) for ours, theirs in _block(f"x{level}_0", f"x{level}0").items()},
    **{ours: theirs for i, j in NESTED for ours, theirs in _block(f"x{i}_{j}", f"x{i}{j}").items()},
    **{f"edges.x{i + 1}_{j - 1}->x{i}_{j}.up": f"up{i + 1}{j - 1}" for i, j in NESTED},
    **{f"heads.x0_{j}.conv": f"head{j}" for j in (1, 2, 3, 4)},
}
ENCODER = {"en1": "x0_0", "en2": "x1_0", "en3": "x2_0", "en4": "x3_0", "en5": "x4_0"}  # UNet 3+'s names, and X^{i,j}
DECODER = {"de4": "x3_1", "de3": "x2_2", "de2": "x1_3", "de1": "x0_4"}
MAPS = ENCODER | DECODER
FULL_SCALE = {
    "de4": ("en1", "en2", "en3", "en4", "en5"),
    "de3": ("en1", "en2", "en3", "de4", "en5"),
    "de2": ("en1", "en2", "de3", "de4", "en5"),
    "de1": ("en1", "de2", "de3", "de4", "en5"),
}
THREE_PLUS_NAMES = {
    **{k: v for theirs, ours in ENCODER.items() for k, v in _block(ours, theirs).items()},
    **{
        k: v
        for target, sources in FULL_SCALE.items()
        for source in sources
        for k, v in _conv(f"edges.{MAPS[source]}->{MAPS[target]}.conv", f"{source}_{target}").items()
    },
    **{k: v for theirs, ours in DECODER.items() for k, v in _conv(f"nodes.{ours}.0", theirs).items()},
    **{f"heads.{DECODER[f'de{side}']}.conv": f"side{side}" for side in (1, 2, 3, 4)},
    "heads.x4_0.conv": "side5",
    "classifier.conv": "organ",
}


@dataclass(frozen=True)
class Oracle:
    """A label, the textbook network that it must equal, and where the weights of the one are in the other."""

    label: str
    network: Callable[[], nn.Module]
    names: dict[str, str]


ORACLES = (
    Oracle("unet/d4/w4/concat/in_channels=3", lambda: textbook.UNet(4, 3, 2), UNET_NAMES),
    Oracle("unet/d4/w4/concat/norm=none", lambda: textbook.UNet(4, 1, 2, norm=False), UNET_NAMES),
    Oracle("unet/d4/w4/sum/classes=3", lambda: textbook.SumUNet(4, 1, 3), UNET_NAMES),
    Oracle("unet/d4/w4/gated", lambda: textbook.AttentionUNet(4, 1, 2), GATED_NAMES),
    Oracle("unet++/d4/w4/concat/head=deep", lambda: textbook.UNetPlusPlus(4, 1, 2), PLUS_PLUS_NAMES),
    Oracle(
        "unet3+/d4/w4/concat/in_channels=3/classes=1/head=guided",
        lambda: textbook.UNet3Plus(4, 3),
        THREE_PLUS_NAMES,
    ),
)
VALID = Oracle(
    "unet/d4/w2/concat/padding=valid/norm=none",
    lambda: textbook.UNet(2, 1, 2, norm=False, padding=0),
    UNET_NAMES,
)
by_label = pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.label)


def _randomised(net: nn.Module) -> nn.Module:
    """Move the norms away from their initial values, all alike, so that none passes for another."""
    generator = torch.Generator().manual_seed(1)
    for key, value in net.state_dict().items():
        if ".norm." in key and value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator) * 0.4)
    return net


def _renamed(oracle: Oracle, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a state of ours under the textbook's names."""
    split = {key: key.rpartition(".") for key in state}
    return {f"{oracle.names[layer]}.{leaf}": state[key] for key, (layer, _, leaf) in split.items()}


def _pair(oracle: Oracle) -> tuple[nn.Module, nn.Module]:
    """Build both with the same weights; a missing, left-over or differently shaped one is an error."""
    torch.manual_seed(0)
    ours, theirs = _randomised(build(ModelSpec.parse(oracle.label))), oracle.network()
    theirs.load_state_dict(_renamed(oracle, ours.state_dict()), strict=True)
    return ours, theirs


def _run(oracle: Oracle, net: nn.Module, batch: int, height: int, width: int) -> list[Tensor]:
    """Return all outputs as a flat list; the seed makes images and dropout alike in every call."""
    torch.manual_seed(2)
    image = torch.randn(batch, ModelSpec.parse(oracle.label).in_channels, height, width)
    return outputs_of(net(image.to(next(net.parameters()).dtype)))


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@by_label
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(1, 32, 48), (2, 32, 48), (2, 39, 59)], ids=str)
def test_the_outputs_equal_the_textbooks(oracle: Oracle, size: tuple[int, int, int], *, training: bool) -> None:
    """Every output is bit for bit that of the hand-written network, odd sizes and their crops included."""
    ours, theirs = _pair(oracle)

    received = _run(oracle, ours.train(training), *size)

    assert _equal(received, _run(oracle, theirs.train(training), *size))


@by_label
def test_a_training_step_leaves_the_same_gradients_and_statistics(oracle: Oracle) -> None:
    """Backward, too, is the textbook's, in 64 bits because the order in which gradients are summed is torch's own."""
    ours, theirs = (net.double().train() for net in _pair(oracle))

    for net in (ours, theirs):
        torch.stack([each.square().mean() for each in _run(oracle, net, 2, 32, 48)]).sum().backward()

    gradients = _renamed(oracle, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
    statistics = _renamed(oracle, dict(ours.named_buffers()))
    assert all(torch.equal(statistics[name], buffer) for name, buffer in theirs.named_buffers())


def test_the_2015_network_turns_572_into_388() -> None:
    """The sizes of the paper's fig. 1, at its full width."""
    spec = ModelSpec(width=64, padding="valid", norm="none")

    with torch.device("meta"):
        output = build(spec)(torch.empty(1, 1, 572, 572))

    assert output.shape == (1, 2, 388, 388)


@pytest.mark.parametrize("size", [(188, 188), (204, 188), (189, 211)], ids=str)
def test_valid_convolutions_crop_as_in_2015(size: tuple[int, int]) -> None:
    """The centre crops equal the textbook's where they are even, where they are not, and where pooling drops a row."""
    ours, theirs = _pair(VALID)

    received = _run(VALID, ours, 1, *size)

    assert _equal(received, _run(VALID, theirs, 1, *size))


def _functional(net: nn.Module, prefix: str, x: Tensor) -> Tensor:
    """A convolution by its name in the state dict; padded where it is 3x3, ReLU where it is 3x3, no norm."""
    state = net.state_dict()
    weight = state[f"{prefix}.conv.weight"]
    y = functional.conv2d(x, weight, state[f"{prefix}.conv.bias"], padding=weight.shape[2] // 2)
    return functional.relu(y) if weight.shape[2] == 3 else y


@pytest.mark.parametrize("skip", ["sum", "gated"])
def test_unet_3plus_merges_after_its_edge_convolutions(skip: str) -> None:
    """Worked out at depth 1: the gate sits before the edge's convolution, the sum after it."""
    torch.manual_seed(0)
    net = build(ModelSpec("unet3+", 1, 4, skip, norm="none"))
    image = torch.randn(2, 1, 8, 12)
    edge = "edges.x0_0->x0_1"

    received = net(image)

    finest = _functional(net, "nodes.x0_0.1", _functional(net, "nodes.x0_0.0", image))
    deep = _functional(net, "nodes.x1_0.1", _functional(net, "nodes.x1_0.0", textbook.halved(finest)))
    signal = textbook.enlarged(deep, 2)
    if skip == "gated":
        query = _functional(net, f"{edge}.gate.x", finest) + _functional(net, f"{edge}.gate.signal", signal)
        finest = finest * torch.sigmoid(_functional(net, f"{edge}.gate.psi", functional.relu(query)))
    near, far = _functional(net, f"{edge}.conv", finest), _functional(net, "edges.x1_0->x0_1.conv", signal)
    fused = _functional(net, "nodes.x0_1.0", near + far if skip == "sum" else torch.cat((near, far), 1))
    head = net.state_dict()
    expected = functional.conv2d(fused, head["heads.x0_1.conv.weight"], head["heads.x0_1.conv.bias"], padding=1)
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upsample", ["bilinear", "align_corners"])
def test_a_sum_projects_what_has_another_width(upsample: str) -> None:
    """UNet++ without learned up-sampling, worked out at depth 1: the deeper map is brought to the node's width."""
    torch.manual_seed(0)
    net = build(ModelSpec("unet++", 1, 4, "sum", norm="none", upsample=upsample))
    image = torch.randn(2, 1, 8, 12)

    received = net(image)

    finest = _functional(net, "nodes.x0_0.1", _functional(net, "nodes.x0_0.0", image))
    deep = _functional(net, "nodes.x1_0.1", _functional(net, "nodes.x1_0.0", textbook.halved(finest)))
    up = textbook.enlarged(deep, 2, corners=upsample == "align_corners")
    projected = _functional(net, "edges.x1_0->x0_1.project", up)
    merged = _functional(net, "nodes.x0_1.1", _functional(net, "nodes.x0_1.0", finest + projected))
    expected = _functional(net, "heads.x0_1", merged)
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-6)

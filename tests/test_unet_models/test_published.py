"""The networks of the papers, against the counts of their authors' and others' code: exact integers, no tolerance.

`published.json` holds what was measured by running public implementations; MORE adds facts without a row there.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from model_cells import maps_of
from places import TESTS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skipcost.unet_models import ModelSpec, build, graph, lower, sizes

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED: list[dict[str, Any]] = json.loads((TESTS / "published.json").read_text())
MORE = (  # label, params, conv MACs at 256x256
    ("unet/d4/w64/sum/norm=none", 27_897_218, 38_432_407_552),  # LinkNet's skips on a U-Net: elektronn3, two others
    ("unet/d4/w64/sum", 27_908_994, 38_432_407_552),
    ("unet/d4/w64/concat/in_channels=3", 31_043_586, 48_171_581_440),  # milesial's with the redundant biases
    ("unet/d4/w32/concat/classes=1/norm=none", 7_759_521, None),  # the 7.76 M of the UNet++ papers, one channel in
    ("unet/d4/w35/concat/classes=1/norm=none", 9_282_246, None),  # the wide U-Net, as in its authors' comment
    ("unet++/d4/w32/concat/in_channels=3/classes=1/upsample=bilinear/head=deep", 9_163_428, 34_491_858_944),
    ("unet3+/d4/w64/concat/in_channels=3/classes=1/bias=False", 26_965_249, 197_652_381_696),
)
each_row = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["name"])


def _executed_on_meta(row: dict[str, Any]) -> tuple[int, list[list[int]]]:
    """Conv MACs and output shapes of a real forward pass without data."""
    with torch.device("meta"):
        net, image = build(ModelSpec(**row["spec"])).eval(), torch.empty(row["input"])
    with FlopCounterMode(display=False) as counter:
        shapes = [list(each.shape) for each in maps_of(net, image)]
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2, shapes


@each_row
def test_graph_arithmetic_gives_the_published_parameters(row: dict[str, Any]) -> None:
    """Parameters from the graph alone, without a network."""
    spec = ModelSpec(**row["spec"])

    params = graph(spec).params()

    assert params == row["params"]


@each_row
def test_graph_arithmetic_gives_the_published_macs(row: dict[str, Any]) -> None:
    """Conv MACs from the graph alone."""
    spec = ModelSpec(**row["spec"])

    conv_macs = graph(spec).conv_macs(*row["input"][2:])

    assert conv_macs == row["conv_macs"]


@each_row
def test_the_built_network_has_the_published_parameters(row: dict[str, Any]) -> None:
    """Parameters of the module."""
    with torch.device("meta"):
        net = build(ModelSpec(**row["spec"]))

    assert sum(parameter.numel() for parameter in net.parameters()) == row["params"]


@each_row
def test_the_executed_network_has_the_published_macs_and_outputs(row: dict[str, Any]) -> None:
    """Torch's own counter and the shapes of all outputs, on the meta device."""
    conv_macs, outputs = _executed_on_meta(row)

    assert (conv_macs, outputs) == (row["conv_macs"], row["outputs"])


@each_row
def test_the_graph_predicts_the_published_output_size(row: dict[str, Any]) -> None:
    """The output size is known before anything runs."""
    spec = ModelSpec(**row["spec"])

    size = graph(spec).output_size(*row["input"][2:])

    assert [list(size)] * len(row["outputs"]) == [shape[2:] for shape in row["outputs"]]


@pytest.mark.parametrize(("label", "params", "conv_macs"), MORE, ids=[label for label, _, _ in MORE])
def test_further_networks_have_their_known_counts(label: str, params: int, conv_macs: int | None) -> None:
    """Facts from code or papers that have no row in published.json."""
    network = ModelSpec.parse(label).graph()

    counted = network.params(), conv_macs and network.conv_macs(256, 256)

    assert counted == (params, conv_macs)


def test_attention_gates_add_what_they_add_in_public_code() -> None:
    """LeeJunHyun's attention U-Net has 351,532 parameters more than its U-Net."""
    plain, gated = (graph(ModelSpec(skip=skip)) for skip in ("concat", "gated"))

    assert gated.params() - plain.params() == 351_532


@pytest.mark.parametrize(
    ("owner", "conv_macs"),
    [
        ("x0_0", 660_602_880),
        *((f"x{level}_0", 905_969_664) for level in (1, 2, 3, 4)),
        *((f"x{level}_1", 1_946_157_056) for level in range(4)),
        *((f"x{level}_2", 2_550_136_832) for level in range(3)),
        *((f"x{level}_3", 3_154_116_608) for level in range(2)),
        ("x0_4", 3_758_096_384),
    ],
)
def test_unet_plus_plus_costs_the_same_all_along_a_column(owner: str, conv_macs: int) -> None:
    """The known MACs of each node of the authors' UNet++, with its up-sampling, at 3x256x256."""
    network = graph(ModelSpec("unet++", width=32, norm="none", in_channels=3, classes=1))

    placed = [
        each for each in sizes.placed(lower(network), (256, 256)) if each.owner.endswith(owner)
    ]  # node and its edges

    assert sum(each.macs for each in placed if not each.owner.startswith("head")) == conv_macs


def _deep_plus_plus(pruned_to: int) -> tuple[ModelSpec, ModelSpec]:
    fields: dict[str, Any] = {"variant": "unet++", "width": 4, "norm": "batch"}
    return ModelSpec(**fields, head="deep"), ModelSpec(**fields, pruned_to=pruned_to)


@pytest.mark.parametrize("pruned_to", [1, 2, 3, 4])
def test_a_pruned_networks_weights_are_among_those_of_the_deep_one(pruned_to: int) -> None:
    """UNet++ L^d, sec. 3.4: the sub-network has no weight of its own."""
    deep, pruned = _deep_plus_plus(pruned_to)

    shapes = [{name: value.shape for name, value in build(spec).state_dict().items()} for spec in (deep, pruned)]

    assert shapes[1].items() <= shapes[0].items()


@pytest.mark.parametrize("pruned_to", [1, 2, 3, 4])
def test_a_pruned_network_gives_the_deep_ones_output_of_that_column(pruned_to: int) -> None:
    """With the deep network's weights, L^d returns what head d returned."""
    torch.manual_seed(0)
    specs = _deep_plus_plus(pruned_to)
    deep, pruned = (build(spec).eval() for spec in specs)
    pruned.load_state_dict({name: deep.state_dict()[name] for name in pruned.state_dict()})
    image = torch.randn(2, 1, 32, 48)

    outputs: list[Tensor] = deep(image)

    assert torch.equal(pruned(image), outputs[4 - pruned_to])

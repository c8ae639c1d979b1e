"""Costs by place add up, and an edge costs what the network saves without it."""

from __future__ import annotations

import pytest

from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, graph
from skipcost.unet_models.costs import costs
from skipcost.unet_models.program import IMAGE

SIZE = (61, 90)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_places_add_up_to_the_network(variant: str, skip: str, padding: str) -> None:
    """Edges, nodes and heads hold every MAC and every parameter once, and nothing negative."""
    network = graph(ModelSpec(variant=variant, skip=skip, depth=2, width=6, padding=padding))

    split = costs(network, *SIZE)

    assert split.total_macs == network.conv_macs(*SIZE)
    assert split.total_params == network.params()
    assert min(split.node_macs.values()) >= 0
    assert all(edge.macs >= 0 and edge.merge_macs >= 0 for edge in split.edges)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("variant", ["unet", "unet3+"])
def test_skips_cost_what_the_network_saves_without_them(variant: str, depth: int) -> None:
    """MACs and parameters of all skips, with the slices they feed, are those of `concat` less those of `none`."""
    whole = graph(ModelSpec(variant=variant, depth=depth, width=6))
    bare = graph(ModelSpec(variant=variant, depth=depth, width=6, skip="none"))

    skips = [edge for edge in costs(whole, 64, 96).edges if edge.skip]

    assert sum(edge.all_macs for edge in skips) == whole.conv_macs(64, 96) - bare.conv_macs(64, 96)
    assert sum(edge.params + edge.merge_params for edge in skips) == whole.params() - bare.params()


def test_a_gate_costs_what_it_adds() -> None:
    """The MACs of the gated edges' own convolutions are those of `gated` less those of `concat`."""
    plain, gated = (graph(ModelSpec(depth=3, width=6, skip=skip)) for skip in ("concat", "gated"))

    own = sum(edge.macs for edge in costs(gated, 64, 64).edges if edge.skip)

    assert own == gated.conv_macs(64, 64) - plain.conv_macs(64, 64)


def test_maps_are_held_from_their_making_to_their_reading() -> None:
    """A skip's map is held as long as the way down and up again takes, in bytes of batch and precision."""
    edges = {
        (edge.source, edge.target): edge
        for edge in costs(graph(ModelSpec(width=8)), 64, 64, batch=3, value_bytes=2).edges
    }

    assert edges["x0_0", "x0_4"].held_steps == 8
    assert edges["x3_0", "x3_1"].held_steps == 2
    assert edges["x0_0", "x0_4"].held_bytes == 3 * 8 * 64 * 64 * 2
    assert edges[IMAGE, "x0_0"].held_steps == 1


def test_crops_are_those_of_the_2015_paper() -> None:
    """At 572 the four skips lose 8, 32, 80 and 176 pixels a side: 64 to 56, 136 to 104, 280 to 200, 568 to 392."""
    network = graph(ModelSpec(padding="valid", norm="none"))

    crops = {edge.source: (edge.source_size[0], edge.crop) for edge in costs(network, 572, 572).edges if edge.skip}

    assert crops == {
        "x3_0": (64, (8, 8)),
        "x2_0": (136, (32, 32)),
        "x1_0": (280, (80, 80)),
        "x0_0": (568, (176, 176)),
    }

"""Wiring: which maps reach which node, in the papers' own networks and under every skip scheme."""

from __future__ import annotations

import itertools

import pytest

from skipcost.unet_models import SKIPS, VARIANTS, Edge, ModelSpec, Node, SkipGraph, graph

CELLS = list(itertools.product(VARIANTS, SKIPS))
each_cell = pytest.mark.parametrize(("variant", "skip"), CELLS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def _decoder(network: SkipGraph) -> list[Node]:
    return [node for node in network.nodes if node.deeper]


def _sources(network: SkipGraph, name: str) -> list[str]:
    return next([edge.source for edge in node.inputs] for node in network.nodes if node.name == name)


@pytest.mark.parametrize(
    ("label", "node", "sources"),
    [
        ("unet/d4/w8/concat", "x3_1", "x3_0 x4_0"),
        ("unet/d4/w8/concat", "x0_4", "x0_0 x1_3"),
        ("unet++/d4/w8/concat", "x3_1", "x3_0 x4_0"),
        ("unet++/d4/w8/concat", "x1_2", "x1_0 x1_1 x2_1"),
        ("unet++/d4/w8/concat", "x0_4", "x0_0 x0_1 x0_2 x0_3 x1_3"),
        ("unet++/d4/w8/nearest", "x0_4", "x0_3 x1_3"),
        ("unet++/d4/w8/same", "x0_4", "x0_0 x1_3"),
        ("unet3+/d4/w8/concat", "x3_1", "x0_0 x1_0 x2_0 x3_0 x4_0"),
        ("unet3+/d4/w8/concat", "x2_2", "x0_0 x1_0 x2_0 x3_1 x4_0"),
        ("unet3+/d4/w8/concat", "x0_4", "x0_0 x1_3 x2_2 x3_1 x4_0"),
        ("unet3+/d4/w8/same", "x1_3", "x1_0 x2_2"),
        ("unet3+/d4/w8/none", "x1_3", "x2_2"),
    ],
)
def test_a_node_reads_the_maps_of_its_paper(label: str, node: str, sources: str) -> None:
    """Encoder maps first, the finest or earliest in front, then the maps from deeper levels."""
    network = ModelSpec.parse(label).graph()

    assert _sources(network, node) == sources.split()


@each_cell
def test_maps_are_made_before_they_are_read(variant: str, skip: str) -> None:
    """Nodes stand in the order of execution, and every edge ends at the node that lists it."""
    made = {"image"}

    for node in graph(ModelSpec(variant, skip=skip)).nodes:
        assert {edge.source for edge in node.inputs} <= made
        assert {edge.target for edge in node.inputs} == {node.name}
        made.add(node.name)


@each_cell
def test_every_map_is_read_by_a_node_or_a_head(variant: str, skip: str) -> None:
    """What a scheme leaves without readers is pruned."""
    network = graph(ModelSpec(variant, skip=skip))

    read = {edge.source for edge in network.edges} | {head.node for head in network.heads}

    assert {node.name for node in network.nodes} <= read


@each_cell
def test_no_scheme_changes_a_nodes_width(variant: str, skip: str) -> None:
    """A scheme changes what is read, never what is written: the widths are those of the paper's own wiring."""
    own = {node.name: node.width for node in graph(ModelSpec(variant)).nodes}

    widths = {node.name: node.convs[-1].out_channels for node in graph(ModelSpec(variant, skip=skip)).nodes}

    assert widths.items() <= own.items()


@each_cell
def test_no_scheme_removes_the_edge_from_the_deeper_level(variant: str, skip: str) -> None:
    """Each decoder node reads exactly one map of the next deeper level that is no skip."""
    network = graph(ModelSpec(variant, skip=skip))
    levels = {node.name: node.level for node in network.nodes}

    kept = [[levels[edge.source] - node.level for edge in node.inputs if not edge.skip] for node in _decoder(network)]

    assert kept == [[1]] * len(kept)


def _wanted(skip: str, node: Node, deeper: Edge) -> list[str]:
    """What a scheme must leave of a node's inputs, by the definition in its title."""
    sources = [edge.source for edge in node.inputs if edge is not deeper]
    match skip:
        case "none":
            sources = []
        case "same":
            sources = [f"x{node.level}_0"]
        case "nearest":
            sources = [max(source for source in sources if source.startswith(f"x{node.level}_"))]
    return sorted([*sources, deeper.source])


@each_cell
def test_a_scheme_keeps_the_inputs_of_its_definition(variant: str, skip: str) -> None:
    """Every input, none, only X^{i,0}, or only X^{i,j-1}."""
    own = {node.name: node for node in graph(ModelSpec(variant)).nodes}

    for node in _decoder(graph(ModelSpec(variant, skip=skip))):
        before = own[node.name]
        assert before.deeper
        assert sorted(edge.source for edge in node.inputs) == _wanted(skip, before, before.deeper)


@each_variant
def test_a_sum_adds_maps_of_one_width(variant: str) -> None:
    """Where a map has another width it gets a 1x1 projection, and only there."""
    for node in _decoder(graph(ModelSpec(variant, skip="sum", upsample="bilinear"))):
        assert node.merge == "sum"
        assert {edge.out_channels for edge in node.inputs} == {node.convs[0].in_channels}
        for edge in node.inputs:
            before = edge.conv.out_channels if edge.conv else edge.resampled_channels
            assert (edge.project is None) == (before == node.convs[0].in_channels)


@each_variant
@pytest.mark.parametrize(("width", "inside"), [(1, 1), (2, 1), (7, 3), (64, 32)])
def test_gates_stand_on_the_encoder_map_of_the_own_level(variant: str, width: int, inside: int) -> None:
    """On X^{i,0} and on nothing else, with half its channels inside, rounded down, but never none."""
    network = graph(ModelSpec(variant, width=width, skip="gated"))

    gates = {edge.name: edge.gate for edge in network.edges if edge.gate}

    assert sorted(gates) == sorted(f"x{node.level}_0->{node.name}" for node in _decoder(network))
    finest = next(gate for name, gate in gates.items() if name.startswith("x0_0->"))
    assert (finest.x.out_channels, finest.signal.out_channels, finest.psi.in_channels) == (inside, inside, inside)


@each_cell
def test_the_deployed_network_keeps_the_first_head_alone(variant: str, skip: str) -> None:
    """With deep supervision or without, what is deployed is the same network."""
    for head in VARIANTS[variant].heads:
        network = graph(ModelSpec(variant, skip=skip, head=head, classes=1)).final()
        single = graph(ModelSpec(variant, skip=skip, classes=1))

        assert (network.nodes, network.heads) == (single.nodes, single.heads)


@pytest.mark.parametrize("pruned_to", [1, 2, 3])
def test_a_pruned_network_is_the_shallower_one(pruned_to: int) -> None:
    """L^d of UNet++ is UNet++ of depth d: the deeper encoder levels are dropped too."""
    assert graph(ModelSpec("unet++", 4, pruned_to=pruned_to)) == graph(ModelSpec("unet++", pruned_to))

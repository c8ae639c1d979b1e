"""The topology of a network as inline SVG: nodes where the papers have them, edges as wide as their share of the MACs.

Every edge runs from left to right, so no arrow heads are needed. Colours are classes of style.css.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from skipcost.bench import figures
from skipcost.reports.drawings.svg import as_image
from skipcost.unet_models.program import IMAGE
from skipcost.unet_models.topology import Edge, SkipGraph

STEP_X, STEP_Y = 76, 84  # pixels of the drawing between neighbours
NODE_W, NODE_H = 70, 36
MARGIN_X, MARGIN_TOP = 84, 30
SMALLEST = 0.005  # share of a node that is still written in it
WIDEST = 26.0  # pixels of an edge that would hold half of all MACs
KINDS = {
    "path": "encoder's own path",
    "up": "from the next deeper level",
    "same": "skip, same scale",
    "pooled": "skip, pooled",
    "upsampled": "skip, up-sampled",
}
BOWS = {"path": 0.0, "up": 0.0, "pooled": -0.03, "upsampled": 0.075}  # how far from straight: skips keep off the V


def kind_of(edge: Edge) -> str:
    """The key in KINDS of an edge."""
    if not edge.skip:
        return "up" if edge.shift > 0 else "path"
    return "same" if edge.shift == 0 else "upsampled" if edge.shift > 0 else "pooled"


def draw(graph: SkipGraph, facts: dict[str, Any], name: str) -> Markup:
    """Draw a graph with the numbers of `explain`; `name` prefixes the ids."""
    places = {node.name: _place(node.name) for node in graph.nodes}
    places[IMAGE] = (places["x0_0"][0] - STEP_X, places["x0_0"][1])
    numbers = {(edge["source"], edge["target"]): edge for edge in facts["edges"]}
    edges = sorted(graph.edges, key=lambda edge: -numbers[edge.source, edge.target]["share"])  # thin ones on top
    lift = max(_rise(edge, places) for edge in edges)
    way_out, *outputs = _heads(graph, facts, places)
    pieces = [_edge(edge, numbers[edge.source, edge.target], places) for edge in edges] + [way_out]
    pieces += [_node(node.name, node.width, facts, places[node.name]) for node in graph.nodes]
    pieces += [_terminal("image", places[IMAGE], facts["input"], "end"), *outputs]
    right = max(x for x, _ in places.values()) + STEP_X + MARGIN_X
    bottom = max(y for _, y in places.values()) + NODE_H / 2 + 10
    top = min(0.0, MARGIN_TOP - lift)
    title = f"Topology of {facts['label']}"
    described = (
        f"{len(graph.nodes)} nodes on {graph.depth + 1} levels, {len(graph.edges)} edges; the table below lists every "
        "edge with the same numbers"
    )
    box = f"0 {top:.0f} {right:.0f} {bottom - top:.0f}"
    inside = Markup("".join(pieces))  # noqa: S704 - every text in it is escaped where it is put in
    return as_image("topology", box, (name, title, described), inside)


def _place(name: str) -> tuple[float, float]:
    """Where x{level}_{column} is drawn: a level down is half a column to the right, as in the UNet++ paper."""
    level, column = (int(part) for part in name.removeprefix("x").split("_"))
    return MARGIN_X + STEP_X * (1 + level + 2 * column), MARGIN_TOP + NODE_H / 2 + STEP_Y * level


def _rise(edge: Edge, places: dict[str, tuple[float, float]]) -> float:
    """How far a same-level edge arches to pass over the nodes between its ends; 0 where none stands there."""
    (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
    between = sum(y == y0 == y1 and x0 < x < x1 for x, y in places.values())
    return 24 + 10 * between if between else 0


def _path(edge: Edge, places: dict[str, tuple[float, float]]) -> str:
    (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
    if y0 == y1:
        rise = 4 / 3 * _rise(edge, places)  # a cubic's middle is at three quarters of its handles
        handles = f"C{x0 + 34:.0f} {y0 - rise:.0f} {x1 - 34:.0f} {y1 - rise:.0f} {x1:.0f} {y1:.0f}"
        return f"M{x0:.0f} {y0:.0f}" + (handles if rise else f"H{x1:.0f}")
    bow = BOWS[kind_of(edge)] * (abs(edge.shift) + 1)
    mid_x, mid_y = (x0 + x1) / 2 - bow * (y1 - y0), (y0 + y1) / 2 + bow * (x1 - x0)
    return f"M{x0:.0f} {y0:.0f}Q{mid_x:.0f} {mid_y:.0f} {x1:.0f} {y1:.0f}"


def _edge(edge: Edge, numbers: dict[str, Any], places: dict[str, tuple[float, float]]) -> str:
    kind = kind_of(edge)
    width = max(1.0, 2 * WIDEST * numbers["share"])
    told = (
        f"{edge.source} to {edge.target}: {KINDS[kind]}; {numbers['how']}; {edge.in_channels} to {edge.out_channels} "
        f"channels; {figures.text(numbers['all_macs'], 'macs')}, {numbers['share']:.1%} of all; "
        f"{figures.text(numbers['held_bytes'], 'bytes')} held for {numbers['held_steps']} steps"
    )
    return (
        f'<path class="edge {kind}" d="{_path(edge, places)}" stroke-width="{width:.1f}">'
        f"<title>{escape(told)}</title></path>"
    )


def _node(name: str, width: int, facts: dict[str, Any], place: tuple[float, float]) -> str:
    x, y = place
    macs = facts["node_macs"][name]
    share = macs / facts["conv_macs"]
    told = (
        f"{name}: {width} channels; {figures.text(macs, 'macs')} in its own convolutions beside those that the edges "
        f"feed, {share:.1%} of all"
    )
    small = f"{width} ch" + (f" \u00b7 {share:.0%}" if share >= SMALLEST else "")
    return (
        f'<g class="node"><title>{escape(told)}</title>'
        f'<rect x="{x - NODE_W / 2:.0f}" y="{y - NODE_H / 2:.0f}" width="{NODE_W}" height="{NODE_H}" rx="4"/>'
        f'<text x="{x:.0f}" y="{y - 3:.0f}">{escape(name)}</text>'
        f'<text class="small" x="{x:.0f}" y="{y + 12:.0f}">{small}</text></g>'
    )


def _heads(graph: SkipGraph, facts: dict[str, Any], places: dict[str, tuple[float, float]]) -> list[str]:
    """The deployed output on the right; a dot on every node that has a further one."""
    x, y = places[graph.heads[0].node]
    way = f'<path class="edge path" d="M{x:.0f} {y:.0f}h{STEP_X}" stroke-width="1"/>'
    dots = []
    for head in graph.heads[1:]:
        corner = places[head.node][0] + NODE_W / 2, places[head.node][1] - NODE_H / 2
        told = f"a further output on {escape(head.node)}"
        dots.append(
            f'<circle class="head" cx="{corner[0]:.0f}" cy="{corner[1]:.0f}" r="4"><title>{told}</title></circle>'
        )
    return [way, _terminal("output", (x + STEP_X, y), facts["output"], "start"), *dots]


def _terminal(text: str, place: tuple[float, float], size: list[int], anchor: str) -> str:
    x, y = place[0] + (-6 if anchor == "end" else 6), place[1]
    return (
        f'<g class="terminal" text-anchor="{anchor}"><text x="{x:.0f}" y="{y - 1:.0f}">{escape(text)}</text>'
        f'<text class="small" x="{x:.0f}" y="{y + 11:.0f}">{size[0]}x{size[1]}</text></g>'
    )

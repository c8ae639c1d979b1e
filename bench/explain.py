"""`skipcost explain`: every edge of a network, in words and numbers. Arithmetic alone; needs no torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from skipcost.bench import figures
from skipcost.bench.console import Column, Screen, bold
from skipcost.kernels.tap_choice import rewritings
from skipcost.unet_models import VARIANTS, ModelSpec, SkipGraph
from skipcost.unet_models.costs import EdgeCost, costs
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import size_note

COLUMNS = (
    Column("from"),
    Column("to"),
    Column("scale", drop=1),
    Column("how the map gets there", prose=True, drop=2),
    Column("channels", right=True, drop=3),
    Column("params", right=True, drop=4),
    Column("MACs", right=True),
    Column("share", right=True),
    Column("rewritten", right=True, drop=5),
    Column("held", right=True, drop=6),
    Column("for", right=True, drop=7),
)
VALUE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "amp-bf16": 2, "amp-fp16": 2}


def explain(spec: ModelSpec, size: tuple[int, int], batch: int, precision: str, mode: str) -> dict[str, Any]:
    """Everything that `explain` shows, as JSON values; MACs are for one image, bytes for the batch."""
    graph = spec.graph()
    split = costs(graph, *size, batch=batch, value_bytes=VALUE_BYTES[precision])
    total = split.total_macs
    return {
        "label": spec.label,
        "variant": VARIANTS[spec.variant].title,
        "input": list(size),
        "output": list(graph.output_size(*size)),
        "batch": batch,
        "precision": precision,
        "mode": mode,
        "note": size_note(lower(graph), size),
        "params": graph.params(),
        "conv_macs": graph.conv_macs(*size),
        "receptive_field": graph.receptive_field(),
        "edges": [_edge(values, total) for values in split.edges],
        "rewritings": [
            {"edge": each.edge, "form": each.form, **asdict(each.choice)}
            for each in rewritings(graph, *size, precision=precision, mode=mode)
        ],
        "node_macs": split.node_macs,
        "head_macs": split.head_macs,
        "skip_macs": sum(edge.all_macs for edge in split.edges if edge.skip),
        "node_params": split.node_params,
        "head_params": split.head_params,
        "levels": _levels(graph),
    }


def _edge(edge: EdgeCost, total: int) -> dict[str, Any]:
    values = asdict(edge)
    return values | {"all_macs": edge.all_macs, "share": edge.all_macs / total}


def _levels(graph: SkipGraph) -> dict[str, int]:
    return {node.name: node.level for node in graph.nodes}


def print_explanation(facts: dict[str, Any], console: Screen) -> None:
    """The edge table for people, with what the columns mean."""
    size, out = facts["input"], facts["output"]
    console.print(bold(facts["label"]), f" ({facts['variant']}), batch {facts['batch']}, {facts['precision']}")
    console.print(
        f"{size[0]}x{size[1]} -> {out[0]}x{out[1]}   {figures.text(facts['params'], 'count')} parameters   "
        f"{figures.text(facts['conv_macs'], 'macs')} per image   receptive field {facts['receptive_field']} px"
    )
    if facts["note"]:
        console.print(facts["note"], style="yellow")
    _print_edges(facts, console)
    nodes, heads = sum(facts["node_macs"].values()), facts["head_macs"]
    console.print(
        f"The rest: {figures.text(nodes, 'macs')} in the nodes' other convolutions, "
        f"{figures.text(heads, 'macs')} in the heads. Skips, with what they feed: "
        f"{facts['skip_macs'] / facts['conv_macs']:.1%} of all MACs."
    )
    for line in _legend(facts):
        console.print(line, style="dim")


def _print_edges(facts: dict[str, Any], console: Screen) -> None:
    """A row for each edge; rewritten forms where there are any."""
    forms = {each["edge"]: _forms(each) for each in facts["rewritings"]}
    rows = [
        (
            edge["source"],
            edge["target"],
            edge["scale"],
            edge["how"],
            f"{edge['in_channels']}>{edge['out_channels']}",
            figures.text(edge["params"] + edge["merge_params"], "count"),
            figures.text(edge["all_macs"], "count"),
            f"{edge['share']:.1%}",
            forms.get(f"{edge['source']}->{edge['target']}", ""),
            figures.text(edge["held_bytes"], "bytes"),
            f"{edge['held_steps']} step{'s' if edge['held_steps'] != 1 else ''}",
        )
        for edge in facts["edges"]
    ]
    shown = [at for at, column in enumerate(COLUMNS) if forms or column.title != "rewritten"]
    styles = ["" if edge["skip"] else "dim" for edge in facts["edges"]]
    console.table([COLUMNS[at] for at in shown], [[row[at] for at in shown] for row in rows], styles, "--json has them")


def _forms(rewriting: dict[str, Any]) -> str:
    """MACs of the form that runs, of the one that does not in brackets."""
    low, direct = (figures.text(rewriting[name], "count") for name in ("tap_macs", "direct_macs"))
    return f"{low} ({direct})" if rewriting["taken"] else f"{direct} ({low})"


def _legend(facts: dict[str, Any]) -> list[str]:
    lines = [
        "Dim rows are no skips: the encoder's own path and the map from the next deeper level.",
        "params and MACs: the edge's own convolutions and its slice of the convolution that it feeds.",
        "held: the source map; for: nodes from its making until this edge has read it"
        + (" (in training every map is kept until its backward pass)." if facts["mode"] == "training" else "."),
    ]
    if facts["rewritings"]:
        saved = sum(each["direct_macs"] - each["tap_macs"] for each in facts["rewritings"] if each["taken"])
        lines.append(
            "rewritten: MACs of the convolution over the up-sampled map as backend=rewritten runs it on a CPU, of "
            f"the other form in brackets; it saves {saved / facts['conv_macs']:.1%} of all MACs: `skipcost rewritings`"
        )
    if facts["variant"] == VARIANTS["unet3+"].title:
        deepest = max(facts["levels"].values())
        lines.append(
            f"In the paper's words x{{i}}_0 is X_En^{{i+1}} and x{{i}}_{{{deepest}-i}} is X_De^{{i+1}}: "
            f"x0_0 is X_En^1, x0_{deepest} is X_De^1."
        )
    return lines

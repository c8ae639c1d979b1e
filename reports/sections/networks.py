"""The context of the networks' section: for each variant its largest network, drawn and edge by edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from skipcost.bench import figures
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.places import explain
from skipcost.reports.data import REFERENCE_SKIP, Data, records
from skipcost.reports.drawings.timeline import memory_context
from skipcost.reports.drawings.topology import KINDS, draw, kind_of
from skipcost.reports.grid import Cell, Grid, number, words
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec


def networks_context(data: Data) -> dict[str, Any]:
    """The deepest and widest network of each variant: the papers' own skips open, the other schemes folded."""
    groups = []
    for variant in VARIANTS:
        largest = _largest(data, variant)
        if largest.empty:
            continue
        shown = [_network(data, row) for row in records(largest)]
        first = [each for each in shown if each["skip"] == REFERENCE_SKIP] or shown[:1]
        rest = [each for each in shown if each not in first]
        title, paper = VARIANTS[variant].title, VARIANTS[variant].paper
        groups.append({"title": title, "paper": paper, "networks": first, "others": rest})
    return {"groups": groups, "kinds": KINDS, "schemes": {name: scheme.title for name, scheme in SKIPS.items()}}


def _largest(data: Data, variant: str) -> pd.DataFrame:
    """The variant's deepest and widest network under every skip, of the main setting where it was measured there."""
    main = data.cells(None)
    own: pd.DataFrame = main if variant in set(main["variant"]) else data.frame
    own = own.loc[own["variant"] == variant]
    own = own.loc[own["depth"] == own["depth"].max()]
    own = own.loc[own["width"] == own["width"].max()]
    setting = min(own["setting"], default="")
    return own.loc[own["setting"] == setting]


def _network(data: Data, row: dict[str, Any]) -> dict[str, Any]:
    case, _ = data.cases[row["case_id"]]
    spec = ModelSpec.parse(row["label"])
    graph = replace(case, spec=spec).graph()
    facts = explain(spec, (case.height, case.width), case.batch, case.precision, case.mode)
    name = "net-" + "-".join(str(row[key]).replace("+", "p") for key in ("variant", "depth", "width", "skip"))
    return {
        "skip": row["skip"],
        "label": row["label"],
        "same_as": row["same_as"],
        "svg": draw(spec.graph(), facts, name),
        "table": _edges(facts, {edge.name: kind_of(edge) for edge in graph.edges}),
        "summary": _summary(facts, case),
        "note": facts["note"],
        "memory": memory_context(replace(case, spec=spec), name),
    }


def _summary(facts: dict[str, Any], case: Case) -> str:
    size = "{}x{} to {}x{} pixels".format(*facts["input"], *facts["output"])
    total = facts["conv_macs"]
    shares = {
        "the skips with what they feed": facts["skip_macs"],
        "the nodes' other convolutions": sum(facts["node_macs"].values()),
        "the heads": facts["head_macs"],
    }
    held = ", ".join(f"{name} {_percent(macs / total)}" for name, macs in shares.items())
    return (
        f"{size}, {figures.text(facts['params'], 'count')} parameters, {figures.text(total, 'macs')} per image, "
        f"receptive field {facts['receptive_field']} pixels. Of the MACs, {held}; the rest is the encoder's path and "
        f"the maps from the next deeper level. Bytes are for batch {case.batch} in {case.precision}."
    )


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 1e-3 or not share else f"{share:.2%}"  # noqa: PLR2004 - 0.0% would read as none


def _edges(facts: dict[str, Any], kinds: dict[str, str]) -> Grid:
    columns = (
        "from",
        "to",
        "scale",
        "how the map gets there",
        "channels",
        "parameters",
        "MACs",
        "share",
        "held",
        "steps",
    )
    rows = []
    for edge in facts["edges"]:
        kind = kinds.get(f"{edge['source']}->{edge['target']}", "path")
        rows.append((
            Cell(edge["source"], note=f"kind {kind}"),
            words(edge["target"]),
            words(edge["scale"]),
            words(edge["how"]),
            Cell(f"{edge['in_channels']}\u2192{edge['out_channels']}", float(edge["in_channels"])),
            number(edge["params"] + edge["merge_params"], "count"),
            number(edge["all_macs"], "macs"),
            Cell(f"{edge['share']:.1%}", edge["share"], note="bar"),
            number(edge["held_bytes"], "bytes"),
            Cell(str(edge["held_steps"]), float(edge["held_steps"])),
        ))  # fmt: skip
    return Grid(columns, tuple(rows))

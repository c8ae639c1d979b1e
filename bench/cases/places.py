"""Where the cost of a network is: every edge, node and head, as JSON values. Arithmetic alone; needs no torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from skipcost.kernels.devices import VALUE_BYTES
from skipcost.kernels.dispatch.low_resolution import rewritings
from skipcost.unet_models import VARIANTS, ModelSpec, SkipGraph
from skipcost.unet_models.costs import EdgeCost, costs
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import size_note


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

"""The section on the fused kernels: what decides where they run, what they need of a GPU, what they gained on one.

It is about the suite's code rather than about a store, so every report has it. Each table says where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from skipcost.bench.kernels.explain import explain
from skipcost.kernels.devices import device_named
from skipcost.kernels.dispatch.choose import CUDNN_SHARE, TRITON_SHARE
from skipcost.kernels.dispatch.winners import published
from skipcost.kernels.verify.baseline import stored_rows
from skipcost.reports.data import Data
from skipcost.reports.grid import Cell, Grid, number, whole, words
from skipcost.unet_models import VARIANTS

SIZE, BATCHES, PRECISION, WIDTH = (512, 512), (1, 8), "bf16", 64
CARD, TARGET = "h200", "sm_90"


def kernels_context(_data: Data) -> dict[str, Any]:
    """The break-even on one card, the resources of every kernel, and what was measured on cards."""
    measured = list(_measured())
    return {
        "card": device_named(CARD).name,
        "size": "x".join(map(str, SIZE)),
        "precision": PRECISION,
        "cudnn_share": f"{CUDNN_SHARE:.0%}",
        "triton_share": f"{TRITON_SHARE / CUDNN_SHARE:.0%}",
        "choices": _choices(tuple(VARIANTS)),
        "resources": _resources(),
        "target": TARGET,
        "measured": Grid(("card", "call", "runs on", "time", "times the best of PyTorch's", "from"), tuple(measured)),
    }


@cache
def _choices(variants: tuple[str, ...]) -> Grid:
    """Per variant and batch: how many calls would run on our kernels, and the sum of predicted times each way."""
    rows = []
    for variant in variants:
        for batch in BATCHES:
            facts = explain(f"{variant}/d4/w{WIDTH}/concat", batch, SIZE, "inference", PRECISION, device_named(CARD))
            ours = [call["where"] for call in facts["calls"] if call["implementation"] in ("triton", "tma")]
            seconds = facts["seconds"]
            rows.append(
                (
                    words(VARIANTS[variant].title),
                    whole(batch),
                    Cell(f"{len(ours)} of {len(facts['calls'])}", float(len(ours)), ", ".join(ours)),
                    *(number(seconds[way], "seconds") for way in ("reference", "cudnn", "chosen")),
                )
            )
    columns = ("network", "batch", "calls on our kernels", "eager", "norm folded into cuDNN", "as chosen")
    return Grid(columns, tuple(rows))


def _resources() -> Grid:
    rows = [row for row in stored_rows() if row["target"] == TARGET]
    newest = [row for row in rows if row["triton"] == rows[-1]["triton"]]
    columns = (
        "kernel", "warps", "registers", "spilled", "shared memory", "tensor-core instructions", "TMA", "cp.async",
        "instructions", "blocks per multiprocessor", "occupancy", "limited by",
    )  # fmt: skip
    return Grid(columns, tuple(_resource_row(row) for row in newest))


def _resource_row(row: dict[str, Any]) -> tuple[Cell, ...]:
    return (
        Cell(row["name"], note=f"Triton {row['triton']}"),
        whole(row["warps"]),
        whole(row["registers"]),
        number(row["spilled_bytes"], "bytes"),
        number(row["shared_bytes"], "bytes"),
        *(whole(row[name]) for name in ("tensor_core", "copy_engine", "async_copies", "instructions", "blocks")),
        Cell(f"{row['occupancy']:.0%}", row["occupancy"]),
        words(row["limit"]),
    )


def _measured() -> Iterator[tuple[Cell, ...]]:
    """Every call that was timed on a card, losses too; nothing where no card was to hand."""
    by_call: dict[tuple[str, str, str], dict[str, float]] = {}
    for timing in published():
        by_call.setdefault((timing.card, timing.call, timing.source), {})[timing.implementation] = timing.seconds
    for (card, call, source), seconds in sorted(by_call.items()):
        theirs = min((seconds[name] for name in ("reference", "cudnn") if name in seconds), default=None)
        for name, value in sorted(seconds.items(), key=lambda item: item[1]):
            ratio = Cell(f"{value / theirs:.2f}", value / theirs) if theirs else words("-")
            yield words(card), words(call), words(name), number(value, "seconds"), ratio, words(source)

"""Whole networks to be timed: in which of `ways.WAYS`, in which cases. Their rows go to the map of winners.

`stepping` makes, verifies and times them, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from skipcost.bench.kernels.cases import Setting
from skipcost.bench.kernels.jobs import Done, Job, Row
from skipcost.bench.measure.timing import Budget
from skipcost.kernels.backends import BACKENDS
from skipcost.kernels.ways import WAYS, case_name

PRECISIONS = {"inference": "bf16", "training": "amp-bf16"}
SLOW_WAYS = ("compile", "compile-max")  # take a minute and more to compile, the second several
QUICK_WAYS = tuple(way for way in WAYS if way not in SLOW_WAYS)
INFERENCE_ONLY = ("folded", "compile-max")  # folding and freezing take weights for constants
BACKEND_OF = {"folded": "eager", "compile-max": "compile"}  # what a way needs of the machine, if not what it is called
BUDGET = Budget(seconds=1.0, noise=0.005, least=10, warmup_seconds=2.0)


def why_not(way: str, device: str) -> str:
    """Say why a way cannot run on a device of this machine; empty where it can."""
    return BACKENDS[BACKEND_OF.get(way, way)].why_not(device)


def wanted(settings: Sequence[Setting], ways: Sequence[str]) -> list[Row]:
    """Return the rows, without numbers, of every network in each of these ways that there is in its mode."""
    return [
        {
            "network": each.spec.label,
            "case": case_name(each.batch, each.size, each.size, training=each.mode == "training"),
            "precision": PRECISIONS[each.mode],
            "implementation": way,
        }
        for each in settings
        for way in ways
        if each.mode == "inference" or way not in INFERENCE_ONLY
    ]


def make_jobs(rows: Sequence[Row], device: str, budget: Budget) -> list[Job]:
    """Make one job of all ways of a case."""
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["network"], row["case"]), []).append({"implementation": row["implementation"]})
    more = {"device": device, "budget": asdict(budget)}
    return [Job({"network": name, "case": case, **more}, tuple(each)) for (name, case), each in parts.items()]


def row_of(done: Done) -> Row:
    """Return the row of a part without its numbers, as `wanted` gave it."""
    network, case = done.what["network"], done.what["case"]
    precision = PRECISIONS[parse_case(case)[3]]
    return {"network": network, "case": case, "precision": precision, "implementation": done.part["implementation"]}


def parse_case(text: str) -> tuple[int, int, int, str]:
    """Read a name that `ways.case_name` gave, such as `n8 512x512 training`: batch, height, width, mode."""
    batch, size, mode = text.split()
    height, _, width = size.partition("x")
    return int(batch[1:]), int(height), int(width), mode

"""`skipcost plan`: what a sweep would run, worked out without measuring anything."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from skipcost.bench import figures
from skipcost.bench.cases.record import value_of
from skipcost.bench.console import Column, Screen
from skipcost.bench.errors import MachineError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.probe import probed_cpu, slow_words
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.memory.liveness import peak_bytes, why_not
from skipcost.bench.sweeps.driver import Server, request_for
from skipcost.bench.sweeps.plan import Plan, PlannedCase
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import size_note

MEMORY = ("peak_memory_predicted_bytes", "peak_memory_predicted_first_bytes")
OVERHEAD_S = 0.5  # a fork, building the network, its first calls
ARITHMETIC_S = 0.01  # counts and predictions of one case, on one core


def preview(plan: Plan, todo: list[PlannedCase], server: Server, tell: Callable[[], None]) -> dict[str, Any]:
    """Everything that `plan` shows, as JSON values."""
    limit = _memory_of(plan, server.environment)
    cases = []
    for planned in todo:
        cases.append(_preview_case(plan, planned, server, limit))
        tell()
    timed = sum(1 for each in todo if "latency_s" in each.metrics and not refusal_of(each.case))
    forked = sum(1 for each in todo if each.others)
    return {
        "sweep": plan.name,
        "description": plan.description,
        "planned": len(plan.cases),
        "cases": cases,
        "left_out": plan.left_out,
        "slow": slow_precisions(todo),
        "memory_limit_bytes": limit,
        "time_s": forked * OVERHEAD_S + len(todo) * ARITHMETIC_S + timed * plan.budget.seconds * 1.5,
    }


def slow_precisions(todo: list[PlannedCase]) -> list[str]:
    """A sentence for every precision that would be timed on a CPU without instructions for it; probes such a CPU.

    Where the probe fails, nothing is said: the case's rows will have the reason.
    """
    counts: Counter[tuple[int, str]] = Counter()
    for planned in todo:
        case, timed = planned.case, any(METRICS[name].unit == "seconds" for name in planned.metrics)
        if case.device == "cpu" and timed and case.precision.removeprefix("amp-") in ("bf16", "fp16"):
            counts[case.threads, case.precision] += 1
    sentences = []
    for (threads, precision), count in counts.items():
        with contextlib.suppress(MachineError):
            if said := slow_words(probed_cpu(threads), precision):
                cases = "1 case" if count == 1 else f"{count} cases"
                sentences.append(f"{cases} with precision={precision}: {said}")
    return sentences


def _memory_of(plan: Plan, environment: dict[str, Any]) -> int | None:
    """What a case may use: the sweep's own limit, else the first GPU's or the host's memory; None without a GPU."""
    if plan.cases[0].case.device != "cuda" or plan.limits.memory:
        return plan.limits.memory_bytes(environment["memory_bytes"])
    return int(environment["gpus"][0]["memory_bytes"]) if environment["gpus"] else None


def _preview_case(plan: Plan, planned: PlannedCase, server: Server, limit: int | None) -> dict[str, Any]:
    refusal = refusal_of(planned.case)
    facts: dict[str, Any] = {
        "label": planned.case.spec.label,
        "name": planned.case.name,
        "aliases": list(planned.aliases),
        "metrics": list(planned.metrics),
        "refused": refusal,
        "note": "",
        "predicted_bytes": None,
        "will_not_fit": False,
    }
    if refusal:
        return facts
    if planned.case.factory is None:
        facts["note"] = size_note(lower(planned.case.graph()), (planned.case.height, planned.case.width))
    if planned.case.factory is None and not why_not(planned.case):
        known: list[float] = [max(peak_bytes(planned.case))]
    else:
        asked = replace(planned, metrics=MEMORY if planned.case.mode == "training" else MEMORY[:1])
        results = list(server.run(request_for(plan, asked, server.environment)))
        facts["note"] = facts["note"] or results[0].note
        known = [peak for peak in map(value_of, results) if peak is not None]
    if known:
        facts |= {"predicted_bytes": int(max(known)), "will_not_fit": limit is not None and max(known) > limit}
    return facts


def print_preview(facts: dict[str, Any], console: Screen) -> None:
    """The plan for people: a line per case, then the sums and what is left out."""
    rows = []
    for case in facts["cases"]:
        remarks = [f"refused: {case['refused']}"] if case["refused"] else []
        remarks += ["will not fit"] if case["will_not_fit"] else []
        remarks += [case["note"]] if case["note"] else []
        remarks += [f"also {', '.join(case['aliases'])}"] if case["aliases"] else []
        peak, limit = case["predicted_bytes"], facts["memory_limit_bytes"]
        told = figures.apart(peak, limit, "bytes")[0] if case["will_not_fit"] else figures.text(peak, "bytes")
        rows.append((case["name"], told, "; ".join(remarks)))
    console.table((Column("network"), Column("predicted peak", right=True), Column("remarks", prose=True)), rows)
    for said in facts["slow"]:
        console.print(said)
    for text, reason in facts["left_out"].items():
        console.print(f"left out: {text}: {reason}")
    tight = sum(case["will_not_fit"] for case in facts["cases"])
    fits = f"{tight} predicted not to fit into {figures.text(facts['memory_limit_bytes'], 'bytes')}"
    if facts["memory_limit_bytes"] is None:
        fits = 'no GPU here to say what fits (set [limits] memory = "24GiB" in the sweep)'
    console.print(
        f"{len(facts['cases'])} of {facts['planned']} cases to run, {fits}, "
        f"about {figures.text(facts['time_s'], 'seconds')}"
    )

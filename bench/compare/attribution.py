"""Where a change of an exact number comes from: the operators, edges, nodes and heads in which two revisions differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.places import explain
from skipcost.bench.cases.record import Result
from skipcost.bench.compare.revisions import Revision
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.measure.process import finished

CHANGED = ("regressed", "improved")
MOST = 3  # places named in a verdict; the largest changes come first
EXPLAINED = 8  # cases for which the other revision is asked: a second each


def operators_that_differ(base: Result, now: Result) -> str:
    """Name the operators that one side dispatches more often."""
    return _told(_difference(base.detail.get("by_operator", {}), now.detail.get("by_operator", {})))


def places(case: Case, metric: str, facts: dict[str, Any]) -> dict[str, int]:
    """What `explain` says of one metric by place; they add up to the network's."""
    if metric == "params":
        split = {f"{e['source']}->{e['target']}": e["params"] + e["merge_params"] for e in facts["edges"]}
        return split | {"nodes": facts["node_params"], "heads": facts["head_params"]}
    split = {f"{e['source']}->{e['target']}": case.batch * e["all_macs"] for e in facts["edges"]}
    split |= {node: case.batch * macs for node, macs in facts["node_macs"].items()}
    return split | {"heads": case.batch * facts["head_macs"]}


def attribute(
    verdicts: Sequence[Verdict], results: tuple[dict[tuple[str, str], Result], ...], base: Revision
) -> list[Verdict]:
    """Fill in `why` for what changed. results: of the base and of this side, by (canonical JSON, metric)."""
    asked: dict[str, dict[str, Any] | None] = {}
    told = []
    for each in verdicts:
        key, why = (each.key, each.metric), ""
        if each.verdict in CHANGED and each.metric == "operators":
            why = operators_that_differ(results[0][key], results[1][key])
        elif each.verdict in CHANGED and each.metric in ("params", "conv_macs"):
            case = Case.from_json(each.key)
            if case.factory is None and each.key not in asked and len(asked) < EXPLAINED:
                asked[each.key] = _ask(base, case)
            before = asked.get(each.key)
            if before:
                after = explain(case.suite_spec, (case.height, case.width), case.batch, case.precision, case.mode)
                why = _told(_difference(places(case, each.metric, before), places(case, each.metric, after)))
        told.append(replace(each, why=why or each.why))
    return told


def _ask(base: Revision, case: Case) -> dict[str, Any] | None:
    """What `explain` of the other revision says of a case; None where it says nothing that can be read."""
    size = f"{case.height}x{case.width}"
    command = base.command("skipcost.bench", "explain", case.spec.label, "--size", size, "--json")
    done = finished(command, env=base.environment())
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        return None
    return facts


def _difference(base: dict[str, int], now: dict[str, int]) -> Counter[str]:
    return Counter({name: now.get(name, 0) - base.get(name, 0) for name in {**base, **now}})


def _told(difference: Counter[str]) -> str:
    changes = sorted((item for item in difference.items() if item[1]), key=lambda item: (-abs(item[1]), item[0]))
    words = [f"{name} {change:+,}" for name, change in changes[:MOST]]
    return ", ".join(words) + (f" and {len(changes) - MOST} more places" if len(changes) > MOST else "")

"""Where the numbers come from: the header's facts, environments, runs, and the rows themselves as data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from skipcost.bench import figures
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import Run
from skipcost.reports.data import AXES, Data, kinds_of_doubt, records
from skipcost.reports.grid import Cell, Grid, words

TEXTS = ("variant", "skip")  # of AXES; the others are numbers


def header_context(data: Data) -> dict[str, Any]:
    """What was measured, where, when, from which code, and what is doubtful about it."""
    facts = data.run.environment
    runs = [run for run in data.runs if run.fingerprint == data.run.fingerprint]
    networks = data.everything()["label"].nunique()
    torch = facts.get("versions", {}).get("torch", "unknown")
    return {
        "networks": networks,
        "labels": len({*data.frame["label"], *data.own["label"]}),
        "cases": len(data.results),
        "results": sum(len(results) for results in data.results.values()),
        "sweeps": ", ".join(sorted({run.sweep for run in runs})),
        "settings": list(data.settings.values()),
        "others": len({*data.frame["setting"], *data.own["setting"]}) - len(data.settings),
        "machine": machine(facts),
        "software": f"torch {torch}, Python {facts.get('python', 'unknown')}, {facts.get('system', 'unknown system')}",
        "first": _day(runs[0].started),
        "last": _day(runs[-1].started),
        "commit": str(facts.get("commit", "unknown"))[:12],
        "dirty": bool(facts.get("dirty")),
        "doubts": _doubts(data),
    }


def machine(facts: dict[str, Any]) -> str:
    """The machine in a line: its GPUs if torch sees them, else its processor."""
    gpus = Counter(gpu.get("name", "GPU") for gpu in facts.get("gpus", [])) if facts.get("cuda") else {}
    if gpus:
        sizes = {gpu.get("name"): gpu.get("memory_bytes", 0) for gpu in facts["gpus"]}
        return ", ".join(f"{count} x {name}, {figures.size(sizes[name])}" for name, count in sorted(gpus.items()))
    memory = figures.size(facts["memory_bytes"]) if "memory_bytes" in facts else "unknown"
    return f"{facts.get('cpu', 'unknown processor')}, {facts.get('cpus', '?')} CPUs, {memory} of memory"


def _day(started: str) -> str:
    return started[:16].replace("T", " ") + " UTC"


def _doubts(data: Data) -> list[str]:
    """Sentences for everything that should make a reader careful."""
    told = []
    odd = data.doubts()
    if odd:
        kinds = "; ".join(f"{count} {kind}" for kind, count in kinds_of_doubt([result for _, result in odd]))
        told.append(
            f"{_counted(data, odd)} carry a doubt ({kinds}). They are in the tables and figures, marked; no finding "
            "rests on them."
        )
    failed = Counter(result.outcome for _, result in data.failures())
    if failed:
        told.append("Not ok: " + ", ".join(f"{count} {name}" for name, count in sorted(failed.items())) + ".")
    if data.run.environment.get("dirty"):
        told.append(
            "The code had changes that were not committed, so the commit alone does not give these numbers back."
        )
    if data.other_rows:
        told.append(f"Left out: {_rows(data.other_rows)} of other environments, which cannot be compared.")
    if data.former_rows:
        told.append(f"Left out: {_rows(data.former_rows)} of models as they were before an edit.")
    return told


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _counted(data: Data, odd: list[tuple[str, Result]]) -> str:
    """How many numbers of each metric are doubtful, of those that there are: "23 of 99 latencies"."""
    doubtful = Counter(result.metric for _, result in odd)
    known = Counter(name for results in data.results.values() for name, result in results.items() if result.samples)
    return " and ".join(
        f"{doubtful[name]} of {known[name]} {_many(metric.title)}" for name, metric in METRICS.items() if doubtful[name]
    )


def _many(title: str) -> str:
    """A metric's title for many numbers of it."""
    if title.endswith("s"):
        return title
    return f"{title[:-1]}ies" if title.endswith("y") else f"numbers of {title}"


def provenance_context(data: Data) -> dict[str, Any]:
    """The environment in full, every run of the store, how to do it again, and all rows as data."""
    runs = Grid(
        ("run", "started (UTC)", "sweep", "seed", "environment", "commit"),
        tuple(_run_row(run, data.run.fingerprint) for run in data.runs),
    )
    sweeps = dict.fromkeys((run.sweep, run.seed) for run in data.runs if run.fingerprint == data.run.fingerprint)
    commands = [
        f"skipcost sweep {sweep} -o {data.store_name}" + (f" --seed {seed}" if seed else "") for sweep, seed in sweeps
    ]
    return {
        "facts": _flat(data.run.environment),
        "runs": runs,
        "commands": [*commands, f"skipcost report {data.store_name} -o report.html"],
        "raw": raw(data),
        "file": f"{data.store_name.rsplit('.', 1)[0]}.json",
    }


def _run_row(run: Run, current: str) -> tuple[Cell, ...]:
    commit = str(run.environment.get("commit", "unknown"))[:12] + (" + changes" if run.environment.get("dirty") else "")
    here = "this report" if run.fingerprint == current else "left out"
    return (
        Cell(str(run.run_id), float(run.run_id)), words(run.started.removesuffix("+00:00")), words(run.sweep),
        Cell(str(run.seed), float(run.seed)), words(f"{run.fingerprint} ({here})"), words(commit),
    )  # fmt: skip


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as lines `versions.torch: 2.13`."""
    lines: list[tuple[str, str]] = []
    for key, value in sorted(facts.items()):
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.") or [(prefix + key, "none")]
        elif isinstance(value, list):
            lines += [line for at, each in enumerate(value) for line in _flat({f"{key}.{at}": each}, prefix)] or [
                (prefix + key, "none")
            ]
        else:
            text = figures.size(value) if key.endswith("_bytes") else str(value)
            lines.append((prefix + key, text))
    return lines


def raw(data: Data) -> dict[str, Any]:
    """Every row of the environment in base units, with raw samples: what the report was made from.

    `choose.js` reads it, too: a case's label, its four axes where it is a network of the suite, and its setting.
    """
    rows = {row["case_id"]: row for row in records(data.everything())}
    scores = {label: score.mean for label, score in data.quality.scores.items()} if data.quality else {}
    return {
        "settings": data.settings,
        "scores": scores,
        "store": data.store_name,
        "environment": data.run.environment,
        "runs": [
            {"run_id": run.run_id, "started": run.started, "sweep": run.sweep, "seed": run.seed}
            for run in data.runs
            if run.fingerprint == data.run.fingerprint
        ],
        "cases": {
            case_id: {
                "name": data.cases[case_id][0].name,
                "definition": data.cases[case_id][0].to_json(),
                "aliases": data.cases[case_id][1],
                **_place(rows[case_id]),
                "results": {name: _compact(result) for name, result in sorted(data.results[case_id].items())},
            }
            for case_id in sorted(data.results)
        },
    }


def _place(row: dict[str, Any]) -> dict[str, Any]:
    """What tells a case from the others of its setting."""
    axes = {"axes": [row[name] if name in TEXTS else int(row[name]) for name in AXES]} if row["variant"] else {}
    return {"label": row["label"], "setting": row["setting"], **axes}


def _compact(result: Any) -> dict[str, Any]:
    """A result without what is empty, and without an outcome where it is ok."""
    outcome = "" if result.outcome == "ok" else result.outcome
    values = {"outcome": outcome, "samples": result.samples, "note": result.note, "detail": result.detail}
    return {name: value for name, value in values.items() if value}

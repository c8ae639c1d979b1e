"""What the answers of `skipcost fit` have in common: a network with its figures, and limits, as values and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.console import Column, Screen, bold
from skipcost.bench.fitting.limits import LIMITS, Limit, Limits, Standing

ALL = "--json has it"
DROPPED = {"sees": 2, LIMITS["params"].title: 1}  # where a terminal is narrow


def case_facts(case: Case) -> dict[str, Any]:
    """What all rows of an answer share: size, mode and what else changes a number."""
    shared = ("height", "width", "mode", "precision", "layout", "optimizer", "loss", "outputs")
    return {name: getattr(case, name) for name in shared}


def standing_facts(standing: Standing) -> dict[str, Any]:
    """A network with its figures, in base units, and the limits that it breaks."""
    case = standing.case
    facts: dict[str, Any] = {"label": case.spec.label, "backend": case.backend, "batch": case.batch}
    facts |= {LIMITS[name].key: _known(value) for name, value in standing.figures.items()}
    facts |= {f"{LIMITS[name].key}_middle": _known(value) for name, value in standing.middle.items()}
    return facts | {"breaks": list(standing.broken), "remark": standing.remark}


def _known(value: float) -> float | None:
    """None for a figure that nobody can tell: JSON has no infinity."""
    return None if math.isinf(value) else value


def limit_facts(limits: Limits) -> dict[str, Any]:
    """The limits, and where each figure comes from."""
    return {
        "limits": {LIMITS[name].key: value for name, value in limits.most.items()},
        "origins": {LIMITS[name].key: limits.source.origins[name] for name in limits.source.measures},
    }


def print_header(facts: dict[str, Any], console: Screen) -> None:
    """The question as it was understood, and where each figure comes from."""
    case = facts["case"]
    words = [f"{case['height']}x{case['width']}", case["mode"], case["precision"], case["layout"]]
    words += [case["optimizer"], case["loss"]] if case["mode"] == "training" else []
    console.print(bold(", ".join(words)), f"on {facts['device']}")
    units = {limit.key: limit for limit in LIMITS.values()}
    most = [f"{units[key].title} {units[key].text(value)}" for key, value in facts["limits"].items()]
    if most:
        console.print(f"at most: {', '.join(most)}")
    for key, origin in facts["origins"].items():
        console.print(f"  {units[key].title}: {origin}", style="dim")


def columns_of(facts: dict[str, Any]) -> list[Limit]:
    """The figures that an answer has."""
    return [limit for limit in LIMITS.values() if limit.key in facts["origins"]]


def cells(row: dict[str, Any], columns: Sequence[Limit], most: dict[str, float]) -> list[str]:
    """Label, with a backend other than eager, batch, and each figure in words, a middle one before the checked one.

    A figure that breaks its limit, of those in `most`, has as many digits as it takes to be seen to.
    """
    label = row["label"] if row["backend"] == "eager" else f"{row['label']}, {row['backend']}"
    cells = [label, str(row["batch"])]
    for limit in columns:
        value, middle = row.get(limit.key, math.nan), row.get(f"{limit.key}_middle")
        text = "unknown" if value is None else "not run" if math.isnan(value) else limit.text(value)
        if value is not None and value > most.get(limit.key, math.inf):
            text = limit.beside(value, most[limit.key])[0]
        cells.append(text if middle is None else f"{limit.text(middle)} ({text})")
    return cells


def fit_columns(*names: str) -> list[Column]:
    """Columns of an answer: texts left, figures right; the last one is for remarks."""
    last, texts = len(names) - 1, ("network", "nearest network", "")
    return [
        Column(name, right=name not in texts, prose=at == last and name == "", drop=DROPPED.get(name, 0))
        for at, name in enumerate(names)
    ]


def print_left_out(left_out: dict[str, str], console: Screen) -> None:
    """What could not be, counted by its reason."""
    reasons: dict[str, list[str]] = {}
    for text, reason in left_out.items():
        reasons.setdefault(reason, []).append(text)
    for reason, texts in reasons.items():
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        console.print(f"left out: {texts[0]}{more}: {reason}", style="dim")

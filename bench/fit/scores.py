"""Networks that somebody scored, as candidates of `skipcost fit`: rows of a CSV, joined by network, not by label."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from skipcost.bench.cases.case import SPEC_KEYS
from skipcost.bench.errors import BenchError
from skipcost.bench.fit.lattice import AXES, line_through
from skipcost.bench.fit.limits import LIMITS, Limits
from skipcost.bench.fit.search import Candidate
from skipcost.bench.store.scores import read_scores
from skipcost.unet_models import ModelSpec, SkipGraph


def scored_candidates(
    path: Path, axes: dict[str, tuple[Any, ...]], fixed: dict[str, Any], batch: int | None
) -> tuple[list[Candidate], dict[str, str]]:
    """The scored networks that the axes allow, each with its mean over all rows, and what is left out, with reasons.

    A network counts as one whatever label it has: scores of two labels of the same network are pooled. Axes that nobody
    set restrict nothing here, so that a scored network may have any width. BenchError where no row is usable.
    """
    pooled: dict[SkipGraph, tuple[ModelSpec, list[float]]] = {}
    left_out: dict[str, str] = {}
    for label, score in read_scores(path):
        try:
            spec = ModelSpec.parse(label)
        except ValueError as error:
            left_out[label] = str(error)
            continue
        pooled.setdefault(spec.graph(), (spec, []))[1].append(score)
    candidates = []
    for spec, scores in pooled.values():
        if forbidding := [key for key in axes if not _allowed(spec, key, axes[key])]:
            left_out[spec.label] = f"--set {', '.join(forbidding)} leaves this scored network out"
            continue
        try:
            line = line_through(spec, axes, fixed, batch)
        except ValueError as error:
            left_out[spec.label] = str(error)
            continue
        candidates.append(Candidate(line, (spec.width,), statistics.fmean(scores)))
    if not candidates:
        message = f"no score in {path} can be used: {'; '.join(f'{key}: {why}' for key, why in left_out.items())}"
        raise BenchError(message)
    return candidates, left_out


def too_much(candidates: list[Candidate], limits: Limits) -> dict[str, str]:
    """The scored networks that do not fit, with what each breaks: somebody will look for the best of them."""
    standings = [limits.standing(each.line.at(each.widths[0])) for each in candidates]
    return {
        f"{at.case.spec.label} with score {each.score:.4g}": f"breaks {', '.join(LIMITS[it].title for it in at.broken)}"
        for each, at in zip(candidates, standings, strict=True)
        if at.broken
    }


def _allowed(spec: ModelSpec, key: str, values: tuple[Any, ...]) -> bool:
    if values == AXES.get(key) or key not in SPEC_KEYS:
        return True
    return str(getattr(spec, key)).lower() in {str(value).lower() for value in values}

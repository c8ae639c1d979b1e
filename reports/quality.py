"""Quality scores that somebody measured elsewhere: a CSV of label, score and optionally seed, joined by label.

The suite trains nothing and judges no score; it lays the reader's own numbers over its costs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from skipcost.bench.errors import BenchError
from skipcost.unet_models import ModelSpec

ACCEPTED = ("label", "score", "seed")


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one network over its seeds."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Scores by canonical label, and the CSV's labels that the store does not know, as they were written."""

    name: str
    scores: dict[str, Score]
    unknown: tuple[str, ...]


def read_quality(path: Path, known: set[str]) -> Quality:
    """Read the CSV and sort its labels into those in `known` and the rest; BenchError in one sentence if it is bad."""
    samples: dict[str, list[float]] = {}
    unknown: set[str] = set()
    for label, score in _rows(path):
        name = _canonical(label)
        if name in known:
            samples.setdefault(name, []).append(score)
        else:
            unknown.add(label)
    scores = {
        label: Score(statistics.fmean(values), min(values), max(values), len(values))
        for label, values in sorted(samples.items())
    }
    return Quality(path.name, scores, tuple(sorted(unknown)))


def _rows(path: Path) -> list[tuple[str, float]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, ValueError) as error:  # ValueError: pandas' parser errors and bad encodings
        reason = getattr(error, "strerror", None) or str(error).strip()
        message = f"cannot read the quality scores in {path}: {reason}; give a CSV with the columns label,score[,seed]"
        raise BenchError(message) from None
    odd = [name for name in table.columns if name not in ACCEPTED]
    missing = [name for name in ACCEPTED[:2] if name not in table.columns]
    if odd or missing:
        message = (
            f"{path} has the columns {', '.join(map(str, table.columns))}; required: label and score, accepted "
            "besides: seed; name them in the first line"
        )
        raise BenchError(message)
    if table.empty:
        message = f"{path} has no scores: write one line label,score for each network and seed"
        raise BenchError(message)
    labels, scores = table["label"].tolist(), table["score"].tolist()
    return [
        (label, _number(text, path, line)) for line, (label, text) in enumerate(zip(labels, scores, strict=True), 2)
    ]


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        message = f"line {line} of {path} has the score {text!r}, which is not a number: write it as 0.873"
        raise BenchError(message)
    return value


def _canonical(label: str) -> str:
    """The label in the one form that the store has; as it is where it is no label."""
    try:
        return ModelSpec.parse(label).label
    except ValueError:
        return label

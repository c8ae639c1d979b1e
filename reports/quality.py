"""Quality scores that somebody measured elsewhere: a CSV of label, score and optionally seed, joined by label.

The suite trains nothing and judges no score; it lays the reader's own numbers over its costs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from skipcost.bench.store.scores import canonical, read_scores


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
    for label, score in read_scores(path):
        name = canonical(label)
        if name in known:
            samples.setdefault(name, []).append(score)
        else:
            unknown.add(label)
    scores = {
        label: Score(statistics.fmean(values), min(values), max(values), len(values))
        for label, values in sorted(samples.items())
    }
    return Quality(path.name, scores, tuple(sorted(unknown)))

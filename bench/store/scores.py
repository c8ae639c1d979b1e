"""Quality scores that somebody measured elsewhere, read from a CSV of label, score and optionally seed.

The suite trains nothing and judges no score. How scores are joined to networks is up to who asks: the report goes by
the store's labels, `fit` by the networks themselves.
"""

from __future__ import annotations

from pathlib import Path

from skipcost.bench.errors import BenchError
from skipcost.unet_models import ModelSpec

ACCEPTED = ("label", "score", "seed")


def read_scores(path: Path) -> list[tuple[str, float]]:
    """Labels as they were written, each with one score; BenchError in one sentence if the file is bad."""
    import pandas as pd  # noqa: PLC0415 - most of a second, which whoever reads no table does without

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


def canonical(label: str) -> str:
    """The label in the one form that the store has; as it is where it is no label."""
    try:
        return ModelSpec.parse(label).label
    except ValueError:
        return label

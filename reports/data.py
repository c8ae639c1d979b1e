"""What every section of the report reads: the newest environment's rows, one line per label, aliases spelt out.

Scores that somebody measured elsewhere are a CSV of label, score and optionally seed, joined by label; the suite trains
nothing and judges no score.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from skipcost.bench.cases.case import CASE_KEYS, CHOICES, FACTORY_KEYS, FLAT_NAMES, SPEC_KEYS, Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.cases.record import Result
from skipcost.bench.compare.verdicts import Verdict, read_json
from skipcost.bench.errors import StoreError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.scores import canonical, read_scores
from skipcost.bench.store.store import Run, open_store
from skipcost.bench.store.tables import COLUMNS, wide_table
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

AXES = ("variant", "depth", "width", "skip")
BASE = next(iter(VARIANTS))  # the variant that the others are compared with
REFERENCE_SKIP = next(iter(SKIPS))  # the papers' own
ADDED = ("case_id", "latency_q1", "latency_q3", "same_as", "setting")  # to the wide table's columns
SHOWN_FIELDS = ("image_height", "image_width", "batch", "mode", "precision")


@dataclass(frozen=True, slots=True)
class Cost:
    """A metric under a mode, in the words of a sentence. Mode None: the number does not depend on it."""

    metric: str
    mode: str | None
    word: str

    @property
    def origin(self) -> str:
        """counted, predicted or measured."""
        return METRICS[self.metric].origin.split()[0]

    @property
    def unit(self) -> str:
        """The key of its format."""
        return METRICS[self.metric].unit


COSTS = (
    Cost("params", None, "parameters"),
    Cost("conv_macs", None, "MACs"),
    Cost("latency_s", "inference", "latency"),
    Cost("latency_s", "training", "training step"),
    Cost("peak_memory_predicted_bytes", "inference", "memory"),
    Cost("peak_memory_predicted_bytes", "training", "training memory"),
    Cost("peak_memory_allocated_bytes", "inference", "allocated memory"),
    Cost("peak_memory_allocated_bytes", "training", "allocated training memory"),
)


@dataclass(frozen=True, slots=True)
class Data:
    """The newest environment of a store, of each user's own model as it was when it was asked for last.

    `frame` has one row per case and label (`same_as` is the label under which an alias was measured, else ""), in base
    units, with `setting`: everything but variant, depth, width and skip, in words. `latency_q1` and `latency_q3` are
    the quartiles of the raw samples. `sound` is the frame without the numbers that carry a doubt. `settings` are, by
    mode, those that most networks were measured under, `costs` those of COSTS that any of their rows has.
    `own` has the same columns for models of users' own: they have no variant, depth, width or skip, so that nothing
    which compares along these axes sees them.
    """

    store_name: str
    run: Run
    runs: tuple[Run, ...]
    other_rows: int
    former_rows: int
    cases: dict[str, tuple[Case, list[str]]]
    results: dict[str, dict[str, Result]]
    frame: pd.DataFrame
    own: pd.DataFrame
    sound: pd.DataFrame
    settings: dict[str, str]
    costs: tuple[Cost, ...]
    quality: Quality | None = None
    verdicts: tuple[Verdict, ...] = ()

    def cells(self, mode: str | None, *, sound: bool = False) -> pd.DataFrame:
        """The rows of the mode's main setting: at most one per variant, depth, width and skip."""
        frame = self.sound if sound else self.frame
        return frame[frame["setting"] == _setting_of(self.settings, mode)]

    def everything(self) -> pd.DataFrame:
        """Every measured network and model, each once."""
        rows = [rows[rows["same_as"] == ""] for rows in (self.frame, self.own) if len(rows)]
        return pd.concat([each.astype(object) for each in rows], ignore_index=True)

    def own_models(self, mode: str | None) -> pd.DataFrame:
        """Models of users' own that were measured under the mode's main setting."""
        return self.own[(self.own["setting"] == _setting_of(self.settings, mode)) & (self.own["same_as"] == "")]

    def points(self, mode: str | None) -> pd.DataFrame:
        """Networks of the mode's main setting and the own models beside them."""
        both = [rows for rows in (self.networks(mode), self.own_models(mode)) if len(rows)]
        return pd.concat(both, ignore_index=True) if len(both) > 1 else (both or [self.networks(mode)])[0]

    def networks(self, mode: str | None, *, sound: bool = False) -> pd.DataFrame:
        """The same without aliases: one row per network."""
        cells = self.cells(mode, sound=sound)
        return cells[cells["same_as"] == ""]

    def doubtful(self, cells: pd.DataFrame, metric: str) -> pd.Series[bool]:
        """Which of the cells have a number of this metric that carries a doubt."""
        odd = [_carries_doubt(self.results[case_id].get(metric)) for case_id in cells["case_id"]]
        return cells[metric].notna() & pd.Series(odd, index=cells.index, dtype=bool)

    def doubts(self) -> list[tuple[str, Result]]:
        """(case_id, result) of every number that carries a note."""
        return [(case_id, each) for case_id, each in self._listed() if each.outcome == "ok" and each.note]

    def failures(self) -> list[tuple[str, Result]]:
        """(case_id, result) of everything that is not ok."""
        return [(case_id, each) for case_id, each in self._listed() if each.outcome != "ok"]

    def _listed(self) -> list[tuple[str, Result]]:
        order = dict.fromkeys([*self.frame["case_id"], *self.own["case_id"]])
        return [(case_id, result) for case_id in order for result in self.results[case_id].values()]


def _setting_of(settings: dict[str, str], mode: str | None) -> str:
    """The setting of a mode; of inference, else training, where a number does not depend on it."""
    return settings.get(mode, "") if mode else next(iter(settings.values()), "")


def kinds_of_doubt(results: list[Result]) -> list[tuple[str, int]]:
    """The notes with their numbers blanked, each with how often it occurs, most frequent first."""
    parts = Counter(
        re.sub(r"\d+(\.\d+)?", "\u2026", part) for result in results for part in dict.fromkeys(result.note.split("; "))
    )
    return sorted(parts.items(), key=lambda item: (-item[1], item[0]))


def load(path: Path, scores: Path | None = None, verdicts: Sequence[Path] = ()) -> Data:
    """Read a store, and scores and files of verdicts if there are any; BenchError in one sentence for what is wrong."""
    with open_store(path) as store:
        run = store.newest()
        results = store.results(run.fingerprint)
        other_rows = sum(row.fingerprint != run.fingerprint for row in store.rows())
        former_rows = sum(row.fingerprint == run.fingerprint and row.case_id not in results for row in store.rows())
        if not results:
            message = (
                f"{path} holds no result of its newest environment yet: `skipcost sweep -o {path}` goes on with it"
            )
            raise StoreError(message)
        cases = {case_id: found for case_id, found in store.cases().items() if case_id in results}
        rows = _one_row_per_label(wide_table(store, run.fingerprint), cases, results)
        runs = tuple(store.runs())
    frame, own = _ordered([row for row in rows if row["variant"]]), _framed([row for row in rows if not row["variant"]])
    main = {mode: _main_setting(frame, mode) or _main_setting(own, mode) for mode in CHOICES["mode"]}
    settings = {mode: found for mode, found in main.items() if found}
    modes: list[str | None] = [None, *settings]
    held = {mode: [each[each["setting"] == _setting_of(settings, mode)] for each in (frame, own)] for mode in modes}
    costs = tuple(cost for cost in COSTS if any(rows[cost.metric].notna().any() for rows in held.get(cost.mode, ())))
    quality = read_quality(scores, {*frame["label"], *own["label"]}) if scores else None
    sound = _without_doubts(frame, results)
    told = tuple(each for given in verdicts for each in read_json(given))
    return Data(
        path.name, run, runs, other_rows, former_rows, cases, results, frame, own, sound, settings, costs, quality, told
    )


def _main_setting(frame: pd.DataFrame, mode: str) -> str:
    """The setting of a mode with the most rows, the first by name where several have as many."""
    counts = frame.loc[frame["mode"] == mode, "setting"].value_counts()
    return min((str(name) for name in counts.index[counts == counts.max()]), default="")


def _carries_doubt(result: Result | None) -> bool:
    return result is not None and result.outcome + result.note != "ok"


def _without_doubts(frame: pd.DataFrame, results: dict[str, dict[str, Result]]) -> pd.DataFrame:
    kept = frame.copy()
    for metric in METRICS:
        odd = {case_id for case_id, by in results.items() if _carries_doubt(by.get(metric))}
        kept.loc[kept["case_id"].isin(odd), metric] = float("nan")
    return kept


def _one_row_per_label(
    wide: pd.DataFrame, cases: dict[str, tuple[Case, list[str]]], results: dict[str, dict[str, Result]]
) -> list[dict[str, Any]]:
    """The rows of the wide table, those of aliases beside them; `variant` is None in those of users' own models."""
    rows = []
    for values in records(wide.reset_index()):
        case, aliases = cases[values["case_id"]]
        low, high = quartiles(results[values["case_id"]].get("latency_s"))
        shared = {**values, "latency_q1": low, "latency_q3": high}
        for label in (case.spec.label, *sorted(aliases)):
            spec = case.factory or ModelSpec.parse(label)
            fields_of = {name: getattr(spec, name, None) for name in SPEC_KEYS}
            same_as = "" if label == case.spec.label else case.spec.label
            rows.append({**shared, **fields_of, "label": label, "same_as": same_as, "setting": _setting(case, spec)})
    return rows


def _framed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=None if rows else [*COLUMNS, *ADDED])
    for name in METRICS:
        frame[name] = frame[name].astype("Float64").to_numpy(float, na_value=float("nan"))  # NA and None alike
    return frame


def _ordered(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The suite's networks in the order of their axes."""
    frame = _framed(rows)
    frame["setting"] = _with_cap(frame)
    by = [frame["variant"].map(list(VARIANTS).index), frame["skip"].map(list(SKIPS).index)]
    frame["variant_order"], frame["skip_order"] = by
    keys = ["variant_order", "depth", "width", "skip_order", "setting", "label"]
    return frame.sort_values(keys, kind="stable").reset_index(drop=True)


def _with_cap(frame: pd.DataFrame) -> pd.Series[str]:
    """The settings with their cap on channels: networks that are too narrow for it belong to the one there is."""
    settings = frame["setting"].copy()
    for name in sorted(set(settings)):
        here = frame[frame["setting"] == name]
        caps = sorted(set(here["max_width"].dropna()))
        for cap in caps:
            capped = here["max_width"] == cap
            free = here["max_width"].isna() & (here["width"] * 2 ** here["depth"] <= cap) & (len(caps) == 1)
            settings[here.index[capped | free]] = f"{name}, max_width={cap:.0f}"
    return settings


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def quartiles(result: Result | None) -> tuple[float, float]:
    """First and third quartile of the raw samples; NaN where there are fewer than two."""
    if result is None or len(result.samples) < 2:  # noqa: PLR2004 - a quartile takes two
        return float("nan"), float("nan")
    low, _, high = statistics.quantiles(result.samples, n=4, method="inclusive")
    return low, high


def _setting(case: Case, spec: ModelSpec | Factory) -> str:
    """Everything but the four axes, in words: what is always said, then what is not at its default.

    A user's own model that reads and returns what a network does has the network's setting: they stand side by side.
    """
    words = [f"{case.height}x{case.width} pixels", f"batch {case.batch}", case.mode, case.precision]
    defaults: dict[str, Any] = {FLAT_NAMES.get(each.name, each.name): each.default for each in fields(Case)}
    flat = case.flat()
    words += [
        f"{name}={flat[name]}"
        for name in CASE_KEYS
        if name not in SHOWN_FIELDS and name != "outputs" and flat[name] != defaults[name]
    ]
    if isinstance(spec, Factory):
        usual = ModelSpec()
        return ", ".join(words + [
            f"{name}={getattr(spec, name)}" for name in FACTORY_KEYS if getattr(spec, name) != getattr(usual, name)
        ])  # fmt: skip
    words += [part for part in spec.label.split("/")[4:] if not part.startswith("max_width=")]
    if spec.head != "single" and case.mode == "inference":
        words.append(f"outputs={case.outputs}")
    return ", ".join(words)


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

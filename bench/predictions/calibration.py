"""From measured latencies to a model of one device: what its MACs, bytes and passes cost, and how wrong that can be.

A step's time is a sum of costs, none below 0: seconds per MAC and per byte by kind of pass, per pass, and a constant.
They are fitted to the logarithm of measured over predicted, so that a network of a millisecond counts as much as one
of a second. The interval comes from networks that the fit did not see: folds by network, and the quantiles of measured
over predicted in them (split conformal prediction, Lei et al., JASA 2018, pooled over the folds). It holds for networks
like those measured, under their settings, on that machine; what lies elsewhere is refused. Needs no torch.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import value_of
from skipcost.bench.console import write_file
from skipcost.bench.decoding import check_fields, check_members, parse_json
from skipcost.bench.errors import BenchError
from skipcost.bench.store.store import Store
from skipcost.bench.time.passes import passes
from skipcost.kernels.devices import device_named

Array = NDArray[np.float64]
ROUNDS = 10  # of linearising the logarithm; it stands still after about five
TOLERANCE = 1e-10


def fit_costs(amounts: Array, seconds: Array) -> Array:
    """Costs c >= 0 that minimise the squares of log(seconds / (amounts @ c)): (rows, features), (rows,) -> (features,).

    Around a solution p the logarithm is linear: log(seconds / p) - (amounts @ c - p) / p, which is solved again and
    again, from the fit in relative error on.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 - a third of a second, which other commands do without

    scale = amounts.max(axis=0)
    scale[scale == 0] = 1.0  # a feature that no row has costs nothing
    scaled = amounts / scale
    costs, _ = nnls(scaled / seconds[:, None], np.ones(len(seconds)))
    for _ in range(ROUNDS):
        predicted = np.maximum(scaled @ costs, TOLERANCE)
        costs, _ = nnls(scaled / predicted[:, None], 1 + np.log(seconds / predicted))
    result: Array = costs / scale
    return result


def folds(groups: Sequence[str], count: int) -> Iterator[NDArray[np.bool_]]:
    """Yield, for each fold, which rows are held out: whole groups, shuffled once, so none is on both sides."""
    names = sorted(set(groups))
    random.Random(0).shuffle(names)  # noqa: S311 - an order, not a secret
    fold_of = {name: index % count for index, name in enumerate(names)}
    for fold in range(min(count, len(names))):
        yield np.array([fold_of[name] == fold for name in groups])


def ratio_quantiles(ratios: Array, coverage: float) -> tuple[float, float, float]:
    """Bounds that the next of n + 1 exchangeable ratios is between with at least `coverage`, and the median.

    Low, middle, high: the floor((n + 1) a)-th smallest and largest, a = (1 - coverage) / 2. ValueError where n is too
    small for that: no sample bounds what it has not seen.
    """
    ordered = np.sort(ratios)
    rank = math.floor((len(ordered) + 1) * (1 - coverage) / 2 + TOLERANCE)
    if rank < 1:
        least = math.ceil(2 / (1 - coverage) - 1 - TOLERANCE)
        message = f"{len(ordered)} ratios bound no {coverage:.0%}: it takes {least}"
        raise ValueError(message)
    return float(ordered[rank - 1]), float(np.median(ordered)), float(ordered[-rank])


def rank_correlation(left: Array, right: Array) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    from scipy.stats import spearmanr  # noqa: PLC0415 - likewise

    return float(spearmanr(left, right).statistic)


FORMAT, SCHEMA = "skipcost calibration", 1
FOLDER = Path("results/calibrations")
KINDS = {"device": str, "fingerprint": str, "store": str, "measured": str, "doubtful": int}  # of what its file holds
MODEL = {"setting": dict, "costs": dict, "coverage": float, "rows": int, "networks": int}

SETTING = ("device", "mode", "precision", "layout", "backend")  # and what of the following has a meaning with these
SETTING_OF = {"cpu": ("threads",), "cuda": ("cudnn_benchmark",), "training": ("optimizer", "loss"), "inference": ()}
MAC_FEATURES = {"convolution": "MACs of convolutions", "transposed convolution": "MACs of transposed convolutions"}
BYTE_FEATURES = {  # of a kind of pass; what is not here moves its maps element by element
    "convolution": "bytes of convolutions",
    "transposed convolution": "bytes of convolutions",
    "pool": "bytes of pooling",
    "up-sampling": "bytes of up-sampling",
    "merge": "bytes of merging",
    "gradient": "bytes of merging",
    "optimizer": "bytes of the optimizer",
}
ELEMENTWISE, PASSES, TENSORS, STEP = "bytes of element-wise passes", "passes", "parameter tensors updated", "a step"
FEATURES = tuple(dict.fromkeys([*MAC_FEATURES.values(), *BYTE_FEATURES.values(), ELEMENTWISE, PASSES, TENSORS, STEP]))
COVERAGE = 0.9  # of the interval, nominally
LEAST_ROWS, LEAST_NETWORKS, FOLDS = 20, 10, 10
BEYOND = 2.0  # times the MACs of the largest measured case, or a half of the smallest's: elsewhere

Row = tuple[Case, float]  # a case and its seconds


def setting_of(case: Case) -> dict[str, Any]:
    """What must be equal for one model to hold: everything that changes a time but network, size and batch."""
    return {name: getattr(case, name) for name in (*SETTING, *SETTING_OF[case.device], *SETTING_OF[case.mode])}


def features(case: Case) -> dict[str, float]:
    """How much a step does of what costs time, by FEATURES: MACs, bytes, passes and tensors. ValueError as `passes`."""
    amounts: dict[str, float] = dict.fromkeys(FEATURES, 0.0)
    for each in passes(case):
        if each.macs:
            amounts[MAC_FEATURES[each.kind]] += each.macs
        amounts[BYTE_FEATURES.get(each.kind, ELEMENTWISE)] += each.bytes
        amounts[PASSES] += 1
    if case.mode == "training":
        amounts[TENSORS] = sum(1 + conv.bias + 2 * (conv.norm != "none") for conv in case.graph().convs())
    amounts[STEP] = 1.0
    return amounts


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well networks were predicted that the fit had not seen; errors are |predicted / measured - 1|."""

    spearman: float
    mean_error: float
    worst_error: float
    within_tenth: float  # the share of rows with an error of at most 10 %


@dataclass(frozen=True, slots=True)
class Model:
    """The costs of a device under one setting, in seconds per unit of their feature.

    `ratios`: measured over predicted in held-out networks: the bounds that hold `coverage` of them, the median between.
    `macs`: the fewest and the most of the cases that it was fitted to.
    """

    setting: dict[str, Any]
    costs: dict[str, float]
    ratios: tuple[float, float, float]
    coverage: float
    macs: tuple[float, float]
    rows: int
    networks: int
    held_out: HeldOut

    def interval(self, case: Case) -> tuple[float, float, float]:
        """Low, middle and high seconds of a step. ValueError where the case is far from all that was measured."""
        amounts = features(case)
        macs = _macs(amounts)
        if not self.macs[0] / BEYOND <= macs <= self.macs[1] * BEYOND:
            message = (
                f"{case.name} has {macs:.3g} MACs, the calibration was measured from {self.macs[0]:.3g} to "
                f"{self.macs[1]:.3g}: it says nothing of that; sweep such networks and calibrate again"
            )
            raise ValueError(message)
        middle = sum(self.costs[name] * amounts[name] for name in self.costs)
        low, typical, high = self.ratios
        return middle * low, middle * typical, middle * high


@dataclass(frozen=True, slots=True)
class Calibration:
    """The models of one device, by setting, with the store and the environment that they were measured in."""

    device: str
    fingerprint: str
    store: str
    measured: str  # when the sweep's last run began: UTC, ISO 8601
    doubtful: int  # rows that carried a doubt and were left out
    models: tuple[Model, ...]

    def interval(self, case: Case) -> tuple[float, float, float]:
        """Low, middle and high seconds of one step of a case; low and high hold `coverage` of such networks.

        ValueError where no such setting was measured, or the case is far from all that was.
        """
        wanted = setting_of(case)
        for model in self.models:
            if model.setting == wanted:
                return model.interval(case)
        known = "; ".join(words_of(model.setting) for model in self.models)
        message = f"{self.device} is not calibrated for {words_of(wanted)}; it is for {known}"
        raise ValueError(message)


def words_of(setting: dict[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(str(value) if isinstance(value, str) else f"{name}={value}" for name, value in setting.items())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _macs(amounts: dict[str, float]) -> float:
    return sum(amounts[name] for name in MAC_FEATURES.values())


def fit_models(rows: Iterable[Row], doubtful: int = 0) -> tuple[Model, ...]:
    """A model for every setting with enough rows. BenchError in one sentence where none has.

    doubtful: how many rows were left out before, for that sentence.
    """
    by_setting: dict[tuple[tuple[str, Any], ...], list[Row]] = defaultdict(list)
    for case, seconds in rows:
        by_setting[tuple(setting_of(case).items())].append((case, seconds))
    refusals, models = [], []
    for setting, found in by_setting.items():
        networks = {case.spec.label for case, _ in found}
        if len(found) < LEAST_ROWS or len(networks) < LEAST_NETWORKS:
            size = f"{_count(len(found), 'row')} of {_count(len(networks), 'network')}"
            refusals.append(f"{words_of(dict(setting))}: {size}")
        else:
            models.append(fit_model(found))
    if not models:
        what = "; ".join(refusals) or "none with a latency and no doubt"
        left_out = f"; {_count(doubtful, 'row')} with a doubt left out" if doubtful else ""
        message = (
            f"too few measured rows to calibrate ({what}{left_out}): it takes {LEAST_ROWS} rows of "
            f"{LEAST_NETWORKS} networks under one setting; `skipcost sweep quick` measures enough"
        )
        raise BenchError(message)
    return tuple(models)


def fit_model(rows: list[Row]) -> Model:
    """Fit the rows of one setting, and judge the fit on networks that it has not seen."""
    amounts = [features(case) for case, _ in rows]
    matrix = np.array([[each[name] for name in FEATURES] for each in amounts])
    seconds = np.array([value for _, value in rows])
    networks = [case.spec.label for case, _ in rows]
    predicted = held_out_predictions(matrix, seconds, networks)
    errors = np.abs(predicted / seconds - 1)
    macs = [_macs(each) for each in amounts]
    return Model(
        setting=setting_of(rows[0][0]),
        costs=dict(zip(FEATURES, map(float, fit_costs(matrix, seconds)), strict=True)),
        ratios=ratio_quantiles(seconds / predicted, COVERAGE),
        coverage=COVERAGE,
        macs=(min(macs), max(macs)),
        rows=len(rows),
        networks=len(set(networks)),
        held_out=HeldOut(
            spearman=rank_correlation(predicted, seconds),
            mean_error=float(errors.mean()),
            worst_error=float(errors.max()),
            within_tenth=float((errors <= 0.1).mean()),  # noqa: PLR2004 - a tenth, as the field says
        ),
    )


def held_out_predictions(matrix: Array, seconds: Array, networks: list[str]) -> Array:
    """Seconds of every row by a fit to the rows of other networks: (rows, features), (rows,) -> (rows,)."""
    predicted = np.empty_like(seconds)
    for held in folds(networks, FOLDS):
        predicted[held] = matrix[held] @ fit_costs(matrix[~held], seconds[~held])
    return predicted


def calibrate(store: Store, name: str, device: str) -> Calibration:
    """Fit the newest environment's latencies on `device`: "cpu", "cuda", or "auto", which prefers a GPU's.

    Rows with a doubt are left out and counted. BenchError where too few are left.
    """
    run = store.newest()
    cases = store.cases()
    by_case = store.results(run.fingerprint)
    found = {key: results["latency_s"] for key, results in by_case.items() if "latency_s" in results}
    if device == "auto":
        device = "cuda" if any(cases[key][0].device == "cuda" and found[key].samples for key in found) else "cpu"
    ours = [(cases[key][0], result) for key, result in found.items() if cases[key][0].device == device]
    usable = [(case, result) for case, result in ours if result.samples and case.factory is None]
    timed = [(case, value_of(result)) for case, result in usable if result.outcome == "ok" and not result.note]
    sound = [(case, seconds) for case, seconds in timed if seconds]
    doubtful = len(usable) - len(sound)
    return Calibration(
        device=device_name(run.environment, device),
        fingerprint=run.fingerprint,
        store=name,
        measured=run.started,
        doubtful=doubtful,
        models=fit_models(sound, doubtful),
    )


def device_name(environment: dict[str, Any], device: str) -> str:
    """What a calibration calls the device that an environment's cases ran on."""
    gpus = environment.get("gpus") or [{"name": "a GPU that no driver named"}]
    return str(environment.get("cpu", "a CPU that nothing named") if device == "cpu" else gpus[0]["name"])


def file_of(device: str, folder: Path = FOLDER) -> Path:
    """Where a device's calibration is kept."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.casefold()).strip("-") + ".json")


def save_calibration(calibration: Calibration, path: Path, taken: Iterable[Path] = ()) -> None:
    """Write a calibration as JSON. BenchError where the place cannot be written, or is one of `taken`."""
    content = {"format": FORMAT, "schema": SCHEMA} | asdict(calibration)
    write_file(path, json.dumps(content, indent=1) + "\n", taken)


def load_calibration(device: str, folder: Path = FOLDER) -> Calibration | None:
    """The calibration of a device, or None where there is none.

    device: its name as the driver or the system gives it, a GPU's name in the table of devices, or the path of a file.
    BenchError where a file is no calibration.
    """
    if device.endswith(".json"):
        return read_calibration(Path(device))
    names = [device]
    try:
        known = device_named(device)
    except ValueError:
        pass  # a CPU, or a GPU that the table does not have: its file is named after it all the same
    else:
        names += [known.name, *known.driver_names]
    paths = (file_of(name, folder) for name in names)
    return next((read_calibration(path) for path in paths if path.is_file()), None)


def read_calibration(path: Path) -> Calibration:
    """Read what `save_calibration` wrote. BenchError in one sentence where it is something else."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT or content.pop("schema") != SCHEMA:
            message = f"it is not {FORMAT!r}, schema {SCHEMA}"
            raise ValueError(message)  # noqa: TRY301 - said below, with the path
        models = tuple(_model(**values) for values in content.pop("models"))
        check_fields(content, KINDS)
        return Calibration(**content, models=models)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not a calibration that can be read ({error}); `skipcost calibrate` makes one"
        raise BenchError(message) from None


def _model(ratios: list[float], macs: list[float], held_out: dict[str, float], **values: Any) -> Model:
    check_fields(values, MODEL)
    for name, each, kind in (("ratios", ratios, float), ("macs", macs, float), ("held_out", held_out, float)):
        check_members(name, each, kind)
    check_members("costs", values["costs"], float)
    low, middle, high = ratios
    least, most = macs
    if unknown := set(values["costs"]) - set(FEATURES):
        message = f"it has costs of {', '.join(sorted(unknown))}, which this version of skipcost does not know"
        raise ValueError(message)
    if not 0 < low <= middle <= high:
        message = f"its ratios {ratios} are not three numbers above 0 in order"
        raise ValueError(message)
    return Model(ratios=(low, middle, high), macs=(least, most), held_out=HeldOut(**held_out), **values)

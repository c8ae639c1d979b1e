"""The section on the reference line: measured over what the device's limits would take, per network and per layer.

A measured time below the line is no error: the line's terms say what passes it, and the section says where that was.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from skipcost.bench import figures
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result, value_of
from skipcost.bench.time.roofline import Bound, LayerBound, stored_bound
from skipcost.reports.compare import times
from skipcost.reports.data import REFERENCE_SKIP, Data, records
from skipcost.reports.grid import Cell, Grid, number, whole, words
from skipcost.unet_models import VARIANTS

NO_RATIO = Cell("\u2013", float("inf"))


@dataclass(frozen=True, slots=True)
class Measured:
    """A network with a reference line: its case, its results, and its line worked out again by layer."""

    case: Case
    results: dict[str, Result]
    line: Bound

    def seconds(self, metric: str) -> float | None:
        """A metric's value; None where there is none."""
        return value_of(self.results[metric]) if metric in self.results else None

    @property
    def doubtful(self) -> bool:
        """Whether the latency, or the line itself, carries a doubt."""
        both = (self.results[name] for name in ("latency_s", "roofline_s") if name in self.results)
        return any(each.outcome + each.note != "ok" for each in both)


def roofline_context(data: Data) -> dict[str, Any]:
    """Every network with a line and a latency, and layer by layer the largest of each variant that was timed so."""
    found = [
        Measured(data.cases[case_id][0], results, stored_bound(data.cases[case_id][0], results["roofline_s"]))
        for case_id, results in data.results.items()
        if "roofline_s" in results and results["roofline_s"].samples
    ]
    timed = [each for each in found if each.seconds("latency_s")]
    sound = [each for each in timed if not each.doubtful]
    ratios = [(each.seconds("latency_s") or 0.0) / each.line.seconds for each in sound]
    return {
        "limits": _limits(found),
        "networks": _networks(timed),
        "spread": (min(ratios), statistics.median(ratios), max(ratios)) if ratios else None,
        "sound": len(sound),
        "below": sum(ratio < 1 for ratio in ratios),
        "layers": [_layers(each) for each in _largest(data, found)],
        "lines": len(found),
    }


def _limits(found: list[Measured]) -> Grid:
    """The figures of each device that a line was worked out with, and where they come from."""
    known: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for each in found:
        result = each.results["roofline_s"]
        known[result.detail["device"], each.case.precision].append(result)
    rows = []
    for (device, precision), results in sorted(known.items()):
        rates, speeds = (
            [result.detail[name] for result in results] for name in ("flop_per_s", "bandwidth_bytes_per_s")
        )
        rows.append((
            words(device),
            words(precision),
            _range(rates, "flops"),
            _range(speeds, "bytes"),
            words(results[0].detail["sources"]["flop_per_s"]),
            words(results[0].detail["sources"]["bandwidth_bytes_per_s"]),
        ))  # fmt: skip
    return Grid(("device", "precision", "products", "memory", "products by", "memory by"), tuple(rows))


def _range(values: list[float], unit: str) -> Cell:
    """A rate, or the lowest and highest where a run was probed more than once."""
    text = [_rate(value, unit) for value in sorted({min(values), max(values)})]
    return Cell(" to ".join(dict.fromkeys(text)), min(values))


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e9:.3g} GFLOP/s" if unit == "flops" else f"{figures.text(value, 'bytes')}/s"


def _networks(timed: list[Measured]) -> Grid:
    """Measured beside both lines, sorted by network."""
    columns = (
        "network", "size", "batch", "mode", "precision", "backend",
        "measured", "reference line", "times the line", "convolutions alone", "times those",
    )  # fmt: skip
    rows = []
    for each in sorted(timed, key=lambda one: one.case.name):
        case, seconds = each.case, each.seconds("latency_s")
        rows.append((
            words(case.spec.label),
            Cell(f"{case.height}x{case.width}", float(case.height * case.width)),
            whole(case.batch), words(case.mode), words(case.precision), words(case.backend),
            number(seconds, "seconds", doubtful=each.doubtful),
            number(each.line.seconds, "seconds"), _ratio(seconds, each.line.seconds),
            number(each.line.fused_s, "seconds"), _ratio(seconds, each.line.fused_s),
        ))  # fmt: skip
    return Grid(columns, tuple(rows))


def _ratio(measured: float | None, line: float) -> Cell:
    return Cell(times(measured / line), measured / line) if measured and line else NO_RATIO


def _largest(data: Data, found: list[Measured]) -> list[Measured]:
    """Of each variant the deepest and widest network whose layers were timed, with the papers' skips if any has."""
    with_layers = {each.case.case_id: each for each in found if each.seconds("layers_s")}
    cells = data.frame[data.frame["case_id"].isin(with_layers) & (data.frame["same_as"] == "")]
    chosen = []
    for variant in VARIANTS:
        own = records(cells[cells["variant"] == variant])
        best = max(own, key=lambda row: (row["skip"] == REFERENCE_SKIP, row["depth"], row["width"]), default=None)
        chosen += [with_layers[best["case_id"]]] if best else []
    return chosen


def _layers(shown: Measured) -> dict[str, Any]:
    """One network: its passes added up by kind, and each."""
    measured: dict[str, float] = shown.results["layers_s"].detail["layers"]
    kinds: dict[str, list[LayerBound]] = defaultdict(list)
    for layer in shown.line.layers:
        kinds[layer.kind].append(layer)
    whole_step = sum(measured.values())
    shares = {kind: sum(measured[layer.name] for layer in layers) / whole_step for kind, layers in kinds.items()}
    by_kind = [
        (words(kind), whole(len(layers)), *_sums(layers, measured), Cell(f"{shares[kind]:.1%}", shares[kind]))
        for kind, layers in kinds.items()
    ]
    each = [(words(layer.name), *_sums([layer], measured), words(layer.limited_by)) for layer in shown.line.layers]
    heads = ("MACs", "bytes", "reference line", "measured", "times the line")
    return {
        "name": shown.case.name,
        "latency": figures.text(shown.seconds("latency_s"), "seconds"),
        "sum": figures.text(whole_step, "seconds"),
        "kinds": Grid(("passes", "how many", *heads, "share of the time"), tuple(by_kind)),
        "each": Grid(("pass", *heads, "limited by"), tuple(each)),
    }


def _sums(layers: list[LayerBound], measured: dict[str, float]) -> tuple[Cell, ...]:
    line, seconds = sum(layer.seconds for layer in layers), sum(measured[layer.name] for layer in layers)
    return (
        number(sum(layer.macs for layer in layers), "macs"),
        number(sum(layer.bytes for layer in layers), "bytes"),
        number(line, "seconds"),
        number(seconds, "seconds"),
        _ratio(seconds, line),
    )

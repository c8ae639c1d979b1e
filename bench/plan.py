"""From a sweep's file to the cases that it asks for: read, cross, leave out what cannot be, merge what is the same.

A sweep is TOML: a `description`, `[limits]`, `[timing]`, and one or more `[[grid]]`, each the cross product of its
lists. A grid's keys are the flat names of spec and case, `size` ("512" or "480x640") for both sides of the image,
`label` for whole networks, and `metrics`.
"""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from skipcost.bench.cases import CASE_KEYS, FLAT_NAMES, SPEC_KEYS, Case, usual_values
from skipcost.bench.cases import CHOICES as CASE_CHOICES
from skipcost.bench.errors import BenchError, SweepError
from skipcost.bench.metrics import METRICS, default_metrics
from skipcost.bench.units import parse_bytes, parse_size
from skipcost.kernels.timing import Budget, check_number
from skipcost.unet_models import ModelSpec, SkipGraph
from skipcost.unet_models.spec import CHOICES as SPEC_CHOICES
from skipcost.unet_models.spec import suggest

GRID_KEYS = (*SPEC_KEYS, *CASE_KEYS, "size", "label", "metrics")
TOP_KEYS = ("description", "limits", "timing", "grid")
_FIELDS = {flat: name for name, flat in FLAT_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a single case may take: seconds per process, and bytes (None: four fifths of the machine)."""

    case_seconds: float = 120.0
    memory: str | None = None

    def __post_init__(self) -> None:
        """Refuse a limit that is no length of time or no size, before anything runs under it."""
        check_number("case_seconds", self.case_seconds, above=0)
        if self.memory is not None:
            parse_bytes(self.memory)

    def memory_bytes(self, machine_bytes: int) -> int:
        """The limit in bytes."""
        return parse_bytes(self.memory) if self.memory else machine_bytes * 4 // 5


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """A case with the metrics to measure and the labels whose network is this same one."""

    case: Case
    metrics: tuple[str, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep would run, and what it leaves out, with the reason for each."""

    name: str
    description: str
    limits: Limits
    budget: Budget
    cases: tuple[PlannedCase, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def find_sweep(name: str) -> Path:
    """The file of a sweep: one of ours by name, or a path."""
    folder = Path(str(files("skipcost.bench") / "sweeps"))
    shipped = {path.stem: path for path in folder.glob("*.toml")}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise SweepError(suggest("sweep", name, sorted(shipped)) + ", or the path of a TOML file")


def load_plan(name: str, settings: dict[str, list[str]], device: str, threads: int) -> Plan:
    """Read a sweep and work out its cases for a device; `settings` override or add keys in every grid."""
    path = find_sweep(name)
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        message = f"{path} is not valid TOML: {error}"
        raise SweepError(message) from None
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read {path}: {error}"
        raise SweepError(message) from None
    try:
        return _plan(path.stem, content, settings, {"device": device, "threads": threads})
    except (ValueError, TypeError, BenchError) as error:
        message = f"{path}: {error}"
        raise SweepError(message) from None


def _plan(name: str, content: dict[str, Any], settings: dict[str, list[str]], machine: dict[str, Any]) -> Plan:
    _known_keys("the sweep", content, TOP_KEYS)
    grids = content.get("grid")
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        message = "a sweep needs at least one [[grid]] table, and nothing else under that name"
        raise ValueError(message)
    budget, limits = Budget(**content.get("timing", {})), Limits(**content.get("limits", {}))
    merged: dict[tuple[SkipGraph, str], PlannedCase] = {}
    left_out: dict[str, str] = {}
    for grid in grids:
        axes = {key: value if isinstance(value, list) else [value] for key, value in (grid | settings).items()}
        _check_axes(axes)
        asked = axes.pop("metrics", None)
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                case = make_case(chosen, machine)
            except ValueError as error:
                left_out[", ".join(f"{key}={value}" for key, value in chosen.items())] = str(error)
                continue
            _add(merged, case, tuple(asked) if asked else default_metrics(case))
    if not merged:
        message = f"no case is left: {next(iter(left_out.values()))}"
        raise ValueError(message)
    return Plan(name, content.get("description", ""), limits, budget, tuple(merged.values()), left_out)


def _add(merged: dict[tuple[SkipGraph, str], PlannedCase], case: Case, metrics: tuple[str, ...]) -> None:
    """Add a case, or its label and metrics to the case that has the same network and does the same with it."""
    graph = case.graph()
    key = (graph, replace(case, spec=ModelSpec(), outputs="all").to_json())
    known = merged.get(key)
    if known is None:
        merged[key] = PlannedCase(case, _in_order(metrics))
        return
    label = case.spec.label
    aliases = known.aliases if label in (known.case.spec.label, *known.aliases) else (*known.aliases, label)
    merged[key] = PlannedCase(known.case, _in_order({*known.metrics, *metrics}), aliases)


def _in_order(metrics: Any) -> tuple[str, ...]:
    return tuple(name for name in METRICS if name in metrics)


def make_case(chosen: dict[str, Any], machine: dict[str, Any]) -> Case:
    """Make one case from flat values; what is not said is usual for the device and the mode."""
    chosen = dict(chosen)
    spec = ModelSpec.parse(str(chosen.pop("label"))) if "label" in chosen else ModelSpec()
    spec = spec.with_fields(**{key: chosen.pop(key) for key in SPEC_KEYS if key in chosen})
    values = usual_values(
        chosen.pop("device", machine["device"]),
        chosen.pop("mode", "inference"),
        chosen.pop("threads", machine["threads"]),
    )
    if "size" in chosen:
        values["height"], values["width"] = parse_size(chosen.pop("size"))
    for key, value in chosen.items():
        values[_FIELDS.get(key, key)] = _number(key, value)
    return Case(spec=spec, **{key: _number(key, value) for key, value in values.items()})


def _number(key: str, value: Any) -> Any:
    """Turn the text of a command line into the number or truth value that the case wants."""
    if key in CASE_CHOICES or not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if value.isdigit() else value


def _check_axes(axes: dict[str, list[Any]]) -> None:
    """Refuse unknown keys and names here: only combinations of good values are left out case by case."""
    _known_keys("a grid", axes, GRID_KEYS)
    for key, values in axes.items():
        if not values:
            message = f"{key} is an empty list: give it a value, or leave the key out"
            raise ValueError(message)
        accepted = METRICS if key == "metrics" else (SPEC_CHOICES | CASE_CHOICES).get(key, ())
        for value in values if accepted else ():
            if value not in accepted and not (key == "upsample" and value == "none"):
                raise ValueError(suggest("metric" if key == "metrics" else key, value, accepted))


def _known_keys(where: str, table: dict[str, Any], accepted: tuple[str, ...]) -> None:
    for key in table:
        if key not in accepted:
            raise ValueError(suggest(f"key in {where}", key, accepted))

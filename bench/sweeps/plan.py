"""From a sweep's file to the cases that it asks for: read, cross, leave out what cannot be, merge what is the same.

A sweep is TOML: a `description`, `[limits]`, `[timing]`, and one or more `[[grid]]`, each the cross product of its
lists. A grid's keys are the flat names of spec and case, `size` ("512" or "480x640") for both sides of the image,
`label` for whole networks, and `metrics`. A `[[custom]]` is a model of a user's own: `factory`, its `arguments` and
`label`, and for the cross product `in_channels`, `classes` and what a grid says of a case.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from skipcost.bench.cases.case import CASE_KEYS, FACTORY_KEYS, FLAT_NAMES, SPEC_KEYS, Case, usual_values
from skipcost.bench.cases.case import CHOICES as CASE_CHOICES
from skipcost.bench.cases.factory import Factory, code_of
from skipcost.bench.errors import BenchError, SweepError
from skipcost.bench.measure.metrics import METRICS, default_metrics
from skipcost.bench.measure.timing import Budget, check_number
from skipcost.bench.units import parse_bytes, parse_size
from skipcost.unet_models import ModelSpec, SkipGraph
from skipcost.unet_models.spec import CHOICES as SPEC_CHOICES
from skipcost.unet_models.spec import suggest

GRID_KEYS = (*SPEC_KEYS, *CASE_KEYS, "size", "label", "metrics")
MODEL_KEYS = ("factory", "arguments", "label")
AXIS_KEYS = (*FACTORY_KEYS, *(key for key in CASE_KEYS if key != "outputs"), "size", "metrics")  # of a model
TOP_KEYS = ("description", "limits", "timing", "grid", "custom")
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

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """Of its metrics those that run nothing, and need no process of their own."""
        return tuple(name for name in self.metrics if METRICS[name].is_arithmetic(self.case))

    @property
    def others(self) -> tuple[str, ...]:
        """Of its metrics all but these."""
        return tuple(name for name in self.metrics if not METRICS[name].is_arithmetic(self.case))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep would run, and what it leaves out, with the reason for each."""

    name: str
    description: str
    limits: Limits
    budget: Budget
    cases: tuple[PlannedCase, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def shipped_sweeps() -> dict[str, Path]:
    """The sweeps that come with the package, by name."""
    folder = Path(str(files("skipcost.bench.sweeps")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_sweep(name: str) -> Path:
    """The file of a sweep: one of ours by name, or a path."""
    shipped = shipped_sweeps()
    if name in shipped:
        return shipped[name]
    if os.path.isfile(name):  # noqa: PTH113 - Path.is_file raises where a name is too long
        return Path(name)
    raise SweepError(suggest("sweep", name, list(shipped)) + ", or the path of a TOML file")


def load_plan(
    name: str | None, settings: dict[str, list[str]], device: str, threads: int, models: Sequence[str] = ()
) -> Plan:
    """Read a sweep and work out its cases for a device; `settings` override or add keys in every grid.

    `models` are paths of factories, each measured as every grid measures its networks; without a sweep, as `settings`
    say. SweepError where there is nothing to measure or a table cannot be understood.
    """
    if name is None and not models:
        message = "name a sweep (quick, ci, ... or a TOML file), or a model with --model package.module:factory"
        raise SweepError(message)
    where, content = _read(find_sweep(name)) if name is not None else (models[0].rpartition(":")[2], {})
    grids = content.get("grid", []) if name is not None else [{}]
    try:
        _known_keys("the sweep", content, TOP_KEYS)
        tables = {kind: _tables(kind, content) for kind in ("grid", "custom")}
        for model, grid in itertools.product(models, grids):
            tables["custom"].append({"factory": model} | {key: grid[key] for key in AXIS_KEYS if key in grid})
        return _plan(where, content, tables, settings, {"device": device, "threads": threads})
    except (ValueError, TypeError, BenchError) as error:
        message = f"{'--model' if name is None else name}: {error}"
        raise SweepError(message) from None


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """The name of a sweep and its file as tables."""
    try:
        return path.stem, tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        message = f"{path} is not valid TOML: {error}"
        raise SweepError(message) from None
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read {path}: {error}"
        raise SweepError(message) from None


def _tables(kind: str, content: dict[str, Any]) -> list[dict[str, Any]]:
    found = content.get(kind, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        message = f"a sweep needs at least one [[{kind}]] table, and nothing else under that name"
        raise ValueError(message)
    return list(found)


def _plan(
    name: str,
    content: dict[str, Any],
    tables: dict[str, list[dict[str, Any]]],
    settings: dict[str, list[str]],
    machine: dict[str, Any],
) -> Plan:
    if not any(tables.values()):
        message = "a sweep needs at least one [[grid]] table, or a [[custom]] one"
        raise ValueError(message)
    budget, limits = Budget(**content.get("timing", {})), Limits(**content.get("limits", {}))
    merged: dict[tuple[SkipGraph | Factory, str], PlannedCase] = {}
    left_out: dict[str, str] = {}
    for axes in [_axes(grid | settings) for grid in tables["grid"]] + _model_axes(tables["custom"], settings):
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
    _check_names(merged)
    return Plan(name, content.get("description", ""), limits, budget, tuple(merged.values()), left_out)


def _axes(grid: dict[str, Any]) -> dict[str, list[Any]]:
    """A grid's keys, each with a list of values."""
    axes = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    _known_keys("a grid", axes, GRID_KEYS)
    _check_axes(axes)
    return axes


def _model_axes(customs: list[dict[str, Any]], settings: dict[str, list[str]]) -> list[dict[str, list[Any]]]:
    """The same of each [[custom]] table, its factory first; settings of a spec do not concern it."""
    for table in customs:
        _known_keys("a [[custom]]", table, (*MODEL_KEYS, *AXIS_KEYS))
    found: list[dict[str, list[Any]]] = []
    codes: dict[str, str] = {}
    for table in customs:
        factory = Factory(
            table.get("factory", ""), json.dumps(table.get("arguments", {}), default=str), table.get("label", "")
        )
        codes[factory.path] = codes.get(factory.path) or code_of(factory.path)
        factory = replace(factory, code=codes[factory.path])
        axes = _axes({key: value for key, value in (table | settings).items() if key in AXIS_KEYS})
        found.append({"factory": [factory], **axes})
    return found


def _add(merged: dict[tuple[SkipGraph | Factory, str], PlannedCase], case: Case, metrics: tuple[str, ...]) -> None:
    """Add a case, or its label and metrics to the case that has the same network and does the same with it."""
    network = replace(case.factory, name="") if case.factory else case.graph()
    key = (network, replace(case, spec=ModelSpec(), outputs="all").to_json())
    known = merged.get(key)
    if known is None:
        merged[key] = PlannedCase(case, _in_order(metrics))
        return
    label = case.spec.label
    aliases = known.aliases if label in (known.case.spec.label, *known.aliases) else (*known.aliases, label)
    merged[key] = PlannedCase(known.case, _in_order({*known.metrics, *metrics}), aliases)


def _check_names(merged: dict[tuple[SkipGraph | Factory, str], PlannedCase]) -> None:
    """Refuse one label for two models: their rows could not be told apart."""
    called: dict[str, str] = {}
    models = [(planned, planned.case.factory.call) for planned in merged.values() if planned.case.factory]
    for planned, call in models:
        for label in (planned.case.spec.label, *planned.aliases):
            if called.setdefault(label, call) != call:
                message = f"label={label!r} is given to two models, {called[label]} and {call}: give each its own"
                raise ValueError(message)


def _in_order(metrics: Any) -> tuple[str, ...]:
    return tuple(name for name in METRICS if name in metrics)


def make_case(chosen: dict[str, Any], machine: dict[str, Any]) -> Case:
    """Make one case from flat values; what is not said is usual for the device and the mode."""
    chosen = dict(chosen)
    spec = _network(chosen)
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


def _network(chosen: dict[str, Any]) -> ModelSpec | Factory:
    """Take what defines the network out of the flat values."""
    if "factory" in chosen:
        own = {key: _number(key, chosen.pop(key)) for key in FACTORY_KEYS if key in chosen}
        factory: Factory = replace(chosen.pop("factory"), **own)
        return factory
    spec = ModelSpec.parse(str(chosen.pop("label"))) if "label" in chosen else ModelSpec()
    return spec.with_fields(**{key: chosen.pop(key) for key in SPEC_KEYS if key in chosen})


def _number(key: str, value: Any) -> Any:
    """Turn the text of a command line into the number or truth value that the case wants."""
    if key in CASE_CHOICES or not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if re.fullmatch("[0-9]{1,20}", value) else value


def _check_axes(axes: dict[str, list[Any]]) -> None:
    """Refuse unknown names here: only combinations of good values are left out case by case."""
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

"""`skipcost fit --equal`: every variant and skip scheme at the width where it costs the same as a given network.

Skip schemes compared at equal width differ in cost too; at equal cost they differ in the scheme alone. Widths are whole
numbers here, not multiples of 8, and what is left over is shown. Memory is that of live tensors, which is exact: what
an allocator adds does not grow evenly with the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from skipcost.bench import figures
from skipcost.bench.cases.case import SPEC_KEYS, Case
from skipcost.bench.console import Screen
from skipcost.bench.fitting.lattice import AXES, Line, lattice, read_axes
from skipcost.bench.fitting.limits import LIMITS, Limits, Source, Standing
from skipcost.bench.fitting.search import widest
from skipcost.bench.fitting.table import (
    ALL,
    case_facts,
    cells,
    columns_of,
    fit_columns,
    limit_facts,
    print_header,
    print_left_out,
    standing_facts,
)
from skipcost.bench.sweeps.plan import make_case
from skipcost.unet_models import VARIANTS, ModelSpec
from skipcost.unet_models.spec import MAX_CHANNELS

CROSSED = ("variant", "skip")  # what is crossed; all else is as in the given network


@dataclass(frozen=True, slots=True)
class Match:
    """The network of a line that is nearest in cost, and how far off it is, relative to the cost wanted."""

    standing: Standing
    off: float
    aliases: tuple[str, ...]


def match(line: Line, measure: Callable[[Case], float], wanted: float, source: Source) -> Match:
    """The network of a line whose figure is nearest to the one wanted; of two as near the narrower one."""

    def off(width: int) -> float:
        return measure(line.at(width)) / wanted - 1

    near = line.widths
    if not line.uneven:
        below = widest(line, line.widths, lambda case: measure(case) <= wanted)
        near = line.widths[max(below, 0) : below + 2]
    width = min(near, key=lambda each: abs(off(each)))
    return Match(Limits({}, source).standing(line.at(width)), off(width), line.labels(width))


def equal_facts(
    name: str, given: Case, fixed: dict[str, Any], settings: dict[str, list[str]], source: Source
) -> dict[str, Any]:
    """Everything that `fit --equal` shows, as JSON values: `given` and its matches in the figure `name` of LIMITS.

    ValueError where nobody can tell the figure of `given`.
    """
    wanted = source.measures[name](given)
    if math.isinf(wanted):
        raise ValueError(source.remark(given))
    choice = lattice(_axes(given.suite_spec, settings), fixed, given.batch)
    matches = [match(line, _growing(name, given, source), wanted, source) for line in choice.lines]
    unknown = [each.standing for each in matches if math.isinf(each.standing.figures[name])]
    return {
        "case": case_facts(given),
        **limit_facts(Limits({}, source)),
        "equal": LIMITS[name].key,
        "given": _facts(Match(Limits({}, source).standing(given), 0.0, ())),
        "left_out": choice.left_out | {each.case.spec.label: each.remark for each in unknown},
        "rows": [_facts(each) for each in matches if each.standing not in unknown],
    }


def _growing(name: str, given: Case, source: Source) -> Callable[[Case], float]:
    """The figure, made to grow with the width where it is unknown at both ends, as a calibrated latency is."""
    measure, macs = source.measures[name], source.measures["macs"]

    def figure(case: Case) -> float:
        value = measure(case)
        return 0.0 if math.isinf(value) and macs(case) < macs(given) else value

    return figure


def given_case(label: str, fixed: dict[str, Any]) -> Case:
    """The case of the network that the others are to equal; ValueError for a bad label."""
    return make_case(fixed | {"label": label}, {"device": fixed["device"], "threads": 1})


def _axes(spec: ModelSpec, settings: dict[str, list[str]]) -> dict[str, tuple[Any, ...]]:
    """Variant and skip scheme crossed, every width, the rest as in `spec`; what was set goes before."""
    own = {key: (getattr(spec, key),) for key in SPEC_KEYS if key not in (*CROSSED, "upsample")}
    if spec.upsample != VARIANTS[spec.variant].upsamples[0]:
        own["upsample"] = (spec.upsample,)  # a variant's own default does not stick to the others
    asked = {key: values for key, values in read_axes(settings).items() if key in settings}
    return {key: AXES[key] for key in CROSSED} | own | {"width": tuple(range(1, MAX_CHANNELS + 1))} | asked


def _facts(found: Match) -> dict[str, Any]:
    field = found.standing.case.graph().receptive_field()
    own = {"width": found.standing.case.suite_spec.width, "receptive_field": field}
    return standing_facts(found.standing) | own | {"off": found.off, "aliases": list(found.aliases)}


def print_equal(facts: dict[str, Any], console: Screen) -> None:
    """The given network, then each variant and skip scheme at its equal, with what is left over in percent."""
    print_header(facts, console)
    columns = columns_of(facts)
    title = next(limit.title for limit in columns if limit.key == facts["equal"])
    console.print(f"as much {title} as {facts['given']['label']}, nearest whole width")
    rows = []
    for row in (facts["given"], *facts["rows"]):
        also = f"also {', '.join(row['aliases'])}" if row["aliases"] else ""
        own = row is facts["given"]
        extra = [figures.text(row["receptive_field"], "pixels"), "given" if own else f"{row['off']:+.2%}", also]
        rows.append((*cells(row, columns, facts["limits"]), *extra))
    named = fit_columns("network", "batch", *[limit.title for limit in columns], "sees", "off", "")
    console.table(named, rows, ["bold", *[""] * len(facts["rows"])], ALL)
    print_left_out(facts["left_out"], console)

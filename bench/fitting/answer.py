"""The answers of `skipcost fit`, as JSON values and as tables: what fits, and what fits beside an nnU-Net plan.

Scores that somebody brings are rows of a CSV, joined by network, not by label.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skipcost.bench import figures
from skipcost.bench.cases.case import SPEC_KEYS
from skipcost.bench.console import Screen, bold, progress_bar
from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.lattice import AXES, SEARCHED_DEPTH, lattice, line_through, read_axes
from skipcost.bench.fitting.limits import LIMITS, Limits
from skipcost.bench.fitting.nnunet import CLASSES_UNKNOWN, Plan
from skipcost.bench.fitting.question import Question, check_limits
from skipcost.bench.fitting.search import Candidate, Found, ranked, refusal
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
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.store.scores import read_scores
from skipcost.bench.sweeps.plan import make_case
from skipcost.unet_models import ModelSpec, SkipGraph

BY_FIELD = "receptive field, then width (the widest network of each variant, skip scheme and depth)"
OUTSIDE, MORE_IMAGES, INSIDE = "the next wider", "one image more", "the widest that fits"


def answer(question: Question, quality: Path | None, top: int) -> dict[str, Any]:
    """The first `top` networks that fit, with everything that is shown of them; BenchError where nothing fits."""
    check_limits(question)
    axes = read_axes(question.settings)
    choice = lattice(axes, question.fixed, question.batch)
    scored, notes = scored_candidates(quality, axes, question.fixed, question.batch) if quality else ([], {})
    candidates = [*scored, *(Candidate(line, line.widths) for line in choice.lines)]
    rows = search(candidates, question.limits, top, search_batch=question.batch is None)
    order = f"mean score in {quality.name}; networks without one follow by {BY_FIELD}" if quality else BY_FIELD
    return {
        "device": question.target.title,
        "case": case_facts(candidates[0].line.first),
        **limit_facts(question.limits),
        "order": order,
        "chosen_from": choice.networks,
        "left_out": choice.left_out | notes | too_much(scored, question.limits),
        "rows": [row_facts(row) for row in rows],
    }


def search(candidates: Sequence[Candidate], limits: Limits, top: int, *, search_batch: bool) -> list[Found]:
    """Take the first `top` of the ranking, with a bar on stderr; BenchError where nothing fits."""
    with progress_bar() as progress:
        bar = progress.add_task("searching", total=len(candidates))

        def tell(looked_at: int, best: str) -> None:
            progress.update(bar, completed=looked_at, description=f"best so far {best}" if best else "nothing fits yet")

        rows = list(itertools.islice(ranked(candidates, limits, search_batch=search_batch, tell=tell), top))
        progress.update(bar, completed=len(candidates))
    if not rows:
        raise refusal(candidates, limits)
    return rows


def answer_plan(question: Question, plan: Plan, top: int) -> dict[str, Any]:
    """What a plan's network costs, and what else fits in the memory that it takes at its batch.

    The memory of `question` is replaced by the plan's; its settings go before the plan's norm, cap, channels, classes.
    """
    like = {"norm": plan.spec.norm, "max_width": plan.spec.max_width, "bias": plan.spec.bias}
    like |= {"in_channels": plan.spec.in_channels, "classes": plan.spec.classes}
    deep = {"depth": [f"1..{plan.spec.depth}"]} if plan.spec.depth > SEARCHED_DEPTH else {}
    settings = (
        deep | {key: [str(value).lower()] for key, value in like.items() if value is not None} | question.settings
    )
    spec = plan.spec.with_fields(**{key: settings[key][0] for key in ("in_channels", "classes") if key in settings})
    case = make_case(question.fixed | {"label": spec.label, "batch": plan.batch}, {"device": "", "threads": 1})
    if refusal := refusal_of(case):
        message = f"the plan's nearest network, {spec.label}, cannot run: {refusal}"
        raise BenchError(message)
    given = replace(question.limits, most={}).standing(case)
    limits = replace(question.limits, most=question.limits.most | {"memory": given.figures["memory"]})
    asked = replace(question, batch=plan.batch, settings=settings, limits=limits)
    told = [text for text in plan.differences if text != CLASSES_UNKNOWN or "classes" not in question.settings]
    own = asdict(plan) | {"spec": spec.label, "differences": told}
    own |= {"receptive_field": case.graph().receptive_field()}
    return {"plan": own, "given": standing_facts(given)} | answer(asked, None, top)


def row_facts(found: Found) -> dict[str, Any]:
    """A row of the answer with its border."""
    return standing_facts(found.here) | {
        "receptive_field": found.receptive_field,
        "score": found.score,
        "aliases": list(found.aliases),
        "inside": standing_facts(found.inside),
        "outside": standing_facts(found.outside) if found.outside else None,
        "one_image_more": standing_facts(found.more_images) if found.more_images else None,
    }


def print_plan(facts: dict[str, Any], console: Screen) -> None:
    """An nnU-Net plan: the nearest network and what it costs, what differs, then what else fits in its memory."""
    plan, given, columns = facts["plan"], facts["given"], columns_of(facts)
    console.print(
        bold(plan["name"]),
        f", nnU-Net's {plan['configuration']} configuration: {plan['batch']} patches of "
        f"{plan['height']}x{plan['width']}",
        sep="",
    )
    named = fit_columns("nearest network", "batch", *[limit.title for limit in columns], "sees")
    row = (*cells(given, columns, facts["limits"]), figures.text(plan["receptive_field"], "pixels"))
    console.table(named, [row], more=ALL)
    for text in plan["differences"]:
        console.print(f"  differs: {text}", style="dim")
    console.print()
    console.print("What else fits in the same memory, at the same batch:")
    print_rows(facts, console)


def print_rows(facts: dict[str, Any], console: Screen) -> None:
    """The ranked table: under each network, dim, what lies just outside and which limit that breaks."""
    print_header(facts, console)
    console.print(f"ranked by {facts['order']}; chosen from {facts['chosen_from']:,} networks")
    columns = columns_of(facts)
    named = fit_columns("", "network", "batch", *[limit.title for limit in columns], "sees", "score", "")
    table: list[tuple[tuple[str, ...], str]] = []
    for number, row in enumerate(facts["rows"], 1):
        extra = [figures.text(row["receptive_field"], "pixels"), "-" if row["score"] is None else f"{row['score']:.4g}"]
        also = f"also {', '.join(row['aliases'])}" if row["aliases"] else ""
        table.append(((str(number), *cells(row, columns, facts["limits"]), *extra, _joined(also, row["remark"])), ""))
        for title, other in _border(row):
            remark = _joined(f"{title}{_breaks(other)}", other["remark"])
            table.append((("", *cells(other, columns, facts["limits"]), "", "", remark), "dim"))
        if row["outside"] is None:
            table.append((("", "", "", *[""] * len(columns), "", "", "the widest to choose from"), "dim"))
    scored = any(row["score"] is not None for row in facts["rows"])
    shown = [at for at, column in enumerate(named) if scored or column.title != "score"]
    rows = [[row[at] for at in shown] for row, _ in table]
    console.table([named[at] for at in shown], rows, [style for _, style in table], ALL)
    print_left_out(facts["left_out"], console)


def _border(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    own = (row["label"], row["batch"])
    inside = row["inside"]
    rows = [] if inside["label"] == row["label"] else [(INSIDE, inside)]
    if row["outside"]:
        rows.append((OUTSIDE, row["outside"]))
    if row["one_image_more"] and (row["one_image_more"]["label"], row["one_image_more"]["batch"]) != own:
        rows.append((MORE_IMAGES, row["one_image_more"]))
    return rows


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _breaks(row: dict[str, Any]) -> str:
    return f": breaks {', '.join(LIMITS[name].title for name in row['breaks'])}" if row["breaks"] else ""


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

"""The answers of `skipcost fit`, as JSON values: the networks that fit, and what fits beside an nnU-Net plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skipcost.bench.console import progress_bar
from skipcost.bench.errors import BenchError
from skipcost.bench.fit.lattice import SEARCHED_DEPTH, lattice, read_axes
from skipcost.bench.fit.limits import Limits
from skipcost.bench.fit.nnunet import CLASSES_UNKNOWN, Plan
from skipcost.bench.fit.question import Question, check_limits
from skipcost.bench.fit.scores import scored_candidates, too_much
from skipcost.bench.fit.search import Candidate, Found, ranked, refusal
from skipcost.bench.fit.table import case_facts, limit_facts, row_facts, standing_facts
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.sweep.plan import make_case

BY_FIELD = "receptive field, then width (the widest network of each variant, skip scheme and depth)"


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

"""`skipcost fit`: the best networks that keep to limits on memory, latency, MACs and parameters.

The command alone. Its texts become a question in `question`, which also knows where figures come from; what there is to
choose from is `lattice`, the search `search`, what is said in the end `answer`.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from skipcost.bench.cases.case import CHOICES, usual_values
from skipcost.bench.console import JSON, OUT, number
from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.answer import answer, answer_plan, print_plan, print_rows
from skipcost.bench.fitting.equal import equal_facts, given_case, print_equal
from skipcost.bench.fitting.limits import LIMITS
from skipcost.bench.fitting.nnunet import Plan, read_plan
from skipcost.bench.fitting.question import Question, ask, equal_source, measuring, target_named
from skipcost.bench.units import MAX_BATCH
from skipcost.unet_models.spec import suggest

ROWS, MOST_ROWS = 10, 1000
MEMORY = Annotated[str | None, typer.Option(help="at most: 24GiB (2**30 bytes each) or 24GB (10**9)")]
LATENCY = Annotated[str | None, typer.Option(help="of one step, at most: 15ms, 0.2s")]
MACS = Annotated[str | None, typer.Option(help="of one image, forward, at most: 50G")]
PARAMS = Annotated[str | None, typer.Option(help="at most: 31M")]
MODE = Annotated[str | None, typer.Option(help=f"{', '.join(CHOICES['mode'])}; default inference")]
BATCH = Annotated[int | None, number("images in a step, without it the largest that fits", 1, MAX_BATCH)]
TARGET = Annotated[str | None, typer.Option("--device", help="a GPU (h100, t4, ...) or cpu; default: this machine's")]
CHOICE = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=v1,v2 or key=8..64: what to choose from (variant, skip, depth, width, norm, ...)"),
]
QUALITY = Annotated[Path | None, typer.Option(help="CSV of label,score[,seed]: rank by the mean score")]
MEASURE = Annotated[bool, typer.Option("--measure", help="time the best candidates on this machine, there and then")]
TOP = Annotated[int | None, number("how many networks to show, default 10", 1, MOST_ROWS)]
EQUAL = Annotated[
    str | None, typer.Option(help=f"{', '.join(LIMITS)}: the widths at which others cost what LABEL does")
]
NNUNET = Annotated[Path | None, typer.Option(help="an nnUNetPlans.json: what its network costs, what else fits")]
CONFIGURATION = Annotated[str | None, typer.Option(help="of the plan: a 2-D one; default 2d, or the only one")]
LABEL = Annotated[str | None, typer.Argument(help="with --equal: a network, e.g. unet/d4/w64/concat")]

BESIDE_EQUAL = ("size", "mode", "precision", "optimizer", "batch", "device", "set")
BESIDE_NNUNET = ("configuration", "params", "macs", "latency", "precision", "optimizer", "top", "device", "set")


def fit(
    label: LABEL = None,
    memory: MEMORY = None,
    latency: LATENCY = None,
    macs: MACS = None,
    params: PARAMS = None,
    size: Annotated[str | None, typer.Option(help="of the image: 512 (the default), or 480x640")] = None,
    mode: MODE = None,
    precision: Annotated[str | None, typer.Option(help=", ".join(CHOICES["precision"]))] = None,
    optimizer: Annotated[str | None, typer.Option(help=", ".join(CHOICES["optimizer"]))] = None,
    batch: BATCH = None,
    device: TARGET = None,
    settings: CHOICE = None,
    quality: QUALITY = None,
    measure: MEASURE = False,  # noqa: FBT002 - a flag of the command line
    equal: EQUAL = None,
    nnunet: NNUNET = None,
    configuration: CONFIGURATION = None,
    top: TOP = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Find the best networks that fit: variant, depth, width, skip scheme and batch under limits that you name."""
    texts = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    case = {"size": size, "mode": mode, "precision": precision, "optimizer": optimizer}
    others = {"batch": batch, "quality": quality, "measure": measure or None, "top": top, "equal": equal}
    others["configuration"] = configuration
    given = [name for name, value in (texts | case | others).items() if value is not None]
    rows = top or ROWS
    if nnunet:
        _refuse([*given, *(["LABEL"] if label else [])], "--nnunet", BESIDE_NNUNET)
        facts = _beside_plan(read_plan(nnunet, configuration), texts, case, device, settings, rows)
        show = print_plan
    elif equal is not None or label is not None:
        _refuse([name for name in given if name != "equal"], "--equal", BESIDE_EQUAL)
        facts = _equal(equal, label, ask({}, case, batch, device, settings))
        show = print_equal
    else:
        question = ask(texts, case, batch, device, settings)
        with measuring(question) if measure else nullcontext(question) as ready:
            facts = answer(ready, quality, rows)
        show = print_rows
    OUT.print_json(data=facts) if as_json else show(facts, OUT)


def _refuse(given: list[str], by: str, accepted: tuple[str, ...]) -> None:
    """Refuse what would do nothing beside another option."""
    idle = [name if name.isupper() else f"--{name}" for name in given if name not in accepted]
    if idle:
        message = f"{by} takes no {', '.join(idle)}: leave it out; accepted beside it: --{', --'.join(accepted)}"
        raise BenchError(message)


def _beside_plan(
    plan: Plan,
    texts: dict[str, str | None],
    case: dict[str, str | None],
    device: str | None,
    settings: list[str] | None,
    top: int,
) -> dict[str, Any]:
    """Put a plan as a question: nnU-Net trains with SGD, on a GPU in fp16 autocast."""
    trained: dict[str, str | None] = {"size": f"{plan.height}x{plan.width}", "mode": "training"}
    trained["optimizer"] = case["optimizer"] or "sgd"
    trained["precision"] = case["precision"] or ("amp-fp16" if target_named(device).device else None)
    return answer_plan(ask(texts, trained, plan.batch, device, settings), plan, top)


def _equal(name: str | None, label: str | None, question: Question) -> dict[str, Any]:
    if name is None or label is None:
        message = f"give both: --equal {'|'.join(LIMITS)} and a LABEL, e.g. --equal macs unet/d4/w64/concat"
        raise BenchError(message)
    if name not in LIMITS:
        raise BenchError(suggest("figure", name, LIMITS))
    usual = usual_values(question.target.kind, question.fixed["mode"], 1)["batch"]
    fixed = question.fixed | {"batch": question.batch or usual}
    try:
        given = given_case(label, fixed)
        facts = equal_facts(name, given, fixed, question.settings, equal_source(question, name))
    except ValueError as error:
        raise BenchError(str(error)) from None
    return {"device": question.target.title} | facts

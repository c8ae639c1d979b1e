"""The texts of `skipcost fit` as one question: the device, what all cases share, what to choose from, the limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from skipcost.bench.cases.case import CHOICES
from skipcost.bench.console import ERR, settings_of
from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.limits import LIMITS, Limits, Source
from skipcost.bench.fitting.sources import (
    Target,
    live_source,
    measured_source,
    precision_on,
    predicted_source,
    target_named,
)
from skipcost.bench.measure.environment import cpus
from skipcost.bench.sweeps.driver import Server
from skipcost.bench.sweeps.plan import make_case
from skipcost.bench.units import parse_size
from skipcost.unet_models.spec import suggest

USUAL = {"size": "512", "mode": "inference"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: the target, what all cases share (flat names), the batch if fixed, the axes, and the limits."""

    target: Target
    fixed: dict[str, Any]
    batch: int | None
    settings: dict[str, list[str]]
    limits: Limits


def ask(
    texts: dict[str, str | None],
    case: dict[str, str | None],
    batch: int | None,
    device: str | None,
    settings: list[str] | None,
) -> Question:
    """Put a question together from the command's texts; BenchError for what is not understood."""
    fixed: dict[str, Any] = USUAL | {key: value for key, value in case.items() if value is not None}
    for name, value in fixed.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise BenchError(suggest(name, value, CHOICES[name]))
    parse_size(fixed["size"])
    target = target_named(device)
    fixed |= {"device": target.kind, "threads": cpus() if target.device is None else 1}
    fixed["precision"] = precision_on(target, fixed["mode"], fixed.get("precision"))
    own = {"memory": float(target.device.memory_bytes)} if target.device else {}
    most = own | {name: LIMITS[name].read(text) for name, text in texts.items() if text is not None}
    if target.device and most["memory"] > own["memory"]:
        asked, has = LIMITS["memory"].beside(most["memory"], own["memory"])
        message = f"--memory {asked} is more than the {has} of {target.title}: leave it out, or name another --device"
        raise BenchError(message)
    like = make_case(fixed, {"device": target.kind, "threads": 1})
    return Question(target, fixed, batch, settings_of(settings), Limits(most, predicted_source(target, like)))


def check_limits(question: Question) -> None:
    """Refuse a question that limits nothing, or a latency that nobody can tell."""
    if not question.limits.most:
        message = (
            "nothing is limited: give --memory 24GiB, --latency 15ms, --macs 50G or --params 31M, "
            "or a GPU, whose memory is then the limit (--device h100)"
        )
        raise BenchError(message)
    if "latency" in question.limits.most and "latency" not in question.limits.source.measures:
        message = (
            f"times of {question.target.title} are not calibrated for {question.fixed['mode']} in "
            f"{question.fixed['precision']}, and a limit is never checked against a lower bound: add --measure on that "
            "machine to time networks there and then, or sweep on it and run `skipcost calibrate DB`"
        )
        raise BenchError(message)


@contextmanager
def measuring(question: Question) -> Iterator[Question]:
    """Yield the question with latencies measured here, at one batch; BenchError where the target is elsewhere."""
    if not question.target.here:
        message = f"--measure runs on this machine, and {question.target.title} is not its device: leave --device out"
        raise BenchError(message)
    with Server() as server:
        most_s = question.limits.most.get("latency", 0.0)
        source = measured_source(question.limits.source, question.target, server, most_s, _say_measuring)
        yield replace(question, batch=question.batch or 1, limits=replace(question.limits, source=source))


def _say_measuring(label: str) -> None:
    ERR.print(f"measuring {label}", style="dim")


def equal_source(question: Question, name: str) -> Source:
    """Figures that can be equalled: counted ones, live bytes, and a latency's calibrated middle if `name` is that.

    BenchError where latency is asked for and not calibrated.
    """
    source = live_source()
    if name != "latency":
        return source
    check_limits(replace(question, limits=replace(question.limits, most={"latency": 0.0})))
    predicted = question.limits.source
    return replace(
        source,
        measures={**source.measures, "latency": predicted.middle["latency"]},
        origins={**source.origins, "latency": f"predicted: the calibrated middle of a step on {question.target.title}"},
        remark=predicted.remark,
    )

"""The texts of `skipcost fit` as one question: the device, what all cases share, what to choose from, the limits.

First where figures come from on a device: memory by arithmetic, a time if somebody calibrated one. A `Target` is the
device that networks are to fit. With `--measure` networks are run there and then, one process per case, as a sweep
times them but for a shorter time; nothing goes into a store, and the limit is checked against the slow end, p99.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from skipcost.bench.cases.case import CHOICES, Case, usual_values
from skipcost.bench.cases.record import Result
from skipcost.bench.console import ERR, settings_of
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.fitting.limits import LIMITS, Limits, Source, counted
from skipcost.bench.measure.environment import cpu_name, cpus
from skipcost.bench.measure.gpu import describe_gpus
from skipcost.bench.measure.timing import Budget
from skipcost.bench.memory.liveness import Envelope, envelope, peak_bytes
from skipcost.bench.memory.on_gpu import predict
from skipcost.bench.memory.workspaces import Interval, context
from skipcost.bench.predictions.calibration import Calibration, load_calibration, setting_of
from skipcost.bench.sweeps.driver import Request, Server
from skipcost.bench.sweeps.plan import Limits as CaseLimits
from skipcost.bench.sweeps.plan import make_case
from skipcost.bench.units import parse_size
from skipcost.kernels.devices import Device, device_named
from skipcost.unet_models.spec import suggest

USUAL = {"size": "512", "mode": "inference"}
LIVE = (
    "predicted: peak of live tensor bytes, the larger of first and steady step, exact for PyTorch's eager mode; what "
    "the allocator and libraries take beyond them is not in it"
)
PROCESS = (
    "predicted: likely (upper end) of what the process takes, of which the upper end is checked: live tensors, the "
    "allocator's rounding and segments, the workspaces that cuDNN may try or tap-first needs, the CUDA context"
)
CALIBRATED = (
    "predicted: middle (upper end) of a step, of which the upper end is checked; {device} calibrated from {store}"
)
REMEMBERED = 1024  # predictions: a replay takes some ten milliseconds, and a row asks for each of its own several times
COUNTED = "counted (exact)"
BUDGET = Budget(seconds=1.0, noise=0.01, least=10, warmup_seconds=2.0)
PERCENTILE = 99
STEPS = 30  # more than the warm-up and the fewest samples take: a case within the limit has ended by then
STARTUP_S = 60.0  # building a network of a thousand million parameters takes some ten seconds


@dataclass(frozen=True, slots=True)
class Target:
    """The device to fit: a GPU of the table, or None for a CPU; `here` says that it is this machine's own."""

    device: Device | None
    here: bool

    @property
    def kind(self) -> str:
        """A case's device."""
        return "cuda" if self.device else "cpu"

    @property
    def title(self) -> str:
        """The device in words."""
        return self.device.name if self.device else "a CPU"


def target_named(text: str | None, gpus: Callable[[], list[dict[str, object]]] = describe_gpus) -> Target:
    """Find the device: cpu, a GPU's name in `devices.toml`, or, without a text, this machine's GPU, else its CPU."""
    own = [str(gpu["name"]) for gpu in gpus()]
    if text is None:
        return _own_target(own)
    if text.casefold() == "cpu":
        return Target(None, here=True)
    try:
        device = device_named(text)
    except ValueError as error:
        message = f"{error}, cpu"
        raise BenchError(message) from None
    return Target(device, here=bool(own) and own[0] in device.driver_names)


def _own_target(own: list[str]) -> Target:
    """This machine's first GPU, else its CPU."""
    if not own:
        return Target(None, here=True)
    try:
        return Target(device_named(own[0]), here=True)
    except ValueError:
        message = f"this machine's GPU, {own[0]!r}, is not in the table of devices: name one with --device, or cpu"
        raise BenchError(message) from None


def precision_on(target: Target, mode: str, asked: str | None) -> str:
    """The precision asked for, else the usual one on the device; BenchError where it has no units for what is asked.

    Cards before Ampere multiply fp16 but not bf16: there the usual precision is the one of them that exists.
    """
    usual: str = usual_values(target.kind, mode, 1)["precision"]
    if target.device and "bf16" not in target.device.flop_per_s:
        usual = usual.replace("bf16", "fp16")
    if target.device:
        try:
            target.device.rate(asked or usual)
        except ValueError as error:
            message = f"--precision {asked or usual} cannot run: {error}"
            raise BenchError(message) from None
    return asked or usual


@dataclass(frozen=True, slots=True)
class Raised:
    """Peak bytes that lie a constant above those of live tensors."""

    live: Envelope
    by: int

    def peak(self, batch: int) -> int:
        """Bytes at a batch."""
        return self.live.peak(batch) + self.by

    def largest_batch(self, limit_bytes: int) -> int:
        """The largest batch whose peak is within the limit; 0 where not even one image is."""
        return self.live.largest_batch(limit_bytes - self.by)


def predicted_source(target: Target, like: Case) -> Source:
    """The figures that need no run: on a CPU memory is live bytes, on a GPU the upper end of what a process takes.

    Latency is among them where the target is calibrated for the setting of `like`.
    """
    source = _gpu_source(target.device) if target.device else live_source()
    calibration = load_calibration(target.device.name if target.device else cpu_name())
    if calibration is None or all(model.setting != setting_of(like) for model in calibration.models):
        return source
    memory = source.measures["memory"]
    return replace(
        source,
        measures=counted() | {"latency": lambda case: _seconds(calibration, case)[2], "memory": memory},
        middle={**source.middle, "latency": lambda case: _seconds(calibration, case)[1]},
        origins={**source.origins, "latency": CALIBRATED.format(device=calibration.device, store=calibration.store)},
        even=False,
        remark=lambda case: _why_unknown(calibration, case),
    )


def live_source() -> Source:
    """Counted figures, and bytes of live tensors, which are exact on any device."""
    return Source(
        measures=counted() | {"memory": lambda case: max(peak_bytes(case))},
        origins={"params": COUNTED, "macs": COUNTED, "memory": LIVE},
        floor=envelope,
    )


def _gpu_source(device: Device) -> Source:
    taken = lru_cache(REMEMBERED)(lambda case: process_bytes(case, device))
    return Source(
        measures=counted() | {"memory": lambda case: taken(case).high},
        middle={"memory": lambda case: taken(case).likely},
        origins={"params": COUNTED, "macs": COUNTED, "memory": PROCESS},
        floor=lambda case: Raised(envelope(case), context().low),
        even=False,
    )


def _seconds(calibration: Calibration, case: Case) -> tuple[float, float, float]:
    """Low, middle and high seconds; infinite where the calibration says nothing of such a case."""
    try:
        return calibration.interval(case)
    except ValueError:
        return math.inf, math.inf, math.inf


def _why_unknown(calibration: Calibration, case: Case) -> str:
    try:
        calibration.interval(case)
    except ValueError as error:
        return str(error)
    return ""


def process_bytes(case: Case, device: Device) -> Interval:
    """What a process holds at its fullest, in the first step or a later one: the allocator's segments, the context."""
    predicted = predict(case, device)
    fullest = predicted.first.reserved | predicted.steady.reserved
    return fullest + context()


def percentile(samples: tuple[float, ...], percent: int) -> float:
    """The smallest sample that at least `percent` in a hundred do not exceed; of fewer than 100 the largest is p99."""
    ordered = sorted(samples)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


@dataclass(slots=True)
class Stopwatch:
    """Times cases on the server and remembers what it timed for as long as the command runs.

    `most_s` is the limit; a case that has not ended long after it could have is over it. `tell` hears of each case.
    """

    run: Callable[[Request], list[Result]]
    memory_bytes: int | None
    most_s: float
    tell: Callable[[str], None]
    known: dict[str, Result] = field(default_factory=dict)

    def result(self, case: Case) -> Result:
        """The case's latency; measured once."""
        if case.case_id not in self.known:
            self.tell(case.spec.label)
            seconds = STARTUP_S + STEPS * self.most_s
            request = Request(case, ("latency_s",), asdict(BUDGET), seconds, self.memory_bytes)
            (self.known[case.case_id],) = self.run(request)
        result = self.known[case.case_id]
        if result.outcome == "unsupported":
            message = f"{case.name} cannot be measured here: {result.note}"
            raise BenchError(message)
        return result

    def p99(self, case: Case) -> float:
        """Seconds that 99 of 100 steps stay within; infinite where the case did not run to its end."""
        samples = self.result(case).samples
        return percentile(samples, PERCENTILE) if samples else math.inf

    def median(self, case: Case) -> float:
        """The median step in seconds."""
        samples = self.result(case).samples
        return statistics.median(samples) if samples else math.inf

    def remark(self, case: Case) -> str:
        """What makes the case's latency doubtful, or why there is none; empty where it was not asked for."""
        known = self.known.get(case.case_id)
        if known is None:
            return ""
        said = f"{known.outcome}: {known.note}" if known.outcome != "ok" else known.note
        return "; ".join(each for each in (f"{len(known.samples)} steps timed" if known.samples else "", said) if each)


def measured_source(
    source: Source, target: Target, server: Server, most_s: float, tell: Callable[[str], None]
) -> Source:
    """The source with latencies measured on this machine; `most_s` is the limit, 0 where there is none.

    MachineError where torch cannot use the target here.
    """
    if target.device and not server.environment["cuda"]:
        message = f"this machine has {target.title}, but torch sees no CUDA device: install a CUDA build of torch"
        raise MachineError(message)
    memory = None if target.device else CaseLimits().memory_bytes(server.environment["memory_bytes"])
    watch = Stopwatch(lambda request: list(server.run(request)), memory, most_s, tell)
    origin = (
        f"measured here: median (p99), {BUDGET.seconds:g} s of steps per network; the limit is checked against p99, "
        "which of fewer than 100 steps is the slowest"
    )
    return replace(
        source,
        measures={**source.measures, "latency": watch.p99},
        origins={**source.origins, "latency": origin},
        by_running=("latency",),
        middle={"latency": watch.median},
        remark=watch.remark,
    )


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

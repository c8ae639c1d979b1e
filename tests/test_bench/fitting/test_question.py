"""Where the figures of `fit` come from: bounds that hold, devices by name, calibrated and measured times."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.fitting import question as fit_source
from skipcost.bench.fitting.limits import LIMITS
from skipcost.bench.fitting.question import (
    Stopwatch,
    Target,
    live_source,
    measured_source,
    percentile,
    precision_on,
    predicted_source,
    process_bytes,
    target_named,
)
from skipcost.bench.memory.liveness import peak_bytes
from skipcost.bench.memory.workspaces import context
from skipcost.bench.predictions.calibration import Calibration, HeldOut, Model, setting_of
from skipcost.bench.sweeps.driver import Request
from skipcost.kernels.devices import device_named, devices
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

WIDTHS = (*range(1, 18), 24, 31, 32, 33, 64, 128)


def gpu_case(**values: Any) -> Case:
    """A small case on a GPU."""
    spec = ModelSpec(depth=values.pop("depth", 2), width=values.pop("width", 8), variant=values.pop("variant", "unet"))
    usual = {"height": 64, "width": 64, "precision": "bf16", "layout": "channels_last", "device": "cuda"}
    return Case(spec=spec, **(usual | {"width": 64} | values))


@pytest.mark.parametrize(("variant", "skip"), list(itertools.product(VARIANTS, SKIPS)))
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_live_bytes_never_fall_with_the_width(variant: str, skip: str, mode: str) -> None:
    """So a line of networks can be bisected by them: every width up to 17, and some beyond, for two layouts."""
    for layout, precision in (("contiguous", "fp32"), ("channels_last", "amp-bf16")):
        specs = (ModelSpec(variant=variant, skip=skip, depth=2, width=width) for width in WIDTHS)
        cases = [Case(spec, 2, 40, 40, mode, precision, layout) for spec in specs]

        bytes_of = [live_source().measures["memory"](case) for case in cases]

        assert bytes_of == sorted(bytes_of)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_floor_of_a_cpu_is_the_figure_itself(mode: str, batch: int) -> None:
    """What prunes and what is checked are the same live bytes, of the worse of the first and the steady step."""
    case = Case(ModelSpec(depth=2, width=8), batch, 40, 40, mode)
    source = live_source()

    assert source.floor(case).peak(batch) == source.measures["memory"](case) == max(peak_bytes(case))
    assert source.even


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("mode", "precision"), [("inference", "bf16"), ("training", "amp-bf16"), ("training", "fp32")])
def test_on_a_gpu_floor_likely_and_upper_end_are_in_order(variant: str, mode: str, precision: str) -> None:
    """The floor leaves nothing out that the upper end would let pass; the middle figure lies between the two."""
    source = predicted_source(Target(device_named("t4"), here=False), gpu_case())

    for width, batch in itertools.product((3, 8, 40), (1, 4)):
        case = gpu_case(variant=variant, mode=mode, precision=precision, batch=batch, depth=3)
        case = case.with_spec(case.suite_spec.with_fields(width=width))
        floor, upper = source.floor(case).peak(batch), source.measures["memory"](case)
        assert floor <= source.middle["memory"](case) <= upper
        assert source.floor(case).largest_batch(floor) == batch
    assert not source.even


def test_what_a_process_takes_holds_the_live_bytes_and_the_context() -> None:
    """The upper end is at least live bytes and the whole context, in training as at inference."""
    for mode in ("inference", "training"):
        case = gpu_case(mode=mode)

        taken = process_bytes(case, device_named("h100"))

        assert taken.low >= max(peak_bytes(case)) + context().low
        assert taken.high >= max(peak_bytes(case)) + context().high


@pytest.mark.parametrize("name", devices())
def test_every_gpu_of_the_table_is_a_target(name: str) -> None:
    """A short name is accepted, and the target is here only where the driver says so."""
    device = device_named(name)

    assert target_named(name, list) == Target(device, here=False)
    assert target_named(name, lambda: [{"name": device.driver_names[0]}]) == Target(device, here=True)
    assert target_named(None, lambda: [{"name": device.driver_names[0]}]) == Target(device, here=True)


def test_without_a_gpu_the_target_is_the_cpu() -> None:
    """No device asked for and none found: this machine's CPU, which is also a name."""
    assert target_named(None, list) == target_named("CPU", list) == Target(None, here=True)
    assert (target_named(None, list).kind, target_named("t4", list).kind) == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("text", "sentence"), [("h1000", r"unknown GPU 'h1000'; did you mean 'h100'.*, cpu$"), ("nvidia", r"several.*cpu$")]
)
def test_an_unknown_device_gets_the_names(text: str, sentence: str) -> None:
    """The accepted names, the CPU among them."""
    with pytest.raises(BenchError, match=sentence):
        target_named(text, list)


def test_a_gpu_that_the_table_does_not_have_is_not_guessed_at() -> None:
    """Its owner is told to name a device."""
    with pytest.raises(BenchError, match="this machine's GPU, 'Card 9000', is not in the table of devices: name one"):
        target_named(None, lambda: [{"name": "Card 9000"}])


def test_the_usual_precision_is_one_that_the_card_has() -> None:
    """Turing multiplies fp16 but not bf16; a precision asked for in vain is refused."""
    turing, hopper = (Target(device_named(name), here=False) for name in ("t4", "h100"))

    assert [precision_on(turing, mode, None) for mode in ("inference", "training")] == ["fp16", "amp-fp16"]
    assert [precision_on(hopper, mode, None) for mode in ("inference", "training")] == ["bf16", "amp-bf16"]
    assert precision_on(Target(None, here=True), "training", None) == "fp32"
    assert precision_on(turing, "inference", "fp32") == "fp32"
    with pytest.raises(BenchError, match="--precision bf16 cannot run: NVIDIA T4"):
        precision_on(turing, "inference", "bf16")


def calibration_like(case: Case) -> Calibration:
    """A calibration in which every step takes 2 ms, between 1 and 6, for 0.5 to 2 times the MACs of `case`."""
    macs = float(case.batch * case.graph().conv_macs(case.height, case.width))
    held_out = HeldOut(1.0, 0.0, 0.0, 1.0)
    model = Model(setting_of(case), {"a step": 2e-3}, (0.5, 1.0, 3.0), 0.9, (macs, macs), 20, 10, held_out)
    return Calibration("a device", "f", "x.sqlite", "2026-01-01", 0, (model,))


def test_a_calibrated_latency_is_checked_at_its_upper_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is the interval's high end, its middle stands beside it, and the origin names both."""
    case = Case(ModelSpec(depth=2, width=16), height=64, width=64)
    monkeypatch.setattr(fit_source, "load_calibration", lambda _: calibration_like(case))

    source = predicted_source(Target(None, here=True), case)

    assert source.measures["latency"](case) == pytest.approx(6e-3)
    assert source.middle["latency"](case) == pytest.approx(2e-3)
    assert "a device calibrated from x.sqlite" in source.origins["latency"]
    assert not source.remark(case)
    assert list(source.measures).index("latency") < list(source.measures).index("memory")


def test_what_the_calibration_says_nothing_of_is_not_within_any_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network far from all that was measured has no known latency, and the remark says why."""
    case = Case(ModelSpec(depth=2, width=16), height=64, width=64)
    monkeypatch.setattr(fit_source, "load_calibration", lambda _: calibration_like(case))
    wide = case.with_spec(ModelSpec(depth=2, width=128))

    source = predicted_source(Target(None, here=True), case)

    assert math.isinf(source.measures["latency"](wide))
    assert "the calibration was measured from" in source.remark(wide)
    assert LIMITS["latency"].text(source.measures["latency"](wide)) == "unknown"


def test_a_calibration_of_another_setting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of inference say nothing of training: there is no latency then, rather than a guess."""
    case = Case(ModelSpec(depth=2, width=16), height=64, width=64)
    training = Case(ModelSpec(depth=2, width=16), height=64, width=64, mode="training")
    monkeypatch.setattr(fit_source, "load_calibration", lambda _: calibration_like(case))

    assert "latency" not in predicted_source(Target(None, here=True), training).measures
    assert "latency" in predicted_source(Target(None, here=True), case).measures


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([3.0, 1.0, 2.0], 3.0), (list(range(1, 101)), 99), (list(range(1, 202)), 199), ([5.0], 5.0)],
)
def test_p99_is_a_sample_that_99_in_100_do_not_exceed(samples: list[float], expected: float) -> None:
    """Of fewer than a hundred samples it is the largest; no interpolation makes it smaller than what was seen."""
    assert percentile(tuple(samples), 99) == expected
    assert sum(sample <= expected for sample in samples) >= 0.99 * len(samples)


class Bench:
    """A server that answers from a table, and notes what it was asked."""

    def __init__(self, result: Result, *, cuda: bool = False) -> None:
        self.result = result
        self.environment = {"cuda": cuda, "memory_bytes": 10 * 2**30}
        self.asked: list[Request] = []

    def run(self, request: Request) -> list[Result]:
        """The same result for every request."""
        self.asked.append(request)
        return [self.result]


def test_each_network_is_timed_once_and_judged_by_its_slow_end() -> None:
    """One request per case, under the machine's memory and a time that a case within the limit has ended in."""
    bench = Bench(Result("latency_s", samples=(1e-3, 2e-3, 9e-3), note="noisy"))
    told: list[str] = []
    source = measured_source(live_source(), Target(None, here=True), bench, 0.5, told.append)
    case = Case(ModelSpec(depth=1, width=8), height=32, width=32)

    figures = (source.measures["latency"](case), source.middle["latency"](case), source.remark(case))

    assert figures == (9e-3, 2e-3, "3 steps timed; noisy")
    assert told == ["unet/d1/w8/concat"]
    (request,) = bench.asked
    assert (request.case, request.metrics, request.memory_limit_bytes) == (case, ("latency_s",), 8 * 2**30)
    assert request.time_limit_s > 10 * 0.5
    assert source.by_running == ("latency",)
    assert not source.remark(Case(ModelSpec(depth=2, width=8), height=32, width=32))


@pytest.mark.parametrize("outcome", ["out_of_memory", "timeout", "crash"])
def test_a_network_that_did_not_run_to_its_end_is_over_every_limit(outcome: str) -> None:
    """Its latency is unknown, and the remark says what happened."""
    bench = Bench(Result("latency_s", outcome, note="why"))
    source = measured_source(live_source(), Target(None, here=True), bench, 0.5, lambda _: None)
    case = Case(ModelSpec(depth=1, width=8), height=32, width=32)

    assert math.isinf(source.measures["latency"](case))
    assert source.remark(case) == f"{outcome}: why"


def test_what_this_machine_cannot_measure_at_all_is_an_error() -> None:
    """Unsupported is no slow network: it ends the command with its reason; so does a torch without CUDA."""
    watch = Stopwatch(Bench(Result("latency_s", "unsupported", note="no tf32 here")).run, None, 0.5, lambda _: None)
    without_cuda = Bench(Result("latency_s"))

    with pytest.raises(BenchError, match="cannot be measured here: no tf32 here"):
        watch.p99(Case(ModelSpec(depth=1, width=8)))
    with pytest.raises(MachineError, match="torch sees no CUDA device"):
        measured_source(live_source(), Target(device_named("t4"), here=True), without_cuda, 0.5, lambda _: None)

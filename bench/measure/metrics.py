"""Every metric: its name with the unit, whether it is exact, how it is measured, and how the gate treats it.

The table at the bottom is the one place for a new metric. This file imports no torch: what needs it is imported in
the function that measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipcost.bench.cases.record import Result
from skipcost.bench.measure.timing import Budget

if TYPE_CHECKING:
    from skipcost.bench.cases.case import Case

COUNTED, PREDICTED, MEASURED = "counted (exact)", "predicted", "measured"


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of METRICS.

    `unit` is a key of the report's formats; `origin` says where the number comes from; `threshold` is the relative
    change that the gate lets pass (0: any change is a verdict); `rests_on` names packages of which another version may
    give another exact number; `modes`, `devices` and `backends` are where it is asked for when a sweep names none.
    Rows that share `measure` come from one call of it, which returns them all.
    """

    title: str
    unit: str
    origin: str
    how: str
    measure: Callable[[Case, Budget], list[Result]]
    threshold: float = 0.0
    rests_on: tuple[str, ...] = ()
    more_is_better: bool = False
    modes: tuple[str, ...] = ("inference", "training")
    devices: tuple[str, ...] = ("cpu", "cuda")
    backends: tuple[str, ...] = ("eager", "compile", "fused", "rewritten")

    @property
    def exact(self) -> bool:
        """Whether equal code must give equal numbers on any machine."""
        return not self.threshold


def _ok(metric: str, value: float) -> list[Result]:
    return [Result(metric, samples=(value,))]


def _params(case: Case, _budget: Budget) -> list[Result]:
    if case.factory:
        from skipcost.bench.measure.tracing import count_params  # noqa: PLC0415 - imports torch

        return [count_params(case)]
    return _ok("params", case.graph().params())


def _convolutions(case: Case, _budget: Budget) -> list[Result]:
    if case.factory:
        from skipcost.bench.measure.tracing import count_convolutions  # noqa: PLC0415 - imports torch

        return count_convolutions(case)
    graph = case.graph()
    return [
        *_ok("conv_macs", case.batch * graph.conv_macs(case.height, case.width)),
        *_ok("activations", case.batch * graph.activations(case.height, case.width)),
    ]


def _executed_macs(case: Case, _budget: Budget) -> list[Result]:
    if case.factory:
        return [
            Result("executed_macs", "unsupported", note="counted for networks of the suite; conv_macs has a model's")
        ]
    if case.backend != "rewritten":
        return _ok("executed_macs", case.batch * case.graph().conv_macs(case.height, case.width))
    from skipcost.kernels.dispatch.low_resolution import executed_macs  # noqa: PLC0415 - numpy, for this row alone

    where = {"precision": case.precision, "device": case.device, "mode": case.mode}
    return _ok("executed_macs", executed_macs(case.graph(), case.height, case.width, batch=case.batch, **where))


def _receptive_field(case: Case, _budget: Budget) -> list[Result]:
    return _ok("receptive_field", case.graph().receptive_field())


def _operators(case: Case, _budget: Budget) -> list[Result]:
    from skipcost.bench.measure.tracing import count_operators  # noqa: PLC0415 - imports torch

    return [count_operators(case)]


def _fvcore_flops(case: Case, _budget: Budget) -> list[Result]:
    from skipcost.bench.measure.counting import fvcore_count  # noqa: PLC0415 - imports torch and fvcore

    return [fvcore_count(case)]


def _predicted(case: Case, _budget: Budget) -> list[Result]:
    from skipcost.bench.memory.lifetimes import predicted  # noqa: PLC0415 - imports the cases, which few metrics need
    from skipcost.bench.memory.liveness import why_not  # noqa: PLC0415 - as before

    if case.factory or why_not(case):
        from skipcost.bench.measure.counting import traced_peaks  # noqa: PLC0415 - imports torch

        return traced_peaks(case)
    return predicted(case)


def _traced(case: Case, _budget: Budget) -> list[Result]:
    from skipcost.bench.measure.counting import predicted_peaks  # noqa: PLC0415 - imports torch

    _, steady, detail = predicted_peaks(case)
    return [Result("peak_memory_traced_bytes", samples=(steady,), note=detail.pop("note", ""), detail=detail)]


def _roofline(case: Case, _budget: Budget) -> list[Result]:
    from skipcost.bench.measure.here import reference_line  # noqa: PLC0415 - imports the worker, which imports this table

    return [reference_line(case)]


def _latency(case: Case, budget: Budget) -> list[Result]:
    from skipcost.bench.measure.run import latency  # noqa: PLC0415 - imports torch

    return [latency(case, budget)]


def _layers(case: Case, budget: Budget) -> list[Result]:
    from skipcost.bench.measure.run import layer_times  # noqa: PLC0415 - imports torch

    return [layer_times(case, budget)]


def _compile(case: Case, _budget: Budget) -> list[Result]:
    from skipcost.bench.measure.run import compile_time  # noqa: PLC0415 - imports torch

    return [compile_time(case)]


def _gpu_name(figure: str, first: bool) -> str:  # noqa: FBT001 - a function of two coordinates
    return f"peak_memory_{figure}{'_first' if first else ''}_bytes"


def _gpu_memory(case: Case, _budget: Budget) -> list[Result]:
    names = [_gpu_name(figure, first) for figure in _GPU_FIGURES for first in (False, True)]
    if case.device != "cuda":
        note = "measured on a GPU only; peak_memory_predicted_bytes holds anywhere"
        return [Result(name, "unsupported", note=note) for name in names]
    from skipcost.bench.measure.run import gpu_memory  # noqa: PLC0415 - imports torch

    return gpu_memory(case, _gpu_name)


def _predicted_gpu_memory(case: Case, _budget: Budget) -> list[Result]:
    names = [_gpu_name(f"predicted_{figure}", first) for figure in _GPU_FIGURES for first in (False, True)]
    if case.device != "cuda":
        note = "predicted for a GPU only; peak_memory_predicted_bytes holds anywhere"
        return [Result(name, "unsupported", note=note) for name in names]
    from skipcost.bench.measure.here import predicted_here  # noqa: PLC0415 - imports the cases, which few metrics need

    return predicted_here(case, lambda figure, first: _gpu_name(f"predicted_{figure}", first))


_GPU_FIGURES = {
    "requested": "bytes the program asked the caching allocator for, at their peak",
    "allocated": "the same in the allocator's blocks: rounded to 512 bytes, with what was too small to split off",
    "reserved": "what the allocator held from the driver, unused parts of its segments included",
    "process": "what the driver says that the process holds after the step, context and workspaces included",
}


def _memory_metrics() -> dict[str, Metric]:
    """The GPU's figures: what was requested, allocated after rounding, reserved by the pool, held by the process."""
    table = {}
    for figure, meaning in _GPU_FIGURES.items():
        for first in (False, True):
            table[_gpu_name(figure, first)] = Metric(
                title=f"{figure} memory{', first step' if first else ''}",
                unit="bytes",
                origin=MEASURED,
                how=meaning + ("; the first step, in which cuDNN tries algorithms" if first else "; a later step"),
                measure=_gpu_memory,
                threshold=0.01,
                devices=("cuda",),
            )
            table[_gpu_name(f"predicted_{figure}", first)] = Metric(
                title=f"predicted {figure} memory{', first step' if first else ''}",
                unit="bytes",
                origin=PREDICTED,
                how=f"PyTorch's allocator replayed on the card's memory, with an interval; stands for {meaning}",
                measure=_predicted_gpu_memory,
                threshold=0.01,  # exact on one card only: its memory bounds what cuDNN may try
                devices=("cuda",),
                backends=("eager", "rewritten"),
            )
    return table


METRICS: dict[str, Metric] = {
    "params": Metric(
        title="parameters",
        unit="count",
        origin=COUNTED,
        how="arithmetic on the graph, equal to the built module's; of a model of your own, the module's",
        measure=_params,
    ),
    "conv_macs": Metric(
        title="convolution MACs",
        unit="macs",
        origin=COUNTED,
        how="arithmetic on the graph, whole batch, forward; equal to torch's FlopCounterMode / 2, which counts a model "
        "of your own, and fvcore's conv",
        measure=_convolutions,
    ),
    "activations": Metric(
        title="activations",
        unit="count",
        origin=COUNTED,
        how="elements of all convolution outputs, whole batch; fvcore's definition",
        measure=_convolutions,
    ),
    "executed_macs": Metric(
        title="executed MACs",
        unit="macs",
        origin=COUNTED,
        how="what the backend runs forwards, whole batch: with rewritten, products at low resolution and in bands for "
        "the convolutions that they replace; equal to torch's FlopCounterMode / 2",
        measure=_executed_macs,
        backends=("rewritten",),
    ),
    "receptive_field": Metric(
        title="receptive field",
        unit="pixels",
        origin=COUNTED,
        how="side of the window that holds every input pixel which one output pixel depends on",
        measure=_receptive_field,
        more_is_better=True,
    ),
    "operators": Metric(
        title="operators",
        unit="count",
        origin=COUNTED,
        how="operators below autograd that one step dispatches, views included; counted on the meta device",
        measure=_operators,
        rests_on=("torch",),
        modes=("inference",),
        backends=("eager",),
    ),
    "fvcore_flops": Metric(
        title="fvcore's flops",
        unit="macs",
        origin=COUNTED,
        how="fvcore's total (a MAC counts once), whole batch, with the operators that it did not count beside it",
        measure=_fvcore_flops,
        rests_on=("fvcore",),
        modes=("inference",),
    ),
    "peak_memory_predicted_bytes": Metric(
        title="predicted peak memory",
        unit="bytes",
        origin=PREDICTED,
        how="peak of live tensor bytes in a steady step: arithmetic, exact but for workspaces and rounding",
        measure=_predicted,
    ),
    "peak_memory_predicted_first_bytes": Metric(
        title="predicted peak memory, first step",
        unit="bytes",
        origin=PREDICTED,
        how="the same for the first training step, in which the optimizer makes its state",
        measure=_predicted,
        modes=("training",),
    ),
    "peak_memory_traced_bytes": Metric(
        title="traced peak memory",
        unit="bytes",
        origin=PREDICTED,
        how="peak of live tensor bytes in a steady step, every tensor of the program followed on the meta device",
        measure=_traced,
        rests_on=("torch",),
        modes=(),  # by name alone: what a gate watches the executor with
        backends=("eager", "rewritten"),
    ),
    **_memory_metrics(),
    "roofline_s": Metric(
        title="reference line",
        unit="seconds",
        origin=PREDICTED,
        how="every pass of the eager program at the device's limits, the slower of MACs and bytes each, added up; a "
        "GPU's limits are its data sheet's, a CPU's those of a probe; caches, Winograd and fusion can pass it",
        measure=_roofline,
        threshold=0.25,
    ),
    "compile_s": Metric(
        title="compile time",
        unit="seconds",
        origin=MEASURED,
        how="the first call under torch.compile less a later one",
        measure=_compile,
        threshold=0.25,
        backends=("compile",),
    ),
    "latency_s": Metric(
        title="latency",
        unit="seconds",
        origin=MEASURED,
        how="one step, warmed up until flat; every sample is kept, tables show the median",
        measure=_latency,
        threshold=0.05,
    ),
    "layers_s": Metric(
        title="latency, layer by layer",
        unit="seconds",
        origin=MEASURED,
        how="sum of the times of a step's operators, a clock around each, which costs some; the detail has each median",
        measure=_layers,
        threshold=0.25,
        modes=("inference",),
        backends=("eager",),
    ),
}


def default_metrics(case: Case) -> tuple[str, ...]:
    """What is measured of a case where a sweep does not say: all that applies to its mode, device and backend."""
    return tuple(
        name
        for name, metric in METRICS.items()
        if case.mode in metric.modes and case.device in metric.devices and case.backend in metric.backends
    )

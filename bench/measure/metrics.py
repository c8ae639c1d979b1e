"""Every metric: its name with the unit, whether it is exact, how it is measured, and how the gate treats it.

The table at the bottom is the one place for a new metric. It is data: a metric names the function that measures it,
which is imported when it is called, since many need torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from skipcost.bench.cases.record import Result
from skipcost.bench.measure.timing import Budget

if TYPE_CHECKING:
    from skipcost.bench.cases.case import Case

COUNTED, PREDICTED, MEASURED = "counted (exact)", "predicted", "measured"
EVERY_BACKEND = ("eager", "compile", "fused", "rewritten")
FOLLOWED = ("eager", "rewritten")  # backends whose live bytes are arithmetic


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of METRICS.

    `unit` is a key of the report's formats; `origin` says where the number comes from; `threshold` is the relative
    change that the gate lets pass (0: any change is a verdict); `rests_on` names packages of which another version may
    give another exact number; `modes`, `devices` and `backends` are where it is asked for when a sweep names none.
    `function` is "module:name" in this room: it takes a case, and a budget where it measures, and returns a result or
    several; rows that share it come from one call. `arithmetic` has the backends with which nothing of a network of the
    suite runs for it, so that it needs no process of its own.
    """

    title: str
    unit: str
    origin: str
    how: str
    function: str
    threshold: float = 0.0
    rests_on: tuple[str, ...] = ()
    more_is_better: bool = False
    modes: tuple[str, ...] = ("inference", "training")
    devices: tuple[str, ...] = ("cpu", "cuda")
    backends: tuple[str, ...] = EVERY_BACKEND
    arithmetic: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether equal code must give equal numbers on any machine."""
        return not self.threshold

    def is_arithmetic(self, case: Case) -> bool:
        """Whether it runs nothing for a case, so that nothing can be lost."""
        return case.factory is None and case.backend in self.arithmetic

    def load(self) -> Callable[..., list[Result] | Result]:
        """Import the function; most of them need torch."""
        module, name = self.function.split(":")
        found: Callable[..., list[Result] | Result] = getattr(import_module(f"{__package__}.{module}"), name)
        return found

    def measure(self, case: Case, budget: Budget) -> list[Result]:
        """Return the results of its function for a case."""
        made = self.load()(case, budget) if self.origin == MEASURED else self.load()(case)
        return made if isinstance(made, list) else [made]


GPU_FIGURES = {
    "requested": "bytes the program asked the caching allocator for, at their peak",
    "allocated": "the same in the allocator's blocks: rounded to 512 bytes, with what was too small to split off",
    "reserved": "what the allocator held from the driver, unused parts of its segments included",
    "process": "what the driver says that the process holds after the step, context and workspaces included",
}


def gpu_metric(figure: str, first: bool) -> str:  # noqa: FBT001 - a function of two coordinates
    """Name the metric of a figure of the GPU's memory, of the first step or a later one."""
    return f"peak_memory_{figure}{'_first' if first else ''}_bytes"


def gpu_metrics(kind: str = "") -> list[str]:
    """Name the metrics of all figures; kind: "predicted_" for those that are."""
    return [gpu_metric(f"{kind}{figure}", first) for figure in GPU_FIGURES for first in (False, True)]


def _memory_metrics() -> dict[str, Metric]:
    """The GPU's figures: what was requested, allocated after rounding, reserved by the pool, held by the process."""
    table = {}
    for figure, meaning in GPU_FIGURES.items():
        for first in (False, True):
            table[gpu_metric(figure, first)] = Metric(
                title=f"{figure} memory{', first step' if first else ''}",
                unit="bytes",
                origin=MEASURED,
                how=meaning + ("; the first step, in which cuDNN tries algorithms" if first else "; a later step"),
                function="run:gpu_memory",
                threshold=0.01,
                devices=("cuda",),
            )
            table[gpu_metric(f"predicted_{figure}", first)] = Metric(
                title=f"predicted {figure} memory{', first step' if first else ''}",
                unit="bytes",
                origin=PREDICTED,
                how=f"PyTorch's allocator replayed on the card's memory, with an interval; stands for {meaning}",
                function="here:predicted_here",
                arithmetic=FOLLOWED,
                threshold=0.01,  # exact on one card only: its memory bounds what cuDNN may try
                devices=("cuda",),
                backends=FOLLOWED,
            )
    return table


METRICS: dict[str, Metric] = {
    "params": Metric(
        title="parameters",
        unit="count",
        origin=COUNTED,
        how="arithmetic on the graph, equal to the built module's; of a model of your own, the module's",
        function="counts:params",
        arithmetic=EVERY_BACKEND,
    ),
    "conv_macs": Metric(
        title="convolution MACs",
        unit="macs",
        origin=COUNTED,
        how="arithmetic on the graph, whole batch, forward; equal to torch's FlopCounterMode / 2, which counts a model "
        "of your own, and fvcore's conv",
        function="counts:convolutions",
        arithmetic=EVERY_BACKEND,
    ),
    "activations": Metric(
        title="activations",
        unit="count",
        origin=COUNTED,
        how="elements of all convolution outputs, whole batch; fvcore's definition",
        function="counts:convolutions",
        arithmetic=EVERY_BACKEND,
    ),
    "executed_macs": Metric(
        title="executed MACs",
        unit="macs",
        origin=COUNTED,
        how="what the backend runs forwards, whole batch: with rewritten, products at low resolution and in bands for "
        "the convolutions that they replace; equal to torch's FlopCounterMode / 2",
        function="counts:executed_macs",
        arithmetic=EVERY_BACKEND,
        backends=("rewritten",),
    ),
    "receptive_field": Metric(
        title="receptive field",
        unit="pixels",
        origin=COUNTED,
        how="side of the window that holds every input pixel which one output pixel depends on",
        function="counts:receptive_field",
        arithmetic=EVERY_BACKEND,
        more_is_better=True,
    ),
    "operators": Metric(
        title="operators",
        unit="count",
        origin=COUNTED,
        how="operators below autograd that one step dispatches, views included; counted on the meta device",
        function="tracing:count_operators",
        rests_on=("torch",),
        modes=("inference",),
        backends=("eager",),
    ),
    "fvcore_flops": Metric(
        title="fvcore's flops",
        unit="macs",
        origin=COUNTED,
        how="fvcore's total (a MAC counts once), whole batch, with the operators that it did not count beside it",
        function="counting:fvcore_count",
        rests_on=("fvcore",),
        modes=("inference",),
    ),
    "peak_memory_predicted_bytes": Metric(
        title="predicted peak memory",
        unit="bytes",
        origin=PREDICTED,
        how="peak of live tensor bytes in a steady step: arithmetic, exact but for workspaces and rounding",
        function="counts:peaks",
        arithmetic=FOLLOWED,
    ),
    "peak_memory_predicted_first_bytes": Metric(
        title="predicted peak memory, first step",
        unit="bytes",
        origin=PREDICTED,
        how="the same for the first training step, in which the optimizer makes its state",
        function="counts:peaks",
        arithmetic=FOLLOWED,
        modes=("training",),
    ),
    "peak_memory_traced_bytes": Metric(
        title="traced peak memory",
        unit="bytes",
        origin=PREDICTED,
        how="peak of live tensor bytes in a steady step, every tensor of the program followed on the meta device",
        function="counting:traced_peak",
        rests_on=("torch",),
        modes=(),  # by name alone: what a gate watches the executor with
        backends=FOLLOWED,
    ),
    **_memory_metrics(),
    "roofline_s": Metric(
        title="reference line",
        unit="seconds",
        origin=PREDICTED,
        how="every pass of the eager program at the device's limits, the slower of MACs and bytes each, added up; a "
        "GPU's limits are its data sheet's, a CPU's those of a probe; caches, Winograd and fusion can pass it",
        function="here:reference_line",
        arithmetic=EVERY_BACKEND,
        threshold=0.25,
    ),
    "compile_s": Metric(
        title="compile time",
        unit="seconds",
        origin=MEASURED,
        how="the first call under torch.compile less a later one",
        function="run:compile_time",
        threshold=0.25,
        backends=("compile",),
    ),
    "latency_s": Metric(
        title="latency",
        unit="seconds",
        origin=MEASURED,
        how="one step, warmed up until flat; every sample is kept, tables show the median",
        function="run:latency",
        threshold=0.05,
    ),
    "layers_s": Metric(
        title="latency, layer by layer",
        unit="seconds",
        origin=MEASURED,
        how="sum of the times of a step's operators, a clock around each, which costs some; the detail has each median",
        function="run:layer_times",
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

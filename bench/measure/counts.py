"""What is counted by arithmetic of a network of the suite; a model of a user's own is traced for the same."""

from __future__ import annotations

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.memory import liveness


def _ok(metric: str, value: float) -> Result:
    return Result(metric, samples=(value,))


def params(case: Case) -> Result:
    """The metric `params`."""
    if case.factory:
        from skipcost.bench.measure.tracing import count_params  # noqa: PLC0415 - imports torch

        return count_params(case)
    return _ok("params", case.graph().params())


def convolutions(case: Case) -> list[Result]:
    """`conv_macs` and `activations`, of the whole batch."""
    if case.factory:
        from skipcost.bench.measure.tracing import count_convolutions  # noqa: PLC0415 - imports torch

        return count_convolutions(case)
    graph = case.graph()
    return [
        _ok("conv_macs", case.batch * graph.conv_macs(case.height, case.width)),
        _ok("activations", case.batch * graph.activations(case.height, case.width)),
    ]


def executed_macs(case: Case) -> Result:
    """The metric `executed_macs`, of the whole batch."""
    if case.factory:
        note = "counted for networks of the suite; conv_macs has a model's"
        return Result("executed_macs", "unsupported", note=note)
    if case.backend != "rewritten":
        return _ok("executed_macs", case.batch * case.graph().conv_macs(case.height, case.width))
    from skipcost.kernels.dispatch import low_resolution  # noqa: PLC0415 - numpy, for this row alone

    where = {"precision": case.precision, "device": case.device, "mode": case.mode}
    macs = low_resolution.executed_macs(case.graph(), case.height, case.width, batch=case.batch, **where)
    return _ok("executed_macs", macs)


def receptive_field(case: Case) -> Result:
    """The metric `receptive_field`."""
    return _ok("receptive_field", case.graph().receptive_field())


def peaks(case: Case) -> list[Result]:
    """Both predicted peaks: by arithmetic, or where that has no answer by a trace."""
    if case.factory or liveness.why_not(case):
        from skipcost.bench.measure.counting import traced_peaks  # noqa: PLC0415 - imports torch

        return traced_peaks(case)
    return liveness.predicted(case)

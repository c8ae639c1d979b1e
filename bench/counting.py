"""Metrics that come from tracing a network without timing it: fvcore's count, and live bytes on the meta device."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import torch

from skipcost.bench.cases import Case
from skipcost.bench.memory import trace_peaks
from skipcost.bench.modules import as_written, compiled_note, parameter_bytes
from skipcost.bench.records import Result
from skipcost.bench.subject import Subject, make_subject
from skipcost.bench.tracing import trace
from skipcost.kernels.fvcore_handles import HANDLES


def preload_fvcore() -> Any:
    """Return fvcore's FlopCountAnalysis, or None where fvcore is not installed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")  # fvcore imports it; deprecated, in 2.15 more loudly
        try:
            from fvcore.nn import FlopCountAnalysis  # noqa: PLC0415 - optional
        except ImportError:
            return None
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    return FlopCountAnalysis


def fvcore_count(case: Case) -> Result:
    """Count with fvcore on CPU tensors in eval mode (fvcore fails on the meta device); one image, times the batch.

    fvcore counts a multiply-add once, batch norm and interpolation roughly, and some operators not at all: their
    names and how often each occurred are in the detail.
    """
    count = preload_fvcore()
    if count is None:
        return Result("fvcore_flops", "unsupported", note="fvcore is not installed: pip install skipcost[fvcore]")
    plain = replace(
        case, batch=1, precision="fp32", backend="eager", mode="inference", layout="contiguous", device="cpu"
    )
    subject = make_subject(plain, "cpu")
    with torch.no_grad(), as_written(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks about sizes that become constants
        analysis = count(subject.network, subject.tensors[-1])
        for name, handle in HANDLES.items():
            analysis.set_op_handle(name, handle)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = int(analysis.total())
        detail: dict[str, Any] = {
            "by_operator": {name: int(count) for name, count in analysis.by_operator().items()},
            "not_counted": dict(analysis.unsupported_ops()),
        }
    return Result("fvcore_flops", samples=(case.batch * total,), detail=detail)


def predicted_peaks(case: Case) -> tuple[int, int, dict[str, Any]]:
    """Trace a step, or two; return the peaks of live bytes in the first and the last, and detail.

    The first step makes the optimizer's state, or the weights that `backend=rewritten` composes. Where a user's own
    model had to be run with data, `note` in the detail says so.
    """
    steps = 2 if case.mode == "training" or case.backend == "rewritten" else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # kept weights look
        (peaks, weights, compiled), note = trace(case, lambda subject: _traced(subject, steps))
    note = "; ".join(filter(None, (note, compiled)))
    return peaks[0], peaks[-1], {"parameter_bytes": weights} | ({"note": note} if note else {})


def traced_peaks(case: Case) -> list[Result]:
    """Give the two predicted peaks where arithmetic has no answer: a user's own model, and what `liveness` refuses.

    A trace runs the reference's operators one by one, whatever the backend: the note says so.
    """
    first, steady, detail = predicted_peaks(case)
    notes = [detail.pop("note", "")]
    if case.backend != "eager":
        notes.append(f"traced on the reference operators, one by one: what backend={case.backend} saves is not in it")
    note = "; ".join(each for each in notes if each)
    return [
        Result("peak_memory_predicted_bytes", samples=(steady,), note=note, detail=detail),
        Result("peak_memory_predicted_first_bytes", samples=(first,), note=note, detail=detail),
    ]


def _traced(subject: Subject, steps: int) -> tuple[list[int], int, str]:
    """Peaks of so many steps, bytes of the parameters, and what is to be said where a model is compiled."""
    peaks = trace_peaks(subject.step, subject.tensors, steps)
    return peaks, parameter_bytes(subject.network), compiled_note(subject.network)

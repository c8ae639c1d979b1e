"""Metrics that come from tracing a network without timing it: fvcore's count, and live bytes on the meta device."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.modules import as_written, compiled_note, parameter_bytes
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.fvcore_handles import HANDLES
from skipcost.bench.measure.live_bytes import device_to_trace, trace_peaks
from skipcost.bench.measure.subject import Subject, make_subject
from skipcost.bench.measure.tracing import trace

UNLIKE_ON_CUDA = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)  # cuDNN's, and whole layers


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

    The first step makes the optimizer's state, the weights that `backend=rewritten` composes, and whatever else a
    user's own model keeps from one call to the next. Where such a model had to be run with data, or its operators may
    be others on the case's device, `note` in the detail says so.
    """
    steps = 2 if case.mode == "training" or case.backend == "rewritten" or case.factory else 1
    doubts: list[str] = []

    def use(subject: Subject) -> tuple[list[int], int]:
        if case.factory and any(each.is_meta for each in subject.tensors):
            doubts.extend(_unlike(case, subject.network))
        device = case.device if case.factory else "meta"
        peaks = trace_peaks(subject.step, subject.tensors, steps, device)
        doubts.append(compiled_note(subject.network))
        return peaks, parameter_bytes(subject.network)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # kept weights look
        (peaks, weights), note = trace(case, use, on_meta=case.factory is not None)
    note = "; ".join(filter(None, [note, *dict.fromkeys(doubts)]))
    return peaks[0], peaks[-1], {"parameter_bytes": weights} | ({"note": note} if note else {})


def _unlike(case: Case, network: nn.Module) -> list[str]:
    """Say which layers a device is known to run in another form than the one that is traced."""
    if case.mode == "training" and any(isinstance(each, nn.LSTM) for each in network.modules()):
        return ["LSTM: what oneDNN or cuDNN keeps of it for the way back is not in the figure, which is approximate"]
    if device_to_trace(case.device) == case.device:
        return []
    kinds = {type(each).__name__ for each in network.modules() if isinstance(each, UNLIKE_ON_CUDA)}
    doubt = "traced in the CPU's form, since this PyTorch has none of CUDA's: the figure is approximate"
    return [f"{', '.join(sorted(kinds))}: {doubt}"] if kinds else []


def traced_peak(case: Case) -> Result:
    """The metric `peak_memory_traced_bytes`."""
    _, steady, detail = predicted_peaks(case)
    return Result("peak_memory_traced_bytes", samples=(steady,), note=detail.pop("note", ""), detail=detail)


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

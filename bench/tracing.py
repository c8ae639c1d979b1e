"""What a model costs by running it without data: the ways of tracing, and what is counted of a user's own model.

Leaves out live bytes (`memory`), fvcore (`counting`) and the number of operators (`operators`), which are traced in
the way that is chosen here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from skipcost.bench.cases import Case
from skipcost.bench.custom import UnsupportedError, make, shorten
from skipcost.bench.records import Result
from skipcost.bench.subject import AUTOCAST, Subject, make_subject
from skipcost.bench.watching import Watching

CONVOLUTION = torch.ops.aten.convolution.default
FLOPS_OF_A_MAC = 2  # as FlopCounterMode counts: a multiply and an add

T = TypeVar("T")


def trace(case: Case, use: Callable[[Subject], T], *, on_meta: bool = False) -> tuple[T, str]:
    """Apply `use` to the case's subject without data, and return what it says, with a note where there was data.

    That is on the meta device. Autocast does nothing there, so mixed precision is traced on fake CPU tensors, which
    have no data either; the few operators on which the CPU's and CUDA's lists of casts differ do not occur in the
    suite's networks. A user's own model whose Python looks at values fails on both: it is run on the CPU.
    on_meta: on the meta device in any precision, for `trace_peaks`, which takes such tensors for those of a device.
    """
    amp = case.precision in AUTOCAST and not on_meta
    try:
        with FakeTensorMode() if amp else contextlib.nullcontext():
            return use(make_subject(case, "cpu" if amp else "meta", traced=True)), ""
    except UnsupportedError:
        raise
    except Exception as error:
        if case.factory is None:
            raise
        reason = f"{type(error).__name__}: {shorten(str(error))}"
    found = use(make_subject(replace(case, backend="eager"), "cpu"))
    return found, f"counted in a run on the CPU with random data, because it cannot be traced without ({reason})"


def count_params(case: Case) -> Result:
    """Elements of the parameters of a user's own model; one that is used twice counts once."""
    assert case.factory is not None
    network, _ = make(case.factory, "meta")
    return Result("params", samples=(sum(each.numel() for each in network.parameters()),))


def count_convolutions(case: Case) -> list[Result]:
    """`conv_macs` and `activations` of a user's own model: one forward pass of the whole batch, in the case's mode.

    MACs are half of what FlopCounterMode counts for convolutions. It also counts matrix products; where a model has
    them, a note says how many MACs stand beside the convolutions', for they are not in the figure.
    """
    (macs, others, outputs), note = trace(case, _count_forward)
    notes = [note] if note else []
    if others:
        notes.append(f"{sum(others.values()):.3g} MACs of matrix products are not in it")
    detail = {"other_macs": others} if others else {}
    return [
        Result("conv_macs", samples=(macs,), note="; ".join(notes), detail=detail),
        Result("activations", samples=(outputs,), note=note),
    ]


def _count_forward(subject: Subject) -> tuple[int, dict[str, int], int]:
    """MACs of convolutions, those of other operators by name, and elements of the convolutions' outputs."""
    outputs: list[int] = []

    def seen(func: Any, _args: object, result: Any) -> None:
        if func is CONVOLUTION:
            outputs.append(result.numel())

    with torch.no_grad(), FlopCounterMode(display=False) as flops, Watching(seen):
        subject.forward()
    macs = {str(op): count // FLOPS_OF_A_MAC for op, count in flops.get_flop_counts()["Global"].items()}
    return macs.pop("aten.convolution", 0), macs, sum(outputs)

"""What the CPU allocator really hands out in a step that nothing watches but the profiler: the oracle of live bytes.

A storage that is made and freed within one operator of the trace is that operator's own (oneDNN's reorderings, a
slow convolution's columns), and left out; so are the 8 bytes of a Python number on its way into an operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from live_cells import turns
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from skipcost.bench.cases.case import Case
from skipcost.bench.measure.live_bytes import _WHOLE, _is_composite, as_if_on
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.tracing import trace

NUMBER = 8  # bytes of a Python number
TORCH = ("aten::", "autograd::")


@dataclass(frozen=True, slots=True)
class Profiled:
    """Peaks of live bytes by step, and the course of live bytes over all steps, by its turns."""

    peaks: tuple[int, ...]
    turns: list[int]


@dataclass(slots=True)
class _Block:
    """One allocation: when it began and ended (ns; None: not freed), and the operators around its making."""

    begin: int
    bytes: int
    around: tuple[Any, ...]
    end: int | None = None

    def within(self, operators: frozenset[str]) -> bool:
        """Whether one of the operators made and freed it."""
        ends = [each.start_time_ns + each.duration_time_ns for each in self.around if each.name in operators]
        return self.end is not None and any(self.end <= end for end in ends)

    @property
    def is_number(self) -> bool:
        """Whether this is a Python number, made for an operator outside any."""
        return self.bytes == NUMBER and not any(each.name.startswith(TORCH) for each in self.around)


class _Operators(TorchDispatchMode):
    """Collect the names of the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if _is_composite(func, "cpu"):
            with self:
                return func._op_dk(composite, *args, **(kwargs or {}))
        if func in _WHOLE:  # what such a layer makes inside is its network's
            return func(*args, **(kwargs or {}))
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def _operators(case: Case, steps: int) -> frozenset[str]:
    def names(subject: Any) -> set[str]:
        without_data = any(each.is_meta for each in subject.tensors)
        with as_if_on("cpu", subject.tensors) if without_data else nullcontext(), _Operators() as mode:
            for _ in range(steps):
                subject.step()
        return mode.names

    return frozenset(trace(case, names, on_meta=case.factory is not None)[0]) - {"aten::detach"}


def _walk(events: Any, around: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for event in events:
        yield event, around
        yield from _walk(event.children, (*around, event))


def _blocks(tree: list[tuple[Any, tuple[Any, ...]]]) -> list[_Block]:
    found: list[_Block] = []
    live: dict[int, _Block] = {}
    allocations = [(event, around) for event, around in tree if event.name == "[memory]"]
    for event, around in sorted(allocations, key=lambda each: each[0].start_time_ns):
        pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            live[pointer] = _Block(event.start_time_ns, size, around)
            found.append(live[pointer])
        elif pointer in live:
            live.pop(pointer).end = event.start_time_ns
    return found


def _changes(blocks: list[_Block]) -> list[tuple[int, int]]:
    """When live bytes changed, and by how much."""
    made = [(each.begin, each.bytes) for each in blocks]
    freed = [(each.end, -each.bytes) for each in blocks if each.end is not None]
    return sorted(made + freed, key=lambda each: each[0])


def _peak(changed: list[tuple[int, int]], before: int, span: tuple[int, int]) -> int:
    """Most bytes alive within the span; `before` is what was there from the start."""
    live, most = before, 0
    for when, change in changed:
        most = max(most, live) if span[0] < when <= span[1] else most
        live += change
        most = max(most, live) if span[0] < when <= span[1] else most
    return most


def profiled(case: Case, steps: int | None = None) -> Profiled:
    """Run so many steps, else one of inference or two of training, on the CPU under the profiler alone."""
    steps = steps or (2 if case.mode == "training" else 1)
    operators, subject = _operators(case, steps), make_subject(case, "cpu")
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in subject.tensors}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for step in range(steps):
            with record_function(f"step {step}"):
                subject.step()
    tree = list(_walk(recorded.profiler.kineto_results.experimental_event_tree()))
    whole = [event for event, _ in tree if event.name.startswith("step ")]
    blocks = [each for each in _blocks(tree) if not (each.is_number or each.within(operators))]
    spans = [(each.start_time_ns, each.start_time_ns + each.duration_time_ns) for each in whole]
    before, changed = sum(storages.values()), _changes(blocks)
    peaks = tuple(_peak(changed, before, span) for span in spans)
    return Profiled(peaks, turns([before, *(change for _, change in changed)]))

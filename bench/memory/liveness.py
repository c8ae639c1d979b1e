"""Peak live bytes of a case by arithmetic: no tensor, no torch.

A case's structure (which steps its network runs, in which setting) gives events, kept for all cases that share it;
its numbers (elements of maps, weights) turn that into bytes: every storage has `fixed + batch * per_image` of them.
What is counted is what operators return to the program; workspaces inside them, an allocator's rounding and a GPU's
context are not. backend=eager and backend=rewritten.

At the end the same timeline in few words, about 4 KB: what is stored with a prediction and what a report draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.memory import step
from skipcost.bench.memory.schedule import Rule, Schedule, schedule
from skipcost.bench.memory.tape import FLOAT, HALF, KINDS, Setting
from skipcost.kernels.dispatch.low_resolution import COMPOSED, choose, choose_composed, precision_kind
from skipcost.kernels.low_resolution import costs
from skipcost.kernels.low_resolution.axis import Axis

__all__ = [
    "KINDS",
    "Envelope",
    "LowCall",
    "Storage",
    "Timeline",
    "Track",
    "at_peak",
    "envelope",
    "low_calls",
    "peak_bytes",
    "timeline",
    "tracks",
]

Whole = NDArray[np.int64]
BACKENDS = ("eager", "rewritten")


@dataclass(frozen=True, slots=True)
class Storage:
    """One block of memory: what is in it and how many bytes it has; `kind` is one of KINDS."""

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What is alive when. In `events`, i + 1 makes storage i and -(i + 1) ends it.

    `moments`: from which event on what runs. `steady_from` is the first event of the step that repeats: at inference
    the first after what is there before, in training, and where weights are composed, the first of the second step.
    """

    storages: tuple[Storage, ...]
    events: tuple[int, ...]
    moments: tuple[tuple[int, str], ...]
    steady_from: int


class Track(NamedTuple):
    """One storage over the events of a timeline: alive from after `start` to before `end`, as positions among them."""

    name: str
    kind: str
    bytes: int
    start: int
    end: int


class LowCall(NamedTuple):
    """A call of tap-first: its axes, its channels (in, out), and what stands beside it.

    joined: it is added to a convolution over other maps; sliced: that one reads a crop of a single map.
    """

    rows: Axis
    columns: Axis
    channels: tuple[int, int]
    joined: bool
    sliced: bool


@dataclass(frozen=True, slots=True)
class Envelope:
    """The peak as a function of the batch: the largest of `fixed + batch * per_image` over `lines`."""

    lines: tuple[tuple[int, int], ...]

    def peak(self, batch: int) -> int:
        """Bytes with `batch` images."""
        return max(fixed + batch * each for fixed, each in self.lines)

    def largest_batch(self, limit_bytes: int) -> int:
        """The most images whose peak is within the limit; 0 where not even one is."""
        if any(fixed > limit_bytes for fixed, _ in self.lines):
            return 0
        return min((limit_bytes - fixed) // each for fixed, each in self.lines if each)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """Events as arrays: for each storage where its number stands, for each event which storage and its sign."""

    told: step.Events
    row: Whole
    column: Whole
    item: Whole
    per_image: NDArray[np.bool_]
    storage: Whole
    sign: Whole

    def bytes(self, numbers: Whole) -> tuple[Whole, Whole]:
        """Fixed bytes, and bytes an image, of each storage."""
        each = numbers[self.row, self.column] * self.item
        return np.where(self.per_image, 0, each), np.where(self.per_image, each, 0)

    def live(self, numbers: Whole) -> tuple[Whole, Whole]:
        """Fixed bytes, and bytes an image, alive after each event."""
        fixed, per_image = self.bytes(numbers)
        return np.cumsum(fixed[self.storage] * self.sign), np.cumsum(per_image[self.storage] * self.sign)


@lru_cache(maxsize=512)
def _compiled(structure: step.Structure, *, traced: bool) -> _Compiled:
    told = step.write(structure, traced=traced)
    rows, columns, items, per_image = zip(*told.sizes, strict=True)
    row, column, item = (np.array(each, dtype=np.int64) for each in (rows, columns, items))
    scaled = np.array(per_image, dtype=bool)
    return _Compiled(told, row, column, item, scaled, np.abs(told.events) - 1, np.sign(told.events))


def _setting(case: Case) -> Setting:
    autocast = case.precision.startswith("amp")
    training = case.mode == "training"
    return Setting(
        training=training,
        item=HALF if case.precision in {"bf16", "fp16"} else FLOAT,
        autocast=autocast,
        device=case.device,
        loss=case.loss,
        optimizer=case.optimizer,
        scaled=training and case.precision == "amp-fp16",
        channels_last=case.layout == "channels_last",
        one_image=case.batch == 1,
    )


def _resolve(case: Case, *, traced: bool) -> tuple[_Compiled, Whole]:
    """The events of a case and their numbers."""
    reason = why_not(case)
    if reason:
        raise ValueError(reason)
    planned = _planned(case, _rule(case))
    one_class = case.suite_spec.classes == 1
    structure = step.Structure(planned.calls, planned.logits, planned.class_logits, one_class, _setting(case))
    return _compiled(structure, traced=traced), np.array(planned.numbers, dtype=np.int64)


def _rule(case: Case) -> Rule:
    """What is rewritten of a case. Tap-first is chosen by terms that all grow with the batch, so it does not matter."""
    kind, device = precision_kind(case.precision), case.device
    composes = partial(_composed, case.batch, kind, device, case.mode)
    training, precise = case.mode == "training", case.precision in ("fp32", "tf32")
    return Rule(partial(_taken, kind, device), composes, gradients=training, folds=precise and not training)


@lru_cache(maxsize=4096)
def _taken(kind: str, device: str, rows: Axis, columns: Axis, channels: tuple[int, int]) -> bool:
    return choose(rows, columns, channels, kind=kind, device=device).taken


def _composed(
    batch: int, kind: str, device: str, mode: str, size: tuple[int, int], channels: tuple[int, int, int], padding: int
) -> bool:  # fmt: skip
    return choose_composed(size, channels, padding, batch, kind=kind, device=device, mode=mode).taken


def _planned(case: Case, rule: Rule) -> Schedule:
    rewritten = rule if case.backend == "rewritten" else None
    return schedule(case.graph(), case.height, case.width, training=case.mode == "training", rule=rewritten)


def low_calls(case: Case) -> dict[str, LowCall]:
    """Every call of tap-first in a forward pass, by the moment that it belongs to; none where nothing is rewritten."""
    if case.backend != "rewritten":
        return {}
    taken: list[tuple[Axis, Axis, tuple[int, int]]] = []

    def listed(rows: Axis, columns: Axis, channels: tuple[int, int]) -> bool:
        takes = _taken(precision_kind(case.precision), case.device, rows, columns, channels)
        taken.extend([(rows, columns, channels)] * takes)
        return takes

    calls = _planned(case, _rule(case)._replace(takes=listed)).calls
    reads = {call.where: calls[call.reads[0]].op for call in calls if call.op == "convolve"}
    moments = [call.where for call in calls if call.op.startswith("tap_first")]
    return {
        where: LowCall(*call, joined=where in reads, sliced=reads.get(where) == "slice")
        for where, call in zip(moments, taken, strict=True)
    }


def workspace_bytes(case: Case) -> int:
    """Bound what a call at low resolution has alive inside of it beyond live bytes, on a CPU; 0 where there is none."""
    value = HALF if precision_kind(case.precision) == "16 bits" else FLOAT
    ways = (False, True) if case.mode == "training" else (False,)
    calls = [(call.rows, call.columns, call.channels) for call in low_calls(case).values()]
    sizes = (costs.workspace_bytes(*call, value, backward=backward) for call in calls for backward in ways)
    return max(sizes, default=0)


def why_not(case: Case) -> str:
    """Say why there is no arithmetic for a case; empty where there is. UnsupportedError for a user's own model."""
    if case.backend not in BACKENDS:
        return (
            f"backend={case.backend} cannot be predicted by arithmetic, which follows PyTorch's operators one by one; "
            f"use backend={' or '.join(BACKENDS)}"
        )
    return ""


def why_no_envelope(case: Case) -> str:
    """Say why there is no peak as a function of the batch; empty where there is."""
    may = case.backend == "rewritten" and case.mode == "inference" and case.device in {where for where, _ in COMPOSED}
    return why_not(case) or (may and any(edge.up for edge in case.graph().edges)) * (
        "at inference the batch decides which transposed convolutions backend=rewritten composes, so that no line over "
        "batches has the peak; use upsample=bilinear or nearest, or backend=eager"
    )


def peak_bytes(case: Case, *, traced: bool = False) -> tuple[int, int]:
    """Peak of live bytes in the first step and in a steady one; `traced`: as a dispatch mode sees the step."""
    compiled, numbers = _resolve(case, traced=traced)
    fixed, per_image = compiled.live(numbers)
    live = fixed + case.batch * per_image
    return _peaks(live, compiled.told)


def timeline(case: Case, *, traced: bool = False) -> Timeline:
    """Every storage of a case, when it is made and when it ends; `traced`: as a dispatch mode sees the step."""
    compiled, numbers = _resolve(case, traced=traced)
    fixed, per_image = compiled.bytes(numbers)
    told, total = compiled.told, fixed + case.batch * per_image
    storages = tuple(map(Storage, told.names, told.kinds, total.tolist()))
    return Timeline(storages, tuple(told.events.tolist()), told.moments, told.steady_from)


def peaks_of(line: Timeline) -> tuple[int, int]:
    """Peak of live bytes in the first step and in the steady one; at inference they are the same."""
    return _peaks(_live(line), line)


def _live(line: Timeline) -> Whole:
    """Bytes alive after each event."""
    events, sizes = np.array(line.events), np.array([each.bytes for each in line.storages])
    return np.cumsum(sizes[np.abs(events) - 1] * np.sign(events))


def _peaks(live: Whole, told: Timeline | step.Events) -> tuple[int, int]:
    """Peaks of the first and the steady step; where there is one step alone they are the same."""
    steady = int(live[told.steady_from - 1 :].max())
    repeated = any(0 < start < told.steady_from for start, _ in told.moments)
    return int(live[: told.steady_from].max()) if repeated else steady, steady


def _spans(line: Timeline) -> tuple[Whole, Whole]:
    """By storage, the events that make it and that end it; what stays to the end ends after the last event."""
    events, at = np.array(line.events), np.arange(len(line.events))
    start, end = np.zeros(len(line.storages), np.int64), np.full(len(line.storages), len(events))
    start[events[events > 0] - 1], end[-events[events < 0] - 1] = at[events > 0], at[events < 0]
    return start, end


def tracks(line: Timeline) -> tuple[Track, ...]:
    """When each storage was alive, in the order of their making; what stays to the end ends after the last event."""
    spans = zip(line.storages, *(each.tolist() for each in _spans(line)), strict=True)
    return tuple(Track(each.name, each.kind, each.bytes, start, end) for each, start, end in spans)


def at_peak(line: Timeline) -> tuple[str, tuple[Storage, ...]]:
    """What runs when the most is alive in the steady step, and all that is alive then, largest first."""
    steady, (start, end) = line.steady_from - 1, _spans(line)
    peak = steady + int(_live(line)[steady:].argmax())
    then = np.flatnonzero((start <= peak) & (peak < end)).tolist()
    moment = [what for begin, what in line.moments if begin <= peak][-1]
    return moment, tuple(sorted((line.storages[index] for index in then), key=lambda each: -each.bytes))


def envelope(case: Case) -> Envelope:
    """The peak over all batches, of the first or a steady step, whichever is larger; `case.batch` does not matter."""
    reason = why_no_envelope(case)
    if reason:
        raise ValueError(reason)
    compiled, numbers = _resolve(replace(case, batch=2), traced=False)
    fixed, per_image = compiled.live(numbers)
    return Envelope(_upper(fixed, per_image))


def _upper(fixed: Whole, per_image: Whole) -> tuple[tuple[int, int], ...]:
    """The lines that are the highest at some batch of 1 or more, flattest first."""
    batch, lines = 1, []
    while True:
        live = fixed + batch * per_image
        top = int(live.max())
        at = np.flatnonzero(live == top)
        best = at[np.argmax(per_image[at])]
        line = int(fixed[best]), int(per_image[best])
        lines.append(line)
        steeper = per_image > line[1]
        if not steeper.any():
            return tuple(lines)
        gain, behind = per_image[steeper] - line[1], line[0] - fixed[steeper]
        batch = int((behind // gain).min()) + 1


STANDING = ("parameter", "buffer", "optimizer", "input", "gradient")  # kinds whose storages are told as one sum
MOST_AT_PEAK = 12
MOST_TRACKS = 40


class Life(NamedTuple):
    """A storage of the steady step between two of its moments, both included."""

    name: str
    kind: str
    bytes: int
    first: int
    last: int


def moments(line: Timeline) -> list[str]:
    """What runs in the steady step, in order; the axis of `lives`."""
    return [what for start, what in line.moments if start >= line.steady_from]


def lives(line: Timeline) -> list[Life]:
    """Every storage that is made in the steady step, in the order of their making."""
    begins = [start for start, _ in line.moments if start >= line.steady_from]
    start, end = _spans(line)
    first, last = (np.searchsorted(begins, each, side="right").tolist() for each in (start, end))
    made = zip(line.storages, first, last, strict=True)
    return [Life(each.name, each.kind, each.bytes, begin - 1, over - 1) for each, begin, over in made if begin]


def summary(line: Timeline) -> dict[str, Any]:
    """The steady step as JSON values.

    `at_peak` has the largest storages alive at the peak and `rest` the others' bytes; `standing` the bytes of what is
    there before the step, by kind; `lives` the largest storages made in it, with the first and last of its `moments`.
    """
    moment, alive = at_peak(line)
    made = sorted(lives(line), key=lambda each: -each.bytes * (1 + each.last - each.first))[:MOST_TRACKS]
    standing, (start, end) = dict.fromkeys(STANDING, 0), _spans(line)
    for index in np.flatnonzero((start < line.steady_from) & (line.steady_from <= end)).tolist():
        each = line.storages[index]
        standing[each.kind if each.kind in standing else "gradient"] += each.bytes
    return {
        "moment": moment,
        "at_peak": [[each.name, each.kind, each.bytes] for each in alive[:MOST_AT_PEAK]],
        "rest": sum(each.bytes for each in alive[MOST_AT_PEAK:]),
        "standing": standing,
        "moments": len(moments(line)),
        "lives": [list(each) for each in sorted(made, key=lambda each: each.first)],
    }


def predicted(case: Case) -> list[Result]:
    """Give the two predicted peaks of a case, the steady step's with its timeline in few words.

    Where convolutions run at low resolution, `workspace_bytes` beside it bounds what one of them adds inside, on a CPU.
    """
    line = timeline(case)
    first, steady = peaks_of(line)
    inside = workspace_bytes(case)
    detail = summary(line) | ({"workspace_bytes": inside} if inside else {})
    return [
        Result("peak_memory_predicted_bytes", samples=(steady,), detail=detail),
        Result("peak_memory_predicted_first_bytes", samples=(first,)),
    ]

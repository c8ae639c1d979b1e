"""PyTorch's CUDA caching allocator, replayed: from what a program asks for to what its statistics report.

The rules are those of c10/cuda/CUDACachingAllocator.cpp of torch 2.13 at its default settings, its constants those of
c10/core/AllocatorConfig.h: requests rounded up to 512 bytes, two pools, best fit by size and then by address, blocks
split and merged, segments kept until memory runs out or somebody empties the cache. One stream. Left out: expandable
segments, round-up divisions, a split limit, garbage collection, graph pools (none is on by default), and where the
driver puts a segment: addresses ascend here, which decides only between free blocks of the same size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipcost.bench.memory.liveness import Timeline

MIB = 1 << 20
ROUNDING = 512  # kMinBlockSize: every block is a multiple of it
SMALL_REQUEST = MIB  # kSmallSize: the largest request that the small pool serves
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_REQUEST = 10 * MIB  # kMinLargeAlloc: from here on a request has a segment of its own size
LARGE_SEGMENT = 20 * MIB  # large_segment_size: what smaller requests of the large pool are cut from
SEGMENT_ROUNDING = 2 * MIB  # kRoundLarge
WORKSPACE = "workspace"  # the kind of a storage that makes do with the room there is


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The allocator's statistics over one step: three peaks, and what it still holds from the driver at its end."""

    requested: int
    allocated: int
    reserved: int
    held: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The first step and a later one. `shortage` says where memory ran out; figures go as far as that."""

    first: StepMemory
    steady: StepMemory
    shortage: str = ""


class OutOfSegmentsError(Exception):
    """The capacity has no room for another segment, with every unused one given back."""


@dataclass(slots=True, eq=False)
class _Block:
    """A part of a segment: who its neighbours are, and how much of it was asked for (0: it is free)."""

    address: int
    size: int
    small: bool
    requested: int = 0
    before: _Block | None = None
    after: _Block | None = None


@dataclass(slots=True)
class CachingAllocator:
    """The allocator of one device and stream; `capacity` bounds what it may hold from the driver (None: no bound).

    `peaks` are requested, allocated and reserved bytes since `reset_peaks`. A block's bytes count as allocated whole,
    with the rest of a large block that was too small to split off.
    """

    capacity: int | None = None
    requested: int = 0
    allocated: int = 0
    reserved: int = 0
    peaks: tuple[int, int, int] = (0, 0, 0)
    _blocks: dict[int, _Block] = field(default_factory=dict)  # in use, by address
    _free: dict[bool, list[tuple[int, int, _Block]]] = field(default_factory=lambda: {True: [], False: []})
    _next_address: int = 0

    def allocate(self, request: int) -> int:
        """Serve a request of 1 byte or more: the block's address, or OutOfSegmentsError where nothing is left."""
        size = max(ROUNDING, _round_up(request, ROUNDING))
        free = self._free[size <= SMALL_REQUEST]
        at = bisect_left(free, (size,))
        block = free.pop(at)[-1] if at < len(free) else self._new_segment(size)
        rest = block.size - size
        if rest >= ROUNDING if block.small else rest > SMALL_REQUEST:
            self._split(block, size)
        block.requested = request
        self._blocks[block.address] = block
        self.requested += request
        self.allocated += block.size
        self._raise_peaks()
        return block.address

    def release(self, address: int) -> None:
        """Take a block back and merge it with its free neighbours."""
        block = self._blocks.pop(address)
        self.requested -= block.requested
        self.allocated -= block.size
        block.requested = 0
        if block.before and not block.before.requested:
            self._take_out(block.before)
            block = _merged(block.before, block)
        if block.after and not block.after.requested:
            self._take_out(block.after)
            block = _merged(block, block.after)
        insort(self._free[block.small], _key(block))

    def empty_cache(self) -> None:
        """Give every segment that is free as a whole back to the driver."""
        for small, free in self._free.items():
            whole = [entry[-1] for entry in free if not (entry[-1].before or entry[-1].after)]
            self._free[small] = [entry for entry in free if entry[-1].before or entry[-1].after]
            self.reserved -= sum(block.size for block in whole)

    def allocate_up_to(self, request: int) -> int | None:
        """Serve a request that may shrink, as in PyTorch's search over cuDNN's algorithms.

        It is no more than what is cached or free, and halved until it fits; None where nothing is left.
        """
        largest = max((free[-1][0] for free in self._free.values() if free), default=0)
        free = request if self.capacity is None else max(largest, self.capacity - self.reserved)
        size = min(request, free)
        while size > 0:
            try:
                return self.allocate(size)
            except OutOfSegmentsError:
                size //= 2
        return None

    def reset_peaks(self) -> None:
        """Let the peaks begin anew at what there is now."""
        self.peaks = (self.requested, self.allocated, self.reserved)

    def step_memory(self) -> StepMemory:
        """The peaks since the last reset, and what is held now."""
        return StepMemory(*self.peaks, self.reserved)

    def _new_segment(self, size: int) -> _Block:
        small = size <= SMALL_REQUEST
        whole = segment_size(size)
        if not self._has_room(whole):
            self.empty_cache()
        if not self._has_room(whole):
            raise OutOfSegmentsError
        self.reserved += whole
        block = _Block(self._next_address, whole, small)
        self._next_address += whole
        return block

    def _has_room(self, size: int) -> bool:
        return self.capacity is None or self.reserved + size <= self.capacity

    def _split(self, block: _Block, size: int) -> None:
        """Cut the front off for use; the rest is free."""
        rest = _Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if rest.after:
            rest.after.before = rest
        block.size, block.after = size, rest
        insort(self._free[block.small], _key(rest))

    def _take_out(self, block: _Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, _key(block)[:2])]

    def _raise_peaks(self) -> None:
        requested, allocated, reserved = self.peaks
        self.peaks = max(requested, self.requested), max(allocated, self.allocated), max(reserved, self.reserved)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def segment_size(size: int) -> int:
    """Bytes that the allocator takes from the driver for a block of `size` that no free block can serve."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE_REQUEST else _round_up(size, SEGMENT_ROUNDING)


def _key(block: _Block) -> tuple[int, int, _Block]:
    """The order in which free blocks are tried; no two have the same address, so that blocks are never compared."""
    return block.size, block.address, block


def _merged(front: _Block, back: _Block) -> _Block:
    front.size += back.size
    front.after = back.after
    if front.after:
        front.after.before = front
    return front


def replay(timeline: Timeline, capacity_bytes: int | None = None, emptied: Collection[int] = ()) -> Replay:
    """Replay a timeline: its first step, and its steady one, which finds the segments that the first one left.

    capacity_bytes: what the allocator may hold from the driver at most, None for no bound. emptied: indices of events
    before which the cache is emptied. A storage of the kind WORKSPACE is as large as there is room for, at most its
    bytes: cuDNN passes over algorithms that need more than is free.
    """
    timeline = two_steps(timeline)
    allocator = CachingAllocator(capacity_bytes)
    places: dict[int, int] = {}
    bounds = (0, first_event(timeline), timeline.steady_from, len(timeline.events))
    measured: list[StepMemory] = []
    shortage = ""
    for span in pairwise(bounds):  # what is present, the first step, the steady one
        allocator.reset_peaks()
        shortage = shortage or _run(timeline, span, allocator, places, emptied)
        measured.append(allocator.step_memory())
    _, first, steady = measured
    return Replay(first, steady, shortage)


def _run(
    timeline: Timeline,
    span: tuple[int, int],
    allocator: CachingAllocator,
    places: dict[int, int],
    emptied: Collection[int],
) -> str:
    """Apply the events of a span; say where memory ran out, empty where it did not. No bytes, no request."""
    for at in range(*span):
        if at in emptied:
            allocator.empty_cache()
        event = timeline.events[at]
        storage = timeline.storages[abs(event) - 1]
        address = places.pop(-event, None)
        if address is not None:
            allocator.release(address)
        if event < 0 or not storage.bytes:
            continue
        take = allocator.allocate_up_to if storage.kind == WORKSPACE else allocator.allocate
        try:
            place = take(storage.bytes)
        except OutOfSegmentsError:
            return f"{moment_of(timeline, at)}: no room for {storage.name} of {storage.bytes} bytes"
        if place is not None:
            places[event] = place
    return ""


def first_event(timeline: Timeline) -> int:
    """Index of the first event of the first step: the first moment is what is present before it."""
    return timeline.moments[1][0]


def moment_of(timeline: Timeline, event: int) -> str:
    """What runs at an event, in the timeline's words."""
    return [name for start, name in timeline.moments if start <= event][-1]


def two_steps(timeline: Timeline) -> Timeline:
    """Spell out the second step of a timeline that has but one, as inference's; what it leaves, its result, ends first.

    The second step makes the same storages again.
    """
    start = first_event(timeline)
    if timeline.steady_from > start:
        return timeline
    step = timeline.events[start:]
    left = {event for event in step if event > 0} - {-event for event in step if event < 0}
    once = (*step, *(-event for event in sorted(left)))
    again = tuple((at + len(once), name) for at, name in timeline.moments[1:])
    return replace(
        timeline,
        events=(*timeline.events[:start], *once, *once),
        moments=(*timeline.moments, *again),
        steady_from=start + len(once),
    )

"""The replay of PyTorch's caching allocator against a slow, obvious one, worked examples and what must always hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skipcost.bench.memory import allocator
from skipcost.bench.memory.allocator import (
    CachingAllocator,
    OutOfSegmentsError,
    Replay,
    StepMemory,
    replay,
    segment_size,
    two_steps,
)
from skipcost.bench.memory.liveness import Storage, Timeline

KIB, MIB = 1 << 10, 1 << 20
# Either side of every constant of the allocator, and what lies between.
SIZES = (1, 511, 512, 513, 300 * KIB, MIB - 512, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB - 512, 10 * MIB, 19 * MIB,
         20 * MIB, 21 * MIB + 5, 40 * MIB)  # fmt: skip
FREE = -1


@dataclass
class Slow:
    """The allocator's rules on plain lists: a segment is a list of [bytes, owner] runs; a search looks at all."""

    capacity: int | None = None
    segments: list[tuple[int, bool, list[list[int]]]] = field(default_factory=list)  # address, small, runs
    requests: dict[int, int] = field(default_factory=dict)
    next_address: int = 0

    def allocate(self, request: int) -> int | None:
        """Address of the smallest free run that is large enough, the lowest of equals; None where there is no room."""
        size = (request + 511) // 512 * 512
        small = size <= MIB
        fits = [
            (run[0], address + sum(each[0] for each in runs[:at]), runs, at)
            for address, is_small, runs in self.segments
            for at, run in enumerate(runs)
            if is_small == small and run[1] == FREE and run[0] >= size
        ]
        if not fits:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
            if self.capacity is not None and self.reserved + whole > self.capacity:
                self.empty_cache()
            if self.capacity is not None and self.reserved + whole > self.capacity:
                return None
            self.segments.append((self.next_address, small, [[whole, FREE]]))
            self.next_address += whole
            return self.allocate(request)
        found, address, runs, at = min(fits, key=lambda each: each[:2])
        rest = found - size
        split = rest >= 512 if small else rest > MIB
        runs[at : at + 1] = [[size, address], [rest, FREE]] if split else [[found, address]]
        self.requests[address] = request
        return address

    def release(self, address: int) -> None:
        """Mark the run free and join free runs that touch."""
        del self.requests[address]
        for _, _, runs in self.segments:
            for run in runs:
                run[1] = FREE if run[1] == address else run[1]
            at = 0
            while at + 1 < len(runs):
                if runs[at][1] == runs[at + 1][1] == FREE:
                    runs[at][0] += runs.pop(at + 1)[0]
                else:
                    at += 1

    def empty_cache(self) -> None:
        """Drop the segments that are one free run."""
        self.segments = [each for each in self.segments if any(run[1] != FREE for run in each[2])]

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(run[0] for _, _, runs in self.segments for run in runs)

    @property
    def allocated(self) -> int:
        """Bytes of all runs in use."""
        return sum(run[0] for _, _, runs in self.segments for run in runs if run[1] != FREE)


def timeline_of(*sizes: int, events: tuple[int, ...], start: int = 0, steady_from: int | None = None) -> Timeline:
    """A timeline of storages of these sizes; the first step starts at `start`, the steady one at `steady_from`."""
    storages = tuple(Storage(f"s{at}", "map", size) for at, size in enumerate(sizes))
    moments = ((0, "before the step"), (start, "the step"))
    return Timeline(storages, events, moments, start if steady_from is None else steady_from)


ACTIONS = st.lists(st.tuples(st.sampled_from(("make", "make", "end", "empty")), st.integers(0, 1000)), max_size=60)


@given(ACTIONS, st.sampled_from((None, 24 * MIB, 60 * MIB)))
def test_every_block_lies_where_the_obvious_allocator_puts_it(
    actions: list[tuple[str, int]], capacity: int | None
) -> None:
    """Addresses, requested, allocated and reserved bytes equal those of plain lists after every action."""
    fast, slow = CachingAllocator(capacity), Slow(capacity)
    alive: list[int] = []

    for action, number in actions:
        if action == "make":
            size = SIZES[number % len(SIZES)]
            expected = slow.allocate(size)
            if expected is None:
                with pytest.raises(OutOfSegmentsError):
                    fast.allocate(size)
            else:
                assert fast.allocate(size) == expected
                alive.append(expected)
        elif action == "end" and alive:
            address = alive.pop(number % len(alive))
            fast.release(address)
            slow.release(address)
        elif action == "empty":
            fast.empty_cache()
            slow.empty_cache()

        assert (fast.requested, fast.allocated, fast.reserved) == (
            sum(slow.requests.values()), slow.allocated, slow.reserved,
        )  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 8)), max_size=50))
def test_what_must_hold_of_any_trace(pairs: list[tuple[int, int]]) -> None:
    """Blocks never overlap, requested <= allocated <= reserved, reserved never shrinks, all that is freed merges."""
    memory = CachingAllocator()
    alive: dict[int, int] = {}
    held = 0

    for size, ends in pairs:
        alive[memory.allocate(size)] = size
        spans = sorted((address, address + size) for address, size in alive.items())
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
        assert memory.requested <= memory.allocated <= memory.reserved
        assert memory.reserved >= held
        held = memory.reserved
        for address in list(alive)[:ends]:
            memory.release(address)
            del alive[address]
    for address in alive:
        memory.release(address)
    memory.empty_cache()

    assert (memory.requested, memory.allocated, memory.reserved) == (0, 0, 0)


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),  # rounded up to a block, cut from a small segment
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest that the small pool serves
        (MIB + 1, MIB + 512, 20 * MIB),  # cut from a large segment
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # a segment of its own
        (11 * MIB, 12 * MIB, 12 * MIB),  # rounded to 2 MiB; a rest of 1 MiB is too small to be split off
        (19 * MIB + 512, 20 * MIB, 20 * MIB),
    ],
)
def test_a_single_request_costs_what_the_documented_constants_say(
    request_bytes: int, allocated: int, reserved: int
) -> None:
    """512-byte blocks, 2 MiB and 20 MiB segments, and own segments from 10 MiB on."""
    memory = CachingAllocator()

    memory.allocate(request_bytes)

    assert (memory.requested, memory.allocated, memory.reserved) == (request_bytes, allocated, reserved)


def test_the_smallest_block_that_fits_is_taken_and_split() -> None:
    """After two holes of 4 and 6 MiB a request of 3 MiB comes out of the hole of 4."""
    memory = CachingAllocator()
    places = [memory.allocate(size * MIB) for size in (6, 2, 4, 8)]  # fills one segment of 20 MiB
    memory.release(places[0])
    memory.release(places[2])

    address = memory.allocate(3 * MIB - 512)

    assert address == places[2]
    assert memory.allocated == 13 * MIB - 512  # 2 + 3 + 8: the rest of 1 MiB and a block is split off
    assert memory.reserved == 20 * MIB


def test_a_step_finds_the_segments_of_the_one_before() -> None:
    """The steady step's peak of reserved bytes keeps the first step's temporary, which the steady step never makes."""
    timeline = timeline_of(MIB, 40 * MIB, 12 * MIB, 12 * MIB, events=(1, 2, -2, 3, -3, 4, -4), start=1, steady_from=5)

    found = replay(timeline)

    assert found.first == StepMemory(41 * MIB, 41 * MIB, 42 * MIB, 42 * MIB)
    assert found.steady == StepMemory(13 * MIB, 13 * MIB, 42 * MIB, 42 * MIB)


def test_emptying_the_cache_gives_back_what_is_free_as_a_whole() -> None:
    """What the first step tried and freed is not held by the steady step where the cache was emptied between."""
    timeline = timeline_of(MIB, 40 * MIB, 12 * MIB, 12 * MIB, events=(1, 2, -2, 3, -3, 4, -4), start=1, steady_from=5)

    found = replay(timeline, emptied={3})

    assert found.first == StepMemory(41 * MIB, 41 * MIB, 42 * MIB, 14 * MIB)
    assert found.steady == StepMemory(13 * MIB, 13 * MIB, 14 * MIB, 14 * MIB)


def test_a_single_step_is_run_twice() -> None:
    """Inference's result is dropped before the second step, which then fits into the first one's segments."""
    timeline = timeline_of(MIB, 12 * MIB, 12 * MIB, events=(1, 2, 3, -2), start=1)

    found = replay(timeline)

    assert two_steps(timeline).events == (1, 2, 3, -2, -3, 2, 3, -2, -3)
    assert found.first == found.steady == StepMemory(25 * MIB, 25 * MIB, 26 * MIB, 26 * MIB)


def test_empty_storages_ask_for_nothing() -> None:
    """PyTorch's allocator returns no block for no bytes."""
    assert replay(timeline_of(0, events=(1, -1))) == Replay(StepMemory(0, 0, 0, 0), StepMemory(0, 0, 0, 0))


def test_where_memory_runs_out_cached_segments_go_first() -> None:
    """A request that fits once the cache is emptied succeeds; one that does not is named with its moment."""
    timeline = timeline_of(30 * MIB, 32 * MIB, events=(1, -1, 2, -2))

    assert replay(timeline, 32 * MIB).shortage == ""
    assert replay(timeline, 32 * MIB).steady.reserved == 32 * MIB
    assert replay(timeline, 31 * MIB).shortage == f"the step: no room for s1 of {32 * MIB} bytes"


@pytest.mark.parametrize(("capacity", "taken"), [
    (100 * MIB, 50 * MIB),  # there is room
    (60 * MIB, 40 * MIB),  # what is free, if that is less
    (26 * MIB, 6 * MIB // 8),  # of 6 MiB left no segment of 20 can be had, nor for its half and quarter
    (20 * MIB, 0),
])  # fmt: skip
def test_a_request_that_may_shrink_takes_the_room_there_is(capacity: int, taken: int) -> None:
    """As in PyTorch's search over algorithms: no more than is free, halved until a segment can be had."""
    memory = CachingAllocator(capacity)
    memory.allocate(20 * MIB)

    place = memory.allocate_up_to(50 * MIB)

    assert memory.requested == 20 * MIB + taken
    assert (place is None) == (taken == 0)


def test_a_request_that_may_shrink_takes_a_cached_block_where_that_is_larger() -> None:
    """A free block of 30 MiB serves it, though the device has nothing left."""
    memory = CachingAllocator(30 * MIB)
    memory.release(memory.allocate(30 * MIB))

    memory.allocate_up_to(50 * MIB)

    assert (memory.requested, memory.reserved) == (30 * MIB, 30 * MIB)


@given(st.lists(st.integers(1, 30 * MIB), min_size=1, max_size=30))
@example([2_081_793, 10_500_609, 10_500_609])  # a steady step reserves more than the first one did
def test_a_replay_is_the_same_each_time_and_its_own_peak_is_room_enough(sizes: list[int]) -> None:
    """Equal traces give equal figures, and a device of exactly the reserved peak has no shortage."""
    events = tuple(event for at in range(len(sizes)) for event in ((at + 1, -at) if at % 3 == 2 else (at + 1,)))
    timeline = timeline_of(*sizes, events=events)

    found = replay(timeline)

    assert replay(timeline) == found
    assert replay(timeline, max(found.first.reserved, found.steady.reserved)) == found
    assert found.first.requested <= found.first.allocated <= found.first.reserved


@given(st.integers(1, 1 << 34))
def test_a_segment_holds_what_it_was_taken_for(size: int) -> None:
    """Every segment is a whole number of 2 MiB and no smaller than its request."""
    assert segment_size(size) >= size
    assert segment_size(size) % (2 * MIB) == 0


HEADER = Path(find_spec("torch").origin).parent / "include/c10/core/AllocatorConfig.h"  # the wheel ships it


@pytest.mark.parametrize(
    ("pattern", "ours"),
    [
        (r"kMinBlockSize = (\d+);", allocator.ROUNDING),
        (r"kSmallSize = (\d+);", allocator.SMALL_REQUEST),
        (r"kSmallBuffer = (\d+);", allocator.SMALL_SEGMENT),
        (r"kMinLargeAlloc = (\d+);", allocator.LARGE_REQUEST),
        (r"kRoundLarge = (\d+);", allocator.SEGMENT_ROUNDING),
        (r"large_segment_size_\{(\d+)\}", allocator.LARGE_SEGMENT),
    ],
)
def test_the_constants_are_those_of_the_installed_torch(pattern: str, ours: int) -> None:
    """A torch whose allocator has other constants fails here, before it makes wrong predictions."""
    found = re.findall(pattern, HEADER.read_text())

    assert [int(each) for each in found] == [ours]

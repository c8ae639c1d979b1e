"""Cases on which live bytes are checked, drawn over all of the project's tables; and how two courses are compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any, TypeVar

import torch

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.measure.live_bytes import LiveBytes
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.memory.liveness import Timeline
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec
from skipcost.unet_models.spec import CHOICES as SPEC_CHOICES

T = TypeVar("T")
SIDES = (16, 17, 19, 22, 24)  # odd ones are cropped


def _spec(draw: random.Random) -> ModelSpec:
    variant = draw.choice(list(VARIANTS))
    row = VARIANTS[variant]
    head, width = draw.choice(row.heads), draw.choice((1, 2, 3, 4))
    depth = draw.choice((1, 1, 1, 1, 2, 2))
    return ModelSpec(
        variant=variant,
        depth=depth,
        width=width,
        skip=draw.choice(list(SKIPS)),
        in_channels=draw.choice((1, 3)),
        classes=1 if head == "guided" else draw.choice((1, 2, 5)),
        padding=draw.choice(SPEC_CHOICES["padding"]),
        norm=draw.choice(SPEC_CHOICES["norm"]),
        bias=draw.choice((True, False)),
        upsample=draw.choice(row.upsamples),
        head=head,
        max_width=draw.choice((None, 2 * width)),
        pruned_to=draw.randint(1, depth) if row.prunable and head == "single" and draw.random() < 0.3 else None,
    )


def cells(seed: int) -> Iterator[Case]:
    """Yield cases without end, the same ones for the same seed: each can run, on small maps."""
    draw = random.Random(seed)  # noqa: S311 - nothing secret
    while True:
        named: dict[str, Any] = {
            name: draw.choice(values) for name, values in CHOICES.items() if name not in {"backend", "outputs"}
        }
        size = {"height": draw.choice(SIDES), "width": draw.choice((*SIDES, 48))}
        if draw.random() < 0.2:
            size = {"height": 60, "width": 66}  # large enough for valid convolutions at depth 2
        outputs = draw.choice(CHOICES["outputs"])
        try:
            case = Case(spec=_spec(draw), batch=draw.choice((1, 2, 3)), outputs=outputs, **size, **named)
            if not refusal_of(case):
                yield case
        except ValueError:
            continue  # a combination that a spec refuses


def pairs(case: Case) -> set[frozenset[tuple[str, Any]]]:
    """Every pair of values that a case has among those of the project's tables."""
    flat = case.flat()
    names = [*CHOICES, *SPEC_CHOICES, "bias"]
    return {frozenset(pair) for pair in combinations([(name, flat[name]) for name in names if name != "backend"], 2)}


def covering(cases: Iterable[T], met_by: Callable[[T], set[Any]], times: int = 1) -> list[T]:
    """Return the cases that meet something, a pair of values for example, that fewer than `times` before them meet."""
    seen: Counter[Any] = Counter()
    chosen = []
    for case in cases:
        met = met_by(case)
        if any(seen[each] < times for each in met):
            seen.update(met)
            chosen.append(case)
    return chosen


def turns(changes: Iterable[int]) -> list[int]:
    """Return live bytes wherever they turn from rising to falling or back: a course but for the order within a run."""
    found: list[int] = []
    rising = False
    for change in filter(None, changes):
        if found and (change > 0) == rising:
            found[-1] += change
        else:
            found.append((found[-1] if found else 0) + change)
        rising = change > 0
    return found


def changes(line: Timeline) -> Iterator[int]:
    """Yield the bytes of a timeline's events, what ends as negative."""
    for event in line.events:
        yield line.storages[abs(event) - 1].bytes * (1 if event > 0 else -1)


class Followed(LiveBytes):
    """Live bytes with every change of theirs."""

    def __init__(self, present: Iterable[torch.Tensor]) -> None:
        self.changes: list[int] = []
        super().__init__(present)

    def _follow(self, tensor: torch.Tensor) -> None:
        before = self.live
        super()._follow(tensor)
        self.changes.append(self.live - before)

    def _release(self, key: int, size: int) -> None:
        super()._release(key, size)
        self.changes.append(-size)

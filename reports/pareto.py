"""The Pareto front of a cost and a benefit. Only for axes that pull against each other: two costs have no front."""

from __future__ import annotations

from collections.abc import Sequence


def front(costs: Sequence[float], benefits: Sequence[float]) -> list[int]:
    """Positions of the points that no other point beats, cheapest first.

    A point beats another if it costs no more, gives no less, and is better in one of the two. Equal points do not
    beat each other, so all of them are on the front or none is.
    """
    kept: list[int] = []
    for at in sorted(range(len(costs)), key=lambda each: (costs[each], -benefits[each], each)):
        last = kept[-1] if kept else None
        if last is None or benefits[at] > benefits[last] or (costs[at], benefits[at]) == (costs[last], benefits[last]):
            kept.append(at)
    return kept

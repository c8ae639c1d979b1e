"""What paired measurements say: a ratio with its interval, whether it is a change, and what could have been seen.

Two processes of either revision take turns in blocks A B B A, so that whatever the machine does meanwhile falls on
both; a block gives one log ratio. Blocks of one pair of processes share how the two lie in memory, which can differ by
percents for equal code: the process pair is the unit whose scatter counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POWER = 0.8  # of the smallest change that could have been seen

Pairs = Sequence[Sequence[float]]  # log ratios now / base: by pair of processes, by block


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio now / base. `error`: standard error of its logarithm; `pairs`: of processes behind it."""

    ratio: float
    error: float
    pairs: int

    def interval(self, alpha: float) -> tuple[float, float]:
        """The two-sided interval that misses the true ratio with probability alpha."""
        reach = float(_stats().t.isf(alpha / 2, self.pairs - 1)) * self.error
        return self.ratio * math.exp(-reach), self.ratio * math.exp(reach)

    def p_value(self, floor: float) -> float:
        """How likely so large a ratio is, either way, if no change is larger than `floor`, e.g. 0.01 for 1 %."""
        beyond = abs(math.log(self.ratio)) - math.log1p(floor)
        if self.error == 0:
            return 0.0 if beyond > 0 else 1.0
        return min(1.0, 2 * float(_stats().t.sf(beyond / self.error, self.pairs - 1)))

    def visible(self, alpha: float, floor: float) -> float:
        """The smallest relative change that would have been found with probability POWER."""
        student = _stats().t
        reach = student.isf(alpha / 2, self.pairs - 1) + student.isf(1 - POWER, self.pairs - 1)
        return math.expm1(math.log1p(floor) + float(reach) * self.error)


def _stats() -> Any:
    from scipy import stats  # noqa: PLC0415 - a second, which commands that compare no latencies do without

    return stats


def estimate(pairs: Pairs) -> Estimate:
    """Mean over process pairs of the centre of their blocks, with the error that the scatter of those centres says.

    The noise of blocks is in that scatter already; drawing blocks again, as a bootstrap over both levels does, would
    count it twice. Student's quantile in `Estimate` does justice to so few pairs.
    """
    count = len(pairs)
    if count < 2:  # noqa: PLR2004 - one pair has no scatter
        message = f"{count} process pair has no scatter to judge by: 2 or more are needed"
        raise ValueError(message)
    centres = [centre(each) for each in pairs]
    error = statistics.stdev(centres) / math.sqrt(count)
    return Estimate(math.exp(statistics.fmean(centres)), error, count)


def centre(values: Sequence[float]) -> float:
    """The median of all pairwise means (Hodges and Lehmann, 1963).

    As sure as the mean where noise is normal, where the median needs half as many values again; unmoved by outliers
    until they are three in ten.
    """
    first, second = np.triu_indices(len(values))
    each = np.asarray(values, dtype=float)
    return float(np.median((each[first] + each[second]) / 2))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses fall so that a single false one among all has probability alpha at most (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    fallen = [False] * len(p_values)
    for rank, at in enumerate(order):
        if p_values[at] > alpha / (len(p_values) - rank):
            break
        fallen[at] = True
    return fallen


def proportion(successes: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion (Clopper and Pearson, 1934), one-sided at 0 and at `runs`."""
    one_sided = successes in (0, runs)
    tail = (1 - confidence) / (1 if one_sided else 2)
    beta = _stats().beta
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, runs - successes + 1))
    high = 1.0 if successes == runs else float(beta.ppf(1 - tail, successes + 1, runs - successes))
    return low, high

"""Latencies for `skipcost fit --measure`: networks are run on this machine there and then, one process per case.

Each network is timed once per command, as a sweep times it but for a shorter time; nothing goes into a store. The limit
is checked against the slow end, p99, and the median is shown beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.fit.gauge import Target
from skipcost.bench.fit.limits import Gauge
from skipcost.bench.measure.timing import Budget
from skipcost.bench.sweep.driver import Request, Server
from skipcost.bench.sweep.plan import Limits as CaseLimits

BUDGET = Budget(seconds=1.0, noise=0.01, least=10, warmup_seconds=2.0)
PERCENTILE = 99
STEPS = 30  # more than the warm-up and the fewest samples take: a case within the limit has ended by then
STARTUP_S = 60.0  # building a network of a thousand million parameters takes some ten seconds


def percentile(samples: tuple[float, ...], percent: int) -> float:
    """The smallest sample that at least `percent` in a hundred do not exceed; of fewer than 100 the largest is p99."""
    ordered = sorted(samples)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


@dataclass(slots=True)
class Stopwatch:
    """Times cases on the server and remembers what it timed for as long as the command runs.

    `most_s` is the limit; a case that has not ended long after it could have is over it. `tell` hears of each case.
    """

    run: Callable[[Request], list[Result]]
    memory_bytes: int | None
    most_s: float
    tell: Callable[[str], None]
    known: dict[str, Result] = field(default_factory=dict)

    def result(self, case: Case) -> Result:
        """The case's latency; measured once."""
        if case.case_id not in self.known:
            self.tell(case.spec.label)
            seconds = STARTUP_S + STEPS * self.most_s
            request = Request(case, ("latency_s",), asdict(BUDGET), seconds, self.memory_bytes)
            (self.known[case.case_id],) = self.run(request)
        result = self.known[case.case_id]
        if result.outcome == "unsupported":
            message = f"{case.name} cannot be measured here: {result.note}"
            raise BenchError(message)
        return result

    def p99(self, case: Case) -> float:
        """Seconds that 99 of 100 steps stay within; infinite where the case did not run to its end."""
        samples = self.result(case).samples
        return percentile(samples, PERCENTILE) if samples else math.inf

    def median(self, case: Case) -> float:
        """The median step in seconds."""
        samples = self.result(case).samples
        return statistics.median(samples) if samples else math.inf

    def remark(self, case: Case) -> str:
        """What makes the case's latency doubtful, or why there is none; empty where it was not asked for."""
        known = self.known.get(case.case_id)
        if known is None:
            return ""
        said = f"{known.outcome}: {known.note}" if known.outcome != "ok" else known.note
        return "; ".join(each for each in (f"{len(known.samples)} steps timed" if known.samples else "", said) if each)


def measured_gauge(gauge: Gauge, target: Target, server: Server, most_s: float, tell: Callable[[str], None]) -> Gauge:
    """The gauge with latencies measured on this machine; `most_s` is the limit, 0 where there is none.

    MachineError where torch cannot use the target here.
    """
    if target.device and not server.environment["cuda"]:
        message = f"this machine has {target.title}, but torch sees no CUDA device: install a CUDA build of torch"
        raise MachineError(message)
    memory = None if target.device else CaseLimits().memory_bytes(server.environment["memory_bytes"])
    watch = Stopwatch(lambda request: list(server.run(request)), memory, most_s, tell)
    origin = (
        f"measured here: median (p99), {BUDGET.seconds:g} s of steps per network; the limit is checked against p99, "
        "which of fewer than 100 steps is the slowest"
    )
    return replace(
        gauge,
        measures={**gauge.measures, "latency": watch.p99},
        origins={**gauge.origins, "latency": origin},
        by_running=("latency",),
        middle={"latency": watch.median},
        remark=watch.remark,
    )

"""What the CPU can do at best, by a probe of a second or two: how fast it copies memory, how fast it multiplies.

There is no table of CPUs: two of one name differ by their memory and by what else runs beside them. The probe runs in
a process of its own, pinned to its threads as a case is, so that the one that asks starts no threads and keeps none.
It is a sample of that moment: on a shared machine another probe may be some tenths off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

from skipcost.bench.errors import MachineError
from skipcost.bench.measure.environment import cpu_name
from skipcost.bench.measure.process import PYTHON
from skipcost.bench.measure.timing import Budget, cpu_clock, sample
from skipcost.bench.measure.worker import take_threads
from skipcost.kernels.devices import FIGURES, Device

COPIED_BYTES = 2**28  # per copy, of fp32: more than a core's own caches, as many maps are
SIDE = 1024  # of the matrices that are multiplied
SMALL_SIDE = 256  # of those that tell whether the large ones would take too long
SLOW = 1 / 16  # of fp32's rate: without instructions for them, 16-bit products can be 86 times slower
BUDGET = Budget(seconds=0.15, noise=0.02, least=10, warmup_seconds=0.3)
TIME_LIMIT_S = 120.0
_known: dict[int, Device] = {}  # what was probed in this process, and in the one that it was forked from, by threads


def probe(threads: int) -> dict[str, Any]:
    """Measure this process's CPU on so many threads: bytes a second of a copy, FLOP/s per precision of a product.

    The quickest of the samples counts, since a limit is what is looked for. Pins the process.
    """
    import torch  # noqa: PLC0415 - what looks the figures up needs none

    take_threads(threads)
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    copy_s = _quickest(lambda: target.copy_(source))
    fp32 = _product(SIDE, torch.float32)
    rates = {"fp32": fp32, "bf16": _rate(torch.bfloat16, fp32), "fp16": _rate(torch.float16, fp32)}
    return {"bandwidth_bytes_per_s": 2 * COPIED_BYTES / copy_s, "flop_per_s": rates}


def _quickest(call: Any) -> float:
    return min(sample(call, cpu_clock, BUDGET).seconds)


def _rate(dtype: Any, fp32: float) -> float:
    """FLOP/s of a square product; of a small one where that shows 16-bit operands to be far slower than fp32's."""
    small = _product(SMALL_SIDE, dtype)
    return small if small < SLOW * fp32 else max(small, _product(SIDE, dtype))


def _product(side: int, dtype: Any) -> float:
    import torch  # noqa: PLC0415 - see above

    left, right = (torch.ones(side, side, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _quickest(lambda: left @ right)


@cache  # once per process: a server asks ahead of its forks, which inherit the answer
def probed_cpu(threads: int) -> Device:
    """This machine's CPU with so many threads as a device. MachineError where the probe does not come to an end."""
    command = [*PYTHON, "-m", "skipcost.bench.measure.probe", str(threads)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        message = f"the CPU could not be probed ({error}); run `{' '.join(command)}` to see why"
        raise MachineError(message) from None
    figures = json.loads(done.stdout)
    load = os.getloadavg()[0]
    what = f"measured by a probe on {threads} thread{'s' if threads > 1 else ''}, the load was {load:.1f}"
    _known[threads] = Device(
        name=f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}",
        architecture="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        sources=dict.fromkeys(FIGURES, what) | {"memory_bytes": "the operating system"},
        **figures,
    )
    return _known[threads]


def known_cpu(threads: int) -> Device | None:
    """The same where it was probed already; nothing is measured."""
    return _known.get(threads)


def slow_words(device: Device, precision: str) -> str:
    """Say how far below fp32 a CPU's products are that has no instructions for this precision's; empty elsewhere."""
    operands = precision.removeprefix("amp-")
    rate = device.flop_per_s.get(operands, device.flop_per_s["fp32"])
    if device.architecture != "cpu" or rate >= SLOW * device.flop_per_s["fp32"]:
        return ""
    ratio = device.flop_per_s["fp32"] / rate
    return f"slow: the CPU has no instructions for {operands}, whose products take {ratio:.0f} times as long as fp32's"


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]))))  # noqa: T201 - the answer to the process that asked

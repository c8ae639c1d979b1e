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

from skipcost.bench.devices import FIGURES, Device
from skipcost.bench.environment import cpu_name
from skipcost.bench.errors import MachineError
from skipcost.bench.worker import take_threads
from skipcost.kernels.timing import Budget, cpu_clock, sample

COPIED_BYTES = 2**28  # per copy, of fp32: more than a core's own caches, as many maps are
SIDE = 1024  # of the matrices that are multiplied
SMALL_SIDE = 256  # of those that tell whether the large ones would take too long: without instructions for it
SLOW_FLOP_PER_S = 5e9  # 16-bit products can be 86 times slower than fp32
BUDGET = Budget(seconds=0.15, noise=0.02, least=5, warmup_seconds=0.3)
TIME_LIMIT_S = 120.0
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def probe(threads: int) -> dict[str, Any]:
    """Measure this process's CPU on so many threads: bytes a second of a copy, FLOP/s per precision of a product.

    The quickest of the samples counts, since a limit is what is looked for. Pins the process.
    """
    import torch  # noqa: PLC0415 - what looks the figures up needs none

    take_threads(threads)
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    copy_s = _quickest(lambda: target.copy_(source))
    rates = {name: _rate(getattr(torch, dtype)) for name, dtype in DTYPES.items()}
    return {"bandwidth_bytes_per_s": 2 * COPIED_BYTES / copy_s, "flop_per_s": rates}


def _quickest(call: Any) -> float:
    return min(sample(call, cpu_clock, BUDGET).seconds)


def _rate(dtype: Any) -> float:
    """FLOP/s of a square product; of a small one where that is slow."""
    import torch  # noqa: PLC0415 - see above

    rate = 0.0
    for side in (SMALL_SIDE, SIDE):
        if side == SIDE and rate < SLOW_FLOP_PER_S:
            break
        left, right = (torch.ones(side, side, dtype=dtype) for _ in range(2))
        rate = max(rate, 2 * side**3 / _quickest(lambda left=left, right=right: left @ right))
    return rate


@cache  # once per process: a server asks ahead of its forks, which inherit the answer
def probed_cpu(threads: int) -> Device:
    """This machine's CPU with so many threads as a device. MachineError where the probe does not come to an end."""
    command = [sys.executable, "-m", "skipcost.bench.probe", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        message = f"the CPU could not be probed ({error}); run `{' '.join(command)}` to see why"
        raise MachineError(message) from None
    figures = json.loads(done.stdout)
    what = f"measured by a probe on {threads} thread{'s' if threads > 1 else ''}"
    return Device(
        name=f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}",
        architecture="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        sources=dict.fromkeys(FIGURES, what) | {"memory_bytes": "the operating system"},
        **figures,
    )


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]))))  # noqa: T201 - the answer to the process that asked

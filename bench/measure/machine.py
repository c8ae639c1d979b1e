"""What measuring takes of a machine: clocks, graphs, caches, ceilings and facts.

What is particular to a kind of device is in `Machine`: one for CUDA, and one for the CPU, on which the same code runs
in tests, slowly and without graphs.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from skipcost.bench.measure.environment import version_of
from skipcost.bench.measure.timing import Budget, Clock, cpu_clock, no_gc, sample
from skipcost.kernels.ops.launch import interpreted
from skipcost.kernels.precision import rounding

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_CALLS = 3  # before a capture: cuDNN chooses its algorithms, Triton compiles, workspaces are allocated
COPIED_BYTES = 2**30  # twenty times the largest L2 cache: nothing of it stays there
SIDE = 8192  # rows and columns of the matrices whose product is the ceiling: 0.55 T multiply-adds
HOST_CACHE_BYTES = 2**22
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
QUICK = Budget(seconds=0.3, noise=0.005, least=10, warmup_seconds=1.0)


@dataclass(frozen=True, slots=True)
class Machine:
    """What differs between devices.

    clock: times calls one by one, in seconds; `before=` runs ahead of each, untimed. capture: takes a call and how
    often to repeat it, returns one call that does all that, as a CUDA graph where `graphs`. flush: leaves nothing
    useful in the last cache. synchronize: waits for the device, and raises what went wrong there.
    """

    device: str  # as torch names it
    clock: Callable[..., list[float]]
    capture: Callable[[Callable[[], object], int], Callable[[], object]]
    flush: Callable[[], object]
    synchronize: Callable[[], object]
    graphs: bool

    def clock_for(self, cache: str) -> Clock:
        """Return the clock that finds the cache "hot", left by the call before, or "cold", flushed ahead of each."""
        return self.clock if cache == "hot" else partial(self.clock, before=self.flush)


def machine_of(device: str) -> Machine:
    """Return the machine that goes by this name, "cuda" or "cpu"."""
    return cuda_machine() if device == "cuda" else cpu_machine()


def cuda_machine() -> Machine:
    """The current CUDA device; its flush writes as many bytes as the L2 cache holds."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
    return Machine("cuda", cuda_clock, capture_graph, buffer.zero_, torch.cuda.synchronize, graphs=True)


def cpu_machine() -> Machine:
    """The CPU, standing in for a GPU: calls are repeated as they are."""
    buffer = torch.empty(HOST_CACHE_BYTES, dtype=torch.uint8)

    def repeat(call: Callable[[], object], times: int) -> Callable[[], object]:
        return lambda: [call() for _ in range(times)]

    return Machine("cpu", cpu_clock, repeat, buffer.zero_, lambda: None, graphs=False)


def cuda_clock(call: Callable[[], object], count: int, before: Callable[[], object] | None = None) -> list[float]:
    """Time `count` calls on the device: an event either side of each, one synchronisation at the end.

    `before` runs ahead of each, outside of its events. What a call launches itself is timed with the gaps between.
    """
    spans = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before:
            before()
        start.record()
        call()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in spans]


def capture_graph(call: Callable[[], object], times: int) -> Callable[[], object]:
    """Capture `times` calls in one CUDA graph and return its replay; they are warmed up on a stream of their own.

    Garbage is collected before and not during the capture: freeing a tensor then could end it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with no_gc(), torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


@contextmanager
def arithmetic(precision: str, *, benchmark: bool = True) -> Iterator[None]:
    """Multiply fp32 as `precision` has it, and let cuDNN try its algorithms; settings are restored."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark
    try:
        with rounding(tf32=precision == "tf32"):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached here and now: bytes a second of a copy, read and written counted; MACs a second."""

    copy_bytes_per_s: float
    macs_per_s: dict[str, float]  # by precision, of a product of square matrices


def measure_ceilings(
    machine: Machine, precisions: tuple[str, ...], *, copied_bytes: int = COPIED_BYTES, side: int = SIDE,
    budget: Budget = QUICK,
) -> Ceilings:  # fmt: skip
    """Time a copy from device memory to device memory, and a product of `side` x `side` matrices in each precision."""

    def median(call: Callable[[], object]) -> float:
        return statistics.median(sample(call, machine.clock, budget).seconds)

    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy = 2 * copied_bytes / median(partial(target.copy_, source))
    del source, target
    rates = {}
    for precision in precisions:
        # Random numbers: a product of zeros draws less power, and runs at higher clocks than any real one.
        a, b = (torch.randn(side, side, device=machine.device).to(DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        with arithmetic(precision):
            rates[precision] = side**3 / median(partial(torch.matmul, a, b, out=out))
    return Ceilings(copy, rates)


def facts(device: str) -> dict[str, Any]:
    """Describe the device: name, compute capability, sizes, and what the driver says where it can be asked."""
    if device != "cuda":
        return {"name": platform.processor() or platform.machine(), "interpreted": interpreted()}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **_driver_says(str(getattr(properties, "uuid", ""))),
    }


def _driver_says(uuid: str) -> dict[str, str]:
    """Ask nvidia-smi, which comes with the driver, for the state of one card; nothing where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    which = (f"--id=GPU-{uuid}",) if uuid else ()
    command = (program, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", *which)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout else []
    return dict(zip(SMI_FIELDS, values, strict=False))


def versions() -> dict[str, str]:
    """Return the versions of what makes the numbers."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "skipcost": version_of("skipcost"),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(cudnn or "none"),
    }

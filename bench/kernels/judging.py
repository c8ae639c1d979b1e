"""Judging configurations: run twice, compare with float64 (`validate`), and say what came of it in a row.

`verify` works in processes of its own (`jobs`), several at a time where the memory suffices: compiling takes longest.
PyTorch's own implementations are judged by nothing but giving numbers: they round in between, which the bound of a
kernel that rounds once cannot allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skipcost.bench.cases.record import outcome_of
from skipcost.bench.errors import LostDeviceError
from skipcost.bench.kernels import jobs
from skipcost.bench.kernels.cases import LIBRARIES
from skipcost.bench.kernels.jobs import Done, Job, Limits, Row, Work
from skipcost.bench.measure.machine import arithmetic, machine_of
from skipcost.bench.streams import Progress
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.ops.launch import interpreted
from skipcost.kernels.ops.tiles import Tile

if TYPE_CHECKING:
    from skipcost.kernels.verify.table import Kernel, Operands, Results

Configuration = tuple[Call, str, Tile | None]  # what is run, by which implementation, with which tile

SEED = 0
INFINITE = 1e30  # stands for an infinite error where it is written down: JSON has no infinity
OUTCOMES = {  # of exceptions
    "OutOfMemoryError": "out_of_memory",
    "OutOfResources": "unsupported",  # Triton's: more shared memory or threads than this GPU has
}
FAILURES = ("wrong", "unrepeatable", "crash", "timeout")
MOST_WORKERS = 8
MEMORY_SHARE = 0.85  # of the GPU's, for all processes; their contexts take the rest
STEP_IMAGES = 2  # of a training step that are judged: float64 of more would not fit, and two share statistics


def why_not(device: str) -> str:
    """Say why kernels cannot be run on a device here; empty where they can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "this PyTorch sees no CUDA GPU: run it on a machine with one"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'skipcost[gpu]'"
    if device == "cpu" and not interpreted():
        return "on a CPU the kernels only run in Triton's interpreter: set TRITON_INTERPRET=1, or use a CUDA GPU"
    return ""


def limits_for(device: str, until: float) -> Limits:
    """Return how many processes may work at a time, with how much memory; none on a CPU, which works in this one."""
    if device != "cuda":
        return Limits(until, workers=0)
    memory = int(torch.cuda.get_device_properties(0).total_memory * MEMORY_SHARE)
    return Limits(until, workers=min(MOST_WORKERS, len(os.sched_getaffinity(0))), memory=memory)


def watched(title: str, todo: Sequence[Job], work: Work, limits: Limits) -> Iterator[Done]:
    """`jobs.run`, with a line of progress on stderr."""
    progress = Progress(title, sum(len(job.parts) for job in todo), limits.until)
    for done in jobs.run(todo, work, limits):
        if done.row is not None:
            progress.step(failed=done.row["outcome"] in FAILURES)
        yield done


def job_bytes(call: Call) -> int:
    """Estimate what judging a call takes: its maps, and in float64 those of one image, or of two of a whole step."""
    (height, width), (out_height, out_width) = call.window, call.out_size
    image = call.in_channels * height * width * call.factor**2
    image += (call.out_channels or call.in_channels) * out_height * out_width
    if call.op == "conv_bn_relu_train":
        return min(call.batch, STEP_IMAGES) * image * 8 * 14
    return call.batch * image * 16 + image * 8 * 8


def what_of(call: Call, device: str, kind: str = "normal") -> dict[str, Any]:
    """Return what the parts of a call's job share; kind: of data, a row of `canaries.DATA`."""
    return {"call": call.key, "device": device, "kind": kind}


def part_of(implementation: str, tile: Tile | None) -> dict[str, Any]:
    """Return a configuration as JSON."""
    return {"implementation": implementation, "tile": asdict(tile) if tile else None}


def tile_of(part: dict[str, Any]) -> Tile | None:
    """Read the tile of a configuration, or of a row, back."""
    return Tile(**part["tile"]) if part["tile"] else None


def implementations(call: Call, device: str) -> list[str]:
    """Return what can run a call on a device: ours on a GPU, or where Triton interprets."""
    from skipcost.kernels.verify.table import KERNELS  # noqa: PLC0415 - loads every op

    names = KERNELS[call.op].implementations
    return [name for name in names if name in LIBRARIES or device == "cuda" or interpreted()]


def verify(what: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Run each configuration of a call twice and judge it; a row has `worst`, its error over the bound."""
    from skipcost.kernels.verify.table import KERNELS  # noqa: PLC0415 - loads every op

    call = Call.parse(what["call"])
    if call.op == "conv_bn_relu_train":
        call = replace(call, batch=min(call.batch, STEP_IMAGES))
    judge = _Judge(KERNELS[call.op])
    yield from on_operands(call, what, parts, judge.attempt)


def on_operands(
    call: Call,
    what: dict[str, Any],
    parts: Sequence[dict[str, Any]],
    attempt: Callable[[Operands, dict[str, Any]], Row],
) -> Iterator[Row]:
    """Make the operands of a call and yield the row of each part: what `attempt` returns, or of what it raises.

    LostDeviceError if the device does not answer after that.
    """
    from skipcost.kernels.verify.table import operands  # noqa: PLC0415 - loads every op

    machine = machine_of(what["device"])
    with torch.no_grad(), arithmetic(call.precision):
        try:
            given = operands(call, machine.device, SEED, what["kind"])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome of all parts
            yield from (reason(error) for _ in parts)
            return
        for part in parts:
            try:
                row = attempt(given, part)
                machine.synchronize()
            except Exception as error:  # noqa: BLE001 - a kernel may fail in any way; that is its row
                row = reason(error)
            yield row
            if row["outcome"] == "crash":
                probe(machine.synchronize)
        del given
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other processes share the memory


def probe(synchronize: Callable[[], object]) -> None:
    """Raise LostDeviceError if the device cannot be waited for any more."""
    try:
        synchronize()
    except Exception as error:
        message = "the device does not answer any more"
        raise LostDeviceError(message) from error


class _Judge:
    """Judges the implementations of one call on one set of operands.

    A result that equals an earlier one of ours bit for bit has its error: float64 takes far longer than the kernels.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.known: Results | None = None
        self.verdict = (0.0, "")

    def attempt(self, given: Operands, part: dict[str, Any]) -> Row:
        """Run one configuration twice and return its row."""
        name, tile = part["implementation"], tile_of(part)
        run, ours = self.kernel.implementations[name], name not in LIBRARIES
        results, again = run(given, tile), run(given, tile)
        if ours and not same_bits(results, again):
            return jobs.failed("unrepeatable", "two runs on the same input gave different bits")
        del again
        worst, where = self.errors(given, results, ours=ours)
        if worst == INFINITE or (ours and worst > 1):
            return jobs.failed("wrong", f"{where} is off by {worst:.3g} times what rounding allows") | {"worst": worst}
        return {"outcome": "ok", "note": "", "worst": worst}

    def errors(self, given: Operands, results: Results, *, ours: bool) -> tuple[float, str]:
        """Return the worst error over its bound, and of what."""
        if ours and self.known is not None and same_bits(self.known, results):
            return self.verdict
        found: dict[str, float] = {}
        for image, result in by_image(given, results):
            for where, error in self.kernel.errors(image, result, ours).items():
                found[where] = max(found.get(where, 0.0), error)
        where = max(found, key=lambda each: found[each])
        verdict = min(found[where], INFINITE), where
        if ours and self.known is None:
            self.known, self.verdict = results, verdict
        return verdict


def by_image(given: Operands, results: Results) -> Iterator[tuple[Operands, Results]]:
    """Split operands and results into single images, which only the statistics of training tie together."""
    if given.call.op == "conv_bn_relu_train":
        yield given, results
        return
    for at in range(given.call.batch):
        one = slice(at, at + 1)
        maps = tuple(each[one] for each in given.maps)
        yield replace(given, call=replace(given.call, batch=1), maps=maps), tuple(each[one] for each in results)


def reason(error: Exception) -> Row:
    """Return the row of what was raised: a refusal before the launch, want of memory, or a crash."""
    return jobs.failed(*outcome_of(error, ValueError, OUTCOMES))


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit by bit: NaN equals itself, and -0.0 is not 0.0."""
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        for a, b in zip(one, other, strict=True)
    )


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])

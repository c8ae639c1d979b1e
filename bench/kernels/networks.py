"""Whole networks: each made, verified and timed in each of `ways.WAYS` on equal terms: channels_last, a graph per step.

All ways of a case get the same seeded weights and statistics, and a precise run to be compared with: at inference in
float64, of the first image; in training in float32, of all gradients. A way may err twice as much as eager PyTorch in
the same precision does, the rule of flash-attention's tests. `take` works in a process of its own (`jobs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.bench.kernels.cases import STEP_MACS, Setting
from skipcost.bench.kernels.jobs import Done, Job, Row, failed
from skipcost.bench.kernels.judging import INFINITE, probe, reason
from skipcost.bench.measure.machine import Machine, arithmetic, machine_of
from skipcost.bench.measure.timing import Budget, sample
from skipcost.kernels.backends import BACKENDS, WAYS, case_name
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.unet_models import ModelSpec, build

PRECISIONS = {"inference": "bf16", "training": "amp-bf16"}
SLOW_WAYS = ("compile", "compile-max")  # take a minute and more to compile, the second several
QUICK_WAYS = tuple(way for way in WAYS if way not in SLOW_WAYS)
INFERENCE_ONLY = ("folded", "compile-max")  # folding and freezing take weights for constants
BACKEND_OF = {"folded": "eager", "compile-max": "compile"}  # what a way needs of the machine, if not what it is called
BUDGET = Budget(seconds=1.0, noise=0.005, least=10, warmup_seconds=2.0)
DTYPE = torch.bfloat16
SEED = 0
FLOOR = 1e-6  # an error that is allowed even where eager PyTorch makes none
Runnable = Callable[[Tensor], Any]


def why_not(way: str, device: str) -> str:
    """Say why a way cannot run on a device of this machine; empty where it can."""
    return BACKENDS[BACKEND_OF.get(way, way)].why_not(device)


def wanted(settings: Sequence[Setting], ways: Sequence[str]) -> list[Row]:
    """Return the rows, without numbers, of every network in each of these ways that there is in its mode."""
    return [
        {
            "network": each.spec.label,
            "case": case_name(each.batch, each.size, each.size, training=each.mode == "training"),
            "precision": PRECISIONS[each.mode],
            "implementation": way,
        }
        for each in settings
        for way in ways
        if each.mode == "inference" or way not in INFERENCE_ONLY
    ]


def make_jobs(rows: Sequence[Row], device: str, budget: Budget) -> list[Job]:
    """Make one job of all ways of a case."""
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["network"], row["case"]), []).append({"implementation": row["implementation"]})
    more = {"device": device, "budget": asdict(budget)}
    return [Job({"network": name, "case": case, **more}, tuple(each)) for (name, case), each in parts.items()]


def row_of(done: Done) -> Row:
    """Return the row of a part without its numbers, as `wanted` gave it."""
    network, case = done.what["network"], done.what["case"]
    precision = PRECISIONS[parse_case(case)[3]]
    return {"network": network, "case": case, "precision": precision, "implementation": done.part["implementation"]}


def parse_case(text: str) -> tuple[int, int, int, str]:
    """Read a name that `ways.case_name` gave, such as `n8 512x512 training`: batch, height, width, mode."""
    batch, size, mode = text.split()
    height, _, width = size.partition("x")
    return int(batch[1:]), int(height), int(width), mode


def take(what: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Verify and time each way of one case; a row has samples, memory, and the error over what it may be."""
    machine, budget = machine_of(what["device"]), Budget(**what["budget"])
    case: _Case | None = None
    for part in parts:
        way = part["implementation"]
        if missing := why_not(way, machine.device):
            yield failed("unsupported", missing)
            continue
        try:
            with arithmetic("bf16"):
                case = case or _case(ModelSpec.parse(what["network"]), what["case"], machine.device)
                row = _timed(case, way, machine, budget)
        except Exception as error:  # noqa: BLE001 - whatever a network raises is its row
            row = reason(error)
        yield row
        if row["outcome"] == "crash":
            probe(machine.synchronize)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _Case:
    """What all ways share: weights, an image, a target, and the precise result: logits or gradients."""

    spec: ModelSpec
    training: bool
    weights: dict[str, Tensor]
    image: Tensor
    target: Tensor
    precise: Tensor
    macs: int


def _case(spec: ModelSpec, text: str, device: str) -> _Case:
    batch, height, width, mode = parse_case(text)
    torch.manual_seed(SEED)
    with torch.device(device):
        image = torch.randn(batch, spec.in_channels, height, width).contiguous(memory_format=torch.channels_last)
        network = build(spec)
        target = torch.randint(0, max(spec.classes, 2), (batch, *network.graph.output_size(height, width)))
    _settle(network, image)
    weights = {name: each.clone() for name, each in network.state_dict().items()}
    macs = network.graph.conv_macs(height, width) * batch
    if mode == "training":
        precise = _gradients(network, network, image, target)
        return _Case(spec, True, weights, image, target, precise, STEP_MACS * macs)
    exact = network.to(DTYPE).double().eval()  # the rounded weights are what every way is given
    with torch.no_grad():
        precise = _deployed(exact(image[:1].to(DTYPE).double()))
    return _Case(spec, False, weights, image.to(DTYPE), target, precise, macs)


def _settle(network: nn.Module, image: Tensor) -> None:
    """Set running statistics to those of the image: with fresh ones maps would fade out layer by layer."""
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    momenta = [each.momentum for each in norms]
    for each in norms:
        each.momentum = None  # the average of all batches so far, which is one
    network.train()
    with torch.no_grad():
        network(image)
    for each, momentum in zip(norms, momenta, strict=True):
        each.momentum = momentum


def _made(case: _Case, way: str, device: str) -> tuple[nn.Module, Runnable]:
    """Build the network of a case, and return it with what is to be called with the image to run it in one way."""
    torch.compiler.reset()  # what was compiled for another network has no more use
    with torch.device(device):
        network = build(case.spec, FusedOps().ops())
    network.load_state_dict(case.weights)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stub
    if not case.training:
        return network, WAYS[way](network.to(DTYPE).eval())
    wrapped = WAYS[way](network.train())

    def autocast(image: Tensor) -> Any:
        with torch.autocast(device, DTYPE):
            return wrapped(image)

    return network, autocast


def _deployed(output: Any) -> Tensor:
    """Return the deployed head's map of whatever a network returned."""
    while isinstance(output, tuple | list):
        output = output[0]
    return cast("Tensor", output)


def _loss(run: Runnable, image: Tensor, target: Tensor) -> Tensor:
    logits = _deployed(run(image)).float()
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], target.float())
    return functional.cross_entropy(logits, target)


def _gradients(network: nn.Module, run: Runnable, image: Tensor, target: Tensor) -> Tensor:
    """Return the gradients of all parameters in one row; the network has none afterwards."""
    _loss(run, image, target).backward()
    row = torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None])
    network.zero_grad(set_to_none=True)
    return row


def _error(case: _Case, network: nn.Module, run: Runnable) -> float:
    """Return the distance from the precise result in the Euclidean norm, relative to it."""
    if case.training:
        found = _gradients(network, run, case.image, case.target)
    else:
        with torch.no_grad():
            found = _deployed(run(case.image))[:1]
    precise = case.precise.double()
    return float((found.double() - precise).norm() / precise.norm())


def _timed(case: _Case, way: str, machine: Machine, budget: Budget) -> Row:
    allowed = 2 * _error(case, *_made(case, "eager", machine.device)) + FLOOR
    network, run = _made(case, way, machine.device)
    worst = _error(case, network, run) / allowed
    if not worst <= 1:
        worst = INFINITE if math.isnan(worst) else worst
        return failed("wrong", f"off by {worst:.3g} times what eager PyTorch's own error allows") | {"worst": worst}
    step = _training(case, network, run, machine) if case.training else _inference(case, run)
    step()  # makes the optimizer's state, and what cuDNN keeps
    memory = _memory(case, run, step, machine)
    samples = sample(machine.capture(step, 1), machine.clock, budget)
    found = {"seconds": samples.seconds, "cache": "hot", "graph": machine.graphs, "worst": worst, "macs": case.macs}
    return {"outcome": "ok", "note": samples.note(budget), **found, **memory}


def _inference(case: _Case, run: Runnable) -> Callable[[], object]:
    def step() -> object:
        with torch.no_grad():
            return run(case.image)

    return step


def _training(case: _Case, network: nn.Module, run: Runnable, machine: Machine) -> Callable[[], object]:
    """Forward, loss, backward, optimizer step; gradients are dropped before the next."""
    optimizer = torch.optim.AdamW(network.parameters(), capturable=machine.graphs)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(run, case.image, case.target).backward()
        optimizer.step()

    return step


def _memory(case: _Case, run: Runnable, step: Callable[[], object], machine: Machine) -> Row:
    """Return what autograd keeps between forward and backward, and the peak of a step, where an allocator counts."""
    if machine.device != "cuda":
        return {"saved_bytes": None, "peak_bytes": None}
    saved = None
    if case.training:
        before = torch.cuda.memory_allocated()
        loss = _loss(run, case.image, case.target)
        saved = torch.cuda.memory_allocated() - before
        del loss
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"saved_bytes": saved, "peak_bytes": torch.cuda.max_memory_allocated()}

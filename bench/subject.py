"""A case made real: the network, its inputs, and one step of inference or training, on any device, meta included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.bench.cases import Case
from skipcost.kernels import BACKENDS
from skipcost.unet_models import build

SEED = 0
AUTOCAST = {"amp-bf16": torch.bfloat16, "amp-fp16": torch.float16}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Subject:
    """The network of a case on a device, what it reads, and the call that is measured."""

    network: nn.Module
    tensors: tuple[Tensor, ...]
    step: Callable[[], object]


def make_subject(case: Case, device: str, *, traced: bool = False) -> Subject:
    """Build the network with seeded weights and inputs on `device`; `traced` puts it on the reference ops, eagerly."""
    torch.manual_seed(SEED)
    backend = BACKENDS["eager" if traced else case.backend]
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    dtype = DTYPES.get(case.precision, torch.float32)
    with torch.device(device):
        network = build(case.spec, backend.ops(), case.outputs)
        if not (traced and case.precision in AUTOCAST):  # fake tensors cannot be converted in place; bytes stay equal
            network = network.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]  # not in torch's stub
        network.train(case.mode == "training")
        image = torch.randn(case.batch, case.spec.in_channels, case.height, case.width, dtype=dtype)
        image = image.contiguous(memory_format=layout)
        target = _target(case)
    present = [*network.parameters(), *network.buffers(), image]
    runnable = backend.wrap(network)
    if case.mode == "inference":
        return Subject(network, tuple(present), _inference(case, runnable, image, device))
    return Subject(network, (*present, target), _training(case, runnable, (image, target), device, traced=traced))


def _target(case: Case) -> Tensor:
    """Fixed random labels of the output's size: class numbers, or 0 and 1 where there is one class."""
    height, width = case.graph().output_size(case.height, case.width)
    if case.spec.classes == 1:
        return torch.randint(0, 2, (case.batch, 1, height, width)).float()
    return torch.randint(0, case.spec.classes, (case.batch, height, width))


@contextlib.contextmanager
def _arithmetic(case: Case, device: str) -> Iterator[None]:
    """The case's precision, as PyTorch is told of it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
    torch.backends.cudnn.benchmark = case.cudnn_benchmark
    if case.precision in AUTOCAST:
        with torch.autocast(device, AUTOCAST[case.precision]):
            yield
    else:
        yield


def _inference(case: Case, network: nn.Module, image: Tensor, device: str) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode(), _arithmetic(case, device):
            return network(image)

    return step


def _training(
    case: Case, network: nn.Module, pair: tuple[Tensor, Tensor], device: str, *, traced: bool
) -> Callable[[], object]:
    """Forward, loss, backward, optimizer step; gradients are dropped before the next step, PyTorch's default."""
    image, target = pair
    foreach = case.device == "cuda"  # what PyTorch itself picks; single-tensor optimizers elsewhere
    if case.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), foreach=foreach)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, foreach=foreach)
    scaler = torch.amp.GradScaler(device, enabled=case.precision == "amp-fp16" and not traced)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with _arithmetic(case, device):
            output = network(image)
        loss = total_loss(case.loss, output, target)
        del output
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return None

    return step


def total_loss(kind: str, output: Any, target: Tensor) -> Tensor:
    """Sum the loss over all heads, in fp32; a classifier adds its own cross-entropy ("is there any 1 in the target").

    `output` is what a network of the suite returns: logits, a list of them, or (probabilities, class logits).
    """
    if isinstance(output, tuple):
        maps, class_logits = output
        present = (target.amax((1, 2, 3)) > 0).long()
        maps = maps if isinstance(maps, list) else [maps]
        loss = functional.cross_entropy(class_logits.float(), present)
        probabilities = (each.float().clamp(1e-6, 1 - 1e-6) for each in maps)
        return loss + sum((_from_probability(kind, each, target) for each in probabilities), torch.zeros_like(loss))
    logits = output if isinstance(output, list) else [output]
    losses = [_from_logits(kind, each.float(), target) for each in logits]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _from_logits(kind: str, logits: Tensor, target: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        if kind == "dice":
            return _dice(torch.sigmoid(logits), target)
        return functional.binary_cross_entropy_with_logits(logits, target)
    if kind == "dice":
        wanted = functional.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).float()
        return _dice(torch.softmax(logits, 1), wanted)
    return functional.cross_entropy(logits, target)


def _from_probability(kind: str, probability: Tensor, target: Tensor) -> Tensor:
    return _dice(probability, target) if kind == "dice" else functional.binary_cross_entropy(probability, target)


def _dice(probability: Tensor, wanted: Tensor) -> Tensor:
    """1 - soft Dice (Milletari et al., 2016, eq. 8 without the squares), with 1 added against empty maps."""
    overlap = 2 * (probability * wanted).sum() + 1
    return 1 - overlap / (probability.sum() + wanted.sum() + 1)

"""A case made real: the network, its inputs, and one step of inference or training, on any device, meta included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory, make
from skipcost.bench.cases.modules import as_written, described, is_lazy_in, replace_tensors, require_tensors, settle
from skipcost.bench.errors import UnsupportedError
from skipcost.kernels import BACKENDS
from skipcost.kernels.precision import allow_tf32
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.unet_models import build

SEED = 0
MAP_DIMENSIONS = 4  # (N, C, H, W)
AUTOCAST = {"amp-bf16": torch.bfloat16, "amp-fp16": torch.float16}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CAST = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # what a precision concerns: not complex, not 8 bits


@dataclass(frozen=True, slots=True)
class Subject:
    """The network of a case on a device, what it reads, its forward pass alone, and the call that is measured.

    `note` says where a factory's weights had another type than the case's precision asks for.
    """

    network: nn.Module
    tensors: tuple[Tensor, ...]
    forward: Callable[[], object]
    step: Callable[[], object]
    note: str = ""


Score = Callable[[Any], Tensor]  # from what a network returns to its loss


def make_subject(case: Case, device: str, *, traced: bool = False) -> Subject:
    """Build the network with seeded weights and inputs on `device`; `traced` puts it on the reference ops, eagerly."""
    torch.manual_seed(SEED)
    rewritten = case.backend == "rewritten"  # PyTorch's operators like the reference's: a trace shows what they keep
    backend = BACKENDS["eager" if traced and not rewritten else case.backend]
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    dtype = DTYPES.get(case.precision, torch.float32)
    with torch.device(device):
        network = (
            _own_network(case, case.spec, device)
            if isinstance(case.spec, Factory)
            else build(case.spec, RewrittenOps(case.device).ops() if rewritten else backend.ops(), case.outputs)
        )
        note = _cast(network, case, dtype, layout)
        network.train(case.mode == "training")
        image = torch.randn(case.batch, case.spec.in_channels, case.height, case.width, dtype=dtype)
        image = image.contiguous(memory_format=layout)
        targets, score = _lesson(case)
    present = [*network.parameters(), *network.buffers(), *loose_tensors(network), image]
    device = "cpu" if device == "meta" else device  # autocast knows no meta; a trace takes its tensors for the CPU's
    runnable = backend.wrap(network)
    forward = _looked_at(case, partial(_forward, case, runnable, image, device), note)
    if case.mode == "inference":
        step = _looked_at(case, _inference(case, runnable, image, device), note)
        return Subject(network, tuple(present), forward, step, note)
    step = _training(case, runnable, (image, score), device, traced=traced)
    return Subject(network, (*present, *targets), forward, step, note)


def _own_network(case: Case, factory: Factory, device: str) -> nn.Module:
    """Make a user's own model; layers that take their sizes from an image have seen one, on the CPU or without data."""
    network, _ = make(factory, device)
    if not is_lazy_in(network):
        return network
    where = "meta" if device == "meta" else "cpu"  # a GPU's first step stays the first
    with torch.device(where), as_written():
        network = make(factory, where)[0]
        dtype = next(network.parameters()).dtype
        settle(network, [torch.randn(case.batch, factory.in_channels, case.height, case.width, dtype=dtype)])
    return network.to(device)


def _cast(network: nn.Module, case: Case, dtype: torch.dtype, layout: torch.memory_format) -> str:
    """Give weights and buffers the case's type and layout, in place; say where a factory had chosen another type.

    Whole numbers, complex numbers and what has 8 bits or fewer keep their type.
    """
    found = {each.dtype for each in (*network.parameters(), *network.buffers()) if each.dtype in CAST}

    def typed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype=dtype if tensor.dtype in CAST else tensor.dtype)

    def cast(tensor: Tensor) -> Tensor:
        map_like = tensor.layout is torch.strided and tensor.dim() == MAP_DIMENSIONS
        return typed(tensor).to(memory_format=layout) if map_like else typed(tensor)

    if not any(isinstance(each, FakeTensor) for each in network.parameters()):
        network._apply(cast)  # noqa: SLF001 - Module.to makes real numbers of complex ones
    elif found - {dtype}:  # they cannot be converted in place; in another layout they have as many bytes
        replace_tensors(network, typed)
    if case.factory is None or not (others := found - {torch.float32, dtype}):
        return ""
    was, now = ", ".join(sorted(str(each).removeprefix("torch.") for each in others)), str(dtype).removeprefix("torch.")
    return f"the factory's weights are {was}: made {now}, as precision={case.precision} says"


def _looked_at(case: Case, call: Callable[[], object], note: str) -> Callable[[], object]:
    """The call, of which a user's own model must return a tensor the first time; `note` goes with what it raises."""
    if case.factory is None:
        return call
    known = False

    def looked_at() -> object:
        nonlocal known
        try:
            output = call()
        except Exception as error:
            if note:
                error.add_note(note)
            raise
        if not known:
            require_tensors(output)
            known = True
        return output

    return looked_at


def loose_tensors(network: nn.Module) -> list[Tensor]:
    """Tensors that modules hold as plain attributes, neither parameters nor buffers: they take memory all the same."""
    held = [each for module in network.modules() for each in vars(module).values() if isinstance(each, Tensor)]
    return list({id(each): each for each in held}.values())


def _lesson(case: Case) -> tuple[tuple[Tensor, ...], Score]:
    """Fixed random targets of the outputs' sizes, and how an output is scored by them."""
    if case.factory:
        sizes = _output_sizes(case, case.factory) if case.mode == "training" else []
        targets = {size: _target(case, size) for size in sizes}
        return tuple(targets.values()), partial(_own_loss, case, targets)
    target = _target(case, case.graph().output_size(case.height, case.width))
    return (target,), partial(total_loss, case.loss, target=target)


def _target(case: Case, size: tuple[int, int]) -> Tensor:
    """Fixed random labels: class numbers, or 0 and 1 where there is one class."""
    if case.spec.classes == 1:
        return torch.randint(0, 2, (case.batch, 1, *size)).float()
    return torch.randint(0, case.spec.classes, (case.batch, *size))


def _output_sizes(case: Case, factory: Factory) -> list[tuple[int, int]]:
    """Height and width of each map that a user's own model returns in training, by a forward pass without data.

    Where that fails, with data on the CPU: never on the measured device, whose first step must stay the first.
    """
    try:
        return _sizes_on(case, factory, "meta")
    except UnsupportedError:
        raise
    except Exception:  # noqa: BLE001 - whatever a model does with values that are not there
        return _sizes_on(case, factory, "cpu")


def _sizes_on(case: Case, factory: Factory, device: str) -> list[tuple[int, int]]:
    with torch.no_grad(), torch.device(device), as_written():
        network = _own_network(case, factory, device).train()
        _cast(network, case, torch.float32, torch.contiguous_format)
        output = network(torch.randn(case.batch, factory.in_channels, case.height, case.width))
    return [(each.shape[2], each.shape[3]) for each in maps_of(output, factory.classes)]


def maps_of(output: Any, classes: int) -> list[Tensor]:
    """The maps of logits in what a user's own model returns: a tensor, or a list or tuple of them.

    UnsupportedError for any other form and for maps that have not as many channels as there are classes.
    """
    require_tensors(output)
    maps = list(output) if isinstance(output, list | tuple) else [output]
    if not maps or not all(isinstance(each, Tensor) and each.ndim == MAP_DIMENSIONS for each in maps):
        message = (
            f"the loss understands a tensor (N, classes, H, W), or a list or tuple of them, but the model returns "
            f"{described(output)}: give a factory whose model returns the maps of logits alone, or measure inference"
        )
        raise UnsupportedError(message)
    found = sorted({each.shape[1] for each in maps} - {classes})
    if found:
        message = (
            f"the model returns maps of {found[0]} channels, but classes={classes}: set classes={found[0]}, or give "
            "the factory the argument that makes it return as many"
        )
        raise UnsupportedError(message)
    return maps


@contextlib.contextmanager
def _arithmetic(case: Case, device: str) -> Iterator[None]:
    """The case's precision, as PyTorch is told of it."""
    allow_tf32(case.precision == "tf32")
    torch.backends.cudnn.benchmark = case.cudnn_benchmark
    if case.precision in AUTOCAST:
        with torch.autocast(device, AUTOCAST[case.precision]):
            yield
    else:
        yield


def _forward(case: Case, network: nn.Module, image: Tensor, device: str) -> object:
    with _arithmetic(case, device):
        return network(image)


def _inference(case: Case, network: nn.Module, image: Tensor, device: str) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode(), _arithmetic(case, device):
            return network(image)

    return step


def _training(
    case: Case, network: nn.Module, pair: tuple[Tensor, Score], device: str, *, traced: bool
) -> Callable[[], object]:
    """Forward, loss, backward, optimizer step; gradients are dropped before the next step, PyTorch's default."""
    image, score = pair
    if not any(True for _ in network.parameters()):
        message = "the model has no parameters, so there is nothing to train: measure mode=inference"
        raise UnsupportedError(message)
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
        loss = score(output)
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
    return _summed([_from_logits(kind, each.float(), target) for each in logits])


def _own_loss(case: Case, targets: dict[tuple[int, int], Tensor], output: Any) -> Tensor:
    """The same for what a user's own model returns: each map by the target of its size."""
    maps = maps_of(output, case.spec.classes)
    return _summed([_from_logits(case.loss, each.float(), targets[each.shape[2], each.shape[3]]) for each in maps])


def _summed(losses: list[Tensor]) -> Tensor:
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

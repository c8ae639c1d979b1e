"""What any module costs against absolute budgets: exact metrics, no baseline, no case. `pytest_plugin` is its front.

Everything is counted on a copy of the module without data (on the meta device) where it can run there, else in a run
on the tensors given. Leaves out time: no budget in milliseconds holds on two machines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import FlopCounterMode

from skipcost.bench import figures
from skipcost.bench.cases import CHOICES
from skipcost.bench.memory import trace_peaks
from skipcost.bench.units import parse_bytes, parse_count
from skipcost.unet_models.spec import suggest

UNITS = {"params": "count", "conv_macs": "macs", "activations": "count", "peak_bytes": "bytes"}
CONVOLUTION = torch.ops.aten.convolution
FLOPS_OF_A_MAC = 2  # as FlopCounterMode counts


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step costs: totals by the keys of UNITS, and each one's share by layer, where it can be split.

    Layers are leaf modules by their names. peak_bytes is split into what each layer returns, which is not all of it.
    """

    totals: dict[str, int]
    layers: dict[str, dict[str, int]]


def cost_of(model: nn.Module, inputs: Sequence[Any], mode: str = "inference") -> Cost:
    """Count a step of `model(*inputs)`: a forward pass, and in training mode the backward pass of its outputs' sum.

    params: elements of all parameters. conv_macs: multiply-adds of all convolutions, for the whole batch. activations:
    elements of all convolutions' outputs. peak_bytes: most bytes of live tensors, parameters, buffers, gradients and
    inputs included, the optimizer's state not. The model is left as it was. ValueError for an unknown mode.
    """
    if mode not in CHOICES["mode"]:
        raise ValueError(suggest("mode", mode, CHOICES["mode"]))
    try:
        return _count(copy.deepcopy(model).to("meta"), tree_map(_without_data, list(inputs)), mode)
    except Exception:  # noqa: BLE001 - what a model may do to need data is without end; then it gets it
        return _count(copy.deepcopy(model), list(inputs), mode)


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _count(model: nn.Module, inputs: list[Any], mode: str) -> Cost:
    model.train(mode == "training")
    layers: dict[str, dict[str, int]] = {name: {} for name in UNITS}
    for name, module in model.named_modules():
        if own := sum(each.numel() for each in module.parameters(recurse=False)):
            layers["params"][name or type(module).__name__] = own
    with torch.no_grad(), _outputs(model, layers), FlopCounterMode(display=False) as flops:
        model(*inputs)
    counts = flops.get_flop_counts()
    for name, operators in counts.items():
        layer = name.partition(".")[2]
        if layer in layers["peak_bytes"] and CONVOLUTION in operators:
            layers["conv_macs"][layer] = operators[CONVOLUTION] // FLOPS_OF_A_MAC
    present = [*model.parameters(), *model.buffers(), *(each for each in tree_iter(inputs) if isinstance(each, Tensor))]
    totals = {
        "params": sum(each.numel() for each in model.parameters()),
        "conv_macs": counts["Global"].get(CONVOLUTION, 0) // FLOPS_OF_A_MAC,
        "activations": sum(layers["activations"].values()),
        "peak_bytes": trace_peaks(_step(model, inputs, mode), present, 1)[0],
    }
    return Cost(totals, layers)


def _step(model: nn.Module, inputs: list[Any], mode: str) -> Callable[[], object]:
    def inference() -> object:
        with torch.no_grad():
            return model(*inputs)

    def training() -> None:
        outputs = [each for each in tree_iter(model(*inputs)) if isinstance(each, Tensor) and each.requires_grad]
        torch.stack([each.float().sum() for each in outputs]).sum().backward()

    return training if mode == "training" else inference


@contextmanager
def _outputs(model: nn.Module, layers: dict[str, dict[str, int]]) -> Iterator[None]:
    """Note what every leaf module returns: bytes, and elements where it is a convolution; more than once adds up."""
    handles = []

    def watch(name: str, *, convolution: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = [each for each in tree_iter(output) if isinstance(each, Tensor)]
            for metric, sizes in (
                ("peak_bytes", [t.nbytes for t in tensors]),
                ("activations", [t.numel() for t in tensors]),
            ):
                if metric == "peak_bytes" or convolution:
                    layers[metric][name] = layers[metric].get(name, 0) + sum(sizes)

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            convolution = isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 - the base of all convolutions
            handles.append(module.register_forward_hook(watch(name, convolution=convolution)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_budget(metric: str, value: object) -> int:
    """Read a budget: a count, or text such as "31M" or "300MiB"; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
        message = f"{metric}={value!r} is no budget: a whole number of 0 or more, or text such as '31M' or '300MiB'"
        raise ValueError(message)
    if isinstance(value, int):
        return value
    return parse_bytes(value) if UNITS[metric] == "bytes" else int(parse_count(value))


def passed(cost: Cost, budgets: dict[str, int], model: str) -> list[str]:
    """One sentence for each budget that is passed: by how much, and which layer costs most."""
    sentences = []
    for metric, budget in budgets.items():
        total, unit = cost.totals[metric], UNITS[metric]
        if total <= budget:
            continue
        share = f"{total / budget - 1:.1%} over" if budget else "over"
        sentence = (
            f"{model} has {metric} = {total:,} ({figures.text(total, unit)}), {share} its budget of {budget:,} "
            f"({figures.text(budget, unit)})"
        )
        if split := cost.layers[metric]:
            name, most = max(split.items(), key=lambda item: item[1])
            verb = "returns most" if metric == "peak_bytes" else "costs most"
            sentence += f"; {name} {verb}, {most:,} ({figures.text(most, unit)})"
        sentences.append(sentence)
    return sentences

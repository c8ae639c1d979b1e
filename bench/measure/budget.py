"""What any module costs against absolute budgets: exact metrics, no baseline, no case. `pytest_plugin` is its front.

Everything is counted, by `tracing`, on a copy of the module without data (on the meta device) where it can run there,
else in a run on the tensors given. Leaves out time: no budget in milliseconds holds on two machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from skipcost.bench import figures
from skipcost.bench.cases.case import CHOICES
from skipcost.bench.cases.modules import (
    as_written,
    count_elements,
    described,
    packed_note,
    require_tensors,
    settle,
    stand_in,
    tensors_of,
)
from skipcost.bench.errors import UnsupportedError
from skipcost.bench.measure.live_bytes import trace_peaks
from skipcost.bench.measure.tracing import count_forward, layer_names
from skipcost.bench.units import parse_bytes, parse_count
from skipcost.unet_models.spec import suggest

UNITS = {"params": "count", "conv_macs": "macs", "activations": "count", "peak_bytes": "bytes"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step costs: totals by the keys of UNITS, and each one's share by layer, where it can be split.

    Layers are modules by their names, for what runs in them: what a module runs beside its layers stands under its own.
    peak_bytes is split into what each leaf returns, which is not all of it. `remarks` say what is to be known of a
    total; `unknown` says which convolutions are not in conv_macs, which is then held to no budget.
    """

    totals: dict[str, int]
    layers: dict[str, dict[str, int]]
    remarks: dict[str, str] = field(default_factory=dict)
    unknown: str = ""


def cost_of(model: nn.Module, inputs: Sequence[Any], mode: str = "inference") -> Cost:
    """Count a step of `model(*inputs)`: a forward pass, and in training mode the backward pass of its outputs' sum.

    params: elements of all parameters. conv_macs: multiply-adds of all convolutions, for the whole batch. activations:
    elements of all convolutions' outputs. peak_bytes: most bytes of live tensors, parameters, buffers, gradients and
    inputs included, the optimizer's state not. The model is left as it was; of one that is compiled, what was written
    is counted. ValueError for an unknown mode and for a model that returns no tensor.
    """
    if mode not in CHOICES["mode"]:
        raise ValueError(suggest("mode", mode, CHOICES["mode"]))
    model = getattr(model, "_orig_mod", model)
    try:
        with stand_in(model, data=False) as network:
            return _count(network, tree_map(_without_data, list(inputs)), mode)
    except UnsupportedError:
        raise
    except Exception:  # noqa: BLE001 - what a model may do to need data is without end; then it gets it
        with stand_in(model, data=True) as network:
            return _count(network, tree_map(_own_data, list(inputs)), mode)


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _own_data(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _count(model: nn.Module, inputs: list[Any], mode: str) -> Cost:
    with as_written():
        settle(model, inputs).train(mode == "training")
        count = count_forward(model, lambda: require_tensors(model(*inputs)))
        tensors = [each for each in tree_iter(inputs) if isinstance(each, Tensor)]
        present = [*model.parameters(), *model.buffers(), *tensors]
        peak = trace_peaks(_step(model, inputs, mode), present, 1)[0]
    params = count_elements(model)
    totals = {
        "params": params,
        "conv_macs": count.conv_macs.total(),
        "activations": count.activations.total(),
        "peak_bytes": peak,
    }
    split = {
        "params": _params_by_layer(model),
        "conv_macs": count.conv_macs,
        "activations": count.activations,
        "peak_bytes": count.returned,
    }
    remarks = {"params": "; ".join(filter(None, (count.idle_note(params), packed_note(model))))}
    return Cost(totals, {name: dict(layers) for name, layers in split.items()}, remarks, count.unknown_note())


def _params_by_layer(model: nn.Module) -> dict[str, int]:
    """Elements that each layer owns; those that layers share belong to the first."""
    names, known, layers = layer_names(model), set(), dict[str, int]()
    for module in model.modules():
        own = {id(each): each.numel() for each in module.parameters(recurse=False) if id(each) not in known}
        known |= set(own)
        if own:
            layers[names[id(module)]] = layers.get(names[id(module)], 0) + sum(own.values())
    return layers


def _step(model: nn.Module, inputs: list[Any], mode: str) -> Callable[[], object]:
    def inference() -> object:
        with torch.no_grad():
            return model(*inputs)

    def training() -> None:
        _sum_of(model(*inputs)).backward()

    return training if mode == "training" else inference


def _sum_of(output: Any) -> Tensor:
    """The sum of everything in an output that has a gradient; UnsupportedError where nothing has."""
    outputs = [each for each in tensors_of(output) if each.requires_grad]
    if not outputs:
        message = f"the model returned {described(output)}, no part of which has a gradient: count mode='inference'"
        raise UnsupportedError(message)
    return torch.stack(
        [(torch.view_as_real(each) if each.is_complex() else each).float().sum() for each in outputs]
    ).sum()


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
        if metric == "conv_macs" and cost.unknown:
            sentences.append(f"{model} cannot be held to conv_macs={budget:,}: {cost.unknown}")
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
        if remark := cost.remarks.get(metric):
            sentence += f"; {remark}"
        sentences.append(sentence)
    return sentences

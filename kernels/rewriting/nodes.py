"""Questions about a node of Dynamo's graph: what it calls, with what, what it writes to, where in the model it is."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional

CAT = (torch.cat, torch.concat, torch.concatenate)
CONV = (torch.conv2d, functional.conv2d)
DROPOUT = (functional.dropout, functional.dropout2d, functional.alpha_dropout, functional.feature_alpha_dropout)
TRANSPOSED = (torch.conv_transpose2d, functional.conv_transpose2d)
PAD = (functional.pad, torch._C._nn.pad)  # noqa: SLF001 - what Dynamo makes of it
JOIN = ("tensors", "dim")
UP_CONV = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)  # noqa: SLF001 - no public names
SWITCHES = (torch._C._set_grad_enabled, *AUTOCAST)  # noqa: SLF001 - as above
NO_LAYERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
MAP = 4  # dimensions: N, C, H, W
WRITING = tuple(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


def example_of(value: Any) -> Any:
    """Return what stands for a value while compiling: a tensor without data, a size; None of what is no node."""
    return value.meta.get("example_value") if isinstance(value, Node) else None


def given_of(node: Node, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def convolution_of(node: Node) -> dict[str, Any]:
    """Return the arguments of a convolution by name."""
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | given_of(node, CONVOLUTION)


def joined_by(node: Node) -> list[Node]:
    """Return the maps (N, C_i, H, W) whose channels a node concatenates; none of another node."""
    if node.op != "call_function" or node.target not in CAT:
        return []
    given = given_of(node, JOIN)
    maps, dim = given["tensors"], given.get("dim", given.get("axis", 0))
    listed = isinstance(maps, list | tuple) and "out" not in given and all(isinstance(each, Node) for each in maps)
    whole = listed and dim in (1, 1 - MAP) and all(getattr(example_of(each), "ndim", 0) == MAP for each in maps)
    return list(maps) if whole else []


def memory_of(node: Node) -> Any:
    """Return what is the same of all maps that share memory; None of what is no map."""
    example = example_of(node)
    return example.untyped_storage()._cdata if isinstance(example, Tensor) else None  # noqa: SLF001 - as weak references do


def transformed(graph: Graph) -> bool:
    """Whether a model runs a part of itself through torch.func: maps there have no memory, and one stands for many."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001 - no public name
    return any(isinstance(known := example_of(node), Tensor) and wrapped(known) for node in graph.nodes)


def gradients_on(node: Node) -> bool:
    """Whether gradients are recorded where a node runs: as where the graph begins, unless they are switched before."""
    on = torch.is_grad_enabled()
    for each in node.graph.nodes:
        if each is node:
            return on
        if each.target is torch._C._set_grad_enabled:  # noqa: SLF001 - no public name
            on = bool(each.args[0])
    return on


def written_by(node: Node) -> Iterator[Node]:
    """Yield what a node may write to: all that it is given where only its own code knows."""
    if isinstance(node.target, torch._ops.OperatorBase) or node.op == "call_module" or "out" in node.kwargs:  # noqa: SLF001 - no public name
        yield from node.all_input_nodes
        return
    name = str(getattr(node.target, "__name__", node.target))
    by_name = (name.endswith("_") and not name.endswith("__")) or name == "setitem" or node.target in WRITING
    if (by_name or _in_place(node)) and node.args:
        first = node.args[0] if isinstance(node.args[0], list | tuple) else node.args[:1]
        yield from (each for each in first if isinstance(each, Node))


def _in_place(node: Node) -> bool:
    """Whether a function of PyTorch is asked to write to its first argument, by name or by position."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != functional.__name__:
        return bool(node.kwargs.get("inplace"))
    names = [*inspect.signature(node.target).parameters] if inspect.isfunction(node.target) else []
    return bool(given_of(node, names).get("inplace"))


def name_of(node: Node) -> str:
    """Return what people call what a node does: Conv2d, where a layer does it, else cat."""
    if layer := _layer_of(node):
        return layer.__name__
    return str(getattr(node.target, "__name__", node.target))


def _layer_of(node: Node) -> type[nn.Module] | None:
    """Return the class of the layer of PyTorch, or one that derives from it, that a node is called in."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    bases = stack[-1][1].__mro__ if stack and isinstance(stack[-1][1], type) else ()
    layers = [each for each in bases if each.__module__.startswith("torch.nn.modules") and each not in NO_LAYERS]
    return bases[0] if layers else None


def places_of(chain: Sequence[Node]) -> tuple[str, ...]:
    """Return where nodes are, in order."""
    return tuple(place_of(node) for node in chain)


def path_of(node: Node) -> str:
    """Return the name of the module whose Python calls it."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].partition("]")[2].removeprefix(".__self__").lstrip(".") if stack else ""


def place_of(node: Node) -> str:
    """Return where a node is: the name of its layer, or of the module whose Python calls it, and the function."""
    where = path_of(node)
    return where if _layer_of(node) else f"{where}.{name_of(node)}".lstrip(".")

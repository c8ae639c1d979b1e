"""Questions about the graph of a traced model: what a node calls, who reads its map, who may change it.

A node is taken for what its name says only where nothing else happens: a subclass with a forward of its own, hooks, or
unusual arguments make it something else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn import functional

from skipcost.kernels.rewriting.tracing import WRITING, is_layer, more_than_forward

RELU = (functional.relu, functional.relu_, torch.relu, torch.relu_)
CAT = (torch.cat, torch.concat, torch.concatenate)
CONV = (functional.conv2d, torch.conv2d)
MAX_POOL = (functional.max_pool2d, torch.max_pool2d)
DROPOUT = (functional.dropout, functional.dropout2d, functional.alpha_dropout, functional.feature_alpha_dropout)
EMPTY = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)  # in evaluation
# What gives a map in memory of its own, nothing that others may hold a view of; ReLU if it is not in place
OWN_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.Upsample, nn.MaxPool2d, nn.AvgPool2d)
OWN_CALLS = (*CAT, *CONV, *MAX_POOL, functional.interpolate)
POOLING = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
TWO, NONE, ONE = (2, (2, 2), [2, 2]), (0, (0, 0), [0, 0]), (1, (1, 1), [1, 1])


class Wiring:
    """A graph and the modules that it calls: `root` is what was traced."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph = graph
        self.layers = dict(root.named_modules(remove_duplicate=False))

    def module(self, node: Node) -> nn.Module | None:
        """Return the module that a node calls; None for functions and methods."""
        return self.layers[str(node.target)] if node.op == "call_module" else None

    def unknown(self) -> list[Node]:
        """Return the calls of modules that are no layers of PyTorch: the graph does not show what they do."""
        called = ((node, self.module(node)) for node in self.graph.nodes)
        return [node for node, module in called if module is not None and not is_layer(module)]

    def layer(self, node: Node, kind: type[nn.Module]) -> Any:
        """Return the layer that a node calls if it does what `kind` does to one argument, and nothing else."""
        module = self.module(node)
        if not isinstance(module, kind) or type(module).forward is not kind.forward or more_than_forward(module):
            return None
        return module if len(node.args) == 1 and not node.kwargs else None

    def name(self, node: Node) -> str:
        """Return what people call what a node does: Conv2d, relu."""
        if module := self.module(node):
            return type(module).__name__
        return node.target if isinstance(node.target, str) else node.target.__name__

    def place(self, node: Node) -> str:
        """Return where a node is: the name of its module, or of the one whose Python calls the function."""
        if node.op == "call_module":
            return str(node.target)
        stack: list[tuple[str, Any]] = list(node.meta.get("nn_module_stack", {}).values())
        return f"{stack[-1][0]}.{self.name(node)}" if stack else self.name(node)

    def is_call(self, node: Node, functions: tuple[Callable[..., Any], ...], *methods: str) -> bool:
        """Whether a node calls one of these functions or methods, on a map as its first argument."""
        called = (node.op == "call_function" and node.target in functions) or (
            node.op == "call_method" and node.target in methods
        )
        return called and bool(node.args)

    def is_relu(self, node: Node) -> bool:
        """Whether a node clips a map at 0, in place or not."""
        return self.layer(node, nn.ReLU) is not None or self.is_call(node, RELU, "relu", "relu_")

    def is_norm(self, node: Node) -> bool:
        """Whether a node calls a normalization layer of PyTorch, of whatever kind."""
        module = self.module(node)
        return module is not None and is_layer(module) and "Norm" in type(module).__name__

    def is_cat(self, node: Node) -> bool:
        """Whether a node puts the channels of several maps side by side."""
        if not self.is_call(node, CAT) or not isinstance(maps := node.args[0], list | tuple):
            return False
        dimension = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        plain = all(isinstance(each, Node) for each in maps) and not node.kwargs.keys() - {"dim"}
        return plain and len(maps) > 1 and isinstance(dimension, int) and dimension == 1

    def is_halving(self, node: Node) -> bool:
        """Whether a node takes the maximum of 2x2 pixels, an odd last row or column left out."""
        if layer := self.layer(node, nn.MaxPool2d):
            given = {name: getattr(layer, name) for name in POOLING[1:]}
        elif self.is_call(node, MAX_POOL):
            given = dict(zip(POOLING, node.args, strict=False)) | node.kwargs
        else:
            return False
        return (
            given.get("kernel_size") in TWO
            and given.get("stride") in (None, [], *TWO)
            and given.get("padding", 0) in NONE
            and given.get("dilation", 1) in ONE
            and not given.get("ceil_mode")
            and not given.get("return_indices")
        )

    def reader(self, node: Node) -> Node | None:
        """Return the only reader of a map; None where there are more, or it is a result."""
        first = next(iter(node.users), None)
        return first if first is not None and len(node.users) == 1 and first.op != "output" else None

    def is_empty(self, node: Node) -> bool:
        """Whether a node does nothing in evaluation."""
        if any(self.layer(node, kind) for kind in EMPTY):
            return True
        off = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)  # noqa: PLR2004 - (x, p, training)
        return self.is_call(node, DROPOUT) and off is False

    def may_write(self, node: Node) -> bool:
        """Whether a node may change a map that it is given; opaque modules may."""
        if module := self.module(node):
            return bool(getattr(module, "inplace", False)) or not is_layer(module)
        name = self.name(node)
        marked = any(each is True for each in node.args[1:]) or bool(node.kwargs.get("inplace"))
        by_name = (name.endswith("_") and not name.endswith("__")) or name == "setitem" or "out" in node.kwargs
        return marked or by_name or node.target in WRITING

    def written(self, node: Node, start: Node, end: Node) -> bool:
        """Whether a reader of a map between two nodes may change it."""
        return any(start < each < end and self.may_write(each) for each in node.users)

    def asks_for_shape(self, node: Node) -> bool:
        """Whether a node only reads the size of a map."""
        if node.op == "call_method":
            return node.target == "size"
        return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"

    @cached_property
    def memories(self) -> dict[Node, frozenset[Node]]:
        """For each node the nodes whose memory its result may lie in: its own, or that of anything it was given."""
        found: dict[Node, frozenset[Node]] = {}
        for node in self.graph.nodes:
            given = self.writes.get(node) or node.all_input_nodes
            own = self._makes_memory(node) or not given
            found[node] = frozenset((node,)) if own else frozenset().union(*(found[each] for each in given))
        return found

    @cached_property
    def writes(self) -> dict[Node, list[Node]]:
        """For each node that may write what it may write to: all that it is given where only a user's module knows."""
        found = {}
        for node in self.graph.nodes:
            if self.may_write(node):
                module = self.module(node)
                known = node.args and "out" not in node.kwargs and (module is None or is_layer(module))
                first = node.args[0] if known else None
                found[node] = [first] if isinstance(first, Node) else node.all_input_nodes
        return found

    def changes_after(self, node: Node, start: Node) -> bool:
        """Whether a map may be written to behind a node, under whatever name."""
        memory = self.memories[node]
        later = (each for writer, written in self.writes.items() if start < writer for each in written)
        return any(memory & self.memories[each] for each in later)

    def _makes_memory(self, node: Node) -> bool:
        relu = self.layer(node, nn.ReLU)
        own = any(self.layer(node, kind) for kind in OWN_LAYERS) or self.is_call(node, OWN_CALLS)
        return node not in self.writes and (own or relu is not None)

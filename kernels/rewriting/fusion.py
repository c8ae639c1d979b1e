"""`fuse(model)`: a user's own model on the suite's kernels, with a list of what was changed and what was not, and why.

What is fused, in evaluation and without gradients: a convolution with the batch norm and ReLU after it; a concatenation
with the convolution that reads it; a convolution with the 2x2 pool beside a skip; a 2x2 transposed convolution with the
concatenation of its map. Which implementation runs is decided in each call, by shape, type and device: a kernel of
ours, or PyTorch's own convolution with the norm folded into its weights. On a CPU it is always the latter.

Weights stay where they are, and are folded anew when their version has changed, and by `train()` and `eval()`: after
writes through `.data`, which change no version, call one of them. In training, where gradients are asked for, under
torch.compile and in torch.export the model's own forward runs. A layer that is replaced after fusing must be one of
the same kind; Python that asks for the type of a tensor sees a Proxy, as with any trace by torch.fx.

When it loses: on maps so small that Python decides. A fused call does about 10 us more of it than three layers do; on a
GPU, capture small models in a CUDA graph, which leaves Python out. Maps are channels_last behind a fused call; an input
in another layout is converted once, and results are given back in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.layer_ops import LayerOps, folded_or_dispatched
from skipcost.kernels.rewriting.matching import Block, Join, find
from skipcost.kernels.rewriting.rewiring import Route, calls_of, rewire, twin
from skipcost.kernels.rewriting.tracing import Traced, in_mode, is_layer
from skipcost.kernels.rewriting.wiring import Wiring

Choose = Callable[[Call, Tensor], str]
TOOL = "_skipcost_ops"  # the name under which a fused module's graph finds its `LayerOps`


def fuse(model: nn.Module, *, choose: Choose = folded_or_dispatched) -> tuple[nn.Module, list[Change]]:
    """Return a model that computes the same with fewer passes over memory, and what became of each place of it.

    model: any module with Conv2d, BatchNorm2d, ReLU; it is not changed. The returned one has modules of its own over
    the very same parameters and buffers, under the same names: their state_dicts are one, and what is trained or
    loaded in one is in the other. Its class is a subclass of the model's. Modules that torch.fx cannot follow are
    called as they are, and fused inside.
    choose: takes a call and one of the maps that it reads, and names the implementation: "triton" or "tma" for the
    kernels, "cudnn" for PyTorch's convolution with the norm folded, "reference" for the layers one by one.
    ValueError for what is no module written in Python.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        message = f"fuse got a {type(model).__name__}, whose code it cannot change: give it an nn.Module of Python"
        raise ValueError(message)  # noqa: TRY004 - all input that is refused raises ValueError
    fused = twin(model)
    return fused, list(_fuse(fused, "", choose, set()))


def fuse_one(module: nn.Module, choose: Choose) -> list[Change]:
    """Fuse one module of a twin, and nothing inside of those that its graph calls as they are."""
    return _fuse_graph(module, calls_of(module), choose)


def _fuse(module: nn.Module, name: str, choose: Choose, done: set[nn.Module]) -> Iterator[Change]:
    """Fuse a module of a twin, and what its graph calls as it is; all of its children where there is no graph."""
    inside = [each for each, _ in module.named_children()]
    if not is_layer(module):  # as lists of modules are, which have no forward
        try:
            traced = calls_of(module)
        except ValueError as error:
            yield Change((name or "the model",), type(module).__name__, "", f"it is only fused inside, since {error}")
        else:
            inside = [str(each.target) for each in Wiring(traced.graph, module).unknown()]
            for change in _fuse_graph(module, traced, choose):
                yield replace(change, where=tuple(_inside(name, each) for each in change.where))
    for each in dict.fromkeys(inside):
        child = module.get_submodule(each)
        if child not in done and not isinstance(child, torch.jit.ScriptModule):
            done.add(child)
            yield from _fuse(child, _inside(name, each), choose, done)


def _inside(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner


def _fuse_graph(module: nn.Module, traced: Traced, choose: Choose) -> list[Change]:
    wires = Wiring(traced.graph, module)
    with in_mode(module, training=False):
        found = find(wires)
    changes = [_describe(wires, each.chain, "", each.why) for each in found.refusals]
    if found.blocks or found.joins:
        edit = _Edit(wires)
        changes += [edit.join(each) for each in found.joins] + [edit.block(each) for each in found.blocks]
        edit.keep_layouts()
        tools, again = {TOOL: LayerOps(choose)}, partial(fuse_one, choose=choose)
        route = Route(traced, (*found.absorbed, *edit.absorbed))
        rewire(module, [route], again, title="Fused", tools=tools)
    return changes


def _describe(wires: Wiring, nodes: Sequence[Node], after: str, why: str) -> Change:
    return Change(tuple(map(wires.place, nodes)), " -> ".join(map(wires.name, nodes)), after, why)


class _Edit:
    """Puts calls of `LayerOps` into a graph, each where the first of the calls was that it stands for."""

    def __init__(self, wires: Wiring) -> None:
        self.wires, self.graph = wires, wires.graph
        self.absorbed: list[str] = []
        self.given = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_before(next(node for node in self.graph.nodes if node.op != "placeholder")):
            self.ops = self.graph.create_node("get_attr", TOOL)

    def join(self, join: Join) -> Change:
        """Fuse a concatenation that no convolution is fused with."""
        change = _describe(self.wires, _parts(join), "up_conv_concat" if join.up else "crop_concat", "")
        self._replace(join.cat, self._read(join))
        return change

    def block(self, block: Block) -> Change:
        """Fuse a convolution with what belongs to it."""
        parts = [*(_parts(block.join) if block.join else []), *block.chain, *([block.pool] if block.pool else [])]
        change = _describe(self.wires, parts, _names(block), block.why)
        at = block.join.cat if block.join else block.conv
        settings = (self._layer(at, block.conv), self._layer(at, block.norm), block.act is not None)
        read = self._read(block.join, *settings) if block.join else block.conv.args[0]
        method = "fold" if block.why else "convolve_pool" if block.pool else "convolve"
        result = self._call(at, method, read, *settings)
        if block.pool:
            with self.graph.inserting_before(at):
                result, pooled = (self.graph.call_function(getitem, (result, index)) for index in (0, 1))
            self._replace(block.pool, pooled)
        self._replace(block.chain[-1], result)
        for each in reversed(block.chain[:-1]):
            self._erase(each)
        if block.join:
            self._erase(block.join.cat)
        return change

    def keep_layouts(self) -> None:
        """Let what relies on contiguous maps find them: maps are channels_last behind a fused call.

        `view` becomes `reshape`; what modules of the user's own read is contiguous again where the inputs were.
        """
        for node in self.graph.nodes:
            sizes = node.args[1:]
            if node.op == "call_method" and node.target == "view" and sizes and not isinstance(sizes[0], torch.dtype):
                node.target = "reshape"
        unknown = self.wires.unknown()
        read = dict.fromkeys(each for node in unknown for each in node.all_input_nodes)
        maps = [each for each in read if each.op not in ("placeholder", "get_attr")]
        if maps:
            with self.graph.inserting_after(self.ops):
                dense = self.graph.call_method("dense", (self.ops, *self.given))
        for each in maps:
            with self.graph.inserting_after(each):
                restored = self.graph.call_method("restored", (self.ops, each, dense))
            for user in [user for user in each.users if user is not restored]:
                user.replace_input_with(each, restored)

    def _read(self, join: Join, *settings: Any) -> Node:
        """Replace a join's pads and up-sampling, and return the call that joins its maps."""
        for pad in join.pads:
            self._replace(pad, self._call(pad, "pad", *pad.args, **pad.kwargs))
        if join.up:
            self._replace(join.up, self._call(join.up, "later", self._layer(join.up, join.up), join.up.args[0]))
        return self._call(join.cat, "join", join.cat.args[0], *settings)

    def _call(self, at: Node, method: str, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(at):
            return self.graph.call_method(method, (self.ops, *args), kwargs)

    def _layer(self, at: Node, node: Node | None) -> Node | None:
        """Read the layer that a node calls from the module, so that its weights are looked up in each call."""
        if node is None:
            return None
        with self.graph.inserting_before(at):
            return self.graph.create_node("get_attr", str(node.target))

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self._erase(old)

    def _erase(self, node: Node) -> None:
        if node.op == "call_module":
            self.absorbed.append(str(node.target))
        self.graph.erase_node(node)


def _parts(join: Join) -> list[Node]:
    return [*([join.up] if join.up else []), *join.pads, join.cat]


def _names(block: Block) -> str:
    """Name the ops of a block."""
    if block.why:
        return "convolution of PyTorch with the norm folded in"
    if block.pool:
        return "conv_bn_relu_pool"
    if block.join is None:
        return "conv_bn_relu"
    return "up_conv, concat_conv_bn_relu" if block.join.up else "concat_conv_bn_relu"

"""Where a model's graph convolves up-sampled maps, and the same graph with `convolve` in their place.

The graph is Dynamo's: functions of PyTorch in the order in which they run, weights as inputs, and for every value an
example that has its shape, its type and its memory. A place is a convolution that reads an up-sampled map alone or
concatenated, cropped or padded; nobody else may read what then is not made, and nobody may write to what is read
later than the model would.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.enlarged import MODES, Up, choice_of, convolve, enlarged, rows_are_exact

AFTER = "tap_first"
CAT = (torch.cat, torch.concat, torch.concatenate)
PAD = (functional.pad, torch._C._nn.pad)  # noqa: SLF001 - what Dynamo makes of it
CONV = (torch.conv2d, functional.conv2d)
DROPOUT = (functional.dropout, functional.dropout2d, functional.alpha_dropout, functional.feature_alpha_dropout)
INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
PADDING = ("input", "pad", "mode", "value")
JOIN = ("tensors", "dim")
DROP = ("input", "p", "training", "inplace")
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
WRITING = tuple(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))
MAP = 4  # dimensions: N, C, H, W


@dataclass(frozen=True, slots=True)
class Grown:
    """An up-sampled map that is not made: the node that up-samples, by what, and what is added to its sides."""

    node: Node
    up: Up
    pads: tuple[Any, ...] = ()


Parts = tuple[Node | Grown, ...]


def rewrite_graph(graph: fx.Graph) -> list[Change]:
    """Let `convolve` do the work of every place where it may gain; return what became of each. The graph is changed."""
    paths = _Paths(graph)
    changes = []
    made: dict[Node, Node] = {}  # for each convolution the call in its place, which later places may read
    for node in list(graph.nodes):
        if node.op == "output" or node not in paths.ends:
            continue
        why = paths.ends[node]
        parts = paths.parts_read(node)
        chain = paths.chain(node)
        why = why or _why_not_together(paths, chain, node)
        taken, counted = (False, why) if why else _foretold(parts, node)
        changes.append(Change(_places(chain), " -> ".join(map(_name, chain)), AFTER if taken else "", counted))
        if not why and (taken or not _known(parts)):
            made[node] = _replace(
                graph, [made.get(each, each) if isinstance(each, Node) else each for each in parts], chain
            )
    return changes


class _Paths:
    """What each value is made of, as far as up-sampling that is not made yet goes, and where that ends.

    parts: for every node behind an up-sampling. ends: the nodes that read one, and why such a node is no place; empty
    where it is one.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.parts: dict[Node, Parts] = {}
        self.ends: dict[Node, str] = {}
        for node in graph.nodes:
            if up := up_of(node):
                self.parts[node] = (Grown(node, up),)
            elif any(each in self.parts for each in node.all_input_nodes):
                self._pass(node)

    def _pass(self, node: Node) -> None:
        """A node behind an up-sampling: it hands the map on, or it is where its path ends."""
        made = _handed_on(node, self.parts)
        if made is not None:
            self.parts[node] = made
        else:
            self.ends[node] = _why_not_convolved(node, self.parts)

    def parts_read(self, node: Node) -> Parts:
        """What an end reads first that is behind an up-sampling."""
        return next(self.parts[each] for each in node.all_input_nodes if each in self.parts)

    def chain(self, end: Node) -> list[Node]:
        """All nodes from the up-samplings on to the end, in order."""
        found, todo = {end}, [each for each in end.all_input_nodes if each in self.parts]
        while todo:
            node = todo.pop()
            found.add(node)
            if up_of(node) is None:
                todo += [each for each in node.all_input_nodes if each in self.parts]
        return sorted(found, key=self.order.__getitem__)


def up_of(node: Node) -> Up | None:
    """Return by what a node up-samples maps (N, C, H, W): the same whole factor for both sides; None if it does not."""
    if node.op != "call_function" or node.target is not functional.interpolate:
        return None
    given = _given(node, INTERPOLATE)
    source, result = _example(given["input"]), _example(node)
    mode, corners = given.get("mode", "nearest"), given.get("align_corners")
    if mode not in MODES or given.get("antialias") or source is None or result is None or source.ndim != MAP:
        return None
    factor = _factor(source.shape[2:], result.shape[2:])
    if factor is None or (MODES[mode] == "nearest" and not rows_are_exact(factor)):
        return None
    return Up(factor, mode, corners)


def _factor(small: Sequence[Any], large: Sequence[Any]) -> int | None:
    known = statically_known_true
    factor = _hint(large[0]) // max(_hint(small[0]), 1)
    same = factor > 1 and all(known(up == factor * side) for side, up in zip(small, large, strict=True))
    return factor if same else None


def _hint(size: Any) -> int:
    """Return a size as a number: of the maps that are compiled for, where others are possible as well."""
    known = _example(size) if isinstance(size, Node) else size
    return known if isinstance(known, int) else int(known.node.hint)


def _source(up: Node) -> Any:
    """Return the map that a node up-samples."""
    return _given(up, INTERPOLATE)["input"]


def _example(value: Any) -> Any:
    return value.meta.get("example_value") if isinstance(value, Node) else None


def _given(node: Node, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _handed_on(node: Node, known: Mapping[Node, Parts]) -> Parts | None:
    """Return what a node hands on without making it: crops, pads by zeros, and concatenations of channels."""
    if node.op != "call_function":
        return None
    if node.target in CAT:
        given = _given(node, JOIN)
        maps, dim = given["tensors"], given.get("dim", given.get("axis", 0))
        listed = isinstance(maps, list | tuple) and "out" not in given
        whole = listed and dim in (1, 1 - MAP) and all(getattr(_example(each), "ndim", 0) == MAP for each in maps)
        return tuple(part for each in maps for part in known.get(each, (each,))) if whole else None
    if node.target in DROPOUT:
        given = _given(node, DROP)
        return known[given["input"]] if given.get("training", True) is False else None
    pad = _pad_of(node) or _crop_of(node)
    read = known.get(_given(node, PADDING)["input"], ()) if pad else ()
    if pad and len(read) == 1 and isinstance(part := read[0], Grown):
        return (Grown(part.node, part.up, (*part.pads, pad)),)
    return None


def _pad_of(node: Node) -> tuple[Any, ...] | None:
    """Return (left, right, top, bottom) of a pad by zeros; None for another call."""
    if node.target not in PAD:
        return None
    given = _given(node, PADDING)
    pad = given["pad"]
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0) or len(pad) not in (2, 4):
        return None
    return (*pad, 0, 0)[:4]


def _crop_of(node: Node) -> tuple[int, ...] | None:
    """Return the pad, by less than nothing, that a slice of rows and columns of a map of known size is; else None."""
    given = _given(node, ("input", "index"))
    index, whole = given.get("index"), getattr(_example(given.get("input")), "shape", ())
    if node.target is not operator.getitem or not isinstance(index, tuple) or len(whole) != MAP:
        return None
    at = index.index(...) if ... in index else len(index)
    spans = (*index[:at], *[slice(None)] * (MAP - len(index) + (... in index)), *index[at + 1 :])
    plain = all(isinstance(each, slice) and each.step in (None, 1) for each in spans)
    bounds = [each for span in spans if isinstance(span, slice) for each in (span.start, span.stop)]
    if len(spans) != MAP or not plain or not all(isinstance(each, int | None) for each in (*bounds, *whole[2:])):
        return None
    sides = [range(int(size))[span] for size, span in zip(whole[2:], spans[2:], strict=True)]
    if any(span != slice(None) for span in spans[:2]) or not all(sides):
        return None
    (top, bottom), (left, right) = ((each.start, size - each.stop) for each, size in zip(sides, whole[2:], strict=True))
    return -left, -right, -top, -bottom


def _why_not_convolved(node: Node, known: Mapping[Node, Parts]) -> str:
    """Say why the end of a path is no place by itself; empty where it is a convolution that can read it."""
    if node.op == "output":
        return "its map is a result"
    if node.op != "call_function" or node.target not in CONV:
        return f"{_name(node)} reads its map"
    given = _convolution(node)
    if given["weight"] in known or given["bias"] in known:
        return "its weight is up-sampled"
    weight = _example(given["weight"])
    reasons = [f"{name} {given[name]}" for name in ("stride", "dilation") if set(_pair(given[name])) != {1}]
    if given["groups"] != 1:
        reasons.append(f"{given['groups']} groups")
    if weight is None:
        return "the shape of its weight is not known beforehand"
    if _side(given["padding"], weight.shape[2:]) is None:
        reasons.append(f"padding {given['padding']!r} beside this kernel")
    return f"{', '.join(reasons)}: it takes stride 1, no dilation, no groups, zeros for padding" if reasons else ""


def _convolution(node: Node) -> dict[str, Any]:
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | _given(node, CONVOLUTION)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _side(padding: Any, kernel: Sequence[int]) -> int | None:
    """Return the padding of all sides; None where they differ, or it is not less than the kernel."""
    if padding == "same":
        padding = kernel[0] // 2 if kernel[0] == kernel[1] and kernel[0] % 2 else -1
    sides = {0} if padding == "valid" else set(_pair(padding))
    side = sides.pop()
    return int(side) if not sides and 0 <= side < min(kernel) else None


def _why_not_together(paths: _Paths, chain: list[Node], end: Node) -> str:
    """Say why what stands between up-sampling and convolution cannot be left out; empty where it can."""
    inner = set(chain[:-1])
    for node in chain[:-1]:
        others = [user for user in node.users if user not in inner and user is not end]
        if others:
            named = ", ".join("the result" if each.op == "output" else _name(each) for each in others)
            return f"{named} reads the map of {_name(node)} as well"
    read = [each for node in chain for each in node.all_input_nodes if each not in inner]
    memories = {_memory(each) for each in read} - {None}
    for node in list(paths.order)[paths.order[chain[0]] + 1 :]:  # behind the convolution backward still reads them
        if node not in inner and any(_memory(each) in memories for each in _written(node)):
            return f"{_name(node)} writes to a map that is read"
    return ""


def _memory(node: Node) -> Any:
    example = _example(node)
    return example.untyped_storage()._cdata if isinstance(example, Tensor) else None  # noqa: SLF001 - as weak references do


def _written(node: Node) -> Iterator[Node]:
    """Yield what a node may write to: all that it is given where only its own code knows."""
    if isinstance(node.target, torch._ops.OperatorBase) or node.op == "call_module" or "out" in node.kwargs:  # noqa: SLF001 - no public name
        yield from node.all_input_nodes
        return
    name = str(getattr(node.target, "__name__", node.target))
    by_name = (name.endswith("_") and not name.endswith("__")) or name == "setitem" or node.target in WRITING
    if (by_name or _in_place(node)) and node.args and isinstance(node.args[0], Node):
        yield node.args[0]


def _in_place(node: Node) -> bool:
    """Whether a function of PyTorch is asked to write to its first argument, by name or by position."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != functional.__name__:
        return bool(node.kwargs.get("inplace"))
    names = [*inspect.signature(node.target).parameters] if inspect.isfunction(node.target) else []
    return bool(_given(node, names).get("inplace"))


def _foretold(parts: Parts, conv: Node) -> tuple[bool, str]:
    """Say which form runs on maps of the size that is compiled for, and why."""
    given = _convolution(conv)
    weight = _example(given["weight"])
    padding = _side(given["padding"], weight.shape[2:])
    assert padding is not None
    found = []
    for part in parts:
        if not isinstance(part, Grown):
            continue
        shape = [_hint(each) for each in _example(_source(part.node)).shape]
        pads = [tuple(map(_hint, pad)) for pad in part.pads]
        map_ = enlarged(torch.empty(shape, device="meta"), part.up.factor, part.up.mode, part.up.align_corners, pads)
        if (window := map_.window()) is not None:
            found.append(choice_of(map_, window, weight, padding))
    first = next((each for each in found if each.taken), found[0] if found else None)
    return (first.taken, first.why) if first else (False, "zeros are added to its map on the way")


def _known(parts: Parts) -> bool:
    """Whether all maps have the size for which is compiled: then what is foretold of them is so in every call."""
    sizes = [size for each in parts if isinstance(each, Grown) for size in _example(_source(each.node)).shape]
    return all(isinstance(size, int) for size in sizes)


def _replace(graph: fx.Graph, parts: Sequence[Node | Grown], chain: Sequence[Node]) -> Node:
    """Let one call do the work of a chain, and erase that: torch.fx's own removal of dead code takes writes with it."""
    *inner, conv = chain
    given = _convolution(conv)
    padding = _side(given["padding"], _example(given["weight"]).shape[2:])
    read = [
        (_source(each.node), each.up.factor, each.up.mode, each.up.align_corners, each.pads)
        if isinstance(each, Grown)
        else each
        for each in parts
    ]
    with graph.inserting_before(conv):
        made = graph.call_function(convolve, (read, given["weight"], given["bias"], padding))
    made.meta = dict(conv.meta)
    conv.replace_all_uses_with(made)
    for node in (conv, *reversed(inner)):
        graph.erase_node(node)
    return made


def _name(node: Node) -> str:
    """Return what people call what a node does: Conv2d, where a layer does it, else cat."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    kind = stack[-1][1] if stack else None
    if isinstance(kind, type) and kind.__module__.startswith("torch.nn.modules"):
        return kind.__name__
    return str(getattr(node.target, "__name__", node.target))


def _places(chain: Sequence[Node]) -> tuple[str, ...]:
    return tuple(_place(node) for node in chain)


def _place(node: Node) -> str:
    """Return where a node is: the name of its layer, or of the module whose Python calls it, and the function."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return _name(node)
    path, kind = stack[-1]
    where = path.partition("]")[2].removeprefix(".__self__").lstrip(".")
    layer = isinstance(kind, type) and kind.__module__.startswith("torch.nn.modules")
    return where if layer else f"{where}.{_name(node)}".lstrip(".")

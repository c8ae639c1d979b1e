"""Where a model's graph convolves up-sampled maps, and the same graph with less work in their place.

The graph is Dynamo's: functions of PyTorch in the order in which they run, weights as inputs, and for every value an
example that has its shape, its type and its memory. A place is a convolution that reads an up-sampled map alone or
concatenated, cropped or padded; nobody else may read what then is not made, and nobody may write to what is read
later than the model would. First 1x1 convolutions change places with the up-sampling in front of them, which then may
stand in front of another convolution; then `convolve` takes the place of what is left.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.nn import functional

from skipcost.kernels.dispatch.low_resolution import Choice
from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.enlarged import (
    MODES,
    Enlarged,
    Up,
    UpConv,
    choice_of,
    convolve,
    enlarged,
    gradients_asked,
    rows_are_exact,
    why_not,
)
from skipcost.kernels.rewriting.nodes import (
    AUTOCAST,
    CAT,
    CONV,
    DROPOUT,
    MAP,
    PAD,
    SWITCHES,
    TRANSPOSED,
    UP_CONV,
    convolution_of,
    example_of,
    given_of,
    gradients_on,
    joined_by,
    memory_of,
    name_of,
    places_of,
    transformed,
    written_by,
)

POINTWISE = "pointwise_first"
INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
PADDING = ("input", "pad", "mode", "value")
DROP = ("input", "p", "training", "inplace")


@dataclass(frozen=True, slots=True)
class Grown:
    """An up-sampled map that is not made: the node that up-samples, by what, and what is added to its sides.

    up: of a transposed convolution, the nodes of its weight and bias.
    """

    node: Node
    up: Up | UpConv
    pads: tuple[Any, ...] = ()


Parts = tuple[Node | Grown, ...]


def rewrite_graph(graph: fx.Graph, *, keeps: bool = True) -> list[Change]:
    """Do what gains at every place; return what became of each. The graph is changed.

    keeps: whether the graph runs as it is, so that what is made of weights can be kept from call to call.
    """
    if transformed(graph):
        return [Change(("the model",), "forward", "", "a part of it runs through torch.func")]
    changes = []
    while change := _pointwise_first(graph):
        changes.append(change)
    return changes + _at_low_resolution(graph, keeps=keeps)


def _at_low_resolution(graph: fx.Graph, *, keeps: bool) -> list[Change]:
    """Let `convolve` do the work of every place where it may gain."""
    paths = _Paths(graph)
    changes = [_change([node], "", f"{_named(node.users)} read its map") for node in paths.shared]
    made: dict[Node, Node] = {}  # for each convolution the call in its place, which later places may read
    chains = {end: paths.chain(end) for end in paths.ends if end.op != "output"}
    for node, why in _reasons(paths, chains).items():
        parts, chain = paths.parts_read(node), chains[node]
        after, counted = ("", why) if why else _foretold(parts, chain, keeps=keeps)
        changes.append(_change(chain, after, counted))
        if not why and (after or not _known(parts)):
            now = tuple(made.get(each, each) if isinstance(each, Node) else each for each in parts)
            made[node] = _replace(graph, now, chain, keeps=keeps)
    return changes


def _change(chain: Sequence[Node], after: str, why: str) -> Change:
    return Change(places_of(chain), " -> ".join(map(name_of, chain)), after, why)


def _pointwise_first(graph: fx.Graph) -> Change | None:
    """Let a 1x1 convolution run in front of an up-sampling, where there is one that gains.

    It mixes channels at one pixel, and up-sampling means of pixels of one channel, whose weights sum to one: so a bias
    goes through, too, but for zeros around the map. It gains where it leaves no more channels to up-sample.
    """
    if any(node.target in AUTOCAST for node in graph.nodes):
        return None  # what type a copied node would give is not known
    paths = _Paths(graph)
    chains = {end: paths.chain(end) for end, why in paths.ends.items() if not why}
    for node, why in _reasons(paths, chains).items():
        if why or not _commutes(paths.parts_read(node), chains[node]):
            continue
        up, *_ = chain = chains[node]
        small, large = (
            "x".join(str(_hint(side)) for side in example_of(each).shape[2:]) for each in (_source(up), node)
        )
        change = _change(chain, POINTWISE, f"its MACs are over {small} pixels instead of {large}")
        _swap(graph, chain)
        return change
    return None


def _commutes(parts: Parts, chain: Sequence[Node]) -> bool:
    """Whether a convolution may change places with all that is in front of it on its chain, and gains."""
    (part, *others), (*inner, conv) = parts, chain
    given = convolution_of(conv)
    weight = example_of(given["weight"])
    if others or not isinstance(part, Grown) or not isinstance(part.up, Up) or set(weight.shape[2:]) != {1}:
        return False
    zeros = any(not isinstance(side, int) or side > 0 for pad in part.pads for side in pad)
    alike = {example_of(each).dtype for each in (_source(part.node), part.node, conv)}  # else autocast has a say
    alone = all(len(each.users) == 1 for each in inner)
    return alone and len(alike) == 1 and not zeros and weight.shape[0] <= weight.shape[1]


def _swap(graph: fx.Graph, chain: Sequence[Node]) -> None:
    """Let the last of a chain run first."""
    *inner, conv = chain
    small = _source(inner[0])
    with graph.inserting_before(conv):
        last = _copy(graph, conv, {given_of(conv, ("input",))["input"]: small})
        now = {small: last}
        for node in inner:
            last = now[node] = _copy(graph, node, now)
    conv.replace_all_uses_with(last)
    for node in (conv, *reversed(inner)):
        graph.erase_node(node)


def _copy(graph: fx.Graph, node: Node, instead: Mapping[Node, Node]) -> Node:
    """Return the same call of other values, with the example that it gives."""
    new = graph.node_copy(node, lambda each: instead.get(each, each))
    function: Any = new.target
    new.meta["example_value"] = function(*map_arg(new.args, example_of), **map_arg(new.kwargs, example_of))
    return new


def _reasons(paths: _Paths, chains: Mapping[Node, Sequence[Node]]) -> dict[Node, str]:
    """Say of every end why what stands in front of it cannot be left out; empty where it can.

    Convolutions may read one map together, if all of them are places.
    """
    why = {end: paths.ends[end] or _why_not_later(paths, chain) for end, chain in chains.items()}
    while True:
        left_out = {node for end, chain in chains.items() if not why[end] for node in chain}
        more = {end: _why_made(paths, chain, left_out) for end, chain in chains.items() if not why[end]}
        if not any(more.values()):
            return why
        why |= more


class _Paths:
    """What each value is made of, as far as up-sampling that is not made yet goes, and where that ends.

    parts: for every node behind an up-sampling. ends: the nodes that read one, and why such a node is no place; empty
    where it is one. shared: transposed convolutions that are made in any case, since several read their maps.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.parts: dict[Node, Parts] = {}
        self.ends: dict[Node, str] = {}
        self.shared: list[Node] = []
        for node in graph.nodes:
            if (up := up_of(node)) and isinstance(up, UpConv) and len(node.users) > 1:
                self.shared.append(node)
            elif up:
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


def up_of(node: Node) -> Up | UpConv | None:
    """Return by what a node up-samples maps (N, C, H, W): the same whole factor for both sides; None if it does not."""
    if node.op == "call_function" and node.target in TRANSPOSED:
        return _transposed(node)
    if node.op != "call_function" or node.target is not functional.interpolate:
        return None
    given = given_of(node, INTERPOLATE)
    source, result = example_of(given["input"]), example_of(node)
    mode, corners = given.get("mode", "nearest"), given.get("align_corners")
    if mode not in MODES or given.get("antialias") or source is None or result is None or source.ndim != MAP:
        return None
    factor = _factor(source.shape[2:], result.shape[2:])
    if factor is None or (MODES[mode] == "nearest" and not rows_are_exact(factor)):
        return None
    scale = given.get("scale_factor")  # which rounds to a size, and is what is resampled by all the same
    if (
        scale is not None
        and not given.get("recompute_scale_factor")
        and any(_number(each) != factor for each in _pair(scale))
    ):
        return None
    return Up(factor, mode, corners)


def _transposed(node: Node) -> UpConv | None:
    """Return weight and bias of a transposed convolution as U-Nets have it: 2x2, stride 2, and nothing else."""
    given = {"bias": None} | given_of(node, UP_CONV)
    source, weight = example_of(given["input"]), example_of(given["weight"])
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    wanted = {"stride": 2, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    plain = all(set(_pair(given.get(name, defaults[name]))) == {value} for name, value in wanted.items())
    if source is None or source.ndim != MAP or weight is None or tuple(weight.shape[2:]) != (2, 2) or not plain:
        return None
    return UpConv(given["weight"], given["bias"])


def _factor(small: Sequence[Any], large: Sequence[Any]) -> int | None:
    known = statically_known_true
    factor = _hint(large[0]) // max(_hint(small[0]), 1)
    same = factor > 1 and all(known(up == factor * side) for side, up in zip(small, large, strict=True))
    return factor if same else None


def _hint(size: Any) -> int:
    """Return a size as a number: of the maps that are compiled for, where others are possible as well."""
    known = example_of(size) if isinstance(size, Node) else size
    return known if isinstance(known, int) else int(known.node.hint)


def _number(value: Any) -> Any:
    """Return a number of a call; one that varies from call to call as a symbol, whose comparison becomes a guard."""
    return example_of(value) if isinstance(value, Node) else value


def _source(up: Node) -> Any:
    """Return the map that a node up-samples."""
    return given_of(up, ("input",))["input"]


def _handed_on(node: Node, known: Mapping[Node, Parts]) -> Parts | None:
    """Return what a node hands on without making it: crops, pads by zeros, and concatenations of channels."""
    if node.op != "call_function":
        return None
    if node.target in CAT:
        return tuple(part for each in joined_by(node) for part in known.get(each, (each,))) or None
    if node.target in DROPOUT:
        given = given_of(node, DROP)
        return known[given["input"]] if given.get("training", True) is False else None
    pad = _pad_of(node) or _crop_of(node)
    read = known.get(given_of(node, PADDING)["input"], ()) if pad else ()
    if pad and len(read) == 1 and isinstance(part := read[0], Grown):
        return (Grown(part.node, part.up, (*part.pads, pad)),)
    return None


def _pad_of(node: Node) -> tuple[Any, ...] | None:
    """Return (left, right, top, bottom) of a pad by zeros; None for another call."""
    if node.target not in PAD:
        return None
    given = given_of(node, PADDING)
    pad = given["pad"]
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0) or len(pad) not in (2, 4):
        return None
    return (*pad, 0, 0)[:4]


def _crop_of(node: Node) -> tuple[int, ...] | None:
    """Return the pad, by less than nothing, that a slice of rows and columns of a map of known size is; else None."""
    given = given_of(node, ("input", "index"))
    index, whole = given.get("index"), getattr(example_of(given.get("input")), "shape", ())
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
        return f"{name_of(node)} reads its map"
    given = convolution_of(node)
    if given["weight"] in known or given["bias"] in known:
        return "its weight is up-sampled"
    weight = example_of(given["weight"])
    reasons = [f"{name} {given[name]}" for name in ("stride", "dilation") if set(_pair(given[name])) != {1}]
    if given["groups"] != 1:
        reasons.append(f"{given['groups']} groups")
    if weight is None:
        return "the shape of its weight is not known beforehand"
    if _side(given["padding"], weight.shape[2:]) is None:
        reasons.append(f"padding {given['padding']!r} beside this kernel")
    return f"{', '.join(reasons)}: it takes stride 1, no dilation, no groups, zeros for padding" if reasons else ""


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _side(padding: Any, kernel: Sequence[int]) -> int | None:
    """Return the padding of all sides; None where they differ, or it is not less than the kernel."""
    if padding == "same":
        padding = kernel[0] // 2 if kernel[0] == kernel[1] and kernel[0] % 2 else -1
    sides = {0} if padding == "valid" else set(_pair(padding))
    side = sides.pop()
    return int(side) if not sides and 0 <= side < min(kernel) else None


def _why_made(paths: _Paths, chain: Sequence[Node], left_out: set[Node]) -> str:
    """Say who needs the maps of a chain made; empty where nobody does.

    left_out: the chains of all places. Where the sizes are others in each call, each would make the maps for itself;
    and what a transposed convolution takes is counted once.
    """
    parts = paths.parts_read(chain[-1])
    alone = left_out if _known(parts) and not _composes(parts) else set(chain)
    for node in chain[:-1]:
        others = [user for user in node.users if user not in alone]
        if others:
            return f"{_named(others)} reads the map of {name_of(node)} as well"
    return ""


def _named(readers: Iterable[Node]) -> str:
    return ", ".join("the result" if each.op == "output" else name_of(each) for each in readers)


def _composes(parts: Parts) -> bool:
    return any(isinstance(each, Grown) and isinstance(each.up, UpConv) for each in parts)


def _why_not_later(paths: _Paths, chain: Sequence[Node]) -> str:
    """Say who writes to what a chain reads before it is read for the last time; empty where nobody does."""
    inner = set(chain[:-1])
    read = [each for node in chain for each in node.all_input_nodes if each not in inner]
    memories = {memory_of(each) for each in read} - {None}
    between = list(paths.order)[paths.order[chain[0]] + 1 : paths.order[chain[-1]]]
    if any(node.target in SWITCHES for node in between):
        return "gradients or autocast are switched on the way"
    for node in list(paths.order)[paths.order[chain[0]] + 1 :]:  # behind the convolution backward still reads them
        if node not in inner and any(memory_of(each) in memories for each in written_by(node)):
            return f"{name_of(node)} writes to a map that is read"
    return ""


def _foretold(parts: Parts, chain: Sequence[Node], *, keeps: bool) -> tuple[str, str]:
    """Say which form runs on maps of the size that is compiled for, "" for the model's own, and why."""
    given = (example_of(each) for node in chain for each in node.all_input_nodes)
    with torch.set_grad_enabled(gradients_on(chain[-1])):
        gradients = gradients_asked(given)
    found = []
    for part in parts:
        if isinstance(part, Grown):
            why, choice = _counted(part, chain[-1], alone=len(parts) == 1, gradients=gradients, keeps=keeps)
            found.append((part.up.form if choice and choice.taken else "", choice.why if choice else why))
    return next((each for each in found if each[0]), found[0])


def _counted(
    part: Grown, conv: Node, *, alone: bool, gradients: bool, keeps: bool
) -> tuple[str, Choice | None]:  # fmt: skip
    """Count both forms of a part's share of a convolution; None where there is but one, and why."""
    given = convolution_of(conv)
    weight = example_of(given["weight"])
    padding = _side(given["padding"], weight.shape[2:])
    assert padding is not None
    map_ = _on_meta(part)
    window = map_.window()
    if window is None:
        return "zeros are added to its map where it was cropped", None
    if not keeps and isinstance(part.up, UpConv):
        return "composed weights are kept from call to call, which a graph that is compiled further cannot", None
    why = why_not(map_, window, weight, padding, gradients=gradients)
    return why, None if why else choice_of(map_, window, weight, padding, alone)


def _on_meta(part: Grown) -> Enlarged:
    """Return a map of the size that is compiled for, without data."""
    x = torch.empty([_hint(each) for each in example_of(_source(part.node)).shape], device="meta")
    up = (example_of(each) if isinstance(each, Node) else each for each in part.up)
    return enlarged(x, *up, [tuple(map(_hint, pad)) for pad in part.pads])


def _known(parts: Parts) -> bool:
    """Whether all maps have the size for which is compiled: then what is foretold of them is so in every call."""
    sizes = [size for each in parts if isinstance(each, Grown) for size in example_of(_source(each.node)).shape]
    return all(isinstance(size, int) for size in sizes)


def _replace(graph: fx.Graph, parts: Parts, chain: Sequence[Node], *, keeps: bool) -> Node:
    """Let one call do the work of a chain, and erase that: torch.fx's own removal of dead code takes writes with it."""
    *inner, conv = chain
    given = convolution_of(conv)
    padding = _side(given["padding"], example_of(given["weight"]).shape[2:])
    read = [(_source(each.node), *each.up, each.pads) if isinstance(each, Grown) else each for each in parts]
    with graph.inserting_before(conv):
        how: dict[str, Any] = {"keeps": True} if keeps and _composes(parts) else {}
        made = graph.call_function(convolve, (read, given["weight"], given["bias"], padding), how)
    made.meta = dict(conv.meta)
    conv.replace_all_uses_with(made)
    for node in (conv, *reversed(inner)):
        if not node.users:  # a map that another place reads goes with that one
            graph.erase_node(node)
    return made

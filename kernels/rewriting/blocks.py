"""Which calls of a model's graph belong together, and the same graph with fused ops in their place.

That is a convolution, what it reads, and the norm, ReLU and pool behind it. The graph is Dynamo's, as in `graph`, of a
call that gradients are not asked of. A node is taken for a layer's only if it has that layer's weight.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn import functional
from torch.nn.modules import module as module_hooks

from skipcost.kernels.ops.conv import padding_of
from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.kernels.rewriting.nodes import (
    CAT,
    CONV,
    DROPOUT,
    JOIN,
    MAP,
    PAD,
    SWITCHES,
    TRANSPOSED,
    UP_CONV,
    convolution_of,
    example_of,
    given_of,
    joined_by,
    memory_of,
    name_of,
    path_of,
    place_of,
    places_of,
    transformed,
    written_by,
)
from skipcost.kernels.rewriting.places import Place, laid_out, pad_later
from skipcost.kernels.weights import why_not_fold

Find = Callable[[str], nn.Module]
RELU = (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")
MAX_POOL = (functional.max_pool2d, torch.max_pool2d)
NORMS = (functional.batch_norm, functional.instance_norm, functional.group_norm, functional.layer_norm)
POOLING = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
NORMING = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
GEOMETRY = ("stride", "padding", "dilation", "groups")
# Calls that take a map as it lies in memory and give one that lies so too
ANY_LAYOUT = {
    *RELU, *MAX_POOL, *NORMS, *TRANSPOSED, *CAT, *CONV, *PAD, *DROPOUT, functional.interpolate, functional.avg_pool2d,
    functional.leaky_relu, functional.sigmoid, torch.sigmoid, operator.add, operator.mul, operator.sub, operator.iadd,
    operator.imul, "add", "add_", "mul", "mul_", "sigmoid", "size", "dim", pad_later,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Join:
    """A concatenation of channels. pads: calls that only pad a map for it; up: what up-samples its last map for it."""

    cat: Node
    pads: tuple[Node, ...] = ()
    up: Node | None = None

    @property
    def parts(self) -> list[Node]:
        """All its calls, in order."""
        return [*([self.up] if self.up else []), *self.pads, self.cat]


@dataclass(frozen=True, slots=True)
class Block:
    """A convolution with what can be done in one go with it. why: what keeps kernels from doing it; "" if nothing."""

    conv: Node
    norm: Node | None
    act: Node | None
    pool: Node | None
    join: Join | None
    why: str

    @property
    def chain(self) -> list[Node]:
        """The calls from the convolution to the last whose full map others read."""
        return [each for each in (self.conv, self.norm, self.act) if each is not None]


def fuse_graph(graph: fx.Graph, roots: Sequence[str], find: Find, ops: FusedOps) -> list[Change]:
    """Let fused ops do the work of every block and concatenation; return what became of each. The graph is changed.

    roots: what Dynamo calls the model. find: gives a module of it by its name. ops: what runs.
    """
    if why := _why_not_here(graph):
        return [Change(("the model",), "forward", "", why)]
    finding = _Finding(graph, roots, find)
    edit = _Edit(graph, find, ops)
    changes = list(finding.refusals)
    changes += [edit.join(each) for each in finding.joins] + [edit.block(each) for each in finding.blocks]
    _keep_layouts(graph, edit.made)
    return changes


def _why_not_here(graph: fx.Graph) -> str:
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:  # noqa: SLF001 - no public names
        return "every module has hooks"
    if transformed(graph):
        return "a part of it runs through torch.func"
    switched = next((node for node in graph.nodes if node.op == "call_function" and node.target in SWITCHES), None)
    if switched is not None:
        return "it switches gradients or autocast inside"
    asked = [example_of(each) for each in graph.nodes if each.op == "placeholder"]
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in asked):
        why = "gradients may be asked for: call it under torch.no_grad() or torch.inference_mode()"
        warnings.warn(f"a fused model runs as the original where {why}", RuntimeWarning, stacklevel=2)
        return why
    return ""


class _Finding:
    """The blocks of a graph, the concatenations beside them, and what looks like a block and is none."""

    def __init__(self, graph: fx.Graph, roots: Sequence[str], find: Find) -> None:
        self.graph, self.roots, self.find = graph, roots, find
        for node in list(graph.nodes):
            if _is_empty(node):
                node.replace_all_uses_with(given_of(node, ("input",))["input"])
                graph.erase_node(node)
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.blocks: list[Block] = []
        self.refusals: list[Change] = []
        joined = {node: self._join(node) for node in graph.nodes if len(joined_by(node)) > 1}
        for node in graph.nodes:
            if node.op == "call_function" and node.target in CONV:
                self._block(node, joined)
        taken = {block.join.cat for block in self.blocks if block.join}
        self.joins = [each for each in joined.values() if each.cat not in taken]

    def _block(self, node: Node, joined: dict[Node, Join]) -> None:
        following = list(_following(node))
        norm = next((each for each in following if _is_norm(each)), None)
        act = following[-1] if following and _is_relu(following[-1]) else None
        chain = [each for each in (node, norm, act) if each is not None]
        source = given_of(node, ("input",))["input"]
        join = joined.get(source) if reader(source) is node else None
        if len(chain) == 1 and join is None:
            self._nearly(node)
            return
        why = self._why_not_layer(node, nn.Conv2d, "weight") or self._why_not_norm(norm)
        if why := why or self._why_not_at_once([*(join.parts if join else []), *chain]):
            self._refuse(chain, why if len(chain) > 1 else "")
            return
        conv = self.find(path_of(node))
        assert isinstance(conv, nn.Conv2d)
        why = why_not_kernel(conv)
        if why and norm is None:
            self._refuse(chain, why if act else "")
            return
        pool = None if join or why else self._pool(chain[-1])
        self.blocks.append(Block(node, norm, act, pool, None if why else join, why))

    def _refuse(self, chain: Sequence[Node], why: str) -> None:
        if why:
            self.refusals.append(_change(chain, "", why))

    def _nearly(self, node: Node) -> None:
        """Say what is between a convolution and its norm or ReLU, or who else reads its map."""
        meant = [each for each in node.users if _is_norm(each) or _is_relu(each)]
        between = reader(node)
        after = reader(between) if between is not None else None
        if meant:
            others = ", ".join(place_of(each) for each in node.users if each is not meant[0])
            self._refuse((node, meant[0]), f"the map of the convolution is read by others too: {others}")
        elif between is not None and after is not None and (_is_norm(after) or _is_relu(after)):
            self._refuse((node, between, after), f"{name_of(between)} stands between")

    def _why_not_layer(self, node: Node, kind: type[nn.Module], weight: str) -> str:
        """Say why a call is not just that of a layer with its own weight; empty where it is."""
        given = given_of(node, ("input", "weight", "bias") if weight == "weight" else NORMING)
        module = self._module(node)
        if not isinstance(module, kind) or (owned := self._owner(given[weight])) is None:
            return f"the {weight.replace('_', ' ')} of {name_of(node)} is computed in each call, or no layer's own"
        if owned[1] != weight or self.find(owned[0]) is not module:
            return f"{name_of(node)} has the {weight.replace('_', ' ')} of another layer"
        if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - no public name
            return f"{name_of(node)} is not only called: it has hooks"
        own = type(module).forward is not kind.forward or (isinstance(module, nn.Conv2d) and not _plain(module))
        return f"{name_of(node)} has a way of its own" if own else ""

    def _owner(self, value: Any) -> tuple[str, str] | None:
        """Return the names of the module and the attribute that an input of the graph is; None where it is none."""
        source = getattr(value, "_dynamo_source", None)
        pattern = r"(.*?)((?:\._modules\['[^']+'\])*)\._(?:parameters|buffers)\['([^']+)'\]"
        found = re.fullmatch(pattern, "" if source is None else str(source.name))
        if found is None or found[1] not in self.roots:
            return None
        return ".".join(re.findall(r"\['([^']+)'\]", found[2])), found[3]

    def _module(self, node: Node) -> nn.Module | None:
        try:
            return self.find(path_of(node))
        except KeyError:
            return None

    def _why_not_norm(self, norm: Node | None) -> str:
        if norm is None:
            return ""
        why = why_not_fold(self._module(norm))
        if why or self._module(norm) is None:
            return why or f"the statistics of {name_of(norm)} are no layer's"
        return self._why_not_layer(norm, nn.BatchNorm2d, "running_mean")

    def _why_not_at_once(self, chain: Sequence[Node]) -> str:
        """Say who writes between a chain's first and last to what is then read at once; empty where nobody does."""
        inside = set(chain)
        memories = {memory_of(each) for node in chain for each in node.all_input_nodes if each not in inside} - {None}
        for node in list(self.order)[self.order[chain[0]] : self.order[chain[-1]]]:
            if node not in inside and any(memory_of(each) in memories for each in written_by(node)):
                return f"{name_of(node)} writes in between to what is read"
        return ""

    def _pool(self, last: Node) -> Node | None:
        """Return the 2x2 pool that reads a map beside others, such as the skip of a U-Net."""
        pools = [each for each in last.users if _is_halving(each)]
        if len(pools) != 1 or len(last.users) == 1 or self._written(last, last, pools[0]):
            return None
        return pools[0]

    def _written(self, x: Node, first: Node, last: Node) -> bool:
        """Whether anything between two nodes may write to a map."""
        between = list(self.order)[self.order[first] + 1 : self.order[last]]
        return any(memory_of(each) == memory_of(x) for node in between for each in written_by(node))

    def _join(self, cat: Node) -> Join:
        """Look behind the maps of a concatenation for pads, and behind the last for a transposed convolution."""
        maps = joined_by(cat)
        pads = tuple(each for each in dict.fromkeys(maps) if each.target in PAD and each.args and reader(each) is cat)
        pads = tuple(each for each in pads if not self._written(each.args[0], each, cat))  # type: ignore[arg-type]
        up = maps[-1].args[0] if maps[-1] in pads else maps[-1]
        if not isinstance(up, Node) or up.target not in TRANSPOSED:
            return Join(cat, pads)
        source = given_of(up, ("input",))["input"]
        only_here = all(each is cat or each in pads[-1:] for each in up.users)
        good = not self._why_not_layer(up, nn.ConvTranspose2d, "weight") and doubles(self.find(path_of(up)))
        good = good and given_of(up, UP_CONV).get("output_padding", 0) in (0, (0, 0), [0, 0])
        if not only_here or not good or maps.count(maps[-1]) > 1 or self._written(source, up, cat):
            return Join(cat, pads)
        return Join(cat, pads, up)


def _plain(conv: nn.Conv2d) -> bool:
    return type(conv)._conv_forward is nn.Conv2d._conv_forward  # noqa: SLF001 - what subclasses override


def reader(node: Any) -> Node | None:
    """Return the only reader of a map; None where there are more, or it is a result."""
    users = list(node.users) if isinstance(node, Node) else []
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _following(node: Node) -> Iterator[Node]:
    """Yield the norm and the ReLU that are all that becomes of a map, as far as there are such."""
    after = reader(node)
    if after is not None and _is_norm(after):
        yield after
        after = reader(after)
    if after is not None and _is_relu(after):
        yield after


def _is_relu(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in RELU


def _is_norm(node: Node) -> bool:
    return node.op == "call_function" and node.target in NORMS


def _is_empty(node: Node) -> bool:
    """Whether a node does nothing in evaluation."""
    off = node.op == "call_function" and node.target in DROPOUT
    return off and given_of(node, ("input", "p", "training")).get("training", True) is False


def _is_halving(node: Node) -> bool:
    """Whether a node takes the maximum of 2x2 pixels, an odd last row or column left out."""
    if node.op != "call_function" or node.target not in MAX_POOL:
        return False
    given = given_of(node, POOLING)
    sides = (given["kernel_size"], given.get("stride") or 2, given.get("padding", 0), given.get("dilation", 1))
    plain = [{each} if isinstance(each, int) else set(each) for each in sides] == [{2}, {2}, {0}, {1}]
    return plain and not given.get("ceil_mode") and not given.get("return_indices")


def doubles(layer: nn.Module) -> bool:
    """Whether a transposed convolution is a U-Net's: 2x2, stride 2."""
    if not isinstance(layer, nn.ConvTranspose2d) or layer.bias is None:
        return False
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
    return sizes == ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1)


def why_not_kernel(conv: nn.Conv2d) -> str:
    """Say what about a convolution no kernel of ours has; empty where they have it all."""
    reasons = []
    side = conv.kernel_size[0]
    if conv.kernel_size not in ((1, 1), (3, 3)):
        reasons.append(f"kernel {'x'.join(map(str, conv.kernel_size))}")
    elif padding_of(conv) not in ((0, 0), (side // 2, side // 2)):
        reasons.append(f"padding {conv.padding!r}")
    if conv.stride != (1, 1):
        reasons.append(f"stride {conv.stride[0] if len(set(conv.stride)) == 1 else conv.stride}")
    if conv.dilation != (1, 1):
        reasons.append(f"dilation {conv.dilation[0] if len(set(conv.dilation)) == 1 else conv.dilation}")
    if conv.groups != 1:
        reasons.append(f"{conv.groups} groups")
    if conv.padding_mode != "zeros":
        reasons.append(f"padding mode {conv.padding_mode!r}")
    if not reasons:
        return ""
    return f"{', '.join(reasons)}: the kernels do 3x3 and 1x1, stride 1, zeros for padding"


def _change(nodes: Sequence[Node], after: str, why: str) -> Change:
    return Change(places_of(nodes), " -> ".join(map(name_of, nodes)), after, why)


class _Edit:
    """Puts calls of fused ops into a graph, each where the first of the calls was that it stands for.

    made: the nodes whose maps lie in memory as ours do.
    """

    def __init__(self, graph: fx.Graph, find: Find, ops: FusedOps) -> None:
        self.graph, self.find, self.ops = graph, find, ops
        self.made: list[Node] = []

    def join(self, join: Join) -> Change:
        """Fuse a concatenation that no convolution is fused with."""
        change = _change(join.parts, "up_conv_concat" if join.up else "crop_concat", "")
        read = self._read(join, Place(self.ops, self.find))
        self.made.append(read)
        self._replace(join.cat, read)
        return change

    def block(self, block: Block) -> Change:
        """Fuse a convolution with what belongs to it."""
        nodes = [*(block.join.parts if block.join else []), *block.chain, *([block.pool] if block.pool else [])]
        change = _change(nodes, _names(block), block.why)
        at = block.join.cat if block.join else block.conv
        place = self._place(block)
        source = given_of(block.conv, ("input",))["input"]
        read = self._read(block.join, place) if block.join else source
        call = place.fold if block.why else place.convolve_pool if block.pool else place.convolve
        result = self._call(at, call, read)
        if block.pool:
            with self.graph.inserting_before(at):
                result, pooled = (self.graph.call_function(operator.getitem, (result, index)) for index in (0, 1))
            self._made(block.pool, pooled)
            self._replace(block.pool, pooled)
        self._made(block.chain[-1], result)
        self._replace(block.chain[-1], result)
        for each in reversed(block.chain[:-1]):
            self.graph.erase_node(each)
        if block.join:
            self.graph.erase_node(block.join.cat)
        return change

    def _made(self, old: Node, new: Node) -> None:
        new.meta["example_value"] = example_of(old)
        self.made.append(new)

    def _place(self, block: Block) -> Place:
        given = convolution_of(block.conv)
        norm = path_of(block.norm) if block.norm else None
        geometry = tuple(given[name] for name in GEOMETRY)
        return Place(self.ops, self.find, path_of(block.conv), norm, block.act is not None, geometry)

    def _read(self, join: Join, place: Place) -> Node:
        """Replace a join's pads and up-sampling, and return the call that joins its maps."""
        for pad in join.pads:
            self._replace(pad, self._call(pad, pad_later, *pad.args, **pad.kwargs))
        if join.up:
            up = Place(self.ops, self.find, path_of(join.up))
            self._replace(join.up, self._call(join.up, up.later, given_of(join.up, ("input",))["input"]))
        joined = self._call(join.cat, place.join, given_of(join.cat, JOIN)["tensors"])
        joined.meta["example_value"] = example_of(join.cat)
        return joined

    def _call(self, at: Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(at):
            return self.graph.call_function(function, args, kwargs)

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)


def _keep_layouts(graph: fx.Graph, made: Sequence[Node]) -> None:
    """Let what relies on how maps lie in memory find them as the model would have made them.

    Maps of ours are channels_last. Where one gets, through calls that keep a layout, to another call, which may be
    .view, it is laid out anew at once; a result, at the end.
    """
    ours = set(made)
    other: set[Node] = set()  # calls of the model's, and what leads to them
    for node in reversed(graph.nodes):
        keeps = node in ours or node.target in ANY_LAYOUT or isinstance(getattr(node.target, "__self__", None), Place)
        read = any(each in other and each not in ours for each in node.users)
        if node.op != "output" and (read or not keeps):
            other.add(node)
    known = set(ours)
    for node in graph.nodes:
        if node.target in ANY_LAYOUT and any(each in known for each in node.all_input_nodes):
            known.add(node)
    for node in made:
        if any(each in other for each in node.users):
            _lay_out(graph, node, node.next, list(node.users))
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in list(output.all_input_nodes):
        if node in known:
            _lay_out(graph, node, output, [output])


def _lay_out(graph: fx.Graph, node: Node, at: Node, users: Sequence[Node]) -> None:
    example = example_of(node)
    if not isinstance(example, Tensor) or example.ndim != MAP:
        return
    layouts = (torch.contiguous_format, torch.channels_last)
    layout = next((each for each in layouts if example.is_contiguous(memory_format=each)), None)
    if layout is not None:
        with graph.inserting_before(at):  # a result may be written to until then
            new = graph.call_function(laid_out, (node, layout))
        for each in users:
            each.replace_input_with(node, new)


def _names(block: Block) -> str:
    """Name the ops of a block."""
    if block.why:
        return "convolution of PyTorch with the norm folded in"
    if block.pool:
        return "conv_bn_relu_pool"
    if block.join is None:
        return "conv_bn_relu"
    return "up_conv, concat_conv_bn_relu" if block.join.up else "concat_conv_bn_relu"

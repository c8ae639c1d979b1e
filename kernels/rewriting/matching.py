"""Which calls of a traced model belong together: a convolution, what it reads, and the norm, ReLU and pool after it.

`find` names the groups, or why what looks like one is none. It changes nothing but what evaluation makes empty:
identities and dropout are taken out of the graph first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node
from torch.nn import functional

from skipcost.kernels.ops.conv import padding_of
from skipcost.kernels.rewriting.tracing import is_layer, more_than_forward
from skipcost.kernels.rewriting.wiring import Wiring
from skipcost.kernels.weights import why_not_fold


@dataclass(frozen=True, slots=True)
class Join:
    """A concatenation of channels. pads: calls that only pad a map for it; up: what up-samples its last map for it."""

    cat: Node
    pads: tuple[Node, ...]
    up: Node | None


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


@dataclass(frozen=True, slots=True)
class Refusal:
    """Calls that look like a block and are none."""

    chain: tuple[Node, ...]
    why: str


@dataclass(slots=True)
class Found:
    """All groups of a graph. absorbed: names of layers that were taken out of it because they do nothing."""

    blocks: list[Block] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    absorbed: list[str] = field(default_factory=list)


def find(wiring: Wiring) -> Found:
    """Take out what does nothing, then group the rest of the graph."""
    found = Found()
    for node in list(wiring.graph.nodes):
        if wiring.is_empty(node):
            if node.op == "call_module":
                found.absorbed.append(str(node.target))
            node.replace_all_uses_with(node.args[0])
            wiring.graph.erase_node(node)
    joined = {node: _join(wiring, node) for node in wiring.graph.nodes if wiring.is_cat(node)}
    for node in wiring.graph.nodes:
        if isinstance(wiring.module(node), nn.Conv2d):
            outcome = _block(wiring, node, joined)
            if isinstance(outcome, Block):
                found.blocks.append(outcome)
            elif outcome:
                found.refusals.append(outcome)
    taken = {block.join.cat for block in found.blocks if block.join}
    found.joins += [each for each in joined.values() if each.cat not in taken]
    return found


def _block(wiring: Wiring, node: Node, joined: dict[Node, Join]) -> Block | Refusal | None:
    following = list(_following(wiring, node))
    norm = next((each for each in following if wiring.is_norm(each)), None)
    act = following[-1] if following and wiring.is_relu(following[-1]) else None
    chain = tuple(each for each in (node, norm, act) if each is not None)
    join = joined.get(node.args[0]) if node.args and wiring.reader(node.args[0]) is node else None  # type: ignore[arg-type]
    if len(chain) == 1 and join is None:
        return _nearly(wiring, node)
    if why := why_not_a_layer(wiring, node) or _why_not_norm(wiring, norm):
        return Refusal(chain, why) if len(chain) > 1 else None
    why = why_not_kernel(wiring.layer(node, nn.Conv2d))
    if why and norm is None:
        return Refusal(chain, why) if act else None
    pool = None if join or why else _pool(wiring, chain[-1])
    return Block(node, norm, act, pool, None if why else join, why)


def _following(wiring: Wiring, node: Node) -> Iterator[Node]:
    """Yield the norm and the ReLU that are all that becomes of a map, as far as there are such."""
    after = wiring.reader(node)
    if after is not None and wiring.is_norm(after):
        yield after
        after = wiring.reader(after)
    if after is not None and wiring.is_relu(after):
        yield after


def _nearly(wiring: Wiring, node: Node) -> Refusal | None:
    """Say what is between a convolution and its norm or ReLU, or who else reads its map."""
    meant = [each for each in node.users if wiring.is_norm(each) or wiring.is_relu(each)]
    if meant:
        others = ", ".join(wiring.place(each) for each in node.users if each is not meant[0])
        return Refusal((node, meant[0]), f"the map of the convolution is read by others too: {others}")
    between = wiring.reader(node)
    if between is None or not (is_layer(module) if (module := wiring.module(between)) else True):
        return None
    after = wiring.reader(between)
    if after is not None and (wiring.is_norm(after) or wiring.is_relu(after)):
        return Refusal((node, between, after), f"{wiring.name(between)} stands between")
    return None


def _pool(wiring: Wiring, last: Node) -> Node | None:
    """Return the 2x2 pool that reads a map beside others, such as the skip of a U-Net."""
    pools = [each for each in last.users if wiring.is_halving(each)]
    if len(pools) != 1 or len(last.users) == 1 or wiring.written(last, last, pools[0]):
        return None
    return pools[0]


def _join(wiring: Wiring, cat: Node) -> Join:
    """Look behind the maps of a concatenation for pads, and behind the last for a transposed convolution."""
    maps = cat.args[0]
    assert isinstance(maps, list | tuple)
    pads = [
        each
        for each in dict.fromkeys(maps)
        if isinstance(each, Node) and wiring.is_call(each, (functional.pad,)) and wiring.reader(each) is cat
    ]
    up = maps[-1].args[0] if maps[-1] in pads else maps[-1]  # type: ignore[union-attr]  # Wiring.is_cat saw to it
    if not isinstance(up, Node) or not _doubles(wiring.layer(up, nn.ConvTranspose2d)):
        return Join(cat, tuple(pads), None)
    source = up.args[0]
    only_here = all(each is cat or each in pads[-1:] or wiring.asks_for_shape(each) for each in up.users)
    if not isinstance(source, Node) or not only_here or maps.count(maps[-1]) > 1 or wiring.written(source, up, cat):
        return Join(cat, tuple(pads), None)
    return Join(cat, tuple(pads), up)


def _doubles(layer: nn.ConvTranspose2d | None) -> bool:
    """Whether a transposed convolution is a U-Net's: 2x2, stride 2."""
    if layer is None or layer.bias is None or "weight" not in layer._parameters:  # noqa: SLF001 - computed weights are not
        return False
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
    return sizes == ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1)


def why_not_a_layer(wiring: Wiring, node: Node) -> str:
    """Say why a call of a Conv2d is not just that; empty where it is."""
    module = wiring.module(node)
    assert isinstance(module, nn.Conv2d)
    if reason := more_than_forward(module):
        return f"the convolution is not only called: {reason}"
    if "weight" not in module._parameters:  # noqa: SLF001 - no public way to tell
        return "the weight of the convolution is computed in each call"
    own = type(module)._conv_forward is not nn.Conv2d._conv_forward  # noqa: SLF001 - what subclasses override
    if own or wiring.layer(node, nn.Conv2d) is None:
        return f"{type(module).__name__} convolves in a way of its own"
    return ""


def _why_not_norm(wiring: Wiring, norm: Node | None) -> str:
    if norm is None:
        return ""
    module = wiring.module(norm)
    if isinstance(module, nn.BatchNorm2d) and wiring.layer(norm, nn.BatchNorm2d) is None:
        return f"{type(module).__name__} is not only called: {more_than_forward(module) or 'it has a way of its own'}"
    return why_not_fold(module)


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

"""Which up-sampled maps of a traced model go into a convolution as they are, and what keeps the others from it.

`find` gives each call that up-samples a place or a refusal. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node
from torch.nn import functional

from skipcost.kernels.rewriting.enlarged import MODES
from skipcost.kernels.rewriting.lazy import unsuited, whole_factor
from skipcost.kernels.rewriting.tracing import more_than_forward
from skipcost.kernels.rewriting.wiring import CONV, Wiring

INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
LOOKAHEAD = 4  # calls behind an up-sampling among which a convolution is looked for, to name what stands before it
DROPOUT = (functional.dropout, functional.dropout2d)
WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Place:
    """A convolution over up-sampled maps. between: crops, pads and what is empty; cat: where they are concatenated."""

    ups: tuple[Node, ...]
    between: tuple[Node, ...]
    conv: Node

    @property
    def chain(self) -> list[Node]:
        """All its calls, in order."""
        return sorted((*self.ups, *self.between, self.conv))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Calls from an up-sampling on that are no place, and why."""

    chain: tuple[Node, ...]
    why: str


@dataclass(slots=True)
class _Path:
    """What becomes of an up-sampled map: the calls in between, and the convolution; why there is none."""

    up: Node
    between: list[Node] = field(default_factory=list)
    cat: Node | None = None
    end: Node | None = None
    why: str = ""


def find(wiring: Wiring) -> tuple[list[Place], list[Refusal]]:
    """Look at every call that up-samples two-dimensional maps."""
    paths = [_follow(wiring, node) for node in wiring.graph.nodes if is_up(wiring, node)]
    refusals = [Refusal(_nodes(each), each.why) for each in paths if each.why]
    places = []
    good = [each for each in paths if not each.why]
    for conv in dict.fromkeys(each.end for each in good):
        of_it = [each for each in good if each.end is conv]
        between = dict.fromkeys(node for each in of_it for node in each.between)
        assert conv is not None
        places.append(Place(tuple(each.up for each in of_it), tuple(between), conv))
    return places, refusals


def is_up(wiring: Wiring, node: Node) -> bool:
    """Whether a node calls `interpolate` or a layer that does."""
    return isinstance(wiring.module(node), nn.Upsample) or wiring.is_call(node, (functional.interpolate,))


def _nodes(path: _Path) -> tuple[Node, ...]:
    return (path.up, *path.between, *([path.end] if path.end else []))


def _follow(wiring: Wiring, up: Node) -> _Path:
    """Go from an up-sampling to the convolution that reads it."""
    path, at = _Path(up, why=_why_not_up(wiring, up)), up
    while not path.why:
        readers = [each for each in at.users if not wiring.asks_for_shape(each)]
        if len(readers) != 1:
            others = ", ".join("the result" if each.op == "output" else wiring.place(each) for each in readers)
            path.why = f"its map has {len(readers)} readers, {others}" if readers else "nobody reads its map"
        elif _is_convolution(wiring, at, readers[0]):
            path.end = readers[0]
            path.why = _why_not_convolution(wiring, path.end) or _why_not_later(wiring, path)
            break
        elif wiring.is_cat(readers[0]) and path.cat is None and _once(at, readers[0]):
            path.cat = at = readers[0]
            path.between.append(at)
        elif readers[0].args[:1] == (at,) and _is_linear(wiring, readers[0]):
            at = readers[0]
            path.between.append(at)
        else:
            path.why = _why_not_reader(wiring, path, readers[0])
    return path


def _once(x: Node, cat: Node) -> bool:
    """Whether a map is there a single time among those that are concatenated."""
    maps = cat.args[0]
    return isinstance(maps, list | tuple) and maps.count(x) == 1


def _is_convolution(wiring: Wiring, x: Node, node: Node) -> bool:
    called = isinstance(wiring.module(node), nn.Conv2d) or wiring.is_call(node, CONV)
    return called and node.args[0] is x and list(node.all_input_nodes).count(x) == 1


def _is_linear(wiring: Wiring, node: Node) -> bool:
    """Whether a call crops, pads, or does nothing: a map that is not made can go through it."""
    if any(wiring.layer(node, kind) for kind in (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return True
    return wiring.is_call(node, (functional.pad, *DROPOUT)) or _is_crop(wiring, node)


def _is_crop(wiring: Wiring, node: Node) -> bool:
    """Whether a node reads map[:, :, rows, columns]."""
    if node.op != "call_function" or wiring.name(node) != "getitem" or not isinstance(node.args[1], tuple):
        return False
    batch, *rest = node.args[1]
    plain = all(isinstance(each, slice) and each.step in (None, 1) for each in rest)
    return plain and 1 <= len(rest) <= 3 and batch == WHOLE and rest[0] == WHOLE  # noqa: PLR2004 - C, H, W


def _why_not_up(wiring: Wiring, up: Node) -> str:
    """Say what about an up-sampling keeps it from going through a convolution."""
    module = wiring.module(up)
    if isinstance(module, nn.Upsample):
        more = more_than_forward(module, gradients=True)
        if more or wiring.layer(up, nn.Upsample) is None:
            return f"the up-sampling is not only called: {more or 'it has a way of its own'}"
        given = {name: getattr(module, name, None) for name in INTERPOLATE[1:]}
    else:
        given = dict(zip(INTERPOLATE, up.args, strict=False)) | up.kwargs
    mode = given.get("mode", "nearest")
    if not isinstance(mode, Node) and mode not in MODES:
        return f"mode {mode!r}: only {' and '.join(sorted(MODES))} are known here"
    if given.get("antialias"):
        return "antialias=True filters the map"
    scale = given.get("scale_factor")
    sides = list(scale) if isinstance(scale, list | tuple) else [scale]
    if scale is not None and not any(isinstance(each, Node) for each in sides) and whole_factor(None, scale) is None:
        return f"scale_factor={scale} is no whole number from 2 on for both axes"
    return ""


def _why_not_convolution(wiring: Wiring, node: Node) -> str:
    module = wiring.module(node)
    if isinstance(module, nn.Conv2d):
        if reason := more_than_forward(module, gradients=True):
            return f"the convolution is not only called: {reason}"
        own = type(module)._conv_forward is not nn.Conv2d._conv_forward  # noqa: SLF001 - what subclasses override
        if own or wiring.layer(node, nn.Conv2d) is None:
            return f"{type(module).__name__} convolves in a way of its own"
        if module.padding_mode != "zeros":
            return f"padding mode {module.padding_mode!r}: only zeros are known here"
        return unsuited(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
    return ""  # of a function it shows in each call


def _why_not_later(wiring: Wiring, path: _Path) -> str:
    """Say who writes to the maps that the convolution would read, before it does or before its backward does."""
    source = path.up.args[0]
    assert isinstance(source, Node)
    read = [(source, path.up)]
    if path.cat is not None:
        read += [(each, path.cat) for each in path.cat.all_input_nodes]
    if any(wiring.changes_after(each, start) for each, start in read):
        return "a map that it would read is written to later"
    return ""


def _why_not_reader(wiring: Wiring, path: _Path, reader: Node) -> str:
    """Name what reads the map instead of a convolution, or before one; put it into the path."""
    after = list(_ahead(wiring, reader))
    conv = next((each for each in after if isinstance(wiring.module(each), nn.Conv2d)), None)
    if reader.op == "output":
        return "its map is a result: no convolution reads it"
    path.between.append(reader)
    if conv is None:
        return f"{wiring.name(reader)} reads its map, which is no convolution"
    standing = [reader, *after[: after.index(conv)]]
    path.between += after[: after.index(conv)]
    path.end = conv
    return f"{' and '.join(map(wiring.name, standing))} {'stand' if len(standing) > 1 else 'stands'} between"


def _ahead(wiring: Wiring, node: Node) -> Iterator[Node]:
    """Yield the calls behind a node as long as each is the only reader of the one before."""
    for _ in range(LOOKAHEAD):
        after = wiring.reader(node)
        if after is None:
            return
        yield after
        node = after

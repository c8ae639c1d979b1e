"""What a network asks of the kernels: `Call`, one op at one shape, and every call of a network in order.

A call's `key` is one line of text. It is the key of everything that is measured: rows of `skipcost kernels bench`,
the map of winners that dispatch reads, what `explain` prints. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from skipcost.unet_models import geometry
from skipcost.unet_models.geometry import EdgeSize
from skipcost.unet_models.spec import ModelSpec, check_flag, check_integer, suggest
from skipcost.unet_models.topology import Conv, Edge, Node, SkipGraph

OPS = ("conv_bn_relu", "conv_bn_relu_pool", "concat_conv_bn_relu", "conv_bn_relu_train", "up_conv", "crop_concat")
MERGING = ("concat_conv_bn_relu", "conv_bn_relu_train", "crop_concat")  # the ops that read more than one map
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MODES = ("inference", "training")
FOLDABLE = ("batch", "none")  # norms that can be in a convolution; others need the whole map first
LARGEST = 2**31 - 1  # of any size: what a kernel takes as a number of 32 bits
AFFINE_BYTES = 8  # scale and shift of a channel, in fp32

_KEY = re.compile(
    r"(?P<op>\w+) n(?P<batch>\d+) (?P<sources>\d+x\d+x\d+(?:\+\d+x\d+x\d+)*)(?:>(?P<out_channels>\d+))?"
    r"(?: k(?P<kernel>\d+) p(?P<padding>\d+)(?P<relu> relu)?)? (?P<precision>\w+) (?P<mode>\w+)"
)


@dataclass(frozen=True, slots=True)
class Call:
    """One op at one shape.

    sources: (C, H, W) of every map that is read, in order, before it is cropped to the smallest of them.
    out_channels: 0 for crop_concat, whose result has those of its sources. mode: "training" where gradients will be
    asked for. Fields that an op has no use for are put into one form, so that equal work has one key: a crop_concat
    has kernel 0, an up_conv is always kernel 2 with stride 2, neither has padding or ReLU.
    ValueError where no kernel could be asked for that.
    """

    op: str
    batch: int
    sources: tuple[tuple[int, int, int], ...]
    out_channels: int
    kernel: int = 3
    padding: int = 1
    relu: bool = True
    precision: str = "bf16"
    mode: str = "inference"

    def __post_init__(self) -> None:
        """Check each field, then the combination."""
        for name, accepted in (("op", OPS), ("precision", PRECISIONS), ("mode", MODES)):
            if getattr(self, name) not in accepted:
                raise ValueError(suggest(name, getattr(self, name), accepted))
        check_integer("batch", self.batch, 1, LARGEST)
        self._check_sources()
        if self.op in ("crop_concat", "up_conv"):
            for name, value in (("kernel", 2 if self.op == "up_conv" else 0), ("padding", 0), ("relu", False)):
                object.__setattr__(self, name, value)
        else:
            self._check_convolution()
        check_integer("out_channels", self.out_channels, *((0, 0) if self.op == "crop_concat" else (1, LARGEST)))

    def _check_sources(self) -> None:
        if not isinstance(self.sources, tuple) or not self.sources:
            message = f"sources={self.sources!r} is not a tuple of (C, H, W), one for each map that {self.op} reads"
            raise ValueError(message)
        if len(self.sources) > 1 and self.op not in MERGING:
            message = f"{self.op} reads one map, not {len(self.sources)}; several are for {', '.join(MERGING)}"
            raise ValueError(message)
        for source in self.sources:
            self._check_source(source)

    def _check_source(self, source: object) -> None:
        if not isinstance(source, tuple) or len(source) != 3:  # noqa: PLR2004 - C, H, W
            message = f"source {source!r} is not (C, H, W): three whole numbers for each map that {self.op} reads"
            raise ValueError(message)
        for name, size in zip(("channels", "height", "width"), source, strict=True):
            check_integer(f"{name} of source {source}", size, 1, LARGEST)

    def _check_convolution(self) -> None:
        if self.kernel not in (1, 3) or isinstance(self.kernel, bool):
            message = f"kernel={self.kernel!r} of {self.op} is not 1 or 3, the sizes that the kernels have"
            raise ValueError(message)
        check_integer("padding", self.padding, 0, self.kernel // 2)
        check_flag("relu", self.relu)
        if min(self.out_size) < 1:
            height, width = self.window
            message = (
                f"{self.op} of a {height}x{width} map with kernel={self.kernel} and padding={self.padding} has no "
                f"pixel: give maps of {self.kernel - 2 * self.padding} or more a side"
            )
            raise ValueError(message)

    @property
    def in_channels(self) -> int:
        """Channels of all sources together."""
        return sum(channels for channels, _, _ in self.sources)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the sources once they are cropped to the smallest of them."""
        return min(height for _, height, _ in self.sources), min(width for _, _, width in self.sources)

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result; of conv_bn_relu_pool's first, the second has half of them, rounded down."""
        height, width = self.window
        if self.op == "up_conv":
            return 2 * height, 2 * width
        lost = self.kernel - 1 - 2 * self.padding if self.kernel else 0
        return height - lost, width - lost

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.kernel**2 * self.in_channels * self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass, for the whole batch."""
        height, width = self.window if self.op == "up_conv" else self.out_size
        return self.batch * self.weights * height * width

    @property
    def bytes(self) -> int:
        """Compulsory traffic of the forward pass: what is read of each input once, each output once, scale and shift.

        Of a source that is cropped only the window is read.
        """
        (height, width), (out_height, out_width) = self.window, self.out_size
        moved = self.in_channels * height * width
        moved += (self.out_channels or self.in_channels) * out_height * out_width
        if self.op == "conv_bn_relu_pool":
            moved += self.out_channels * (out_height // 2) * (out_width // 2)
        size = 4 if self.precision in ("fp32", "tf32") else 2
        return (self.batch * moved + self.weights) * size + AFFINE_BYTES * self.out_channels

    @property
    def key(self) -> str:
        """The call in one line, e.g. `conv_bn_relu n1 64x512x512>64 k3 p1 relu bf16 inference`."""
        text = f"{self.op} n{self.batch} " + "+".join("x".join(map(str, source)) for source in self.sources)
        if self.out_channels:
            text += f">{self.out_channels}"
        if self.op not in ("crop_concat", "up_conv"):
            text += f" k{self.kernel} p{self.padding}" + " relu" * self.relu
        return f"{text} {self.precision} {self.mode}"

    @classmethod
    def parse(cls, key: str) -> Call:
        """Read a key back; ValueError if it is none."""
        found = _KEY.fullmatch(key)
        if found is None:
            message = (
                f"{key!r} is not a call's key: one reads 'conv_bn_relu n1 64x512x512>64 k3 p1 relu bf16 inference'"
            )
            raise ValueError(message)
        sources = tuple(_size(text) for text in found["sources"].split("+"))
        numbers = {name: int(found[name]) for name in ("kernel", "padding") if found[name] is not None}
        call = cls(
            op=found["op"],
            batch=int(found["batch"]),
            sources=sources,
            out_channels=int(found["out_channels"] or 0),
            relu=found["relu"] is not None,
            precision=found["precision"],
            mode=found["mode"],
            **numbers,
        )
        if call.key != key:
            message = f"{key!r} is not how a call's key is written; that one is {call.key!r}"
            raise ValueError(message)
        return call


def _size(text: str) -> tuple[int, int, int]:
    channels, height, width = map(int, text.split("x"))
    return channels, height, width


def network_calls(
    spec: ModelSpec, batch: int, height: int, width: int, mode: str, precision: str
) -> list[tuple[str, Call]]:
    """Every call of the network of `spec`, all heads included, on a batch of height x width pixels; see `graph_calls`.

    mode: "inference" or "training". precision: "fp32", "tf32", "bf16" or "fp16". ValueError where the size cannot work.
    """
    return graph_calls(spec.graph(), batch, height, width, mode, precision)


def graph_calls(
    graph: SkipGraph, batch: int, height: int, width: int, mode: str, precision: str
) -> list[tuple[str, Call]]:
    """Every call of a graph with where it happens, in the executor's order and as the fused backend groups the work.

    Where: `x0_1.0` is the first convolution of node x0_1; `x1_0->x0_1` what an edge does (its transposed or its 3x3
    convolution), `x1_0->x0_1.project` and `x0_0->x0_1.gate.psi` what else it has; `x0_1.merge`, `head of x0_4` and
    `classifier on x4_0` speak for themselves. Each convolution of the network is in exactly one call, so the calls'
    MACs add up to the network's. Pooling, up-sampling without weights, sums and a gate's arithmetic are no calls, nor
    are norms that cannot be folded (instance, group): such a layer is its bare convolution, without ReLU, and maps
    are concatenated before it.
    """
    return list(_Lister(graph, batch, height, width, mode, precision).calls())


class _Lister:
    """One network on one batch: what every call needs beside its own shape."""

    def __init__(self, graph: SkipGraph, batch: int, height: int, width: int, mode: str, precision: str) -> None:
        self.graph, self.batch, self.mode, self.precision = graph, batch, mode, precision
        self.rows, self.columns = geometry.sizes(graph, height, width)
        self.pooled = {edge.source for edge in graph.edges if edge.shift == -1 and not edge.skip}

    def calls(self) -> Iterator[tuple[str, Call]]:
        for node in self.graph.nodes:
            yield from self._edges(node)
            yield from self._node(node)
            size = self.rows.nodes[node.name], self.columns.nodes[node.name]
            for head in self.graph.heads:
                if head.node == node.name:
                    yield f"head of {node.name}", self._conv(head.conv, size)
            if self.graph.classifier and self.graph.classifier.node == node.name:
                yield f"classifier on {node.name}", self._conv(self.graph.classifier.conv, size)

    def _edges(self, node: Node) -> Iterator[tuple[str, Call]]:
        """The executor up-samples the map that steers the gates of a node first, for them and its own edge."""
        signal = node.deeper if any(edge.gate for edge in node.inputs) else None
        if signal:
            yield from self._up(signal)
        for edge in node.inputs:
            if edge is not signal:
                yield from self._up(edge)
            y, x = self._along(edge)
            if edge.gate:
                for name, conv in zip(("x", "signal", "psi"), edge.gate.convs, strict=True):
                    yield f"{edge.name}.gate.{name}", self._conv(conv, (y.gated, x.gated))
            if edge.conv:
                yield edge.name, self._conv(edge.conv, (y.gated, x.gated))
            if edge.project:
                yield f"{edge.name}.project", self._conv(edge.project, (y.convolved, x.convolved))

    def _up(self, edge: Edge) -> Iterator[tuple[str, Call]]:
        if edge.up:
            y, x = self._along(edge)
            source = (edge.up.in_channels, y.source, x.source)
            yield edge.name, self._call("up_conv", (source,), edge.up.out_channels)

    def _node(self, node: Node) -> Iterator[tuple[str, Call]]:
        """The first convolution reads the arriving maps, side by side if it can; the last one also pools if it can."""
        y, x = self._along(node.inputs[0])
        height, width = y.merged, x.merged
        arriving: tuple[tuple[int, int, int], ...] = ()
        if len(node.inputs) > 1 and node.merge == "concat":
            ends = [(edge, *self._along(edge)) for edge in node.inputs]
            arriving = tuple((edge.out_channels, y.convolved, x.convolved) for edge, y, x in ends)
            if node.convs[0].norm not in FOLDABLE:
                yield f"{node.name}.merge", self._call("crop_concat", arriving, 0)
                arriving = ()
        pools = node.name in self.pooled and self.mode == "inference"
        for index, conv in enumerate(node.convs):
            op = "conv_bn_relu"
            if index == 0 and arriving:
                op = "concat_conv_bn_relu"
            elif index == len(node.convs) - 1 and pools and conv.norm in FOLDABLE:
                op = "conv_bn_relu_pool"
            call = self._conv(conv, (height, width), op, arriving if index == 0 else ())
            yield f"{node.name}.{index}", call
            height, width = call.out_size

    def _conv(
        self,
        conv: Conv,
        size: tuple[int, int],
        op: str = "conv_bn_relu",
        sources: tuple[tuple[int, int, int], ...] = (),
    ) -> Call:
        """A convolution of a map of `size`, or of `sources`, with what of its norm and ReLU can be in it."""
        if self.mode == "training" and conv.norm == "batch":
            op = "conv_bn_relu_train"
        padding = conv.kernel // 2 if self.graph.padding == "same" else 0
        relu = conv.act and conv.norm in FOLDABLE
        sources = sources or ((conv.in_channels, *size),)
        return self._call(op, sources, conv.out_channels, kernel=conv.kernel, padding=padding, relu=relu)

    def _call(
        self,
        op: str,
        sources: tuple[tuple[int, int, int], ...],
        out_channels: int,
        *,
        kernel: int = 3,
        padding: int = 1,
        relu: bool = True,
    ) -> Call:
        return Call(op, self.batch, sources, out_channels, kernel, padding, relu, self.precision, self.mode)

    def _along(self, edge: Edge) -> tuple[EdgeSize, EdgeSize]:
        return self.rows.edges[edge.name], self.columns.edges[edge.name]

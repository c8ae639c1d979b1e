"""Ops and lifetimes: every op can be replaced, and every map is dropped after its last reader."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from model_cells import by_label, cells, outputs_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipcost.unet_models import REFERENCE, SKIPS, VARIANTS, Edge, ModelSpec, Ops, SkipGraph, SkipNet, build, graph
from skipcost.unet_models.ops import ConvNormAct

# Several steps in one op, which the reference does one by one.
JOINED = ("merge_conv", "up_concat_conv", "relu_concat", "conv_pool")
STEPS = [field.name for field in fields(Ops) if field.name not in (*JOINED, "around")]

pytestmark = pytest.mark.usefixtures("one_thread")


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an op makes; `peak` is the most that was alive at the end of any op."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                reference = StorageWeakRef(each.untyped_storage())
                self.alive[reference.cdata] = reference, each.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def _peak_bytes(net: SkipNet, height: int, width: int) -> int:
    with torch.no_grad(), _LiveBytes() as tracker:
        net.eval()(torch.randn(1, net.graph.in_channels, height, width))
    return tracker.peak


def test_the_peak_of_unet_3plus_is_its_widest_edge() -> None:
    """Worked out: while the bottleneck is brought to the finest level, eight maps and nothing else are in memory.

    They are the bottleneck up-sampled 16 times (16w channels), the four maps that have arrived (w each) and what the
    edge's convolution makes (w), all at full size, beside the image and the bottleneck itself.
    """
    w, pixels = 8, 64 * 96
    net = build(ModelSpec("unet3+", 4, w))

    peak = _peak_bytes(net, 64, 96)

    assert peak == 4 * ((16 * w + 4 * w + w + 1) * pixels + 16 * w * pixels // 16**2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_maps_lowers_the_peak(variant: str) -> None:
    """Against the same network in a run that keeps what each op returns."""
    spec, kept = ModelSpec(variant, 3, 4), []

    def keeping(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            kept.append(op(*args, **kwargs))
            return kept[-1]

        return run

    hoarding = Ops(**{name: keeping(getattr(REFERENCE, name)) for name in STEPS})

    assert _peak_bytes(build(spec), 32, 32) < 0.6 * _peak_bytes(build(spec, hoarding), 32, 32)


def _passes_unchanged(edge: Edge) -> bool:
    """Whether the very map that the source made arrives at the merge."""
    return edge.shift == 0 and not edge.gate and not edge.conv and not edge.project


class _Lifetimes:
    """Ops that note, whenever a node merges its inputs, which maps are still in memory."""

    def __init__(self, network: SkipGraph) -> None:
        self.nodes = [node.name for node in network.nodes]
        self.maps: dict[str, StorageWeakRef] = {}
        self.merged: StorageWeakRef | None = None
        self.alive: dict[str, set[str]] = {}
        self.merged_outlived: set[str] = set()
        self.ops = replace(REFERENCE, merge=self.merge, conv_norm_act=self.conv_norm_act)
        self.last: dict[nn.Module, str] = {}

    def watch(self, net: SkipNet) -> None:
        """Name the last layer of each node."""
        self.last = {net.nodes[name][-1]: name for name in self.nodes}

    def merge(self, maps: list[Tensor], how: str) -> Tensor:
        """Note what is alive when the next node in order merges."""
        name = self.nodes[len(self.alive)]
        self.alive[name] = {each for each, reference in self.maps.items() if not reference.expired()}
        result = REFERENCE.merge(maps, how)
        self.merged = StorageWeakRef(result.untyped_storage()) if len(maps) > 1 else None
        return result

    def conv_norm_act(self, layer: ConvNormAct, x: Tensor) -> Tensor:
        """Convolve, let go of the input, and note whether a merged map is still there although nobody needs it."""
        convolved = layer.conv(x)
        del x
        if self.merged is not None:
            self.merged_outlived |= set() if self.merged.expired() else {self.nodes[len(self.alive) - 1]}
        result = functional.relu(convolved)
        if layer in self.last:
            self.maps[self.last[layer]] = StorageWeakRef(result.untyped_storage())
        return result


def _watched(spec: ModelSpec) -> _Lifetimes:
    """Run a network once at inference under observation; without cyclic garbage collection, which is not the rule."""
    lifetimes = _Lifetimes(graph(spec))
    net = build(spec, lifetimes.ops).eval()
    lifetimes.watch(net)
    gc.disable()
    try:
        with torch.no_grad():
            net(torch.randn(1, 1, 16, 24))
    finally:
        gc.enable()
    return lifetimes


@by_label(cells((3,), norm="none"))
def test_a_map_is_dropped_after_its_last_reader(spec: ModelSpec) -> None:
    """When a node merges, the maps in memory are those that later nodes read, and those that it merges as they are."""
    nodes = graph(spec).nodes
    expected = {
        node.name: {
            earlier.name
            for earlier in nodes[:position]
            if any(edge.source == earlier.name for later in nodes[position + 1 :] for edge in later.inputs)
            or any(edge.source == earlier.name and _passes_unchanged(edge) for edge in node.inputs)
        }
        for position, node in enumerate(nodes)
    }

    lifetimes = _watched(spec)

    assert lifetimes.alive == expected


@by_label(cells((3,), norm="none"))
def test_a_merged_map_is_gone_after_its_convolution(spec: ModelSpec) -> None:
    """Nothing but the op holds it, so that an op that lets go of its input frees it."""
    lifetimes = _watched(spec)

    assert lifetimes.merged_outlived == set()


CALLS: dict[str, Callable[[SkipGraph], int]] = {  # how often each op runs in one pass, from the graph
    "merge": lambda network: len(network.nodes),
    "pool": lambda network: sum(edge.shift < 0 for edge in network.edges),
    "up_conv": lambda network: sum(edge.up is not None for edge in network.edges),
    "gate": lambda network: sum(edge.gate is not None for edge in network.edges),
    "up_sample_conv": lambda network: sum(_fused(network, edge) for edge in network.edges),
    "up_sample": lambda network: (
        sum(edge.shift > 0 and edge.up is None and not _fused(network, edge) for edge in network.edges)
        + sum(head.shift > 0 for head in network.heads)
    ),
    "conv_norm_act": lambda network: (
        sum(len(node.convs) for node in network.nodes)
        + sum(edge.conv is not None and not _fused(network, edge) for edge in network.edges)
        + sum(edge.project is not None for edge in network.edges)
        + len(network.heads)
        + (network.classifier is not None)
    ),
}


def _fused(network: SkipGraph, edge: Edge) -> bool:
    """Whether an edge up-samples and convolves in one op: not where a gate needs the map in between."""
    target = next(node for node in network.nodes if node.name == edge.target)
    steers = edge is target.deeper and any(each.gate for each in target.inputs)
    return edge.shift > 0 and edge.conv is not None and not steers


@pytest.mark.parametrize("op", STEPS)
@by_label(
    [
        *(ModelSpec(variant, 3, 2, skip, classes=1) for variant in VARIANTS for skip in ("concat", "gated")),
        ModelSpec("unet++", 3, 2, "sum", upsample="bilinear", head="deep"),
        ModelSpec("unet3+", 3, 2, classes=1, head="guided"),
    ]
)
def test_a_replaced_op_does_all_of_its_work(spec: ModelSpec, op: str) -> None:
    """An ablation of one op runs it wherever the graph has one, and changes no number if it does the same."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(op)
        return getattr(REFERENCE, op)(*args, **kwargs)

    net, reference = build(spec, replace(REFERENCE, **{op: counted})).eval(), build(spec).eval()
    reference.load_state_dict(net.state_dict())
    image = torch.randn(1, 1, 16, 24)

    outputs = outputs_of(net(image))

    assert len(calls) == CALLS[op](graph(spec))
    assert all(map(torch.equal, outputs, outputs_of(reference(image))))


def test_a_replaced_op_decides_the_output() -> None:
    """Its result is what the next layer sees, not only its call: a merge that zeroes its map silences the image."""

    def silent(maps: list[Tensor], how: str) -> Tensor:
        return REFERENCE.merge(maps, how) * 0

    net = build(ModelSpec(width=2), replace(REFERENCE, merge=silent)).eval()

    outputs = [net(torch.randn(1, 1, 16, 16)) for _ in range(2)]

    assert torch.equal(*outputs)


class _Joined:
    """The joined ops, made of the reference's steps, and how often each ran."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(JOINED, 0)
        self.ops = replace(REFERENCE, **{name: getattr(self, name) for name in JOINED})

    def merge_conv(self, layer: ConvNormAct, maps: list[Tensor], how: str, up: nn.ConvTranspose2d | None) -> Tensor:
        self.calls["merge_conv"] += 1
        if up is not None:
            maps.append(REFERENCE.up_conv(up, maps.pop()))
        merged = [REFERENCE.merge(maps, how)]
        maps.clear()
        return REFERENCE.conv_norm_act(layer, merged.pop())

    def up_concat_conv(self, layer: ConvNormAct, maps: list[Tensor], factor: int, mode: str) -> Tensor:
        self.calls["up_concat_conv"] += 1
        maps.append(REFERENCE.up_sample(maps.pop(), factor, mode))
        merged = [REFERENCE.merge(maps, "concat")]
        maps.clear()
        return REFERENCE.conv_norm_act(layer, merged.pop())

    def relu_concat(self, maps: Iterator[Tensor], shape: tuple[int, int, int]) -> Tensor:
        self.calls["relu_concat"] += 1
        result = REFERENCE.merge([each.relu_() for each in maps], "concat")
        assert result.shape[1:] == shape
        return result

    def conv_pool(self, layer: ConvNormAct, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls["conv_pool"] += 1
        full = REFERENCE.conv_norm_act(layer, x)
        return full, REFERENCE.pool(full, 2, ceil=False)


@by_label(
    [
        *cells((2,)),
        *(ModelSpec(variant, 3, 2, skip, padding="valid") for variant, skip in (("unet", "concat"), ("unet++", "sum"))),
        *(ModelSpec(name, 2, 2, skip, upsample="bilinear") for name in ("unet", "unet++") for skip in SKIPS),
    ]
)
def test_joined_ops_do_what_their_steps_do(spec: ModelSpec) -> None:
    """Every node enters through one of three, every pooled encoder map leaves through the last, and no bit changes."""
    joined = _Joined()
    net, reference = build(spec, joined.ops).eval(), build(spec).eval()
    reference.load_state_dict(net.state_dict())
    image = torch.randn(1, 1, 93, 95) if spec.padding == "valid" else torch.randn(1, 1, 13, 14)

    outputs = outputs_of(net(image))

    network = graph(spec)
    free = spec.variant != "unet3+" and spec.upsample == "bilinear" and spec.skip not in ("sum", "gated")
    interpolated = sum(node.deeper is not None for node in network.nodes) if free else 0
    own = spec.variant == "unet3+" and spec.skip not in ("sum", "gated")  # edges with convolutions, which end in ReLU
    ended = sum(len(node.inputs) > 1 for node in network.nodes) if own else 0
    assert joined.calls == {
        "merge_conv": len(network.nodes) - interpolated - ended,
        "up_concat_conv": interpolated,
        "relu_concat": ended,
        "conv_pool": network.depth,
    }
    assert all(map(torch.equal, outputs, outputs_of(reference(image))))


@pytest.mark.parametrize("upsample", [None, "bilinear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_ops_hold_no_map_longer(variant: str, upsample: str | None) -> None:
    """The peak of memory is not above that of the steps: lists are emptied, and pooled maps dropped by their reader."""
    spec = ModelSpec(variant, 3, 4, upsample=upsample)

    assert _peak_bytes(build(spec, _Joined().ops), 32, 32) <= 1.01 * _peak_bytes(build(spec), 32, 32)


def test_a_forward_pass_runs_inside_its_context() -> None:
    """It is entered once per pass, before the first op, and left after the last, also where an op raises."""
    events = []

    @contextmanager
    def around() -> Iterator[None]:
        events.append("in")
        try:
            yield
        finally:
            events.append("out")

    def merge(maps: list[Tensor], how: str) -> Tensor:
        events.append("op")
        return REFERENCE.merge(maps, how)

    net = build(ModelSpec(depth=1, width=2), replace(REFERENCE, merge=merge, around=around))
    net(torch.randn(1, 1, 8, 8))
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 3, 8, 8))

    assert events == ["in", "op", "op", "op", "out", "in", "op", "out"]

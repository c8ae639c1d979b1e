"""Ops and lifetimes: every function can be replaced, and every map is dropped after its last reader."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cells import by_label, cells, outputs_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipcost.kernels.fused_program import fuse
from skipcost.kernels.low_program import low
from skipcost.unet_models import (
    REFERENCE,
    SKIPS,
    VARIANTS,
    ModelSpec,
    Ops,
    Program,
    SkipGraph,
    SkipNet,
    build,
    graph,
    lower,
)
from skipcost.unet_models.ops import Function, Step, merge, run
from skipcost.unet_models.rewriting import flat

KINDS = [kind for kind in REFERENCE.functions if kind != "pick"]  # which takes a result of a joined op

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
    """Worked out: while the bottleneck is brought to the finest level, seven maps and nothing else are in memory.

    They are the bottleneck up-sampled 16 times (16w channels), the four maps that have arrived (w each) and what the
    edge's convolution makes (w), all at full size, beside the image; the bottleneck itself, read for the last time, is
    gone.
    """
    w, pixels = 8, 64 * 96
    net = build(ModelSpec("unet3+", 4, w))

    peak = _peak_bytes(net, 64, 96)

    assert peak == 4 * (16 * w + 4 * w + w + 1) * pixels


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_maps_lowers_the_peak(variant: str) -> None:
    """Against the same network in a run that keeps what each op returns."""
    spec, kept = ModelSpec(variant, 3, 4), []

    def keeping(function: Function) -> Function:
        def run(*given: Any) -> Tensor:
            kept.append(function(*given))
            return kept[-1]

        return run

    hoarding = Ops({kind: keeping(function) for kind, function in REFERENCE.functions.items()})

    assert _peak_bytes(build(spec), 32, 32) < 0.6 * _peak_bytes(build(spec, hoarding), 32, 32)


class _Lifetimes:
    """Ops that note, whenever a node merges its inputs, which maps are still in memory."""

    def __init__(self, network: SkipGraph) -> None:
        self.nodes = [node.name for node in network.nodes]
        self.maps: dict[str, StorageWeakRef] = {}
        self.merged: StorageWeakRef | None = None
        self.alive: dict[str, set[str]] = {}
        self.merged_outlived: set[str] = set()
        self.ops = REFERENCE.replacing(join=self.join, conv=self.conv, relu=self.relu)

    def join(self, step: Step, _: list[Any], maps: list[Any]) -> Tensor:
        """Note what a node merges."""
        result = merge(maps, step.op.how)
        self.merged = StorageWeakRef(result.untyped_storage())
        return result

    def conv(self, step: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        """Note what is alive beside what it reads when a node begins to convolve."""
        result: Tensor = layers[0].conv(maps.pop())
        if step.op.part == "0":
            name = step.op.where
            self.alive[name] = {each for each, reference in self.maps.items() if not reference.expired()}
        return result

    def relu(self, step: Step, _: list[Any], maps: list[Any]) -> Tensor:
        """Note whether a merged map is still there although nobody needs it, and what a node makes."""
        result = functional.relu(maps.pop(), inplace=True)
        if step.op.where in self.nodes:
            if self.merged is not None and step.op.part == "0" and not self.merged.expired():
                self.merged_outlived.add(step.op.where)
            self.maps[step.op.where] = StorageWeakRef(result.untyped_storage())
            self.merged = None
        return result


def _watched(spec: ModelSpec) -> _Lifetimes:
    """Run a network once at inference under observation; without cyclic garbage collection, which is not the rule."""
    lifetimes = _Lifetimes(graph(spec))
    net = build(spec, lifetimes.ops).eval()
    gc.disable()
    try:
        with torch.no_grad():
            net(torch.randn(1, 1, 16, 24))
    finally:
        gc.enable()
    return lifetimes


@by_label(cells((3,), norm="none"))
def test_a_map_is_dropped_after_its_last_reader(spec: ModelSpec) -> None:
    """When a node has convolved what it merged, the maps in memory are those that later nodes read."""
    nodes = graph(spec).nodes
    expected = {
        node.name: {
            earlier.name
            for earlier in nodes[:position]
            if any(edge.source == earlier.name for later in nodes[position + 1 :] for edge in later.inputs)
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


@pytest.mark.parametrize("kind", KINDS)
@by_label(
    [
        *(ModelSpec(variant, 3, 2, skip, classes=1) for variant in VARIANTS for skip in ("concat", "gated")),
        ModelSpec("unet++", 3, 2, "sum", upsample="bilinear", head="deep"),
        ModelSpec("unet3+", 3, 2, classes=1, head="guided"),
    ]
)
def test_a_replaced_function_does_all_of_its_work(spec: ModelSpec, kind: str) -> None:
    """An ablation runs it wherever the program has its kind, and changes no number if it does the same."""
    calls = []

    def counted(step: Step, *given: Any) -> Tensor:
        calls.append(step.op.kind)
        return REFERENCE.functions[kind](step, *given)

    net, reference = build(spec, REFERENCE.replacing(**{kind: counted})).eval(), build(spec).eval()
    reference.load_state_dict(net.state_dict())
    image = torch.randn(1, 1, 16, 24)

    outputs = outputs_of(net(image))

    assert calls == [op.kind for op in lower(graph(spec)).ops if op.kind == kind]
    assert all(map(torch.equal, outputs, outputs_of(reference(image))))


def test_a_replaced_function_decides_the_output() -> None:
    """Its result is what the next op sees, not only its call: a join that zeroes its map silences the image."""

    def silent(step: Step, _: list[Any], maps: list[Any]) -> Tensor:
        return merge(maps, step.op.how) * 0

    net = build(ModelSpec("unet", 1, 2, norm="none"), REFERENCE.replacing(join=silent)).eval()

    outputs = [net(torch.randn(1, 1, 16, 16)) for _ in range(2)]

    assert torch.equal(*outputs)


def _in_parts(step: Step, layers: list[Any], maps: list[Any]) -> Any:
    """Run a joined op as the ops that it stands for."""
    run(step.inside, dict(zip(step.layers, layers, strict=True)).__getitem__, maps)
    results = [maps[number] for number in step.op.outputs]
    return tuple(results) or maps.pop()


def _joined(program: Program) -> dict[str, Function]:
    """A function for every kind of joined op, within others too."""
    return {each.kind: _in_parts for op in program.ops for each in (op, *op.parts) if each.parts}


REWRITES = {"fuse": fuse, "low": low}


@pytest.mark.parametrize("rewrite", REWRITES)
@by_label(
    [
        *cells((2,)),
        *(ModelSpec(variant, 3, 2, skip, padding="valid") for variant, skip in (("unet", "concat"), ("unet++", "sum"))),
        *(ModelSpec(name, 2, 2, skip, upsample="bilinear") for name in ("unet", "unet++") for skip in SKIPS),
    ]
)
def test_a_rewritten_program_does_what_its_parts_do(spec: ModelSpec, rewrite: str) -> None:
    """Every op is there once, at the top or inside of a joined one, and no bit changes."""
    program = REWRITES[rewrite](lower(graph(spec)))
    ops = replace(REFERENCE.replacing(**_joined(program)), rewrite=REWRITES[rewrite])
    net, reference = build(spec, ops).eval(), build(spec).eval()
    reference.load_state_dict(net.state_dict())
    image = torch.randn(1, 1, 93, 95) if spec.padding == "valid" else torch.randn(1, 1, 13, 14)

    outputs = outputs_of(net(image))

    plain = [op for op in lower(graph(spec)).ops if op.kind != "pick"]
    whole = [part for op in program.ops for part in flat(op) if part.kind != "pick"]
    assert sorted((op.where, op.part, op.kind) for op in whole) == sorted((op.where, op.part, op.kind) for op in plain)
    assert len(program.ops) < len(plain)
    assert all(map(torch.equal, outputs, outputs_of(reference(image))))


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_ops_hold_no_map_longer(variant: str, upsample: str | None, rewrite: str) -> None:
    """The peak of memory is that of the parts: an op that is the last to read a map alone has it."""
    spec = ModelSpec(variant, 3, 4, upsample=upsample)
    functions = _joined(REWRITES[rewrite](lower(graph(spec))))
    ops = replace(REFERENCE.replacing(**functions), rewrite=REWRITES[rewrite])

    assert _peak_bytes(build(spec, ops), 32, 32) <= 1.01 * _peak_bytes(build(spec), 32, 32)


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

    def conv(_: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        events.append("op")
        result: Tensor = layers[0].conv(maps.pop())
        return result

    net = build(ModelSpec(depth=1, width=2), replace(REFERENCE.replacing(conv=conv), around=around))
    net(torch.randn(1, 1, 8, 8))
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 3, 8, 8))

    assert events == ["in", *["op"] * 7, "out", "in", "op", "out"]

"""The counter court: what several counters say of one network, in MACs, and the operator at which they part.

Arithmetic is the measure: a MAC for each element of the weight and position of every convolution and matrix product.
COUNTERS at the bottom is the one place to add a counter. Nothing here is stored; time and memory are elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import warnings
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from skipcost.bench.cases import Case
from skipcost.bench.counting import preload_fvcore
from skipcost.bench.custom import shorten
from skipcost.bench.subject import make_subject
from skipcost.bench.watching import Watching

CONVOLUTION, TRANSPOSED, PRODUCT = "convolution", "transposed convolution", "matrix product"
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default: 0, _ATEN.addmm.default: 1, _ATEN.bmm.default: 0, _ATEN.baddbmm.default: 1}
_FVCORE = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")  # its names for convolutions and products
_PROFILED = {"aten::conv2d": CONVOLUTION, "aten::mm": PRODUCT, "aten::addmm": PRODUCT, "aten::bmm": PRODUCT}


@dataclass(frozen=True, slots=True)
class Place:
    """One layer by its module's path, the kind of operator in it, and its MACs."""

    layer: str
    kind: str
    macs: int


@dataclass(frozen=True, slots=True)
class Count:
    """What a counter said, in its own unit: the sum, and by layer's path or else by kind where it can say that."""

    total: float
    layers: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counter:
    """A row of COUNTERS.

    `package` is what has to be installed; `per_mac` how many of its unit are one MAC, `unit` what it calls it. `count`
    takes the network and an image; where it can name no place, each layer is counted by it alone, too.
    """

    package: str
    unit: str
    per_mac: int
    count: Callable[[nn.Module, Tensor], Count]


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of operator at which a counter and arithmetic part, and the layers at which they do, largest first."""

    kind: str
    macs: float
    arithmetic: int
    layers: tuple[tuple[str, float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Testimony:
    """A counter's total in MACs and where it parts from arithmetic; without a total, why there is none."""

    counter: str
    version: str
    conversion: str
    macs: float | None = None
    parts: tuple[Part, ...] = ()
    note: str = ""


def arithmetic(network: nn.Module, image: Tensor) -> list[Place]:
    """Every convolution and matrix product of a forward pass, by the shapes that it is called with, summed by layer."""
    places: list[Place] = []

    def seen(func: Any, args: tuple[Any, ...], result: Any) -> None:
        layer = max(tracker.parents, key=lambda name: name.count(".")).partition(".")[2]
        if func is _ATEN.convolution.default:
            image, weight, transposed = args[0], args[1], args[6]
            positions = image.shape[0] * math.prod((image if transposed else result).shape[2:])
            places.append(Place(layer, TRANSPOSED if transposed else CONVOLUTION, weight.numel() * positions))
        elif func in _PRODUCTS:
            left = args[_PRODUCTS[func]]  # (..., M, K); the result is (..., M, N)
            places.append(Place(layer, PRODUCT, result.numel() * left.shape[-1]))

    with torch.no_grad(), ModuleTracker() as tracker, Watching(seen):
        network(image)
    sums: Tally[tuple[str, str]] = Tally()
    for place in places:
        sums[place.layer, place.kind] += place.macs
    return [Place(layer, kind, macs) for (layer, kind), macs in sums.items()]


def _exclusive(sums: dict[str, float]) -> dict[str, float]:
    """Sums over modules with all that is inside them, turned into what is in each of them and in nothing inside it."""
    own = dict(sums)
    for name, count in sums.items():
        parent = name.rpartition(".")[0]
        while parent and parent not in sums:
            parent = parent.rpartition(".")[0]
        if name and parent in own:
            own[parent] -= count
    return {name: count for name, count in own.items() if count}


def _fvcore(network: nn.Module, image: Tensor) -> Count:
    """Count with fvcore: convolutions and products by layer, by operator what it adds to them."""
    analysis = preload_fvcore()(network, image)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    sums = {name: sum(by[op] for op in _FVCORE) for name, by in analysis.by_module_and_operator().items()}
    others = {op: count for op, count in analysis.by_operator().items() if op not in _FVCORE}
    return Count(analysis.total(), _exclusive(sums), others)


def _flop_counter_mode(network: nn.Module, image: Tensor) -> Count:
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        network(image)
    sums = {
        name.partition(".")[2]: sum(by.values()) for name, by in flops.get_flop_counts().items() if name != "Global"
    }
    return Count(flops.get_total_flops(), _exclusive(sums))


def _profiler(network: nn.Module, image: Tensor) -> Count:
    """Count with torch.profiler, which knows a handful of operators by name and says nothing of layers."""
    with torch.no_grad(), profile(with_flops=True) as profiled:
        network(image)
    kinds: Tally[str] = Tally()
    for event in profiled.key_averages():
        kinds[_PROFILED.get(event.key, event.key)] += event.flops
    return Count(kinds.total(), kinds={kind: count for kind, count in kinds.items() if count})


def _torchinfo(network: nn.Module, image: Tensor) -> Count:
    import torchinfo  # noqa: PLC0415 - optional

    found = torchinfo.summary(network, input_data=image, verbose=0, mode="eval")
    layers: Tally[str] = Tally()
    path: list[str] = []
    for layer in found.summary_list:
        path = [*path[: layer.depth - 1], layer.var_name] if layer.depth else []
        if layer.is_leaf_layer:
            layers[".".join(path)] += layer.macs
    return Count(found.total_mult_adds, dict(layers))


def _thop(network: nn.Module, image: Tensor) -> Count:
    import thop  # noqa: PLC0415 - optional

    total, _, inside = thop.profile(network, inputs=(image,), verbose=False, ret_layer_info=True)
    layers: dict[str, float] = {}
    left = [("", inside)]
    while left:
        above, modules = left.pop()
        for name, (count, _, inner) in modules.items():
            layers[f"{above}{name}"] = count
            left.append((f"{above}{name}.", inner))
    return Count(total, _exclusive(layers))


def _ptflops(backend: str) -> Callable[[nn.Module, Tensor], Count]:
    def count(network: nn.Module, image: Tensor) -> Count:
        import ptflops  # noqa: PLC0415 - optional

        total, _ = ptflops.get_model_complexity_info(
            network, tuple(image.shape[1:]), as_strings=False, print_per_layer_stat=False, verbose=False,
            backend=ptflops.FLOPS_BACKEND(backend), input_constructor=lambda _: image,
        )  # fmt: skip
        if total is None:
            message = "it returns nothing; run it by itself for its own words"
            raise ValueError(message)
        return Count(total)

    return count


def layer_images(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each module without further ones inside reads in a forward pass, by its path."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, given: tuple[Any, ...]) -> None:
            seen[name] = given[0].detach()

        return hook

    leaves = [(name, each) for name, each in network.named_modules() if name and not any(True for _ in each.children())]
    hooks = [each.register_forward_pre_hook(watch(name)) for name, each in leaves]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return seen


def _alone(counter: Counter, network: nn.Module, image: Tensor) -> dict[str, float]:
    """Count every layer by itself, for a counter that names no place; one that it cannot count alone is left out."""
    layers = {}
    for name, given in layer_images(network, image).items():
        with contextlib.suppress(Exception):
            layers[name] = counter.count(network.get_submodule(name), given).total
    return layers


def judge(count: Count, per_mac: int, places: list[Place], kinds: dict[str, str]) -> tuple[Part, ...]:
    """Where a count parts from arithmetic, largest first; `kinds` names what is in a layer that arithmetic skips.

    Where a counter says nothing of its places, the whole difference is one part, "not said where".
    """
    exact: Tally[str] = Tally()
    by_layer: Tally[str] = Tally()
    kind_of = dict(kinds)
    for place in places:
        exact[place.kind] += place.macs
        by_layer[place.layer] += place.macs
        kind_of[place.layer] = place.kind
    theirs: defaultdict[str, float] = defaultdict(float)
    for name, found in {**count.layers, **count.kinds}.items():
        theirs[kind_of.get(name, name)] += found / per_mac
    rest = count.total / per_mac - sum(theirs.values())
    if rest:
        theirs["operators outside of layers" if theirs else "not said where"] += rest
    parts = []
    for kind in {*theirs, *exact}:
        told = theirs[kind]
        layers = [
            (name, count.layers.get(name, 0) / per_mac, by_layer[name])
            for name in ({*count.layers, *by_layer} if count.layers else ())
            if kind_of.get(name, name) == kind and count.layers.get(name, 0) / per_mac != by_layer[name]
        ]
        if told != exact[kind] or layers:
            layers.sort(key=lambda each: (-abs(each[1] - each[2]), each[0]))
            parts.append(Part(kind, told, exact[kind], tuple(layers)))
    return tuple(sorted(parts, key=lambda part: (-abs(part.macs - part.arithmetic), part.kind)))


def hear(name: str, counter: Counter, case: Case, places: list[Place]) -> Testimony:
    """Have one counter count a case's network, made anew; what it raises is its testimony."""
    conversion = f"{counter.unit} / {counter.per_mac}" if counter.per_mac > 1 else counter.unit
    try:
        version = importlib.metadata.version(counter.package)
    except importlib.metadata.PackageNotFoundError:
        return Testimony(name, "", conversion, note=f"not installed: pip install {counter.package}")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = make_subject(case, "cpu")
            network, image = subject.network, subject.tensors[-1]
            kinds = {path: type(module).__name__ for path, module in network.named_modules()}
            count = counter.count(network, image)
            if not count.layers and not count.kinds:
                fresh = make_subject(case, "cpu").network
                count = Count(count.total, _alone(counter, fresh, image))
    except Exception as error:  # noqa: BLE001 - whatever a counter raises is what it says
        return Testimony(name, version, conversion, note=f"fails: {type(error).__name__}: {shorten(str(error))}")
    return Testimony(
        name, version, conversion, count.total / counter.per_mac, judge(count, counter.per_mac, places, kinds)
    )


def court(case: Case) -> tuple[list[Place], list[Testimony]]:
    """Arithmetic of a case's network, forward and at inference, and what every counter of COUNTERS says of it."""
    subject = make_subject(case, "meta" if case.factory is None else "cpu")
    places = arithmetic(subject.network, subject.tensors[-1])
    return places, [hear(name, counter, case, places) for name, counter in COUNTERS.items()]


COUNTERS: dict[str, Counter] = {
    "fvcore": Counter("fvcore", "its flops, which are MACs", 1, _fvcore),
    "FlopCounterMode": Counter("torch", "FLOPs", 2, _flop_counter_mode),
    "torch.profiler": Counter("torch", "FLOPs", 2, _profiler),
    "torchinfo": Counter("torchinfo", "its mult-adds, which are MACs", 1, _torchinfo),
    "thop": Counter("thop", "MACs", 1, _thop),
    "ptflops pytorch": Counter("ptflops", "MACs", 1, _ptflops("pytorch")),
    "ptflops aten": Counter("ptflops", "MACs", 1, _ptflops("aten")),
}

"""What several counters say of one network, in MACs, and the operator at which they part.

`arithmetic` is the measure. Each counter is called as its own documentation says, on a network made anew, so that a
failure or a difference is its own. COUNTERS at the bottom is the one place to add a counter. Nothing here is stored;
time and memory are elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import warnings
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import shorten
from skipcost.bench.measure.arithmetic import CONVOLUTION, PRODUCT, Place, aliases_of, arithmetic, layers_of, paths_of
from skipcost.bench.measure.counting import preload_fvcore
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.watching import Watching

BEYOND = "what no layer alone has"  # functional operators, or layers counted more than once
_FVCORE = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")  # its names for convolutions and products
_PROFILED = {"aten::conv2d": CONVOLUTION} | dict.fromkeys(
    ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"), PRODUCT
)


@dataclass(frozen=True, slots=True)
class Count:
    """What a counter said, in its own unit: the sum, and by layer's path or else by kind where it can say that.

    `alone`: each layer was counted by itself, which leaves out what a module does between those that it calls.
    """

    total: float
    layers: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Counter:
    """A row of COUNTERS.

    `package` is what has to be installed; `per_mac` how many of its unit are one MAC, `unit` what it calls it. `count`
    takes the network and images; where it can name no place, each layer is counted by it alone, too. `per_image`: by
    its documentation it counts one image, whatever the batch.
    """

    package: str
    unit: str
    per_mac: int
    count: Callable[[nn.Module, Tensor], Count]
    per_image: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of operator at which a counter and arithmetic part, and the layers at which they do, largest first."""

    kind: str
    macs: float
    arithmetic: int
    layers: tuple[tuple[str, float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A counter's total in MACs and where it parts from arithmetic; without a total, why there is none."""

    counter: str
    version: str
    conversion: str
    macs: float | None = None
    parts: tuple[Part, ...] = ()
    note: str = ""


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
    """Count with FlopCounterMode by itself, then once more to see in which layer its sum grows.

    Its own table has the path that a module was last registered under, which may lie outside of what called it.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        network(image)
    layers: Tally[str] = Tally()
    before = 0

    def seen(*_call: object) -> None:
        nonlocal before
        now = flops.get_total_flops()
        layers[running.layer] += now - before
        before = now

    with torch.no_grad(), layers_of(network) as running, FlopCounterMode(display=False) as flops, Watching(seen):
        network(image)
    return Count(alone.get_total_flops(), {name: count for name, count in layers.items() if count})


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

        cried = io.StringIO()
        with contextlib.redirect_stderr(cried):
            total, _ = ptflops.get_model_complexity_info(
                network, tuple(image.shape[1:]), as_strings=False, print_per_layer_stat=False, verbose=False,
                backend=ptflops.FLOPS_BACKEND(backend), input_constructor=lambda _: image,
            )  # fmt: skip
        if total is None:
            said = cried.getvalue().strip().rpartition("\n")[2]
            message = f"it returns nothing and prints {said or 'no reason'}"
            raise ValueError(message)
        return Count(total)

    return count


class _Alone(nn.Module):
    """A layer as the network calls it, as often and with all that it is given there: lists and keywords, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, _image: Tensor) -> list[Any]:
        """Whatever the layer returns."""
        return [self.layer(*args, **kwargs) for args, kwargs in self.calls]


def layers_alone(network: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """Each module that calls no other in a forward pass, by its path, as a network of its own that reads an image."""
    seen: dict[str, _Alone] = {}
    calling: set[str] = set()
    stack: list[str] = []
    hooks = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calling.update(stack)
            stack.append(name)
            seen.setdefault(name, _Alone(module)).calls.append((args, kwargs))

        return hook

    def leave(*_call: object) -> None:
        stack.pop()

    for name, module in network.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return {name: layer for name, layer in seen.items() if name not in calling}


def _alone(counter: Counter, network: nn.Module, image: Tensor) -> dict[str, float]:
    """Count every layer by itself, for a counter that names no place; one that it cannot count alone is left out."""
    layers = {}
    for name, layer in layers_alone(network, image).items():
        with contextlib.suppress(Exception):
            layers[name] = counter.count(layer, image).total
    return layers


def _split(told: float, exact: dict[str, int]) -> dict[str, float]:
    """Share a layer's count out among its kinds: some left out where that is all that is off, else each its part."""
    total = sum(exact.values())
    for some in range(len(exact) + 1):
        for missing in combinations(exact, some):
            if told == total - sum(exact[kind] for kind in missing):
                return {kind: 0 if kind in missing else macs for kind, macs in exact.items()}
    return {kind: told * macs / total if total != macs else told for kind, macs in exact.items()}


def judge(count: Count, per_mac: int, places: list[Place], kinds: dict[str, str]) -> tuple[Part, ...]:
    """Where a count parts from arithmetic, largest first; `kinds` names what is in a layer that arithmetic skips.

    Where a counter says nothing of its places, the whole difference is one part, "not said where".
    """
    exact: Tally[str] = Tally()
    inside: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for place in places:
        if count.alone and place.layer not in count.layers:
            exact[BEYOND] += place.macs
        else:
            exact[place.kind] += place.macs
            inside[place.layer][place.kind] = place.macs
    theirs: defaultdict[str, float] = defaultdict(float)
    layers: defaultdict[str, list[tuple[str, float, int]]] = defaultdict(list)
    for name in {*count.layers, *inside} if count.layers else ():
        own = inside.get(name) or {kinds.get(name, name): 0}
        for kind, told in _split(count.layers.get(name, 0) / per_mac, own).items():
            theirs[kind] += told
            if told != own[kind]:
                layers[kind].append((name, told, own[kind]))
    for name, found in count.kinds.items():
        theirs[name] += found / per_mac
    rest = count.total / per_mac - sum(theirs.values())
    if rest:
        theirs[BEYOND if count.layers or count.kinds or count.alone else "not said where"] += rest
    parts = [
        Part(kind, theirs[kind], exact[kind], tuple(sorted(layers[kind], key=lambda e: (-abs(e[1] - e[2]), e[0]))))
        for kind in {*theirs, *exact}
        if theirs[kind] != exact[kind] or layers[kind]
    ]
    return tuple(sorted(parts, key=lambda part: (-abs(part.macs - part.arithmetic), part.kind)))


def ask(name: str, counter: Counter, case: Case, places: list[Place]) -> Answer:
    """Have one counter count a case's network, made anew; what it raises is its answer."""
    conversion = f"{counter.unit} / {counter.per_mac}" if counter.per_mac > 1 else counter.unit
    try:
        version = importlib.metadata.version(counter.package)
    except importlib.metadata.PackageNotFoundError:
        return Answer(name, "", conversion, note=f"not installed: pip install {counter.package}")
    subject = make_subject(case, "cpu")
    network, image = subject.network, subject.tensors[-1]
    paths = paths_of(network)
    kinds = {path: type(module).__name__ for path, module in network.named_modules()}
    images = len(image) if counter.per_image else 1
    image = image[: len(image) // images]
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = counter.count(network, image)
            if not count.layers and not count.kinds:
                fresh = make_subject(case, "cpu").network
                count = Count(count.total, _alone(counter, fresh, image), alone=True)
    except Exception as error:  # noqa: BLE001 - whatever a counter raises is what it says
        return Answer(name, version, conversion, note=f"fails: {type(error).__name__}: {shorten(str(error))}")
    layers: dict[str, float] = {}
    pieces = {place.layer for place in places if place.whole}
    for path, found in count.layers.items():
        first = paths.get(path, path)
        layer = next((piece for piece in pieces if first.startswith(f"{piece}.")), first)
        layers[layer] = layers.get(layer, 0) + found * images
    count = Count(count.total * images, layers, count.kinds, count.alone)
    return Answer(
        name, version, conversion, count.total / counter.per_mac, judge(count, counter.per_mac, places, kinds)
    )


def aliases(case: Case) -> dict[str, list[str]]:
    """Layers of a case's network that are registered under several paths: the first, by which they go, and the others.

    The suite's own networks have none.
    """
    return aliases_of(paths_of(make_subject(case, "cpu").network)) if case.factory else {}


def ask_all(case: Case) -> tuple[list[Place], list[Answer]]:
    """Arithmetic of a case's network, forward and at inference, and what every counter of COUNTERS says of it."""
    subject = make_subject(case, "meta" if case.factory is None else "cpu")
    places = arithmetic(subject.network, subject.tensors[-1])
    return places, [ask(name, counter, case, places) for name, counter in COUNTERS.items()]


COUNTERS: dict[str, Counter] = {
    "fvcore": Counter("fvcore", "its flops, which are MACs", 1, _fvcore),
    "FlopCounterMode": Counter("torch", "FLOPs", 2, _flop_counter_mode),
    "torch.profiler": Counter("torch", "FLOPs", 2, _profiler),
    "torchinfo": Counter("torchinfo", "its mult-adds, which are MACs", 1, _torchinfo),
    "thop": Counter("thop", "MACs", 1, _thop),
    "ptflops pytorch": Counter("ptflops", "MACs", 1, _ptflops("pytorch"), per_image=True),
    "ptflops aten": Counter("ptflops", "MACs", 1, _ptflops("aten"), per_image=True),
}

"""`rewrite(model)`: a user's own model with convolutions over up-sampled maps at low resolution, exactly.

Found are bilinear and nearest up-sampling by a whole factor, as a layer or a function, whose map goes into a
convolution as it is, alone or concatenated with others. Both forms are counted in each call, on the maps that it gets,
and the cheaper runs: `tap_first`, or the model's own layers, called as they are (docs/rewritten.md).

The function is the same in inference and in training, gradients included, differentiable once, and weights stay where
they are. A module is followed in both modes; where its Python is another in training, each mode has a graph of its own,
and a module of which only parts are in training runs its own forward. Arguments with a default can be left at it, or
all be given as tensors; anything else runs the module's own forward. So do torch.export, torch.jit, torch.fx and
torch.func; torch.compile compiles what is rewritten, anew for each size of maps. Python that looks at type(x) sees a
Proxy, as with any trace by torch.fx.

When it loses: on maps so small that Python decides, and where the count does not tell the time (docs/rewritten.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.find import Place, find
from skipcost.kernels.rewriting.lazy import enlarge, enlarge_by
from skipcost.kernels.rewriting.rewiring import Rewired, Route, rewire, twin
from skipcost.kernels.rewriting.tracing import Traced, given_of, is_layer, trace
from skipcost.kernels.rewriting.wiring import Wiring

AFTER = "tap_first"
WHY = "in each call for which that counts fewer MACs"


@dataclass(frozen=True, slots=True)
class _Version:
    """What a module does in one mode, or in both where `training` is None, given certain arguments."""

    traced: Traced
    given: tuple[str, ...]
    training: bool | None

    def text(self) -> str:
        """Return its Python."""
        return str(self.traced.graph.python_code("self").src)


def rewrite(model: nn.Module) -> tuple[nn.Module, list[Change]]:
    """Return a model that computes the same with fewer MACs, and what became of each up-sampling in it.

    model: any module; it is not changed. The returned one has modules of its own over the very same parameters and
    buffers, under the same names: their state_dicts are one, and what is trained or loaded in one is in the other. Its
    class is a subclass of the model's. Modules that torch.fx cannot follow are called as they are, and rewritten
    inside; so are modules that were fused or rewritten before, and those stay as they are.
    ValueError for what is no module written in Python.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        message = f"rewrite got a {type(model).__name__}, whose code it cannot change: give it an nn.Module of Python"
        raise ValueError(message)  # noqa: TRY004 - all input that is refused raises ValueError
    rewritten = twin(model)
    return rewritten, list(_rewrite(rewritten, "", set()))


def rewrite_one(module: nn.Module) -> list[Change]:
    """Rewrite one module of a twin, and nothing inside of those that its graphs call as they are."""
    return _rewrite_versions(module, _versions(module)[0])


def _rewrite(module: nn.Module, name: str, done: set[nn.Module]) -> Iterator[Change]:
    """Rewrite a module of a twin, and what its graphs call as it is; all of its children where there is no graph."""
    inside = [each for each, _ in module.named_children()]
    if isinstance(module, Rewired):
        yield Change((name or "the model",), type(module).__name__, "", "it was fused or rewritten before")
        return
    if not is_layer(module):  # as lists of modules are, which have no forward
        versions, why = _versions(module)
        if why and any(isinstance(each, nn.Conv2d) for each in module.modules()):
            yield Change((name or "the model",), type(module).__name__, "", why)
        if versions:
            unknown = [node for each in versions for node in Wiring(each.traced.graph, module).unknown()]
            inside = [str(node.target) for node in unknown]
            for change in _rewrite_versions(module, versions):
                yield replace(change, where=tuple(_inside(name, each) for each in change.where))
    for each in dict.fromkeys(inside):
        child = module.get_submodule(each)
        if child not in done and not isinstance(child, torch.jit.ScriptModule):
            done.add(child)
            yield from _rewrite(child, _inside(name, each), done)


def _inside(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner


def _versions(module: nn.Module) -> tuple[list[_Version], str]:
    """Follow a module in both modes and for each set of arguments, and say why where one of the modes is missing."""
    versions: list[_Version] = []
    reasons: dict[bool, str] = {}
    try:
        sets = given_of(type(module).forward)
    except ValueError as error:
        return [], f"it is only rewritten inside, since {error}"
    for given in sets:
        found = {}
        for training in (False, True):
            try:
                traced = trace(module, whole=_rewired, training=training, given=given, strict=True)
            except ValueError as error:
                reasons.setdefault(training, str(error))
            else:
                found[training] = _Version(traced, given, training)
        same = len(found) == 2 and len({each.text() for each in found.values()}) == 1  # noqa: PLR2004 - both modes
        versions += [replace(found[False], training=None)] if same else list(found.values())
    if not versions:
        return [], f"it is only rewritten inside, since {reasons[False]}"
    missing = [mode for mode in (False, True) if all(each.training is (not mode) for each in versions)]
    return versions, f"{_mode(missing[0])} its own forward runs, since {reasons[missing[0]]}" if missing else ""


def _rewired(module: nn.Module) -> bool:
    return isinstance(module, Rewired)


def _mode(training: bool | None) -> str:
    return {None: "", False: "in evaluation", True: "in training"}[training]


def _rewrite_versions(module: nn.Module, versions: Sequence[_Version]) -> list[Change]:
    changes: dict[tuple[Change, int], list[_Version]] = {}  # the second for places that nothing tells apart
    routes = []
    for version in versions:
        wires = Wiring(version.traced.graph, module)
        places, refusals = find(wires)
        made = [(each.chain, AFTER, WHY) for each in places] + [(each.chain, "", each.why) for each in refusals]
        for chain, after, why in sorted(made, key=lambda each: each[0][0]):
            change = Change(tuple(map(wires.place, chain)), " -> ".join(map(wires.name, chain)), after, why)
            alike = sum(version in which for (other, _), which in changes.items() if other == change)
            changes.setdefault((change, alike), []).append(version)
        if places:
            absorbed = [str(node.target) for each in places for node in each.chain if node.op == "call_module"]
            for each in places:
                _edit(wires, each)
            routes.append(Route(version.traced, tuple(absorbed), version.given, version.training, gradients=True))
    if routes:
        rewire(module, routes, rewrite_one, title="Rewritten")
    return [_labelled(change, which, versions) for (change, _), which in changes.items()]


def _edit(wires: Wiring, place: Place) -> None:
    """Put off the up-sampling of a place's maps: what reads them is called as it was."""
    for up in place.ups:
        if up.op == "call_function":
            up.target = enlarge
            continue
        with wires.graph.inserting_before(up):
            layer = wires.graph.create_node("get_attr", str(up.target))
            later = wires.graph.call_function(enlarge_by, (layer, *up.args))
        up.replace_all_uses_with(later)
        wires.graph.erase_node(up)


def _labelled(change: Change, which: Sequence[_Version], versions: Sequence[_Version]) -> Change:
    """Say for which versions of a module a change is, where that is not all of them."""
    if len(which) == len(versions):
        return change
    fewest = min(len(each.given) for each in versions)
    few = {name for each in versions if len(each.given) == fewest for name in each.given}
    labels = []
    for each in which:
        optional = [name for name in each.given if name not in few]
        labels.append(
            " ".join(filter(None, (_mode(each.training), f"given {', '.join(optional)}" if optional else "")))
        )
    told = " and ".join(filter(None, dict.fromkeys(labels))) or "with its defaults"
    return replace(change, why=f"{change.why} ({told})")

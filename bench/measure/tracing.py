"""What a model costs by running it without data: the ways of tracing, and what is counted of anybody's module.

What counts is what operators run, not the types of modules: a convolution is one however it is written and reached.
How many operators a step dispatches, by name, shows an eager program's overhead and its `.clone()`s. Leaves out live
bytes (`live_bytes`) and fvcore (`counting`), which are traced in the way that is chosen here.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from skipcost.bench import figures
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import make, shorten
from skipcost.bench.cases.modules import (
    NoTensorError,
    as_written,
    compiled_note,
    count_elements,
    packed_note,
    storage_key,
    tensors_of,
)
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import UnsupportedError
from skipcost.bench.measure.subject import AUTOCAST, Subject, make_subject
from skipcost.bench.measure.watching import Layers, Watching

CONVOLUTION = re.compile(r"conv(?!ert)(?!.*(pack|backward))")  # in an operator's name; PyTorch has no list of them
PACKED = re.compile(r"conv(_transpose)?\dd")  # those that read int8 weights in FBGEMM's and QNNPACK's form
COMPUTING = re.compile(r"(?:^|\.)parametrizations(?:\.|$)")  # in a path: what makes a weight, not a layer
MOST_NAMES = 3  # of layers, in a note
FLOPS_OF_A_MAC = 2  # as PyTorch's formulas count: a multiply and an add

T = TypeVar("T")
STEPS = {"inference": 1, "training": 2}  # the first training step makes the optimizer's state


def trace(case: Case, use: Callable[[Subject], T], *, on_meta: bool = False) -> tuple[T, str]:
    """Apply `use` to the case's subject without data, and return what it says, with a note where there was data.

    That is on the meta device. Autocast does nothing there, so mixed precision is traced on fake CPU tensors, which
    have no data either; the few operators on which the CPU's and CUDA's lists of casts differ do not occur in the
    suite's networks. A user's own model whose Python looks at values fails on both: it is run on the CPU.
    on_meta: on the meta device in any precision, for `trace_peaks`, which takes such tensors for those of a device.
    """
    amp = case.precision in AUTOCAST and not on_meta
    try:
        with as_written(), FakeTensorMode() if amp else contextlib.nullcontext():
            subject = make_subject(case, "cpu" if amp else "meta", traced=True)
            return use(subject), subject.note
    except UnsupportedError:
        raise
    except Exception as error:
        if case.factory is None:
            raise
        reason = f"{type(error).__name__}: {shorten(str(error))}"
    with as_written():
        subject = make_subject(replace(case, backend="eager"), "cpu")
        found = use(subject)
    note = f"counted in a run on the CPU with random data, because it cannot be traced without ({reason})"
    return found, "; ".join(filter(None, (note, subject.note)))


@dataclass(slots=True)
class Count:
    """What one forward pass ran: MACs and elements of convolutions, and bytes that layers returned, each by layer.

    A layer is where the operator ran; what a module runs itself beside its layers stands under its own name. products:
    MACs of other operators by their names. unknown: convolutions of which PyTorch has no formula, by operator. idle:
    elements of what no operator read, by the names of the layers, or of single parameters.
    """

    conv_macs: Counter[str] = field(default_factory=Counter)
    activations: Counter[str] = field(default_factory=Counter)
    returned: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    idle: dict[str, int] = field(default_factory=dict)

    def unknown_note(self) -> str:
        """Say which convolutions the MACs leave out; empty where none."""
        names = ", ".join(f"{name} ({times})" for name, times in sorted(self.unknown.items()))
        return f"convolutions whose MACs are not known are not in it: {names}" if names else ""

    def idle_note(self, total: int) -> str:
        """Say how many of all parameters are of no use to this pass; empty where each is read."""
        if not self.idle:
            return ""
        idle, names = figures.text(sum(self.idle.values()), "count"), list(self.idle)
        more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
        said = ", ".join(names[:MOST_NAMES] + more)
        return f"{idle} of {figures.text(total, 'count')} parameters are in layers that never ran: {said}"


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """MACs by the formula that PyTorch has for an operator, or by the weights of a quantised convolution; else None."""
    packet = func._overloadpacket  # noqa: SLF001 - has no public name
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result)) // FLOPS_OF_A_MAC
    kind = PACKED.match(func._schema.name.partition("quantized::")[2])  # noqa: SLF001 - as above
    if kind is None or not isinstance(result, Tensor):
        return None
    weight, _ = getattr(torch.ops.quantized, f"{kind[0]}_unpack")(args[1])
    positions = args[0] if kind[1] else result  # a transposed one multiplies each value that it reads
    return int(positions.numel() * weight[0].numel())


def count_forward(network: nn.Module, forward: Callable[[], object]) -> Count:
    """Run a forward pass of a network, without gradients, and count every operator, one made of others as its parts."""
    count, names, read = Count(), layer_names(network), set[int | None]()
    leaves = _leaves(network)

    def left(module: int, output: object) -> None:
        if module in leaves:
            count.returned[names[module]] += sum(each.nbytes for each in tensors_of(output))

    def seen(func: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        if not func.is_view:
            read.update(storage_key(each) for each in tree_iter((args, keywords)) if isinstance(each, Tensor))
        _note(count, layers.layer, func, _macs(func, args, keywords, result), result)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that is a whole layer, and that has no formula
    try:
        with torch.no_grad(), Layers(names, _kind(network), left) as layers, Watching(seen, _in_parts):
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    count.idle = _idle(network, read)
    return count


def _in_parts(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if func._overloadpacket in flop_registry or func is torch.ops.prim.device.default:  # noqa: SLF001 - has no public name
        return NotImplemented
    return func.decompose(*args, **keywords)


def _note(count: Count, layer: str, func: Any, macs: int | None, result: Any) -> None:
    name = func._schema.name  # noqa: SLF001 - the operator's name; torch has no other
    if not CONVOLUTION.search(name.partition("::")[2]):
        if macs:
            count.products[name.replace("::", ".")] += macs
        return
    made = tensors_of(result)[:1]  # an operator that does more besides returns its map first
    count.activations[layer] += sum(each.numel() for each in made)
    if macs is None:
        count.unknown[name] += 1
    else:
        count.conv_macs[layer] += macs


def _leaves(network: nn.Module) -> set[int]:
    """Modules that have none inside, by their ids, but for those that compute a weight."""
    layers = (each for path, each in network.named_modules() if not COMPUTING.search(path))
    return {id(each) for each in layers if not _inner(each) and not hasattr(each, "_orig_mod")}


def _idle(network: nn.Module, read: set[int | None]) -> dict[str, int]:
    """Elements of the parameters whose memory no operator read: by the outermost layer where that has no other."""
    idle = {id(each): each.numel() for each in network.parameters() if storage_key(each) not in {*read, None}}
    found: dict[str, int] = {}
    named = [(name or _kind(network), list(module.parameters())) for name, module in network.named_modules()]
    for name, own in [*named, *((name, [each]) for name, each in network.named_parameters())]:
        if own and all(id(each) in idle for each in own):
            found[name] = sum(idle.pop(id(each)) for each in own)
    return found


def layer_names(network: nn.Module) -> dict[int, str]:
    """The name of every module by its id; of one with layers of its own, of what it runs outside of them.

    What computes a weight (torch.nn.utils.parametrizations) belongs to the layer whose weight it is.
    """
    names = {}
    for path, module in network.named_modules():
        owner, *inside = COMPUTING.split(path.replace("._orig_mod", ""), maxsplit=1)  # as torch.compile calls a module
        name = owner or _kind(network)
        names[id(module)] = f"{name}, outside its layers" if _inner(module) and not inside else name
    return names


def _kind(network: nn.Module) -> str:
    return str(getattr(network, "original_name", type(network).__name__))  # of a ScriptModule: of what it was made


def _inner(module: nn.Module) -> bool:
    return any(name not in {"parametrizations", "_orig_mod"} for name, _ in module.named_children())


def count_params(case: Case) -> Result:
    """Elements of the parameters of a user's own model; one that is used twice counts once.

    A forward pass shows which of them nothing reads; where there is none to be had, the number stands alone.
    """
    assert case.factory is not None
    try:
        (total, note, idle), _ = trace(case, _count_parameters)
    except NoTensorError:
        raise
    except Exception:  # noqa: BLE001 - a model that cannot run has its parameters all the same
        network, _ = make(case.factory, "meta")
        total, note, idle = count_elements(network), packed_note(network), {}
    return Result("params", samples=(total,), note=note, detail={"never_ran": idle} if idle else {})


def _count_parameters(subject: Subject) -> tuple[int, str, dict[str, int]]:
    total, count = count_elements(subject.network), count_forward(subject.network, subject.forward)
    notes = (count.idle_note(total), packed_note(subject.network))
    return total, "; ".join(filter(None, notes)), count.idle


def count_convolutions(case: Case) -> list[Result]:
    """`conv_macs` and `activations` of a user's own model: one forward pass of the whole batch, in the case's mode.

    MACs are half of what PyTorch's formulas give for convolutions, 0 where there is none. They also count matrix
    products; where a model has them, a note says how many MACs stand beside the convolutions', for they are not in the
    figure. So it does for convolutions that no formula is known of.
    """
    count, note = trace(case, lambda subject: count_forward(subject.network, subject.forward))
    notes = [note, count.unknown_note()]
    if products := count.products.total():
        notes.append(f"{products:.3g} MACs of matrix products are not in it")
    detail = {"other_macs": dict(count.products)} if products else {}
    return [
        Result("conv_macs", samples=(count.conv_macs.total(),), note="; ".join(filter(None, notes)), detail=detail),
        Result("activations", samples=(count.activations.total(),), note=note),
    ]


def count_operators(case: Case) -> Result:
    """Run steps without data and count the operators of the last one."""
    (counts, compiled), note = trace(
        case, lambda subject: (_count(subject.step, STEPS[case.mode]), compiled_note(subject.network))
    )
    note = "; ".join(filter(None, (note, compiled)))
    by_operator = dict(sorted(counts.items()))
    return Result("operators", samples=(counts.total(),), note=note, detail={"by_operator": by_operator})


def _count(step: Callable[[], object], steps: int) -> Counter[str]:
    for _ in range(steps - 1):
        step()
    counts: Counter[str] = Counter()
    with Watching(lambda func, *_call: counts.update([str(func)])):
        step()
    return counts

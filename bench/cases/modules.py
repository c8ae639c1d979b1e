"""What can be done with anybody's module: take its data away, stand in for it, list the tensors of what it returns.

Every count goes through here, a sweep's and `assert_cost`'s, so that both treat a module alike. Leaves out what is
counted (`tracing`) and how a module comes from a factory (`custom`).
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from skipcost.bench.errors import UnsupportedError
from skipcost.kernels.rewriting.rewrite import Running

COMPILERS = "torch.compile, fuse or rewrite"
NO_DATA = (
    str,
    bytes,
    types.GeneratorType,
    type,
    types.FunctionType,
    types.ModuleType,
    nn.Module,
)  # nothing in it is looked at
SPARSE = {  # what a sparse tensor consists of; the public names of the first want it coalesced
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class NoTensorError(UnsupportedError):
    """A model returned no tensor: whatever it is asked for, its numbers would be of nothing."""


def tensors_of(value: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Every tensor in what a module returned, in order: in containers, dataclasses and objects with attributes.

    A generator has none: what it would give was not computed yet.
    """
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, NO_DATA) or id(value) in seen:
        return []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, each.name, None) for each in dataclasses.fields(value)]
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [each for part in parts for each in tensors_of(part, seen | {id(value)})]


def require_tensors(output: Any) -> Any:
    """Hand an output on; NoTensorError where there is no tensor in it, since then nothing is known to have run."""
    if not tensors_of(output):
        message = (
            f"the model returned {described(output)}, no tensor: have its forward return what it computes, as tensors, "
            "alone or in a list, a tuple, a dict or a dataclass"
        )
        raise NoTensorError(message)
    return output


def described(output: Any) -> str:
    """The form of an output, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        return f"a dict with {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, list | tuple):
        return f"a {type(output).__name__} of {', '.join(described(each) for each in output) or 'nothing'}"
    return "None" if output is None else type(output).__name__


def storage_key(tensor: Tensor) -> int | None:
    """What tells a tensor's memory from another's; None where it has none of its own kind, as a sparse one."""
    try:
        return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - its identity; its Python object may be remade
    except (NotImplementedError, RuntimeError):
        return None


def count_elements(network: nn.Module) -> int:
    """Elements of all parameters: one that has several names, or that several layers share, counts once."""
    return sum(each.numel() for each in network.parameters())


def parameter_bytes(network: nn.Module) -> int:
    """Bytes of all parameters' elements, those of one storage together no more than it has."""
    sizes: dict[int, tuple[int, int]] = {}
    alone = 0
    for each in network.parameters():
        key = storage_key(each)
        if key is None:
            alone += sum(getattr(each.detach(), name)().nbytes for name in SPARSE.get(each.layout, ()))
        else:
            known, whole = sizes.get(key, (0, each.untyped_storage().nbytes()))
            sizes[key] = (known + each.nbytes, whole)
    return alone + sum(min(pair) for pair in sizes.values())


def replace_tensors(network: nn.Module, other: Callable[[Tensor], Tensor]) -> nn.Module:
    """Put `other(tensor)` in the place of every parameter and buffer, in the module; a tied one is replaced alike.

    Module.to makes a parameter of each name when it cannot change the type in place, as towards the meta device:
    there two layers that share one would have two.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, whose id is free when it goes
    for module in network.modules():
        tables = (module._parameters, module._buffers)  # noqa: SLF001 - named_parameters leaves second names out
        for name, tensor in [pair for table in tables for pair in table.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                made[id(tensor)] = (tensor, _like(tensor, other(tensor)))
            setattr(module, name, made[id(tensor)][1])  # not the table's entry: recurrent layers keep a list beside it
    return network


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new if is_lazy(new) else new.requires_grad_(tensor.requires_grad)  # a ScriptModule's parameters are tensors


def stand_ins(*, data: bool) -> Callable[[Tensor], Tensor]:
    """What makes of a tensor another of its kind, with its data or on the meta device; views of one storage stay so."""
    storages: dict[int, torch.UntypedStorage] = {}

    def another(tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            empty: Tensor = type(tensor)(  # type: ignore[call-arg]  # it has no size yet, and is of a class of its own
                requires_grad=tensor.requires_grad, device=tensor.device if data else "meta", dtype=tensor.dtype
            )
            return empty
        key, on_meta = storage_key(tensor), tensor.device.type == "meta"
        if on_meta and not data:
            return tensor
        if on_meta or key is None or tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter):
            return tensor.detach().clone() if data else tensor.detach().to("meta")
        if key not in storages:
            whole = tensor.untyped_storage()
            storages[key] = whole.clone() if data else torch.UntypedStorage(whole.nbytes(), device="meta")
        empty = torch.empty(0, dtype=tensor.dtype, device=storages[key].device)
        return empty.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())

    return another


def without_data(network: nn.Module) -> nn.Module:
    """Move a module to the meta device, in place. Tied parameters stay one, views of one storage stay views of one."""
    return replace_tensors(network, stand_ins(data=False))


@contextmanager
def stand_in(network: nn.Module, *, data: bool) -> Iterator[nn.Module]:
    """A module to run and to change in the place of the one given, which is as it was afterwards; without data or with.

    That is a copy; of a module that cannot be copied (tensors that others made, locks, files), or whose forward is an
    object's own, which may hold on to the original, the module itself: its tensors and attributes are put back. What
    its Python keeps in lists and the like is then not.
    """
    another = stand_ins(data=data)
    copied = _copy(network, another)
    kept = [] if copied is not network else [_state(module) for module in network.modules()]
    try:
        yield replace_tensors(copied, another)  # a ScriptModule's copy has its own; those of others are in place
    finally:
        for module, tensors, own in kept:
            for name, tensor in tensors.items():
                setattr(module, name, tensor)
            vars(module).clear()
            vars(module).update(own)


def _copy(network: nn.Module, another: Callable[[Tensor], Tensor]) -> nn.Module:
    for module in network.modules():
        if "forward" in vars(module) and not isinstance(module, torch.jit.ScriptModule):
            return network
    present = (*network.parameters(), *network.buffers())
    try:
        return copy.deepcopy(network, {id(each): _like(each, another(each)) for each in present})
    except Exception:  # noqa: BLE001 - whatever a part of a module raises when it is to be copied
        return network


def _state(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    tables = {**module._parameters, **module._buffers}  # noqa: SLF001 - as above
    return module, {name: each for name, each in tables.items() if each is not None}, dict(vars(module))


def is_lazy_in(network: nn.Module) -> bool:
    """Whether a module has layers that take their sizes from what they first read (torch.nn.Lazy...)."""
    return any(is_lazy(each) for each in (*network.parameters(), *network.buffers()))


def packed_note(network: nn.Module) -> str:
    """Say which layers keep their weights in a form that is no parameter (int8, frozen); empty where none does."""
    scripted = [each for each in network.modules() if isinstance(each, torch.jit.ScriptModule)]
    kinds = Counter(
        type(each).__name__
        for each in network.modules()
        if each not in scripted and any(isinstance(value, torch.ScriptObject) for value in vars(each).values())
    )
    if kinds:
        names = ", ".join(f"{name} ({times})" for name, times in sorted(kinds.items()))
        return f"packed weights are no parameters and not in it: {names}"
    if scripted and not any(True for _ in network.parameters()):
        return "what a ScriptModule holds as constants, as a frozen one its weights, is no parameter and not in it"
    return ""


def settle(network: nn.Module, inputs: list[Any]) -> nn.Module:
    """Run a module once where it has such layers."""
    if is_lazy_in(network):
        training = network.training
        with torch.no_grad():
            network.eval()(*inputs)  # no statistic moves
        network.train(training)
    return network


def as_written() -> AbstractContextManager[object]:
    """Run what torch.compile made, in a module or anywhere in it, as it was written, and leave it to be compiled later.

    A function that runs once while its operators are watched is never compiled again in that process
    (pytorch/pytorch#190286).
    """
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def compiled_note(network: nn.Module) -> str:
    """Say that torch.compile, by itself or by `fuse` and `rewrite`, has a part in a module that is not counted.

    `as_written` leaves it out, and Dynamo calls nothing that it compiled where operators are watched.
    """
    compiled = any(
        hasattr(each, "_orig_mod")  # torch.compile(module)
        or each._compiled_call_impl is not None  # noqa: SLF001 - module.compile(), of which there is no other trace
        or hasattr(each.forward, "_torchdynamo_orig_callable")  # of the forward alone
        or isinstance(each.forward, Running)
        for each in network.modules()
    )
    return f"counted on the model as it is written: what {COMPILERS} makes of it is not in it" if compiled else ""

"""`twin(model)`: a model's modules once more, with a mode and hooks of their own, over the very same tensors."""

from __future__ import annotations

import copy
import copyreg
import gc
import weakref
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

TENSORS = {"_parameters", "_buffers", "_non_persistent_buffers_set"}
ENDS = (type, ModuleType, CodeType, Tensor, str, bytes, int, float, torch.Generator)


def twin(model: nn.Module) -> nn.Module:
    """Return a model of the same classes whose parameters and buffers are the model's, under the same names.

    What is moved, loaded, trained or replaced among the tensors of one is so in the other; attributes that are set
    afterwards are not. Lists, methods and objects that hold modules of the model hold the twin's.
    ValueError where a part cannot be told to: code that is compiled, layers without weights yet, functions that hold
    modules of the model.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        _refuse(module, name)
    known: dict[int, Any] = {id(module): object.__new__(type(module)) for module in names}
    for module, name in names.items():
        for slot in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]  # noqa: SLF001 - as copy does
            if hasattr(module, slot):
                value = _copied(getattr(module, slot), names, known, _at(name, slot))
                object.__setattr__(known[id(module)], slot, value)
        state = dict(module.__dict__)
        state.pop("_compiled_call_impl", None)  # it would call the model's own, compiled
        shared = {key: state[key] for key in TENSORS & state.keys()}
        made = {key: _copied(value, names, known, _at(name, key)) for key, value in state.items() if key not in shared}
        known[id(module)].__dict__.update(shared | made)
    found: nn.Module = known[id(model)]
    return found


def _at(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def _refuse(module: nn.Module, name: str) -> None:
    from torch._dynamo import OptimizedModule  # noqa: PLC0415 - loads Dynamo

    where = name or "the model"
    if isinstance(module, torch.jit.ScriptModule):
        message = f"{where} is a {type(module).__name__}, whose code cannot be followed: give the module of Python"
        raise ValueError(message)  # noqa: TRY004 - all input that is refused raises ValueError
    if isinstance(module, OptimizedModule):
        message = f"{where} is compiled already: give the module that torch.compile was given"
        raise ValueError(message)  # noqa: TRY004 - as above
    own = (*module._parameters.values(), *module._buffers.values())  # noqa: SLF001 - parameters() leaves out repeats
    if any(is_lazy(each) for each in own if each is not None):
        message = f"{where} is a lazy layer, {type(module).__name__}, without weights yet: run the model once first"
        raise ValueError(message)


def _copied(value: Any, names: Collection[nn.Module], known: dict[int, Any], where: str) -> Any:
    """Return an attribute for the twin, with its modules in place of the model's at any depth; else as it is."""
    if isinstance(value, weakref.ReferenceType):
        return weakref.ref(known[id(value())]) if id(value()) in known else value
    reached = list(_reached(value))
    if not any(id(each) in known for each in reached):
        return copy.copy(value) if isinstance(value, dict | list | set) else value
    memo = known | {id(each): each for each in reached if isinstance(each, Tensor)}
    try:
        made = copy.deepcopy(value, memo)
    except Exception as error:  # whatever code of the user's own raises
        message = f"{where} holds modules of the model and cannot be copied: {error}"
        raise ValueError(message) from error
    if any(each in names for each in _reached(made) if isinstance(each, nn.Module)):
        kept = "holds modules of the model in a function or a weak reference"
        message = f"{where} {kept}, which would keep to those: set it afterwards"
        raise ValueError(message)
    return made


def _reached(value: Any) -> Iterator[Any]:
    """Yield an object and all that it holds, but for what classes, modules of Python and functions' globals hold."""
    seen: dict[int, Any] = {}
    todo = [value]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        yield each
        if isinstance(each, weakref.ReferenceType):
            todo.append(each())
        elif isinstance(each, FunctionType):
            todo += [each.__closure__, each.__defaults__, each.__kwdefaults__, each.__dict__]
        elif not isinstance(each, ENDS):
            todo += gc.get_referents(each)

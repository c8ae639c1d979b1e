"""Peak live bytes of a step, by tracing it: every tensor's storage is followed from its making to its end.

On the meta device this needs neither memory nor a GPU. What is counted is what the program asks for: parameters,
buffers, gradients, optimizer state, inputs, saved activations and what an op returns. What a library allocates inside
an op (cuDNN workspaces), the allocator's rounding and the CUDA context are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # noqa: SLF001 - has no public name


def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others, whose results it may drop (max-pooling its indices).

    Below autograd only its parts arrive here; in inference mode it arrives whole.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001 - has no public name
    return func.namespace == "aten" and bool(has(func.name(), _COMPOSITE))


def _makes_no_statistics(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is a batch norm at inference: on the meta device alone it returns a mean and a deviation too."""
    return func is torch.ops.aten.native_batch_norm.default and not args[5]


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages alive; `peak` is the most there ever were since it was last set."""

    def __init__(self, present: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in present:
            self._follow(tensor)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - the storage's identity; its Python object may be remade
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)  # noqa: SLF001 - the operator as its parts
        result = func(*args, **kwargs)
        for each in tree_iter(result[:1] if _makes_no_statistics(func, args) else result):
            if isinstance(each, torch.Tensor):
                self._follow(each)
        return result


def trace_peaks(step: Callable[[], object], present: Iterable[torch.Tensor], steps: int) -> list[int]:
    """Run `step` `steps` times and return the peak of live bytes in each; `present` is what exists before."""
    peaks = []
    with LiveBytes(present) as tracker:
        for _ in range(steps):
            tracker.peak = tracker.live
            step()
            peaks.append(tracker.peak)
    return peaks

"""Peak live bytes of a step, by tracing it: every tensor's storage is followed from its making to its end.

On the meta device this needs neither memory nor a GPU. What is counted is what the program asks for: parameters,
buffers, gradients, optimizer state, inputs, saved activations and what an op returns. What a library allocates inside
an op (cuDNN workspaces), the allocator's rounding and the CUDA context are not in it.

Which operators run is the device's choice: it takes attention, recurrent layers and some backward passes in one piece
where the meta device takes them apart, and a model's own Python may ask for it. So tensors of the meta device are
traced as if they were on the device that the step is for.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

from skipcost.bench.measure.watching import Watching

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # noqa: SLF001 - has no public name
APART_ON_CUDA = {"aten::native_channel_shuffle"}  # composites with a kernel of the CPU's alone (native_functions.yaml)


def _is_composite(func: Any, device: str) -> bool:
    """Whether a device makes an operator of others, whose results it may drop (max-pooling its indices).

    Not where it has a kernel of its own beside them, as for the backward passes of SiLU and Mish. Below autograd only
    its parts arrive here; in inference mode it arrives whole.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001 - has no public name
    name = func.name()
    if func.namespace != "aten" or not has(name, _COMPOSITE):
        return False
    return not has(name, "CPU") or (device == "cuda" and name.partition(".")[0] in APART_ON_CUDA)


def device_to_trace(device: str) -> str:
    """Where a step for a device is traced: there, if this PyTorch knows it, else as if on a CPU."""
    return device if device == "cpu" or torch.backends.cuda.is_built() else "cpu"


def as_if_on(device: str, tensors: Iterable[Tensor]) -> FakeTensorMode:
    """Turn tensors of the meta device, in place, into ones that say they are on another, and have no data there either.

    The mode that is returned makes such tensors of all that are made while it is entered.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for each in {id(each): each for each in tensors if each.is_meta}.values():
        fake = FakeTensor(mode, each.detach(), torch.device(device)).requires_grad_(each.requires_grad)
        fake._is_param = isinstance(each, nn.Parameter)  # what isinstance asks for  # noqa: SLF001
        # torch.utils.swap_tensors, but for weak references, which recurrent layers have to their weights
        each.__class__, fake.__class__ = fake.__class__, each.__class__
        each.__dict__, fake.__dict__ = fake.__dict__, each.__dict__
        torch._C._swap_tensor_impl(each, fake)  # noqa: SLF001
    return mode


def _multi_head(
    query: Tensor, key: Tensor, _value: Tensor, width: int, heads: int, *_weights: object, **_how: object
) -> tuple[Tensor, Tensor]:
    """Make what MultiheadAttention in one piece makes on a CPU: (N, L, E) and the scores (N, heads, L, S), all of them.

    The order is that of ATen's transformers/attention.cpp.
    """
    (batch, length), other = query.shape[:2], key.shape[1]
    projected = query.new_empty(batch, length + 2 * other, width)
    in_heads = projected.new_empty(projected.shape)
    del projected
    scores = query.new_empty(batch, heads, length, other)
    del in_heads
    return query.new_empty(batch, length, width), scores


def _encoder_layer(image: Tensor, width: int, heads: int, *rest: Any, **_how: object) -> Tensor:
    """Make what TransformerEncoderLayer in one piece makes: attention, then the two linear layers (N, L, E)."""
    result, scores = _multi_head(image, image, image, width, heads)
    del scores
    hidden = image.new_empty(*image.shape[:-1], rest[11].shape[0])
    result = result.new_empty(result.shape)
    del hidden
    return result


# Operators that the CPU runs in one piece, with much inside that is neither the library's own nor small.
_WHOLE: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._native_multi_head_attention.default: _multi_head,  # noqa: SLF001 - has no public name
    torch.ops.aten._transformer_encoder_layer_fwd.default: _encoder_layer,  # noqa: SLF001 - as before
}


def _makes_no_statistics(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is a batch norm at inference: on the meta device alone it returns a mean and a deviation too."""
    return func is torch.ops.aten.native_batch_norm.default and not args[5]


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one is made of: it has no storage of its own."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()  # noqa: SLF001 - those of one that is not coalesced, too
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    outer = tensor.crow_indices() if rows else tensor.ccol_indices()
    return outer, tensor.col_indices() if rows else tensor.row_indices(), tensor.values()


class LiveBytes(Watching):
    """Count the bytes of all storages alive; `peak` is the most there ever were since it was last set.

    `device` decides which operators are made of others.
    """

    def __init__(self, present: Iterable[torch.Tensor], device: str = "cpu") -> None:
        super().__init__(self._made, self._in_parts)
        self._device = device
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in present:
            self._follow(tensor)

    def _follow(self, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided and not tensor.is_mkldnn:
            for each in _parts(tensor):
                self._follow(each)
            return
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

    def _made(self, func: Any, args: tuple[Any, ...], _keywords: object, result: Any) -> None:
        for each in tree_iter(result[:1] if _makes_no_statistics(func, args) else result):
            if isinstance(each, torch.Tensor):
                self._follow(each)

    def _in_parts(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if func in _WHOLE:
            return _WHOLE[func](*args, **keywords)
        if _is_composite(func, self._device):
            return func._op_dk(_COMPOSITE, *args, **keywords)  # noqa: SLF001 - the operator as its parts
        return NotImplemented


def trace_peaks(
    step: Callable[[], object], present: Iterable[torch.Tensor], steps: int, device: str = "cpu"
) -> list[int]:
    """Run `step` `steps` times and return the peak of live bytes in each; `present` is what exists before.

    Tensors of the meta device among them are traced as if they were on `device`, and stay so. "meta" leaves them: for
    the suite's own networks, whose operators are the same on every device.
    """
    peaks, present = [], list(present)
    without_data = device != "meta" and any(each.is_meta for each in present)
    mode = as_if_on(device_to_trace(device), present) if without_data else contextlib.nullcontext()
    with mode, LiveBytes(present, device) as tracker:
        for _ in range(steps):
            tracker.peak = tracker.live
            step()
            peaks.append(tracker.peak)
    return peaks

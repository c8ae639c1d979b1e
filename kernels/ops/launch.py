"""A kernel launch as data: it can be run here, compiled for a GPU that is not here, counted, and timed.

Ops build launches and hand them to `run`; `resources` compiles the very same ones ahead of time. Importing this needs
no triton: a launch names its kernel, and triton is imported when it runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An argument that the kernel reads or writes in blocks through the copy engine (TMA): reads outside are zero.

    tensor: any view whose last stride is 1, whose other strides and address are multiples of 16 bytes.
    block: sizes of one block, one per dimension of the tensor.
    """

    tensor: Tensor
    block: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel on one grid.

    kernel: "conv.conv" is the function `conv` of `kernels/device/conv.py`.
    arguments: in the order of the kernel's parameters; tensors, integers, floats, Descriptors, and tuples of them.
    constants: the kernel's tl.constexpr parameters.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, as for an empty batch."""
        return 0 in self.grid


def device_function(kernel: str) -> Any:
    """Import the `@triton.jit` function that a launch names."""
    module, _, name = kernel.partition(".")
    return getattr(importlib.import_module(f"skipcost.kernels.device.{module}"), name)


def run(launches: Sequence[Launch]) -> None:
    """Launch one after the other on the device of their tensors; what has nothing to do is left out."""
    launches = [launch for launch in launches if not launch.empty]
    if not launches:
        return
    with torch.cuda.device_of(_first_tensor(tuple(launches[0].arguments.values()))):
        for launch in launches:
            arguments = {name: described(value) for name, value in launch.arguments.items()}
            options = {"num_warps": launch.warps, "num_stages": launch.stages}
            device_function(launch.kernel)[launch.grid](**arguments, **launch.constants, **options)


def described(value: Any) -> Any:
    """Turn the Descriptors in an argument into those that Triton's launcher takes."""
    if isinstance(value, Descriptor):
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - needs triton

        tensor = value.tensor
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(value.block))
    return tuple(described(each) for each in value) if isinstance(value, tuple) else value


def _first_tensor(values: tuple[Any, ...]) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Descriptor):
            return value.tensor
        if isinstance(value, tuple) and value:
            return _first_tensor(value)
    message = "a launch without a tensor has no device"
    raise ValueError(message)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on CPU tensors, as TRITON_INTERPRET=1 has it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_triton(x: Tensor) -> bool:
    """Whether a kernel can run on this tensor: it is on a GPU, or the interpreter stands in for one."""
    return x.is_cuda or interpreted()


def span(x: Tensor) -> int:
    """Elements from the first to the last of `x`, gaps included: what decides whether offsets fit 31 bits."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def architecture_of(device: torch.device | str) -> str:
    """Return what a GPU's configurations are filed under: "sm90", "gfx942"; "" for what is no GPU."""
    if torch.device(device).type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm{properties.major}{properties.minor}"

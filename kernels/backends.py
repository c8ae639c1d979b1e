"""How a network is executed: which ops it is built on, what is wrapped round it, and where that can run.

A backend never falls back: `why_not` says beforehand why a device cannot run it, so that no number carries the name
of a kernel that was not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import cast

import torch
from torch import nn

from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.kernels.ways import FusedNetwork
from skipcost.unet_models.network import SkipNet
from skipcost.unet_models.ops import REFERENCE, Ops


@dataclass(frozen=True, slots=True)
class Backend:
    """A row of BACKENDS.

    ops: makes the functions to build the network on. wrap: what is called instead of the built network.
    why_not: takes a device type, "cpu" or "cuda"; returns "" where the backend can run on this machine's, or one
    sentence with the reason and what to do.
    """

    title: str
    ops: Callable[[], Ops]
    wrap: Callable[[nn.Module], nn.Module]
    why_not: Callable[[str], str]


def _reference_ops() -> Ops:
    return REFERENCE


def _fused_ops() -> Ops:
    return FusedOps().ops()


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


def _fused(network: nn.Module) -> nn.Module:
    return FusedNetwork(network) if isinstance(network, SkipNet) else network


def _compiled(network: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(network))


def _no_device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "this PyTorch sees no CUDA GPU: check the driver and the PyTorch build, or run on the CPU"
    return ""


def _no_triton() -> str:
    """Triton compiles its kernels itself, and the C function that launches each of them with a compiler it finds."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'skipcost[gpu]', or choose backend eager"
    if not any(which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name):
        return "triton finds no C compiler: install gcc or name one in CC, or choose backend eager"
    return ""


def _no_inductor(device: str) -> str:
    """On a CPU, Inductor writes C++; on a GPU, Triton."""
    if missing := _no_device(device):
        return missing
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(switch) == "1":
            return f"{switch}=1 makes torch.compile run eagerly: unset it, or choose backend eager"
    try:
        torch.compile(nn.Identity(), backend="eager")  # compiles nothing, but refuses a Python it does not support
    except RuntimeError as error:
        return f"torch.compile refuses ({error}): change the Python, or choose backend eager"
    if device == "cuda":
        return _no_triton()
    compiler = os.environ.get("CXX", "g++")
    if which(compiler) is None:
        return (
            f"torch.compile finds no C++ compiler {compiler!r}: install g++ or name one in CXX, or choose backend eager"
        )
    return ""


def _no_kernels(device: str) -> str:
    if device != "cuda":
        return f"the fused kernels need a CUDA GPU, not device {device!r}: choose backend eager, or device cuda"
    return _no_device(device) or _no_triton()


BACKENDS: dict[str, Backend] = {
    "eager": Backend("the PyTorch reference, op by op", _reference_ops, _as_it_is, _no_device),
    "compile": Backend("the reference under torch.compile", _reference_ops, _compiled, _no_inductor),
    "fused": Backend("the suite's kernels where they win, else what does", _fused_ops, _fused, _no_kernels),
    "rewritten": Backend(
        "the reference, convolutions over up-sampled maps at low resolution where fewer MACs do",
        RewrittenOps().ops,
        _as_it_is,
        _no_device,
    ),
}

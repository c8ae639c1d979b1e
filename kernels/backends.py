"""How a network is executed: which ops it is built on, what is wrapped round it, and where that can run.

A backend never falls back: `why_not` says beforehand why a device cannot run it, so that no number carries the name
of a kernel that was not there. `fused` takes of several ways to run a whole network the one that was measured fastest
on the card; where nobody measured the network there, it runs layer by layer as dispatch chooses. Nothing is timed here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipcost.kernels.devices import Device
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.dispatch.choose import Choice
from skipcost.kernels.precision import tf32_allowed
from skipcost.kernels.rewriting.fused import PRECISIONS, FusedOps, card_of
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.unet_models.network import SkipNet
from skipcost.unet_models.ops import REFERENCE, Ops
from skipcost.unet_models.spec import ModelSpec
from skipcost.unet_models.topology import SkipGraph

Way = Callable[[SkipNet], nn.Module]


def on(network: SkipNet, ops: Ops) -> SkipNet:
    """Return the same network, its layers and weights shared, on other ops."""
    twin = copy.copy(network)
    twin.use(ops)
    return twin


def _fold(call: Call, _x: Tensor) -> str:
    return "reference" if call.op in ("up_conv", "crop_concat", "conv_bn_relu_train") else "cudnn"


def _folded(network: SkipNet) -> nn.Module:
    return on(network, FusedOps(_fold).ops())


def _compiled_with(**options: Any) -> Way:
    def compiled(network: SkipNet) -> nn.Module:
        settings = {name: value for name, value in options.items() if name != "freezing" or not network.training}
        return cast("nn.Module", torch.compile(on(network, REFERENCE), options=settings or None))

    return compiled


WAYS: dict[str, Way] = {
    "eager": lambda network: on(network, REFERENCE),
    "folded": _folded,
    "compile": _compiled_with(),
    "compile-max": _compiled_with(max_autotune=True, freezing=True),
    "fused": lambda network: network,
}


class FusedNetwork(nn.Module):
    """A network on fused ops, called in the way that wins at each size, type and mode; `why` says which and why.

    Parameters and buffers are the network's own, under the names that it gives them.
    """

    def __init__(self, network: SkipNet) -> None:
        super().__init__()
        self.network = network
        self.why: dict[tuple[Any, ...], Choice] = {}
        self._ways: dict[tuple[str, bool], nn.Module] = {}

    def forward(self, image: Tensor) -> Any:
        """Run the network on (N, in_channels, H, W)."""
        way = self._choice(image).implementation
        key = (way, self.network.training)
        if key not in self._ways:
            self._ways[key] = WAYS[way](self.network)
        return self._ways[key](image)

    def _choice(self, image: Tensor) -> Choice:
        precision = precision_of(image)
        case = case_name(*(int(size) for size in (image.shape[0], *image.shape[2:])), training=self.network.training)
        key = (case, precision)
        if key not in self.why:
            self.why[key] = choose_way(self.network.graph, case, precision, card_of(image))
        return self.why[key]


def case_name(batch: int, height: int, width: int, *, training: bool) -> str:
    """Name what a network is measured at, as rows of `skipcost kernels bench` do: "n8 512x512 training"."""
    return f"n{batch} {height}x{width} {'training' if training else 'inference'}"


def precision_of(image: Tensor) -> str:
    """Name the precision that a network would run an image in: "bf16", or "amp-bf16" under autocast."""
    device = image.device.type
    if torch.is_autocast_enabled(device):
        return f"amp-{PRECISIONS.get(torch.get_autocast_dtype(device), 'fp32')}"
    name = PRECISIONS.get(image.dtype, str(image.dtype))
    return "tf32" if name == "fp32" and tf32_allowed() else name


def choose_way(network: SkipGraph, case: str, precision: str, card: Device | None) -> Choice:
    """Return the way to run a graph at a case on a card; None is a machine without one."""
    if card is None:
        return Choice("fused", "no GPU: layer by layer, on the PyTorch reference", "rule", {})
    for label in winners.networks(card.names):
        if _graph_of(label) in (network, network.final()):
            seconds = winners.networks(card.names)[label].get((case, precision), {})
            known = {name: value for name, value in seconds.items() if name in WAYS}
            if len(known) > 1:
                best = min(known, key=lambda name: known[name])
                others = ", ".join(f"{name} {known[name] * 1e3:.3g} ms" for name in known if name != best)
                return Choice(best, f"measured {known[best] * 1e3:.3g} ms ({others})", "measured", known)
    return Choice("fused", "nobody measured this network at this size on this card: layer by layer", "rule", {})


@cache
def _graph_of(label: str) -> SkipGraph:
    return ModelSpec.parse(label).graph()


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

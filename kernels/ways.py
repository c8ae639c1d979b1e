"""Ways to run a whole network, and `backend=fused`, which takes the one that was measured fastest on the card.

Where nobody measured the network on the card, it runs layer by layer as dispatch chooses. Nothing is timed here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipcost.kernels.devices import Device
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.dispatch.choose import Choice
from skipcost.kernels.precision import tf32_allowed
from skipcost.kernels.rewriting.fused import PRECISIONS, FusedOps, card_of
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


def _compiled(**options: Any) -> Way:
    def compiled(network: SkipNet) -> nn.Module:
        settings = {name: value for name, value in options.items() if name != "freezing" or not network.training}
        return cast("nn.Module", torch.compile(on(network, REFERENCE), options=settings or None))

    return compiled


WAYS: dict[str, Way] = {
    "eager": lambda network: on(network, REFERENCE),
    "folded": _folded,
    "compile": _compiled(),
    "compile-max": _compiled(max_autotune=True, freezing=True),
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

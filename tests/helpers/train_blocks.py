"""The block that tests of `conv_bn_relu_train` train: maps, layers, and what PyTorch makes of them, op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipcost.unet_models import ops as reference_ops

SIZES = ((5, 9, 8), (3, 7, 9), (1, 8, 8))  # each map is cropped in one direction at least, one by an odd remainder
CHANNELS = 9
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def make_maps(dtype: torch.dtype = torch.float64, device: str = "cpu", *, grad: bool = True) -> list[Tensor]:
    """Return maps (2, C, H, W) of SIZES."""
    torch.manual_seed(0)
    return [torch.randn(2, *size, dtype=dtype, device=device, requires_grad=grad) for size in SIZES]


def make_layers(side: int = 3, padding: int = 1, dtype: torch.dtype = torch.float64, **norm: Any) -> nn.ModuleList:
    """Return a convolution and its norm, with scales and shifts that matter."""
    torch.manual_seed(1)
    layers = nn.ModuleList([nn.Conv2d(CHANNELS, 6, side, padding=padding), nn.BatchNorm2d(6, **norm)])
    for each in layers[1].parameters():
        nn.init.normal_(each)
    return layers.to(dtype)


def make_vectors(*, grad: bool) -> list[Tensor]:
    """Return weight, bias, gamma and beta."""
    torch.manual_seed(2)
    return [torch.randn(shape, requires_grad=grad) for shape in ((6, CHANNELS, 3, 3), (6,), (6,), (6,))]


def reference(maps: Sequence[Tensor], conv: nn.Module, norm: nn.Module, *, relu: bool = True) -> Tensor:
    """Join the maps, convolve, normalise and clip, op by op."""
    out: Tensor = norm(conv(reference_ops.merge(list(maps), "concat")))
    return out.relu() if relu else out


def state(layers: nn.ModuleList) -> dict[str, Tensor]:
    """Return what a step of training does to the buffers."""
    return {name: each for name, each in layers.state_dict().items() if "running" in name or "tracked" in name}

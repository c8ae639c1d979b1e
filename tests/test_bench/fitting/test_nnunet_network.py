"""The network of a plan, counted by arithmetic, against the same network in PyTorch and PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from skipcost.bench.fitting.nnunet_network import Stages, read_stages

HALVES = [[1, 1], [2, 2], [2, 2], [2, 2]]
CHANGES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "a stem that halves": {"strides": [[2, 2]] * 4},
    "one axis alone": {"strides": [[1, 1], [2, 2], [2, 1], [1, 2]]},
    "strides of four": {"strides": [[1, 1], [4, 4], [2, 2], [1, 1]]},
    "kernels of one axis": {"kernel_sizes": [[1, 3], [3, 1], [5, 5], [3, 3]]},
    "other numbers of convolutions": {"n_conv_per_stage": [1, 2, 3, 4], "n_conv_per_stage_decoder": [3, 1, 2]},
    "features that fall": {"features_per_stage": [12, 20, 8, 6]},
    "no bias": {"conv_bias": False},
    "a norm without weights": {"norm_op_kwargs": {"affine": False}},
    "batch norm": {"norm_op": "torch.nn.BatchNorm2d", "norm_op_kwargs": None},
    "no norm": {"norm_op": None, "norm_op_kwargs": None},
}


def keywords(change: dict[str, Any]) -> dict[str, Any]:
    """What a plan gives PlainConvUNet."""
    values: dict[str, Any] = {"n_stages": 4, "features_per_stage": [6, 12, 24, 24], "kernel_sizes": [[3, 3]] * 4}
    values |= {"strides": HALVES, "n_conv_per_stage": [2] * 4, "n_conv_per_stage_decoder": [2] * 3, "conv_bias": True}
    values |= {"norm_op": "torch.nn.InstanceNorm2d", "norm_op_kwargs": {"affine": True}, "nonlin": "torch.nn.LeakyReLU"}
    return values | change


class PlainConvUNet(nn.Module):
    """The class that a plan names, from its description, with the heads of all levels."""

    def __init__(self, stages: Stages, channels: int, classes: int) -> None:
        super().__init__()
        self.stages = stages
        self.encoder, self.grow, self.decoder, self.heads = (nn.ModuleList() for _ in range(4))
        for level, features in enumerate(stages.features):
            self.encoder.append(self.block(channels, level, stages.encoder_convs[level], stages.strides[level]))
            channels = features
        for level in reversed(range(len(stages.features) - 1)):
            features, stride = stages.features[level], stages.strides[level + 1]
            self.grow.append(nn.ConvTranspose2d(stages.features[level + 1], features, stride, stride, bias=stages.bias))
            convs = stages.decoder_convs[len(self.decoder)]
            self.decoder.append(self.block(2 * features, level, convs, (1, 1)))
            self.heads.append(nn.Conv2d(features, classes, 1))

    def block(self, channels: int, level: int, convs: int, stride: tuple[int, int]) -> nn.Sequential:
        """Convolutions of a level with their norms, the first of which strides."""
        kernel, features = self.stages.kernels[level], self.stages.features[level]
        layers: list[nn.Module] = []
        for _ in range(convs):
            padding = (kernel[0] // 2, kernel[1] // 2)
            layers.append(nn.Conv2d(channels, features, kernel, stride, padding, bias=self.stages.bias))
            if self.stages.norm:
                layers.append(getattr(nn, self.stages.norm)(features, affine=self.stages.affine))
            channels, stride = features, (1, 1)
        return nn.Sequential(*layers)

    def forward(self, image: Tensor, *, all_heads: bool) -> None:
        """Run the encoder, the decoder, and one head or all of them."""
        maps = [image]
        for block in self.encoder:
            maps.append(block(maps[-1]))
        value = maps.pop()
        for grow, block, head in zip(self.grow, self.decoder, self.heads, strict=True):
            value = block(torch.cat([grow(value), maps.pop()], 1))
            if all_heads or head is self.heads[-1]:
                head(value)


@pytest.mark.parametrize("name", CHANGES)
def test_a_plans_network_is_counted_as_pytorch_counts_it(name: str) -> None:
    """Parameters and MACs of the network with its finest head, and what the coarser heads add."""
    stages = read_stages(keywords(CHANGES[name]))
    with torch.device("meta"):
        network, image = PlainConvUNet(stages, 3, 5).eval(), torch.empty(1, 3, 48, 64)
    flops = {}
    for all_heads in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image, all_heads=all_heads)
        flops[all_heads] = counter.get_total_flops()

    finest, coarser = stages.count(3, 5, (48, 64))

    assert (finest.macs, coarser.macs) == (flops[False] // 2, (flops[True] - flops[False]) // 2)
    assert coarser.params == sum(each.numel() for head in network.heads[:-1] for each in head.parameters())
    assert finest.params + coarser.params == sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize("size", [(44, 64), (48, 60), (47, 64)])
def test_a_patch_whose_maps_do_not_meet_again_is_refused(size: tuple[int, int]) -> None:
    """PyTorch cannot concatenate them either, so nnU-Net cannot run such a plan."""
    stages = read_stages(keywords({}))
    with torch.device("meta"):
        network, image = PlainConvUNet(stages, 3, 5).eval(), torch.empty(1, 3, *size)

    with pytest.raises(ValueError, match=f"nnU-Net cannot run it: its strides take {size[0]}x{size[1]} to maps of"):
        stages.count(3, 5, size)
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
        network(image, all_heads=False)


def test_what_is_left_out_is_what_the_class_takes_by_default() -> None:
    """No bias, no norm, no activation, no dropout."""
    stages = read_stages({key: keywords({})[key] for key in list(keywords({}))[:6]})

    assert (stages.bias, stages.norm, stages.act, stages.dropout, stages.act_first) == (False, "", "", "", False)

"""Networks as people write them, in the manner of well-known public ones: what `fuse` has to cope with.

Nothing here is taken from skipcost, and nothing is written with it in mind: relu as a layer or a function, in place or
not, one layer used twice, shapes worked out in `forward`.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with their norms, in one Sequential, ReLU in place."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        return self.double_conv(x)


class Up(nn.Module):
    """Up-sample, pad to the size of the skip, concatenate, convolve twice."""

    def __init__(self, in_channels: int, out_channels: int, *, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels + in_channels // 2, out_channels)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """x1: the deeper map; x2: the skip."""
        x1 = self.up(x1)
        dy = x2.size()[2] - x1.size()[2]
        dx = x2.size()[3] - x1.size()[3]
        x1 = functional.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class PaddingUNet(nn.Module):
    """The most common U-Net of tutorials: same padding, and pads where a size does not divide."""

    def __init__(self, *, bilinear: bool = False) -> None:
        super().__init__()
        self.n_classes = 2
        self.inc = DoubleConv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32))
        self.up1 = Up(32, 16, bilinear=bilinear)
        self.up2 = Up(16, 8, bilinear=bilinear)
        self.outc = nn.Conv2d(8, self.n_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, 2, H, W)."""
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


class ValidUNet(nn.Module):
    """The network of 2015: no padding, skips centre-cropped by slices, pooling by function."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(self.block(i, o) for i, o in ((1, 4), (4, 8), (8, 16)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, i // 2, 2, stride=2) for i in (16, 8))
        self.right = nn.ModuleList(self.block(i, i // 2) for i in (16, 8))
        self.last = nn.Conv2d(4, 2, 1)

    @staticmethod
    def block(i: int, o: int) -> nn.Sequential:
        """Two convolutions without padding, one with a norm."""
        return nn.Sequential(nn.Conv2d(i, o, 3), nn.ReLU(), nn.Conv2d(o, o, 3), nn.BatchNorm2d(o), nn.ReLU())

    @staticmethod
    def center_crop(layer: Tensor, size: torch.Size) -> Tensor:
        """Cut the middle out of a map."""
        _, _, height, width = layer.size()
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return layer[:, :, top : top + size[0], left : left + size[1]]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> logits (N, 2, H - 40, W - 40)."""
        blocks = []
        for i, down in enumerate(self.left):
            x = down(x)
            if i != len(self.left) - 1:
                blocks.append(x)
                x = functional.max_pool2d(x, 2)
        for i, (up, conv) in enumerate(zip(self.up, self.right, strict=True)):
            x = up(x)
            x = conv(torch.cat([self.center_crop(blocks[-i - 1], x.shape[2:]), x], 1))
        return self.last(x)


class VggBlock(nn.Module):
    """Two convolutions whose one ReLU is used twice."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class NestedUNet(nn.Module):
    """A UNet++ of depth 2: one pool and one up-sampling for all levels, each map read by several."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv0_0, self.conv1_0, self.conv2_0 = VggBlock(3, 4), VggBlock(4, 8), VggBlock(8, 16)
        self.conv0_1, self.conv1_1, self.conv0_2 = VggBlock(12, 4), VggBlock(24, 8), VggBlock(16, 4)
        self.final1, self.final2 = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> two maps of logits (N, 2, H, W)."""
        x0_0 = self.conv0_0(x)
        x1_0 = self.conv1_0(self.pool(x0_0))
        x0_1 = self.conv0_1(torch.cat([x0_0, self.up(x1_0)], 1))
        x2_0 = self.conv2_0(self.pool(x1_0))
        x1_1 = self.conv1_1(torch.cat([x1_0, self.up(x2_0)], 1))
        x0_2 = self.conv0_2(torch.cat([x0_0, x0_1, self.up(x1_1)], 1))
        return [self.final1(x0_1), self.final2(x0_2)]


class BasicBlock(nn.Module):
    """ResNet's: the sum in place, the shortcut with a norm of its own, stride 2."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A classifier: 7x7 stem, residual blocks, a head that needs contiguous maps for .view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 5)."""
        x = self.avgpool(self.layers(self.stem(x)))
        return self.fc(x.view(x.size(0), -1))


class BranchingUNet(PaddingUNet):
    """A network whose own Python looks at the size, so that torch.fx can follow its parts only."""

    def forward(self, x: Tensor) -> Tensor:
        """Only sizes that 4 divides."""
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            message = "give a size that 4 divides"
            raise RuntimeError(message)
        return super().forward(x)


class Mlp(nn.Module):
    """No convolution at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4, 4) -> (N, 2)."""
        return self.layers(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with the shape of an input
    "padding": (PaddingUNet, (2, 3, 19, 22)),  # 4 divides neither side: the decoder has to pad
    "dividing": (PaddingUNet, (1, 3, 16, 24)),  # and here not
    "bilinear": (lambda: PaddingUNet(bilinear=True), (1, 3, 19, 24)),
    "valid": (ValidUNet, (1, 1, 44, 60)),
    "nested": (NestedUNet, (1, 3, 16, 12)),
    "resnet": (ResNet, (2, 3, 33, 32)),
    "branching": (BranchingUNet, (1, 3, 16, 24)),
    "mlp": (Mlp, (2, 3, 4, 4)),
}


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights and statistics that make no layer the identity, in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2.0, generator=generator)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(0, 0.5, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.weight.data.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
    return model.eval()


def pickled(model: nn.Module) -> nn.Module:
    """Write a model to a file and read it back."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded

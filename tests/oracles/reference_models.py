"""Textbook networks of depth 4, written out edge by edge: the oracles that the executor must equal.

Each layer has a name of its own and each line of a `forward` is one edge of the paper's figure. Nothing here is taken
from skipcost or general in depth, and nothing is lean: maps live as long as the frame does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def trimmed(*maps: Tensor) -> list[Tensor]:
    """Cut equal margins off all maps, the odd row or column at the far side, down to the smallest of them."""
    height, width = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
    cut = []
    for m in maps:
        rows, columns = m.shape[2] - height, m.shape[3] - width
        margins = (-(columns // 2), -(columns - columns // 2), -(rows // 2), -(rows - rows // 2))
        cut.append(functional.pad(m, margins))
    return cut


def joined(*maps: Tensor) -> Tensor:
    """Trim, then concatenate the channels."""
    return torch.cat(trimmed(*maps), 1)


def halved(x: Tensor) -> Tensor:
    """2x2 max pooling; an odd last row or column is lost."""
    return functional.max_pool2d(x, 2)


class Conv3(nn.Module):
    """3x3 convolution, batch norm (or none), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: bool = True, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=padding)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W), or two pixels less without padding."""
        return functional.relu(self.norm(self.conv(x)))


class Block(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: bool = True, padding: int = 1) -> None:
        super().__init__()
        self.one = Conv3(in_channels, out_channels, norm=norm, padding=padding)
        self.two = Conv3(out_channels, out_channels, norm=norm, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W), or four pixels less without padding."""
        return self.two(self.one(x))


class UNet(nn.Module):
    """Ronneberger et al. (2015), fig. 1; `arriving` = 1 sizes the decoder for sums instead of concatenations."""

    def __init__(
        self, width: int, in_channels: int, classes: int, *, norm: bool = True, padding: int = 1, arriving: int = 2
    ) -> None:
        super().__init__()
        w, n = width, arriving
        self.left0 = Block(in_channels, w, norm=norm, padding=padding)
        self.left1 = Block(w, 2 * w, norm=norm, padding=padding)
        self.left2 = Block(2 * w, 4 * w, norm=norm, padding=padding)
        self.left3 = Block(4 * w, 8 * w, norm=norm, padding=padding)
        self.bottom = Block(8 * w, 16 * w, norm=norm, padding=padding)
        self.up3 = nn.ConvTranspose2d(16 * w, 8 * w, 2, stride=2)
        self.right3 = Block(n * 8 * w, 8 * w, norm=norm, padding=padding)
        self.up2 = nn.ConvTranspose2d(8 * w, 4 * w, 2, stride=2)
        self.right2 = Block(n * 4 * w, 4 * w, norm=norm, padding=padding)
        self.up1 = nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2)
        self.right1 = Block(n * 2 * w, 2 * w, norm=norm, padding=padding)
        self.up0 = nn.ConvTranspose2d(2 * w, w, 2, stride=2)
        self.right0 = Block(n * w, w, norm=norm, padding=padding)
        self.head = nn.Conv2d(w, classes, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run the contracting path; the map of each level, the finest first."""
        e0 = self.left0(image)
        e1 = self.left1(halved(e0))
        e2 = self.left2(halved(e1))
        e3 = self.left3(halved(e2))
        return e0, e1, e2, e3, self.bottom(halved(e3))

    def forward(self, image: Tensor) -> Tensor:
        """Each encoder map is cropped and put in front of the up-sampled one."""
        e0, e1, e2, e3, e4 = self.encode(image)
        d3 = self.right3(joined(e3, self.up3(e4)))
        d2 = self.right2(joined(e2, self.up2(d3)))
        d1 = self.right1(joined(e1, self.up1(d2)))
        d0 = self.right0(joined(e0, self.up0(d1)))
        return self.head(d0)


class SumUNet(UNet):
    """LinkNet's skips on a U-Net: the encoder map is added to the up-sampled one."""

    def __init__(self, width: int, in_channels: int, classes: int) -> None:
        super().__init__(width, in_channels, classes, arriving=1)

    def forward(self, image: Tensor) -> Tensor:
        """Each encoder map is added to the up-sampled one."""
        e0, e1, e2, e3, e4 = self.encode(image)
        x3, u3 = trimmed(e3, self.up3(e4))
        d3 = self.right3(x3 + u3)
        x2, u2 = trimmed(e2, self.up2(d3))
        d2 = self.right2(x2 + u2)
        x1, u1 = trimmed(e1, self.up1(d2))
        d1 = self.right1(x1 + u1)
        x0, u0 = trimmed(e0, self.up0(d1))
        d0 = self.right0(x0 + u0)
        return self.head(d0)


class Gate(nn.Module):
    """Additive attention, Oktay et al. (2018), eq. 1, with the up-sampled decoder map as the gating signal."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = channels // 2
        self.from_skip, self.norm_skip = nn.Conv2d(channels, inside, 1), nn.BatchNorm2d(inside)
        self.from_signal, self.norm_signal = nn.Conv2d(channels, inside, 1), nn.BatchNorm2d(inside)
        self.psi, self.norm_psi = nn.Conv2d(inside, 1, 1), nn.BatchNorm2d(1)

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        """Both (N, C, H, W); the skip, weighed pixel by pixel."""
        skip, signal = trimmed(skip, signal)
        query = self.norm_skip(self.from_skip(skip)) + self.norm_signal(self.from_signal(signal))
        return skip * torch.sigmoid(self.norm_psi(self.psi(functional.relu(query))))


class AttentionUNet(UNet):
    """A U-Net with a gate on every skip."""

    def __init__(self, width: int, in_channels: int, classes: int) -> None:
        super().__init__(width, in_channels, classes)
        self.gate3 = Gate(8 * width)
        self.gate2 = Gate(4 * width)
        self.gate1 = Gate(2 * width)
        self.gate0 = Gate(width)

    def forward(self, image: Tensor) -> Tensor:
        """Each encoder map passes its gate first."""
        e0, e1, e2, e3, e4 = self.encode(image)
        u3 = self.up3(e4)
        d3 = self.right3(joined(self.gate3(e3, u3), u3))
        u2 = self.up2(d3)
        d2 = self.right2(joined(self.gate2(e2, u2), u2))
        u1 = self.up1(d2)
        d1 = self.right1(joined(self.gate1(e1, u1), u1))
        u0 = self.up0(d1)
        d0 = self.right0(joined(self.gate0(e0, u0), u0))
        return self.head(d0)


class UNetPlusPlus(nn.Module):
    """Zhou et al. (2018), fig. 1a, with a head on each of the four full-resolution maps."""

    def __init__(self, width: int, in_channels: int, classes: int) -> None:
        super().__init__()
        w0, w1, w2, w3, w4 = width, 2 * width, 4 * width, 8 * width, 16 * width
        self.x00 = Block(in_channels, w0)
        self.x10, self.x20, self.x30, self.x40 = Block(w0, w1), Block(w1, w2), Block(w2, w3), Block(w3, w4)
        self.x01, self.x11, self.x21, self.x31 = (Block(2 * w, w) for w in (w0, w1, w2, w3))
        self.x02, self.x12, self.x22 = (Block(3 * w, w) for w in (w0, w1, w2))
        self.x03, self.x13 = (Block(4 * w, w) for w in (w0, w1))
        self.x04 = Block(5 * w0, w0)
        self.up10, self.up11, self.up12, self.up13 = (nn.ConvTranspose2d(w1, w0, 2, stride=2) for _ in range(4))
        self.up20, self.up21, self.up22 = (nn.ConvTranspose2d(w2, w1, 2, stride=2) for _ in range(3))
        self.up30, self.up31 = (nn.ConvTranspose2d(w3, w2, 2, stride=2) for _ in range(2))
        self.up40 = nn.ConvTranspose2d(w4, w3, 2, stride=2)
        self.head1, self.head2, self.head3, self.head4 = (nn.Conv2d(w0, classes, 1) for _ in range(4))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Four maps of logits, the one of the last column first."""
        x00 = self.x00(image)
        x10 = self.x10(halved(x00))
        x20 = self.x20(halved(x10))
        x30 = self.x30(halved(x20))
        x40 = self.x40(halved(x30))
        x01 = self.x01(joined(x00, self.up10(x10)))
        x11 = self.x11(joined(x10, self.up20(x20)))
        x21 = self.x21(joined(x20, self.up30(x30)))
        x31 = self.x31(joined(x30, self.up40(x40)))
        x02 = self.x02(joined(x00, x01, self.up11(x11)))
        x12 = self.x12(joined(x10, x11, self.up21(x21)))
        x22 = self.x22(joined(x20, x21, self.up31(x31)))
        x03 = self.x03(joined(x00, x01, x02, self.up12(x12)))
        x13 = self.x13(joined(x10, x11, x12, self.up22(x22)))
        x04 = self.x04(joined(x00, x01, x02, x03, self.up13(x13)))
        return trimmed(self.head4(x04), self.head3(x03), self.head2(x02), self.head1(x01))


def pooled(x: Tensor, factor: int) -> Tensor:
    """Max pooling on a skip of UNet 3+; an incomplete window counts."""
    return functional.max_pool2d(x, factor, ceil_mode=True)


def enlarged(x: Tensor, factor: int, *, corners: bool = False) -> Tensor:
    """Bilinear up-sampling, by pixel areas unless by corners."""
    return functional.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=corners)


class UNet3Plus(nn.Module):
    """Huang et al. (2020), fig. 1c and 2, with deep supervision and the classification-guided module of fig. 3."""

    def __init__(self, width: int, in_channels: int) -> None:
        super().__init__()
        w, fused = width, 5 * width
        self.en1, self.en2 = Block(in_channels, w), Block(w, 2 * w)
        self.en3, self.en4, self.en5 = Block(2 * w, 4 * w), Block(4 * w, 8 * w), Block(8 * w, 16 * w)
        self.en1_de4, self.en2_de4, self.en3_de4 = Conv3(w, w), Conv3(2 * w, w), Conv3(4 * w, w)
        self.en4_de4, self.en5_de4 = Conv3(8 * w, w), Conv3(16 * w, w)
        self.en1_de3, self.en2_de3, self.en3_de3 = Conv3(w, w), Conv3(2 * w, w), Conv3(4 * w, w)
        self.de4_de3, self.en5_de3 = Conv3(fused, w), Conv3(16 * w, w)
        self.en1_de2, self.en2_de2 = Conv3(w, w), Conv3(2 * w, w)
        self.de3_de2, self.de4_de2, self.en5_de2 = Conv3(fused, w), Conv3(fused, w), Conv3(16 * w, w)
        self.en1_de1, self.de2_de1, self.de3_de1 = Conv3(w, w), Conv3(fused, w), Conv3(fused, w)
        self.de4_de1, self.en5_de1 = Conv3(fused, w), Conv3(16 * w, w)
        self.de4, self.de3, self.de2, self.de1 = (Conv3(fused, fused) for _ in range(4))
        self.side1, self.side2, self.side3, self.side4 = (nn.Conv2d(fused, 1, 3, padding=1) for _ in range(4))
        self.side5 = nn.Conv2d(16 * w, 1, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.organ = nn.Conv2d(16 * w, 2, 1)
        self.widest = nn.AdaptiveMaxPool2d(1)

    def supervise(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of the five sides, the finest first, and the two class logits (N, 2)."""
        e1 = self.en1(image)
        e2 = self.en2(halved(e1))
        e3 = self.en3(halved(e2))
        e4 = self.en4(halved(e3))
        e5 = self.en5(halved(e4))
        classes = self.widest(self.organ(self.dropout(e5))).flatten(1)
        to4 = self.en1_de4(pooled(e1, 8)), self.en2_de4(pooled(e2, 4)), self.en3_de4(pooled(e3, 2)), self.en4_de4(e4)
        d4 = self.de4(joined(*to4, self.en5_de4(enlarged(e5, 2))))
        to3 = self.en1_de3(pooled(e1, 4)), self.en2_de3(pooled(e2, 2)), self.en3_de3(e3)
        d3 = self.de3(joined(*to3, self.de4_de3(enlarged(d4, 2)), self.en5_de3(enlarged(e5, 4))))
        to2 = self.en1_de2(pooled(e1, 2)), self.en2_de2(e2), self.de3_de2(enlarged(d3, 2))
        d2 = self.de2(joined(*to2, self.de4_de2(enlarged(d4, 4)), self.en5_de2(enlarged(e5, 8))))
        to1 = self.en1_de1(e1), self.de2_de1(enlarged(d2, 2)), self.de3_de1(enlarged(d3, 4))
        d1 = self.de1(joined(*to1, self.de4_de1(enlarged(d4, 8)), self.en5_de1(enlarged(e5, 16))))
        sides = (
            self.side1(d1),
            enlarged(self.side2(d2), 2),
            enlarged(self.side3(d3), 4),
            enlarged(self.side4(d4), 8),
            enlarged(self.side5(e5), 16),
        )
        return trimmed(*sides), classes

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Probabilities, 0 in an image whose larger class logit is the first, and the class logits."""
        sides, classes = self.supervise(image)
        organ = classes.argmax(1).view(-1, 1, 1, 1)  # 1 where there is an organ
        return [torch.sigmoid(side) * organ for side in sides], classes

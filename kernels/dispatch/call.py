"""What is asked of the kernels: `Call`, one op at one shape.

A call's `key` is one line of text. It is the key of everything that is measured: rows of `skipcost kernels bench`,
the map of winners that dispatch reads, what `explain` prints. Needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from skipcost.unet_models.spec import check_flag, check_integer, suggest

OPS = (
    "conv_bn_relu",
    "conv_bn_relu_pool",
    "concat_conv_bn_relu",
    "conv_bn_relu_train",
    "up_conv",
    "tap_first",
    "crop_concat",
)
MERGING = ("concat_conv_bn_relu", "conv_bn_relu_train", "crop_concat")  # the ops that read more than one map
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MODES = ("inference", "training")
LARGEST = 2**31 - 1  # of any size: what a kernel takes as a number of 32 bits
AFFINE_BYTES = 8  # scale and shift of a channel, in fp32

_KEY = re.compile(
    r"(?P<op>\w+) n(?P<batch>\d+) (?P<sources>\d+x\d+x\d+(?:\+\d+x\d+x\d+)*)(?:>(?P<out_channels>\d+))?"
    r"(?: k(?P<kernel>\d+) p(?P<padding>\d+)(?P<relu> relu)?)?(?: x(?P<factor>\d+))?"
    r" (?P<precision>\w+) (?P<mode>\w+)"
)


@dataclass(frozen=True, slots=True)
class Call:
    """One op at one shape.

    sources: (C, H, W) of every map that is read, in order, before it is cropped to the smallest of them.
    out_channels: 0 for crop_concat, whose result has those of its sources. mode: "training" where gradients will be
    asked for. factor: by which tap_first's convolution sees the map up-sampled, bilinear. Fields that an op has no use
    for are put into one form, so that equal work has one key: a crop_concat has kernel 0, an up_conv is always kernel 2
    with stride 2, neither has padding or ReLU, a tap_first has no ReLU, and factor is 1 for all others.
    ValueError where no kernel could be asked for that.
    """

    op: str
    batch: int
    sources: tuple[tuple[int, int, int], ...]
    out_channels: int
    kernel: int = 3
    padding: int = 1
    relu: bool = True
    precision: str = "bf16"
    mode: str = "inference"
    factor: int = 1

    def __post_init__(self) -> None:
        """Check each field, then the combination."""
        for name, accepted in (("op", OPS), ("precision", PRECISIONS), ("mode", MODES)):
            if getattr(self, name) not in accepted:
                raise ValueError(suggest(name, getattr(self, name), accepted))
        check_integer("batch", self.batch, 1, LARGEST)
        self._check_sources()
        if self.op in ("crop_concat", "up_conv"):
            for name, value in (("kernel", 2 if self.op == "up_conv" else 0), ("padding", 0), ("relu", False)):
                object.__setattr__(self, name, value)
        if self.op == "tap_first":
            check_integer("factor", self.factor, 1, LARGEST)
            object.__setattr__(self, "relu", False)
        else:
            object.__setattr__(self, "factor", 1)
        if self.op not in ("crop_concat", "up_conv"):
            self._check_convolution()
        check_integer("out_channels", self.out_channels, *((0, 0) if self.op == "crop_concat" else (1, LARGEST)))

    def _check_sources(self) -> None:
        if not isinstance(self.sources, tuple) or not self.sources:
            message = f"sources={self.sources!r} is not a tuple of (C, H, W), one for each map that {self.op} reads"
            raise ValueError(message)
        if len(self.sources) > 1 and self.op not in MERGING:
            message = f"{self.op} reads one map, not {len(self.sources)}; several are for {', '.join(MERGING)}"
            raise ValueError(message)
        for source in self.sources:
            self._check_source(source)

    def _check_source(self, source: object) -> None:
        if not isinstance(source, tuple) or len(source) != 3:  # noqa: PLR2004 - C, H, W
            message = f"source {source!r} is not (C, H, W): three whole numbers for each map that {self.op} reads"
            raise ValueError(message)
        for name, size in zip(("channels", "height", "width"), source, strict=True):
            if type(size) is not int or not 1 <= size <= LARGEST:  # or the name would be written each time
                check_integer(f"{name} of source {source}", size, 1, LARGEST)

    def _check_convolution(self) -> None:
        if self.kernel not in (1, 3) or isinstance(self.kernel, bool):
            message = f"kernel={self.kernel!r} of {self.op} is not 1 or 3, the sizes that the kernels have"
            raise ValueError(message)
        check_integer("padding", self.padding, 0, self.kernel // 2)
        check_flag("relu", self.relu)
        if min(self.out_size) < 1:
            height, width = self.window
            message = (
                f"{self.op} of a {height}x{width} map with kernel={self.kernel} and padding={self.padding} has no "
                f"pixel: give maps of {self.kernel - 2 * self.padding} or more a side"
            )
            raise ValueError(message)

    @property
    def in_channels(self) -> int:
        """Channels of all sources together."""
        return sum(channels for channels, _, _ in self.sources)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the sources once they are cropped to the smallest of them."""
        return min(height for _, height, _ in self.sources), min(width for _, _, width in self.sources)

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result; of conv_bn_relu_pool's first, the second has half of them, rounded down."""
        height, width = self.window
        if self.op == "up_conv":
            return 2 * height, 2 * width
        lost = self.kernel - 1 - 2 * self.padding if self.kernel else 0
        return height * self.factor - lost, width * self.factor - lost

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.kernel**2 * self.in_channels * self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass, for the whole batch; of tap_first those over the up-sampled map."""
        height, width = self.window if self.op == "up_conv" else self.out_size
        return self.batch * self.weights * height * width

    @property
    def bytes(self) -> int:
        """Compulsory traffic of the forward pass: what is read of each input once, each output once, scale and shift.

        Of a source that is cropped only the window is read.
        """
        (height, width), (out_height, out_width) = self.window, self.out_size
        moved = self.in_channels * height * width
        moved += (self.out_channels or self.in_channels) * out_height * out_width
        if self.op == "conv_bn_relu_pool":
            moved += self.out_channels * (out_height // 2) * (out_width // 2)
        size = 4 if self.precision in ("fp32", "tf32") else 2
        return (self.batch * moved + self.weights) * size + AFFINE_BYTES * self.out_channels

    @property
    def key(self) -> str:
        """The call in one line, e.g. `conv_bn_relu n1 64x512x512>64 k3 p1 relu bf16 inference`."""
        text = f"{self.op} n{self.batch} " + "+".join("x".join(map(str, source)) for source in self.sources)
        if self.out_channels:
            text += f">{self.out_channels}"
        if self.op not in ("crop_concat", "up_conv"):
            text += f" k{self.kernel} p{self.padding}" + " relu" * self.relu
        if self.op == "tap_first":
            text += f" x{self.factor}"
        return f"{text} {self.precision} {self.mode}"

    @classmethod
    def parse(cls, key: str) -> Call:
        """Read a key back; ValueError if it is none."""
        found = _KEY.fullmatch(key)
        if found is None:
            message = (
                f"{key!r} is not a call's key: one reads 'conv_bn_relu n1 64x512x512>64 k3 p1 relu bf16 inference'"
            )
            raise ValueError(message)
        sources = tuple(_size(text) for text in found["sources"].split("+"))
        numbers = {name: int(found[name]) for name in ("kernel", "padding", "factor") if found[name] is not None}
        call = cls(
            op=found["op"],
            batch=int(found["batch"]),
            sources=sources,
            out_channels=int(found["out_channels"] or 0),
            relu=found["relu"] is not None,
            precision=found["precision"],
            mode=found["mode"],
            **numbers,
        )
        if call.key != key:
            message = f"{key!r} is not how a call's key is written; that one is {call.key!r}"
            raise ValueError(message)
        return call


def _size(text: str) -> tuple[int, int, int]:
    channels, height, width = map(int, text.split("x"))
    return channels, height, width

"""The network of an nnU-Net plan as nnU-Net builds it: its stages, and its parameters and MACs by arithmetic.

Counted from the plan alone and by no graph of ours, so that "equal" is a finding and not a claim. What is built is
PlainConvUNet of MIC-DKFZ/dynamic-network-architectures: each stage begins with the convolution that strides, padded by
half its kernel; the decoder grows maps by a transposed convolution as large as the stride, concatenates, convolves with
the kernel of the stage that it arrives at, and has a 1x1 head at every level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from skipcost.unet_models.spec import MAX_CHANNELS, MAX_DEPTH, check_flag, check_integer

Pair = tuple[int, int]  # along rows and columns
MOST = 64  # of a kernel's side, a stride, convolutions in a stage: beyond it a typing slip
READ = (  # the keywords that are read below, and conv_op, which says no more than the two sides of the patch
    *("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder"),
    *("conv_op", "conv_bias", "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs", "nonlin"),
    *("nonlin_kwargs", "nonlin_first"),
)


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters, and multiply-adds for one patch."""

    params: int
    macs: int

    def __add__(self, other: Count) -> Count:
        """Both together."""
        return Count(self.params + other.params, self.macs + other.macs)


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of the plan's network, finest first (`decoder_convs` deepest first, as plans have them)."""

    features: tuple[int, ...]
    kernels: tuple[Pair, ...]
    strides: tuple[Pair, ...]
    encoder_convs: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    norm: str  # the class's last name; empty where there is none
    affine: bool
    bias: bool
    dropout: str  # class and probability; empty where nothing is dropped
    act: str  # class and what it is given; empty where there is none
    act_first: bool
    unread: tuple[str, ...]  # keywords that nothing here looks at

    def sizes(self, height: int, width: int) -> tuple[Pair, ...]:
        """What each stage's maps measure; ValueError where the decoder's would not meet the encoder's."""
        found: list[Pair] = []
        extents = (height, width)
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            rows, columns = (
                (extent + 2 * (side // 2) - side) // step + 1
                for extent, side, step in zip(extents, kernel, stride, strict=True)
            )
            found.append(extents := (rows, columns))
        for above, below, stride in zip(found, found[1:], self.strides[1:], strict=False):
            if above != (below[0] * stride[0], below[1] * stride[1]):
                message = (
                    f"nnU-Net cannot run it: its strides take {height}x{width} to maps of {above[0]}x{above[1]} and "
                    f"{below[0]}x{below[1]}, which do not meet again; give each side a multiple of its strides' product"
                )
                raise ValueError(message)
        return tuple(found)

    def count(self, channels: int, classes: int, size: Pair) -> tuple[Count, Count]:
        """The network with its finest head alone, and the heads of its coarser levels."""
        sizes = self.sizes(*size)
        whole = Count(0, 0)
        for each in (*self._encoder(channels, sizes), *self._decoder(sizes)):
            whole += each
        finest, *coarser = (
            _conv((features, classes), (1, 1), place, biases=1)
            for features, place in zip(self.features[:-1], sizes, strict=False)
        )
        return whole + finest, sum(coarser, Count(0, 0))

    def _encoder(self, channels: int, sizes: tuple[Pair, ...]) -> Iterator[Count]:
        arriving = channels
        for stage, features in enumerate(self.features):
            for _ in range(self.encoder_convs[stage]):
                yield _conv((arriving, features), self.kernels[stage], sizes[stage], self._vectors)
                arriving = features

    def _decoder(self, sizes: tuple[Pair, ...]) -> Iterator[Count]:
        for stage, convs in zip(range(len(self.features) - 2, -1, -1), self.decoder_convs, strict=True):
            features, below = self.features[stage], self.features[stage + 1]
            yield _conv((below, features), self.strides[stage + 1], sizes[stage + 1], self.bias)  # the transposed one
            for arriving in (2 * features, *[features] * (convs - 1)):
                yield _conv((arriving, features), self.kernels[stage], sizes[stage], self._vectors)

    @property
    def _vectors(self) -> int:
        """Parameters for each channel that a convolution of a block and its norm make: bias, scale and shift."""
        return self.bias + 2 * (bool(self.norm) and self.affine)


def _conv(channels: Pair, kernel: Pair, places: Pair, biases: int) -> Count:
    """One convolution, at each of `places` rows and columns of its output, or of its input where it is transposed."""
    weights = channels[0] * channels[1] * kernel[0] * kernel[1]
    return Count(weights + biases * channels[1], weights * places[0] * places[1])


def read_stages(values: dict[str, Any]) -> Stages:
    """Read the keywords of PlainConvUNet, with its own defaults; KeyError and ValueError say what is wrong."""
    features = values["features_per_stage"]
    count = values["n_stages"] if "n_stages" in values or not isinstance(features, list) else len(features)
    check_integer("n_stages", count, 2, MAX_DEPTH + 1)
    norm, norm_values = _last(values.get("norm_op")), values.get("norm_op_kwargs") or {}
    affine = norm_values.get("affine", not norm.startswith("InstanceNorm"))  # torch's own defaults
    bias, first = values.get("conv_bias", False), values.get("nonlin_first", False)
    for name, flag in (("affine", affine), ("conv_bias", bias), ("nonlin_first", first)):
        check_flag(name, flag)
    return Stages(
        _numbers("features_per_stage", features, count, MAX_CHANNELS),
        _pairs("kernel_sizes", values["kernel_sizes"], count),
        _pairs("strides", values["strides"], count),
        _numbers("n_conv_per_stage", values["n_conv_per_stage"], count, MOST),
        _numbers("n_conv_per_stage_decoder", values["n_conv_per_stage_decoder"], count - 1, MOST),
        norm,
        affine,
        bias,
        _dropout(values),
        _named(values.get("nonlin"), values.get("nonlin_kwargs")),
        first,
        tuple(name for name in values if name not in READ),
    )


def _dropout(values: dict[str, Any]) -> str:
    given = values.get("dropout_op_kwargs") or {}
    return "" if given.get("p", 1) == 0 else _named(values.get("dropout_op"), given)


def _last(path: Any) -> str:
    """The last name of a class's path; empty for None."""
    return "" if path is None else str(path).rpartition(".")[2]


def _named(path: Any, given: dict[str, Any] | None) -> str:
    """A class with what it is given, but for inplace, which changes no result; empty for None."""
    told = ", ".join(f"{key}={value}" for key, value in (given or {}).items() if key != "inplace")
    return f"{_last(path)}({told})" if told and path is not None else _last(path)


def _numbers(name: str, value: Any, count: int, most: int) -> tuple[int, ...]:
    """A whole number for each stage; one number stands for all."""
    found = tuple(value) if isinstance(value, list) else (value,) * count
    if len(found) != count:
        message = f"its {name} has {len(found)} entries, {value}, for {count}"
        raise ValueError(message)
    for each in found:
        check_integer(name, each, 1, most)
    return found


def _pairs(name: str, value: Any, count: int) -> tuple[Pair, ...]:
    """Two whole numbers for each stage; one number stands for both sides."""
    entries = value if isinstance(value, list) else [value] * count
    if len(entries) != count:
        message = f"its {name} has {len(entries)} entries, {value}, for {count} stages"
        raise ValueError(message)
    found: list[Pair] = []
    for entry in entries:
        rows, *others = _numbers(name, entry, len(entry) if isinstance(entry, list) and entry else 2, MOST)
        if len(others) != 1:
            message = f"its {name} are {value}: not two numbers for each stage, and networks here are 2-D"
            raise ValueError(message)
        found.append((rows, others[0]))
    return tuple(found)

"""What is checked, timed and tuned: networks at sizes, their distinct calls, and how each call can be run.

A configuration is an implementation of a call with the tile that it launches: first the one that ships for the shape,
then every candidate of tuning. Needs no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

from skipcost.bench.units import MOST_SECONDS, parse_number
from skipcost.kernels.dispatch.call import OPS, Call
from skipcost.kernels.dispatch.network_calls import network_calls
from skipcost.kernels.ops.tiles import CANDIDATES, FEW_CHANNELS, Need, Tile, tile_for
from skipcost.unet_models.costs import edge_sizes
from skipcost.unet_models.spec import ModelSpec, check_integer, suggest

LIBRARIES = ("reference", "cudnn")  # implementations that are PyTorch's own; all others are ours
TILED = ("conv_bn_relu", "conv_bn_relu_pool", "concat_conv_bn_relu", "up_conv")  # ops whose kernels are told their tile
USEFUL = ("bf16", "fp16", "tf32", "fp32")  # all precisions, in the order in which they are run
INTERPRETED = ("fp32", "fp16")  # those that Triton's interpreter computes as a GPU does
LARGEST_SIDE = 8192
STEP_MACS = 3  # a training step multiplies as much again for the gradients of its inputs and of its weights

# The family at its usual size, without the bias that batch norm takes away again, and the network of 2015.
FAMILY = tuple(f"{variant}/d4/w64/concat/in_channels=3/bias=false" for variant in ("unet", "unet++", "unet3+"))
VALID = "unet/d4/w64/concat/padding=valid/norm=none"
NETWORKS = (*(f"{label}@512" for label in FAMILY), f"{VALID}@572")
# For Triton's interpreter, which takes 10 ms for what a GPU does in one step: one of each op, ragged and cropped.
TINY = ("unet/d1/w16/concat/in_channels=3@14", f"{VALID.replace('d4/w64', 'd1/w16')}@24", "unet3+/d1/w8/concat@6")


@dataclass(frozen=True, slots=True)
class Setting:
    """A network on a batch of square images, at inference or in training."""

    spec: ModelSpec
    size: int
    batch: int
    mode: str

    def calls(self, precision: str) -> list[Call]:
        """Everything that the network may ask of the kernels: behind each merge also what it takes to concatenate.

        And what it asks for under `backend=rewritten`, where a convolution follows an up-sampled map.
        """
        size = self.size
        asked = [call for _, call in network_calls(self.spec, self.batch, size, size, self.mode, precision)]
        return [*(each for call in asked for each in (call, *_concatenated(call))), *self._up_sampled(precision)]

    def _up_sampled(self, precision: str) -> list[Call]:
        """Return the convolutions that read nothing but a map that was up-sampled bilinearly, as UNet 3+ has them."""
        network = self.spec.graph()
        along = edge_sizes(network, (self.size, self.size))
        padding = 0 if network.padding == "valid" else 1
        made = []
        for edge in network.edges:
            if edge.conv and edge.shift > 0 and edge.mode == "bilinear":
                side = along[edge.name].source[0]
                call = Call(
                    "tap_first", self.batch, ((edge.in_channels, side, side),), edge.conv.out_channels,
                    padding=padding, precision=precision, mode=self.mode, factor=1 << edge.shift,
                )  # fmt: skip
                made.append(call)
        return made


def _concatenated(call: Call) -> list[Call]:
    """Return the concatenation, and the convolution of its result, in place of a call that reads several maps."""
    if len(call.sources) == 1 or call.op == "crop_concat":
        return []
    joined = ((call.in_channels, *call.window),)
    op = "conv_bn_relu" if call.op == "concat_conv_bn_relu" else call.op
    merge = Call("crop_concat", call.batch, call.sources, 0, precision=call.precision, mode=call.mode)
    return [merge, replace(call, op=op, sources=joined)]


def parse_network(text: str) -> tuple[ModelSpec, int]:
    """Read `LABEL@SIZE`; without a size 512, or 572 with padding=valid, as in 2015. ValueError says what is wrong."""
    label, separator, size = text.partition("@")
    spec = ModelSpec.parse(label)
    side = 572 if spec.padding == "valid" else 512
    if separator:
        if not (size.isascii() and size.isdecimal()):
            message = f"{text!r} is not a network at a size: write LABEL@SIZE, e.g. {NETWORKS[0]}"
            raise ValueError(message)
        side = int(size)
    check_integer(f"size of {label}", side, 1, LARGEST_SIDE)
    spec.graph().conv_macs(side, side)  # a size at which a map would vanish is refused here, with one that works
    return spec, side


def settings(networks: Iterable[str], batches: Sequence[tuple[int, str]]) -> list[Setting]:
    """Cross networks with (batch, mode); the 2015 network among them has its own size."""
    parsed = [parse_network(each) for each in networks]
    return [Setting(spec, size, batch, mode) for spec, size in parsed for batch, mode in batches]


def distinct(calls: Iterable[Call], ops: Sequence[str] = OPS) -> list[Call]:
    """Return each call once, in the order of first appearance, if its op is one of `ops`."""
    return list(dict.fromkeys(call for call in calls if call.op in ops))


def forward_form(call: Call) -> Call:
    """Return the call at inference where training changes nothing of what runs: everywhere but with statistics."""
    return call if call.op == "conv_bn_relu_train" else replace(call, mode="inference")


def need(call: Call) -> Need:
    """Return what the op itself decides on its tile by; an up_conv is one product with four columns per output."""
    height, width = call.out_size
    op, outputs, taps = "conv_bn_relu", call.out_channels, call.kernel**2
    if call.op == "up_conv":
        (height, width), op, outputs, taps = call.window, "up_conv", 4 * call.out_channels, 1
    channels = [source[0] for source in call.sources]
    counts = {"in_channels": call.in_channels, "out_channels": outputs, "taps": taps, "divisor": gcd(*channels)}
    return Need(
        op, height=height, width=width, batch=call.batch, precision=call.precision, sources=len(channels), **counts
    )


def form(call: Call, implementation: str) -> str:
    """Return the form of the kernel behind an implementation of a call; "" where it is told no tile."""
    if implementation in LIBRARIES or call.op not in TILED:
        return ""
    if implementation == "triton" and call.op != "up_conv" and len(call.sources) == 1:
        return "few" if call.in_channels <= FEW_CHANNELS else "pointer"
    return "pointer" if implementation == "triton" else implementation


def tiles(call: Call, implementation: str, architecture: str) -> list[Tile | None]:
    """Return the tiles with which an implementation of a call ships and is tuned, the shipped one first; None for none.

    architecture: "sm90" and the like, whose tuned tiles count; "" for none.
    """
    kind = form(call, implementation)
    if not kind:
        return [None]
    candidates = CANDIDATES[kind]
    if kind == "few":  # all taps of all channels must fit one step
        candidates = tuple(tile for tile in candidates if tile.depth >= call.kernel**2 * call.in_channels)
    return list(dict.fromkeys([tile_for(need(call), kind, architecture), *candidates]))


def add_selection(parser: argparse.ArgumentParser, seconds: int) -> None:
    """Add the options that choose what is run, and for how long."""
    parser.add_argument(
        "--networks", help=f"LABEL[@SIZE],... whose calls are taken; default on a GPU: {', '.join(NETWORKS)}"
    )
    parser.add_argument("--ops", help=f"only calls of these ops: {','.join(OPS)}")
    parser.add_argument(
        "--seconds",
        type=partial(parse_number, "--seconds", low=0, high=MOST_SECONDS, kind=float),
        default=seconds,
        help="begin nothing new after so long; what is left is named",
    )


def chosen(text: str | None, kind: str, accepted: Sequence[str]) -> tuple[str, ...]:
    """Read a list of names separated by commas, all of them where there is none; ValueError for an unknown one."""
    if text is None:
        return tuple(accepted)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in accepted:
            raise ValueError(suggest(kind, name, accepted))
    return names

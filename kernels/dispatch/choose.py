"""Which implementation runs a call, and why: measured where somebody measured it, else worked out by break-even.

A kernel of ours wins where the passes over memory that it saves take longer than what its product loses to cuDNN's:
that is decided per shape, never for a whole network. Nothing is timed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from skipcost.kernels.devices import VALUE_BYTES, Device, has_copy_engine, has_tensor_products
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.low_resolution.costs import KERNEL_SUMS
from skipcost.kernels.ops.tiles import FEW_CHANNELS

CUDNN_SHARE = 0.65  # of the matrix peak that cuDNN's convolutions reach: an assumption, until a card is measured
TRITON_SHARE = 0.86 * CUDNN_SHARE  # the best published Triton convolution against cuDNN: 85.9 %, pytorch#174989
MARGIN = 0.05  # a predicted win must be this large: the prediction is no better than that
ALIGNED = 16  # channels: what Triton knows of a stride, or nothing, and the least depth of a product
WIDE_LOAD = 8  # elements of 16 bits in 16 bytes: fewer channels in a row are loaded one by one
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {  # by op, what can run it; the first is what a card is judged against
    "conv_bn_relu": ("cudnn", "tma", "triton"),
    "conv_bn_relu_pool": ("cudnn", "tma", "triton"),
    "concat_conv_bn_relu": ("cudnn", "tma", "triton"),
    "conv_bn_relu_train": ("cudnn", "triton", "reference"),
    "up_conv": ("reference", "triton"),
    "tap_first": ("reference", "triton"),
    "crop_concat": ("reference", "triton"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a call. origin: "rule", "predicted" or "measured"; seconds: per implementation, as far as known."""

    implementation: str
    why: str
    origin: str
    seconds: dict[str, float]


@lru_cache(maxsize=4096)  # a network asks for the same few calls in every step
def choose(call: Call, card: Device | None) -> Choice:
    """Return what runs `call` on a card; None is a machine without one."""
    if card is None:
        return Choice("reference", "no GPU: the PyTorch reference runs", "rule", {})
    able = [name for name in IMPLEMENTATIONS[call.op] if not why_not(call, name, card)]
    found = winners.measured(call, card.names)
    known = {name: found[name].seconds for name in found if name in able or name == "reference"}
    if len(known) > 1:
        best = min(known, key=lambda name: known[name])
        others = ", ".join(f"{name} {known[name] * 1e6:.1f} us" for name in known if name != best)
        return Choice(best, f"measured {known[best] * 1e6:.1f} us ({others})", "measured", known)
    guessed = {name: predict(call, name, card) for name in able}
    first = able[0]
    best = min(guessed, key=lambda name: guessed[name])
    if best == first or guessed[best] > guessed[first] * (1 - MARGIN):
        return Choice(first, _why_first(call, first, card, guessed), "predicted", guessed)
    gain = guessed[first] / guessed[best]
    return Choice(best, f"{_saving(call)}: {gain:.2f}x of {first} at break-even", "predicted", guessed)


def why_not(call: Call, name: str, card: Device) -> str:
    """Say why an implementation cannot run a call on a card, or never should; empty where it may."""
    if name not in ("triton", "tma") or call.op in ("tap_first", "crop_concat"):  # whose kernels multiply no matrices
        return ""
    if not has_tensor_products(card.architecture):
        return f"on {card.architecture} Triton multiplies without tensor cores"
    return "" if call.op == "up_conv" else _why_not_convolve(call, name, card)


def _why_not_convolve(call: Call, name: str, card: Device) -> str:
    if call.precision == "fp32":
        return "full 32-bit products run without tensor cores"
    aligned = not any(channels % ALIGNED for channels, _, _ in call.sources)
    if name == "tma" and not has_copy_engine(card.architecture):
        return f"{card.architecture} has no copy engine"
    if name == "tma" and (not aligned or call.out_channels % WIDE_LOAD):
        return f"{ALIGNED} does not divide the channels of every map"
    few = len(call.sources) == 1 and call.in_channels <= FEW_CHANNELS
    return "" if aligned or few else f"{ALIGNED} does not divide the channels of every map: they are read one by one"


def _rate(card: Device, precision: str) -> float:
    """Return FLOP/s of products; what a card has no units for runs as fp32."""
    return card.flop_per_s.get(precision, card.flop_per_s["fp32"])


def predict(call: Call, name: str, card: Device) -> float:
    """Return seconds of an implementation: the slower of its product and its bytes, and the passes it adds.

    Each tensor is read and written once per kernel; what a small map keeps in the L2 cache is not taken off.
    """
    if call.op == "tap_first":
        return _predict_tap_first(call, name, card)
    ours = name in ("triton", "tma")
    rate = _rate(card, call.precision) * (TRITON_SHARE if ours else CUDNN_SHARE)
    product = max(2 * call.macs / rate, call.bytes / card.bandwidth_bytes_per_s)
    return product + (0 if ours else extra_bytes(call, name) / card.bandwidth_bytes_per_s)


def _predict_tap_first(call: Call, name: str, card: Device) -> float:
    """Return seconds of a convolution over an up-sampled map: its product, and what is written and read beside it.

    Both products are a library's. The reference forms the up-sampled map; ours the tap maps, and adds them up in fp32.
    """
    (height, width), (rows, columns) = call.window, call.out_size
    pixels = call.batch * height * width
    rate = _rate(card, call.precision) * CUDNN_SHARE
    if name == "reference":
        product, extra = call.macs, call.in_channels * pixels * call.factor**2 * VALUE_BYTES[call.precision]
        return max(2 * product / rate, call.bytes / card.bandwidth_bytes_per_s) + 2 * extra / card.bandwidth_bytes_per_s
    product, taps = call.weights * pixels, call.kernel**2 * call.out_channels * pixels * VALUE_BYTES["fp32"]
    sums = 2 * KERNEL_SUMS * call.batch * call.out_channels * rows * columns / card.flop_per_s["fp32"]
    return 2 * product / rate + max(sums, (call.bytes + 2 * taps) / card.bandwidth_bytes_per_s)


def extra_bytes(call: Call, name: str) -> float:
    """Count the bytes that PyTorch moves for a call beside those of its convolution, batch norm folded or not."""
    size = VALUE_BYTES[call.precision]
    height, width = call.window
    joined = 2 * call.batch * call.in_channels * height * width * size
    full = call.batch * call.out_channels * call.out_size[0] * call.out_size[1] * size
    extra = 0.0
    if call.op == "concat_conv_bn_relu" or (call.op == "conv_bn_relu_train" and len(call.sources) > 1):
        extra += joined
    if call.op == "conv_bn_relu_pool":
        extra += full
    if call.op == "conv_bn_relu_train":  # statistics, normalize: three passes; eager's ReLU two more
        extra += (5 if name == "reference" else 3) * full
    elif name == "reference" and call.op not in ("up_conv", "tap_first", "crop_concat"):
        extra += 4 * full
    return extra


def _saving(call: Call) -> str:
    if call.op == "tap_first":
        return f"multiplies channels on a map of 1/{call.factor**2} of the pixels"
    megabytes = extra_bytes(call, "cudnn") / 1e6
    return f"saves {megabytes:.3g} MB of traffic" if megabytes else "reads few channels better"


def _why_first(call: Call, first: str, card: Device, guessed: dict[str, float]) -> str:
    """Say what keeps each other implementation from being taken."""
    reasons: dict[str, list[str]] = {}
    for name in IMPLEMENTATIONS[call.op][1:]:
        if name == "reference":
            continue
        if not (reason := why_not(call, name, card)):
            ratio, reason = guessed[first] / guessed[name], "there is no pass over memory to save"
            if call.op == "tap_first":
                reason = f"{ratio:.2f}x of {first}: tap maps in fp32, written and read"
            elif extra_bytes(call, first):
                reason = f"{ratio:.2f}x of {first}; wins from {_break_even(call, card):.0%} of cuDNN's rate on"
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in reasons.items())


def _break_even(call: Call, card: Device) -> float:
    """Return the share of cuDNN's speed from which on a fused kernel wins: t / (t + what it saves)."""
    product = max(2 * call.macs / (_rate(card, call.precision) * CUDNN_SHARE), call.bytes / card.bandwidth_bytes_per_s)
    return product / (product + extra_bytes(call, "cudnn") / card.bandwidth_bytes_per_s)

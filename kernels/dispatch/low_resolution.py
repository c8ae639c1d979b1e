"""Which form a convolution over an up-sampled map takes under `backend=rewritten`, by counting, with the reason.

`choose` decides one call over an interpolated map, `choose_composed` one over a transposed convolution's; `rewritings`
lists the calls of a network, and `executed_macs` adds up what then runs. For tap-first the rule sees MACs, because
bytes and live memory are always in its favour: it forms no up-sampled map. The composed form does not form it either,
but keeps weights of its own, so there the rule sees both. Arithmetic alone, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipcost.kernels.dispatch import low_winners
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.low_resolution import costs
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.programs.low import UPS, low
from skipcost.unet_models.program import Op, lower
from skipcost.unet_models.sizes import Shape, measured
from skipcost.unet_models.topology import INTERPOLATIONS, SkipGraph

BAND = 2.5  # a MAC of the banded products takes as long as this many of a convolution: two cores, Xeon, AVX-512, fp32
# How many MACs of the direct form a CPU does in the time of one of tap-first's, which is in fp32. Measured with AMX,
# which multiplies bf16 (512 to 256 channels, x2: 2.5; 160 to 32, x8: 1.8).
CPU_RATES = {"fp32": 1.0, "tf32": 1.0, "16 bits": 3.0}
# A GPU multiplies 16 bits and adds in fp32, then a kernel sums the tap maps. By an H100's data sheet, a second.
GPU_MACS = {"fp32": 33.5e12, "tf32": 247e12, "16 bits": 494e12}
GPU_BYTES = 3.35e12
FEWEST = 2**16  # values of a map from which on a pass over it costs more than the handful of calls that save it
# A MAC of the composed form, its phases put in place, takes as long as this many of the direct form's: a Xeon with
# AVX-512 and AMX, 64 to 1024 channels, small maps of 32x32 and more. fp32: 0.7 to 1.13. 16 bits: 1.3 to 3.7; the worst
# stands here, because it would win little and rounds more. GPUs: nobody has measured.
COMPOSED = {("cpu", "fp32"): 1.1, ("cpu", "tf32"): 1.1, ("cpu", "16 bits"): 3.7}


@dataclass(frozen=True, slots=True)
class Choice:
    """Both forms of one call, whole batch: MACs, bytes of maps read and written, and bytes alive beside the input.

    tap_macs, tap_bytes and tap_live_bytes are those of the form at low resolution, which `rewritten` names: tap-first,
    without blocks that are used again for the next 16 rows, or composed, without the `kept_bytes` of its weights, which
    stay. taken: whether that form runs. why: the reason, in numbers.
    """

    direct_macs: int
    tap_macs: int
    direct_bytes: int
    tap_bytes: int
    direct_live_bytes: int
    tap_live_bytes: int
    taken: bool
    why: str
    rewritten: str = "tap-first"
    kept_bytes: int = 0

    @property
    def macs(self) -> int:
        """MACs of the form that is taken."""
        return self.tap_macs if self.taken else self.direct_macs

    @property
    def form(self) -> str:
        """The form that is taken: tap-first, composed or direct."""
        return self.rewritten if self.taken else "direct"


@dataclass(frozen=True, slots=True)
class Rewriting:
    """One edge of a network whose up-sampled map goes into a convolution, and what was chosen for it."""

    edge: str
    choice: Choice

    @property
    def form(self) -> str:
        """The form that is taken: tap-first, composed or direct."""
        return self.choice.form


def folds(weights: int, outputs: int) -> bool:
    """Whether a batch norm goes into its convolution's weights, anew in every call, of so many outputs an image.

    The weights, scaled, are in memory for that call: at most a quarter of the map that needs no second pass then.
    """
    return max(4 * weights, FEWEST) <= outputs


def precision_kind(precision: str) -> str:
    """Return the key of the rates for a case's precision: fp32, tf32 or 16 bits."""
    return precision if precision in ("fp32", "tf32") else "16 bits"


def choose(
    rows: Axis, columns: Axis, channels: tuple[int, int], batch: int = 1, *, kind: str = "fp32", device: str = "cpu"
) -> Choice:  # fmt: skip
    """Count both forms of a convolution of `channels` = (in, out) over an up-sampled map, and take the cheaper.

    Where both were measured on this machine, by one image, the faster is taken.
    """
    direct = costs.direct(rows, columns, channels, batch)
    products = costs.forward(rows, columns, channels, batch)
    value = 2 if kind == "16 bits" else 4
    low = batch * channels[0] * rows.extent * columns.extent * value
    up = batch * channels[0] * rows.length * columns.length * value
    out = batch * channels[1] * rows.output * columns.output * value
    if both := low_winners.measured(rows, columns, channels, kind, device):
        taken = both.tap_first < both.direct
        verdict = "less" if taken else "not less"
        why = (
            f"measured here: {both.tap_first * 1e3:.3g} ms, {verdict} than the direct form's {both.direct * 1e3:.3g} ms"
        )
    elif device == "cuda":
        taken, why = _weigh_on_gpu(rows, columns, channels, batch, kind)
    else:
        taken, why = _weigh_on_cpu(products, direct, CPU_RATES[kind])
    return Choice(direct, products.macs, low + 2 * up + out, low + out, up + out, out, taken, why)


def _weigh_on_cpu(products: costs.Products, direct: int, rate: float) -> tuple[bool, str]:
    """Return whether tap-first is taken, and why: MACs, in those of a convolution."""
    taken = rate * (products.taps + BAND * products.bands) < direct
    why = (
        f"{products.taps / 1e6:,.1f} M MACs over channels and {BAND} times {products.bands / 1e6:,.1f} M in bands"
        + (f", all times {rate} for products in fp32" if rate != 1 else "")
        + f", are {'less' if taken else 'not less'} than the direct form's {direct / 1e6:,.1f} M"
    )
    return taken, why


def _weigh_on_gpu(
    rows: Axis, columns: Axis, channels: tuple[int, int], batch: int, kind: str
) -> tuple[bool, str]:  # fmt: skip
    """Return whether tap-first is taken, and why: predicted time, each side its products and the bytes beside them."""
    low, up = batch * rows.extent * columns.extent, batch * rows.length * columns.length
    tap_maps = 4 * low * rows.kernel * columns.kernel * channels[1]  # bytes, in fp32
    sums = costs.KERNEL_SUMS * batch * rows.output * columns.output * channels[1] / GPU_MACS["fp32"]
    ours = tap_maps / 4 * channels[0] / GPU_MACS[kind] + max(sums, 2 * tap_maps / GPU_BYTES)
    up_bytes = up * channels[0] * (2 if kind == "16 bits" else 4)
    theirs = costs.direct(rows, columns, channels, batch) / GPU_MACS[kind] + 2 * up_bytes / GPU_BYTES
    why = (
        f"{ours * 1e6:,.1f} us for products, tap maps and sums are {'less' if ours < theirs else 'not less'} than "
        f"{theirs * 1e6:,.1f} us for the up-sampled map and its convolution, by an H100's data sheet, not measured"
    )
    return ours < theirs, why


def choose_composed(
    size: tuple[int, int], channels: tuple[int, int, int], padding: int, batch: int = 1, *,
    kind: str = "fp32", device: str = "cpu", mode: str = "inference", alone: bool = False, copied: bool = False,
) -> Choice:  # fmt: skip
    """Count both forms of a transposed convolution of a map of `size` and the 3x3 convolution behind it.

    channels: in, in between, out. alone: nothing is concatenated with the up-sampled map, so it is not copied. copied:
    copies of both weights are kept as well, to know them by. The composed form is taken where it is cheaper, a copy is
    saved, whose place its phases take, and what it keeps is no larger than the up-sampled map that it does not form: so
    the edge takes no more memory.
    """
    (height, width), (in_channels, between, out_channels) = size, channels
    pixels, up_pixels = batch * height * width, 4 * batch * height * width
    result = 4 * batch * (height - 1 + padding) * (width - 1 + padding)
    positions = batch * (height - 1 + 2 * padding) * (width - 1 + 2 * padding)
    direct = 4 * in_channels * between * pixels + 9 * between * out_channels * result
    macs = 16 * in_channels * out_channels * positions
    value = 2 if kind == "16 bits" else 4
    low, up, out = value * in_channels * pixels, value * between * up_pixels, value * out_channels * result
    phases, kept = value * 4 * out_channels * positions, value * (16 * in_channels + 10) * out_channels
    if copied:
        kept += value * ((4 * in_channels + 1) * between + (9 * between + 1) * out_channels)
    factor = COMPOSED.get((device, kind), 0.0)
    why = _why_not_composed(mode, alone=alone, measured=factor > 0)
    taken, why = (False, why) if why else _weigh_composed(factor, (macs, direct), kept, up)
    moved = low + (2 if alone else 4) * up + out, low + 2 * phases + 3 * out
    return Choice(direct, macs, *moved, up + out, phases + out, taken, why, "composed", kept)


def _why_not_composed(mode: str, *, alone: bool, measured: bool) -> str:
    """Return why the composed form is not taken whatever it costs; empty where its costs decide."""
    if mode != "inference":
        return "composed weights have no gradients, and would be made anew in every step of training"
    if not measured:
        return "nobody has measured the composed form on this device"
    return "nothing is concatenated, so no copy is saved, and the phases are no smaller than the map" if alone else ""


def _weigh_composed(factor: float, macs: tuple[int, int], kept: int, up: int) -> tuple[bool, str]:
    """Return whether the composed form is the cheaper of both (composed, direct) and keeps little, and why."""
    composed, direct = macs
    cheaper, small = factor * composed < direct, kept <= up
    why = (
        f"{factor} times {composed / 1e6:,.1f} M MACs, composed, are {'less' if cheaper else 'not less'} than the "
        f"direct form's {direct / 1e6:,.1f} M"
    )
    if cheaper:
        more = "not more" if small else "more"
        why += f", and the {kept / 2**20:,.1f} MiB of weights kept are {more} than the map's {up / 2**20:,.1f} MiB"
    return cheaper and small, why


def rewritings(
    graph: SkipGraph, height: int, width: int, *,
    batch: int = 1, precision: str = "fp32", device: str = "cpu", mode: str = "inference",
) -> tuple[Rewriting, ...]:  # fmt: skip
    """List every edge that can be rewritten, with both forms counted and the one that runs."""
    where = {"kind": precision_kind(precision), "device": device}
    made = []
    for op, reads, *_ in measured(low(lower(graph)), (height, width)):
        up, conv = (op.parts[0], op.conv) if op.kind in UPS else (None, None)
        if up and conv and not up.conv:
            rows, columns, channels = _call(op, reads)
            made.append(Rewriting(up.where, choose(rows, columns, channels, batch, **where)))
        elif up and conv and up.conv and not _crops(reads):
            three, alone = (up.conv.in_channels, up.conv.out_channels, conv.out_channels), len(reads) == 1
            size = reads[-1][1], reads[-1][2]
            choice = choose_composed(size, three, _padding(op), batch, **where, mode=mode, alone=alone, copied=False)
            made.append(Rewriting(up.where, choice))
    return tuple(made)


def executed_macs(
    graph: SkipGraph, height: int, width: int, *,
    batch: int = 1, precision: str = "fp32", device: str = "cpu", mode: str = "inference",
) -> int:  # fmt: skip
    """Count the MACs that `backend=rewritten` runs forwards, its banded products included.

    Composing weights, once after they change, is not in it.
    """
    made = rewritings(graph, height, width, batch=batch, precision=precision, device=device, mode=mode)
    saved = sum(each.choice.direct_macs - each.choice.macs for each in made)
    return batch * graph.conv_macs(height, width) - saved


def calls_to_measure(graph: SkipGraph, height: int, width: int, *, precision: str, device: str) -> tuple[Call, ...]:
    """List, once each, the calls over interpolated maps whose both forms can be measured: those of uncropped maps."""
    found = measured(low(lower(graph)), (height, width))
    linear = [_call(op, reads) for op, reads, *_ in found if op.kind in UPS and not op.parts[0].conv]
    calls = (low_winners.call_of(*each, precision_kind(precision), device) for each in linear)
    return tuple(dict.fromkeys(call for call in calls if call))


def _padding(op: Op) -> int:
    conv = op.part_of("conv")
    return conv.padding if conv else 0


def _crops(reads: list[Shape]) -> bool:
    """Whether the up-sampled map, the last of those read, is larger than another one."""
    return any(other < 2 * side for each in reads[:-1] for other, side in zip(each[1:], reads[-1][1:], strict=True))


def _call(op: Op, reads: list[Shape]) -> tuple[Axis, Axis, tuple[int, int]]:
    """Rows, columns and channels of the convolution over an up-sampled map, the last of those that an op reads."""
    assert op.conv is not None
    up, (channels, *small) = op.parts[0], reads[-1]
    sides = []
    for axis, side in enumerate(small, 1):
        whole = side * up.factor
        length = min([whole, *(each[axis] for each in reads[:-1])])
        seen = (whole - length) // 2, length
        sides.append(Axis(side, up.factor, *INTERPOLATIONS[up.how], *seen, op.conv.kernel, _padding(op)))
    rows, columns = sides
    return rows, columns, (channels, op.conv.out_channels)

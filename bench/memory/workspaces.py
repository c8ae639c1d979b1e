"""What a GPU needs beyond live tensors, each with what is known of it: workspaces, batch norm's reserve, the context.

None of it follows from the network alone: cuDNN picks an algorithm by its own heuristics, by timing and by free memory.
So every part is an interval with its source, and the value that we would bet on. Nothing here was measured by us yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipcost.bench.memory.allocator import MIB
from skipcost.kernels.devices import VALUE_BYTES, capability
from skipcost.kernels.low_resolution import costs
from skipcost.kernels.low_resolution import parts as tap_parts
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import placed as placed_convolutions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from skipcost.bench.cases.case import Case
    from skipcost.bench.memory.liveness import LowCall, Storage
    from skipcost.kernels.devices import Device
    from skipcost.unet_models.sizes import PlacedConv

CUDNN_NORM = ("fp32", "tf32", "amp-fp16")  # where PyTorch leaves batch norm to cuDNN (Normalization.cpp)
TILE, TILE_OUTPUTS = 32, 30  # cuDNN's FFT_TILING: tiles of 32 x 32 give 30 x 30 outputs of a 3x3 convolution
CONTEXT = "CUDA context"  # the one part that is not the allocator's
CONTEXT_SOURCE = (
    "not measured yet on a card of ours. Elsewhere, with kernels loaded lazily: 274 MiB with a segment of 20 "
    "(pytorch/pytorch pull request 86509), about 400 MB (issue 109888), 426 MiB under torch 2.10 "
    "(unslothai/unsloth-zoo pull request 1053); with all of them loaded at once over 1000 MB (pytorch issue 107667)"
)
CONVOLUTION_SOURCE = (
    "cuDNN API reference, cudnnConvolutionFwdAlgo_t: IMPLICIT_GEMM needs none, GEMM the matrix of input patches, "
    "WINOGRAD_NONFUSED and FFT_TILING, both for contiguous maps, their transforms; its guide, data and filter formats: "
    "maps may be copied to channels_last for tensor cores. PyTorch's only cap is free memory (Conv_v8.cpp)"
)
CUBLAS_SOURCE = (
    "torch's CublasHandlePool.cpp, made with a thread's first matrix product; backend=eager has none, so that only a "
    "convolution without cuDNN would make it; tap-first has, in training also on autograd's own thread"
)
TAP_SOURCE = (
    "kernels/low_resolution/parts.py: packed weights, copied pixels and tap maps of tap-first forwards, by shapes; "
    "kernels/low_resolution/costs.py: its blocks backwards, at most, taken as one piece"
)
NEW_LAYOUT_NORMS = ("group", "instance")  # whose results are contiguous on a GPU, also of channels_last maps
NORM_SOURCE = (
    "torch's cudnn/BatchNorm.cpp asks for a reserve in the persistent mode (channels_last, training, no bf16, weights "
    "of 32 bits); cuDNN does not document its size: at most a bit per element, as its fused ReLU would need"
)


@dataclass(frozen=True, slots=True)
class Interval:
    """Bytes between `low` and `high`, both included; `likely` is the value to bet on. ValueError if out of order."""

    low: int
    high: int
    likely: int

    def __post_init__(self) -> None:
        """Refuse an interval that does not hold its own value."""
        if not 0 <= self.low <= self.likely <= self.high:
            message = f"an interval of bytes has 0 <= low <= likely <= high, not {self.low}, {self.likely}, {self.high}"
            raise ValueError(message)

    def __add__(self, other: Interval) -> Interval:
        """Bounds of the sum."""
        return Interval(self.low + other.low, self.high + other.high, self.likely + other.likely)

    def __or__(self, other: Interval) -> Interval:
        """Bounds of the larger of the two."""
        return Interval(max(self.low, other.low), max(self.high, other.high), max(self.likely, other.likely))


NOTHING = Interval(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Part:
    """A term beyond live bytes: at its largest in the first step, and in a later one.

    `kept`: it is allocated before the first step and stays; otherwise it comes and goes, or is not the allocator's.
    """

    name: str
    first: Interval
    steady: Interval
    source: str
    kept: bool = False


def value_bytes(case: Case) -> int:
    """Bytes of a value that the case's convolutions read and write."""
    return VALUE_BYTES[case.precision]


def parts(
    convolutions: Iterable[PlacedConv], case: Case, device: Device, low: Iterable[LowCall] = ()
) -> dict[str, Part]:  # fmt: skip
    """Every part of a case on a device, by a short name; workspaces at their largest over all calls.

    convolutions: those that run; low: calls of tap-first, which take the place of others.
    """
    chosen = tried = products = NOTHING
    for placed in convolutions:
        chosen |= chosen_workspace(placed, case)
        tried |= tried_workspace(placed, case)
    for call in low:
        products |= tap_workspace(call, case)
    first = chosen | tried if case.cudnn_benchmark else chosen
    threads = (1 + (case.mode == "training")) * (products != NOTHING)
    lasting = {
        "cublas": ("cuBLAS workspace", cublas_workspace(device, threads), CUBLAS_SOURCE),
        "norm": ("batch norm's reserve", norm_reserve(case), NORM_SOURCE),
    }
    return {
        "convolution": Part("convolution workspace", first, chosen, CONVOLUTION_SOURCE),
        **({"tap": Part("tap-first's workspace", products, products, TAP_SOURCE)} if threads else {}),
        **{key: Part(name, each, each, source, kept=True) for key, (name, each, source) in lasting.items()},
        "context": Part(CONTEXT, context(), context(), CONTEXT_SOURCE),
    }


def as_made(storage: Storage, case: Case) -> int:
    """Bytes of a weight before it is copied to the case's type and layout; 0 where nothing is copied."""
    if storage.kind != "parameter" or (case.layout == "contiguous" and case.precision not in ("bf16", "fp16")):
        return 0
    return storage.bytes * (2 if case.precision in ("bf16", "fp16") else 1)


def chosen_workspace(placed: PlacedConv, case: Case) -> Interval:
    """What the algorithm that cuDNN settles on may need for one call of a convolution, forward or backward."""
    copies, patches, winograd, _ = _needs(placed, case)
    if case.layout == "channels_last":
        return Interval(0, copies, 0)
    return Interval(0, max(copies, patches, winograd), 0 if case.precision == "fp32" else copies)


def tried_workspace(placed: PlacedConv, case: Case) -> Interval:
    """What cuDNN needs to time its algorithms: the largest workspace of all, in the first call of a shape.

    Nobody documents which algorithms are among them; we bet on those that copy to the other layout.
    """
    copies, patches, winograd, fft = _needs(placed, case)
    high = max(copies, patches) if case.layout == "channels_last" else max(copies, patches, winograd, fft)
    return Interval(0, high, copies)


def _needs(placed: PlacedConv, case: Case) -> tuple[int, int, int, int]:
    """Bytes of copies in another layout, of the matrix of patches, of Winograd's transforms, of the FFT's."""
    conv, images = placed.conv, case.batch
    positions = placed.height * placed.width
    read = positions // conv.kernel**2 if conv.transposed else positions
    if not conv.transposed and case.suite_spec.padding == "valid":
        read = (placed.height + conv.kernel - 1) * (placed.width + conv.kernel - 1)
    inputs, outputs = images * conv.in_channels * read, images * conv.out_channels * positions
    value = value_bytes(case)
    copies = value * (inputs + outputs + conv.weights)
    per_output = conv.out_channels if conv.transposed else conv.in_channels
    patches = value * images * per_output * (1 if conv.transposed else conv.kernel**2) * positions
    if conv.kernel != 3:  # noqa: PLR2004 - Winograd's and the FFT's forms are for 3x3
        return copies, patches, 0, 0
    winograd = 4 * 4 * (inputs + outputs)  # F(2x2, 3x3) in 32 bits: 16 values for every 4
    tiles = images * -(-placed.height // TILE_OUTPUTS) * -(-placed.width // TILE_OUTPUTS)
    spectrum = 8 * TILE * (TILE // 2 + 1)  # bytes of half a tile's complex values in 32 bits
    channels = tiles * (conv.in_channels + conv.out_channels) + conv.in_channels * conv.out_channels
    return copies, patches, winograd, spectrum * channels


def inside(call: LowCall, case: Case) -> dict[str, tap_parts.Inside]:
    """What a call of tap-first makes inside forwards, by scenario. Whether pixels are copied follows from the layout.

    Of channels_last maps they are not, except behind a norm whose result is contiguous: there it is our bet.
    """
    last = case.layout == "channels_last"
    bet = last and case.suite_spec.norm not in NEW_LAYOUT_NORMS
    layouts = {"low": last, "high": bet, "likely": bet}
    sizes = call.rows, call.columns, call.channels, case.batch, value_bytes(case)
    return {scenario: tap_parts.inside(*sizes, last=each) for scenario, each in layouts.items()}


def blocks(call: LowCall, case: Case) -> Interval:
    """What a call of tap-first makes inside backwards: at most, and for two images or more exactly, what is counted.

    It is taken as one piece, which it is not, so the allocator may find room for less than that.
    """
    most = costs.workspace_bytes(call.rows, call.columns, call.channels, value_bytes(case), backward=True)
    return Interval(0, most, most)


def tap_workspace(call: LowCall, case: Case) -> Interval:
    """The most that a call of tap-first makes inside, forwards and in training backwards."""
    forward = Interval(**{scenario: each.fullest for scenario, each in inside(call, case).items()})
    return forward | blocks(call, case) if case.mode == "training" else forward


def cublas_workspace(device: Device, threads: int = 0) -> Interval:
    """PyTorch's default workspace of a cuBLAS handle: 32 MiB from compute capability 9 on, 8.1 MiB before.

    threads: how many are known to multiply matrices, each with a handle of its own.
    """
    size = 32 * MIB if capability(device.architecture) >= 90 else (2 * 4096 + 8 * 16) << 10  # noqa: PLR2004 - see above
    return Interval(0, size * max(threads, 1), size * threads)


def norm_reserve(case: Case) -> Interval:
    """What cuDNN's batch norm keeps from forward to backward, over all layers."""
    cudnn = case.mode == "training" and case.layout == "channels_last" and case.precision in CUDNN_NORM
    convolutions = placed_convolutions(lower(case.graph()), (case.height, case.width))
    elements = sum(placed.outputs for placed in convolutions if placed.conv.norm == "batch") * case.batch
    return Interval(0, -(-elements // 8) if cudnn else 0, 0)


def context() -> Interval:
    """What the driver counts for a process beside the allocator's segments: the CUDA context and loaded kernels."""
    return Interval(256 * MIB, 1024 * MIB, 426 * MIB)

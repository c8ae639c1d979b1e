"""What is traced without data is what runs: the operators of public layers and functions, forwards and backwards.

A trace on tensors that only say they are on a CPU has the operators of a run there, below autograd and in order, for
every entry of `CALLS`, in 32 bits and in bfloat16. Where PyTorch has no kernel there is nothing to compare with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from profiled import profiled
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as PyTorch's own documentation has it
from torch.utils.checkpoint import checkpoint

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.measure import live_bytes as memory
from skipcost.bench.measure.budget import cost_of
from skipcost.bench.measure.counting import traced_peaks
from skipcost.bench.measure.live_bytes import APART_ON_CUDA, as_if_on
from skipcost.bench.measure.watching import Watching

pytestmark = pytest.mark.usefixtures("one_thread")
LINE, MAP, VOLUME, HEADS = (2, 4, 8), (2, 4, 8, 8), (2, 4, 4, 4, 4), (2, 2, 16, 8)
FREE = (
    "prim.device",
    "aten.detach",
    "aten.lift_fresh",
    "aten.slice",
    "aten.as_strided",
    "aten._has_compatible",
)  # make no storage
Call = Callable[[Tensor], Any]


def labels(x: Tensor) -> Tensor:
    """A class number for each position of maps (N, C, H, W)."""
    return torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.long, device=x.device)


def grid(x: Tensor) -> Tensor:
    """Where 5x5 samples of maps are taken."""
    return x.new_zeros(2, 5, 5, 2)


def sizes(mode: str, **how: Any) -> Call:
    """Double or halve a map in a mode."""
    return lambda x: F.interpolate(x, mode=mode, **{"scale_factor": 2.0} | how)


def layer(make: Callable[[], nn.Module], *, first: bool = False) -> Call:
    """Call a new layer, of which `first` takes the first result."""
    return lambda x: make()(x)[0] if first else make()(x)


def in_place(function: Callable[..., Tensor]) -> Call:
    """Call something that overwrites what it is given, on a map that may be."""
    return lambda x: function(x * 1, inplace=True)


def attention(**how: Any) -> Call:
    """Attention of maps to themselves, in heads."""
    return lambda x: F.scaled_dot_product_attention(x, x, x, **how)


def target(loss: Callable[..., Tensor], **how: Any) -> Call:
    """A loss beside something that needs no gradient."""
    return lambda x: loss(x, x.detach() * 2, **how)


ACTIVATIONS = (
    *("relu", "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "elu", "celu", "selu", "tanh"),
    *("leaky_relu", "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink", "logsigmoid", "sigmoid"),
)
CALLS: dict[str, tuple[tuple[int, ...], Call]] = {
    **{name: (MAP, getattr(F, name)) for name in ACTIVATIONS},
    **{
        f"{name} in place": (MAP, in_place(getattr(F, name)))
        for name in ("relu", "silu", "mish", "elu", "hardswish", "leaky_relu")
    },
    "gelu tanh": (MAP, lambda x: F.gelu(x, approximate="tanh")),
    "glu": (MAP, lambda x: F.glu(x, 1)),
    "prelu": (MAP, layer(lambda: nn.PReLU(4))),
    "rrelu": (MAP, lambda x: F.rrelu(x, training=True)),
    "softmax": (MAP, lambda x: F.softmax(x, 1)),
    "log_softmax": (MAP, lambda x: F.log_softmax(x, 1)),
    "dropout": (MAP, lambda x: F.dropout(x, 0.5, training=True)),
    "dropout2d": (MAP, lambda x: F.dropout2d(x, 0.5, training=True)),
    "alpha_dropout": (MAP, lambda x: F.alpha_dropout(x, 0.5, training=True)),
    "batch norm": (MAP, layer(lambda: nn.BatchNorm2d(4))),
    "batch norm known": (MAP, layer(lambda: nn.BatchNorm2d(4).eval())),
    "instance norm": (MAP, layer(lambda: nn.InstanceNorm2d(4, affine=True))),
    "group norm": (MAP, layer(lambda: nn.GroupNorm(2, 4))),
    "layer norm": (MAP, layer(lambda: nn.LayerNorm([8]))),
    "rms norm": (MAP, layer(lambda: nn.RMSNorm([8]))),
    "local response norm": (MAP, lambda x: F.local_response_norm(x, 3)),
    "weight norm": (MAP, layer(lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))),
    "spectral norm": (MAP, layer(lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)))),
    "normalize": (MAP, F.normalize),
    "max pool 1d": (LINE, lambda x: F.max_pool1d(x, 2)),
    "max pool": (MAP, lambda x: F.max_pool2d(x, 2)),
    "max pool 3d": (VOLUME, lambda x: F.max_pool3d(x, 2)),
    "max unpool": (MAP, lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    "average pool": (MAP, lambda x: F.avg_pool2d(x, 2)),
    "average pool 3d": (VOLUME, lambda x: F.avg_pool3d(x, 2)),
    "lp pool": (MAP, lambda x: F.lp_pool2d(x, 2, 2)),
    "adaptive average": (MAP, lambda x: F.adaptive_avg_pool2d(x, 3)),
    "adaptive average to one": (MAP, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive maximum": (MAP, lambda x: F.adaptive_max_pool2d(x, 3)),
    "nearest": (MAP, sizes("nearest")),
    "nearest-exact": (MAP, sizes("nearest-exact")),
    "bilinear": (MAP, sizes("bilinear")),
    "bicubic": (MAP, sizes("bicubic")),
    "area": (MAP, sizes("area", scale_factor=0.5)),
    "bilinear antialias": (MAP, sizes("bilinear", scale_factor=0.5, antialias=True)),
    "bicubic antialias": (MAP, sizes("bicubic", scale_factor=0.5, antialias=True)),
    "linear resize": (LINE, sizes("linear")),
    "trilinear": (VOLUME, sizes("trilinear")),
    "grid_sample": (MAP, lambda x: F.grid_sample(x, grid(x), align_corners=False)),
    "pixel_shuffle": (MAP, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (MAP, lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": (MAP, lambda x: F.channel_shuffle(x, 2)),
    "unfold": (MAP, lambda x: F.unfold(x, 3)),
    "fold": ((2, 36, 36), lambda x: F.fold(x, (8, 8), 3)),
    "pad": (MAP, lambda x: F.pad(x, [1] * 4)),
    "pad reflect": (MAP, lambda x: F.pad(x, [1] * 4, mode="reflect")),
    "pad circular": (MAP, lambda x: F.pad(x, [1] * 4, mode="circular")),
    "conv 1d": (LINE, layer(lambda: nn.Conv1d(4, 4, 3))),
    "conv": (MAP, layer(lambda: nn.Conv2d(4, 4, 3))),
    "conv 3d": (VOLUME, layer(lambda: nn.Conv3d(4, 4, 3))),
    "conv same": (MAP, layer(lambda: nn.Conv2d(4, 4, 3, padding="same"))),
    "depthwise": (MAP, layer(lambda: nn.Conv2d(4, 4, 3, groups=4))),
    "transposed": (MAP, layer(lambda: nn.ConvTranspose2d(4, 4, 2, 2))),
    "linear": (MAP, layer(lambda: nn.Linear(8, 3))),
    "einsum": (MAP, lambda x: torch.einsum("nchw,ndhw->ncd", x, x)),
    "matmul": (MAP, lambda x: x @ x),
    "baddbmm": (LINE, lambda x: torch.baddbmm(x.new_zeros(2, 4, 4), x, x.mT)),
    "cdist": (LINE, lambda x: torch.cdist(x, x + 1)),
    "attention": (HEADS, attention()),
    "attention causal": (HEADS, attention(is_causal=True)),
    "attention masked": (HEADS, lambda x: attention(attn_mask=x.new_zeros(16, 16))(x)),
    "attention dropped": (HEADS, attention(dropout_p=0.1)),
    "attention one head": ((2, 16, 8), attention()),
    "multi-head": (LINE, lambda x: nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x, need_weights=False)[0]),
    "multi-head weights": (LINE, lambda x: nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x)[0]),
    "encoder layer": (LINE, layer(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))),
    "gru": (LINE, layer(lambda: nn.GRU(8, 8, batch_first=True), first=True)),
    "rnn": (LINE, layer(lambda: nn.RNN(8, 8, batch_first=True), first=True)),
    "embedding": (LINE, lambda x: F.embedding(torch.zeros(2, 3, dtype=torch.long, device=x.device), x[0])),
    "mse": (MAP, target(F.mse_loss)),
    "l1": (MAP, target(F.l1_loss)),
    "smooth l1": (MAP, target(F.smooth_l1_loss)),
    "huber": (MAP, target(F.huber_loss)),
    "bce": (MAP, lambda x: F.binary_cross_entropy(torch.sigmoid(x), x.detach() * 0)),
    "bce logits": (MAP, target(F.binary_cross_entropy_with_logits)),
    "nll": (MAP, lambda x: F.nll_loss(x, labels(x))),
    "cross entropy": (MAP, lambda x: F.cross_entropy(x, labels(x))),
    "cross entropy smoothed": (MAP, lambda x: F.cross_entropy(x, labels(x), label_smoothing=0.1)),
    "kl": (MAP, target(F.kl_div, reduction="batchmean")),
    "cosine": (MAP, lambda x: F.cosine_similarity(x, x + 1)),
    "variance": (MAP, lambda x: x.var(1)),
    "cumsum": (MAP, lambda x: x.cumsum(1)),
    "roll": (MAP, lambda x: x.roll((1, 1), (2, 3))),
    "topk": (MAP, lambda x: x.topk(2, 1)[0]),
    "checkpoint": (
        MAP, lambda x: checkpoint(nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU()), x, use_reentrant=False),
    ),
}  # fmt: skip


def operators(call: Call, x: Tensor, mode: str) -> list[str]:
    """What a call dispatches, and in training its way back, but for what makes no storage."""
    seen: list[str] = []
    watch = Watching(lambda func, *_call: seen.append(str(func)))
    with watch, torch.inference_mode() if mode == "inference" else contextlib.nullcontext():
        result = call(x)
        if mode == "training":
            result.float().sum().backward()
    return [name for name in seen if not name.startswith(FREE)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_the_traced_operators_are_those_that_run(name: str, dtype: torch.dtype) -> None:
    """In order, forwards and backwards, and in inference mode."""
    shape, call = CALLS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for mode in ("training", "inference"):
            training = mode == "training"
            try:
                run = operators(call, torch.ones(shape, requires_grad=training), mode)
            except NotImplementedError as error:
                assert "not implemented for 'BFloat16'" in str(error)  # noqa: PT017 - no kernel, so nothing to hold
                continue
            x = torch.ones(shape, requires_grad=training, device="meta")
            with as_if_on("cpu", [x]):
                assert operators(call, x, mode) == run
    finally:
        torch.set_default_dtype(before)


FORMS = ("silu", "mish", "gelu", "hardswish", "attention", "mha", "lstm", "kept", "loose")
ROOM = {("mha", "training"): 0.25}  # three gradients of one tensor, which autograd adds in place when nothing watches


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, mode) for form in FORMS for mode in CHOICES["mode"] if (form, mode) != ("lstm", "training")],
)
def test_the_predicted_peak_is_that_of_a_run_that_nothing_watches(form: str, mode: str) -> None:
    """A profiled run on the CPU: within 3 %, or where gradients meet what autograd saves by adding them in place."""
    case = Case(spec=Factory("custom_models:Middle", f'{{"form": "{form}"}}'), height=32, width=32, mode=mode)

    steady = traced_peaks(case)[0]

    assert steady.note == ""
    assert steady.samples[0] == pytest.approx(profiled(case, 2).peaks[-1], rel=ROOM.get((form, mode), 0.03))


def test_what_a_library_keeps_by_its_own_rules_is_said() -> None:
    """OneDNN's workspace of a recurrent layer in training has a size that it alone knows."""
    case = Case(spec=Factory("custom_models:Middle", '{"form": "lstm"}'), height=4, width=4, mode="training")

    assert "LSTM: what oneDNN or cuDNN keeps" in traced_peaks(case)[0].note


def test_layers_in_another_form_on_a_card_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch without CUDA cannot take CUDA's forms: the row says whose, and that the figure is approximate."""
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    notes = {
        form: traced_peaks(
            Case(spec=Factory("custom_models:Middle", f'{{"form": "{form}"}}'), height=8, width=8, device="cuda")
        )[0].note
        for form in ("lstm", "silu")
    }

    assert notes["lstm"].startswith("LSTM: traced in the CPU's form, since this PyTorch has none of CUDA's")
    assert notes["lstm"].endswith("approximate")
    assert notes["silu"] == ""


def test_operators_with_a_kernel_of_the_cpu_alone_are_known() -> None:
    """Of all composites that have a kernel beside their parts, those that CUDA runs as parts are in the table."""
    has, composite = torch._C._dispatch_has_kernel_for_dispatch_key, torch._C.DispatchKey.CompositeImplicitAutograd
    names = (each for each in torch._C._dispatch_get_all_op_names() if each.startswith("aten::"))
    both = {each for each in names if has(each, composite) and has(each, "CPU")}

    assert both - {"aten::silu_backward", "aten::mish_backward"} == APART_ON_CUDA


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("silu_backward", set()),
        ("mish_backward", set()),
        ("native_channel_shuffle", {"cuda"}),
        ("max_pool2d", {"cpu", "cuda"}),
        ("convolution", set()),
    ],
)
def test_an_operator_is_taken_apart_where_the_device_does(name: str, apart: set[str]) -> None:
    """A kernel of the device's own comes before the parts; what has no parts is never taken apart."""
    func = getattr(torch.ops.aten, name).default

    assert {device for device in ("cpu", "cuda") if memory._is_composite(func, device)} == apart


class Sparse(nn.Module):
    """A product with a sparse matrix, behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(8).to_sparse())
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        """Take (1, 1, 8, 8)."""
        return torch.sparse.mm(self.matrix, self.conv(x).reshape(8, -1)).reshape(x.shape)


def test_a_sparse_tensor_takes_what_its_parts_take() -> None:
    """It has no storage of its own: of eight entries 128 bytes of indices and 32 of values are counted."""
    matrix = torch.eye(8).to_sparse()

    assert memory.LiveBytes([matrix]).live == 2 * 8 * 8 + 8 * 4
    assert memory.LiveBytes([matrix, matrix]).live == 160
    assert cost_of(Sparse(), [torch.zeros(1, 1, 8, 8)]).totals["peak_bytes"] >= 160 + 3 * 64 * 4

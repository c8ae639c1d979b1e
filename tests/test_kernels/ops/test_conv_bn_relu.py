"""`conv_bn_relu` and its relatives as ops: what they refuse, what they leave to the reference, what tracing sees.

The kernels behind them are checked in the files beside this one: `..._interpreted.py`, `..._edges_interpreted.py`, and
how they are launched in `test_kernels_conv.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.ops import conv_bn_relu as module
from skipcost.kernels.ops.conv_bn_relu import concat_conv_bn_relu, conv_bn_relu, conv_bn_relu_pool
from skipcost.kernels.ops.launch import Launch
from skipcost.kernels.verify.exact import allowed, conv, worst
from skipcost.unet_models.ops import ConvNormAct, conv_norm_act, crop_all
from skipcost.unet_models.topology import Conv

LAST = torch.channels_last
FORMATS = (torch.contiguous_format, LAST)
SHAPES = ((2, 3, 6, 7), (2, 2, 8, 7))  # the second is cropped by 2 rows
OPS: dict[str, Callable[..., Any]] = {
    "single": lambda x, *others: conv_bn_relu(x, *others, padding=1),
    "concat": lambda x, y, *others: concat_conv_bn_relu([x, y], *others, padding=1),
    "pool": lambda x, *others: conv_bn_relu_pool(x, *others, padding=1),
}


def _tensors(op: str, *, memory_format: torch.memory_format = LAST, device: str = "cpu", outputs: int = 4) -> Any:
    """Maps, weight, scale and shift of an op, as leaves that want gradients."""
    torch.manual_seed(0)
    shapes = SHAPES if op == "concat" else SHAPES[:1]
    maps = [torch.randn(shape, device=device).to(memory_format=memory_format) for shape in shapes]
    weight = torch.randn(outputs, sum(shape[1] for shape in shapes), 3, 3, device=device)
    vectors = [torch.randn(outputs, device=device) for _ in range(2)]
    return [each.requires_grad_() for each in (*maps, weight, *vectors)]


def _composed(op: str, tensors: Sequence[Tensor]) -> Any:
    """The same by PyTorch's own functions, from which autograd derives its own gradients."""
    *maps, weight, scale, shift = tensors
    total = functional.conv2d(torch.cat(crop_all(maps), 1), weight, padding=1)
    result = functional.relu(total * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    return (result, functional.max_pool2d(result, 2)) if op == "pool" else result


def _parts(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_computes_what_the_executors_op_does(dtype: torch.dtype, valid: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """With the norm's statistics as scale and shift it is the reference's convolution, norm and ReLU."""
    torch.manual_seed(0)
    layer = ConvNormAct(Conv(3, 8, 3, norm="batch", act=True), valid=valid).eval()
    assert isinstance(layer.norm, nn.BatchNorm2d)
    for vector in (layer.norm.weight, layer.norm.running_var):
        nn.init.uniform_(vector, 0.5, 1.5)
    for vector in (layer.norm.bias, layer.norm.running_mean):
        nn.init.normal_(vector)
    scale = layer.norm.weight / torch.sqrt(layer.norm.running_var + layer.norm.eps)
    shift = (layer.conv.bias - layer.norm.running_mean) * scale + layer.norm.bias
    x = torch.randn(2, 3, 6, 7).to(dtype)
    layer = layer.to(dtype)

    result = conv_bn_relu(x, layer.conv.weight, scale, shift, padding=0 if valid else 1)

    expected = conv_norm_act(layer, x)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}  # of a norm's own parameters, rounded
    torch.testing.assert_close(result, expected, **tolerance)
    assert result.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("op", OPS)
def test_a_cpu_launches_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients are those of PyTorch's own functions, in whichever memory format the maps come."""

    def refuse(launches: Sequence[Launch]) -> None:
        pytest.fail(f"launched {launches}")

    monkeypatch.setattr(module, "run", refuse)
    for memory_format in FORMATS:
        tensors = _tensors(op, memory_format=memory_format)
        results, expected = _parts(OPS[op](*tensors)), _parts(_composed(op, tensors))
        upstream = [torch.randn_like(each) for each in expected]
        grads, expected_grads = (torch.autograd.grad(each, tensors, upstream) for each in (results, expected))

        torch.testing.assert_close((*results, *grads), (*expected, *expected_grads))


def test_what_is_left_out_has_no_gradient() -> None:
    """Scale and shift may be None, ReLU may be off; then it is a convolution with its gradients."""
    x, weight, *_ = _tensors("single")

    result = conv_bn_relu(x, weight, None, None, padding=0, relu=False)

    expected = functional.conv2d(x, weight)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, [x, weight], grad), torch.autograd.grad(expected, [x, weight], grad)
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize(("memory_format", "wanted"), [(FORMATS[0], True), (LAST, False)], ids=str)
def test_opcheck_passes_on_the_reference(memory_format: torch.memory_format, wanted: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Schema, fake tensors, autograd and tracing of all ops are sound where the reference runs."""
    x, y, weight, scale, shift = (
        each.detach().requires_grad_(wanted) for each in _tensors("concat", memory_format=memory_format)
    )

    torch.library.opcheck(
        torch.ops.skipcost.conv_bn_relu.default, ([x, y], weight, scale, shift, 1, True, False, "auto")
    )
    torch.library.opcheck(
        torch.ops.skipcost.conv_bn_relu_pool.default, (x, weight[:, :3], None, shift, 0, False, False, "auto")
    )


@pytest.mark.parametrize("outputs", [4, 1])  # a single channel leaves the choice of a memory format open
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_have_the_layouts_of_real_ones(op: str, memory_format: torch.memory_format, outputs: int) -> None:
    """Without memory or data, results and gradients have the shapes and strides that a CPU gives them."""
    described = []
    for device in ("cpu", "meta"):
        tensors = _tensors(op, memory_format=memory_format, device=device, outputs=outputs)
        results = _parts(OPS[op](*tensors))
        grads = torch.autograd.grad(results, tensors, [torch.empty_like(each) for each in results])
        described.append([(each.shape, each.stride(), each.dtype) for each in (*results, *grads)])

    assert described[0] == described[1]


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # Dynamo's own, on Python 3.13.0
@pytest.mark.parametrize("op", OPS)
def test_compiled_code_calls_the_op_without_a_break(op: str) -> None:
    """torch.compile traces through the checks to the op and its gradients in one graph."""
    tensors = _tensors(op)
    program = torch.compile(OPS[op], backend="aot_eager", fullgraph=True)

    compiled, eager = _parts(program(*tensors)), _parts(OPS[op](*tensors))

    upstream = [torch.randn_like(each) for each in eager]
    grads, expected = (torch.autograd.grad(each, tensors, upstream) for each in (compiled, eager))
    torch.testing.assert_close((*compiled, *grads), (*eager, *expected))


class _Layer(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv_bn_relu(x, self.weight, None, None, padding=1)


def test_an_exported_program_holds_the_op() -> None:
    """torch.export keeps it as one call, for any batch size."""
    layer, x = _Layer(3, 4, 3), torch.randn(2, 3, 6, 7)

    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))

    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.skipcost.conv_bn_relu.default in called
    other = torch.randn(5, 3, 6, 7)
    torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("op", OPS)
def test_flops_are_those_of_conv2d(op: str) -> None:
    """FlopCounterMode counts the convolution over the joined maps; backwards two more and the one that is repeated."""
    tensors = _tensors(op)
    counts = []

    for function in (OPS[op], lambda *each: _composed(op, each)):
        with FlopCounterMode(display=False) as forward:
            results = _parts(function(*tensors))
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad([each.sum() for each in results], tensors)
        counts.append((forward.get_total_flops(), backward.get_total_flops()))

    once = counts[1][0]
    assert counts == [(once, 3 * once), (once, 2 * once)]


X, WEIGHT, VECTOR = torch.ones(2, 3, 6, 7), torch.ones(4, 3, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": []}, r"concat_conv_bn_relu got no maps: give it at least one of shape \(N, C, H, W\)"),
        ({"maps": [X[0]]}, r"map 0 of concat_conv_bn_relu has shape \(3, 6, 7\): every map must be \(N, C, H, W\)"),
        ({"maps": [X.int()]}, "map 0 .* is torch.int32, .* accepted: float32, float16, bfloat16, float64"),
        ({"maps": [X, X.half()]}, "map 1 .* is torch.float16 on cpu, map 0 is torch.float32 on cpu: bring all maps to"),
        ({"maps": [X, X.to("meta")]}, "map 1 .* is torch.float32 on meta, map 0 is torch.float32 on cpu"),
        ({"maps": [X, X[:1]]}, "map 1 .* has batch size 1, map 0 has 2: all maps must come from the same batch"),
        ({"weight": WEIGHT[0]}, r"weight .* has shape \(3, 3, 3\): \(O, C, 3, 3\) and \(O, C, 1, 1\) are supported"),
        ({"weight": WEIGHT[..., :2, :2]}, r"weight .* has shape \(4, 3, 2, 2\): \(O, C, 3, 3\) and"),
        ({"weight": WEIGHT[..., :1]}, r"weight .* has shape \(4, 3, 3, 1\): \(O, C, 3, 3\) and"),
        ({"weight": WEIGHT[:, :1]}, "the maps have 3 channels: the weight must read 3; groups, stride and dilation"),
        ({"weight": WEIGHT.half()}, "weight .* is torch.float16 on cpu, the maps are torch.float32 on cpu: bring"),
        ({"weight": WEIGHT.to("meta")}, "weight .* is torch.float32 on meta, the maps are torch.float32 on cpu"),
        ({"padding": 2}, "padding=2 of concat_conv_bn_relu is not supported; accepted: 0, 1"),
        ({"scale": VECTOR[:3]}, r"scale of .* has shape \(3,\): one number for each of 4 outputs"),
        ({"shift": VECTOR[None]}, r"shift of .* has shape \(1, 4\): one number for each of 4 outputs"),
        (
            {"scale": VECTOR.double()},
            "scale .* is torch.float64 on cpu: beside a weight of .*32 on cpu it must be .*32",
        ),
        ({"shift": VECTOR.to("meta")}, "shift .* is torch.float32 on meta: beside a weight of torch.float32 on cpu"),
        ({"maps": [X[:, :, :2]], "padding": 0}, "maps of 2x7: after cropping, nothing is left of a 3x3 convolution"),
        ({"form": "fast"}, "form='fast' of concat_conv_bn_relu is unknown; accepted: auto, pointer, tma, few"),
        (
            {"maps": [torch.ones(2, 8, 6, 7)], "weight": torch.ones(4, 8, 3, 3), "form": "few"},
            "cannot run in form few: 8 channels are more than 7; take form auto or pointer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    """One sentence says what was received and what is accepted, before anything is launched."""
    given = {"maps": [X], "weight": WEIGHT, "scale": VECTOR, "shift": VECTOR, "padding": 1, **change}

    with pytest.raises(ValueError, match=message):
        concat_conv_bn_relu(**given)


def test_a_result_without_a_whole_window_is_refused() -> None:
    """PyTorch's max_pool2d refuses it too, in its own words."""
    with pytest.raises(ValueError, match="would pool a result of 1x7: 2x2 is the least; give it a larger map"):
        conv_bn_relu_pool(X[:, :, :1], WEIGHT, None, None, padding=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["pointer", "tma", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_is_within_the_bound(dtype: torch.dtype, form: str) -> None:
    """Two maps of 64 channels, one cropped, at a size that no tile divides; fp32 without tf32 and with it."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 64, 70, 93), torch.randn(2, 64, 73, 93)]
    maps = [each.to("cuda", dtype).contiguous(memory_format=LAST) for each in maps]
    weight = torch.randn(64, 128, 3, 3, device="cuda", dtype=dtype)
    scale, shift = (torch.randn(64, device="cuda") for _ in range(2))
    exact = conv(maps, weight, scale, shift, padding=1, relu=True)

    for tf32 in (False, True):
        result = module._forward(maps, weight, scale, shift, 1, True, tf32, form)

        limit = allowed(exact, dtype, tf32=tf32 and dtype == torch.float32)
        assert worst(result, exact.value, limit) <= 1

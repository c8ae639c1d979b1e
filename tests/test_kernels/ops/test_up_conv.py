"""`up_conv`, `up_conv_concat` and `up_conv_into` as ops: what runs on a CPU, and what tracing sees.

The kernel behind them is checked in Triton's interpreter, in `..._interpreted.py` beside this file; how it is launched,
and what is refused, in `..._front.py`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from skipcost.bench.measure.fvcore_handles import HANDLES
from skipcost.kernels.ops import up_conv as module
from skipcost.kernels.ops.launch import Launch
from skipcost.kernels.ops.up_conv import up_conv, up_conv_concat, up_conv_into
from skipcost.kernels.verify import exact as validate
from skipcost.unet_models import ops as reference
from skipcost.unet_models.ops import crop

FORMATS = (torch.contiguous_format, torch.channels_last)
LARGER, NARROWER = (2, 5, 9, 12), (2, 1, 8, 11)  # beside an up-sampled map of 8 x 10: both are cropped


def _inputs(memory_format: torch.memory_format = torch.channels_last, device: str = "cpu") -> list[Tensor]:
    """Two maps, x, weight and bias, all of which want gradients."""
    torch.manual_seed(0)
    maps = [torch.randn(shape, device=device) for shape in (LARGER, NARROWER, (2, 4, 4, 5))]
    maps = [each.to(memory_format=memory_format) for each in maps]
    return [
        each.requires_grad_() for each in (*maps, torch.randn(4, 3, 2, 2, device=device), torch.randn(3, device=device))
    ]


def _concat(first: Tensor, second: Tensor, *rest: Tensor) -> Tensor:
    return up_conv_concat([first, second], *rest)


def _reference(first: Tensor, second: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = nn.ConvTranspose2d(4, 3, 2, stride=2)
    up = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    return reference.merge([first, second, up], "concat")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(given: list[Launch]) -> None:
        pytest.fail(f"launched {given}")

    monkeypatch.setattr(module, "run", refuse)


@pytest.mark.usefixtures("_no_launch")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_cpu_runs_the_reference(memory_format: torch.memory_format) -> None:
    """Without the interpreter nothing is launched on a CPU; values and gradients are the reference's, to rounding."""
    inputs, references = _inputs(memory_format), _inputs(memory_format)

    result, expected = _concat(*inputs), _reference(*references)

    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(expected)
    for actual, wanted in zip(
        torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, references, grad), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.usefixtures("_no_launch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cpu_takes_every_type(dtype: torch.dtype) -> None:
    """The convolution alone, forwards and backwards, in each type that the kernel takes."""
    inputs = [each.detach().to(dtype).requires_grad_() for each in _inputs()[2:]]

    result = up_conv(*inputs)
    grads = torch.autograd.grad(result, inputs, torch.ones_like(result))

    x, weight, bias = inputs
    assert torch.equal(result, functional.conv_transpose2d(x, weight, bias, stride=2))
    assert [each.dtype for each in (result, *grads)] == [dtype] * 4


@pytest.mark.usefixtures("_no_launch")
def test_into_fills_its_channels_with_the_centre_and_leaves_the_others() -> None:
    """A buffer smaller than the up-sampled map gets its middle, from the channel that was asked for."""
    x, weight, bias = (each.detach() for each in _inputs()[2:])
    buffer = torch.full((2, 6, 7, 9), 7.0).contiguous(memory_format=torch.channels_last)

    up_conv_into(x, weight, bias, buffer, 2)

    assert torch.equal(buffer[:, 2:5], crop(functional.conv_transpose2d(x, weight, bias, stride=2), 7, 9))
    assert torch.equal(buffer[:, [0, 1, 5]], torch.full((2, 3, 7, 9), 7.0))


def test_nothing_to_concatenate_is_the_convolution() -> None:
    """Without other maps, the concatenation is the up-sampled map itself."""
    *_, x, weight, bias = _inputs()

    assert torch.equal(up_conv_concat([], x, weight, bias), up_conv(x, weight, bias))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=2)), ids=str)
def test_only_wanted_gradients_are_made(wanted: tuple[bool, bool]) -> None:
    """Of a frozen layer the maps still learn, and the layer of frozen maps; what wants none gets none."""
    maps_want, layer_wants = wanted
    inputs = [each.detach() for each in _inputs()]
    for index, each in enumerate(inputs):
        each.requires_grad_(maps_want if index < 2 else layer_wants)

    result = _concat(*inputs)
    if any(wanted):
        result.sum().backward()

    assert [each.grad is not None for each in inputs] == [maps_want] * 2 + [layer_wants] * 3


def test_there_is_a_gradient_of_the_gradient() -> None:
    """ATen's op for the backward pass has one itself: penalties on gradients can be trained with."""
    inputs = tuple(each.detach().double().requires_grad_() for each in _inputs()[2:])

    assert torch.autograd.gradgradcheck(up_conv, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck_passes_on_the_reference(memory_format: torch.memory_format) -> None:
    """Schema, fake tensors, autograd and tracing of the ops are sound where the reference runs."""
    first, second, x, weight, bias = _inputs(memory_format)
    buffer = torch.zeros(2, 5, 8, 10).contiguous(memory_format=torch.channels_last)

    torch.library.opcheck(torch.ops.skipcost.up_conv.default, (x, weight, bias, False))
    torch.library.opcheck(torch.ops.skipcost.up_conv.default, (x.detach(), weight, None, True))
    torch.library.opcheck(torch.ops.skipcost.up_conv_concat.default, ([first, second], x, weight, bias, False))
    torch.library.opcheck(
        torch.ops.skipcost.up_conv_into.default, (x.detach(), weight.detach(), bias.detach(), buffer, 1, False)
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("function", [_concat, lambda *inputs: up_conv(*inputs[2:])], ids=["concat", "up_conv"])
def test_meta_tensors_have_the_layouts_of_real_ones(
    function: Callable[..., Tensor], memory_format: torch.memory_format
) -> None:
    """Without memory or data, result and gradients have the shapes and strides that a CPU gives them."""
    meta, real = _inputs(memory_format, "meta"), _inputs(memory_format)

    results = [function(*each) for each in (meta, real)]
    grads = [
        torch.autograd.grad(result, each, torch.empty_like(result), allow_unused=True)
        for result, each in zip(results, (meta, real), strict=True)
    ]

    assert results[0].device.type == "meta"
    assert (results[0].shape, results[0].stride()) == (results[1].shape, results[1].stride())
    for fake, true in zip(*grads, strict=True):
        assert (fake is None) == (true is None)
        assert fake is None or (fake.shape, fake.stride()) == (true.shape, true.stride())


def test_a_gpu_that_is_not_there_can_be_traced() -> None:
    """Under FakeTensorMode, CUDA tensors go through the ops without a GPU, and nothing is launched."""
    with FakeTensorMode():
        first, second, x, weight, bias = (
            torch.empty(each.shape, device="cuda", dtype=torch.bfloat16) for each in _inputs()
        )

        result = up_conv_concat([first, second], x, weight, bias)

    assert (result.shape, result.stride(), result.device.type) == ((2, 9, 8, 10), (720, 1, 90, 9), "cuda")


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # Dynamo's own, on Python 3.13.0
def test_compiled_code_calls_the_op_without_a_break() -> None:
    """torch.compile traces through the checks to the op, forwards and backwards, in one graph."""
    inputs, references = _inputs(), _inputs()
    program = torch.compile(lambda *each: _concat(*each) * 2, backend="aot_eager", fullgraph=True)

    result, expected = program(*inputs), _reference(*references) * 2

    assert torch.equal(result, expected)
    for actual, wanted in zip(
        torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), references), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # Dynamo's own, on Python 3.13.0
def test_compiled_code_may_write_into_a_buffer() -> None:
    """The op that writes into its argument is traced as one that does: what is read afterwards is there."""
    x, weight, bias = (each.detach() for each in _inputs()[2:])

    def program(x: Tensor) -> Tensor:
        buffer = torch.zeros(2, 5, 8, 10).contiguous(memory_format=torch.channels_last)
        up_conv_into(x, weight, bias, buffer, 1)
        return buffer + 1

    result = torch.compile(program, backend="aot_eager", fullgraph=True)(x)

    assert torch.equal(result, program(x))


class Decoder(nn.Module):
    """One step of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        """Concatenate the skip and the up-sampled map."""
        return up_conv_concat([skip], x, self.up.weight, self.up.bias)


def test_it_can_be_exported() -> None:
    """torch.export keeps the op as one node, and the exported program gives what the module gives."""
    inputs = torch.randn(LARGER), torch.randn(2, 4, 4, 5)
    decoder = Decoder()

    exported = torch.export.export(decoder, inputs)

    assert torch.ops.skipcost.up_conv_concat.default in [node.target for node in exported.graph.nodes]
    assert torch.equal(exported.module()(*inputs), decoder(*inputs))


def test_flops_are_counted_as_for_pytorchs_op() -> None:
    """Forwards and backwards, cropped or not, PyTorch's counter gives the same number as for conv_transpose2d."""
    counts = []
    for function in (_concat, _reference):
        with FlopCounterMode(display=False) as counter:
            function(*_inputs()).sum().backward()
        counts.append(counter.get_total_flops())
    x, weight, bias = _inputs()[2:]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        up_conv(x, weight, bias)
        up_conv_into(x, weight, bias, torch.empty(2, 3, 8, 10).contiguous(memory_format=torch.channels_last), 0)

    forward = 2 * (2 * 4 * 5) * (4 * 3 * 4)
    assert counts == [3 * forward, 3 * forward]
    assert counter.get_total_flops() == 2 * forward


def test_fvcore_can_be_told_what_the_op_counts() -> None:
    """Given a handle for the op, which it does not know, fvcore counts as many MACs as for PyTorch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it, and tracing for it, warn on recent PyTorch
        fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed: pip install 'skipcost[fvcore]'")
        x, skip = torch.randn(2, 4, 4, 5), torch.randn(LARGER)
        plain = fvcore.FlopCountAnalysis(nn.ConvTranspose2d(4, 3, 2, stride=2), x)
        ours = fvcore.FlopCountAnalysis(Decoder(), (skip, x))

        name = "skipcost::up_conv_concat"
        ours.set_op_handle(name, HANDLES[name]).unsupported_ops_warnings(False)

        assert ours.total() == plain.total() == (2 * 4 * 5) * (4 * 3 * 4)


@pytest.mark.numeric
def test_the_oracle_is_pytorchs_op() -> None:
    """What the kernel is judged by in the interpreter is what the reference computes."""
    x, weight, bias = (each.detach() for each in _inputs()[2:])

    exact = validate.up_conv(x, weight, bias)

    assert validate.worst(up_conv(x, weight, bias), exact.value, validate.allowed(exact, torch.float32)) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("channels", "outputs", "size"), [(128, 64, 128), (1024, 512, 32), (33, 5, 17)], ids=["last", "first", "odd"]
)
def test_a_gpu_meets_the_bound(dtype: torch.dtype, channels: int, outputs: int, size: int) -> None:
    """The last and the first of a U-Net's, and channels and sizes that nothing divides; the skip keeps its bits."""
    torch.manual_seed(0)
    x = torch.randn(2, channels, size, size, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, outputs, 2, 2, device="cuda", dtype=dtype)
    bias, skip = torch.randn(outputs, device="cuda", dtype=dtype), x.new_ones(2, 3, 2 * size + 1, 2 * size)
    exact = validate.up_conv(x, weight, bias)

    result = up_conv_concat([skip], x, weight, bias)

    tf32 = dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    assert validate.worst(result[:, 3:], exact.value, validate.allowed(exact, dtype, tf32=tf32)) <= 1
    assert torch.equal(result[:, :3], torch.ones_like(result[:, :3]))

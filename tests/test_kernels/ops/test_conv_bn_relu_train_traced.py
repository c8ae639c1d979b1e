"""What tracing sees of `conv_bn_relu_train`: its schema, fake tensors, gradients, FLOPs, compiled and exported code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_blocks import EXACT, make_layers, make_maps, make_vectors, reference, state

from skipcost.kernels.ops.conv_bn_relu_train import conv_bn_relu_train, train_step

OP, BACKWARD = torch.ops.skipcost.conv_bn_relu_train, torch.ops.skipcost.conv_bn_relu_train_backward


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_passes(grad: bool) -> None:  # noqa: FBT001 - parametrised
    """Schema, fake tensors, autograd and tracing of the op are sound, with and without gradients."""
    maps, vectors = make_maps(torch.float32, grad=grad), make_vectors(grad=grad)

    torch.library.opcheck(OP.default, (maps, *vectors, 1, 1e-5, True, False, "aten"))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck_passes_backwards(wanted: tuple[bool, bool]) -> None:
    """So is the op that computes the gradients, whichever of them are wanted."""
    maps, (weight, bias, gamma, beta) = make_maps(torch.float32, grad=False), make_vectors(grad=False)
    out, y, mean, variance = OP(maps, weight, bias, gamma, beta, 1, 1e-5, True, False, "aten")
    options = (1, 1e-5, True, False, "aten", *wanted)

    torch.library.opcheck(
        BACKWARD.default, (torch.randn_like(out), maps, weight, y, mean, variance, gamma, beta, *options)
    )


def test_gradcheck_passes() -> None:
    """The formulas agree with finite differences, those of gamma and beta included."""
    maps, vectors = make_maps(), [each.double().requires_grad_() for each in make_vectors(grad=False)]

    def function(*inputs: Tensor) -> Tensor:
        weight, gamma, beta = inputs[3:]
        result: Tensor = OP(list(inputs[:3]), weight, None, gamma, beta, 0, 1e-5, True, False, "aten")[0]
        return result

    assert torch.autograd.gradcheck(function, (*maps, vectors[0], *vectors[2:]), fast_mode=True)


@pytest.mark.parametrize(("side", "padding"), [(3, 1), (3, 0), (1, 0)])
def test_flops_are_counted_as_those_of_pytorchs_convolutions(side: int, padding: int) -> None:
    """Forwards like conv2d, backwards like convolution_backward; batch norm's few are left out, as PyTorch does."""
    maps, layers = make_maps(), make_layers(side, padding)

    with FlopCounterMode(display=False) as ours:
        conv_bn_relu_train(maps, *layers).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        reference(maps, *layers).sum().backward()

    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_meta_tensors_have_the_layouts_of_real_ones(memory_format: torch.memory_format) -> None:
    """Without memory or data, result and gradients have the shapes and strides that a CPU gives them."""

    def layouts(device: str) -> list[tuple[torch.Size, tuple[int, ...]]]:
        maps = [each.detach().to(memory_format=memory_format).requires_grad_() for each in make_maps(device=device)]
        layers = make_layers().to(device).to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's
        result = conv_bn_relu_train(maps, *layers)
        grads = torch.autograd.grad(result, [*maps, *layers.parameters()], torch.empty_like(result))
        return [(each.shape, each.stride()) for each in (result, *grads)]

    assert layouts("meta") == layouts("cpu")


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("outputs", [1, 4])
def test_sizes_of_one_leave_no_choice_of_strides(shape: tuple[int, ...], outputs: int) -> None:
    """Where strides fit two memory formats, ATen takes either: results and gradients have those of a new map."""

    def strides(device: str) -> list[tuple[int, ...]]:
        x = torch.zeros(shape, device=device)
        conv, norm = nn.Conv2d(shape[1], outputs, 1).to(device), nn.BatchNorm2d(outputs).to(device)
        out, y, norm_of_y = train_step([x.requires_grad_()], conv, norm)
        grads = torch.autograd.grad(out, [x, conv.weight], torch.empty_like(out))
        return [each.stride() for each in (out, y, norm_of_y.mean, *grads)]

    assert strides("cpu") == strides("meta")


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # Dynamo's own, on Python 3.13.0
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_code_calls_the_op_without_a_break(momentum: float | None) -> None:
    """torch.compile traces checks, op, gradients and the running statistics' update in one graph."""
    maps, layers = make_maps(), make_layers(momentum=momentum)
    twins = copy.deepcopy(layers)
    program = torch.compile(lambda *each: conv_bn_relu_train(each, *layers) * 2, backend="aot_eager", fullgraph=True)

    result, expected = program(*maps), reference(maps, *twins) * 2

    torch.testing.assert_close(result, expected, **EXACT)
    grads = torch.autograd.grad(result.square().sum(), [*maps, *layers.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [*maps, *twins.parameters()])
    for actual, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state(layers), state(twins), **EXACT)


class _Block(nn.Module):
    """A network of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_layers()

    def forward(self, maps: list[Tensor]) -> Tensor:
        return conv_bn_relu_train(maps, *self.layers)


def test_an_exported_program_holds_the_op() -> None:
    """torch.export keeps it as one node, and the program updates the running statistics."""
    block, maps = _Block(), make_maps(grad=False)
    twins = copy.deepcopy(block.layers)

    program = torch.export.export(block, (maps,))

    assert OP.default in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(maps), reference(maps, *twins), **EXACT)

"""The convolution kernels in Triton's interpreter: odd places in memory, numbers that are none, and the ops round them.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_conv_bn_relu_edges_interpreted.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_cases import (
    PRECISIONS,
    TILES,
    Case,
    assert_pooled,
    checked,
    convolve,
    error_of,
    make_inputs,
)
from kernel_checks import far_apart
from torch import Tensor, nn

from skipcost.kernels.ops import conv_bn_relu as module
from skipcost.kernels.ops.conv_bn_relu import concat_conv_bn_relu, conv_bn_relu, conv_bn_relu_pool, launches
from skipcost.kernels.ops.launch import Launch, run
from skipcost.kernels.programs.fuse import fuse
from skipcost.kernels.verify.canaries import LAYOUTS, amid
from skipcost.kernels.verify.exact import allowed, conv, worst
from skipcost.unet_models import REFERENCE, ModelSpec, build
from skipcost.unet_models.ops import ConvNormAct, Step, crop_all

FORMS = tuple(TILES)
SPOILT = {form: PRECISIONS[form][1:4] for form in FORMS}
LAST = torch.channels_last


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["pointer", "few"])
def test_maps_may_lie_in_any_way(form: str, layout: str) -> None:
    """Channels first, transposed, with gaps, with one channel that stands for all: "few" reads them as they are."""
    checked(Case(form, layouts=(layout,)))


@pytest.mark.parametrize(
    ("layout", "size"),
    [("contiguous", (1, 1)), ("contiguous", (1, 9)), ("channels_last", (1, 1)), ("channels_last", (9, 1))],
    ids=str,
)
@pytest.mark.parametrize(("form", "channels"), [("pointer", 1), ("pointer", 17), ("few", 1), ("few", 5)])
def test_ambiguous_strides_are_read_right(form: str, channels: int, layout: str, size: tuple[int, int]) -> None:
    """With one channel, pixel, row or column, strides fit both memory formats, and those of size 1 mean nothing."""
    checked(Case(form, channels=(channels,), size=size, layouts=(layout,)))


@pytest.mark.parametrize("out_layout", ["channels_last", "channel_slice", "window"])
@pytest.mark.parametrize("form", FORMS)
def test_results_may_be_parts_of_larger_maps(form: str, out_layout: str) -> None:
    """A slice of a wider map's channels, or a window, is written whole, its neighbours not at all; so is the pool."""
    checked(Case(form, size=(7, 11), pooled=True, out_layout=out_layout))


@pytest.mark.parametrize("form", FORMS)
def test_vectors_may_have_strides(form: str) -> None:
    """A column of a table and one number that stands for all are read by their strides, not by their first address."""
    case = Case(form, side=1, padding=0)
    inputs = make_inputs(case)
    table = torch.full((len(inputs.weight), 3), math.nan)
    table[:, 1] = torch.randn(len(inputs.weight))
    inputs = replace(inputs, scale=table[:, 1], shift=torch.tensor([0.5]).expand(len(inputs.weight)))

    out, _ = convolve(case, inputs)

    assert error_of(case, inputs, out) <= 1


@pytest.mark.parametrize(
    ("form", "precision", "relu"),
    [(form, name, (row + at) % 2 == 0) for row, form in enumerate(FORMS) for at, name in enumerate(SPOILT[form])],
)
def test_nan_and_infinity_spread_as_in_pytorch(form: str, precision: str, relu: bool) -> None:  # noqa: FBT001 - a parameter of the check
    """Every window that sees NaN, or infinities of both signs, is NaN, also behind ReLU and in the pooled map."""
    case = Case(form, precision, relu=relu, pooled=True)
    inputs = make_inputs(case)
    # NaN in one pixel of a pooled window and not in the others, and infinities that cancel where a window sees both.
    for place, number in {(0, 0, 2, 2): math.nan, (1, 2, 3, 4): math.inf, (1, 4, 3, 6): -math.inf}.items():
        inputs.maps[0][place] = number
    inputs.weight[3, 1, 0, 2] = math.nan  # spoils its own output channel and no other

    out, pooled = convolve(case, inputs)

    assert error_of(case, inputs, out) <= 1
    assert bool(out[:, 3].isnan().all())
    assert 0 < int(out[0, :3].isnan().sum()) < out[0, :3].numel() // 2
    assert pooled is not None
    assert_pooled(pooled, out)


@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("far", ["map", "out", "pooled"])
@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_31_bits(form: str, far: str, axis: int) -> None:
    """Images, rows or columns that lie so far apart that only a product of 64 bits finds the last of them."""
    case = Case(form, "fp16", batch=3, size=(6, 6), pooled=True, layouts=("channels_last",))
    inputs = make_inputs(case)
    outputs = len(inputs.weight)
    out, pooled = (torch.empty(3, outputs, *size, dtype=torch.half).to(memory_format=LAST) for size in ((6, 6), (3, 3)))
    if far == "map":
        inputs.maps[0] = far_apart(inputs.maps[0], axis)
    out = far_apart(out, axis) if far == "out" else out
    pooled = far_apart(pooled, axis) if far == "pooled" else pooled

    (launch,) = launches(
        inputs.maps, inputs.weight, inputs.scale, inputs.shift, out, padding=1, relu=True, pooled=pooled,
        tile=TILES[form],
    )  # fmt: skip
    run([launch])

    assert launch.constants.get("wide", True)
    assert error_of(case, inputs, out) <= 1
    assert_pooled(pooled, out)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the ops launch, in order; they may not round to tf32, as PyTorch's own on a CPU never do."""
    monkeypatch.setattr(module, "tf32_allowed", lambda: False)
    found: list[Launch] = []

    def record(launches: Sequence[Launch]) -> None:
        found.extend(launches)
        run(launches)

    monkeypatch.setattr(module, "run", record)
    return found


@pytest.mark.parametrize(
    ("form", "channels", "expected"),
    [
        ("auto", 3, "conv.conv_few"),
        ("auto", 16, "conv.conv"),
        ("pointer", 3, "conv.conv"),
        ("tma", 16, "conv_tma.conv"),
    ],
)
def test_the_ops_launch_the_kernel_that_is_asked_for(
    form: str, channels: int, expected: str, launched: list[Launch]
) -> None:
    """One launch each; "auto" takes the kernel of few channels where it can; the result is that of the reference."""
    x, weight = torch.randn(2, channels, 5, 6), torch.randn(16, channels, 3, 3)
    scale, shift = torch.randn(16), torch.randn(16)

    result = conv_bn_relu(x, weight, scale, shift, padding=1, form=form)

    assert [launch.kernel for launch in launched] == [expected]
    exact = conv([x], weight, scale, shift, padding=1, relu=True)
    assert worst(result, exact.value, allowed(exact, result.dtype)) <= 1
    assert result.stride() == torch.empty(result.shape, memory_format=LAST).stride()


@pytest.mark.parametrize("form", ["auto", "pointer", "tma"])
def test_an_empty_batch_has_an_empty_result(form: str) -> None:
    """Nothing is computed, in whatever form, and the shapes are right."""
    x, weight = torch.randn(0, 16, 5, 6), torch.randn(16, 16, 3, 3)

    full, pooled = conv_bn_relu_pool(x, weight, None, None, padding=1, form=form)

    assert (full.shape, pooled.shape) == ((0, 16, 5, 6), (0, 16, 2, 3))


def _run_op(op: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return an op as a function of its tensors, and tensors in float64: one map, or two that are cropped."""
    torch.manual_seed(0)
    shapes = [(1, 2, 4, 5), (1, 1, 3, 7)] if op == "concat" else [(2, 3, 4, 5)]
    maps = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    tensors = [*maps, weight, *(torch.randn(2, dtype=torch.float64) for _ in range(2))]
    functions: dict[str, Callable[..., Any]] = {
        "single": lambda *each: conv_bn_relu(*each, padding=1),
        "concat": lambda *each: concat_conv_bn_relu(each[:-3], *each[-3:], padding=1, form="pointer"),
        "pool": lambda *each: conv_bn_relu_pool(*each, padding=0),
    }
    return functions[op], [each.requires_grad_() for each in tensors]


@pytest.mark.parametrize("op", ["single", "concat", "pool"])
def test_gradcheck_passes_in_float64(op: str, launched: list[Launch]) -> None:
    """The gradients of all inputs agree with finite differences of the kernel itself."""
    function, tensors = _run_op(op)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert launched


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck_passes(wanted: bool) -> None:  # noqa: FBT001 - a parameter of the check
    """Schema, fake tensors, autograd and tracing of the ops are sound where the kernels run."""
    x, other = torch.randn(1, 2, 4, 5), torch.randn(1, 1, 6, 4).to(memory_format=LAST)
    weight, scale, shift = torch.randn(2, 3, 3, 3), torch.randn(2), torch.randn(2)
    x, other, weight, scale, shift = (each.requires_grad_(wanted) for each in (x, other, weight, scale, shift))
    joined = torch.cat(crop_all([x, other]), 1).detach().requires_grad_(wanted)

    torch.library.opcheck(
        torch.ops.skipcost.conv_bn_relu.default, ([x, other], weight, scale, shift, 1, True, False, "auto")
    )
    torch.library.opcheck(
        torch.ops.skipcost.conv_bn_relu_pool.default, (joined, weight, None, shift, 1, True, False, "auto")
    )


class Kernels:
    """The executor's ops on the convolution kernels, batch norm folded as it is at inference."""

    def layer(self, _: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        *ups, layer = layers
        maps = [*maps[:-1], ups[0](maps[-1])] if ups else maps
        options = {"padding": layer.conv.padding[0], "relu": layer.act}
        return concat_conv_bn_relu(maps, layer.conv.weight, *self._affine(layer), **options)

    def layer_pool(self, _: Step, layers: list[Any], maps: list[Any]) -> tuple[Tensor, Tensor]:
        (layer,), (x,) = layers, maps
        options = {"padding": layer.conv.padding[0], "relu": layer.act}
        return conv_bn_relu_pool(x, layer.conv.weight, *self._affine(layer), **options)

    def _affine(self, layer: ConvNormAct) -> tuple[Tensor | None, Tensor | None]:
        if layer.norm is None:
            return None, layer.conv.bias
        assert isinstance(layer.norm, nn.BatchNorm2d)
        scale = layer.norm.weight / torch.sqrt(layer.norm.running_var + layer.norm.eps)
        return scale, (layer.conv.bias - layer.norm.running_mean) * scale + layer.norm.bias


@pytest.mark.parametrize("spec", [ModelSpec(depth=2, width=4, padding="valid"), ModelSpec("unet++", depth=2, width=4)])
def test_a_network_errs_no_more_than_pytorchs_own(spec: ModelSpec, launched: list[Launch]) -> None:
    """Joined merges, pooled epilogues and plain convolutions of a whole network, against it in float64."""
    torch.manual_seed(0)
    ours = Kernels()
    functions = {"layer": ours.layer, "join_layer": ours.layer, "layer_pool": ours.layer_pool}
    ops = replace(REFERENCE.replacing(**functions), rewrite=fuse)
    network, reference = build(spec, ops).eval(), build(spec)
    size = 44 if spec.padding == "valid" else 16
    image = torch.randn(1, 1, size, size)
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # takes over the statistics of the one batch it sees, so that no ReLU cuts all away
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    reference.train()(image)
    network.load_state_dict(reference.eval().state_dict())

    with torch.no_grad():
        result, eager = network(image), reference(image)
        exact = reference.double()(image.double())

    assert {launch.kernel for launch in launched} == {"conv.conv", "conv.conv_few"}
    assert any(launch.arguments["pooled"] is not None for launch in launched)
    assert any(len(launch.arguments.get("sources", ())) > 1 for launch in launched)
    own = float((eager - exact).abs().max())
    assert 0 < float((result - exact).abs().max()) <= 2 * own


def test_canaries_lie_beside_what_the_kernels_read() -> None:
    """The inputs of the checks reach the kernels as they are, not as copies that would have no canaries round them."""
    case = Case("pointer", larger=((1, 3),))
    inputs = make_inputs(case)
    scale, shift, weight = inputs.scale, inputs.shift, inputs.weight
    out = amid(torch.zeros(2, len(weight), *case.size), "channels_last")

    (launch,) = launches(inputs.maps, weight, scale, shift, out, padding=1, relu=True, tile=TILES["pointer"])

    own = [*inputs.maps, weight, scale, shift]
    read = [*launch.arguments["sources"], *(launch.arguments[name] for name in ("weight", "scale", "shift"))]
    assert [a.untyped_storage().data_ptr() for a in own] == [b.untyped_storage().data_ptr() for b in read]

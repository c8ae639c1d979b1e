"""Tap-first up-sampling against interpolating, cropping and convolving: values, gradients, counts, and as an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.low_resolution import blocks as tap_blocks
from skipcost.kernels.low_resolution import tap_first as module
from skipcost.kernels.low_resolution.axis import BLOCK
from skipcost.kernels.low_resolution.tap_first import tap_first
from skipcost.kernels.verify import exact as validate

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = (("bilinear", False), ("bilinear", True), ("nearest", False))
LAST = torch.channels_last


@dataclass(frozen=True)
class Problem:
    """A call of the op."""

    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    settings: dict[str, Any]
    bias: bool = True
    layout: torch.memory_format = torch.contiguous_format

    def tensors(self, dtype: torch.dtype = torch.float64, *, positive: bool = False) -> list[Tensor]:
        """Map, weight and perhaps a bias, of normal values or of their absolute ones, which want gradients."""
        torch.manual_seed(0)
        weight = torch.randn(self.out_channels, self.shape[1], *self.kernel)
        made = [torch.randn(self.shape), weight, *([torch.randn(self.out_channels)] if self.bias else [])]
        cast = [each.to(torch.float64).to(dtype) for each in made]
        cast[0] = cast[0].contiguous(memory_format=self.layout)
        return [(each.abs() if positive else each).requires_grad_() for each in cast]

    @property
    def rounded(self) -> bool:
        """Whether weights of the interpolation are no binary fractions."""
        return self.settings["mode"] == "bilinear" and (self.settings["align_corners"] or self.settings["factor"] == 3)

    def run(self, tensors: list[Tensor]) -> Tensor:
        """Call the op."""
        return tap_first(*tensors, **self.settings)

    def reference(self, tensors: list[Tensor]) -> Tensor:
        """Up-sample, crop, convolve."""
        given, corners = self.settings, {}
        if given["mode"] == "bilinear":
            corners = {"align_corners": given["align_corners"]}
        up = functional.interpolate(tensors[0], scale_factor=given["factor"], mode=given["mode"], **corners)
        if given["window"]:
            top, left, height, width = given["window"]
            right, bottom = left + width - up.shape[3], top + height - up.shape[2]
            up = functional.pad(up, (-left, right, -top, bottom))
        bias = tensors[2] if len(tensors) > 2 else None
        return functional.conv2d(up, tensors[1], bias, padding=given["padding"])


def problem(shape: tuple[int, int, int, int] = (2, 3, 5, 4), out_channels: int = 4, **changes: Any) -> Problem:
    """A call like the executor's, with changes."""
    usual = {"factor": 2, "mode": "bilinear", "align_corners": False, "padding": 1, "window": None}
    settings = usual | {name: changes.pop(name) for name in usual if name in changes}
    return Problem(shape, out_channels, changes.pop("kernel", (3, 3)), settings, **changes)


@st.composite
def problem_strategy(draw: Any) -> Problem:
    """Any call: odd sizes, one block or several, crops, zeros around, kernels, layouts."""
    side = st.one_of(st.integers(1, 6), st.integers(BLOCK - 1, 2 * BLOCK + 2))
    batch, channels, height, width = draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(side), draw(side)
    factor = draw(st.sampled_from((1, 2, 3, 4, 8) if max(height, width) < BLOCK - 1 else (2, 3)))
    mode, align_corners = draw(st.sampled_from(WAYS))
    kernel = draw(st.sampled_from(((3, 3), (1, 1), (1, 3), (5, 3))))
    padding = draw(st.integers(0, min(kernel) - 1))
    seen = (0, 0, height * factor, width * factor)
    if window := draw(st.booleans()):
        top, left = (draw(st.integers(-2, size - 1)) for size in seen[2:])
        rows, columns = (
            draw(st.integers(max(1, 1 - start), size - start + 2))
            for start, size in zip((top, left), seen[2:], strict=True)
        )
        seen = (top, left, rows, columns)
    assume(all(seen[2 + axis] + 2 * padding >= kernel[axis] for axis in (0, 1)))
    settings = {"factor": factor, "mode": mode, "align_corners": align_corners, "padding": padding}
    settings["window"] = seen if window else None
    layout = draw(st.sampled_from((torch.contiguous_format, LAST)))
    return Problem(
        (batch, channels, height, width), draw(st.integers(1, 4)), kernel, settings, draw(st.booleans()), layout
    )


def _assert_within(actual: Tensor, wanted: Tensor, absolute: Tensor, terms: int, *, rounded: bool) -> None:
    """Both are sums of at most `terms` products, each of a few roundings: |error| <= gamma of the sum of |products|.

    Higham (2002), sec. 3.1; 32 more stand for coefficients of the interpolation and the two banded sums. Where those
    coefficients are `rounded`, by up to a rounding of the coordinate, 1e-12 of the largest sum stands for that.
    """
    unit = torch.finfo(actual.dtype).eps / 2
    bound = 2 * (terms + 32) * unit * absolute
    if rounded and actual.numel():
        bound = bound + 1e-12 * absolute.max()
    assert actual.shape == wanted.shape
    assert ((actual - wanted).abs() <= bound).all()


@given(problem_strategy())
def test_op_is_the_convolution_of_the_up_sampled_map(call: Problem) -> None:
    """In float64, at any size, factor, crop, kernel and layout, borders included, within the derived bound."""
    tensors, terms = call.tensors(), call.shape[1] * call.kernel[0] * call.kernel[1]

    actual = call.run(tensors)

    absolute = call.reference(call.tensors(positive=True))
    _assert_within(actual, call.reference(tensors), absolute, terms, rounded=call.rounded)


@given(problem_strategy())
def test_gradients_are_the_references(call: Problem) -> None:
    """Of map, weight and bias, in float64, within the derived bound: terms are what the reference adds up."""
    tensors, positive = call.tensors(), call.tensors(positive=True)
    out = call.reference(tensors)
    grad = torch.randn_like(out)
    per_pixel = call.out_channels * call.kernel[0] * call.kernel[1] * (2 * call.settings["factor"] + 1) ** 2

    actual = torch.autograd.grad(call.run(tensors), tensors, grad)

    wanted = torch.autograd.grad(out, tensors, grad)
    absolute = torch.autograd.grad(call.reference(positive), positive, grad.abs())
    for each in zip(actual, wanted, absolute, strict=True):
        terms = max(per_pixel, out.shape[0] * out.shape[2] * out.shape[3])
        _assert_within(*each, terms, rounded=call.rounded)


@pytest.mark.parametrize("side", [3, BLOCK + 1])
@pytest.mark.parametrize(("mode", "align_corners"), WAYS)
def test_relative_error_is_of_rounding(mode: str, align_corners: bool, side: int) -> None:  # noqa: FBT001
    """UNet 3+'s edges, few channels: 1e-12 of the largest value in float64, forwards and backwards."""
    call = problem((1, 6, side, side), 5, factor=4, mode=mode, align_corners=align_corners)
    tensors = call.tensors()
    out = call.reference(tensors)

    actual = call.run(tensors)

    torch.testing.assert_close(actual, out, rtol=0, atol=1e-12 * out.abs().max().item())
    pairs = zip(*(torch.autograd.grad(each.square().sum(), tensors) for each in (actual, out)), strict=True)
    for mine, wanted in pairs:
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_gradcheck(layout: torch.memory_format) -> None:
    """Finite differences agree, cropped and padded."""
    call = problem((1, 2, 3, 2), 2, window=(1, 1, 4, 3), layout=layout)

    assert torch.autograd.gradcheck(lambda *tensors: call.run(list(tensors)), call.tensors())


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_asked_for_are_made(wanted: tuple[bool, ...]) -> None:
    """A frozen weight, a map without gradient: the other's is the same as beside it."""
    call = problem()
    tensors = call.tensors()
    all_of_them = torch.autograd.grad(call.run(tensors).sum(), tensors)
    for tensor, needed in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(needed)

    call.run(tensors).sum().backward()

    for tensor, whole, needed in zip(tensors, all_of_them, wanted, strict=True):
        assert (tensor.grad is not None) == needed
        assert not needed or torch.equal(tensor.grad, whole)


def _data(kind: str, dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(1, channels, 9, BLOCK + 3), torch.randn(8, channels, 3, 3)
    if kind == "positive":  # smooth bright images under filters that find edges: large terms that cancel
        x, weight = x.abs() + 1, weight - weight.mean((2, 3), keepdim=True)
    return x.to(dtype), (weight / (9 * channels) ** 0.5).to(dtype)


FACTORS = {torch.float32: 3.0, torch.bfloat16: 1.25, torch.float16: 1.25}


@pytest.mark.parametrize(("factor", "kind"), [(2, "normal"), (8, "positive")])
@pytest.mark.parametrize("channels", [pytest.param(4, marks=pytest.mark.numeric), 256])
@pytest.mark.parametrize("dtype", FACTORS, ids=str)
def test_error_is_not_much_more_than_the_references_own(
    dtype: torch.dtype, factor: int, channels: int, kind: str
) -> None:  # fmt: skip
    """Against float64 of the same data, root mean square: at most 3 times in fp32, 1.25 times in 16 bits."""
    torch.manual_seed(0)
    call, (x, weight) = problem(factor=factor), _data(kind, dtype, channels)
    exact = call.reference([x.double(), weight.double()])

    error = (call.run([x, weight]).double() - exact).norm()

    assert error <= FACTORS[dtype] * (call.reference([x, weight]).double() - exact).norm()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FACTORS, ids=str)
def test_gradients_of_all_types_are_rounded_once(dtype: torch.dtype) -> None:
    """Within the bound of sums in fp32, against float64 of the same data; their type is the tensors' own.

    The direct form's own are no measure: in 16 bits they are up to 148 times that bound on a CPU with AVX2.
    """
    call = problem((2, 16, 9, 8), 8)
    tensors = call.tensors(dtype)
    result = call.run(tensors)
    grad = torch.randn_like(result)

    actual = torch.autograd.grad(result, tensors, grad)

    oracles = validate.gradients(lambda *given: call.reference(list(given)), tensors, grad)
    for mine, exact in zip(actual, oracles, strict=True):
        assert mine.dtype == dtype
        assert validate.worst(mine, exact.value, validate.allowed(exact, dtype)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_layout_of_the_result_is_the_maps(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """As of a convolution."""
    call = problem(layout=layout)

    assert call.run(call.tensors(dtype)).is_contiguous(memory_format=layout)


def test_channels_last_weights_make_channels_last_maps() -> None:
    """As of a convolution, where a network was converted and its image was not."""
    x, weight = (each.detach() for each in problem(bias=False).tensors())

    assert tap_first(x, weight.contiguous(memory_format=LAST), factor=2).is_contiguous(memory_format=LAST)


def test_nothing_up_sampled_is_kept_for_backward() -> None:
    """What autograd saves is the map and the weight themselves."""
    call = problem()
    tensors, saved = call.tensors(), set[int]()

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call.run(tensors)

    assert saved == {each.data_ptr() for each in tensors[:2]}


class _Products(TorchDispatchMode):
    """MACs of every matrix product, in place or not, by the shapes of its operands."""

    macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name in ("mm", "bmm"):
            self.macs += args[0].numel() * args[1].shape[-1]
        if name in ("addmm", "baddbmm"):
            self.macs += args[1].numel() * args[2].shape[-1]
        return func(*args, **(kwargs or {}))


COUNTED = [
    problem(),
    problem((2, 5, BLOCK + 3, 2 * BLOCK + 1), 3, factor=3),
    problem((1, 2, 40, 3), 2, window=(5, 1, 61, 4), padding=0),
    problem((1, 2, 7, 3), 2, kernel=(1, 1), padding=0, factor=8, mode="nearest"),
    problem((1, 3, 33, 17), 2, align_corners=True, layout=LAST),
]


@pytest.mark.parametrize("call", COUNTED)
def test_flops_are_those_of_the_products(call: Problem) -> None:
    """What FlopCounterMode says of the op is what its matrix products come to, forwards and backwards."""
    tensors = call.tensors()
    x, weight = tensors[0].detach(), tensors[1].detach()
    height, width = x.shape[2] * call.settings["factor"], x.shape[3] * call.settings["factor"]
    settings = {**call.settings, "window": call.settings["window"] or (0, 0, height, width)}
    axes = module.axes(x.shape[2:], weight.shape[2:], *settings.values())

    with FlopCounterMode(display=False) as ahead:
        out = call.run(tensors)
    with FlopCounterMode(display=False) as back:
        out.sum().backward()

    with _Products() as products:
        tap_blocks.fill(out.detach().clone(), x, weight, None, axes)
    assert ahead.get_total_flops() == 2 * products.macs
    with _Products() as products:
        tap_blocks.gradients(torch.ones_like(out), x, weight, axes, (True, True))
    assert back.get_total_flops() == 2 * products.macs


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, torch.contiguous_format), (torch.bfloat16, LAST)], ids=str
)
def test_opcheck(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Schema, fake implementation, autograd registration and tracing with symbolic shapes are PyTorch's to check."""
    x, weight, bias = problem(layout=layout).tensors(dtype)
    settings = (2, "bilinear", False, 1, [0, 0, 10, 8])

    torch.library.opcheck(torch.ops.skipcost.tap_first, (x, weight, bias, *settings))

    plain = (torch.ones(2, 4, 10, 8, dtype=dtype), x.detach(), weight.detach(), *settings)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.skipcost.tap_first_backward, (*plain, *needed))


def test_compiled_function_is_the_op() -> None:
    """torch.compile takes it as one op, without a graph break, with gradients."""
    call = problem()
    tensors = call.tensors()
    compiled: Callable[..., Tensor] = torch.compile(
        lambda *given: tap_first(*given, factor=2), backend="aot_eager", fullgraph=True
    )

    result = compiled(*tensors)

    assert torch.equal(result, call.run(tensors))
    grads = zip(*(torch.autograd.grad(each.sum(), tensors) for each in (result, call.run(tensors))), strict=True)
    assert all(torch.equal(*pair) for pair in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """The op does its own arithmetic: the caller casts, and sums stay in fp32."""
    call = problem()
    tensors = call.tensors(dtype)

    with torch.autocast("cpu", torch.bfloat16):
        result = call.run(tensors)
        grads = torch.autograd.grad(result.sum(), tensors)

    assert torch.equal(result, call.run(tensors))
    assert all(map(torch.equal, grads, torch.autograd.grad(call.run(tensors).sum(), tensors)))


def test_runs_on_meta_tensors() -> None:
    """Shapes and layout without data, as in a trace of memory."""
    x, weight, bias = (each.detach().to("meta") for each in problem(layout=LAST).tensors())

    result = tap_first(x, weight, bias, factor=2)

    assert result.shape == (2, 4, 10, 8)
    assert result.is_contiguous(memory_format=LAST)


def _plain(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (_plain((1, 2, 3, 3), (4, 3, 3, 3)), {}, r"map of shape \(1, 2, 3, 3\) and a weight of shape \(4, 3, 3, 3\)"),
        (_plain((2, 3, 3), (4, 2, 3, 3)), {}, r"it takes \(N, C, h, w\) and \(O, C, kh, kw\), so no groups"),
        ([*_plain((1, 2, 3, 3)), *_plain((4, 2, 3, 3), dtype=torch.float64)], {}, "must be of one floating type"),
        (_plain((1, 2, 3, 3), (4, 2, 3, 3), dtype=torch.int64), {}, "must be of one floating type"),
        (_plain((1, 2, 3, 3), (4, 2, 3, 3), (3,)), {}, r"bias of shape \(3,\) for 4 output channels"),
        (_plain((1, 2, 3, 3), (4, 2, 3, 3)), {"mode": "bicubic"}, "mode='bicubic' is unknown"),
        (_plain((1, 2, 3, 3), (4, 2, 3, 3)), {"padding": 3}, "padding=3 beside 3 taps"),
        (_plain((1, 2, 3, 3), (4, 2, 3, 3)), {"window": (6, 0, 9, 6)}, "9 pixels from 6 on are none of"),
    ],
)
def test_what_it_does_not_do_is_refused(tensors: list[Tensor], changes: dict[str, Any], message: str) -> None:
    """With what was received and what is accepted."""
    with pytest.raises(ValueError, match=message):
        tap_first(*tensors, factor=2, **changes)

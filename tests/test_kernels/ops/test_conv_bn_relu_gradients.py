"""What `conv_bn_relu` and its relatives compute backwards: the gradients that are wanted, and nothing for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.ops.conv_bn_relu import concat_conv_bn_relu, conv_bn_relu_pool
from skipcost.unet_models.ops import crop_all

pytestmark = pytest.mark.usefixtures("one_thread")

MAPS, REST = ("x", "y"), ("weight", "scale", "shift")
OPS: dict[str, Callable[..., Any]] = {
    "concat": lambda x, y, *others: concat_conv_bn_relu([x, y], *others, padding=1),
    "pool": lambda x, _, *others: conv_bn_relu_pool(x, *others, padding=1),
}
SUBSETS = ((), ("weight",), ("scale",), ("shift",), ("scale", "shift"), ("weight", "shift"), REST)
CASES = [
    (op, maps, rest)
    for op, choices in {"concat": ((), ("x",), ("y",), MAPS), "pool": ((), ("x",))}.items()
    for maps in choices
    for rest in SUBSETS
    if maps or rest
]


def _tensors(op: str, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Two maps, the first of which is cropped, weight, scale and shift; the named ones want gradients."""
    torch.manual_seed(0)
    channels = 5 if op == "concat" else 3
    shapes = {"x": (2, 3, 8, 7), "y": (2, 2, 6, 7), "weight": (4, channels, 3, 3), "scale": (4,), "shift": (4,)}
    return {name: torch.randn(shape).requires_grad_(name in wanted) for name, shape in shapes.items()}


def _composed(op: str, x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """The same by PyTorch's own functions, from which autograd derives its own gradients."""
    joined = torch.cat(crop_all([x, y]), 1) if op == "concat" else x
    total = functional.conv2d(joined, weight, padding=1)
    result = functional.relu(total * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    return (result, functional.max_pool2d(result, 2)) if op == "pool" else result


def _total(result: Any) -> Tensor:
    """One number that depends on every element of a result in its own way."""
    parts = result if isinstance(result, tuple) else (result,)
    return torch.stack([(each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in parts]).sum()


@pytest.mark.parametrize(("op", "maps", "rest"), CASES, ids=str)
def test_what_is_wanted_is_computed_and_no_convolution_more(
    op: str, maps: tuple[str, ...], rest: tuple[str, ...]
) -> None:
    """Gradients are autograd's own; a convolution is spent on that of the maps, the weight and the scale each."""
    wanted = (*maps, *rest)
    tensors = _tensors(op, wanted)
    leaves = [tensors[name] for name in wanted]
    with FlopCounterMode(display=False) as forward:
        result = _total(OPS[op](*tensors.values()))

    with FlopCounterMode(display=False) as backward:
        grads = torch.autograd.grad(result, leaves)

    torch.testing.assert_close(grads, torch.autograd.grad(_total(_composed(op, *tensors.values())), leaves))
    convolutions = bool(maps) + ("weight" in wanted) + ("scale" in wanted)
    assert backward.get_total_flops() == convolutions * forward.get_total_flops()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("wanted", [(True,) * 5, (False, True, False, True, True), (False,) * 4 + (True,)], ids=str)
def test_opcheck_passes_on_the_op_itself(wanted: tuple[bool, ...], scaled: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Its schema, its fake tensors and its tracing are sound for any choice, with a scale and without."""
    x, y, weight, scale, _ = _tensors("concat", ()).values()
    grad, out = torch.randn(2, 4, 6, 7), torch.randn(2, 4, 6, 7).relu()
    given = (grad, out, [x, y], weight, scale if scaled else None, 1, True, list(wanted))

    torch.library.opcheck(torch.ops.skipcost.conv_bn_relu_backward.default, given)

    assert len(torch.ops.skipcost.conv_bn_relu_backward(*given)) == sum(wanted)


def test_compiled_code_computes_no_more() -> None:
    """torch.compile asks for the same gradients: frozen weights cost no convolution there either."""
    tensors = _tensors("concat", ("y", "shift"))
    leaves = [tensors["y"], tensors["shift"]]
    result = _total(torch.compile(OPS["concat"], backend="aot_eager", fullgraph=True)(*tensors.values()))

    with FlopCounterMode(display=False) as backward:
        grads = torch.autograd.grad(result, leaves)

    torch.testing.assert_close(grads, torch.autograd.grad(_total(_composed("concat", *tensors.values())), leaves))
    assert backward.get_total_flops() == 2 * 5 * 9 * result.new_empty(2, 4, 6, 7).numel()

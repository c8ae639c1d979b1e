"""What fvcore needs to count the suite's ops, which it does not know.

    for name, handle in HANDLES.items():
        analysis.set_op_handle(name, handle)

fvcore counts a multiply-add once, so these are MACs: half of what torch's FlopCounterMode counts. Needs no fvcore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

Handle = Callable[[list[Any], list[Any]], "Counter[str]"]


def _sizes(value: Any) -> list[int]:
    sizes: list[int] = value.type().sizes()
    return sizes


def _convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Maps and weight come first: one MAC per element of the weight and output pixel."""
    batch, _, height, width = _sizes(outputs[0])
    return Counter(conv=prod(_sizes(inputs[1])) * batch * height * width)


def _up_conv(at: int) -> Handle:
    """Count a transposed convolution of argument `at` by the next: a MAC per weight and input pixel."""

    def count(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
        batch, _, height, width = _sizes(inputs[at])
        return Counter(conv=prod(_sizes(inputs[at + 1])) * batch * height * width)

    return count


def _nothing(_inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    """Copies and comparisons multiply nothing, as fvcore has it of cat; max-pooling it does not count either."""
    return Counter()


HANDLES: dict[str, Handle] = {
    "skipcost::conv_bn_relu": _convolution,
    "skipcost::conv_bn_relu_pool": _convolution,
    "skipcost::conv_bn_relu_train": _convolution,
    "skipcost::up_conv": _up_conv(0),
    "skipcost::up_conv_concat": _up_conv(1),
    "skipcost::up_conv_into": _up_conv(0),
    "skipcost::crop_concat": _nothing,
    "skipcost::max_pool": _nothing,
}

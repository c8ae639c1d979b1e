"""The weights of a transposed convolution and of the convolution behind it as one, kept from call to call.

A graph has tensors and no layers, and a user's code may write to them by ways that leave no version behind: `.data`,
numpy, an average of weights. So the values themselves are compared, with copies, which is one pass over weights that
are fewer than the values of a map (`choose_composed` counts the copies). What is kept is one for all graphs and twins
that have the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from skipcost.kernels.low_resolution.composed import Composed, compose

Given = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
PLAIN = (Tensor, nn.Parameter)
MOST = 2  # convolutions or types, of those that a transposed convolution was composed with last
# By the transposed convolution's parameter, with which it goes: Dynamo keeps graphs for good, for each way of calling.
_KEPT: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Known:
    """Weights as they were, copied, and what they were composed to; None where they had just changed."""

    given: Given
    made: Composed | None


def kept_composed(given: Given, dtype: torch.dtype) -> Composed | None:
    """Return the weights and biases of both convolutions as one; None where they should run one by one.

    given: (C, M, 2, 2), a parameter, and (M,); (O, M, 3, 3), or a part of (O, more, 3, 3), and (O,). Composing takes as
    long as a call may save, so weights that have changed are composed when they come again. None, too, for tensors
    whose values cannot be compared: a tracer's, or on another device.
    """
    if any(each is not None and (type(each) not in PLAIN or not each.is_cpu) for each in given):
        return None
    known: dict[tuple[int, torch.dtype], _Known] = _KEPT.setdefault(given[0], {})
    key = given[2].data_ptr(), dtype
    found = known.pop(key, None)
    if found is not None and not _same(found.given, given):
        known[key] = _Known(_copies(given), None)
        return None
    if found is None or found.made is None:
        copies = found.given if found else _copies(given)
        found = _Known(copies, compose(*copies, dtype))
    known[key] = found  # the last of all: the first ones go
    while len(known) > MOST:
        known.pop(next(iter(known)), None)
    return found.made


def _copies(given: Given) -> Given:
    with torch.inference_mode(mode=False):
        copies = (None if each is None else each.detach().clone() for each in given)
        return cast("Given", tuple(copies))


def _same(known: Given, given: Given) -> bool:
    """Whether all values are equal; not where one is no number."""
    pairs = zip(known, given, strict=True)
    return all(one is other if one is None or other is None else _equal(one, other) for one, other in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)

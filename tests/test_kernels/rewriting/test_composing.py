"""What a place keeps of composed weights: as long as they are what they were, whoever wrote to them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from skipcost.kernels.low_resolution.composed import Composed, compose
from skipcost.kernels.rewriting.composing import Composing


class Pair:
    """Both convolutions, and what is kept of them."""

    def __init__(self) -> None:
        self.up, self.conv, self.kept = nn.ConvTranspose2d(5, 4, 2, stride=2), nn.Conv2d(4, 3, 3), Composing()

    def composed(self, at: int = 0, dtype: torch.dtype = torch.float32) -> Composed | None:
        """Ask for what is kept."""
        return self.kept.composed(at, (self.up.weight, self.up.bias, self.conv.weight, self.conv.bias), dtype)

    def anew(self) -> Composed:
        """Compose."""
        return compose(self.up.weight, self.up.bias, self.conv.weight, self.conv.bias, torch.float32)


def test_weights_are_composed_once() -> None:
    """For each map of a place and each type."""
    pair = Pair()

    first, again, other, double = pair.composed(), pair.composed(), pair.composed(1), pair.composed(0, torch.float64)

    assert first is again
    assert first is not None
    assert other is not first
    assert double is not None
    assert double.kernel.dtype == torch.float64
    assert torch.equal(first.kernel, pair.anew().kernel)


def _data(pair: Pair) -> None:
    pair.conv.weight.data[0, 0, 0, 0] += 1


def _numpy(pair: Pair) -> None:
    pair.up.weight.detach().numpy()[0] *= 2


def _bias(pair: Pair) -> None:
    pair.conv.bias.data.add_(1)  # type: ignore[union-attr]  # it has one


def _no_bias(pair: Pair) -> None:
    pair.up.bias = None


def _loaded(pair: Pair) -> None:
    pair.up.load_state_dict({name: -value for name, value in pair.up.state_dict().items()})


@pytest.mark.parametrize("write", [_data, _numpy, _bias, _no_bias, _loaded])
def test_weights_that_have_changed_are_composed_when_they_come_again(write: Callable[[Pair], None]) -> None:
    """Not at once: training by others would compose them in every call."""
    pair = Pair()
    before = pair.composed()

    write(pair)
    changed, second, third = pair.composed(), pair.composed(), pair.composed()

    assert before is not None
    assert changed is None
    assert second is third
    assert second is not None
    assert all(map(torch.equal, (second.kernel, second.bias), (pair.anew().kernel, pair.anew().bias)))


def test_what_is_kept_goes_with_the_parameter() -> None:
    """Dynamo keeps graphs, and with them the object that keeps."""
    pair = Pair()
    kernel = weakref.ref(pair.composed().kernel)  # type: ignore[union-attr]  # it is composed
    kept = pair.kept

    del pair
    gc.collect()

    assert kernel() is None
    assert kept is not None


class Own(Tensor):
    """A class of the user's."""


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": FakeTensorMode().from_tensor,
    "meta": lambda x: x.to("meta"),
    "subclass": lambda x: x.as_subclass(Own),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_values_that_cannot_be_compared_are_not_kept(way: Callable[[Tensor], Tensor]) -> None:
    """Of tracers, without data, of classes of their own."""
    pair = Pair()
    up, bias, weight = (way(each.detach()) for each in (pair.up.weight, pair.up.bias, pair.conv.weight))

    assert pair.kept.composed(0, (up, bias, weight, None), torch.float32) is None

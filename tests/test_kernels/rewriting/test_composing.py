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
from skipcost.kernels.rewriting import composing
from skipcost.kernels.rewriting.composing import MOST, kept_composed


class Pair:
    """Both convolutions, and what is kept of them."""

    def __init__(self) -> None:
        self.up, self.conv = nn.ConvTranspose2d(5, 4, 2, stride=2), nn.Conv2d(4, 3, 3)

    def composed(self, conv: nn.Conv2d | None = None, dtype: torch.dtype = torch.float32) -> Composed | None:
        """Ask for what is kept."""
        conv = conv or self.conv
        return kept_composed((self.up.weight, self.up.bias, conv.weight, conv.bias), dtype)

    def anew(self) -> Composed:
        """Compose."""
        return compose(self.up.weight, self.up.bias, self.conv.weight, self.conv.bias, torch.float32)


def test_weights_are_composed_once() -> None:
    """For each convolution and each type."""
    pair, other = Pair(), nn.Conv2d(4, 3, 3)

    first, again, behind = pair.composed(), pair.composed(), pair.composed(other)
    double = pair.composed(other, torch.float64)

    assert first is again
    assert first is not None
    assert behind is not None
    assert not torch.equal(behind.kernel, first.kernel)
    assert double is not None
    assert double.kernel.dtype == torch.float64
    assert torch.equal(first.kernel, pair.anew().kernel)


def test_the_last_ones_are_kept() -> None:
    """However many convolutions a map goes to, and types: weights that nobody uses any more must go."""
    pair, others = Pair(), [nn.Conv2d(4, 3, 3) for _ in range(MOST)]
    first = pair.composed()

    for each in others:
        pair.composed(each)

    assert len(composing._KEPT[pair.up.weight]) == MOST
    assert pair.composed() is not first


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
    """Dynamo keeps graphs for good."""
    pair = Pair()
    kernel = weakref.ref(pair.composed().kernel)  # type: ignore[union-attr]  # it is composed

    del pair
    gc.collect()

    assert kernel() is None


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

    assert kept_composed((up, bias, weight, None), torch.float32) is None

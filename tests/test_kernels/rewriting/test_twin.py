"""`twin`: other modules over the same tensors, and nothing that goes on with the model's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipcost.kernels.rewriting.twin import twin


class Strategy:
    """Holds a module in an object of the user's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Holding(nn.Module):
    """Reaches its layers in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.listed, self.named = [self.conv], {"norm": (self.norm,)}
        self.method, self.partial = self.conv.forward, partial(self.run, 1.0)
        self.strategy, self.parent = Strategy(self.conv), weakref.ref(self)
        self.lock = torch.Generator()
        self.cache: list[int] = []
        self.conv.register_forward_hook(self.seen)

    def seen(self, *_: Any) -> None:
        """Count calls."""
        self.cache.append(1)

    def run(self, scale: float, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, H - 2, W - 2)."""
        return scale * self.norm(self.listed[0](x))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, H - 2, W - 2)."""
        return self.partial(x)


def test_whatever_holds_a_module_holds_the_twins() -> None:
    """Lists, tuples in dictionaries, methods, partials, objects, weak references, hooks."""
    model = Holding()

    made: Any = twin(model)

    assert made.conv is not model.conv
    assert [made.listed[0], made.method.__self__, made.strategy.module] == [made.conv] * 3
    assert made.named["norm"][0] is made.norm
    assert made.partial.func.__self__ is made
    assert made.parent() is made
    assert made.lock is model.lock


def test_modes_hooks_and_attributes_are_its_own() -> None:
    """Statistics are not written by a twin in evaluation, and its hooks write to itself."""
    model = Holding().train()

    made: Any = twin(model).eval()
    made(torch.randn(1, 3, 6, 6))
    made.conv.__dict__["new"] = 1

    assert model.norm.training
    assert model.norm.num_batches_tracked == 0
    assert (model.cache, made.cache) == ([], [1])
    assert not hasattr(model.conv, "new")


def test_tensors_are_shared_whatever_becomes_of_them() -> None:
    """Loaded, converted and replaced in one, they are so in the other; ties stay ties."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    made = twin(model)

    model.double()
    made[0].bias = nn.Parameter(torch.ones(3))

    assert made[1].weight is model[0].weight is made[0].weight
    assert made[2].running_mean is model[2].running_mean
    assert model[0].bias is made[0].bias


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_are_the_twins_own() -> None:
    """weight_norm keeps the weight as a plain attribute, which no deep copy takes."""
    model = nn.utils.weight_norm(nn.Conv2d(3, 3, 3))  # type: ignore[no-untyped-call]
    x = torch.randn(1, 3, 5, 5)
    made = twin(model)

    with torch.no_grad():
        model.weight_g.mul_(2)

    assert torch.equal(made(x), model(x))
    assert made.weight is not model.weight


def _closed() -> nn.Module:
    model = Holding()
    own = model.forward
    model.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    return model


def _referring() -> nn.Module:
    model = Holding()
    model.cache = [weakref.ref(model.conv)]  # type: ignore[list-item]
    return model


class Uncopied(Strategy):
    """Refuses to be copied."""

    def __deepcopy__(self, memo: Any) -> Strategy:
        """Raise."""
        message = "one of a kind"
        raise TypeError(message)


def _uncopied() -> nn.Module:
    model = nn.Sequential(nn.ReLU())
    model.strategy = Uncopied(model[0])  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_closed, "^forward holds modules of the model in a function or a weak reference, which would keep to those"),
        (_referring, "^cache holds modules of the model in a function or a weak reference"),
        (_uncopied, "^strategy holds modules of the model and cannot be copied: one of a kind"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), "^0 is a lazy layer, LazyConv2d, .* run the model once first"),
        (lambda: torch.compile(Holding()), "^the model is compiled already: give the module that"),
        (lambda: nn.Sequential(torch.jit.script(nn.ReLU())), "^0 is a RecursiveScriptModule, .* give the module of P"),  # type: ignore[no-untyped-call]
    ],
    ids=["closure", "references", "no copy", "lazy", "compiled", "script"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_would_go_on_with_the_model_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    """In one sentence with the place."""
    with pytest.raises(ValueError, match=message):
        twin(make())

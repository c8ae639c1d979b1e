"""Factories of models as a user may hand them over, good and bad: what a sweep's `[[custom]]` has to cope with."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from skipcost.unet_models import ModelSpec, build

NOT_A_FUNCTION = 3


def suite(label: str, outputs: str = "final") -> nn.Module:
    """A network of the suite, come in by the user's door."""
    return build(ModelSpec.parse(label), outputs=outputs)


class Tiny(nn.Module):
    """Two convolutions round a 2x2 pool and its undoing; `form` says in what its maps are returned."""

    def __init__(self, in_channels: int = 1, classes: int = 2, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.down = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.low, self.high = nn.Conv2d(4, classes, 1), nn.Conv2d(4, classes, 1)

    def forward(self, image: Tensor) -> Any:
        """(N, C, H, W) -> the maps (N, classes, H, W) and (N, classes, H / 2, W / 2), in the form asked for."""
        deep = self.down(image)
        low, high = self.low(deep), self.high(self.up(deep))
        forms = {
            "tensor": high,
            "list": [high, low],
            "tuple": (high, low),
            "dict": {"out": high, "aux": low},
            "nested": [high, [low]],
            "empty": [],
            "stacked": torch.stack([high, high], 1),
            "text": "a map",
        }
        return forms[self.form]


class Chatty(Tiny):
    """Prints in every forward pass, and if asked to when it is made."""

    def __init__(self, *, greet: bool = False) -> None:
        super().__init__()
        if greet:
            print('{"metric": "params"}')  # noqa: T201 - what is tested

    def forward(self, image: Tensor) -> Any:
        """As Tiny."""
        print("forward!")  # noqa: T201 - what is tested
        return super().forward(image)


class Peeking(Tiny):
    """Looks at a value, which no trace without data can give it."""

    def forward(self, image: Tensor) -> Any:
        """As Tiny."""
        if float(image.abs().max()) < 0:
            return image
        return super().forward(image)


class Scheduled(Tiny):
    """Takes a number out of a tensor when it is made, as the rates of stochastic depth are."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [float(rate) for rate in torch.linspace(0, 0.1, 3)]


class Mixing(Tiny):
    """Has a matrix product beside its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, image: Tensor) -> Any:
        """(N, 1, H, 8)."""
        return super().forward(self.mix(image))


class Failing(Tiny):
    """Can be made, but not run."""

    def forward(self, image: Tensor) -> Any:
        """Raise."""
        message = f"no {image.shape[-1]} columns, please"
        raise RuntimeError(message)


def greeting() -> nn.Module:
    """Print, then work."""
    print('{"metric": "params"}\nhello')  # noqa: T201 - what is tested
    return Tiny()


def raising() -> nn.Module:
    """Print, then raise."""
    print("so far so good")  # noqa: T201 - what is tested
    message = "no weights here"
    raise RuntimeError(message)


def no_module() -> dict[str, int]:
    """Something else than a module."""
    return {"width": 3}


def leaving() -> nn.Module:
    """End the program."""
    sys.exit(0)

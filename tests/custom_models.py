"""Factories of models as a user may hand them over, good and bad: what a sweep's `[[custom]]` has to cope with."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels import fuse
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


class Holding(nn.Module):
    """A decoder that holds the encoder, so that its layers have two paths each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU())
        self.decoder = Decoder(self.encoder)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 2, H, W)."""
        return self.decoder(self.encoder(image))


class Decoder(nn.Module):
    """Holds what it does not call."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.last = encoder, nn.Conv2d(8, 2, 1, groups=2, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 8, H, W) -> (N, 2, H, W)."""
        return self.last(image)


class Concatenation(nn.Module):
    """Reads a list."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (N, C, H, W) -> (N, their channels, H, W)."""
        return torch.cat(maps, 1)


class Between(nn.Module):
    """Something between two convolutions that is none: `form` says what."""

    FORMS = ("attention", "mha", "encoder", "lstm", "einsum", "list", "keyword")

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        layers: dict[str, Any] = {
            "mha": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
            "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
            "list": Concatenation,
        }
        self.layer = layers.get(form, nn.Identity)()
        self.mix = nn.Linear(8, 8)

    def _tokens(self, tokens: Tensor) -> Tensor:
        """(N, L, 8) -> (N, L, 8)."""
        if self.form == "attention":
            heads = tokens.contiguous().unflatten(-1, (2, 4)).transpose(1, 2)
            return functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        if self.form == "mha":
            return self.layer(tokens, tokens, tokens, need_weights=False)[0]
        if self.form == "encoder":
            return self.layer(tokens)
        if self.form == "lstm":
            return self.layer(tokens)[0]
        if self.form == "einsum":
            return torch.einsum("nic,njc,njd->nid", tokens, tokens, tokens)
        return self.layer([tokens.mT])[:, :8].mT if self.form == "list" else self.layer(input=tokens)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 2, H, W)."""
        image = self.first(image)
        tokens = self._tokens(image.flatten(2).mT)
        return self.last(self.mix(tokens).mT.reshape(image.shape))


class Middle(nn.Module):
    """Two convolutions round something that a device runs in one piece or keeps from call to call: `form` says what."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.shift = form, nn.Identity()
        self.first, self.last = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 2, 1)
        if form == "mha":
            self.shift = nn.MultiheadAttention(32, 4, batch_first=True)
        elif form == "lstm":
            self.shift = nn.LSTM(32, 32, batch_first=True)
        self.table = torch.zeros(32, 64, 64) if form == "loose" else None
        self.cache: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 2, H, W)."""
        x = self.first(image)
        if self.form in ("silu", "mish", "gelu", "hardswish"):
            return self.last(getattr(functional, self.form)(x))
        if self.form == "kept":
            self.cache = torch.zeros_like(x) if self.cache is None else self.cache
            return self.last(x + self.cache)
        if self.table is not None:
            return self.last(x * self.table[:, : x.shape[2], : x.shape[3]])
        tokens = x.flatten(2).mT.contiguous()
        if self.form == "mha":
            tokens = self.shift(tokens, tokens, tokens, need_weights=False)[0]
        elif self.form == "lstm":
            tokens = self.shift(tokens)[0]
        else:
            heads = tokens.unflatten(-1, (4, 8)).transpose(1, 2)
            tokens = functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return self.last(tokens.mT.reshape(x.shape))


def unfused() -> nn.Module:
    """Convolutions with norms, whose weights are most of what is there."""
    layers = [(nn.Conv2d(64 if i else 1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for i in range(3)]
    return nn.Sequential(*(each for group in layers for each in group), nn.Conv2d(64, 2, 1))


def fused() -> nn.Module:
    """The same with norms folded, which keeps copies of its weights."""
    return fuse(unfused())[0]


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

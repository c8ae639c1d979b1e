"""Factories of models as a user may hand them over, good and bad: what a sweep's `[[custom]]` has to cope with."""

from __future__ import annotations

import sys
import threading
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
        self.form = form
        self.shift: nn.Module = nn.Identity()
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


def fused() -> nn.Module:
    """A convolution with its norm folded."""
    return fuse(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()))[0]


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


class Tied(nn.Module):
    """Two 3x3 convolutions with one weight; it cannot be made without data, so that it has to be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(2))
        self.second.weight = self.first.weight
        self.rates = [float(rate) for rate in torch.linspace(0, 0.1, 3)]

    def forward(self, image: Tensor) -> Any:
        """(N, 1, H, W) -> the same."""
        return self.second(self.first(image))


class Once(Tied):
    """The same with one of the layers left out."""

    def forward(self, image: Tensor) -> Any:
        """(N, 1, H, W) -> the same."""
        return self.second(image)


class Views(Tied):
    """The same with two weights that are halves of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(2, 1, 1, 3, 3)
        self.first.weight, self.second.weight = nn.Parameter(whole[0]), nn.Parameter(whole[1])


class Overlapping(Tied):
    """The same with two parameters that are all of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(1, 1, 3, 3)
        self.first.weight, self.second.weight = nn.Parameter(whole), nn.Parameter(whole)


class Two(nn.Module):
    """Two convolutions, 3x3 to 8 channels and 1x1 to 2; `way` says how they are written, or the module is changed."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        if way in {"spectral_norm", "weight_norm"}:
            getattr(nn.utils.parametrizations, way)(self.a)
        elif way == "orthogonal":
            nn.utils.parametrizations.orthogonal(self.b)
        elif way == "old_weight_norm":
            nn.utils.weight_norm(self.a)  # type: ignore[no-untyped-call]  # torch's, deprecated, and still in use
        elif way == "lock":
            self.lock = threading.Lock()
        elif way == "recurrent":
            self.rows = nn.LSTM(8, 8, batch_first=True)
        elif way == "lazy":
            self.a = nn.LazyConv2d(8, 3, padding=1)

    def forward(self, image: Tensor) -> Any:
        """(N, 1, H, W) -> (N, 2, H, W)."""
        if self.way == "looking" and float(image.abs().max()) < 0:
            return image
        if self.way == "recurrent":
            image = self.rows(image[:, 0])[0][:, None]
        if self.way != "functional":
            return self.b(functional.relu(self.a(image)))
        made = functional.conv2d(image, self.a.weight, self.a.bias, padding=1)
        return functional.conv2d(functional.relu(made), self.b.weight, self.b.bias)


def leave_a_mark(graph: Any, _examples: object) -> Any:
    """A backend of torch.compile that changes nothing and tells that it was asked."""
    MARKS.append(graph)
    return graph.forward


MARKS: list[Any] = []


@torch.compile(backend=leave_a_mark)
def compiled_relu(x: Tensor) -> Tensor:
    """A function that is compiled wherever it is called."""
    return functional.relu(x)


class WithCompiledFunction(Two):
    """As Two, through such a function."""

    def forward(self, image: Tensor) -> Any:
        """As Two."""
        return self.b(compiled_relu(self.a(image)))


def wrapped(by: str) -> nn.Module:
    """Two in another's hands."""
    two = Two().eval()
    match by:
        case "DataParallel":
            return nn.DataParallel(two)
        case "script":
            return torch.jit.script(nn.Sequential(two.a, nn.ReLU(), two.b))  # type: ignore[no-any-return]
        case "trace":
            return torch.jit.trace(two, torch.zeros(1, 1, 16, 8))  # type: ignore[no-any-return, no-untyped-call]
        case "frozen":
            return torch.jit.freeze(wrapped("trace"))  # type: ignore[arg-type, no-any-return]
        case "compile":
            return torch.compile(two, backend=leave_a_mark)  # type: ignore[return-value]
        case "compile in place":
            two.compile(backend=leave_a_mark)
        case "compiled part":
            two.a = torch.compile(two.a, backend=leave_a_mark)  # type: ignore[assignment]
        case "compiled forward":
            two.forward = torch.compile(two.forward, backend=leave_a_mark)  # type: ignore[method-assign]
    return two


def of_type(name: str) -> nn.Module:
    """Two with weights of another floating point type."""
    return Two().to(getattr(torch, name))


class Spectral(nn.Module):
    """A 1x1 convolution and complex weights, as of a Fourier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 2, 1)
        self.modes = nn.Parameter(torch.randn(2, 4, 4, dtype=torch.cfloat))

    def forward(self, image: Tensor) -> Any:
        """(N, 1, H, W) -> (N, 2, H, W)."""
        maps = self.mix(image)
        kept = torch.fft.rfft2(maps)[:, :, :4, :4] * self.modes
        return torch.fft.irfft2(kept, s=maps.shape[-2:])


class Pooling(nn.Module):
    """Neither a convolution nor a product nor a parameter."""

    def forward(self, image: Tensor) -> Any:
        """(N, C, H, W) -> the same."""
        return functional.interpolate(functional.max_pool2d(image, 2), scale_factor=2.0)


class Uncounted(nn.Module):
    """A convolution that PyTorch has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, image: Tensor) -> Any:
        """(N, 1, H, 8) -> the same."""
        return torch.conv_tbc(image[:, 0], self.weight, self.bias, 1)[:, None]


def int8() -> nn.Module:
    """A convolution to 8 channels and a transposed one to 3, converted as torch.ao.quantization does."""
    ao = torch.ao.quantization
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 2, stride=2)]
    net = nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).eval()  # type: ignore[no-untyped-call]
    net.qconfig = ao.QConfig(ao.default_observer, ao.default_weight_observer)  # type: ignore[assignment]  # no module
    prepared = ao.prepare(net)  # type: ignore[no-untyped-call]
    prepared(torch.randn(1, 1, 16, 8))
    return ao.convert(prepared)  # type: ignore[no-any-return, no-untyped-call]


class Cut(Two):
    """As Two, with layers that nothing calls, and one that is called in training alone."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__(way)
        self.encoder = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64))
        self.aux = nn.Conv2d(2, 2, 1)

    def forward(self, image: Tensor) -> Any:
        """A map, in training two."""
        found = super().forward(image)
        return [found, self.aux(found)] if self.training else found

"""What defines a network's weights and wiring, and its short form, the label. No device, no dtype, no batch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from skipcost.unet_models.skips import SKIPS
from skipcost.unet_models.topology import INTERPOLATIONS, SkipGraph
from skipcost.unet_models.variants import VARIANTS

MAX_DEPTH = 12  # halves 4,096 pixels to one; each level more doubles the time for the receptive field (seconds here)
MAX_CHANNELS = 65536  # beyond any network that fits anywhere; a typing slip must not ask for terabytes
CHOICES: dict[str, tuple[str, ...]] = {
    "variant": tuple(VARIANTS),
    "skip": tuple(SKIPS),
    "padding": ("same", "valid"),
    "norm": ("batch", "instance", "group", "none"),
    "upsample": ("transpose", *INTERPOLATIONS),
    "head": ("single", "deep", "guided"),
}
_LABEL_HEAD = re.compile(r"(?P<variant>[^/]+)/d(?P<depth>[0-9]{1,9})/w(?P<width>[0-9]{1,9})/(?P<skip>[^/=]+)$")


def suggest(kind: str, received: object, accepted: Iterable[str]) -> str:
    """Word the refusal of an unknown name: what was received, the nearest valid one, and all that are accepted."""
    names = [str(name) for name in accepted]
    close = difflib.get_close_matches(str(received), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"unknown {kind} {received!r}{hint} accepted: {', '.join(names)}"


@dataclass(frozen=True)  # without slots, so that its label is written once
class ModelSpec:
    """Everything that defines the weights and the wiring of a network, and nothing else.

    Equal networks are equal specs as far as their fields go: `upsample=None` becomes the variant's own, a `max_width`
    that caps nothing and a `pruned_to` that prunes nothing become None. ValueError where a combination cannot work.
    """

    variant: str = "unet"
    depth: int = 4  # number of 2x down-samplings; levels = depth + 1
    width: int = 64  # channels at level 0; level i has min(width * 2**i, max_width)
    skip: str = "concat"
    in_channels: int = 1
    classes: int = 2
    padding: str = "same"  # valid: the 2015 network, every skip centre-cropped
    max_width: int | None = None  # without a cap, the depth axis measures the bottleneck's width
    norm: str = "batch"
    bias: bool = True  # in the 3x3 convolutions of blocks and edges; all others keep theirs
    upsample: str | None = None
    head: str = "single"
    pruned_to: int | None = None  # unet++: the sub-network L^d

    def __post_init__(self) -> None:
        """Check each field, then the combination, then put equal networks into one form."""
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            if value not in accepted and not (name == "upsample" and value is None):
                raise ValueError(suggest(name, value, accepted))
        self._check_numbers()
        variant = VARIANTS[self.variant]
        if self.upsample is None:
            object.__setattr__(self, "upsample", variant.upsamples[0])
        if self.max_width is not None and self.max_width >= self.width << self.depth:
            object.__setattr__(self, "max_width", None)
        self._check_combination()
        if self.pruned_to == self.depth:
            object.__setattr__(self, "pruned_to", None)

    def _check_numbers(self) -> None:
        check_integer("depth", self.depth, 1, MAX_DEPTH)
        for name in ("width", "in_channels", "classes"):
            check_integer(name, getattr(self, name), 1, MAX_CHANNELS)
        if self.max_width is not None:
            check_integer("max_width", self.max_width, 1, MAX_CHANNELS)
            if self.max_width < self.width:
                message = f"max_width={self.max_width} is below width={self.width}: raise it, or narrow the network"
                raise ValueError(message)
        if self.pruned_to is not None:
            check_integer("pruned_to", self.pruned_to, 1, self.depth)
        check_flag("bias", self.bias)

    def _check_combination(self) -> None:
        variant = VARIANTS[self.variant]
        if self.upsample not in variant.upsamples:
            message = (
                f"{self.variant} cannot use upsample={self.upsample}: its edges grow maps by up to 2**depth, a 2x2 "
                f"transposed convolution only doubles them; accepted: {', '.join(variant.upsamples)}"
            )
            raise ValueError(message)
        if self.head not in variant.heads:
            message = f"{self.variant} has no head={self.head}: accepted for it: {', '.join(variant.heads)}"
            raise ValueError(message)
        if self.head == "guided" and self.classes != 1:
            message = (
                f"head=guided needs classes=1, not {self.classes}: its classifier says organ or no organ for the "
                "whole image, so it can only mask one class"
            )
            raise ValueError(message)
        if self.pruned_to is not None and not variant.prunable:
            message = f"{self.variant} cannot be pruned: only UNet++ holds its shallower networks; drop pruned_to"
            raise ValueError(message)
        if self.pruned_to is not None and self.head != "single":
            message = f"pruned_to={self.pruned_to} has one output, so it cannot have head={self.head}; use head=single"
            raise ValueError(message)

    @cached_property
    def label(self) -> str:
        """The short form: variant/depth/width/skip, then every field that is not at its default."""
        extra = [
            f"/{field.name}={_word(getattr(self, field.name))}"
            for field in fields(self)[4:]
            if getattr(self, field.name) != self._default(field.name, field.default)
        ]
        return f"{self.variant}/d{self.depth}/w{self.width}/{self.skip}" + "".join(extra)

    def _default(self, name: str, value: object) -> object:
        return VARIANTS[self.variant].upsamples[0] if name == "upsample" else value

    @classmethod
    def parse(cls, label: str) -> ModelSpec:
        """Read a label back; ValueError that names what was not understood and what is accepted."""
        parts = label.strip().split("/")
        head = _LABEL_HEAD.match("/".join(parts[:4]))
        if head is None:
            message = f"{label!r} is not a label: write variant/dDEPTH/wWIDTH/skip, e.g. unet3+/d4/w64/concat"
            raise ValueError(message)
        values: dict[str, Any] = {**head.groupdict(), "depth": int(head["depth"]), "width": int(head["width"])}
        for part in parts[4:]:
            key, separator, text = part.partition("=")
            if not separator or key in values:
                message = f"{part!r} in {label!r} is not a further key=value; accepted keys: {', '.join(_KEYS)}"
                raise ValueError(message)
            values[key] = text
        return cls(**coerce(values))

    def graph(self) -> SkipGraph:
        """Wire the variant, then apply the skip scheme; the same object for equal specs, as long as it is kept."""
        return _wired(self)

    def with_fields(self, **values: object) -> ModelSpec:
        """Return a changed spec; a default of the old variant's up-sampling does not stick to the new variant."""
        if "variant" in values and "upsample" not in values and self.upsample == VARIANTS[self.variant].upsamples[0]:
            values["upsample"] = None
        return replace(self, **coerce(values))


@lru_cache(maxsize=1024)  # every figure of a case asks for its graph
def _wired(spec: ModelSpec) -> SkipGraph:
    return SKIPS[spec.skip].apply(VARIANTS[spec.variant].wire(spec))


def graph(spec: ModelSpec) -> SkipGraph:
    """Return the network of `spec` as data; needs no torch."""
    return spec.graph()


_KEYS = tuple(field.name for field in fields(ModelSpec))
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def coerce(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts of a label, a sweep or a command line into a spec's values; ValueError for an unknown key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _KEYS:
            raise ValueError(suggest("key", key, _KEYS))
        result[key] = _from_text(key, value) if isinstance(value, str) and key not in CHOICES else value
        if key == "upsample" and value == "none":
            result[key] = None
    return result


def _from_text(key: str, text: str) -> int | bool | None:
    if text.lower() in _WORDS and (key == "bias" or text.lower() == "none"):
        return _WORDS[text.lower()]
    try:
        return int(text.encode("ascii"))  # int() reads the digits of every script; UnicodeError is a ValueError
    except ValueError:
        accepted = "true or false" if key == "bias" else "a whole number"
        message = f"{key}={text!r} is not {accepted}"
        raise ValueError(message) from None


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False; 0 and 1 would pass for them and make another label of the same network."""
    if not isinstance(value, bool):
        message = f"{name}={value!r} is neither true nor false"
        raise ValueError(message)  # noqa: TRY004 - every bad field is a ValueError, the contract of a spec


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        message = f"{name}={value!r} is not a whole number from {low} to {high}"
        raise ValueError(message)

"""What inference makes of weights once, and again whenever they change; kept on the layer that they belong to.

It is outside of parameters, buffers and the state_dict, and nothing of it goes into a copy or a file. It is made again
as soon as a weight has another version, place or type: an optimizer's step, `load_state_dict`, `.to()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _Kept:
    """What was made, by type of map, and from what; an empty one in a copy or a file."""

    __slots__ = ("by_type", "setting", "sources")

    def __init__(self) -> None:
        self.setting: object = None
        self.sources: tuple[_Source | None, ...] = ()
        self.by_type: dict[torch.dtype, Any] = {}

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


@dataclass(frozen=True, slots=True)
class _Source:
    """A weight at a version. `alias` keeps its memory, so that no other weight can come to lie at its address."""

    tensor: Tensor
    alias: Tensor
    version: int

    def is_still(self, x: Tensor | None) -> bool:
        """Whether `x` is that weight, unchanged."""
        return x is self.tensor and x.data_ptr() == self.alias.data_ptr() and _version(x) == self.version


def kept(
    owner: nn.Module, attribute: str, weights: Sequence[Tensor | None], setting: object = None
) -> dict[torch.dtype, Any]:
    """Return what was made of these weights so far, by type of map, for the caller to add to.

    It is under `attribute` of the owner, and empty where a weight or the setting, which is compared, is another now.
    """
    found: _Kept = owner.__dict__.setdefault(attribute, _Kept())
    if found.setting != setting or not _same(found.sources, weights):
        found.setting = setting
        found.sources = tuple(
            None if each is None else _Source(each, each.detach(), _version(each)) for each in weights
        )
        found.by_type = {}
    return found.by_type


def _same(sources: Sequence[_Source | None], weights: Sequence[Tensor | None]) -> bool:
    if len(sources) != len(weights):
        return False
    pairs = zip(sources, weights, strict=True)
    return all(x is None if source is None else source.is_still(x) for source, x in pairs)


def _version(x: Tensor) -> int:
    """Return what changes with a tensor; one made under inference_mode has no version, and cannot be changed."""
    return -1 if x.is_inference() else x._version  # noqa: SLF001 - no public name

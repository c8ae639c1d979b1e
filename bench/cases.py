"""A case: one network under everything that changes a number, and nothing else.

Cases are identified by a hash over their canonical JSON, which leaves out what is at its default, so that a field
added later does not orphan what was measured before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from skipcost.unet_models import ModelSpec, SkipGraph
from skipcost.unet_models.spec import check_flag, check_integer, suggest

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("inference", "training"),
    "precision": ("fp32", "tf32", "bf16", "fp16", "amp-bf16", "amp-fp16"),
    "layout": ("contiguous", "channels_last"),
    "backend": ("eager", "compile", "fused"),
    "outputs": ("final", "all"),
    "optimizer": ("adamw", "sgd"),
    "loss": ("cross-entropy", "dice"),
    "device": ("cpu", "cuda"),
}
# The flat names of sweeps and tables: a spec's `width` is channels, so the image's sides carry their own prefix.
FLAT_NAMES = {"height": "image_height", "width": "image_width"}
TRAINING_FIELDS = ("optimizer", "loss")


@dataclass(frozen=True, slots=True)
class Case:
    """A network to measure. `outputs` says which heads run at inference: final (as deployed) or all; training runs all.

    `optimizer` and `loss` belong to training and are put to their defaults at inference, so that equal work is one
    case. `threads` is the number of CPU threads, to which the process is also pinned. ValueError for bad values.
    """

    spec: ModelSpec = field(default_factory=ModelSpec)
    batch: int = 1
    height: int = 512
    width: int = 512
    mode: str = "inference"
    precision: str = "fp32"
    layout: str = "contiguous"
    backend: str = "eager"
    outputs: str = "final"
    optimizer: str = "adamw"
    loss: str = "cross-entropy"
    cudnn_benchmark: bool = True
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every field and give equal work one form."""
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(suggest(name, getattr(self, name), accepted))
        for name, top in (("batch", 65536), ("height", 65536), ("width", 65536), ("threads", 1024)):
            check_integer(FLAT_NAMES.get(name, name), getattr(self, name), 1, top)
        check_flag("cudnn_benchmark", self.cudnn_benchmark)
        if self.mode == "training":
            object.__setattr__(self, "outputs", "all")
        else:
            for name in TRAINING_FIELDS:
                object.__setattr__(self, name, _DEFAULTS[name])
        if self.spec.head == "single":
            object.__setattr__(self, "outputs", "final")  # one head: final and all are the same network

    def graph(self) -> SkipGraph:
        """The network that runs, as data: the deployed form where `outputs` is final."""
        whole = self.spec.graph()
        return whole.final() if self.outputs == "final" else whole

    def to_json(self) -> str:
        """Canonical JSON: the label, then every field that is not at its default, keys sorted."""
        values: dict[str, Any] = {"label": self.spec.label}
        values |= {name: getattr(self, name) for name, default in _DEFAULTS.items() if getattr(self, name) != default}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(spec=ModelSpec.parse(values.pop("label")), **values)

    @property
    def case_id(self) -> str:
        """The hash by which the store knows the case."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """A line for people: label, size, mode, precision and what else is not usual."""
        extra = [f"{self.height}x{self.width}", f"batch {self.batch}", self.mode, self.precision]
        extra += [self.backend] if self.backend != "eager" else []
        return f"{self.spec.label}  {', '.join(extra)}"

    def with_spec(self, spec: ModelSpec) -> Case:
        """The same case for another network."""
        return replace(self, spec=spec)

    def flat(self) -> dict[str, Any]:
        """Every field by its flat name: the spec's first, then the case's."""
        spec = {each.name: getattr(self.spec, each.name) for each in fields(self.spec)}
        return spec | {FLAT_NAMES.get(name, name): getattr(self, name) for name in _DEFAULTS}


_DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Case) if each.default is not MISSING}
SPEC_KEYS = tuple(each.name for each in fields(ModelSpec))
CASE_KEYS = tuple(FLAT_NAMES.get(name, name) for name in _DEFAULTS)


def usual_values(device: str, mode: str, threads: int) -> dict[str, Any]:
    """What a sweep uses where it says nothing: 512x512; on a GPU 16-bit and channels-last, on a CPU fp32.

    16-bit convolutions on a CPU without the instructions for them are up to 86 times slower than fp32.
    """
    usual: dict[str, Any] = {"device": device, "mode": mode, "threads": threads, "batch": 1, "precision": "fp32"}
    if device == "cuda":
        usual |= {"layout": "channels_last", "precision": "bf16"}
        if mode == "training":
            usual |= {"batch": 8, "precision": "amp-bf16"}
    return usual

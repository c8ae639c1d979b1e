"""A case: one network under everything that changes a number, and nothing else.

Cases are identified by a hash over their canonical JSON, which leaves out what is at its default, so that a field
added later does not orphan what was measured before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from skipcost.bench.cases.factory import CLASSES, Factory
from skipcost.bench.errors import UnsupportedError
from skipcost.bench.units import MAX_BATCH, MAX_SIDE, MAX_THREADS
from skipcost.unet_models import ModelSpec, SkipGraph
from skipcost.unet_models.spec import check_flag, check_integer, suggest

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("inference", "training"),
    "precision": ("fp32", "tf32", "bf16", "fp16", "amp-bf16", "amp-fp16"),
    "layout": ("contiguous", "channels_last"),
    "backend": ("eager", "compile", "fused", "rewritten"),
    "outputs": ("final", "all"),
    "optimizer": ("adamw", "sgd"),
    "loss": ("cross-entropy", "dice"),
    "device": ("cpu", "cuda"),
}
# The flat names of sweeps and tables: a spec's `width` is channels, so the image's sides carry their own prefix.
FLAT_NAMES = {"height": "image_height", "width": "image_width"}
TRAINING_FIELDS = ("optimizer", "loss")


@dataclass(frozen=True)  # without slots, so that its id is worked out once
class Case:
    """A network to measure. `outputs` says which heads run at inference: final (as deployed) or all; training runs all.

    `optimizer` and `loss` belong to training and are put to their defaults at inference, so that equal work is one
    case. `threads` is the number of CPU threads, to which the process is also pinned. ValueError for bad values.

    In place of a spec there may be a factory, a model of a user's own: it is one network, whatever its heads, and its
    `classes` belong to training.
    """

    spec: ModelSpec | Factory = field(default_factory=ModelSpec)
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
        for name, top in (("batch", MAX_BATCH), ("height", MAX_SIDE), ("width", MAX_SIDE), ("threads", MAX_THREADS)):
            check_integer(FLAT_NAMES.get(name, name), getattr(self, name), 1, top)
        check_flag("cudnn_benchmark", self.cudnn_benchmark)
        if self.mode == "training":
            object.__setattr__(self, "outputs", "all")
        else:
            for name in TRAINING_FIELDS:
                object.__setattr__(self, name, _DEFAULTS[name])
        if isinstance(self.spec, Factory) and self.mode == "inference":
            object.__setattr__(self, "spec", replace(self.spec, classes=CLASSES))
        if isinstance(self.spec, Factory) or self.spec.head == "single":
            object.__setattr__(self, "outputs", "final")  # one head: final and all are the same network

    @property
    def factory(self) -> Factory | None:
        """What makes the network where it is a user's own; None where it is the suite's."""
        return self.spec if isinstance(self.spec, Factory) else None

    @property
    def suite_spec(self) -> ModelSpec:
        """The spec, for what works on the suite's networks alone; UnsupportedError, a ValueError, for a factory."""
        if isinstance(self.spec, Factory):
            message = (
                f"{self.spec.label} is no network of the suite: it is traced, and has no graph to work this out on"
            )
            raise UnsupportedError(message)
        return self.spec

    def graph(self) -> SkipGraph:
        """The network that runs, as data: the deployed form where `outputs` is final; no factory has one."""
        return _graph(self.suite_spec, self.outputs)

    def to_json(self) -> str:
        """Canonical JSON: the label or the factory, then every field that is not at its default, keys sorted."""
        values: dict[str, Any] = {"label": self.spec.label}
        if self.factory:
            values = {
                "factory": {name: value for name, value in asdict(self.factory).items() if name != "read" or value}
            }
        values |= {name: getattr(self, name) for name, default in _DEFAULTS.items() if getattr(self, name) != default}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        spec = Factory(**values.pop("factory")) if "factory" in values else ModelSpec.parse(values.pop("label"))
        return cls(spec=spec, **values)

    @cached_property
    def case_id(self) -> str:
        """The hash by which the store knows the case; what somebody calls a model of his own is not part of it."""
        return hashlib.sha256(self.of_factory(name="").to_json().encode()).hexdigest()[:16]

    @property
    def key(self) -> str:
        """What a comparison of two versions of the code knows the case by: its JSON without the state of a factory."""
        return self.of_factory(code="", read="").to_json()

    @property
    def work(self) -> str:
        """What all states of a user's own model have in common, whatever it is called: its JSON without them."""
        return self.of_factory(name="", code="", read="").to_json()

    def of_factory(self, **fields: Any) -> Case:
        """The same case with other fields of its factory; itself where it has none."""
        return replace(self, spec=replace(self.spec, **fields)) if isinstance(self.spec, Factory) else self

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
        """Every field by its flat name: the spec's first, then the case's; None for what a user's own model has not."""
        flat = {name: getattr(self.spec, name, None) for name in SPEC_KEYS}
        flat |= {FLAT_NAMES.get(name, name): getattr(self, name) for name in _DEFAULTS}
        if self.factory:
            flat |= dict.fromkeys(("outputs",) if self.mode == "training" else ("outputs", "classes"))
        return flat


@lru_cache(maxsize=1024)  # every figure of a case asks for it
def _graph(spec: ModelSpec, outputs: str) -> SkipGraph:
    whole = spec.graph()
    return whole.final() if outputs == "final" else whole


_DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Case) if each.default is not MISSING}
SPEC_KEYS = tuple(each.name for each in fields(ModelSpec))
CASE_KEYS = tuple(FLAT_NAMES.get(name, name) for name in _DEFAULTS)
FACTORY_KEYS = ("in_channels", "classes")  # what a factory shares with a spec


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

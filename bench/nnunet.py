"""The 2-D configuration of an nnU-Net plan as a case of ours: what `skipcost fit --nnunet` costs and compares with.

Reads the JSON that nnU-Net v2 writes (`nnUNetPlans.json`): the form with an `architecture` of release 2.5 and the
flat one before it, and `dataset.json` beside it for channels and classes. Nothing of nnU-Net is imported. Where our
networks cannot say what the plan says, `Plan.differences` does, in words; a plan with no near network is refused.
Format: MIC-DKFZ/nnUNet, documentation/explanation_plans_files.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcost.bench.errors import BenchError
from skipcost.unet_models import ModelSpec

CONFIGURATION = "2d"
NETWORK = "PlainConvUNet"
NORMS = {"InstanceNorm2d": "instance", "BatchNorm2d": "batch", "GroupNorm": "group"}
ALWAYS_DIFFERENT = (
    "maps are halved by a convolution's stride in nnU-Net, here by max-pooling ahead of it: equal parameters and MACs",
    "in training, pooled maps and their indices are kept here besides: the plan's own network takes a little less",
    "nnU-Net has a head at every decoder level for deep supervision, here at the finest: 1x1 convolutions apart",
    "nnU-Net uses LeakyReLU, here ReLU, in place both; its loss adds soft Dice to the cross-entropy",
)
CLASSES_UNKNOWN = "no dataset.json beside the plan says how many classes there are: 2 are taken (--set classes=N)"
MOST_STAGES = 8  # of ours: depth 7


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan's 2-D configuration: the nearest spec, what is trained with it, and what differs from the plan."""

    name: str
    spec: ModelSpec
    batch: int
    height: int
    width: int
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Stages:
    """The stages of the plan's network, finest first, as either form of the file says them."""

    network: str
    features: list[int]
    kernels: list[list[int]]
    strides: list[list[int]]
    encoder_convs: list[int]
    decoder_convs: list[int]
    norm: str
    bias: bool


def read_plan(path: Path) -> Plan:
    """Read a plan; BenchError in one sentence for one that is none, is 3-D only, or has no near network of ours."""
    content = _read_json(path)
    configurations = content.get("configurations")
    if not isinstance(configurations, dict):
        message = f"{path} is no nnU-Net v2 plan: it has no configurations; give the nnUNetPlans.json of nnU-Net v2"
        raise BenchError(message)
    if CONFIGURATION not in configurations:
        has = ", ".join(configurations) or "none"
        message = f"{path} has no 2d configuration (it has: {has}), and networks here are 2-D; plan the dataset with 2d"
        raise BenchError(message)
    try:
        settings = _inherited(configurations, CONFIGURATION)
        stages = _stages(settings)
        height, width = (int(side) for side in settings["patch_size"])
        batch = int(settings["batch_size"])
        return _plan(path, content, stages, (batch, height, width))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        message = f"the 2d configuration of {path} is not one that nnU-Net v2 writes: {type(error).__name__} {error}"
        raise BenchError(message) from None
    except ValueError as error:
        message = f"the 2d configuration of {path} has no near network here: {error}"
        raise BenchError(message) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: no JSON, no text; nnU-Net v1 wrote pickles
        reason = getattr(error, "strerror", None) or "it is not JSON (nnU-Net v1 wrote pickles)"
        message = f"cannot read {path}: {reason}; give the nnUNetPlans.json of nnU-Net v2"
        raise BenchError(message) from None
    if not isinstance(content, dict):
        message = f"{path} is no nnU-Net v2 plan: it holds a {type(content).__name__}, not an object"
        raise BenchError(message)
    return content


def _inherited(configurations: dict[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration over the one that it inherits from, as nnU-Net resolves them."""
    if name in seen:
        message = f"it inherits from itself ({' -> '.join((*seen, name))})"
        raise ValueError(message)
    own: dict[str, Any] = configurations[name]
    parent = own.get("inherits_from")
    return own if parent is None else _inherited(configurations, parent, (*seen, name)) | own


def _stages(settings: dict[str, Any]) -> _Stages:
    if "architecture" not in settings:
        count = len(settings["pool_op_kernel_sizes"])
        base, most = settings["UNet_base_num_features"], settings["unet_max_num_features"]
        return _Stages(
            settings.get("UNet_class_name", NETWORK),
            [min(base << stage, most) for stage in range(count)],
            settings["conv_kernel_sizes"],
            settings["pool_op_kernel_sizes"],
            settings["n_conv_per_stage_encoder"],
            settings["n_conv_per_stage_decoder"],
            "InstanceNorm2d",
            bias=True,
        )
    network, values = settings["architecture"]["network_class_name"], settings["architecture"]["arch_kwargs"]
    if network.rpartition(".")[2] != NETWORK:
        return _Stages(network, [], [], [], [], [], "", bias=True)
    return _Stages(
        network,
        values["features_per_stage"],
        values["kernel_sizes"],
        values["strides"],
        values["n_conv_per_stage"],
        values["n_conv_per_stage_decoder"],
        values["norm_op"],
        bias=values["conv_bias"],
    )


def _plan(path: Path, content: dict[str, Any], stages: _Stages, sizes: tuple[int, int, int]) -> Plan:
    _check(stages)
    channels, classes, notes = _channels_and_classes(path, content)
    depth, width, most = len(stages.features) - 1, stages.features[0], max(stages.features)
    spec = ModelSpec(
        depth=depth,
        width=width,
        max_width=most,
        in_channels=channels,
        classes=classes,
        norm=NORMS[stages.norm.rpartition(".")[2]],
        bias=stages.bias,
    )
    differences = [*_odd_stages(stages, spec), *notes, *ALWAYS_DIFFERENT]
    batch, rows, columns = sizes
    step = 1 << depth
    if rows % step or columns % step:
        differences.append(f"{rows}x{columns} is no multiple of {step}: ours drops rows or columns and crops to match")
    return Plan(str(content.get("dataset_name", path.stem)), spec, batch, rows, columns, tuple(differences))


def _check(stages: _Stages) -> None:
    """Refuse what no network of ours is near to."""
    if stages.network.rpartition(".")[2] != NETWORK:
        message = f"its network is {stages.network}; only {NETWORK}, a plain U-Net, has one"
        raise ValueError(message)
    count = len(stages.features)
    if not 2 <= count <= MOST_STAGES:  # noqa: PLR2004 - one down-sampling at least
        message = f"it has {count} stages; 2 to {MOST_STAGES} are possible"
        raise ValueError(message)
    if any(len(kernel) != 2 or set(kernel) != {3} for kernel in stages.kernels):  # noqa: PLR2004 - two dimensions
        message = f"its kernels are {stages.kernels}; only 3x3 is possible"
        raise ValueError(message)
    norm = stages.norm.rpartition(".")[2]
    if norm not in NORMS:
        message = f"its norm is {stages.norm}; {', '.join(NORMS)} are possible"
        raise ValueError(message)


def _odd_stages(stages: _Stages, spec: ModelSpec) -> list[str]:
    """What stages have that ours cannot."""
    odd = []
    ours = [min(spec.width << level, max(stages.features)) for level in range(spec.depth + 1)]
    if ours != stages.features:
        odd.append(f"the plan's stages have {stages.features} features, ours {ours}: doubled up to the largest")
    if any(set(stride) != {2} for stride in stages.strides[1:]):
        odd.append(f"the plan's stages halve by {stages.strides[1:]}, ours by 2x2 at every level")
    for path, counts in (("encoder", stages.encoder_convs), ("decoder", stages.decoder_convs)):
        if set(counts) != {2}:
            odd.append(f"the plan's {path} has {counts} convolutions per stage, ours 2")
    return odd


def _channels_and_classes(path: Path, content: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Channels of the image and classes, from `dataset.json` where it lies beside the plan."""
    beside = path.parent / "dataset.json"
    if not beside.is_file():
        channels = len(content.get("foreground_intensity_properties_per_channel", {})) or 1
        return channels, 2, [CLASSES_UNKNOWN]
    dataset = _read_json(beside)
    names, labels = dataset.get("channel_names", dataset.get("modality")), dataset.get("labels")
    if not isinstance(names, dict) or not isinstance(labels, dict):
        message = f"{beside} is no dataset.json of nnU-Net: it has no channel_names or no labels"
        raise BenchError(message)
    labels = {name: value for name, value in labels.items() if name != "ignore"}
    regions = any(isinstance(value, list) for value in labels.values())
    return len(names), len(labels) - regions, []  # regions overlap: each is a map of its own, background is none

"""A 2-D configuration of an nnU-Net plan as a case of ours: what `skipcost fit --nnunet` costs and compares with.

Reads the JSON that nnU-Net v2 writes (`nnUNetPlans.json`): the form with an `architecture` of release 2.5 and the
flat one before it, and `dataset.json` beside it for channels and classes. Nothing of nnU-Net is imported. Where our
networks cannot say what the plan says, `Plan.differences` does, in words and, where parameters or MACs differ, by how
much: those of the plan's own network are counted from the plan (`nnunet_network`). A plan with no near network is
refused. Format: MIC-DKFZ/nnUNet, documentation/explanation_plans_files.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.nnunet_network import Count, Pair, Stages, read_stages
from skipcost.bench.units import MAX_BATCH, MAX_SIDE
from skipcost.unet_models import ModelSpec
from skipcost.unet_models.spec import check_integer, suggest

CONFIGURATION = "2d"  # nnU-Net's own name for it
NETWORK = "PlainConvUNet"
HOMES = ("", "dynamic_network_architectures.architectures.unet")  # modules whose PlainConvUNet is known
NORMS = {"InstanceNorm2d": "instance", "BatchNorm2d": "batch", "GroupNorm": "group", "": "none"}
ANEW = "nnUNetv2_plan_experiment writes one, with a 2d configuration"
POOLED = "maps are halved by a convolution's stride in nnU-Net, here by max-pooling ahead of it"
EQUAL = f"{POOLED}: equal parameters and MACs"
KEPT = "in training, pooled maps and their indices are kept here besides: the plan's own network takes a little less"
LOSS = "its loss adds soft Dice to the cross-entropy"
CLASSES_UNKNOWN = "no dataset.json beside the plan says how many classes there are: 2 are taken (--set classes=N)"


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan's 2-D configuration: the nearest spec, what is trained with it, and what differs from the plan.

    `params` and `conv_macs` are the plan's own network's, with its finest head alone, the latter for one patch.
    """

    name: str
    configuration: str
    spec: ModelSpec
    batch: int
    height: int
    width: int
    params: int
    conv_macs: int
    differences: tuple[str, ...]


def read_plan(path: Path, asked: str | None = None) -> Plan:
    """Read a plan's configuration, the one `asked` for or the 2-D one; BenchError in one sentence for one that is none.

    So for a plan that is 3-D only, that nnU-Net itself could not run, or that has no near network of ours.
    """
    content = _read_json(path)
    configurations = content.get("configurations")
    if not isinstance(configurations, dict):
        first = " but plans_per_stage, as nnU-Net v1's" if "plans_per_stage" in content else ""
        message = f"{path} is no nnU-Net v2 plan: it has no configurations{first}; {ANEW}"
        raise BenchError(message)
    name = _chosen(path, configurations, asked)
    try:
        return _plan(path, content, name, _inherited(configurations, name))
    except KeyError as error:
        message = f"the {name} configuration of {path} is not one that nnU-Net v2 writes: it has no {error}"
        raise BenchError(message) from None
    except (TypeError, AttributeError) as error:
        message = f"the {name} configuration of {path} is not one that nnU-Net v2 writes: {error}"
        raise BenchError(message) from None
    except ValueError as error:
        message = f"the {name} configuration of {path} has no near network here: {error}"
        raise BenchError(message) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no text; nnU-Net v1 wrote pickles
        reason = getattr(error, "strerror", None) or "it is not JSON (nnU-Net v1 wrote pickles)"
        message = f"cannot read {path}: {reason}; give the nnUNetPlans.json of nnU-Net v2"
        raise BenchError(message) from None
    if not isinstance(content, dict):
        message = f"{path} is no nnU-Net v2 plan: it holds a {type(content).__name__}, not an object"
        raise BenchError(message)
    return content


def _chosen(path: Path, configurations: dict[str, Any], asked: str | None) -> str:
    """The configuration asked for, else nnU-Net's own 2d, else the only one whose patch has two sides."""
    if asked is not None and asked not in configurations:
        raise BenchError(suggest("configuration", asked, configurations) + f", in {path}")
    if asked or CONFIGURATION in configurations:
        return asked or CONFIGURATION
    flat = [name for name in configurations if _sides(configurations, name) == len(("rows", "columns"))]
    if len(flat) > 1:
        message = f"{path} has no configuration 2d, but {', '.join(flat)}: name one with --configuration"
        raise BenchError(message)
    if not flat:
        has = ", ".join(configurations) or "none"
        message = f"{path} has no 2-D configuration (it has: {has}), and networks here are 2-D; {ANEW}"
        raise BenchError(message)
    return flat[0]


def _sides(configurations: dict[str, Any], name: str) -> int:
    """How many sides the patch of a configuration has; 0 for what cannot be read, which another sentence tells."""
    try:
        return len(_inherited(configurations, name)["patch_size"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return 0


def _inherited(configurations: dict[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration over the one that it inherits from, as nnU-Net resolves them."""
    if name in seen:
        message = f"it inherits from itself ({' -> '.join((*seen, name))})"
        raise ValueError(message)
    if name not in configurations:
        message = f"it inherits from {name!r}, which the plan does not have"
        raise ValueError(message)
    own: dict[str, Any] = configurations[name]
    parent = own.get("inherits_from")
    return own if parent is None else _inherited(configurations, parent, (*seen, name)) | own


def _architecture(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The network's class and its keywords; the flat form before release 2.5 has them under names of its own."""
    if "architecture" in settings:
        return settings["architecture"]["network_class_name"], settings["architecture"]["arch_kwargs"]
    convs = settings["n_conv_per_stage_encoder"]
    base, most = settings["UNet_base_num_features"], settings["unet_max_num_features"]
    return settings.get("UNet_class_name", NETWORK), {
        "features_per_stage": [min(base << stage, most) for stage in range(len(convs))],
        "kernel_sizes": settings["conv_kernel_sizes"],
        "strides": settings["pool_op_kernel_sizes"],
        "n_conv_per_stage": convs,
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm2d",
        "norm_op_kwargs": {"affine": True},
        "nonlin": "torch.nn.LeakyReLU",
    }


def _plan(path: Path, content: dict[str, Any], name: str, settings: dict[str, Any]) -> Plan:
    size, batch = _patch(settings["patch_size"]), settings["batch_size"]
    check_integer("batch_size", batch, 1, MAX_BATCH)
    network, values = _architecture(settings)
    home, _, kind = str(network).rpartition(".")
    if kind != NETWORK:
        message = f"its network is {network}; only {NETWORK}, a plain U-Net, has one"
        raise ValueError(message)
    stages = read_stages(values)
    channels, classes, notes = _channels_and_classes(path, content)
    spec = _spec(stages, channels, classes)
    if home not in HOMES:
        notes.append(f"its network is {network}: taken for {HOMES[-1]}.{NETWORK}")
    if settings.get("previous_stage"):
        notes.append(f"the segmentation of {settings['previous_stage']} is an input, too: its channels are not counted")
    finest, coarser = stages.count(channels, classes, size)
    differences = [
        *_odd_stages(stages, spec),
        *_odd_blocks(stages),
        *notes,
        *_counted(spec, finest, coarser, size),
        _activations(stages),
    ]
    step = 1 << spec.depth
    if size[0] % step or size[1] % step:
        differences.append(f"{size[0]}x{size[1]} is no multiple of {step}: ours drops rows or columns, crops to match")
    title = str(content.get("dataset_name", path.stem))
    return Plan(title, name, spec, batch, *size, finest.params, finest.macs, tuple(differences))


def _patch(sides: list[Any]) -> Pair:
    """Height and width; ValueError for a patch of another number of sides."""
    if len(sides) != len(("rows", "columns")):
        message = f"its patch is {'x'.join(map(str, sides))}, and networks here are 2-D"
        raise ValueError(message)
    for side in sides:
        check_integer("patch_size", side, 1, MAX_SIDE)
    return sides[0], sides[1]


def _spec(stages: Stages, channels: int, classes: int) -> ModelSpec:
    """The nearest network of ours; ValueError for what no network of ours is near to."""
    if any(side % 2 == 0 for kernel in stages.kernels for side in kernel):
        message = f"its kernels are {_listed(stages.kernels)}: even ones, with which nnU-Net's maps do not meet again"
        raise ValueError(message)
    if stages.norm not in NORMS:
        message = f"its norm is {stages.norm}; {', '.join(filter(None, NORMS))} or none are possible"
        raise ValueError(message)
    return ModelSpec(
        depth=len(stages.features) - 1,
        width=stages.features[0],
        max_width=max(stages.features),
        in_channels=channels,
        classes=classes,
        norm=NORMS[stages.norm],
        bias=stages.bias,
    )


def _counted(spec: ModelSpec, finest: Count, coarser: Count, size: Pair) -> list[str]:
    """How the plan's own parameters and MACs stand to ours: equal where they are, else both and by how much."""
    try:
        ours = Count(spec.graph().params(), spec.graph().conv_macs(*size))
    except ValueError:
        message = (
            f"it halves one axis less often than the other, here both are halved {spec.depth} times, and then "
            f"{size[0]}x{size[1]} has no pixel left"
        )
        raise ValueError(message) from None
    told = [EQUAL, KEPT]
    if ours != finest:
        told = [POOLED]
        told.append(
            f"in all, the plan's own network has {_told(ours.params, finest.params)} parameters and "
            f"{_told(ours.macs, finest.macs)} MACs a patch: memory and time are told of ours"
        )
    if coarser.params:
        told.append(
            "nnU-Net has a head at every decoder level for deep supervision, here at the finest: 1x1 convolutions of "
            f"{coarser.params:,} parameters and {coarser.macs:,} MACs a patch, in no sum here"
        )
    return told


def _told(ours: int, own: int) -> str:
    beside = "as many" if ours == own else f"{ours:,}, {ours / own - 1:+.2%}"
    return f"{own:,} (ours {beside})"


def _odd_stages(stages: Stages, spec: ModelSpec) -> list[str]:
    """What the plan's stages have that ours cannot."""
    odd = []
    ours = [min(spec.width << level, max(stages.features)) for level in range(spec.depth + 1)]
    if ours != list(stages.features):
        odd.append(f"the plan's stages have {list(stages.features)} features, ours {ours}: doubled up to the largest")
    if stages.strides[0] != (1, 1):
        odd.append(f"the plan's first stage strides by {list(stages.strides[0])}, ours keeps the patch's size there")
    if any(stride != (2, 2) for stride in stages.strides[1:]):
        odd.append(f"the plan's stages halve by {_listed(stages.strides[1:])}, ours by 2x2 at every level")
    if any(kernel != (3, 3) for kernel in stages.kernels):
        odd.append(f"the plan's kernels are {_listed(stages.kernels)}, ours 3x3")
    for path, counts in (("encoder", stages.encoder_convs), ("decoder", stages.decoder_convs)):
        if set(counts) != {2}:
            odd.append(f"the plan's {path} has {list(counts)} convolutions per stage, ours 2")
    return odd


def _odd_blocks(stages: Stages) -> list[str]:
    """What the plan has around each convolution that ours cannot."""
    odd = []
    if stages.norm and not stages.affine:
        odd.append(f"the plan's {stages.norm} has no weights (affine is false), ours has a scale and a shift")
    if not stages.bias:
        odd.append("the plan's transposed convolutions have no bias, ours do")
    if stages.dropout:
        odd.append(f"the plan has {stages.dropout} behind every convolution, ours none: its masks are kept in training")
    if stages.act_first:
        odd.append("the plan's activations come before the norm (nonlin_first), ours after it")
    odd += [f"the plan's network is given {name}, which is not looked at" for name in stages.unread]
    return odd


def _activations(stages: Stages) -> str:
    """What stands for the plan's activation here, and its loss."""
    return f"nnU-Net uses {stages.act or 'no activation'}, here ReLU, in place; {LOSS}"


def _listed(pairs: tuple[Pair, ...]) -> list[list[int]]:
    """Pairs as plans write them."""
    return [list(pair) for pair in pairs]


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
    values = [value if isinstance(value, list) else [value] for value in labels.values()]
    if any(len(value) > 1 for value in values):  # regions overlap: each is a map of its own, background is none
        return len(names), sum(set(value) != {0} for value in values), []
    return len(names), len({each for value in values for each in value}), []

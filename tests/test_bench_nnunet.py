"""nnU-Net plans: what is read from either form of the file, what is said to differ, and what is refused.

The plans in `tests/nnunet` are ours, in the format that nnU-Net v2 writes; the datasets do not exist.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipcost.bench.errors import BenchError
from skipcost.bench.nnunet import ALWAYS_DIFFERENT, CLASSES_UNKNOWN, Plan, read_plan
from skipcost.unet_models import ModelSpec

PLANS = Path(__file__).parent / "nnunet"
READABLE = {
    "architecture": Plan(
        "Dataset901_Leaves",
        ModelSpec.parse("unet/d5/w32/concat/in_channels=3/max_width=512/norm=instance"),
        12,
        256,
        192,
        (CLASSES_UNKNOWN, *ALWAYS_DIFFERENT),
    ),
    "flat": Plan(
        "Dataset902_Cells",
        ModelSpec.parse("unet/d4/w32/concat/max_width=256/norm=instance"),
        30,
        128,
        128,
        (CLASSES_UNKNOWN, *ALWAYS_DIFFERENT),
    ),
    "inherited": Plan(
        "Dataset903_Roads",
        ModelSpec.parse("unet/d3/w16/concat/norm=instance"),
        9,
        64,
        64,
        (CLASSES_UNKNOWN, *ALWAYS_DIFFERENT),
    ),
}


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], object], name: str = "architecture") -> Path:
    """A plan with its 2d configuration changed."""
    content = copy.deepcopy(json.loads((PLANS / f"{name}.json").read_text()))
    change(content["configurations"]["2d"])
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "expected"), READABLE.items())
def test_a_plan_becomes_the_nearest_case(name: str, expected: Plan) -> None:
    """Features become width and cap, stages depth, patch and batch the case; what always differs is said."""
    assert read_plan(PLANS / f"{name}.json") == expected


def test_what_the_plan_has_and_ours_cannot_is_said() -> None:
    """Features that do not double, strides of one axis, and a patch that our poolings do not divide."""
    plan = read_plan(PLANS / "odd_stages.json")

    assert plan.spec.label == "unet/d4/w24/concat/max_width=200/norm=instance"
    assert plan.differences[:1] == (
        "the plan's stages halve by [[2, 2], [2, 2], [2, 2], [2, 1]], ours by 2x2 at every level",
    )
    assert plan.differences[-1] == "320x40 is no multiple of 16: ours drops rows or columns and crops to match"


def test_other_numbers_of_convolutions_and_features_are_said(tmp_path: Path) -> None:
    """Our blocks have two convolutions, and widths that double up to a cap."""

    def change(settings: dict[str, Any]) -> None:
        values = settings["architecture"]["arch_kwargs"]
        values["n_conv_per_stage"] = [2, 2, 2, 3, 3, 3]
        values["features_per_stage"] = [32, 64, 96, 256, 512, 512]

    differences = read_plan(changed(tmp_path, change)).differences

    assert any(
        "[32, 64, 96, 256, 512, 512] features, ours [32, 64, 128, 256, 512, 512]" in text for text in differences
    )
    assert "the plan's encoder has [2, 2, 2, 3, 3, 3] convolutions per stage, ours 2" in differences


@pytest.mark.parametrize(
    ("dataset", "label"),
    [
        (
            {"channel_names": {"0": "R", "1": "G"}, "labels": {"background": 0, "a": 1, "b": 2}},
            "in_channels=2/classes=3",
        ),
        ({"modality": {"0": "CT"}, "labels": {"background": 0, "a": 1, "ignore": 2}}, "norm=instance"),
        (
            {"channel_names": {"0": "T1"}, "labels": {"background": 0, "whole": [1, 2], "core": [2]}},
            "w32/concat/max_width=512/norm=instance",
        ),
    ],
)
def test_channels_and_classes_come_from_the_dataset_beside_the_plan(
    tmp_path: Path, dataset: dict[str, Any], label: str
) -> None:
    """Every class is a map; the ignore label is none, and regions have no background."""
    path = changed(tmp_path, lambda _: None)
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))

    plan = read_plan(path)

    assert label in plan.spec.label
    assert CLASSES_UNKNOWN not in plan.differences


def test_a_dataset_that_is_none_is_refused(tmp_path: Path) -> None:
    """A file of that name without channels or labels is named itself, not the plan."""
    path = changed(tmp_path, lambda _: None)
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0}}')

    with pytest.raises(BenchError, match=r"dataset.json is no dataset.json of nnU-Net: it has no channel_names"):
        read_plan(path)


def set_in_architecture(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    """A change of one keyword of the architecture."""
    return lambda settings: settings["architecture"]["arch_kwargs"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_in_architecture("norm_op", "torch.nn.LayerNorm"), "its norm is torch.nn.LayerNorm; InstanceNorm2d, "),
        (set_in_architecture("kernel_sizes", [[3, 3], [5, 5]]), "only 3x3 is possible"),
        (set_in_architecture("kernel_sizes", [[3, 3, 3]] * 6), "only 3x3 is possible"),
        (set_in_architecture("features_per_stage", [32] * 9), "it has 9 stages; 2 to 8 are possible"),
        (set_in_architecture("features_per_stage", [32]), "it has 1 stages; 2 to 8 are possible"),
        (lambda settings: settings.update(inherits_from="2d"), "it inherits from itself"),
        (lambda settings: settings.update(patch_size=[64, 64, 64]), "has no near network here|nnU-Net v2 writes"),
        (lambda settings: settings.pop("batch_size"), "is not one that nnU-Net v2 writes: KeyError 'batch_size'"),
        (lambda settings: settings.update(inherits_from="2d_gone"), "nnU-Net v2 writes: KeyError '2d_gone'"),
        (lambda settings: settings.update(patch_size=None), "is not one that nnU-Net v2 writes"),
    ],
)
def test_a_plan_without_a_near_network_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    """One sentence says what it has and what is possible."""
    with pytest.raises(BenchError, match=sentence):
        read_plan(changed(tmp_path, change))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("three_dimensional", r"has no 2d configuration \(it has: 3d_fullres, 3d_lowres\), and networks here are 2-D"),
        ("residual", "its network is .*ResidualEncoderUNet; only PlainConvUNet, a plain U-Net, has one"),
        ("missing", r"cannot read .*missing.json: No such file or directory; give the nnUNetPlans.json"),
    ],
)
def test_a_file_that_is_no_plan_for_us_is_refused(name: str, sentence: str) -> None:
    """3-D only, another family of networks, no file."""
    with pytest.raises(BenchError, match=sentence):
        read_plan(PLANS / f"{name}.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x80\x04pickle", r"it is not JSON \(nnU-Net v1 wrote pickles\)"),
        (b"[1]", "it holds a list, not an object"),
        (b"{}", "it has no configurations"),
        (b'{"configurations": {}}', r"it has: none"),
        (b'{"configurations": {"2d": [1]}}', "is not one that nnU-Net v2 writes"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    """A pickle of nnU-Net v1, JSON of something else, a plan of nothing."""
    path = tmp_path / "plans"
    path.write_bytes(content)

    with pytest.raises(BenchError, match=sentence):
        read_plan(path)

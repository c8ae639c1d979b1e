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
from places import TESTS

from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.nnunet import CLASSES_UNKNOWN, EQUAL, KEPT, LOSS, POOLED, read_plan
from skipcost.unet_models import ModelSpec

PLANS = TESTS / "nnunet"
READABLE = {
    "architecture": ("Dataset901_Leaves", "unet/d5/w32/concat/in_channels=3/max_width=512/norm=instance", 12, 256, 192),
    "flat": ("Dataset902_Cells", "unet/d4/w32/concat/max_width=256/norm=instance", 30, 128, 128),
    "inherited": ("Dataset903_Roads", "unet/d3/w16/concat/norm=instance", 9, 64, 64),
}


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], object], name: str = "architecture") -> Path:
    """A plan with its 2d configuration changed."""
    content = copy.deepcopy(json.loads((PLANS / f"{name}.json").read_text()))
    change(content["configurations"]["2d"])
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "expected"), READABLE.items())
def test_a_plan_becomes_the_nearest_case(name: str, expected: tuple[str, str, int, int, int]) -> None:
    """Features become width and cap, stages depth, patch and batch the case; what always differs is said."""
    plan = read_plan(PLANS / f"{name}.json")

    title, label, batch, height, width = expected
    assert (plan.name, plan.configuration, plan.batch, plan.height, plan.width) == (title, "2d", batch, height, width)
    assert plan.spec == ModelSpec.parse(label)
    unknown, equal, kept, heads, *rest = plan.differences
    assert (unknown, equal, kept) == (CLASSES_UNKNOWN, EQUAL, KEPT)
    assert heads.startswith("nnU-Net has a head at every decoder level for deep supervision, here at the finest: 1x1")
    assert rest == [f"nnU-Net uses LeakyReLU, here ReLU, in place; {LOSS}"]


def test_the_heads_of_coarser_levels_are_counted_apart() -> None:
    """Levels of 32, 64 and 128 channels at 64, 32 and 16 pixels: weights and a bias for each of two classes."""
    differences = read_plan(PLANS / "flat.json").differences

    params = sum(2 * features + 2 for features in (64, 128, 256)[:2]) + 2 * 256 + 2
    macs = sum(2 * features * side**2 for features, side in ((64, 64), (128, 32), (256, 16)))
    assert any(f"1x1 convolutions of {params:,} parameters and {macs:,} MACs a patch" in text for text in differences)


def test_what_the_plan_has_and_ours_cannot_is_said() -> None:
    """Features that do not double, strides of one axis, and a patch that our poolings do not divide."""
    plan = read_plan(PLANS / "odd_stages.json")

    assert plan.spec.label == "unet/d4/w24/concat/max_width=200/norm=instance"
    assert plan.differences[:1] == (
        "the plan's stages halve by [[2, 2], [2, 2], [2, 2], [2, 1]], ours by 2x2 at every level",
    )
    assert plan.differences[-1] == "320x40 is no multiple of 16: ours drops rows or columns, crops to match"
    assert EQUAL not in plan.differences
    assert POOLED in plan.differences


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
        ({"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": [1], "b": [1], "c": 2}}, "classes=3"),
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
        (set_in_architecture("norm_op", "torch.nn.LayerNorm"), "its norm is LayerNorm; InstanceNorm2d, .* or none are"),
        (set_in_architecture("kernel_sizes", [[3, 3], [5, 5]]), "its kernel_sizes has 2 entries, .*, for 6 stages"),
        (set_in_architecture("kernel_sizes", [[3, 3, 3]] * 6), "not two numbers for each stage, and networks here are"),
        (set_in_architecture("kernel_sizes", [[3, 2]] * 6), "even ones, with which nnU-Net's maps do not meet again"),
        (set_in_architecture("kernel_sizes", [[3, 0]] * 6), "kernel_sizes=0 is not a whole number from 1 to 64"),
        (set_in_architecture("strides", [[1, 1], [2.0, 2], *[[2, 2]] * 4]), "strides=2.0 is not a whole number from 1"),
        (set_in_architecture("features_per_stage", [32] * 9), "its features_per_stage has 9 entries, .*, for 6"),
        (set_in_architecture("features_per_stage", [0] * 6), "features_per_stage=0 is not a whole number from 1 to"),
        (set_in_architecture("n_stages", 14), "n_stages=14 is not a whole number from 2 to 13"),
        (set_in_architecture("n_stages", 1), "n_stages=1 is not a whole number from 2 to 13"),
        (
            set_in_architecture("n_conv_per_stage", 10**8),
            "n_conv_per_stage=100000000 is not a whole number from 1 to 64",
        ),
        (set_in_architecture("conv_bias", "yes"), "conv_bias='yes' is neither true nor false"),
        (set_in_architecture("norm_op_kwargs", [1]), "is not one that nnU-Net v2 writes: 'list' object"),
        (lambda settings: settings.update(inherits_from="2d"), "it inherits from itself"),
        (lambda settings: settings.update(patch_size=[64, 64, 64]), "its patch is 64x64x64, and networks here are 2-D"),
        (lambda settings: settings.update(patch_size=[64, 0]), "patch_size=0 is not a whole number from 1 to 65536"),
        (lambda settings: settings.update(patch_size=[250, 256]), "nnU-Net cannot run it: its strides take 250x256 to"),
        (lambda settings: settings.pop("batch_size"), "is not one that nnU-Net v2 writes: it has no 'batch_size'"),
        (lambda settings: settings.update(batch_size=0), "batch_size=0 is not a whole number from 1 to 65536"),
        (lambda settings: settings.update(batch_size=2.5), "batch_size=2.5 is not a whole number from 1 to 65536"),
        (lambda settings: settings.update(batch_size=float("nan")), "batch_size=nan is not a whole number from 1"),
        (lambda settings: settings.update(inherits_from="2d_gone"), "inherits from '2d_gone', which the plan does not"),
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
        ("three_dimensional", r"has no 2-D configuration \(it has: 3d_fullres, 3d_lowres\), and networks here are 2-D"),
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
        (b"{}", "it has no configurations; nnUNetv2_plan_experiment writes one"),
        (b'{"plans_per_stage": {}}', "it has no configurations but plans_per_stage, as nnU-Net v1's; nnUNetv2_plan_ex"),
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            set_in_architecture("strides", [[2, 2]] * 6),
            "the plan's first stage strides by [2, 2], ours keeps the patch's",
        ),
        (
            set_in_architecture("strides", [[1, 1], *[[2, 2]] * 4, [1, 2]]),
            "[2, 2], [1, 2]], ours by 2x2 at every level",
        ),
        (set_in_architecture("kernel_sizes", [[1, 3], *[[3, 3]] * 5]), "the plan's kernels are [[1, 3], [3, 3], "),
        (
            set_in_architecture("n_conv_per_stage", [2, 2, 2, 2, 2, 3]),
            "the plan's encoder has [2, 2, 2, 2, 2, 3] convo",
        ),
        (set_in_architecture("n_conv_per_stage_decoder", 1), "the plan's decoder has [1, 1, 1, 1, 1] convolutions per"),
        (
            set_in_architecture("norm_op_kwargs", {"affine": False}),
            "InstanceNorm2d has no weights (affine is false), ours",
        ),
        (set_in_architecture("norm_op_kwargs", None), "InstanceNorm2d has no weights (affine is false), ours has"),
        (set_in_architecture("conv_bias", False), "the plan's transposed convolutions have no bias, ours do"),
    ],
)
def test_what_changes_the_sums_is_said_with_both_of_them(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    """The cause, the plan's own parameters and MACs beside ours, and no word of equality."""
    plan = read_plan(changed(tmp_path, change))

    ours = plan.spec.graph()
    pairs = ((plan.params, ours.params()), (plan.conv_macs, ours.conv_macs(plan.height, plan.width)))
    (sums,) = (text for text in plan.differences if text.startswith("in all, the plan's own network has "))
    assert any(told in text for text in plan.differences)
    assert not {EQUAL, KEPT} & set(plan.differences)
    assert any(own != mine for own, mine in pairs)
    for own, mine in pairs:
        assert f"{own:,} (ours {f'{mine:,}, {mine / own - 1:+.2%}' if own != mine else 'as many'})" in sums


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda settings: settings["architecture"]["arch_kwargs"].update(
                dropout_op="torch.nn.Dropout2d", dropout_op_kwargs={"p": 0.1, "inplace": True}
            ),
            "the plan has Dropout2d(p=0.1) behind every convolution, ours none: its masks are kept in training",
        ),
        (set_in_architecture("nonlin_first", True), "activations come before the norm (nonlin_first), ours after it"),
        (
            set_in_architecture("nonlin_kwargs", {"negative_slope": 0.2}),
            "nnU-Net uses LeakyReLU(negative_slope=0.2), here",
        ),
        (set_in_architecture("nonlin", None), "nnU-Net uses no activation, here ReLU"),
        (set_in_architecture("squeeze", 4), "the plan's network is given squeeze, which is not looked at"),
        (
            lambda settings: settings["architecture"].update(network_class_name="my.nets.PlainConvUNet"),
            "its network is my.nets.PlainConvUNet: taken for dynamic_network_architectures.architectures.unet.Plain",
        ),
        (lambda settings: settings.update(previous_stage="2d_low"), "the segmentation of 2d_low is an input, too"),
    ],
)
def test_what_leaves_the_sums_alone_is_said_too(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    """What the plan's network does and ours does not, at the same parameters and MACs."""
    plan = read_plan(changed(tmp_path, change))

    assert any(told in text for text in plan.differences)
    assert EQUAL in plan.differences
    assert plan.differences != read_plan(PLANS / "architecture.json").differences


def test_no_dropout_and_a_norm_that_is_none_are_read_as_what_they_are(tmp_path: Path) -> None:
    """A probability of 0 drops nothing; without a norm_op there is no norm here either."""

    def change(settings: dict[str, Any]) -> None:
        values = settings["architecture"]["arch_kwargs"]
        values |= {"norm_op": None, "norm_op_kwargs": None, "dropout_op": "torch.nn.Dropout2d"}
        values["dropout_op_kwargs"] = {"p": 0}

    plan = read_plan(changed(tmp_path, change))

    assert plan.spec.norm == "none"
    assert EQUAL in plan.differences
    assert not any("Dropout" in text for text in plan.differences)


def test_one_number_stands_for_every_stage(tmp_path: Path) -> None:
    """As the network's class reads them."""

    def change(settings: dict[str, Any]) -> None:
        settings["architecture"]["arch_kwargs"] |= {"kernel_sizes": 3, "n_conv_per_stage": 2, "strides": [1, *[2] * 5]}

    assert read_plan(changed(tmp_path, change)) == read_plan(changed(tmp_path, lambda _: None))


def test_nine_stages_as_every_default_plan_with_a_side_of_1024_has_them_are_read(tmp_path: Path) -> None:
    """Eight halvings leave maps of four pixels, which is where nnU-Net's planner stops."""

    def change(settings: dict[str, Any]) -> None:
        settings["patch_size"] = [1024, 1024]
        values = settings["architecture"]["arch_kwargs"]
        values |= {"n_stages": 9, "features_per_stage": [min(32 << stage, 512) for stage in range(9)]}
        values |= {"kernel_sizes": 3, "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2, "strides": [1, *[2] * 8]}

    plan = read_plan(changed(tmp_path, change))

    assert plan.spec.depth == 8
    assert EQUAL in plan.differences


def test_an_axis_that_is_halved_less_often_than_ours_is_said_to_be_why_nothing_is_near(tmp_path: Path) -> None:
    """16 rows cannot be halved five times; the plan halves them three times."""

    def change(settings: dict[str, Any]) -> None:
        settings["patch_size"] = [16, 256]
        settings["architecture"]["arch_kwargs"]["strides"] = [[1, 1], *[[2, 2]] * 3, [1, 2], [1, 2]]

    with pytest.raises(
        BenchError, match=r"halves one axis less often .* both are halved 5 times, and then 16x256 has no"
    ):
        read_plan(changed(tmp_path, change))


def renamed(tmp_path: Path, *names: str) -> Path:
    """The plan with its 2d configuration under other names."""
    content = json.loads((PLANS / "architecture.json").read_text())
    settings = content["configurations"].pop("2d")
    content["configurations"] = dict.fromkeys(names, settings) | {"3d_fullres": {"patch_size": [32, 64, 64]}}
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(content))
    return path


def test_the_only_2d_configuration_is_taken_whatever_its_name(tmp_path: Path) -> None:
    """Plans are copied and renamed by hand, as nnU-Net's own documentation invites."""
    plan = read_plan(renamed(tmp_path, "2d_large"))

    assert plan.configuration == "2d_large"
    assert plan.spec == read_plan(PLANS / "architecture.json").spec


def test_of_several_configurations_the_one_asked_for_is_taken(tmp_path: Path) -> None:
    """With none named 2d and none asked for, the sentence lists them."""
    path = renamed(tmp_path, "2d_a", "2d_b")

    assert read_plan(path, "2d_b").configuration == "2d_b"
    with pytest.raises(BenchError, match="has no configuration 2d, but 2d_a, 2d_b: name one with --configuration"):
        read_plan(path)
    with pytest.raises(BenchError, match="unknown configuration '2d_c'; did you mean"):
        read_plan(path, "2d_c")
    with pytest.raises(
        BenchError, match=r"the 3d_fullres configuration .*: its patch is 32x64x64, and networks here are"
    ):
        read_plan(path, "3d_fullres")

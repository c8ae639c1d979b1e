"""A sweep's file becomes cases: crossed, merged where networks coincide, refused in one sentence where it is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from places import TESTS

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.errors import SweepError
from skipcost.bench.measure.metrics import METRICS, default_metrics
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.sweeps.plan import Plan, find_sweep, load_plan
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

SHIPPED = sorted(path.stem for path in find_sweep("quick").parent.glob("*.toml"))


def plan_of(tmp_path: Path, text: str, **settings: list[str]) -> Plan:
    """Plan a sweep given as text, for a CPU with two threads."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_plan(str(path), settings, "cpu", 2)


@pytest.mark.parametrize("device", CHOICES["device"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_sweep_can_be_planned(name: str, device: str) -> None:
    """Each shipped sweep gives cases on either device, or on the one that it names, none refused by arithmetic."""
    plan = load_plan(name, {}, device, 2)

    named = set(re.findall(r'^device = "(\w+)"', find_sweep(name).read_text(), re.MULTILINE))
    assert plan.description
    assert len(plan.cases) > 5
    assert {each.case.device for each in plan.cases} == (named or {device})
    assert [each.case.name for each in plan.cases if refusal_of(each.case)] == []


def test_quick_covers_variants_depths_widths_and_skips() -> None:
    """`quick` crosses at least 3 variants, 3 depths, 3 widths and 4 skip schemes, measured and predicted."""
    plan = load_plan("quick", {}, "cpu", 2)
    labels = {label for each in plan.cases for label in (each.case.spec.label, *each.aliases)}

    assert len(labels) == 3 * 3 * 3 * 4
    for mode, metric in (("inference", "latency_s"), ("training", "peak_memory_predicted_bytes")):
        cells = [each for each in plan.cases if each.case.mode == mode and metric in each.metrics]
        assert sum(1 + len(each.aliases) for each in cells) == len(labels)


def test_ci_covers_every_variant_and_skip_scheme() -> None:
    """What CI gates holds each entry of the two tables."""
    plan = load_plan("ci", {}, "cpu", 2)
    labels = [label for each in plan.cases for label in (each.case.spec.label, *each.aliases)]

    assert {tuple(label.split("/")[::3][:2]) for label in labels} >= {(v, s) for v in VARIANTS for s in SKIPS}


def test_paper_is_the_published_networks_at_their_own_sizes() -> None:
    """`paper` holds exactly the rows of published.json, with their input sizes and all heads."""
    rows = json.loads((TESTS / "published.json").read_text())
    published = {(ModelSpec(**row["spec"]).label, *row["input"][2:]) for row in rows}

    cases = [each.case for each in load_plan("paper", {}, "cpu", 2).cases]

    assert {(case.spec.label, case.height, case.width) for case in cases} == published
    assert all(case.graph() == case.spec.graph() for case in cases)


def test_equal_networks_are_planned_once(tmp_path: Path) -> None:
    """Cells whose networks coincide are one case that knows its other labels."""
    plan = plan_of(
        tmp_path, '[[grid]]\nvariant=["unet", "unet++"]\ndepth=2\nskip=["concat", "same", "none"]\nsize=64\n'
    )

    names = {each.case.spec.label: each.aliases for each in plan.cases}

    assert names == {
        "unet/d2/w64/concat": ("unet/d2/w64/same", "unet++/d2/w64/same"),
        "unet/d2/w64/none": ("unet++/d2/w64/none",),
        "unet++/d2/w64/concat": (),
    }


def test_one_case_in_two_grids_gets_the_metrics_of_both(tmp_path: Path) -> None:
    """A case that two grids ask for is one case with all the metrics, in the table's order."""
    text = '[[grid]]\nsize=64\nmetrics=["conv_macs"]\n[[grid]]\nsize=64\nmetrics=["params"]\n'

    assert [each.metrics for each in plan_of(tmp_path, text).cases] == [("params", "conv_macs")]


def test_combinations_that_cannot_be_are_left_out_with_the_reason(tmp_path: Path) -> None:
    """A cell that no spec can describe is named with its reason; the others are planned."""
    plan = plan_of(tmp_path, '[[grid]]\nvariant=["unet", "unet++"]\nhead="deep"\nsize=64\n')

    assert [each.case.spec.variant for each in plan.cases] == ["unet++"]
    assert list(plan.left_out.values()) == ["unet has no head=deep: accepted for it: single"]


def test_settings_replace_and_add_axes(tmp_path: Path) -> None:
    """`--set` replaces a key of the file, or adds one, as text."""
    plan = plan_of(tmp_path, "[[grid]]\ndepth=[1, 2]\n", depth=["3"], image_height=["48", "64"], bias=["false"])

    shapes = [(each.case.spec.depth, each.case.height, each.case.width, each.case.spec.bias) for each in plan.cases]

    assert shapes == [(3, 48, 512, False), (3, 64, 512, False)]


def test_a_gpu_sweep_has_the_gpus_defaults(tmp_path: Path) -> None:
    """Batch 1 in bf16 at inference, batch 8 under amp-bf16 in training, channels-last, where the file says nothing."""
    (tmp_path / "mine.toml").write_text('[[grid]]\nmode=["inference", "training"]\n')

    cases = [each.case for each in load_plan(str(tmp_path / "mine.toml"), {}, "cuda", 2).cases]

    assert [(c.batch, c.precision, c.layout) for c in cases] == [
        (1, "bf16", "channels_last"),
        (8, "amp-bf16", "channels_last"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[grid]]\nvariant = unet\n", r"is not valid TOML: .*line 2"),
        ("", r"needs at least one \[\[grid\]\]"),
        ("grids = 1\n", "unknown key in the sweep 'grids'; did you mean 'grid'"),
        ("[[grid]]\nvarient = 'unet'\n", "unknown key in a grid 'varient'; did you mean 'variant'"),
        ("[[grid]]\nvariant = 'unett'\n", "unknown variant 'unett'; did you mean 'unet'"),
        ("[[grid]]\nskip = ['concat', 'sun']\n", "unknown skip 'sun'; did you mean 'sum'"),
        ("[[grid]]\nmetrics = ['latency']\n", r"unknown metric 'latency'; did you mean 'latency_s'"),
        ("[[grid]]\nmode = 'train'\n", "unknown mode 'train'; did you mean 'training'"),
        ("[[grid]]\ndepth = 13\n", "no case is left: depth=13 is not a whole number from 1 to 12"),
        ("[[grid]]\ndepth = []\n", "depth is an empty list"),
        ("[[grid]]\nsize = '12by12'\n", "is not an image size: write 512, or 480x640"),
        ("[[grid]]\nlabel = 'unet/4'\n", "is not a label: write variant/dDEPTH/wWIDTH/skip"),
        ("[timing]\nseconds = -1\n[[grid]]\n", "cannot be kept"),
        ("[timing]\nsecond = 1\n[[grid]]\n", "second"),
        ("[timing]\nseconds = 'x'\n[[grid]]\n", "seconds='x' is not a number"),
        ("[timing]\nseconds = inf\n[[grid]]\n", "seconds=inf is not a number, 1000000 at most"),
        ("[timing]\nnoise = nan\n[[grid]]\n", "noise=nan is not a number"),
        (
            "[limits]\ncase_seconds = 1e300\n[[grid]]\n",
            "case_seconds=1e[+]300 is not a number above 0, 1000000 at most",
        ),
        ('[limits]\nmemory = "12"\n[[grid]]\n', "12 alone would be 12 bytes: write 12GiB or 12GB"),
        ("[limits]\ncase_seconds = 'x'\n[[grid]]\n", "case_seconds='x' is not a number above 0"),
        ("[limits]\ncase_seconds = 0\n[[grid]]\n", "case_seconds=0 is not a number above 0"),
        ("[limits]\nmemory = '8 gigs'\n[[grid]]\n", "write 8GiB"),
        ("[limits]\nmemory = [1]\n[[grid]]\n", "write 8GiB"),
        ("grid = [1]\n", r"needs at least one \[\[grid\]\] table, and nothing else"),
        ("[[grid]]\nlabel = 5\n", "'5' is not a label"),
    ],
)
def test_a_wrong_sweep_is_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    """What is wrong in a sweep's file is named together with the file and what is accepted."""
    with pytest.raises(SweepError, match=message):
        plan_of(tmp_path, text)


def test_an_unknown_sweep_names_the_nearest() -> None:
    """A misspelt sweep names the one that was probably meant, and all of them."""
    with pytest.raises(SweepError, match=r"unknown sweep 'quik'; did you mean 'quick'.*path of a TOML file"):
        find_sweep("quik")


@pytest.mark.parametrize("device", CHOICES["device"])
@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_default_metrics_follow_the_table(mode: str, device: str) -> None:
    """Without a list, everything is measured that its row says applies to the mode, the device and the backend."""
    chosen = default_metrics(Case(mode=mode, device=device))
    compiled = default_metrics(Case(mode=mode, device=device, backend="compile"))

    assert set(compiled) - set(chosen) == {"compile_s"}
    assert {"params", "conv_macs", "latency_s", "peak_memory_predicted_bytes"} <= set(chosen)
    assert ("peak_memory_allocated_bytes" in chosen) == (device == "cuda")
    assert list(chosen) == [name for name in METRICS if name in chosen]

"""`skipcost fit` as it is typed: answers in JSON and as a table, and one sentence for everything that is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command_line import invoke_cli
from places import TESTS

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import BenchError
from skipcost.bench.fitting import question as fit_source
from skipcost.bench.fitting.question import process_bytes
from skipcost.bench.memory.liveness import peak_bytes
from skipcost.bench.sweeps.driver import Request
from skipcost.kernels.devices import device_named
from skipcost.unet_models import ModelSpec

PLANS = TESTS / "nnunet"
SMALL = ("--size", "64", "--set", "depth=1..3", "--set", "width=8..64")


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU and without calibrations, whatever this one has."""
    monkeypatch.setattr(fit_source, "load_calibration", lambda _: None)
    named = fit_source.target_named
    for module in ("commands.fit", "fitting.question"):
        monkeypatch.setattr(f"skipcost.bench.{module}.target_named", lambda text: named(text, list))


def shown(*words: str) -> str:
    """What the command prints."""
    result = invoke_cli(("fit", *words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(*words: str) -> dict[str, Any]:
    """What the command prints for a program."""
    answer: dict[str, Any] = json.loads(shown(*words, "--json"))
    return answer


def refused(*words: str) -> str:
    """The sentence with which the command ends."""
    with pytest.raises(BenchError) as caught:
        invoke_cli(("fit", *words), catch_exceptions=False)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_command_answers_with_networks_that_keep_the_limits() -> None:
    """Each row's figures are those of its network, are within the limits, and its border is not."""
    answer = facts(*SMALL, "--memory", "20MiB", "--params", "300k", "--macs", "1G", "--mode", "training")

    assert answer["limits"] == {"memory_bytes": 20 * 2**20, "params": 300_000, "conv_macs_per_image": 10**9}
    for row in answer["rows"]:
        case = Case(ModelSpec.parse(row["label"]), row["batch"], 64, 64, "training")
        assert row["memory_bytes"] == max(peak_bytes(case)) <= 20 * 2**20
        assert row["params"] == case.graph().params() <= 300_000
        assert row["conv_macs_per_image"] == case.graph().conv_macs(64, 64) <= 10**9
        assert row["receptive_field"] == case.graph().receptive_field()
        assert row["one_image_more"]["breaks"] == ["memory"]
        assert row["outside"] is None or row["outside"]["breaks"]
    fields = [(row["receptive_field"], ModelSpec.parse(row["label"]).width) for row in answer["rows"]]
    assert fields == sorted(fields, reverse=True)


def test_a_fixed_batch_is_the_batch_of_every_row() -> None:
    """Then the width is searched at that batch, and there is no row with one image more."""
    answer = facts(*SMALL, "--memory", "20MiB", "--batch", "3")

    assert {row["batch"] for row in answer["rows"]} == {3}
    assert {row["one_image_more"] for row in answer["rows"]} == {None}


def test_on_a_gpu_its_memory_is_the_limit_and_the_upper_end_is_checked() -> None:
    """Without --memory nothing beyond the card's memory is proposed; the figure is what the process may take."""
    answer = facts(*SMALL, "--device", "T4", "--set", "skip=concat", "--top", "2", "--batch", "2")

    device = device_named("t4")
    assert answer["device"] == device.name
    assert answer["limits"] == {"memory_bytes": device.memory_bytes}
    assert (answer["case"]["precision"], answer["case"]["layout"]) == ("fp16", "channels_last")
    for row in answer["rows"]:
        spec = ModelSpec.parse(row["label"])
        taken = process_bytes(Case(spec, 2, 64, 64, "inference", "fp16", "channels_last", device="cuda"), device)
        assert (row["memory_bytes"], row["memory_bytes_middle"]) == (taken.high, taken.likely)
    assert "upper end is checked" in answer["origins"]["memory_bytes"]


def test_the_table_says_what_was_asked_where_figures_come_from_and_what_is_outside() -> None:
    """Size, mode, limits, origins, order, and under each network what the next wider one breaks."""
    text = shown(*SMALL, "--params", "300k", "--top", "1", "--set", "variant=unet", "--set", "skip=concat")

    assert "64x64, inference, fp32, contiguous on a CPU" in text
    assert "at most: parameters 300 k" in text
    assert "memory: predicted: peak of live tensor bytes" in text
    assert "ranked by receptive field, then width" in text
    assert "chosen from 24 networks" in text
    assert "unet/d3/w8/concat" in text
    assert "the next wider: breaks parameters" in text


def test_the_widest_of_the_choice_is_said_to_be_that() -> None:
    """Where every width fits there is nothing outside, and nothing is made up."""
    text = shown(*SMALL, "--params", "1G", "--top", "1")

    assert "the widest to choose from" in text
    assert "breaks" not in text


def test_scores_rank_and_the_best_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Means over seeds, pooled over labels of one network; a score that cannot be had is not passed over in silence."""
    small = ("--size", "64", "--set", "depth=1..3")
    csv = tmp_path / "scores.csv"
    csv.write_text(
        "label,score,seed\nunet/d2/w20/concat,0.80,1\nunet/d2/w20/same,0.90,2\nunet++/d2/w8/concat,0.84,1\n"
        "unet/d3/w64/concat,0.99,1\nunet4/d2/w8/concat,0.5,1\nunet/d2/w8/concat/in_channels=3,0.7,1\n"
    )

    answer = facts(*small, "--params", "300k", "--quality", str(csv), "--top", "4", "--set", "in_channels=1")

    assert [(row["label"], row["score"]) for row in answer["rows"][:2]] == [
        ("unet/d2/w20/concat", pytest.approx(0.85)),
        ("unet++/d2/w8/concat", 0.84),
    ]
    assert answer["rows"][2]["score"] is None
    assert answer["rows"][0]["inside"]["label"] == "unet/d2/w24/concat"
    assert answer["rows"][0]["outside"]["breaks"] == ["params"]
    assert answer["left_out"]["unet/d3/w64/concat with score 0.99"] == "breaks parameters"
    assert "did you mean 'unet'" in answer["left_out"]["unet4/d2/w8/concat"]
    assert answer["left_out"]["unet/d2/w8/concat/in_channels=3"] == "--set in_channels leaves this scored network out"
    assert answer["order"].startswith("mean score in scores.csv")
    assert "the widest that fits" in shown(*small, "--params", "300k", "--quality", str(csv), "--top", "1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "nothing is limited: give --memory 24GiB"),
        (("--memory", "24"), "'24' is not a size in bytes: write 8GiB.*; 24 alone would be 24 bytes: write 24GiB or"),
        (("--memory", "24B"), "no network has memory of 24 B or less: the least is .* of unet/d1/w8/"),
        (("--memory", "24GBit"), "'24GBit' is not a size in bytes: write 8GiB"),
        (("--latency", "15", "--memory", "1GiB"), "'15' is not a length of time: write 15ms"),
        (("--macs", "5e9"), "'5e9' is not a count: write 50G"),
        (("--params", "31MB"), "'31MB' is not a count"),
        (("--params", "1M", "--size", "big"), "is not an image size"),
        (("--params", "1M", "--size", "1", "--set", "depth=7"), "no network is left to choose from: an input of 1x1"),
        (("--params", "1M", "--mode", "train"), "unknown mode 'train'; did you mean 'training'"),
        (("--params", "1M", "--precision", "fp23"), "unknown precision 'fp23'"),
        (("--equal", ""), "give both: --equal"),
        (("--params", "1M", "--size", "0"), "size='0' is not an image size: .* 1 to 65536 a side"),
        (("--params", "1M", "--size", "999999"), "size='999999' is not an image size: .* 1 to 65536 a side"),
        (("--params", "1M", "--device", "t44"), "unknown GPU 't44'.*, cpu"),
        (("--device", "t4", "--memory", "24GiB"), "--memory 24.0 GiB is more than the 16.0 GiB of NVIDIA T4"),
        (("--params", "1M", "--set", "width"), "is not key=v1,v2"),
        (("--params", "1M", "--quality", "/nowhere.csv"), "cannot read the quality scores"),
        (("--latency", "15ms"), "times of a CPU are not calibrated for inference in fp32.*--measure.*calibrate DB"),
        (
            ("--latency", "15ms", "--device", "h100"),
            "times of NVIDIA H100 SXM are not calibrated for inference in bf16",
        ),
        (("--latency", "15ms", "--device", "h100", "--measure"), "--measure runs on this machine, and NVIDIA H100"),
        (("--equal", "macs"), "give both: --equal"),
        (("unet/d2/w8/concat",), "give both: --equal"),
        (("--equal", "flops", "unet/d2/w8/concat"), "unknown figure 'flops'; accepted: params, macs, memory, latency"),
        (("--equal", "macs", "unet/d2"), "is not a label"),
        (("--equal", "macs", "unet/d7/w8/concat", "--size", "8"), "an input of 8x8 leaves no pixel"),
        (("--equal", "latency", "unet/d2/w8/concat"), "are not calibrated for inference"),
        (("--equal", "macs", "unet/d2/w8/concat", "--memory", "1GiB"), "--equal takes no --memory: leave it out"),
        (("--equal", "macs", "unet/d2/w8/concat", "--top", "3"), "--equal takes no --top: leave it out"),
        (("--nnunet", str(PLANS / "residual.json")), "only PlainConvUNet"),
        (("--nnunet", "x", "--equal", "macs", "unet/d2/w8/concat"), "--nnunet takes no --equal, LABEL: leave it out"),
        (("--nnunet", str(PLANS / "flat.json"), "--size", "64", "--measure"), "--nnunet takes no --size, --measure"),
    ],
)
def test_what_is_wrong_gets_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    """What was received, what is accepted, what to do; exit code 2."""
    assert re.search(sentence, refused(*words))


def test_a_limit_that_nothing_keeps_names_the_smallest_network() -> None:
    """The sentence has the limit in words, and the network with its figure."""
    least = ModelSpec(depth=1, width=8, skip="sum")

    sentence = refused(*SMALL, "--params", "1k", "--memory", "1GiB")

    assert sentence.startswith("no network has parameters of 1.00 k or less: the least is 5.99 k, of unet/d1/w8/sum")
    assert least.graph().params() == pytest.approx(5990, abs=5)
    assert "memory" not in sentence


def test_a_limit_and_the_least_that_there_is_never_look_the_same() -> None:
    """The least is 12.03 GiB: with three digits the sentence would say that 12.0 is not 12.0 or less."""
    case = ("--mode", "training", "--batch", "8", "--set", "width=32", "--set", "depth=4", "--set", "in_channels=3")

    sentence = refused(
        *case, "--memory", "12GiB", "--precision", "amp-fp16", "--set", "variant=unet3+", "--set", "skip=concat"
    )

    assert "no network has memory of 12.00 GiB or less: the least is 12.03 GiB, of unet3+/d4/w32" in sentence


def test_set_given_twice_gives_both_values() -> None:
    """As help says, --set may be repeated: the first is not dropped."""
    one = ("--params", "1G", "--size", "64", "--set", "variant=unet", "--set", "skip=concat", "--set", "width=8")
    twice = facts(*one, "--set", "depth=1", "--set", "depth=2")
    once = facts(*one, "--set", "depth=1, 2")

    assert {ModelSpec.parse(row["label"]).depth for row in twice["rows"]} == {1, 2}
    assert twice == once


def test_equal_costs_are_shown_beside_the_given_network() -> None:
    """The given network is the first row; every other one says how far off it is."""
    answer = facts("--equal", "macs", "unet/d2/w16/concat", "--size", "64", "--batch", "2", "--mode", "training")
    text = shown("--equal", "macs", "unet/d2/w16/concat", "--size", "64")

    assert (answer["given"]["label"], answer["given"]["batch"], answer["case"]["mode"]) == (
        "unet/d2/w16/concat",
        2,
        "training",
    )
    assert min(row["off"] for row in answer["rows"]) < 0 < max(row["off"] for row in answer["rows"])
    assert "as much MACs per image as unet/d2/w16/concat, nearest whole width" in text
    assert "given" in text
    assert "+0.00%" in text


def test_equal_widths_can_be_restricted() -> None:
    """--set keeps to what it says, widths included."""
    answer = facts(
        "--equal", "params", "unet/d2/w20/concat", "--size", "64", "--set", "width=8..64", "--set", "skip=sum"
    )

    assert {ModelSpec.parse(row["label"]).skip for row in answer["rows"]} == {"sum"}
    assert all(ModelSpec.parse(row["label"]).width % 8 == 0 for row in answer["rows"])


def test_a_plan_is_costed_and_everything_shown_fits_beside_it() -> None:
    """The plan's memory is the limit, at its batch, with its norm, channels and cap, in training with SGD."""
    path = str(PLANS / "architecture.json")
    small = ("--set", "depth=2", "--set", "width=8..32", "--set", "variant=unet", "--device", "cpu")

    answer = facts("--nnunet", path, *small)

    case = Case(ModelSpec.parse(answer["given"]["label"]), 12, 256, 192, "training", optimizer="sgd")
    assert answer["given"]["memory_bytes"] == max(peak_bytes(case)) == answer["limits"]["memory_bytes"]
    for row in answer["rows"]:
        spec = ModelSpec.parse(row["label"])
        assert (row["batch"], spec.norm, spec.in_channels) == (12, "instance", 3)
        assert row["memory_bytes"] <= answer["given"]["memory_bytes"]
    text = shown("--nnunet", path, *small, "--set", "classes=4", "--top", "1")
    assert "Dataset901_Leaves, nnU-Net's 2d configuration: 12 patches of 256x192" in text
    assert "classes=4" in text
    assert "--set classes=N" not in text
    assert "differs: maps are halved by a convolution's stride" in text


def test_a_plan_deeper_than_what_is_searched_widens_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's own kind of network is among what fits: its depth is searched, too."""
    monkeypatch.setattr("skipcost.bench.fitting.answer.SEARCHED_DEPTH", 3)
    given: dict[str, list[Any]] = {}

    def lattice(axes: dict[str, Any], *_: object) -> Any:
        given.update({key: list(values) for key, values in axes.items()})
        message = "seen"
        raise BenchError(message)

    monkeypatch.setattr("skipcost.bench.fitting.answer.lattice", lattice)

    assert refused("--nnunet", str(PLANS / "architecture.json"), "--device", "cpu") == "seen"
    assert given["depth"] == [1, 2, 3, 4, 5]


def test_a_plan_that_our_network_cannot_run_is_one_sentence(tmp_path: Path) -> None:
    """An instance norm over a single value; so it is in nnU-Net itself."""
    plan = json.loads((PLANS / "architecture.json").read_text())
    plan["configurations"]["2d"]["patch_size"] = [32, 32]
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(plan))

    sentence = refused("--nnunet", str(path), "--device", "cpu")

    assert "the plan's nearest network, unet/d5/w32" in sentence
    assert "cannot run: instance norm at x5_0 would normalise over a single value" in sentence


def test_on_a_gpu_a_plan_trains_in_fp16_autocast() -> None:
    """As nnU-Net does; the limit is the upper end of what its process may take."""
    small = ("--set", "depth=2", "--set", "width=8", "--set", "variant=unet", "--device", "rtx 4090", "--top", "1")

    answer = facts("--nnunet", str(PLANS / "flat.json"), *small)

    assert (answer["case"]["precision"], answer["case"]["optimizer"]) == ("amp-fp16", "sgd")
    assert answer["limits"]["memory_bytes"] == answer["given"]["memory_bytes"] > answer["given"]["memory_bytes_middle"]


class Timed:
    """A fork server that measures nothing: whatever is asked for takes a millisecond, or two."""

    environment: ClassVar = {"cuda": False, "memory_bytes": 2**34}

    def run(self, request: Request) -> Iterator[Result]:
        """A row for each metric."""
        yield from (Result(name, samples=(0.001, 0.001, 0.002)) for name in request.metrics)


def test_measuring_runs_the_candidates_here_and_reports_median_and_p99(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network within the limit is found by running it, at one batch, and nothing that was not run has a latency."""
    monkeypatch.setattr(fit_source, "Server", lambda: contextlib.nullcontext(Timed()))
    small = ("--size", "32", "--set", "depth=1", "--set", "width=8,16", "--set", "variant=unet", "--set", "skip=none")

    answer = facts(*small, "--latency", "60s", "--params", "9k", "--measure")

    (row,) = answer["rows"]
    assert (row["label"], row["batch"]) == ("unet/d1/w8/none", 1)
    assert row["latency_s_middle"] == 0.001 < row["latency_s"] <= 0.002
    assert "steps timed" in row["remark"]
    assert row["outside"]["breaks"] == ["params"]
    assert "latency_s" not in row["outside"]
    assert "p99" in answer["origins"]["latency_s"]


def test_the_search_needs_no_torch() -> None:
    """Everything but measuring is arithmetic: the command answers without torch being imported."""
    code = (
        "import sys; from skipcost.bench import cli; "
        "cli.app(['fit', '--params', '1M', '--top', '1', '--set', 'depth=1'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr

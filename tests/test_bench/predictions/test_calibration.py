"""Calibration: known costs come back, the interval holds what it says, what is held out stays out; the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import invoke_cli

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import BenchError
from skipcost.bench.predictions import calibration
from skipcost.bench.predictions.calibration import (
    BEYOND,
    COVERAGE,
    FEATURES,
    LEAST_ROWS,
    STEP,
    Calibration,
    calibrate,
    features,
    file_of,
    fit_models,
    held_out_predictions,
    load_calibration,
    read_calibration,
    save_calibration,
    setting_of,
)
from skipcost.bench.store.store import create_store, open_store
from skipcost.bench.time.passes import passes
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

COSTS = dict.fromkeys(FEATURES, 0.0) | {  # of a device that exists nowhere, in seconds per unit
    "MACs of convolutions": 1e-11,
    "MACs of transposed convolutions": 4e-11,
    "bytes of element-wise passes": 2e-10,
    "bytes of pooling": 9e-10,
    "passes": 8e-6,
    STEP: 3e-4,
}
ENVIRONMENT = {"fingerprint": "here", "cpu": "A CPU", "gpus": [{"name": "Tesla T4"}]}


def cases(**values: Any) -> list[Case]:
    """Every variant under two schemes, at three depths and widths: 54 networks."""
    return [
        Case(spec=ModelSpec(variant=variant, depth=depth, width=width, skip=skip), height=64, width=64, **values)
        for variant in VARIANTS
        for depth in (2, 3, 4)
        for width in (8, 16, 32)
        for skip in ("concat", "sum")
    ]


def seconds_of(case: Case) -> float:
    """What a step takes on that device."""
    amounts = features(case)
    return sum(COSTS[name] * amounts[name] for name in FEATURES)


def noise(count: int, seed: int, spread: float = 0.05) -> np.ndarray:
    """Ratios around 1."""
    return np.random.default_rng(seed).lognormal(0, spread, count)


CASES = cases()
AMOUNTS = np.array([[features(case)[name] for name in FEATURES] for case in CASES])
SECONDS = np.array([seconds_of(case) for case in CASES])
ROWS = list(zip(CASES, map(float, SECONDS * noise(len(CASES), 7)), strict=True))
NAMES = [case.spec.label for case in CASES]


@pytest.fixture(scope="module")
def made() -> Calibration:
    """A calibration on noisy rows of inference and of training."""
    training = [(case, seconds_of(case)) for case in cases(mode="training")]
    return Calibration("A CPU", "here", "x.sqlite", "2026-01-01", 0, fit_models([*ROWS, *training]))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 30 sound rows, one that is noisy, one that ran out of memory."""
    path = tmp_path / "x.sqlite"
    with create_store(path) as opened:
        number = opened.add_run("2026-01-01T00:00:00+00:00", "test", 0, ENVIRONMENT)
        for index, (case, seconds) in enumerate(ROWS[:32]):
            result = Result("latency_s", samples=(seconds, seconds), note="noisy" if index == 30 else "")
            result = Result("latency_s", "out_of_memory") if index == 31 else result
            opened.add_case(case, [])
            opened.add_result(number, case.case_id, result)
    return path


# Arithmetic


@pytest.mark.parametrize("seed", range(5))
def test_costs_come_back_from_exact_times(seed: int) -> None:
    """Whatever the costs are, zeros among them, each to a millionth where its feature occurs."""
    draw = np.random.default_rng(seed)
    known = draw.lognormal(-20, 3, len(FEATURES)) * (draw.random(len(FEATURES)) < 0.6)
    occurs = AMOUNTS.max(axis=0) > 0
    known[-1] = 1e-4

    found = calibration.fit_costs(AMOUNTS, AMOUNTS @ known)

    assert np.allclose(AMOUNTS @ found, AMOUNTS @ known, rtol=1e-6)
    assert (found[~occurs] == 0).all()


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_one_cost_is_the_geometric_mean(spread: float) -> None:
    """Least squares on the logarithm: too slow by a factor weighs as much as too quick by it."""
    seconds = noise(50, 11, spread)

    found = calibration.fit_costs(np.ones((50, 1)), seconds)

    assert found[0] == pytest.approx(np.exp(np.log(seconds).mean()))


def test_a_slow_network_weighs_no_more_than_a_quick_one() -> None:
    """The fit is of ratios: in another unit of time, or with one row scaled, it is the same up to that scale."""
    amounts = AMOUNTS[:, [0, -1]]
    seconds = SECONDS * noise(len(SECONDS), 3)
    scale = np.geomspace(1e-3, 1e3, len(seconds))

    plain = calibration.fit_costs(amounts, seconds)
    scaled = calibration.fit_costs(amounts * scale[:, None], seconds * scale)

    assert np.allclose(plain, scaled, rtol=1e-3)


def test_folds_hold_whole_groups_out_and_every_row_once() -> None:
    """No group is on both sides of a fold."""
    groups = [name for name in NAMES for _ in range(2)]

    held = list(calibration.folds(groups, 10))

    assert (np.sum(held, axis=0) == 1).all()
    for each in held:
        inside = {name for name, out in zip(groups, each, strict=True) if out}
        assert inside
        assert not inside & {name for name, out in zip(groups, each, strict=True) if not out}


@pytest.mark.parametrize("count", [19, 20, 54, 100])
def test_the_quantiles_hold_the_next_ratio_as_often_as_they_say(count: int) -> None:
    """Over many draws at least nine tenths, and not much more than the count of samples explains."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(4000):
        *seen, following = draw.lognormal(0, 0.3, count + 1)
        low, _, high = calibration.ratio_quantiles(np.array(seen), COVERAGE)
        hits += low <= following <= high

    assert COVERAGE - 0.015 <= hits / 4000 <= COVERAGE + 2 / (count + 1) + 0.015


def test_too_few_ratios_bound_nothing() -> None:
    """Nine tenths take 19."""
    with pytest.raises(ValueError, match="18 ratios bound no 90%: it takes 19"):
        calibration.ratio_quantiles(np.ones(18), COVERAGE)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([1, 2, 3], [1, 8, 27], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 2, 3], [1, 3, 2, 4], 0.9486833)],
)
def test_ranks_alone_make_the_correlation(left: list[float], right: list[float], expected: float) -> None:
    """Order counts, distance does not, and ties share a rank."""
    found = calibration.rank_correlation(np.array(left, float), np.array(right, float))

    assert found == pytest.approx(expected)


# The model


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("skip", SKIPS)
def test_features_are_the_sums_of_passes(variant: str, skip: str, mode: str) -> None:
    """Every MAC and every byte is in one feature."""
    case = Case(spec=ModelSpec(variant=variant, skip=skip, depth=2, width=8), height=32, width=32, mode=mode)

    amounts = features(case)

    assert set(amounts) == set(FEATURES)
    for word, attribute in (("MACs", "macs"), ("bytes", "bytes")):
        total = sum(amount for name, amount in amounts.items() if name.startswith(word))
        assert total == sum(getattr(each, attribute) for each in passes(case))


def test_noise_of_a_few_percent_leaves_an_error_of_a_few_percent(made: Calibration) -> None:
    """Held out, 5 % of noise gives about 4 % of mean error; ranks stay; the interval is as wide as the noise."""
    model = made.models[0]

    low, typical, high = model.ratios
    assert model.held_out.mean_error < 0.07
    assert model.held_out.spearman > 0.98
    assert model.held_out.within_tenth > 0.85
    assert 0.9 < low < typical < high < 1.12
    assert (model.rows, model.networks) == (len(CASES), len(set(NAMES)))


def test_the_interval_holds_networks_that_it_never_saw() -> None:
    """Over many draws: fitted to half of the networks, it holds about nine tenths of the others."""
    hits, total = 0, 0
    for seed in range(40):
        measured = SECONDS * noise(len(CASES), seed)
        order = np.random.default_rng(seed).permutation(len(CASES))
        seen, unseen = order[:27], order[27:]
        names = [NAMES[index] for index in seen]
        low, _, high = calibration.ratio_quantiles(
            measured[seen] / held_out_predictions(AMOUNTS[seen], measured[seen], names), COVERAGE
        )
        predicted = AMOUNTS[unseen] @ calibration.fit_costs(AMOUNTS[seen], measured[seen])
        ratios = measured[unseen] / predicted
        hits += int(((low <= ratios) & (ratios <= high)).sum())
        total += len(unseen)

    assert 0.85 <= hits / total <= 0.98


def test_the_interval_leans_to_the_side_on_which_times_scatter() -> None:
    """Times that are now and then longer, never shorter, reach farther up than down, and most stay inside."""
    skewed = SECONDS * np.exp(np.random.default_rng(5).exponential(0.15, len(CASES)))

    model = fit_models(zip(CASES, map(float, skewed), strict=True))[0]

    low, typical, high = model.ratios
    ratios = skewed / held_out_predictions(AMOUNTS, skewed, NAMES)
    assert high / typical > typical / low
    assert ((low <= ratios) & (ratios <= high)).mean() >= COVERAGE


def test_what_is_held_out_has_no_say_in_its_own_prediction() -> None:
    """A network measured a hundred times slower, at both of its sizes, is predicted as before; others are not."""
    names = [name for name in NAMES for _ in range(2)]
    amounts, seconds = np.repeat(AMOUNTS, 2, axis=0), np.repeat(SECONDS, 2)
    changed = seconds.copy()
    changed[:2] *= 100

    before, after = (held_out_predictions(amounts, each, names) for each in (seconds, changed))

    assert np.allclose(before[:2], after[:2], rtol=1e-12)
    assert not np.allclose(before[2:], after[2:], rtol=1e-3)


def test_the_interval_is_the_held_out_ratios_around_the_costs(made: Calibration) -> None:
    """Low, middle and high: the sum of costs times each ratio."""
    model = made.models[0]

    low, middle, high = made.interval(CASES[5])

    amounts = features(CASES[5])
    plain = sum(model.costs[name] * amounts[name] for name in FEATURES)
    assert (low, middle, high) == tuple(plain * ratio for ratio in model.ratios)
    assert low < middle < high


@pytest.mark.parametrize(
    "change",
    [{"precision": "bf16"}, {"layout": "channels_last"}, {"backend": "compile"}, {"threads": 2}, {"device": "cuda"}],
    ids=str,
)
def test_another_setting_is_refused_with_those_that_are_known(change: dict[str, Any], made: Calibration) -> None:
    """A model holds for what was measured: nothing is carried over."""
    with pytest.raises(ValueError, match=r"A CPU is not calibrated for .*; it is for cpu, inference, fp32.*training"):
        made.interval(replace(CASES[0], **change))


@pytest.mark.parametrize(
    "change",
    [{"batch": 4, "height": 32, "width": 96}, {"cudnn_benchmark": False}, {"spec": ModelSpec(depth=2)}],
    ids=str,
)
def test_network_size_and_batch_are_no_part_of_a_setting(change: dict[str, Any]) -> None:
    """One model holds for them all. On a CPU, cuDNN's switch changes nothing either."""
    assert setting_of(CASES[0]) == setting_of(replace(CASES[0], **change))


@pytest.mark.parametrize("scale", [1 / 8, 8])
def test_a_case_far_from_all_that_was_measured_is_refused(scale: float, made: Calibration) -> None:
    """Much fewer or more MACs than any row: an interval there would claim what nobody saw."""
    macs = [sum(each.macs for each in passes(case)) for case in CASES]
    extreme = CASES[int(np.argmax(macs) if scale > 1 else np.argmin(macs))]
    inside = replace(extreme, batch=int(BEYOND)) if scale > 1 else extreme
    outside = replace(extreme, batch=8) if scale > 1 else replace(extreme, height=16, width=32)

    made.interval(inside)
    with pytest.raises(ValueError, match=r"has .* MACs, the calibration was measured from .*; sweep such networks"):
        made.interval(outside)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "none with a latency and no doubt"),
        (ROWS[: LEAST_ROWS - 1], "19 rows of 19 networks"),
        ([(replace(CASES[0], batch=n), 0.1) for n in range(1, 40)], "39 rows of 1 network"),
    ],
    ids=["nothing", "few rows", "one network"],
)
def test_too_little_to_calibrate_is_said_in_one_sentence(rows: list[tuple[Case, float]], words: str) -> None:
    """What there is, what it takes, what to do."""
    with pytest.raises(BenchError, match=f"too few measured rows to calibrate \\(.*{words}\\).* sweep quick"):
        fit_models(rows)


# Files and the command


def test_a_calibration_is_read_as_it_was_written(made: Calibration, tmp_path: Path) -> None:
    """Every field, under the device's name and under the file's."""
    path = file_of(made.device, tmp_path / "new folder")

    save_calibration(made, path)

    assert read_calibration(path) == made
    assert load_calibration("a cpu", path.parent) == made
    assert load_calibration(str(path)) == made
    assert load_calibration("another CPU", path.parent) is None


@pytest.mark.parametrize("name", ["t4", "Tesla T4", "NVIDIA T4"])
def test_a_gpus_calibration_is_found_by_any_of_its_names(name: str, made: Calibration, tmp_path: Path) -> None:
    """It is written under the driver's."""
    gpu = replace(made, device="Tesla T4")

    save_calibration(gpu, file_of(gpu.device, tmp_path))

    assert load_calibration(name, tmp_path) == gpu


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "skipcost baseline", "schema": 1}'])
def test_a_file_that_is_no_calibration_is_refused(text: str, tmp_path: Path) -> None:
    """One sentence with the path and what makes one."""
    path = tmp_path / "x.json"
    path.write_text(text)

    with pytest.raises(BenchError, match=r"x.json is not a calibration .*`skipcost calibrate` makes one"):
        read_calibration(path)


def test_doubtful_and_failed_rows_of_a_store_are_left_out(store: Path) -> None:
    """What was noisy is counted; the device is the environment's."""
    with open_store(store) as opened:
        found = calibrate(opened, store.name, "auto")

    assert (found.device, found.fingerprint, found.doubtful) == ("A CPU", "here", 1)
    assert [model.rows for model in found.models] == [30]
    assert found.models[0].costs == pytest.approx(fit_models(ROWS[:30])[0].costs)


def test_a_gpus_rows_come_first_and_are_never_mixed_with_a_cpus(store: Path) -> None:
    """With too few of them, they are too few."""
    with create_store(store) as opened:
        number = opened.add_run("2026-01-02T00:00:00+00:00", "test", 0, ENVIRONMENT)
        case = replace(CASES[0], device="cuda")
        opened.add_case(case, [])
        opened.add_result(number, case.case_id, Result("latency_s", samples=(0.001,)))

    with open_store(store) as opened:
        with pytest.raises(BenchError, match=r"cuda, inference.*: 1 row of 1 network\)"):
            calibrate(opened, store.name, "auto")
        assert calibrate(opened, store.name, "cpu").device == "A CPU"


def test_doubtful_rows_are_counted_where_too_few_are_left(tmp_path: Path) -> None:
    """A machine that was too noisy is told apart from a store that is too small."""
    path = tmp_path / "x.sqlite"
    with create_store(path) as opened:
        number = opened.add_run("2026-01-01T00:00:00+00:00", "test", 0, ENVIRONMENT)
        for case, seconds in ROWS[:25]:
            opened.add_case(case, [])
            opened.add_result(number, case.case_id, Result("latency_s", samples=(seconds,), note="noisy"))

    with open_store(path) as opened, pytest.raises(BenchError, match="no doubt; 25 rows with a doubt left out"):
        calibrate(opened, path.name, "cpu")


def test_the_command_fits_writes_and_tells(store: Path, tmp_path: Path) -> None:
    """For people: the errors held out and the costs. The file is the one that fit reads."""
    path = tmp_path / "made.json"

    done = invoke_cli(["calibrate", str(store), "-o", str(path)])

    assert done.exit_code == 0
    for words in ("A CPU", "1 row with a doubt", "30 rows, 30 networks", "Spearman", "90% interval", "MAC/s"):
        assert words in done.output
    assert read_calibration(path).models[0].rows == 30


def test_the_command_prints_json_for_a_program(store: Path, tmp_path: Path) -> None:
    """The same content as the file's."""
    path = tmp_path / "made.json"

    done = invoke_cli(["calibrate", str(store), "-o", str(path), "--json"])

    written = json.loads(path.read_text())
    assert written == json.loads(done.stdout) | {"format": "skipcost calibration", "schema": 1}


def test_bad_input_of_the_command_is_refused(store: Path) -> None:
    """An unknown device; a place that cannot be written."""
    for words, why in (
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["-o", f"{store}/x.json"], "cannot write .*; name another file with -o"),
    ):
        done = invoke_cli(["calibrate", str(store), *words])

        assert isinstance(done.exception, BenchError)
        assert re.search(why, str(done.exception))

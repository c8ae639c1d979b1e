"""Paired statistics: intervals cover as often as they claim, false alarms stay within their rate, changes are found."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipcost.bench.compare.paired import centre, estimate, holm, proportion

BLOCKS = 12


def draw(
    seed: int, ratio: float = 1.0, pairs: int = 5, between: float = 0.01, within: float = 0.05
) -> list[list[float]]:
    """Log ratios with a scatter of their own for each pair of processes, and heavy tails within."""
    random = np.random.default_rng(seed)
    centres = math.log(ratio) + between * random.standard_normal(pairs)
    noise = within * random.standard_t(3, (pairs, BLOCKS))
    return (centres[:, None] + noise).tolist()


def test_equal_measurements_give_a_ratio_of_one() -> None:
    """No scatter and no change: ratio 1, no width, and no reason to call it changed."""
    found = estimate([[0.0] * BLOCKS] * 5)

    assert found.ratio == 1
    assert found.interval(0.05) == (1, 1)
    assert found.p_value(0.01) == 1


def test_one_pair_of_processes_is_refused() -> None:
    """Without a second pair nothing is known of how code lies in memory."""
    with pytest.raises(ValueError, match="1 process pair has no scatter"):
        estimate([[0.1, 0.2]])


@pytest.mark.parametrize("between", [0.0, 0.01, 0.03])
def test_intervals_cover_the_truth_as_often_as_they_claim(between: float) -> None:
    """95 % intervals over 200 draws miss about 10 times, also where pairs scatter more than their blocks tell."""
    misses = 0
    for seed in range(200):
        low, high = estimate(draw(seed, 1.07, between=between)).interval(0.05)
        misses += not low <= 1.07 <= high

    assert misses <= 22  # the 99.9 % quantile of Binomial(200, 0.05)


def test_false_alarms_of_a_whole_run_stay_within_their_rate() -> None:
    """Twelve unchanged cases a run, 60 runs: the share of runs with any suspicion is within alpha's reach."""
    alarms = 0
    for run in range(60):
        p_values = [estimate(draw(1000 * run + case)).p_value(0.0) for case in range(12)]
        alarms += any(holm(p_values, 0.05))

    assert alarms <= 9  # the 99.9 % quantile of Binomial(60, 0.05)


def test_changes_are_found_and_the_floor_hides_small_ones() -> None:
    """10 % more is found among twelve cases; 1 % more is not called a change where the floor is 2 %."""
    found = sum(holm([estimate(draw(s, 1.10, within=0.02)).p_value(0.01), *[1.0] * 11], 0.05)[0] for s in range(40))
    small = sum(estimate(draw(s, 1.01, between=0.0, within=0.005)).p_value(0.02) < 0.05 for s in range(40))

    assert found >= 36
    assert small == 0


def test_either_direction_counts_alike() -> None:
    """Swapping the sides inverts the ratio and keeps the p-value."""
    table = draw(7, 1.08)
    swapped = [[-value for value in row] for row in table]

    there, back = estimate(table), estimate(swapped)

    assert math.isclose(there.ratio * back.ratio, 1)
    assert math.isclose(there.p_value(0.01), back.p_value(0.01), rel_tol=0.3)


def test_the_visible_change_is_what_is_found_with_the_power_that_it_claims() -> None:
    """A change as large as `visible` says is found in about four of five draws."""
    seen = estimate(draw(3, between=0.01, within=0.0)).visible(0.05, 0.0)
    expected = 0.01 / math.sqrt(5)

    assert 2 * expected < math.log1p(seen) < 8 * expected


@pytest.mark.parametrize(
    ("p_values", "fallen"),
    [
        ([], []),
        ([0.04], [True]),
        ([0.04, 0.04], [False, False]),
        ([0.02, 0.04], [True, True]),
        ([0.9, 0.001, 0.03], [False, True, False]),
    ],
)
def test_holm_steps_down(p_values: list[float], fallen: list[bool]) -> None:
    """The smallest p-value meets alpha / n, the next alpha / (n - 1), and the first that fails ends it."""
    assert holm(p_values, 0.05) == fallen


def test_proportions_have_exact_intervals() -> None:
    """299 clean runs claim 1 %, as the rule of three says; the two-sided interval of 1 in 2 is wide."""
    assert proportion(0, 299)[1] == pytest.approx(0.00997, abs=1e-4)
    assert proportion(0, 299)[0] == 0
    assert proportion(299, 299) == pytest.approx((1 - 0.00997, 1), abs=1e-4)
    assert proportion(1, 2) == pytest.approx((0.01258, 0.98742), abs=1e-4)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_the_centre_is_the_median_of_pairwise_means(values: list[float]) -> None:
    """As written down, pair by pair, each value with itself too."""
    means = [(values[i] + values[j]) / 2 for i in range(len(values)) for j in range(i, len(values))]

    assert centre(values) == pytest.approx(statistics.median(means))


def test_three_outliers_in_ten_do_not_move_the_centre_far() -> None:
    """A disturbed minority of blocks stays without weight, where a mean would follow it."""
    values = [0.01, 0.011, 0.009, 0.012, 0.008, 0.010, 0.0105, 9.0, 9.0]

    assert 0.008 <= centre(values) <= 0.02

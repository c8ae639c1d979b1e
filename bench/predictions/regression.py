"""Arithmetic of a calibration: non-negative costs by least squares on the logarithm, folds, ranks, quantiles of ratios.

Plain numpy; knows nothing of networks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROUNDS = 10  # of linearising the logarithm; it stands still after about five
TOLERANCE = 1e-10


def nonnegative(matrix: Array, target: Array) -> Array:
    """Minimise |matrix @ w - target| over w >= 0: (rows, columns), (rows,) -> (columns,).

    The active-set method of Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.
    """
    weights = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(3 * matrix.shape[1]):
        slope = matrix.T @ (target - matrix @ weights)
        slope[free] = -np.inf
        if slope.max() <= TOLERANCE * len(target):
            break
        free[slope.argmax()] = True
        while True:
            trial = np.zeros_like(weights)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if trial[free].min() > 0:
                break
            back = free & (trial <= 0)  # as far towards the trial as all stay at 0 or above
            step = float(np.min(weights[back] / np.maximum(weights[back] - trial[back], TOLERANCE)))
            weights += step * (trial - weights)
            free &= weights > TOLERANCE
            weights[~free] = 0
            if not free.any():
                return weights
        weights = trial
    return weights


def fit_costs(amounts: Array, seconds: Array) -> Array:
    """Costs c >= 0 that minimise the squares of log(seconds / (amounts @ c)): (rows, features), (rows,) -> (features,).

    Around a solution p the logarithm is linear: log(seconds / p) - (amounts @ c - p) / p, which is solved again and
    again, from the fit in relative error on.
    """
    scale = amounts.max(axis=0)
    scale[scale == 0] = 1.0  # a feature that no row has costs nothing
    scaled = amounts / scale
    costs = nonnegative(scaled / seconds[:, None], np.ones(len(seconds)))
    for _ in range(ROUNDS):
        predicted = np.maximum(scaled @ costs, TOLERANCE)
        costs = nonnegative(scaled / predicted[:, None], 1 + np.log(seconds / predicted))
    result: Array = costs / scale
    return result


def folds(groups: Sequence[str], count: int) -> Iterator[NDArray[np.bool_]]:
    """Yield, for each fold, which rows are held out: whole groups, shuffled once, so none is on both sides."""
    names = sorted(set(groups))
    random.Random(0).shuffle(names)  # noqa: S311 - an order, not a secret
    fold_of = {name: index % count for index, name in enumerate(names)}
    for fold in range(min(count, len(names))):
        yield np.array([fold_of[name] == fold for name in groups])


def ratio_quantiles(ratios: Array, coverage: float) -> tuple[float, float, float]:
    """Bounds that the next of n + 1 exchangeable ratios is between with at least `coverage`, and the median.

    Low, middle, high: the floor((n + 1) a)-th smallest and largest, a = (1 - coverage) / 2. ValueError where n is too
    small for that: no sample bounds what it has not seen.
    """
    ordered = np.sort(ratios)
    rank = math.floor((len(ordered) + 1) * (1 - coverage) / 2 + TOLERANCE)
    if rank < 1:
        least = math.ceil(2 / (1 - coverage) - 1 - TOLERANCE)
        message = f"{len(ordered)} ratios bound no {coverage:.0%}: it takes {least}"
        raise ValueError(message)
    return float(ordered[rank - 1]), float(np.median(ordered)), float(ordered[-rank])


def rank_correlation(left: Array, right: Array) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2)[inverse]
    return ranks

"""
Is a curve V0's? The test that decides it, and what it could have found.

A run's curve is cut into `WINDOWS` windows of equal length; the mean of each is one number. Two arms with their seeds are
compared by the largest distance of their mean curves over the windows, in standard deviations between seeds; the p-value is the
share of all ways to deal the same runs into two arms of these sizes that give a distance as large (an exact permutation test:
it assumes nothing about the curves but that runs are exchangeable). p < `LEVEL`: the arm has left V0's curve.

That no difference was found says as much as the test's power: `least_shift` is the smallest constant shift of a whole curve, in
the metric's own unit, that would have been found in `POWER` of repetitions.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

WINDOWS, LEVEL, POWER, REPETITIONS = 8, 0.05, 0.8, 200
Curves = NDArray[np.float64]


def windows(runs: list[list[float]]) -> Curves:
    """[runs, WINDOWS] from curves of one length."""
    return np.stack([[part.mean() for part in np.array_split(np.asarray(run), WINDOWS)] for run in runs])


@cache
def _deals(first: int, second: int) -> NDArray[np.bool_]:
    """Every way to deal first + second runs: [ways, runs], True for the first arm; the actual one comes first."""
    chosen = list(combinations(range(first + second), first))
    found = np.zeros((len(chosen), first + second), dtype=bool)
    for row, members in zip(found, chosen):
        row[list(members)] = True
    return found


def distances(a: Curves, b: Curves) -> NDArray[np.float64]:
    """For every way to deal the runs: the largest distance of the two mean curves over the windows. a, b: [runs, WINDOWS]."""
    runs, deals = np.concatenate([a, b]), _deals(len(a), len(b)).astype(np.float64)
    moments = []
    for chosen in (deals, 1 - deals):
        count = chosen.sum(1, keepdims=True)
        mean = chosen @ runs / count
        moments.append((mean, chosen @ runs**2 - count * mean**2))
    (mean_a, square_a), (mean_b, square_b) = moments
    variance = np.clip(square_a + square_b, 0, None) / (len(runs) - 2)
    # Half of it from all windows together: a window in which no run clipped anything has no scatter of its own.
    spread = np.sqrt(0.5 * variance + 0.5 * variance.mean(1, keepdims=True)) + 1e-12
    return (np.abs(mean_a - mean_b) / spread).max(1)


def p_value(a: Curves, b: Curves) -> float:
    found = distances(a, b)
    return float((found >= found[0] * (1 - 1e-9)).mean())


def least_shift(v0: Curves, alike: list[Curves], count: int) -> float:
    """The smallest shift of an arm of ``count`` runs that is found in `POWER` of repetitions, in the metric's unit.

    Runs are drawn from V0's mean and the scatter of V0's runs and of the arms ``alike``, each about its own mean. nan where
    even eight standard deviations are not found.
    """
    scatter = np.concatenate([(arm - arm.mean(0)) * np.sqrt(len(arm) / (len(arm) - 1)) for arm in (v0, *alike)])
    unit, random = float(np.sqrt((scatter**2).mean())), np.random.default_rng(0)
    for shift in np.arange(0.5, 8.01, 0.25):
        found = 0
        for _ in range(REPETITIONS):
            drawn = scatter[random.integers(len(scatter), size=len(v0) + count)]
            found += p_value(drawn[: len(v0)], drawn[len(v0) :] + shift * unit) < LEVEL
        if found >= POWER * REPETITIONS:
            return float(shift * unit)
    return float("nan")

"""Measures how the statistics of single batches differ from each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.moments import Statistics

MIN_BATCHES = 4
"""With fewer batches their scatter is a guess."""

SINGLE_PRECISION = 2.0**-24
"""Relative error of a float32."""


@dataclass(frozen=True)
class Scatter:
    """Differences between single batches, in units of the variance within them.

    Args:
        mean: Variance of a batch's mean, averaged over the channels.
        variation: Coefficient of variation of a batch's variance, averaged likewise.
        dominance: The largest variance of a batch over the third quartile of all
            batches, in the channel where this is largest. It is large if rare examples
            dominate the variance of few batches.
    """

    mean: float
    variation: float
    dominance: float


def scatter(batches: Statistics, epsilon: float) -> Scatter | None:
    """Measures how batches differ while the weights stay the same.

    Args:
        batches: The batches' statistics, of shape `(batches, channels)`.
        epsilon: The layer's epsilon.

    Returns:
        The scatter; None with fewer than 4 batches, or if they are not finite.

    Examples:
        >>> means = np.array([[0.0], [2.0], [0.0], [2.0]])
        >>> round(scatter(Statistics(means, np.ones((4, 1))), 0.0).mean, 3)
        1.333
    """
    if len(batches.mean) < MIN_BATCHES or not _is_finite(batches):
        return None
    unit = batches.variance.mean(axis=0) + epsilon
    return Scatter(
        float((batches.mean.var(axis=0, ddof=1) / unit).mean()),
        math.sqrt(float((batches.variance.var(axis=0, ddof=1) / unit**2).mean())),
        _dominance(batches.variance, batches.variance, epsilon),
    )


def scatter_of_runs(
    runs: Sequence[Statistics],
    epsilon: float,
    *,
    rounding: float = 0.0,
    windows: Statistics | None = None,
) -> Scatter | None:
    """Measures how batches of successive training steps differ, apart from drift.

    With `D(k)`, the mean squared difference of batches `k` steps apart, the variance is
    `D(1) − D(2)/2`. A random walk of the weights drops out of this, since it adds twice
    as much to `D(2)`; a steady drift leaves nothing. The difference of alternating
    batches counts in full, though windows of an even number of steps do not show it.

    Args:
        runs: For each run of successive steps the batches' statistics, of shape
            `(steps, channels)`.
        epsilon: The layer's epsilon.
        rounding: Variance that rounding adds to a mean, in the same units.
        windows: Statistics of windows of many steps, of shape `(windows, channels)`. A
            rare batch of huge variance shows in one of them, even if no run contains
            it.

    Returns:
        The scatter, the median over the runs; None without runs of 4 steps.

    Examples:
        >>> means = np.array([[0.0], [2.0], [0.0], [2.0]])
        >>> scatter_of_runs([Statistics(means, np.ones((4, 1)))], 0.0).mean
        4.0
    """
    found = []
    for run in runs:
        if len(run.mean) < MIN_BATCHES or not _is_finite(run):
            continue
        unit = run.variance.mean(axis=0) + epsilon
        found.append(
            (
                max(0.0, float((_noise(run.mean) / unit).mean()) - rounding),
                math.sqrt(float((_noise(run.variance) / unit**2).mean())),
            )
        )
        last = run.variance
    if not found:
        return None
    all_of_it = last if windows is None else np.vstack([last, windows.variance])
    return Scatter(
        float(np.median([mean for mean, _ in found])),
        float(np.median([variation for _, variation in found])),
        _dominance(last, all_of_it, epsilon),
    )


def larger(one: Scatter | None, other: Scatter | None) -> Scatter | None:
    """The larger of each figure; None if there is no scatter at all."""
    if one is None or other is None:
        return one or other
    return Scatter(
        mean=max(one.mean, other.mean),
        variation=max(one.variation, other.variation),
        dominance=max(one.dominance, other.dominance),
    )


def _noise(points: np.ndarray) -> np.ndarray:
    one, two = (
        np.square(points[k:] - points[:-k]).mean(axis=0, dtype=np.float64)
        for k in (1, 2)
    )
    return np.asarray(np.maximum(one - two / 2, 0.0))


def _dominance(usual: np.ndarray, variances: np.ndarray, epsilon: float) -> float:
    middle = np.maximum(np.quantile(usual, 0.75, axis=0), 0.0) + epsilon
    return float(((variances.max(axis=0) + epsilon) / middle).max(initial=1.0))


def _is_finite(batches: Statistics) -> bool:
    return all(np.isfinite(part).all() for part in batches)


def rounding_of(moving: Statistics, epsilon: float, momentum: float) -> float:
    """Variance that float32 adds to a batch mean computed from two readings.

    A reading has an error of `2⁻²⁴·|μ|`, and the batch `1/(1 − m)` times that.
    """
    if momentum == 1:
        return math.inf
    error = SINGLE_PRECISION * np.abs(moving.mean) / (1 - momentum)
    sigma2 = np.maximum(moving.variance, 0) + epsilon
    return 4 * float(np.mean(np.square(error) / sigma2))

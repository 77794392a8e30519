"""How the statistics of single batches differ from each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.moments import Statistics

SINGLE_PRECISION = 2.0**-24
"""Relative error of a float32."""


@dataclass(frozen=True)
class Scatter:
    """Differences between single batches, in units of the variance within them.

    Args:
        mean: Variance of a batch's mean, averaged over the channels.
        variation: Coefficient of variation of a batch's variances, averaged so too.
        worst_variation: The same of the channel where it is largest.
    """

    mean: float
    variation: float
    worst_variation: float


def scatter(
    batches: Statistics, epsilon: float, *, rounding: float = 0.0
) -> Scatter | None:
    """How batches differ from which weights do not move: Bessel's variance.

    Args:
        batches: Their statistics, of shape `(batches, channels)`.
        epsilon: The layer's epsilon.
        rounding: Variance of a mean that rounding makes, in the same units.

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
    return _scatter(
        batches.mean.var(axis=0, ddof=1) / unit,
        batches.variance.var(axis=0, ddof=1) / unit**2,
        rounding,
    )


def neighbours(
    runs: Sequence[Statistics], epsilon: float, *, rounding: float = 0.0
) -> Scatter | None:
    """How batches of successive training steps differ: half of `D(1)`.

    Over a single step the weights hardly move, and batches that alternate, which no
    window of an even number of steps shows, differ in full.

    Args:
        runs: For each run of successive steps the batches' statistics, of shape
            `(steps, channels)`.
        epsilon: The layer's epsilon.
        rounding: Variance of a mean that rounding makes, in the same units.

    Returns:
        The scatter, the median over the runs; None without runs of 4 steps.

    Examples:
        >>> means = np.array([[0.0], [2.0], [0.0], [2.0]])
        >>> neighbours([Statistics(means, np.ones((4, 1)))], 0.0).mean
        2.0
    """
    found = []
    for run in runs:
        if len(run.mean) < MIN_BATCHES or not _is_finite(run):
            continue
        unit = run.variance.mean(axis=0) + epsilon
        of_mean = np.square(np.diff(run.mean, axis=0)).mean(axis=0) / 2
        of_variance = np.square(np.diff(run.variance, axis=0)).mean(axis=0) / 2
        found.append(_scatter(of_mean / unit, of_variance / unit**2, rounding))
    if not found:
        return None
    return Scatter(
        *(
            float(np.median([getattr(each, name) for each in found]))
            for name in ("mean", "variation", "worst_variation")
        )
    )


MIN_BATCHES = 4
"""With fewer batches their scatter is a guess."""


def _scatter(of_mean: np.ndarray, of_variance: np.ndarray, rounding: float) -> Scatter:
    return Scatter(
        max(0.0, float(of_mean.mean()) - rounding),
        math.sqrt(float(of_variance.mean())),
        math.sqrt(float(of_variance.max(initial=0.0))),
    )


def _is_finite(batches: Statistics) -> bool:
    return all(np.isfinite(part).all() for part in batches)


def rounding_of(moving: Statistics, epsilon: float, momentum: float) -> float:
    """Variance that float32 adds to a single batch's mean, taken from an average.

    A reading is off by `2⁻²⁴·|μ|`, and `1/(1 − m)` times that when a batch is
    computed from two of them.
    """
    if momentum == 1:
        return math.inf
    error = SINGLE_PRECISION * np.abs(moving.mean) / (1 - momentum)
    sigma2 = np.maximum(moving.variance, 0) + epsilon
    return 4 * float(np.mean(np.square(error) / sigma2))

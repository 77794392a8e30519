"""Tells noise from drift in successive windows of batch statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import average_noise

LINEAR, WALK = 2.0, 1.0
"""Exponents of the squared distance over time: of a steady drift, of a random walk."""

MIN_WINDOWS = 4
"""With fewer windows, noise and drift cannot be told apart."""


@dataclass(frozen=True)
class Stream:
    """Noise and drift of batch statistics, in units of the batch variance.

    Two windows of a stationary stream differ by sampling noise alone. Those of a
    drifting one differ more, the further they are apart.

    Args:
        mean_noise: Variance of one batch's mean.
        scale_noise: Variance of one batch's standard deviation.
        drift: Squared distance that the statistics move in one update.
        power: How the squared distance grows with time: from 1, a random walk, to
            2, a steady drift.
        variation: Coefficient of variation of one batch's variances.
    """

    mean_noise: float
    scale_noise: float
    drift: float
    power: float
    variation: float

    @property
    def noise(self) -> float:
        """Variance of one batch's statistics: mean and scale together."""
        return self.mean_noise + self.scale_noise

    def average_noise(self, momentum: float) -> float:
        """RMS noise of the moving average: `sqrt(noise·(1 − m)/(1 + m))`."""
        return math.sqrt(self.noise * average_noise(momentum))

    def drift_lag(self, momentum: float) -> float:
        """RMS lag of the moving average behind the drift.

        The average is about `τ = m/(1 − m)` updates old. Over these the statistics
        move by `drift·τ^power`, squared, which is the squared lag in steady drift
        (`power` 2); in a random walk (`power` 1) it is half of that.
        """
        if momentum == 1:
            return math.inf if self.drift > 0 else 0.0
        age = momentum / (1 - momentum)
        return math.sqrt(self.power / 2 * self.drift * age**self.power)

    def best_momentum(self, largest: float = 0.999) -> float:
        """The momentum that minimises squared drift lag plus noise.

        Args:
            largest: Largest result allowed, so that the start is forgotten in time.

        Returns:
            A momentum from 0 to `largest`.
        """
        # All candidates at once, since this runs for each layer of a model.
        new = np.geomspace(1.0, max(1 - largest, 1e-6), 200)
        ages = (1 - new) / new
        drift_lags = self.power / 2 * self.drift * ages**self.power
        noises = self.noise * new / (2 - new)
        return float(1 - new[np.argmin(drift_lags + noises)])


def observe(
    windows: Statistics, epsilon: float, share: float, updates: int
) -> Stream | None:
    """Separates noise from drift by the structure function of the windows.

    Windows `k` apart have the mean squared difference `D(k) = 2v + A·(kN)^α`, where `v`
    is the sampling variance of a window and the rest is drift. From `k` = 1, 2, 4

        2^α = (D(4) − D(2)) / (D(2) − D(1)),    1 ≤ α ≤ 2,

    (`α` = 1 with fewer than 8 windows), then `A` and `v`. Where the statistics of one
    batch have the variance `s²`, those of a window of N updates have `q·s²`, with
    `q = window_noise(m, N)`. Everything is in units of the batch variance, and averaged
    over the channels.

    Args:
        windows: Batch statistics of successive windows, equally long, oldest first:
            of shape `(windows, channels)`.
        epsilon: The layer's epsilon.
        share: `q`, the variance of a window over that of a batch.
        updates: `N`, the updates of a window.

    Returns:
        The stream; None with fewer than 4 windows, or if they are not finite.
    """
    means, variances = windows.mean, np.maximum(windows.variance, 0)
    if len(means) < MIN_WINDOWS:
        return None
    if not (np.isfinite(means).all() and np.isfinite(variances).all()):
        return None
    unit = variances.mean(axis=0) + epsilon
    scales = np.sqrt((variances + epsilon) / unit)
    points = np.stack([means / np.sqrt(unit), scales, variances / unit])
    of_mean, of_scale, of_variance = _structure(points)
    power, growth = _growth(of_mean + of_scale)
    return Stream(
        mean_noise=_noise(of_mean, power) / share,
        scale_noise=_noise(of_scale, power) / share,
        drift=growth / updates**power,
        power=power,
        variation=math.sqrt(_noise(of_variance, power) / share),
    )


def recurrence(before: Statistics, after: Statistics, epsilon: float) -> float | None:
    """Variance of the windows' means in an epoch, if the next epoch repeats them.

    Examples in a fixed order repeat them; noise and moving weights do not.

    Args:
        before: Batch statistics of the windows of an epoch: `(windows, channels)`.
        after: Those of the next epoch.
        epsilon: The layer's epsilon.

    Returns:
        The variance in units of the batch variance; 0 if the epochs differ by more than
        half of it; None with fewer than 4 windows, or with different numbers.
    """
    if not MIN_WINDOWS <= len(after.mean) == len(before.mean):
        return None
    unit = after.variance.mean(axis=0) + epsilon
    varying = (before.mean.var(axis=0) + after.mean.var(axis=0)) / 2
    spread = float(np.mean(varying / unit))
    change = float(np.mean(np.square(after.mean - before.mean) / unit))
    return spread if change < spread / 2 else 0.0


def _structure(points: np.ndarray) -> np.ndarray:
    """`D(1)`, `D(2)` and, with enough windows, `D(4)`; one row for each quantity."""
    steps = (1, 2, 4) if points.shape[1] >= 8 else (1, 2)
    apart = [points[:, k:] - points[:, :-k] for k in steps]
    return np.stack(
        [np.einsum("qwc,qwc->q", each, each) / each[0].size for each in apart], axis=1
    )


def _growth(structure: Sequence[float]) -> tuple[float, float]:
    """`α` and `A·N^α`."""
    rise = structure[1] - structure[0]
    if rise <= 0:
        return WALK, 0.0
    power = WALK
    if len(structure) > 2 and structure[2] > structure[1]:
        power = math.log2((structure[2] - structure[1]) / rise)
    power = min(LINEAR, max(WALK, power))
    return power, rise / (2**power - 1)


def _noise(structure: Sequence[float], power: float) -> float:
    """`v`, given the exponent of the drift."""
    rise = max(0.0, structure[1] - structure[0])
    return float(max(0.0, structure[0] - rise / (2**power - 1))) / 2

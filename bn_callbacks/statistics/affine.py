"""Recognises data of training that have been scaled and shifted: `x → a·x + b`.

Other units, missing preprocessing and preprocessing done twice are such maps. From `x`,
a linear layer with kernel `w` and bias `c` makes outputs of the mean `w·μ + c` and the
variance `w·Σ·w`; from `a·x + b` it makes

    σ' = |a|·σ,    m' = a·(m − c) + b·Σw + c,

so at the first BN layer all standard deviations have the same factor, whatever the
kernel is; the means need not. One factor alone proves nothing: weights that have grown
alike, variances divided by a constant and batches of constant inputs show it too. So a
factor is only a reason to look further: data that are mapped back must agree with what
*all* layers store (`measuring/rescaling.py`), and with stale statistics they never do.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.moments import Statistics

ALIKE = 0.05
"""Relative spread up to which the channels' ratios are one factor: twice what chance
makes of one (tests/benchmarks/limits.py)."""

LEAST_FACTOR = 1.5
"""A factor nearer to 1 is not called preprocessing: the smallest in use is 2, between
[0, 1] and [-1, 1]."""

PROPORTIONAL = 0.1
"""Error, in standard deviations, up to which means count as scaled by a factor."""

FEW_CHANNELS = 4
"""Smallest number of channels whose equal ratios and scaled means are a proof."""

SHIFTED = 0.1
"""Shift of the first layer's means, in standard deviations, that counts as none."""


class Ratio(NamedTuple):
    """Standard deviations of batches over those that are stored.

    Attributes:
        median: The median over the channels.
        spread: RMS distance of the channels from the median, as a share of it.
    """

    median: float
    spread: float

    @property
    def is_factor(self) -> bool:
        """Whether all channels have this factor, and it is far enough from 1."""
        return self.spread < ALIKE and is_large(self.median)


def is_large(factor: float) -> bool:
    """Whether a factor is far enough from 1."""
    return max(factor, 1 / factor) >= LEAST_FACTOR


class InputMap(NamedTuple):
    """What has been done to the data: `given = factor·trained + shift`.

    Attributes:
        factor: The factor.
        shift: The shift.
    """

    factor: float
    shift: float = 0.0

    def __str__(self) -> str:
        a = self.factor
        text = f"a factor of {f'{a:.3g}' if a >= 1 else f'1/{1 / a:.3g}'}"
        return f"{text} and a shift of {self.shift:.3g}" if self.shift else text


def ratio_of(batch: Statistics, moving: Statistics, epsilon: float) -> Ratio:
    """Compares the standard deviations of batches with those that are stored.

    Channels without variance do not count.

    Args:
        batch: Statistics of the first BN layer's input.
        moving: What it stores.
        epsilon: The layer's epsilon.

    Examples:
        >>> stored = Statistics(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]))
        >>> given = Statistics(np.arange(4.0), 9 * stored.variance)
        >>> ratio_of(given, stored, epsilon=1e-3)
        Ratio(median=3.0, spread=0.0)
    """
    varies = (moving.variance > 10 * epsilon**2) & (batch.variance > 0)
    if not varies.any():
        return Ratio(1.0, math.inf)
    ratios = np.sqrt(batch.variance[varies] / moving.variance[varies])
    median = float(np.median(ratios))
    if not np.isfinite(ratios).all() or not 0 < median < math.inf:
        return Ratio(1.0, math.inf)
    spread = math.sqrt(float(np.mean(np.square(ratios / median - 1))))
    return Ratio(median, spread)


def start_lag(
    batch: Statistics, moving: Statistics, initial: Statistics, epsilon: float
) -> float:
    """The lag that remains if `moving` is an average that still holds its start.

    Such an average is `w·initial + (1 − w)·batch`. Tries all weights `w`, and returns
    the smallest lag.

    Args:
        batch: Statistics of a layer's input.
        moving: What it stores.
        initial: What it was built with.
        epsilon: The layer's epsilon.

    Examples:
        >>> start = Statistics(np.zeros(2), np.ones(2))
        >>> given = Statistics(np.full(2, 10.0), np.full(2, 5.0))
        >>> half = Statistics(np.full(2, 5.0), np.full(2, 3.0))
        >>> start_lag(given, half, start, epsilon=1e-3)
        0.0
    """
    mixed = (
        Statistics(
            weight * initial.mean + (1 - weight) * batch.mean,
            weight * initial.variance + (1 - weight) * batch.variance,
        )
        for weight in np.linspace(0.02, 0.98, 49)
    )
    return min(lag(each, moving, epsilon) for each in mixed)


def is_proportional(batch: Statistics, moving: Statistics, factor: float) -> bool:
    """Whether the means, far from 0, have the same factor as the standard deviations.

    This proves that the data are scaled: a stale average has other means, and in one
    that was divided by a constant, means and standard deviations differ in their
    factors.

    Args:
        batch: Statistics of a layer's input.
        moving: What it stores.
        factor: The one factor of all its standard deviations.

    Examples:
        >>> stored = Statistics(np.arange(5.0), np.ones(5))
        >>> is_proportional(Statistics(3 * stored.mean, np.full(5, 9.0)), stored, 3.0)
        True
    """
    varies = (moving.variance > 0) & (batch.variance > 0)
    if varies.sum() < FEW_CHANNELS:
        return False
    sigma = np.sqrt(batch.variance[varies])
    off, size = (
        math.sqrt(float(np.mean(np.square(part[varies] / sigma))))
        for part in (batch.mean - factor * moving.mean, batch.mean)
    )
    return off < PROPORTIONAL * min(1.0, size)


def shift_between(
    unshifted: Statistics, shifted: Statistics, wanted: Statistics
) -> float:
    """Finds the shift of the data that gives the first layer the means it stores.

    The means move in proportion to a shift of all inputs: by `d = shifted − unshifted`
    for each unit. In least squares, `unshifted + s·d = wanted` has the solution
    `s = Σd·e/Σd²`, where `e = wanted − unshifted`, all in standard deviations. It is 0
    for kernels whose weights add up to 0, which do not feel a shift.

    Args:
        unshifted: The layer's statistics with the data as they are.
        shifted: Its statistics with 1 added to all data.
        wanted: What it stores.

    Examples:
        >>> zero, one = (Statistics(np.full(3, m), np.ones(3)) for m in (0.0, 2.0))
        >>> shift_between(zero, one, Statistics(np.full(3, 5.0), np.ones(3)))
        2.5
    """
    d = _apart(shifted, unshifted, wanted)
    size = float(d @ d)
    return float(d @ _apart(wanted, unshifted, wanted)) / size if size > 0 else 0.0


def is_felt(
    shift: float, unshifted: Statistics, shifted: Statistics, wanted: Statistics
) -> bool:
    """Whether a shift moves the means by more than `SHIFTED`.

    Args:
        shift: The shift, for all data.
        unshifted: The first layer's statistics with the data as they are.
        shifted: Its statistics with 1 added to all data.
        wanted: What it stores.
    """
    d = _apart(shifted, unshifted, wanted)
    return abs(shift) * math.sqrt(float(d @ d) / max(len(d), 1)) > SHIFTED


def _apart(one: Statistics, other: Statistics, unit: Statistics) -> NDArray[np.float64]:
    varies = unit.variance > 0
    apart = (one.mean - other.mean)[varies] / np.sqrt(unit.variance[varies])
    return np.asarray(apart, np.float64)

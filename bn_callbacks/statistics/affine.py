"""Data that are those of training, scaled and shifted: `x → a·x + b`.

Other units, missing preprocessing and preprocessing done twice are such maps. What a
linear layer with kernel `w` and bias `c` makes of `x` has the mean `w·μ + c` and the
variance `w·Σ·w`; of `a·x + b` it has

    σ' = |a|·σ,    m' = a·(m − c) + b·Σw + c,

so at the first BN layer all standard deviations have one factor, whatever the kernel
is, while the means need not. One factor alone proves nothing: weights that have grown
alike, variances divided by a constant and batches of constant inputs show it too. So a
factor is only a reason to look further: data that are mapped back must agree with what
*all* layers store (`measuring/mapped.py`), which no statistics do that are stale.
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
"""A factor nearer to 1 than this is not called preprocessing: the least that anybody
means is the 2 between [0, 1] and [-1, 1]."""

PROPORTIONAL = 0.1
"""Distance in standard deviations up to which means are scaled as the variances are."""

FEW_CHANNELS = 4
"""With fewer channels, equal ratios and means are no proof."""

SHIFTED = 0.1
"""Shift of the first layer's means, in standard deviations, up to which it is none."""


class Ratio(NamedTuple):
    """Standard deviations of batches over those that are stored.

    Attributes:
        median: The median over the channels.
        spread: How far the channels are from it, as a share of it (a root of the mean
            square).
    """

    median: float
    spread: float

    @property
    def is_factor(self) -> bool:
        """Whether it is the one factor of all channels, and worth a word."""
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
    """The ratio of standard deviations that most channels have, and how alike it is.

    Channels without variance say nothing.

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
    """The lag that is left if `moving` is an average that still holds its start.

    Such an average is `w·initial + (1 − w)·batch`; the least lag over all weights `w`.

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
    """Whether means far from 0 are scaled by the very factor of the deviations.

    Then nothing but a factor is left to explain: an average that is stale has other
    means, and one divided by a constant has means divided by its square.

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
    """How far data have to be shifted for the first layer to have the means it stores.

    Its means move in proportion to a shift of all inputs: by `d = shifted − unshifted`
    a unit. The least squares `s` of `unshifted + s·d = wanted` is `Σd·e/Σd²`, where
    `e = wanted − unshifted`, each in standard deviations; 0 where kernels add up to
    nothing and do not mind.

    Args:
        unshifted: What the layer has with data as they are.
        shifted: What it has with 1 added to all data.
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
        unshifted: As `shift_between` takes it, and the rest too.
        shifted: What the first layer has with 1 added to all data.
        wanted: What it stores.
    """
    d = _apart(shifted, unshifted, wanted)
    return abs(shift) * math.sqrt(float(d @ d) / max(len(d), 1)) > SHIFTED


def _apart(one: Statistics, other: Statistics, unit: Statistics) -> NDArray[np.float64]:
    varies = unit.variance > 0
    apart = (one.mean - other.mean)[varies] / np.sqrt(unit.variance[varies])
    return np.asarray(apart, np.float64)

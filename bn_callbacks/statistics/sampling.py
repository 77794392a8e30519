"""Estimates how precise pooled statistics are, from how batches differ."""

from collections.abc import Sequence

import numpy as np

from bn_callbacks.statistics.moments import Moments, pool

MAX_BLOCKS = 64
"""At so many blocks, neighbours are joined, so that memory stays bounded."""

MIN_BLOCKS = 8
"""Smallest number of blocks whose scatter is reliable."""


def design_effect(means: Moments, whole: Moments, size: float) -> float | None:
    """Variance of batch means, over the largest that random samples would have.

    Means of `size` examples drawn at random have the variance `τ²/size`, where `τ²`,
    the variance of an example's own mean, is at most `σ²`. So the ratio of the variance
    to `σ²/size`, averaged over the channels, is at most 1 for random samples, apart
    from chance.

    Args:
        means: Moments of the batches' means, each counted once.
        whole: Moments of all values.
        size: Examples in a batch.

    Returns:
        The design effect; None with fewer than 8 batches.

    Examples:
        >>> import numpy as np
        >>> batches = np.random.default_rng(0).normal(size=(1000, 32, 3))
        >>> means = Moments.from_values(batches.mean(axis=1))
        >>> 0.8 < design_effect(means, Moments.from_values(batches), 32) < 1.2
        True
    """
    varies = (whole.count > 0) & (whole.variance > 0)
    if means.count.max(initial=0) < MIN_BLOCKS or not varies.any():
        return None
    between = means.m2[varies] / (means.count[varies] - 1)
    return float(size * np.mean(between / whole.variance[varies]))


class Blocks:
    """Moments of successive blocks of data, for the standard error of the whole.

    At first each batch is a block. At `MAX_BLOCKS`, neighbours are joined, and again
    later, so that blocks grow with the data.
    """

    def __init__(self) -> None:
        self.blocks: list[Moments] = []
        self._size = 1
        self._open: list[Moments] = []

    def add(self, batch: Moments) -> None:
        """Adds the next batch, unless it is empty."""
        if batch.is_empty:
            return
        self._open.append(batch)
        if len(self._open) < self._size:
            return
        self.blocks.append(pool(self._open))
        self._open = []
        if len(self.blocks) == MAX_BLOCKS:
            self.blocks = _joined(self.blocks)
            self._size *= 2

    def standard_error(self, epsilon: float) -> float | None:
        """The `standard_error`; None while there are too few blocks."""
        return standard_error(self.blocks, epsilon)


def standard_error(blocks: Sequence[Moments], epsilon: float) -> float | None:
    """Standard error of pooled statistics, from the scatter between blocks.

    With weights `w_b = n_b / Σn` the pooled mean `μ = Σw·m_b` and variance
    `v = Σw·q_b`, `q_b = v_b + (m_b − μ)²`, have the standard errors

        se(μ)² = K/(K−1) · Σ w_b²·(m_b − μ)²,    se(v)² = K/(K−1) · Σ w_b²·(q_b − v)²

    and the scale has `se(v) / (2σ²)`. As in the lag, both are taken in units of
    `σ = sqrt(v + ε)`, squared, added, and averaged over the channels.

    If neighbouring blocks are alike (grouped data), this is too small. Therefore
    neighbours are joined, again and again while 8 blocks remain, and the largest result
    counts (Flyvbjerg and Petersen, 1989).

    Args:
        blocks: Moments of successive blocks of data.
        epsilon: The layer's epsilon.

    Returns:
        The standard error in standard deviations; None with fewer than 8 blocks.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> batches = [
        ...     Moments.from_values(rng.normal(size=(100, 4))) for _ in range(64)
        ... ]
        >>> 0.01 < standard_error(batches, 0.0) < 0.03  # (1 + 1/2) / 6400, root
        True
    """
    level = list(blocks)
    largest = None
    while len(level) >= MIN_BLOCKS:
        error = _scatter(level, epsilon)
        largest = error if largest is None else max(largest, error)
        level = _joined(level)
    return largest


def _scatter(blocks: Sequence[Moments], epsilon: float) -> float:
    count = np.stack([block.count for block in blocks])
    weight = count / np.maximum(count.sum(axis=0), 1e-300)
    means = np.stack([block.mean for block in blocks])
    mean = (weight * means).sum(axis=0)
    second = np.stack([block.variance for block in blocks]) + np.square(means - mean)
    variance = (weight * second).sum(axis=0)
    bessel = len(blocks) / (len(blocks) - 1)

    # A channel without variance has no error.
    sigma2 = np.where(variance + epsilon > 0, variance + epsilon, 1.0)
    of_mean = np.square(weight * (means - mean)).sum(axis=0) / sigma2
    of_variance = np.square(weight * (second - variance)).sum(axis=0)
    of_scale = of_variance / np.square(2 * sigma2)
    return float(np.sqrt(bessel * np.mean(of_mean + of_scale)))


def _joined(blocks: Sequence[Moments]) -> list[Moments]:
    """Joins pairs of neighbours, and leaves out a last block without a partner."""
    pairs = zip(blocks[::2], blocks[1::2], strict=False)
    return [one.merge(other) for one, other in pairs]

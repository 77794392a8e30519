"""How precise pooled statistics are, judged by how batches differ."""

from collections.abc import Sequence

import numpy as np

from bn_callbacks.statistics.moments import Moments, pool

MAX_BLOCKS = 64
"""Blocks kept; then neighbours are joined, so that memory stays bounded."""

MIN_BLOCKS = 8
"""Fewer blocks say nothing reliable about their scatter."""


class Blocks:
    """Moments of successive blocks of data, for the standard error of the whole.

    Batches are kept as blocks of their own until there are `MAX_BLOCKS`; then
    neighbours are joined, and so on, so that blocks grow with the data.
    """

    def __init__(self) -> None:
        self.blocks: list[Moments] = []
        self._size = 1
        self._open: list[Moments] = []

    def add(self, batch: Moments) -> None:
        """Adds the next batch; one that counted nothing is passed over."""
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
        """See `standard_error`; None while there are too few blocks."""
        return standard_error(self.blocks, epsilon)


def standard_error(blocks: Sequence[Moments], epsilon: float) -> float | None:
    """Standard error of pooled statistics, from the scatter between blocks.

    With weights `w_b = n_b / Σn` the pooled mean `μ = Σw·m_b` and variance
    `v = Σw·q_b`, `q_b = v_b + (m_b − μ)²`, have the standard errors

        se(μ)² = K/(K−1) · Σ w_b²·(m_b − μ)²,    se(v)² = K/(K−1) · Σ w_b²·(q_b − v)²

    and that of the scale is `se(v) / (2σ²)`. Both, in units of `σ = sqrt(v + ε)`, are
    squared, added and averaged over the channels, as in the lag.

    Neighbouring blocks may be alike (grouped data), which makes this too small.
    Therefore neighbours are joined, again and again while 8 blocks remain, and the
    largest result counts (Flyvbjerg and Petersen, 1989).

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

    # A channel without any variance has no error either.
    sigma2 = np.where(variance + epsilon > 0, variance + epsilon, 1.0)
    of_mean = np.square(weight * (means - mean)).sum(axis=0) / sigma2
    of_variance = np.square(weight * (second - variance)).sum(axis=0)
    of_scale = of_variance / np.square(2 * sigma2)
    return float(np.sqrt(bessel * np.mean(of_mean + of_scale)))


def _joined(blocks: Sequence[Moments]) -> list[Moments]:
    """Pairs of neighbours as one; a last one without a partner is left out."""
    pairs = zip(blocks[::2], blocks[1::2], strict=False)
    return [one.merge(other) for one, other in pairs]

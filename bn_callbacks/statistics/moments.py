"""Count, mean and variance per channel, and how those of several parts combine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Statistics(NamedTuple):
    """Mean and biased variance per channel, as a BatchNormalization layer stores them.

    Attributes:
        mean: Mean of each channel, of shape `(channels,)`.
        variance: Biased variance of each channel, of shape `(channels,)`.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Weight, mean and squared deviations of the values of each channel.

    Deviations are taken from the mean, never as `E[x²] − E[x]²`, which loses every
    digit of the variance as soon as the mean is large beside the standard deviation.
    Moments of parts merge into the moments of the whole, so that a result does not
    depend on how the data was split.

    Args:
        count: Number of values in each channel, or the sum of their weights, of shape
            `(channels,)`: a mask may hide more of one channel than of another.
        mean: Weighted mean of each channel; `nan` where nothing was counted.
        m2: Weighted sum of the squared deviations from `mean` in each channel.

    Examples:
        >>> part = Moments.from_values([[1.0, 10.0], [3.0, 10.0]])
        >>> part.count.tolist(), part.mean.tolist(), part.m2.tolist()
        ([2.0, 2.0], [2.0, 10.0], [2.0, 0.0])
    """

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted in any channel."""
        return not self.count.any()

    @property
    def variance(self) -> NDArray[np.float64]:
        """Biased variance of each channel, `m2 / count`; `nan` where none is."""
        with np.errstate(invalid="ignore"):
            return self.m2 / self.count

    @property
    def statistics(self) -> Statistics:
        """Mean and biased variance: what a layer stores."""
        return Statistics(self.mean, self.variance)

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Moments of no values: neutral in a merge, and with undefined statistics.

        Args:
            channels: Number of channels.

        Returns:
            Moments with count 0, whose mean and variance are `nan`.
        """
        return cls(np.zeros(channels), np.full(channels, np.nan), np.zeros(channels))

    @classmethod
    def from_values(cls, values: ArrayLike) -> Moments:
        """Moments of an array, in two passes: the mean first, then the deviations.

        Args:
            values: Array of shape `(…, channels)`.

        Returns:
            The moments, empty if there are no values. Not finite where a value is not.

        Examples:
            >>> moments = Moments.from_values([[[1.0], [3.0]], [[5.0], [7.0]]])
            >>> moments.count.tolist(), moments.mean.tolist(), moments.m2.tolist()
            ([4.0], [4.0], [20.0])
        """
        x = np.asarray(values, np.float64)
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if not len(x):
            return cls.empty(x.shape[1])
        with np.errstate(all="ignore"):
            mean = x.mean(axis=0)
            deviation = x - mean
            # The first mean is rounded; as a shift, that costs nothing.
            sums = deviation.sum(axis=0), np.square(deviation).sum(axis=0)
            return cls.from_sums(len(x), mean, *sums)

    @classmethod
    def from_sums(
        cls, count: ArrayLike, shift: ArrayLike, sum1: ArrayLike, sum2: ArrayLike
    ) -> Moments:
        """Moments from sums of the values less a shift, for instance a pilot mean.

        `mean = shift + sum1 / count` and `m2 = sum2 − sum1² / count` hold for any
        shift; one within a few standard deviations of the mean keeps all digits.

        Args:
            count: Sum of the weights, `Σ w`, of all channels or of each.
            shift: What was subtracted from the values of each channel.
            sum1: `Σ w·(x − shift)` of each channel.
            sum2: `Σ w·(x − shift)²` of each channel.

        Returns:
            The moments, without statistics where `count` is 0.

        Examples:
            >>> moments = Moments.from_sums(2, shift=[5.0], sum1=[2.0], sum2=[4.0])
            >>> moments.mean.tolist(), moments.variance.tolist()
            ([6.0], [1.0])
        """
        first = np.asarray(sum1, np.float64)
        counts = np.broadcast_to(np.asarray(count, np.float64), first.shape)
        with np.errstate(all="ignore"):
            mean = np.asarray(shift, np.float64) + first / counts
            m2 = np.asarray(sum2, np.float64) - first * (first / counts)
        return cls(
            counts,
            np.where(counts > 0, mean, np.nan),
            np.where(counts > 0, np.maximum(m2, 0.0), 0.0),
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of both parts together (Chan, Golub and LeVeque, 1979).

        With `δ = mean_b − mean_a` and `n = n_a + n_b`: `mean = mean_a + δ·n_b/n` and
        `m2 = m2_a + m2_b + δ²·n_a·n_b/n`.

        Args:
            other: Moments of values that are not in this part.

        Returns:
            The moments of the union. Where a part counted nothing it changes nothing.

        Examples:
            >>> whole = Moments.from_values([[1.0]]).merge(Moments.from_values([[3.0]]))
            >>> whole.count.tolist(), whole.mean.tolist(), whole.variance.tolist()
            ([2.0], [2.0], [1.0])
        """
        count = self.count + other.count
        with np.errstate(all="ignore"):
            share = other.count / count
            delta = other.mean - self.mean
            mean = self.mean + delta * share
            m2 = self.m2 + other.m2 + delta**2 * (self.count * share)
        # A part without values has no mean, and changes nothing.
        mean = np.where(other.count > 0, mean, self.mean)
        m2 = np.where(other.count > 0, m2, self.m2)
        alone = (self.count == 0) & (other.count > 0)
        return Moments(
            count,
            np.where(alone, other.mean, mean),
            np.where(alone, other.m2, m2),
        )


def pool(moments: Iterable[Moments]) -> Moments:
    """Merges the moments of all parts: batches, replicas, calls of a shared layer.

    Args:
        moments: At least one part; empty parts do not matter.

    Returns:
        The moments of the union of the parts.

    Raises:
        ValueError: If there is no part at all.

    Examples:
        >>> parts = [[[0.0]], [[1.0], [2.0]], [[3.0]]]
        >>> pool(Moments.from_values(part) for part in parts).mean.tolist()
        [1.5]
    """
    parts = list(moments)
    if not parts:
        raise ValueError(
            "There is nothing to pool. Received: moments=[]. "
            "Pass the moments of at least one batch."
        )
    return reduce(Moments.merge, parts)


def pool_batches(
    counts: NDArray[np.float64],
    means: NDArray[np.float64],
    variances: NDArray[np.float64],
) -> Moments:
    """Pools the statistics of many batches at once, as `pool` does one by one.

    `mean = Σn·m / Σn` and `m2 = Σn·(v + (m − mean)²)` over the batches' counts `n`,
    means `m` and biased variances `v`.

    Args:
        counts: Number of values in each batch, shape `(batches,)`, or in each batch
            and channel, shape `(batches, channels)`; statistics of 0 are ignored.
        means: Means, shape `(batches, channels)`.
        variances: Biased variances, shape `(batches, channels)`.

    Returns:
        The moments of all values together.

    Examples:
        >>> both = pool_batches(
        ...     np.array([1.0, 3.0]), np.array([[0.0], [4.0]]), np.array([[0.0], [1.0]])
        ... )
        >>> both.count.tolist(), both.mean.tolist(), both.m2.tolist()
        ([4.0], [3.0], [15.0])
    """
    counts = counts if counts.ndim == 2 else counts[:, None]
    weights = np.broadcast_to(counts, means.shape)
    total = weights.sum(axis=0)
    used = weights > 0
    with np.errstate(all="ignore"):
        mean = np.where(used, weights * means, 0.0).sum(axis=0) / total
        spread = weights * (variances + np.square(means - mean))
        return Moments(total, mean, np.where(used, spread, 0.0).sum(axis=0))


def pool_replicas(statistics: Sequence[Statistics]) -> Statistics:
    """Pools the statistics of replicas that have equally many values.

    Args:
        statistics: The statistics of each replica, at least one.

    Returns:
        The mean of the means; the mean of the variances plus the variance of the
        means.

    Example:
        >>> pair = [Statistics(np.array([m]), np.array([2.0])) for m in (0.0, 2.0)]
        >>> pool_replicas(pair)
        Statistics(mean=array([1.]), variance=array([3.]))
    """
    if len(statistics) == 1:
        return statistics[0]
    means, variances = (np.stack(parts) for parts in zip(*statistics, strict=True))
    return pool_batches(np.ones(len(statistics)), means, variances).statistics


def is_finite(statistics: Iterable[Statistics]) -> bool:
    """Whether all means and variances are finite."""
    return all(np.isfinite(part).all() for pair in statistics for part in pair)

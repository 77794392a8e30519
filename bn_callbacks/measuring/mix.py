"""`Mix`: layers normalise with the batch's statistics, given ones, or both."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Statistics


class Mix(NamedTuple):
    """What layers normalise with: `weight·m + mean` and `ratio·v + variance`.

    Each is an array with the channels of all layers in one row.
    """

    weight: NDArray[np.float64]
    mean: NDArray[np.float64]
    ratio: NDArray[np.float64]
    variance: NDArray[np.float64]

    @classmethod
    def of_batch(cls, channels: int) -> "Mix":
        """The statistics of each batch, as in training."""
        one, zero = np.ones(channels), np.zeros(channels)
        return cls(one, zero, one, zero)

    @classmethod
    def given(cls, statistics: Iterable[Statistics]) -> "Mix":
        """Given statistics, as at inference."""
        mean, variance = _joined(statistics)
        zero = np.zeros(len(mean))
        return cls(zero, mean, zero, variance)

    @classmethod
    def corrected(
        cls, wanted: Iterable[Statistics], seen: Iterable[Statistics]
    ) -> "Mix":
        """The batch's own statistics, corrected as `wanted` corrects `seen`.

        Adds the difference of the means to the mean, and multiplies the variance by the
        ratio of the variances. A channel seen without variance gets the wanted one.
        """
        (mean, variance), (old_mean, old_variance) = map(_joined, (wanted, seen))
        varies = old_variance > 0
        ratio = np.divide(variance, old_variance, where=varies, out=np.zeros_like(mean))
        return cls(
            np.ones(len(mean)), mean - old_mean, ratio, np.where(varies, 0.0, variance)
        )

    def applied(self, statistics: Sequence[Statistics]) -> list[Statistics]:
        """What layers normalise with where batches have these statistics."""
        mean, variance = _joined(statistics)
        mean = self.weight * mean + self.mean
        variance = self.ratio * variance + self.variance
        ends = np.cumsum([len(each.mean) for each in statistics])[:-1]
        pairs = zip(np.split(mean, ends), np.split(variance, ends), strict=True)
        return [Statistics(*pair) for pair in pairs]


def _joined(
    statistics: Iterable[Statistics],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs = list(statistics)
    if not pairs:
        return np.zeros(0), np.zeros(0)
    means, variances = zip(*pairs, strict=True)
    return np.concatenate(means), np.concatenate(variances)

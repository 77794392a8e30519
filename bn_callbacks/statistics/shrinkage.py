"""Corrects stored statistics by a handful of examples.

A few examples say little about each channel, but much about what all channels have in
common. So the stored statistics are corrected in three steps, each only as far as the
examples can tell:

1. *Remove the start values.* A moving average that has not run for long holds
   `w·start + (1 − w)·batches`, with one `w` for means and variances of all channels.
2. *Scale.* Inputs `α` times as large have `α` times the mean and `α²` times the
   variance, with one `α` for all channels.
3. *Move each channel towards its sample*, all by the same share. As in the estimator of
   James and Stein (1961), the share depends on the distance of the sample from what is
   stored, in units of the sample's own error. Within the error nothing moves.

The differences between examples show how precise the sample is. The number of its
pixels does not: pixels of one image are alike.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Moments, Statistics

Array = NDArray[np.float64]

MIN_EXAMPLES = 3
"""Smallest number of examples that show how examples differ."""

CAUTION = 2.0
"""Nothing moves unless the distance exceeds its average by chance by so many standard
deviations. Chosen on networks for digits (tests/benchmarks/handful.py): with 0, the
loss of a healthy network doubled with 8 examples."""

FACTOR_CAUTION = 1.5
"""Standard errors up to which one factor for all channels changes nothing."""

FARTHEST = 1.5
"""Largest distance that counts, in `σ` or of its logarithm. Without a bound, a channel
that is silent in a few examples would be infinitely far off."""

TINY = 1e-30


class Shrunk(NamedTuple):
    """Corrected statistics of a layer, and how they were corrected.

    Attributes:
        statistics: Mean and variance of each channel, of shape `(channels,)`.
        start_weight: Weight of the start values that was removed from what is stored.
        scale: Factor by which the mean was multiplied then; the variance by its square.
        share: How far the result was moved towards the sample then, from 0 to 1.
        error: Standard error of the sample, in standard deviations.
    """

    statistics: Statistics
    start_weight: float
    scale: float
    share: float
    error: float


class Sample(NamedTuple):
    """The statistics of some channels over the examples, and their errors.

    Attributes:
        mean: Mean, `(channels,)`.
        variance: Unbiased variance, `(channels,)`.
        of_mean: What each example contributes to the error of the mean,
            `(examples, channels)`; the sum of the squares is the squared error.
        of_variance: The same for the variance.
        without: Statistics without one example, for each of them:
            `(examples, channels)`.
    """

    mean: Array
    variance: Array
    of_mean: Array
    of_variance: Array
    without: Statistics


def shrunk(
    examples: Sequence[Moments],
    stored: Statistics,
    start: Statistics,
    epsilon: float,
    caution: float = CAUTION,
) -> Shrunk:
    """Corrects stored statistics by examples, as far as these can tell.

    Args:
        examples: The moments of each example, or of groups of equally many examples; at
            least 3 that are not empty.
        stored: What the layer stores. A channel with a negative variance, or a value
            that is not finite, gets the statistics of the sample.
        start: What the layer was built with.
        epsilon: The layer's epsilon.
        caution: See `CAUTION`.

    Returns:
        The statistics. Channels that fewer than 3 examples reach keep what is stored.

    Raises:
        ValueError: There are fewer than 3 examples.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> each = [Moments.from_values(rng.normal(size=(1, 64))) for _ in range(16)]
        >>> start = Statistics(np.zeros(64), np.ones(64))
        >>> shrunk(each, start, start, 1e-3).share < 0.1  # What is stored is right.
        True
        >>> wrong = Statistics(rng.normal(size=64), np.ones(64))
        >>> round(shrunk(each, wrong, start, 1e-3).share, 1)
        0.9
    """
    examples = [each for each in examples if not each.is_empty]
    if len(examples) < MIN_EXAMPLES:
        raise ValueError(
            "There are too few examples to see how they differ. Received: "
            f"{len(examples)} that are not empty. Pass at least {MIN_EXAMPLES}, better "
            "8."
        )
    counts = np.stack([each.count for each in examples])
    reached = (counts > 0).sum(axis=0) >= MIN_EXAMPLES
    is_prior = np.isfinite(stored.mean) & (stored.variance >= 0)
    is_prior &= np.isfinite(stored.variance)
    means = np.stack([each.mean for each in examples])[:, reached]
    with np.errstate(invalid="ignore"):
        variances = np.stack([each.variance for each in examples])[:, reached]
    sample = _sample(counts[:, reached], means, variances)
    used = is_prior[reached]
    mean, variance = stored.mean.copy(), stored.variance.copy()
    new, start_weight, scale, share = _corrected(
        _select(sample, used),
        Statistics(stored.mean[reached][used], stored.variance[reached][used]),
        Statistics(start.mean[reached][used], start.variance[reached][used]),
        epsilon,
        caution,
    )
    mean[reached] = sample.mean
    variance[reached] = sample.variance
    mean[reached & is_prior], variance[reached & is_prior] = new
    if not (reached & is_prior).any() and reached.any():
        share = 1.0
    error = _noise(sample, sample.variance + epsilon, epsilon)
    return Shrunk(
        Statistics(mean, variance),
        start_weight,
        scale,
        share,
        float(np.sqrt(2 * error)),
    )


def _sample(counts: Array, means: Array, variances: Array) -> Sample:
    total = np.maximum(counts.sum(axis=0), TINY)
    weight = counts / total
    means = np.where(counts > 0, means, 0.0)
    variances = np.where(counts > 0, variances, 0.0)
    number = np.maximum((counts > 0).sum(axis=0), 2)
    bessel = np.sqrt(number / (number - 1))
    mean = (weight * means).sum(axis=0)
    second = variances + np.square(means - mean)
    variance = (weight * second).sum(axis=0)
    of_mean = bessel * weight * (means - mean)
    # Examples are nearer to their own mean than to the true one.
    unbiased = variance + np.square(of_mean).sum(axis=0)
    left = np.maximum(1 - weight, TINY)
    without_mean = (mean - weight * means) / left
    inside = ((weight * variances).sum(axis=0) - weight * variances) / left
    squares = ((weight * means**2).sum(axis=0) - weight * means**2) / left
    rest = number - 1
    between = (
        np.maximum(squares - without_mean**2, 0.0) * rest / np.maximum(rest - 1, 1)
    )
    return Sample(
        mean,
        unbiased,
        of_mean,
        bessel * weight * (second - variance),
        Statistics(without_mean, np.maximum(inside + between, 1e-3 * unbiased)),
    )


def _select(sample: Sample, channels: NDArray[np.bool_]) -> Sample:
    without = Statistics(*(part[:, channels] for part in sample.without))
    return Sample(
        sample.mean[channels],
        sample.variance[channels],
        sample.of_mean[:, channels],
        sample.of_variance[:, channels],
        without,
    )


def _corrected(
    sample: Sample,
    stored: Statistics,
    start: Statistics,
    epsilon: float,
    caution: float,
) -> tuple[Statistics, float, float, float]:
    """Returns the statistics, the weight of the start, the scale and the share."""
    factors = {"start": 0.0, "scale": 0.0}
    if not stored.mean.size:
        return stored, 0.0, 1.0, 0.0
    target, steps = stored, {"start": _without_start(start), "scale": _scaled}
    fit = _Fit(sample, stored, epsilon)
    while steps and fit.noise > 0:
        tried = {name: fit.best(step, target) for name, step in steps.items()}
        found = {name: steps[name](target, one) for name, one in tried.items()}
        # Begins with the one that explains more, as each may look like the other.
        name = min(found, key=lambda each: fit.distance(found[each]))
        if fit.distance(found[name]) >= fit.distance(target):
            break
        target, factors[name] = found[name], tried[name]
        del steps[name]
    moved, share = _towards(sample, target, epsilon, caution)
    return (
        moved,
        float(-np.expm1(-factors["start"])),
        float(np.exp(factors["scale"])),
        share,
    )


Step = Callable[[Statistics, float], Statistics]
"""Takes statistics and how far to move them; returns the moved ones."""

STEP = 0.05
"""Distance between the logarithms that are tried."""


def _without_start(start: Statistics) -> Step:
    """Makes a step that removes start values of the weight `1 − exp(−u)`."""

    def step(stored: Statistics, u: float) -> Statistics:
        weight = -np.expm1(-u)
        mean = stored.mean - weight * start.mean
        variance = stored.variance - weight * start.variance
        # A variance below 0 means that the weight was smaller in that channel.
        least = 1e-3 * (1 - weight) * stored.variance
        return Statistics(
            mean / (1 - weight), np.maximum(variance, least) / (1 - weight)
        )

    return step


def _scaled(stored: Statistics, g: float) -> Statistics:
    """Scales all channels by `exp(g)`."""
    return Statistics(stored.mean * np.exp(g), stored.variance * np.exp(2 * g))


class _Fit:
    """Finds how far a step must go to bring statistics nearest to a sample.

    The distance is that of the means in units of `σ` and that of the logarithms of `σ`,
    both squared and over their mean square errors.
    """

    def __init__(self, sample: Sample, stored: Statistics, epsilon: float) -> None:
        self._sample = sample
        self._epsilon = epsilon
        self._sigma2 = np.maximum(
            (sample.variance + stored.variance) / 2 + epsilon, TINY
        )
        self._of_mean, self._of_scale = _errors(sample, self._sigma2, epsilon)
        self.noise = min(self._of_mean.mean(), self._of_scale.mean())

    def distance(self, statistics: Statistics) -> float:
        """The squared distance of the sample from these statistics."""
        whole = Statistics(self._sample.mean[None], self._sample.variance[None])
        return float(self._distances(whole, statistics)[0])

    def best(self, step: Step, target: Statistics) -> float:
        """How far to move; less if that is uncertain.

        The standard error is that of the jackknife, which repeats the search without
        each of the examples.
        """
        least = 0.0 if step is not _scaled else -7.0
        tried = np.arange(least, 7.0 + STEP / 2, STEP)
        whole = Statistics(self._sample.mean[None], self._sample.variance[None])
        near = int(np.argmin(self._costs(step, target, whole, tried)[:, 0]))
        tried = tried[max(near - 12, 0) : near + 13]
        best = _minimum(tried, self._costs(step, target, whole, tried))[0]
        each = _minimum(tried, self._costs(step, target, self._sample.without, tried))
        error2 = (len(each) - 1) * np.var(each)
        if not best:
            return 0.0
        return float(best * max(0.0, 1 - FACTOR_CAUTION**2 * error2 / best**2))

    def _costs(
        self, step: Step, target: Statistics, samples: Statistics, tried: Array
    ) -> Array:
        return np.stack([self._distances(samples, step(target, u)) for u in tried])

    def _distances(self, samples: Statistics, statistics: Statistics) -> Array:
        """The squared distance of each sample; samples are `(samples, channels)`."""
        shift = np.square(samples.mean - statistics.mean) / self._sigma2
        log = _log(samples.variance, self._epsilon) + self._of_scale.mean()
        ratio = np.square(log - _log(statistics.variance, self._epsilon))
        # One channel that is far off, such as a silent one, must not decide for all.
        shift, ratio = (np.minimum(each, FARTHEST**2) for each in (shift, ratio))
        return np.asarray(
            shift.sum(axis=1) / self._of_mean.mean()
            + ratio.sum(axis=1) / self._of_scale.mean()
        )


def _minimum(tried: Array, costs: Array) -> Array:
    """Interpolates where each column of costs has its minimum."""
    index = costs.argmin(axis=0)
    found = tried[index]
    inner = (index > 0) & (index < len(tried) - 1)
    at, column = index[inner], np.flatnonzero(inner)
    before, here, behind = (costs[at + one, column] for one in (-1, 0, 1))
    bend = np.maximum(before - 2 * here + behind, TINY)
    found[inner] += STEP * np.clip((before - behind) / 2 / bend, -0.5, 0.5)
    return np.asarray(found)


def _towards(
    sample: Sample, target: Statistics, epsilon: float, caution: float
) -> tuple[Statistics, float]:
    """Moves all channels towards the sample by one share of the way; returns the share.

    Let `D` be the mean square distance, in units of `σ` and of the logarithm of `σ`,
    and `N` the part of it that the sample's error makes on average: `D = N + truth`.
    This part has a standard deviation of `N·sqrt(2/d)`, where `d` is the number of
    directions in which examples differ; channels that move together are one direction.
    The share is `truth/(truth + N)`, after `caution` times that standard deviation has
    been subtracted from `truth`.
    """
    sigma2 = np.maximum((sample.variance + target.variance) / 2 + epsilon, TINY)
    before, after = _log(target.variance, epsilon), _log(sample.variance, epsilon)
    # The logarithm of an unbiased estimate is too small on average, by its error.
    after = after + _errors(sample, sigma2, epsilon)[1].mean()
    shift = np.square(sample.mean - target.mean) / sigma2
    ratio = np.square(np.minimum(np.abs(after - before), FARTHEST))
    noise = _noise(sample, sigma2, epsilon)
    directions = _directions(_influences(sample, sigma2, epsilon))
    chance = noise * (1 + caution * np.sqrt(2 / directions))
    truth = max(0.0, float(np.mean(np.r_[shift, ratio])) - chance)
    share = float(truth / (truth + noise)) if truth else 0.0
    variance = np.exp(2 * (before + share * (after - before))) - epsilon
    return (
        Statistics(
            target.mean + share * (sample.mean - target.mean),
            target.variance if not share else np.maximum(variance, 0.0),
        ),
        share,
    )


def _log(variance: Array, epsilon: float) -> Array:
    """The logarithm of `σ`."""
    return np.asarray(np.log(np.maximum(variance + epsilon, TINY)) / 2)


def _influences(sample: Sample, sigma2: Array, epsilon: float) -> Array:
    """What each example contributes to the errors of all means, then of all scales."""
    spread = np.maximum(sample.variance + epsilon, TINY)
    return np.concatenate(
        [sample.of_mean / np.sqrt(sigma2), sample.of_variance / (2 * spread)], axis=1
    )


def _errors(sample: Sample, sigma2: Array, epsilon: float) -> tuple[Array, Array]:
    """The squared errors of each channel's mean and scale."""
    squares = np.square(_influences(sample, sigma2, epsilon)).sum(axis=0)
    # As with Student's t: few examples look more alike than they are.
    squares *= (len(sample.of_mean) - 1) / (len(sample.of_mean) - 2)
    of_mean, of_scale = np.split(squares, 2)
    return of_mean, of_scale


def _noise(sample: Sample, sigma2: Array, epsilon: float) -> float:
    """The mean square error of means and scales, over all channels."""
    errors = np.concatenate(_errors(sample, np.maximum(sigma2, TINY), epsilon))
    return float(errors.mean()) if errors.size else 0.0


def _directions(influences: Array) -> float:
    """Number of directions in which examples differ: `(tr S)² / tr S²`.

    `S` is their covariance. With few examples `tr S²` is too large, since it contains
    the square of each example with itself. The estimate is corrected by what this adds
    for normal examples.
    """
    number = len(influences)
    gram = influences @ influences.T
    trace, square = float(np.trace(gram)), float(np.square(gram).sum())
    rest = number - 1
    unbiased = rest**2 / ((rest + 2) * (rest - 1)) * (square - trace**2 / rest)
    most = float(influences.shape[1])
    if unbiased * most <= trace**2:
        return most
    return max(1.0, trace**2 / unbiased)

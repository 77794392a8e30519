"""Statistics from a handful of examples, and from what is stored already.

A few examples tell little of each channel, and much of what all channels have in
common. So what is stored is corrected in three steps, each by as much as they can tell:

1. *The start values are taken out.* A moving average that has not run for long holds
   `w·start + (1 − w)·batches`, with one `w` for all channels, of mean and variance.
2. *All is scaled.* Inputs `α` times as large have `α` times the mean and `α²` times the
   variance, with one `α` for all channels.
3. *Each channel moves towards its sample*, all by the same share. As in the estimator
   of James and Stein (1961), the share is estimated from the distance of the sample
   from what is stored, in units of the sample's own error: within it nothing moves.

How precise the sample is shows in how examples differ. The pixels of an image are
alike, so that many of them are no reason for confidence.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Moments, Statistics

Array = NDArray[np.float64]

MIN_EXAMPLES = 3
"""Fewer examples do not show how examples differ."""

CAUTION = 2.0
"""Standard deviations of what chance makes of the distance; up to there nothing moves.
Chosen on networks for digits (tests/benchmarks/handful.py): with 0, the loss of
a healthy network doubled with 8 examples."""

FACTOR_CAUTION = 1.5
"""Standard errors up to which one factor for all channels is no reason to move."""

FARTHEST = 1.5
"""Distance that counts at most, in `σ` or of its logarithm: a channel that is silent in
a few examples has no variance there, and no end of distance."""

TINY = 1e-30


class Shrunk(NamedTuple):
    """Statistics of a layer, and where they are from.

    Attributes:
        statistics: Mean and variance of each channel, of shape `(channels,)`.
        start_weight: Weight of the start values that was taken out of what is stored.
        scale: What the mean was multiplied with then; the variance with its square.
        share: How much of the way from there to the sample was gone, from 0 to 1.
        error: Standard error of the sample, in standard deviations.
    """

    statistics: Statistics
    start_weight: float
    scale: float
    share: float
    error: float


class Sample(NamedTuple):
    """What examples say of some channels.

    Attributes:
        mean: Their mean, `(channels,)`.
        variance: Their variance, without bias, `(channels,)`.
        of_mean: What each example adds to the error of the mean,
            `(examples, channels)`; the sum of the squares is the squared error.
        of_variance: The same of the variance.
        without: Statistics of all but one example, `(examples, channels)` each.
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
    """Corrects what is stored by what examples say, as far as they can say it.

    Args:
        examples: The moments of each example, or of each of some groups of equally
            many: at least 3 that are not empty.
        stored: What the layer stores. A channel where that is no number, or a negative
            variance, gets what the sample has.
        start: What the layer was built with.
        epsilon: The layer's epsilon.
        caution: Standard deviations of what chance makes of the distance, up to which
            nothing moves.

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
            "So few examples do not show how examples differ. Received: "
            f"{len(examples)} that count. Pass at least {MIN_EXAMPLES}, better 8."
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
        _of(sample, used),
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
    # The mean of the examples is nearer to them than the true mean, by its error.
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


def _of(sample: Sample, channels: NDArray[np.bool_]) -> Sample:
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
    """The statistics, the weight of the start, the scale and the share."""
    factors = {"start": 0.0, "scale": 0.0}
    if not stored.mean.size:
        return stored, 0.0, 1.0, 0.0
    target, steps = stored, {"start": _without_start(start), "scale": _scaled}
    fit = _Fit(sample, stored, epsilon)
    while steps and fit.noise > 0:
        tried = {name: fit.best(step, target) for name, step in steps.items()}
        found = {name: steps[name](target, one) for name, one in tried.items()}
        # What explains more goes first: each may look like the other.
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
"""Statistics, and how far to move them, 0 for nowhere; gives others."""

STEP = 0.05
"""Between the values that are tried, of a logarithm."""


def _without_start(start: Statistics) -> Step:
    """Takes the start values out, of the weight `1 − exp(−u)`."""

    def step(stored: Statistics, u: float) -> Statistics:
        weight = -np.expm1(-u)
        mean = stored.mean - weight * start.mean
        variance = stored.variance - weight * start.variance
        # Nothing has a variance below 0: there it was less.
        least = 1e-3 * (1 - weight) * stored.variance
        return Statistics(
            mean / (1 - weight), np.maximum(variance, least) / (1 - weight)
        )

    return step


def _scaled(stored: Statistics, g: float) -> Statistics:
    """All channels scaled by `exp(g)`."""
    return Statistics(stored.mean * np.exp(g), stored.variance * np.exp(2 * g))


class _Fit:
    """Finds the one number that brings statistics nearest to a sample.

    Means are held against each other in units of `σ`, of which also half the logarithm
    of the variance is one; each over its mean square error.
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
        """The distance of the sample from these."""
        whole = Statistics(self._sample.mean[None], self._sample.variance[None])
        return float(self._distances(whole, statistics)[0])

    def best(self, step: Step, target: Statistics) -> float:
        """How far to move, less the more the less sure it is.

        The standard error is that of the jackknife: from the same of all but one
        example, each of them in turn.
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
        """The distance of each of some samples, `(samples, channels)`."""
        shift = np.square(samples.mean - statistics.mean) / self._sigma2
        log = _log(samples.variance, self._epsilon) + self._of_scale.mean()
        ratio = np.square(log - _log(statistics.variance, self._epsilon))
        # One channel far off, as a silent one, is not to decide for all.
        shift, ratio = (np.minimum(each, FARTHEST**2) for each in (shift, ratio))
        return np.asarray(
            shift.sum(axis=1) / self._of_mean.mean()
            + ratio.sum(axis=1) / self._of_scale.mean()
        )


def _minimum(tried: Array, costs: Array) -> Array:
    """Where each column has its least value, between the values that were tried."""
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
    """Moves all channels towards the sample, and the share of the way that is gone.

    Let `D` be the mean square distance, in units of `σ` and of the logarithm of `σ`,
    and `N` what the sample's error makes on average: `D = N + truth`. The distance that
    chance makes has a standard deviation of `N·sqrt(2/d)`, where `d` is the number of
    directions in which examples differ: channels that move together are one. The share
    is `truth/(truth + N)`, with a `truth` less `caution` times that.
    """
    sigma2 = np.maximum((sample.variance + target.variance) / 2 + epsilon, TINY)
    before, after = _log(target.variance, epsilon), _log(sample.variance, epsilon)
    # The logarithm of what is right on average is too small on average, by its error.
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
    """What each example adds to the errors of means and scales, side by side."""
    spread = np.maximum(sample.variance + epsilon, TINY)
    return np.concatenate(
        [sample.of_mean / np.sqrt(sigma2), sample.of_variance / (2 * spread)], axis=1
    )


def _errors(sample: Sample, sigma2: Array, epsilon: float) -> tuple[Array, Array]:
    """Squared errors of each channel's mean and scale."""
    squares = np.square(_influences(sample, sigma2, epsilon)).sum(axis=0)
    # As with Student's t: few examples look more alike than they are.
    squares *= (len(sample.of_mean) - 1) / (len(sample.of_mean) - 2)
    of_mean, of_scale = np.split(squares, 2)
    return of_mean, of_scale


def _noise(sample: Sample, sigma2: Array, epsilon: float) -> float:
    """The mean square error of both, over all channels."""
    errors = np.concatenate(_errors(sample, np.maximum(sigma2, TINY), epsilon))
    return float(errors.mean()) if errors.size else 0.0


def _directions(influences: Array) -> float:
    """How many directions examples differ in: `(tr S)² / tr S²`, of their covariance S.

    Of few examples `tr S²` would be too large: in it each example meets itself. What is
    left out is what that adds, for normal ones.
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

"""What was seen of a layer, and the figures computed from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bn_callbacks.statistics.affine import InputMap
from bn_callbacks.statistics.lag import distance, lag
from bn_callbacks.statistics.losses import Family
from bn_callbacks.statistics.moments import Statistics, pool_replicas
from bn_callbacks.statistics.moving_average import average_noise, debias, start_weight
from bn_callbacks.statistics.scatter import Scatter
from bn_callbacks.statistics.stream import Stream, observe

DEFAULT_THRESHOLD = 0.2
"""Lag that is worth a word: a fifth of a standard deviation on every output."""

NOISE_FACTOR = 2.0
"""A distance up to so many standard errors is taken for sampling noise."""

ONE_VALUE = 1.5
"""Variance, times the batch size, of a batch's mean (1) and scale (1/2) together, where
the values of a channel are drawn independently from a normal distribution."""


@dataclass(frozen=True)
class Evidence:
    """All that was seen of one layer. What is not known is `None` or empty.

    Args:
        path: The layer's path, for the advice.
        momentum: The layer's momentum (it weights the old value).
        epsilon: The layer's epsilon.
        moving: The statistics the layer stores.
        batch: Batch statistics to hold them against.
        past: What the layer stored before `batch` was seen, given where `moving` is
            made of the same batches in the main, and so no witness.
        inferred: What inference brings the layer with the statistics that are stored.
        trainable: Whether training is to update the statistics.
        updates: Number of updates watched.
        total_updates: Number of updates that training will have made at its end.
        start: The statistics before the first of the `updates`.
        windows: Batch statistics of successive windows, equally long, oldest first:
            of shape `(windows, channels)`.
        window_updates: Length of a window in updates.
        window_share: Variance of a window's statistics over that of one batch's.
        batch_share: The same of `batch`.
        scatter: How single batches differ, where they were looked at.
        replicas: The statistics that each of several replicas stores.
        recurrence: Variance of the windows' means within an epoch that the next epoch
            repeats, in units of the batch variance.
        batch_size: Examples a batch.
        last_batch_size: Examples of an epoch's last batch, if it is smaller.
        is_called: Whether anything calls the layer.
        input_map: What was done to the data that are given, beside those of training,
            if that is proven.
        trains: Whether training was seen to ask the layer for the statistics of a
            batch; None where that could not be seen.
        is_opaque: Whether the layer does something of its own in training mode, which
            can be neither seen nor measured.
        is_still: Whether the statistics were watched and never changed.
        is_initial: Whether they began as the values a new layer has.
        is_pinned: Whether the model's graph stores `training=False` for the layer.
        precision: Machine epsilon of the dtype they are stored in, where that is
            less than float32.
        has_mixed_calls: Whether one step calls the layer several times.
        are_weights_replaced: Whether weights changed after the last update.
        is_touched: Whether the statistics changed after the last training step.
        is_grouped: Whether batches have been proven to be no random sample before.
        probe_effect: Design effect of the batches of a probe, through which the weights
            do not move, and whose sizes are known.
        family: What the losses of the model prove.
        threshold: Lag above which something is said.
    """

    path: str
    momentum: float
    epsilon: float
    moving: Statistics
    batch: Statistics | None = None
    past: Statistics | None = None
    inferred: Statistics | None = None
    trainable: bool = True
    updates: int | None = None
    total_updates: int | None = None
    start: Statistics | None = None
    windows: Statistics | None = None
    window_updates: int | None = None
    window_share: float | None = None
    batch_share: float | None = None
    scatter: Scatter | None = None
    replicas: Sequence[Statistics] = ()
    recurrence: float | None = None
    batch_size: float | None = None
    last_batch_size: float | None = None
    is_called: bool = True
    input_map: InputMap | None = None
    trains: bool | None = None
    is_opaque: bool = False
    is_still: bool = False
    is_initial: bool = True
    is_pinned: bool = False
    precision: float | None = None
    has_mixed_calls: bool = False
    are_weights_replaced: bool = False
    is_touched: bool = False
    is_grouped: bool = False
    probe_effect: float | None = None
    family: Family = Family.UNKNOWN
    threshold: float = DEFAULT_THRESHOLD

    @property
    def pair(self) -> tuple[Statistics, Statistics] | None:
        """Statistics of the batches, and those that they are held against."""
        return None if self.batch is None else (self.batch, self.past or self.moving)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What users see of a layer in numbers; what cannot be known is `None`.

    Args:
        lag: RMS error that the moving statistics put on the layer's normalised
            output, in standard deviations: their distance from what batches have.
        mean_shift: The part of `lag` from the means, in standard deviations.
        scale_ratio: Batch over moving standard deviation, geometric mean over
            the channels.
        residual: As `lag`, but the distance from what inference brings: 0 where
            recalibrating would change nothing.
        noise: RMS fluctuation of the moving averages that sampling alone
            causes, in standard deviations.
        start_weight: Weight of the values the averages began with.
        design_effect: Variance between batches over what a random sample of
            the same size would have.
        batch_noise: Standard deviation of one batch's statistics that sampling
            causes, in standard deviations of the input.
        batch_variation: Coefficient of variation of the batches' variances.
        disagreement: Largest lag of a replica's moving statistics behind those of
            all replicas; None without several of them.
    """

    lag: float | None = None
    mean_shift: float | None = None
    scale_ratio: float | None = None
    residual: float | None = None
    noise: float | None = None
    start_weight: float | None = None
    design_effect: float | None = None
    batch_noise: float | None = None
    batch_variation: float | None = None
    disagreement: float | None = None


@dataclass(frozen=True)
class Measured:
    """What is computed from the evidence before anything is judged.

    Args:
        figures: What users are to see.
        stream: Noise and drift of the batch statistics.
        start_part: Error that the start puts on the moving statistics: as much of the
            lag as goes when it is taken out.
        rest_part: Distance that neither the start nor noise explains.
        drift_part: As much of it as the batches were seen to drift.
        stall_part: Error at which updates are rounded away.
        own_noise: Distance between replicas that sampling explains.
        dominance: Largest variance of a batch over a usual one.
        is_impossible: Whether the start, taken out, leaves a negative variance, so
            that the count of updates is wrong.
    """

    figures: Figures = field(default_factory=Figures)
    stream: Stream | None = None
    start_part: float = 0.0
    rest_part: float = 0.0
    drift_part: float = 0.0
    stall_part: float = 0.0
    own_noise: float = 0.0
    dominance: float = 1.0
    is_impossible: bool = False

    @property
    def noise_part(self) -> float:
        """Fluctuation of the moving statistics from sampling."""
        return self.figures.noise or 0.0


def measure(seen: Evidence) -> Measured:
    """The figures behind a verdict."""
    weight = None
    if seen.updates is not None:
        weight = start_weight(seen.momentum, seen.updates)
    stream = None
    if seen.windows and seen.window_updates and seen.window_share:
        stream = observe(
            seen.windows, seen.epsilon, seen.window_share, seen.window_updates
        )
    noise = None if stream is None else _noise_part(seen, stream)
    variations = [] if stream is None else [stream.variation]
    variations += [] if seen.scatter is None else [seen.scatter.variation]
    ends = distance(*seen.pair, seen.epsilon)._asdict() if seen.pair else {}
    figures = Figures(
        **ends,
        residual=None
        if seen.inferred is None
        else lag(seen.inferred, seen.moving, seen.epsilon),
        noise=noise,
        start_weight=weight,
        design_effect=_design_effect(seen, stream),
        batch_noise=None if stream is None else math.sqrt(stream.noise),
        batch_variation=max(variations, default=None),
        disagreement=_disagreement(seen),
    )
    start_part, rest, is_impossible = _explained(seen, figures, weight)
    floor = _floor(seen, stream)
    is_noise = rest <= NOISE_FACTOR * floor
    if start_part**2 <= (NOISE_FACTOR * floor) ** 2:
        start_part = 0.0
    rest_part = 0.0 if is_noise else math.sqrt(max(0.0, rest**2 - floor**2))
    drift = 0.0 if stream is None else stream.drift_lag(seen.momentum)
    return Measured(
        figures=figures,
        stream=stream,
        start_part=start_part,
        rest_part=rest_part,
        drift_part=rest_part if drift > rest_part * DRIFT_SHARE else 0.0,
        stall_part=_stall_part(seen),
        own_noise=NOISE_FACTOR * (noise or 0.0),
        dominance=seen.scatter.dominance if seen.scatter else 1.0,
        is_impossible=is_impossible,
    )


DRIFT_SHARE = 0.25
"""Share of an unexplained distance that the seen drift of the batches must account for
to be its cause. The estimate is a rough one, as it comes from at most 16 windows: it
was about all of the distance where weights moved, and little of it where windows were
at rest (tests/benchmarks/limits.py)."""


def _explained(
    seen: Evidence, figures: Figures, weight: float | None
) -> tuple[float, float, bool]:
    """What the start explains of the lag, the rest, and whether that is impossible.

    The start explains as much as goes when it is taken out: nothing if the average
    is no nearer to the batches then, however much the count says is left of it.
    """
    if seen.pair is None or figures.lag is None:
        return 0.0, 0.0, False
    batch, _ = seen.pair
    whole = figures.lag
    if seen.updates == 0 and seen.is_initial:
        return whole, 0.0, False
    if seen.start is None or weight is None or seen.past or not 0 < weight < 1:
        return 0.0, whole, False
    clean = Statistics(
        debias(seen.moving.mean, seen.start.mean, weight),
        debias(seen.moving.variance, seen.start.variance, weight),
    )
    if is_negative(clean.variance, seen.moving.variance, seen.start.variance):
        return 0.0, whole, True
    rest = lag(batch, clean, seen.epsilon)
    if not rest < whole:
        return 0.0, whole, False
    moved = lag(clean, seen.moving, seen.epsilon)
    return min(moved, math.sqrt(whole**2 - rest**2)), rest, False


ROUNDING = 1e-3
"""Share of the variances involved below which a negative one may be rounding."""


def is_negative(variance: np.ndarray, *made_of: np.ndarray) -> bool:
    """Whether a variance is negative beyond rounding, which proves a wrong count.

    Args:
        variance: What was computed, as `(new − w·old)/(1 − w)`.
        made_of: What it was computed from.

    Examples:
        >>> one = np.ones(2)
        >>> is_negative(np.array([-1e-6, 0.5]), one), is_negative(-one, one)
        (False, True)
    """
    size = np.max(np.abs(made_of), axis=0)
    return bool((variance < -ROUNDING * size).any())


def _floor(seen: Evidence, stream: Stream | None) -> float:
    """Distance of `batch` and `moving` that sampling makes, one standard error.

    Without windows that tell, a batch of B independent values is off by
    `sqrt(1.5/B)`; the real figure is smaller, as B counts examples, of which each may
    bring many values.
    """
    share = seen.batch_share or seen.window_share
    if stream is not None:
        # Windows of few batches may miss what batches of that size always have.
        return math.sqrt(stream.noise * (average_noise(seen.momentum) + (share or 0)))
    if seen.batch_size is None or share is None:
        return 0.0
    own = average_noise(seen.momentum)
    return math.sqrt(ONE_VALUE / max(seen.batch_size, 1.0) * (own + share))


def _design_effect(seen: Evidence, stream: Stream | None) -> float | None:
    """`B·s²`, `s²` being the variance of a batch's mean in units of its own."""
    variance = _variance_of_means(seen, stream)
    if seen.batch_size is None or variance is None:
        return None
    variance = max(variance, _ordered(seen))
    return variance * max(seen.batch_size - 1, 0)


def ordered_effect(seen: Evidence) -> float:
    """The design effect that examples in an order prove, which each epoch repeats."""
    return _ordered(seen) * max((seen.batch_size or 0.0) - 1, 0.0)


def scatter_of_means(seen: Evidence, stream: Stream | None) -> float:
    """Standard deviation of a batch's mean, in standard deviations of its values."""
    variance = _variance_of_means(seen, stream) or 0.0
    return math.sqrt(max(variance, seen.recurrence or 0.0))


def _variance_of_means(seen: Evidence, stream: Stream | None) -> float | None:
    """By batches that follow each other, and by windows.

    Where weights leap, windows differ though batches do not: so windows, which are
    more, may correct what few batches have shown, and not replace it.
    """
    if seen.scatter is None:
        return None if stream is None else stream.mean_noise
    by_windows = 0.0 if stream is None else stream.mean_noise
    return max(seen.scatter.mean, min(by_windows, CORRECTED * seen.scatter.mean))


CORRECTED = 4.0
"""How many times the variance that a few batches have shown windows may show: of
grouped batches they show less, of weights that leap hundreds of times as much
(tests/benchmarks/limits.py)."""


def _disagreement(seen: Evidence) -> float | None:
    if len(seen.replicas) < 2:
        return None
    whole = pool_replicas(seen.replicas)
    return max(lag(whole, one, seen.epsilon) for one in seen.replicas)


def _ordered(seen: Evidence) -> float:
    """Variance that one batch's mean would need to explain a recurring pattern."""
    return (seen.recurrence or 0.0) / (seen.window_share or 1.0)


def _stall_part(seen: Evidence) -> float:
    """Lag that updates cannot mend, since rounding takes them away.

    A value `v` stays where it is if the update `(1 − m)·d` is below half its spacing,
    `v·eps/2`; so mean and variance may be off by `d = v·eps/(2·(1 − m))`.
    """
    if seen.precision is None or seen.momentum == 1:
        return 0.0
    share = seen.precision / 2 / (1 - seen.momentum)
    sigma2 = np.maximum(seen.moving.variance, 0) + seen.epsilon
    of_mean = np.square(seen.moving.mean) / sigma2
    return share * math.sqrt(float(np.mean(of_mean + 0.25)))


def _noise_part(seen: Evidence, stream: Stream) -> float:
    """Noise of the average; at an epoch's end with that of a small last batch.

    A last batch of `b` instead of `B` examples has `B/b` times the variance, and its
    own variance is too small by `σ²/b`; both enter with the weight `1 − m`.
    """
    squared = stream.average_noise(seen.momentum) ** 2
    if seen.batch_size and seen.last_batch_size:
        new = 1 - seen.momentum
        ratio = seen.batch_size / seen.last_batch_size
        squared += new**2 * stream.noise * ratio
        squared += (new * min(stream.mean_noise * ratio, 1.0) / 2) ** 2
    return math.sqrt(squared)

"""What was seen of a layer, and the figures computed from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bn_callbacks.statistics.lag import distance, lag
from bn_callbacks.statistics.moments import Statistics, pool_replicas
from bn_callbacks.statistics.moving_average import average_noise, debias
from bn_callbacks.statistics.stream import Stream, observe

DEFAULT_THRESHOLD = 0.2
"""Lag that is worth a word: a fifth of a standard deviation on every output."""

FORGOTTEN = 0.05
"""Weight of the start below which it no longer explains a lag."""

NOISE_FACTOR = 2.0
"""A distance up to so many standard errors is taken for sampling noise."""


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
        trainable: Whether training is to update the statistics.
        updates: Number of updates watched.
        total_updates: Number of updates that training will have made at its end.
        start: The statistics before the first of the `updates`.
        windows: Batch statistics of successive windows, equally long, oldest first:
            of shape `(windows, channels)`.
        window_updates: Length of a window in updates.
        window_share: Variance of a window's statistics over that of one batch's.
        replicas: The statistics that each of several replicas stores.
        recurrence: Variance of the windows' means within an epoch that the next epoch
            repeats, in units of the batch variance.
        batch_size: Examples a batch.
        last_batch_size: Examples of an epoch's last batch, if it is smaller.
        is_still: Whether the statistics were watched and never changed.
        is_initial: Whether they began as the values a new layer has.
        is_pinned: Whether the model's graph stores `training=False` for the layer.
        precision: Machine epsilon of the dtype they are stored in, where that is
            less than float32.
        has_mixed_calls: Whether one step calls the layer several times.
        are_weights_replaced: Whether weights changed after the last update.
        loss_gap: Loss in inference mode over loss with batch statistics.
        threshold: Lag above which something is said.
    """

    path: str
    momentum: float
    epsilon: float
    moving: Statistics
    batch: Statistics | None = None
    past: Statistics | None = None
    trainable: bool = True
    updates: int | None = None
    total_updates: int | None = None
    start: Statistics | None = None
    windows: Statistics | None = None
    window_updates: int | None = None
    window_share: float | None = None
    replicas: Sequence[Statistics] = ()
    recurrence: float | None = None
    batch_size: float | None = None
    last_batch_size: float | None = None
    is_still: bool = False
    is_initial: bool = True
    is_pinned: bool = False
    precision: float | None = None
    has_mixed_calls: bool = False
    are_weights_replaced: bool = False
    loss_gap: float | None = None
    threshold: float = DEFAULT_THRESHOLD

    @property
    def pair(self) -> tuple[Statistics, Statistics] | None:
        """Statistics of the batches, and those that they are held against."""
        return None if self.batch is None else (self.batch, self.past or self.moving)


@dataclass(frozen=True)
class Figures:
    """What is computed from the evidence before anything is judged.

    Args:
        lag: Distance of batch and moving statistics, in standard deviations.
        mean_shift: Its part from the means.
        scale_ratio: Batch over moving standard deviation.
        start_weight: Weight of the start in the moving statistics.
        stream: Noise and drift of the batch statistics.
        start_part: Error that the start puts on the moving statistics.
        drift_part: Distance that neither the start nor noise explains.
        noise_part: Fluctuation of the moving statistics from sampling.
        stall_part: Error at which updates are rounded away.
        design_effect: Variance of batch means over that of random batches.
        disagreement: Largest distance of a replica's statistics from those of all.
        own_noise: Distance of that kind that sampling explains.
    """

    lag: float | None = None
    mean_shift: float | None = None
    scale_ratio: float | None = None
    start_weight: float | None = None
    stream: Stream | None = None
    start_part: float = 0.0
    drift_part: float = 0.0
    noise_part: float | None = None
    stall_part: float = 0.0
    design_effect: float | None = None
    disagreement: float | None = None
    own_noise: float = 0.0


def measure(seen: Evidence) -> Figures:
    """The figures behind a verdict."""
    weight = None if seen.updates is None else seen.momentum**seen.updates
    stream = None
    if seen.windows and seen.window_updates and seen.window_share:
        stream = observe(
            seen.windows, seen.epsilon, seen.window_share, seen.window_updates
        )
    noise_part = design = None
    floor = 0.0
    if stream is not None:
        noise_part = _noise_part(seen, stream)
        share = average_noise(seen.momentum) + (seen.window_share or 0.0)
        floor = math.sqrt(stream.noise * share)
        if seen.batch_size is not None:
            scatter = max(stream.mean_noise, _ordered(seen))
            design = scatter * max(seen.batch_size - 1, 0)
    figures = Figures(
        start_weight=weight,
        stream=stream,
        noise_part=noise_part,
        stall_part=_stall_part(seen),
        design_effect=design,
        disagreement=_disagreement(seen),
        own_noise=NOISE_FACTOR * (noise_part or 0.0),
    )
    if seen.pair is None:
        return figures
    batch, clean = seen.pair
    start_part = 0.0
    if seen.start is not None and weight is not None and not seen.past and weight < 1:
        clean = Statistics(
            debias(seen.moving.mean, seen.start.mean, weight),
            debias(seen.moving.variance, seen.start.variance, weight),
        )
        start_part = lag(clean, seen.moving, seen.epsilon)
    elif seen.updates == 0 and seen.is_initial:
        clean = batch
        start_part = lag(batch, seen.moving, seen.epsilon)
    rest = lag(batch, clean, seen.epsilon)
    is_noise = rest <= NOISE_FACTOR * floor
    return replace(
        figures,
        **distance(*seen.pair, seen.epsilon)._asdict(),
        start_part=start_part,
        drift_part=0.0 if is_noise else math.sqrt(max(0.0, rest**2 - floor**2)),
    )


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

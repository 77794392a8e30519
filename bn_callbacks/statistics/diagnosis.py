"""From what was seen of one layer to the cause of its lag, and the remedy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.lag import lag, mean_shift, scale_ratio
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.moving_average import (
    average_noise,
    debias,
    suggest_momentum,
    updates_to_forget,
    window_noise,
)

HEALTHY = "healthy"
WARMING_UP = "warming_up"
DRIFTING = "drifting"
NOISY = "noisy"
INFERENCE_MODE = "inference_mode"
NOT_UPDATING = "not_updating"
NON_FINITE = "non_finite"

DEFAULT_THRESHOLD = 0.2
"""Lag that is worth a word: a fifth of a standard deviation on every output."""

FORGOTTEN = 0.05
"""Weight of the start below which it no longer explains a lag."""

GAP_LIMIT = 1.4
"""Loss gap that proves a problem: between the largest of healthy models, 1.29, and
the 1.5 that 27 of 32 true problems exceed (CAUSES)."""

NOISE_FACTOR = 2.0
"""A lag up to so many times its standard error is taken for sampling noise."""

MIN_WINDOWS = 4
"""Fewer windows than these say nothing certain about noise."""


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
        windows: Batch statistics of successive windows of `window_updates`
            updates each, oldest first.
        window_updates: Length of a window.
        is_still: Whether the statistics were watched and never changed.
        is_initial: Whether they began as the values a new layer has.
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
    windows: Sequence[Statistics] = ()
    window_updates: int | None = None
    is_still: bool = False
    is_initial: bool = True
    loss_gap: float | None = None
    threshold: float = DEFAULT_THRESHOLD


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on one layer and the figures behind it."""

    cause: str
    advice: str = ""
    lag: float | None = None
    mean_shift: float | None = None
    scale_ratio: float | None = None
    noise: float | None = None
    start_weight: float | None = None
    suggested_momentum: float | None = None


def diagnose(evidence: Evidence) -> Diagnosis:
    """Names the cause of a layer's lag and what to do about it.

    Args:
        evidence: What was seen of the layer.

    Returns:
        The verdict, `"healthy"` unless a mechanism is seen to be at work.

    Example:
    >>> import numpy as np
    >>> far = Statistics(np.full(8, 1.0), np.ones(8))
    >>> start = Statistics(np.zeros(8), np.ones(8))
    >>> now = Statistics(np.full(8, 1 - 0.99**50), np.ones(8))
    >>> diagnosis = diagnose(
    ...     Evidence(
    ...         "bn",
    ...         momentum=0.99,
    ...         epsilon=1e-3,
    ...         moving=now,
    ...         batch=far,
    ...         updates=50,
    ...         start=start,
    ...     )
    ... )
    >>> diagnosis.cause, round(diagnosis.lag, 3)
    ('warming_up', 0.605)
    """
    seen = _figures(evidence)
    cause = _cause(evidence, seen)
    momentum = _suggested_momentum(evidence, cause, seen.s2)
    return Diagnosis(
        cause=cause,
        advice=_advice(evidence, cause, seen, momentum),
        lag=seen.lag,
        mean_shift=seen.mean_shift,
        scale_ratio=seen.scale_ratio,
        noise=seen.noise,
        start_weight=seen.start_weight,
        suggested_momentum=momentum,
    )


def window_variance(windows: Sequence[Statistics], epsilon: float) -> float | None:
    """Variance of a window's statistics that sampling causes, drift apart.

    With windows `W_k` of a stationary stream plus a random walk of step `r`, the
    structure function is `D1 = E|W_{k+1} − W_k|² = 2v + r`, `D2 = 2v + 2r`; hence
    `v = D1 − D2/2`. Mean and standard deviation are measured in units of `σ`, summed,
    and averaged over channels, as in the lag.

    Args:
        windows: Batch statistics of at least three successive windows, equally long.
        epsilon: The layer's epsilon.

    Returns:
        `v ≥ 0`, or `None` with fewer than three windows.
    """
    if len(windows) < 3:
        return None
    sigma = np.sqrt(np.maximum([w.variance for w in windows], 0) + epsilon)
    unit = np.sqrt(np.mean(np.square(sigma), axis=0))
    points = np.concatenate([[w.mean for w in windows] / unit, sigma / unit], axis=1)

    def structure(step: int) -> float:
        difference = points[step:] - points[:-step]
        return 2 * float(np.mean(np.square(difference)))

    return max(0.0, structure(1) - structure(2) / 2)


@dataclass(frozen=True)
class _Figures:
    lag: float | None = None
    mean_shift: float | None = None
    scale_ratio: float | None = None
    noise: float | None = None
    noise_floor: float = 0.0
    start_weight: float | None = None
    debiased_lag: float | None = None
    s2: float | None = None


def _figures(seen: Evidence) -> _Figures:
    weight = None if seen.updates is None else seen.momentum**seen.updates
    noise, floor, s2 = None, 0.0, None
    if seen.window_updates:
        variance = window_variance(seen.windows, seen.epsilon)
        if variance is not None:
            s2 = variance / window_noise(seen.momentum, seen.window_updates)
            noise = math.sqrt(s2 * average_noise(seen.momentum))
            floor = math.sqrt(noise**2 + variance)
    if seen.batch is None:
        return _Figures(noise=noise, start_weight=weight)
    debiased_lag = None
    if seen.start is not None and weight is not None and weight < 1 and not seen.past:
        debiased = Statistics(
            debias(seen.moving.mean, seen.start.mean, weight),
            debias(seen.moving.variance, seen.start.variance, weight),
        )
        debiased_lag = lag(seen.batch, debiased, seen.epsilon)
    pair = (seen.batch, seen.past or seen.moving, seen.epsilon)
    return _Figures(
        lag(*pair), mean_shift(*pair), scale_ratio(*pair),
        noise, floor, weight, debiased_lag, s2,
    )  # fmt: skip


def _cause(seen: Evidence, figures: _Figures) -> str:
    is_finite = all(np.isfinite(part).all() for part in seen.moving)
    if not is_finite:
        return NON_FINITE
    if not seen.trainable:
        return HEALTHY
    if seen.is_still:
        if seen.loss_gap is not None and seen.loss_gap >= GAP_LIMIT:
            return NOT_UPDATING
        if not seen.is_initial:
            # Pinned to statistics from elsewhere, as in transfer learning.
            return HEALTHY
        return NOT_UPDATING if seen.momentum == 1 else INFERENCE_MODE
    if seen.loss_gap is not None and seen.loss_gap < GAP_LIMIT:
        return HEALTHY
    noise = figures.noise or 0.0
    if noise > seen.threshold and len(seen.windows) >= MIN_WINDOWS:
        return NOISY
    if figures.lag is None or figures.lag <= seen.threshold:
        return HEALTHY
    if figures.lag <= NOISE_FACTOR * figures.noise_floor:
        return HEALTHY
    if (
        (figures.start_weight or 0.0) > FORGOTTEN
        and figures.debiased_lag is not None
        and figures.debiased_lag < figures.lag / 2
    ):
        return WARMING_UP
    return DRIFTING


def _suggested_momentum(seen: Evidence, cause: str, s2: float | None) -> float | None:
    if cause == WARMING_UP:
        rule = suggest_momentum(seen.total_updates or seen.updates or 1)
        return min(rule, seen.momentum)
    if cause == NOISY and s2:
        # The momentum whose noise is half the threshold.
        share = (seen.threshold / 2) ** 2 / s2
        return max(seen.momentum, min(0.999, (1 - share) / (1 + share)))
    return None


def _advice(
    seen: Evidence, cause: str, figures: _Figures, momentum: float | None
) -> str:
    if cause == WARMING_UP:
        needed = updates_to_forget(seen.momentum, FORGOTTEN)
        return (
            f"{figures.start_weight:.0%} of the start values is still in the moving "
            f"statistics: momentum {seen.momentum:g} needs {needed} updates to forget "
            f"them and has had {seen.updates}. Recalibrate before export "
            "(`recalibrate(model, x)` or `RecalibrateBatchNorm`), debias for free "
            f"(`DebiasBatchNorm`), or set momentum={momentum:.3g}."
        )
    if cause == DRIFTING:
        return (
            "The weights move faster than the moving statistics follow. Recalibrate "
            "before export and before validation (`recalibrate(model, x)` or "
            "`RecalibrateBatchNorm`), and let the learning rate fall towards the end."
        )
    if cause == NOISY:
        return (
            f"The moving statistics fluctuate by {figures.noise:.2g} standard "
            f"deviations from sampling alone: momentum {seen.momentum:g} averages too "
            f"few batches. Set momentum={momentum:.3g} or use larger batches, and "
            "recalibrate before export (`recalibrate(model, x)`)."
        )
    if cause == INFERENCE_MODE:
        return (
            "The statistics never changed in training, most likely since the layer "
            "ran in inference mode: pass `training` on to it, or freeze it with "
            "`layer.trainable = False`. Do not recalibrate: the weights have adapted "
            "to the statistics as they are."
        )
    if cause == NOT_UPDATING:
        hint = "Set a momentum below 1. " if seen.momentum == 1 else ""
        return (
            "The layer trained on batch statistics, but its moving statistics never "
            f"changed. {hint}Recalibrate before export (`recalibrate(model, x)`)."
        )
    if cause == NON_FINITE:
        return (
            "The moving statistics are NaN or infinite and stay so for good. Find the "
            "batch that did it, then `recalibrate(model, x)` heals the layer."
        )
    return ""

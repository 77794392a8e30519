"""The moving average as a filter: what is in it, and how to get it out again.

A layer updates `moving = momentum·moving + (1 − momentum)·batch`. After N updates

    new = m^N·old + (1 − m^N)·W,    W = Σ_i w_i·batch_i,
    w_i = (1 − m)·m^(N−1−i) / (1 − m^N),    Σ_i w_i = 1,

so two readings of the average determine W, the weighted mean of the N batches between
them. Momentum is Keras' throughout: the weight of the old value.
"""

from __future__ import annotations

import math
import numbers

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORGOTTEN = 0.05
"""Weight of the start below which it no longer explains a lag."""

SHORT_RUN = 20
"""Up to so many steps, a tenth of the run would be too short a memory."""

LEAST_MOMENTUM = 0.5
"""The smallest momentum ever suggested: with less, the average is all noise."""


def start_weight(momentum: float, updates: int) -> float:
    """Weight `m^N` that the start value still has after N updates.

    Args:
        momentum: The layer's momentum, from 0 to 1.
        updates: Number of updates of the moving average.

    Returns:
        The weight, from 0 to 1; 1 before the first update.

    Raises:
        ValueError: If `momentum` or `updates` is out of range.

    Examples:
        >>> round(start_weight(0.99, 100), 3)
        0.366
    """
    _validate(momentum, updates)
    return float(momentum**updates)


def new_weight(momentum: float, updates: int) -> float:
    """Weight `1 − m^N` of the last N batches together, exact where it is small.

    Args:
        momentum: The layer's momentum, from 0 to 1.
        updates: Number of updates of the moving average.

    Returns:
        The weight, from 0 to 1; 0 before the first update.

    Raises:
        ValueError: If `momentum` or `updates` is out of range.

    Examples:
        >>> round(new_weight(0.99, 100), 3)
        0.634
    """
    _validate(momentum, updates)
    if momentum == 0:
        return float(updates > 0)
    return abs(math.expm1(updates * math.log(momentum)))


def window_statistic(
    old: ArrayLike, new: ArrayLike, momentum: float, updates: int
) -> NDArray[np.float64]:
    """Weighted mean of the batch statistics between two readings of their average.

    `W = (new − m^N·old) / (1 − m^N)`, computed as `new + (new − old)·m^N/(1 − m^N)`,
    so that not even the rounding error of `old` is left where `m^N` vanishes.

    Args:
        old: The moving average before the window.
        new: The moving average after it.
        momentum: The layer's momentum, from 0 to 1, 1 excluded.
        updates: Number of updates between the two readings, at least 1.

    Returns:
        The window's statistic, of the shape of the readings.

    Raises:
        ValueError: If nothing can have entered the average, with `momentum` 1 or
            `updates` 0, or if one of them is out of range.

    Examples:
        >>> new = 0.9 * (0.9 * 1.0 + 0.1 * 5.0) + 0.1 * 5.0
        >>> round(float(window_statistic(1.0, new, 0.9, updates=2)), 6)
        5.0
    """
    weight = new_weight(momentum, updates)
    if not weight:
        raise ValueError(
            "No batch entered the moving average, so nothing can be read from it. "
            f"Received: momentum={momentum}, updates={updates}. "
            "Wait for an update, and leave out layers whose momentum is 1."
        )
    return _without(new, old, start_weight(momentum, updates) / weight)


def debias(value: ArrayLike, start: ArrayLike, weight: float) -> NDArray[np.float64]:
    """The moving average without what is left of the value it started from.

    `(value − weight·start) / (1 − weight)`, as Adam corrects its moments.

    Args:
        value: The moving average.
        start: The value it started from, 0 for means and 1 for variances in Keras.
        weight: What is left of `start`, see `start_weight`; at least 0, below 1.

    Returns:
        The average of the batches alone, of the shape of `value`.

    Raises:
        ValueError: If `weight` is out of range.

    Examples:
        >>> debias([2.5, 1.0], start=1.0, weight=0.25).tolist()
        [3.0, 1.0]
    """
    if not 0 <= weight < 1:
        raise ValueError(
            "The start value can only be taken out of an average that holds more "
            f"than it. Received: weight={weight}. "
            "Pass `start_weight(momentum, updates)` after at least one update."
        )
    return _without(value, start, weight / (1.0 - weight))


def average_noise(momentum: float) -> float:
    """Variance of a long-running moving average of independent batch statistics.

    `(1 − m)/(1 + m)`, in units of the variance of a single batch statistic.

    Args:
        momentum: The layer's momentum, from 0 to 1.

    Returns:
        The variance, from 0 to 1.

    Raises:
        ValueError: If `momentum` is out of range.

    Examples:
        >>> round(average_noise(0.99), 4)
        0.005
    """
    _validate(momentum)
    return (1.0 - momentum) / (1.0 + momentum)


def window_noise(momentum: float, updates: int) -> float:
    """Variance of a window's statistic if its batches are independent.

    `Σ_i w_i² = (1 − m)/(1 + m)·(1 + m^N)/(1 − m^N)`, in units of the variance of a
    single batch statistic; `1/N` in the limit of momentum 1.

    Args:
        momentum: The layer's momentum, from 0 to 1.
        updates: Number of updates in the window, at least 1.

    Returns:
        The variance, from `1/N` to 1.

    Raises:
        ValueError: If `momentum` or `updates` is out of range.

    Examples:
        >>> window_noise(0.99, 1), window_noise(1.0, 20)
        (1.0, 0.05)
    """
    _validate(momentum, updates, at_least=1)
    if momentum == 1:
        return 1.0 / updates
    spread = (1.0 + start_weight(momentum, updates)) / new_weight(momentum, updates)
    return average_noise(momentum) * spread


def updates_to_forget(momentum: float, weight: float) -> int | None:
    """Updates until no more than `weight` of the start value is left.

    Args:
        momentum: The layer's momentum, from 0 to 1.
        weight: The weight that may be left, between 0 and 1, both excluded.

    Returns:
        The smallest N with `m^N ≤ weight`, or `None` with momentum 1: never.

    Raises:
        ValueError: If `momentum` or `weight` is out of range.

    Examples:
        >>> updates_to_forget(0.99, 0.01)
        459
    """
    _validate(momentum)
    if not 0 < weight < 1:
        raise ValueError(
            "The weight that may be left of the start value must lie between 0 and 1, "
            f"both excluded. Received: weight={weight}. Pass for instance 0.01."
        )
    if momentum == 1:
        return None
    if momentum == 0:
        return 1
    # Rounded first, so that 0.8**2 counts as 0.64, which it just exceeds in binary.
    return max(1, math.ceil(round(math.log(weight) / math.log(momentum), 9)))


def suggest_momentum(steps: int) -> float:
    """Rule of thumb for the momentum of a training run of so many steps.

    `1 − 10/steps`, at most 0.999: the average remembers about a tenth of the run, and
    forgets the values it started from. In a very short run (up to 20 steps) that would
    be a memory of a batch or two, all noise. There it is the momentum that leaves 5 %
    of the start at the end, `0.05^(1/steps)`, but at least 0.5.

    Args:
        steps: Number of training steps in the whole run: steps an epoch × epochs.

    Returns:
        The momentum, in Keras' sense, from 0.5 to 0.999; it never falls with `steps`.

    Raises:
        ValueError: If `steps` is less than 1.

    Examples:
        >>> [suggest_momentum(steps) for steps in (100, 1_000, 10_000)]
        [0.9, 0.99, 0.999]
        >>> round(suggest_momentum(6), 2)
        0.61
    """
    is_number = isinstance(steps, numbers.Real) and not isinstance(steps, bool)
    if not (is_number and steps >= 1):
        raise ValueError(
            "A momentum can only be suggested for a run of at least one step. "
            f"Received: steps={repr(steps)[:80]}. "
            "Pass the steps of the whole run: steps an epoch times epochs."
        )
    # Bounded first, since a whole number may be too large for a float.
    short, long = min(steps, SHORT_RUN), min(steps, 10_000)
    forgets = float(FORGOTTEN ** (1.0 / short))
    return min(max(LEAST_MOMENTUM, forgets, 1.0 - 10.0 / long), 0.999)


def _without(value: ArrayLike, start: ArrayLike, odds: float) -> NDArray[np.float64]:
    """`(value − w·start)/(1 − w)`, given the odds `w/(1 − w)`."""
    last = np.asarray(value, np.float64)
    with np.errstate(all="ignore"):
        return np.asarray(last + (last - np.asarray(start, np.float64)) * odds)


def _validate(momentum: float, updates: int = 0, at_least: int = 0) -> None:
    """Refuses a momentum outside [0, 1] and too few updates."""
    if not 0 <= momentum <= 1:
        raise ValueError(
            "The momentum of a moving average must lie between 0 and 1. "
            f"Received: momentum={momentum}. "
            "Pass the layer's `momentum`, the weight of the old value."
        )
    if not updates >= at_least:
        raise ValueError(
            f"The number of updates of a moving average must be at least {at_least}. "
            f"Received: updates={updates}. "
            "Pass training steps times the layer's calls in each."
        )

"""How far the moving statistics lag behind the batches, in the layer's own units.

A layer that trains on a batch puts out `z = (x − μ_b)/σ_b`; at inference the same
input becomes `(x − μ_m)/σ_m`, where `b` is the batch, `m` the moving average and
`σ = sqrt(max(variance, 0) + epsilon)`. The difference between the two,

    (x − μ_m)/σ_m − z  =  (μ_b − μ_m)/σ_m  +  (σ_b/σ_m − 1)·z,

is a shift plus a change of scale. As `z` has mean 0 and variance 1 (less than 1 where
`epsilon` is felt), its mean square is the sum of the two squares. `lag` is its root.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Statistics


def lag(batch: Statistics, moving: Statistics, epsilon: float) -> float:
    """RMS error that the moving statistics put on the layer's normalised output.

    `sqrt(mean_c[((μ_b − μ_m)/σ_m)² + (σ_b/σ_m − 1)²])`, in standard deviations of
    that output: 0 means that inference sees what training saw, 0.2 an error of a
    fifth of a standard deviation in every activation.

    Args:
        batch: Statistics of the batches, for instance those of a window.
        moving: Statistics that the layer uses at inference.
        epsilon: The layer's `epsilon`.

    Returns:
        The lag; 0 without channels, `inf` if any statistic is not finite.

    Examples:
        >>> batch = Statistics(np.array([3.0]), np.array([4.0]))
        >>> fresh = Statistics(np.array([0.0]), np.array([1.0]))
        >>> round(lag(batch, fresh, epsilon=0.0) ** 2, 6)  # 3² + (2 − 1)²
        10.0
    """
    return _lag(*_shift_and_ratio(batch, moving, epsilon))


def channel_lags(
    batch: Statistics, moving: Statistics, epsilon: float
) -> NDArray[np.float64]:
    """The lag of each channel, of which `lag` is the root of the mean square.

    `sqrt(((μ_b − μ_m)/σ_m)² + (σ_b/σ_m − 1)²)`. The same `lag` may come from a few
    channels that are far off, or from many that are a little off.

    Args:
        batch: Statistics of the batches.
        moving: Statistics that the layer uses at inference.
        epsilon: The layer's `epsilon`.

    Returns:
        An array of shape `(channels,)`, `inf` everywhere if any statistic is not
        finite.

    Example:
        >>> batch = Statistics(np.array([3.0, 0.0]), np.array([4.0, 1.0]))
        >>> fresh = Statistics(np.array([0.0, 0.0]), np.array([1.0, 1.0]))
        >>> channel_lags(batch, fresh, epsilon=0.0).round(2).tolist()
        [3.16, 0.0]
    """
    shift, ratio = _shift_and_ratio(batch, moving, epsilon)
    return np.hypot(shift, ratio - 1.0)


class Distance(NamedTuple):
    """How far moving statistics are from those of the batches.

    Attributes:
        lag: See `lag`.
        mean_shift: The part of it that the means cause,
            `sqrt(mean_c[((μ_b − μ_m)/σ_m)²])`, in standard deviations.
        scale_ratio: How much too wide the normalised output is at inference: the
            geometric mean over the channels of `σ_b/σ_m`, above 1 where the moving
            variance is too small for the batches, below 1 where it is too large.
    """

    lag: float
    mean_shift: float
    scale_ratio: float


def distance(batch: Statistics, moving: Statistics, epsilon: float) -> Distance:
    """The lag and what it is made of.

    Args:
        batch: Statistics of the batches.
        moving: Statistics that the layer uses at inference.
        epsilon: The layer's `epsilon`.

    Returns:
        The distance; 0, 0 and 1 without channels, `inf` if any statistic is not
        finite.

    Examples:
        >>> batch = Statistics(np.array([3.0]), np.array([4.0]))
        >>> fresh = Statistics(np.array([0.0]), np.array([1.0]))
        >>> found = distance(batch, fresh, epsilon=0.0)
        >>> found.mean_shift, round(found.scale_ratio, 6)
        (3.0, 2.0)
    """
    shift, ratio = _shift_and_ratio(batch, moving, epsilon)
    with np.errstate(over="ignore", divide="ignore"):
        return Distance(
            _lag(shift, ratio),
            mean_shift=math.sqrt(_mean(shift**2)),
            scale_ratio=float(np.exp(_mean(np.log(ratio)))),
        )


def _lag(shift: NDArray[np.float64], ratio: NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):
        return math.sqrt(_mean(shift**2 + (ratio - 1.0) ** 2))


def _shift_and_ratio(
    batch: Statistics, moving: Statistics, epsilon: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(μ_b − μ_m)/σ_m` and `σ_b/σ_m` of each channel; all `inf` if undefined."""
    sigma_b, sigma_m = (
        np.sqrt(np.maximum(variance, 0.0) + epsilon)
        for variance in (batch.variance, moving.variance)
    )
    finite = all(np.isfinite(part).all() for part in (*batch, *moving))
    # Asked of the input: an infinite σ_m would pass for a finite lag of 1.
    if not (finite and sigma_m.all()):
        infinite = np.full(sigma_m.shape, np.inf)
        return infinite, infinite
    with np.errstate(over="ignore"):
        return (batch.mean - moving.mean) / sigma_m, sigma_b / sigma_m


def _mean(channels: NDArray[np.float64]) -> float:
    """Mean over the channels, 0 without any."""
    return float(channels.sum()) / max(channels.size, 1)

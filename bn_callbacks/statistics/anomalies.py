"""Looks for what is unusual in stored statistics, without any data."""

from dataclasses import dataclass

import numpy as np

from bn_callbacks.statistics.causes import LOW_PRECISION, NON_FINITE
from bn_callbacks.statistics.moments import Statistics

NEVER_UPDATED = "never_updated"
NEGATIVE_VARIANCE = "negative_variance"
ZERO_VARIANCE = "zero_variance"
HUGE_VARIANCE = "huge_variance"
FROZEN = "frozen"

ZERO = 1e-3
"""Share of epsilon up to which a variance counts as none: the output is constant."""

HUGE = 1e6
"""A variance beyond inputs and activations of a usual scale: σ = 1,000."""


@dataclass(frozen=True)
class Anomaly:
    """Something unusual about a layer.

    Args:
        name: A word for it, the same in every report.
        text: What was found, and what to do about it.
    """

    name: str
    text: str


def find_anomalies(
    stored: Statistics,
    *,
    start: Statistics,
    epsilon: float,
    dtype: str = "float32",
    trainable: bool = True,
) -> tuple[Anomaly, ...]:
    """Looks for what is unusual in the statistics that a layer stores.

    Only values that are not finite and negative variances prove a fault. Dead channels
    rightly have no variance, and raw inputs a huge one; data decide.

    Args:
        stored: What the layer stores.
        start: What a new layer stores.
        epsilon: The number that the layer adds to a variance.
        dtype: The dtype of the statistics.
        trainable: Whether the layer is not frozen.

    Returns:
        The anomalies, the worst first.

    Example:
    >>> import numpy as np
    >>> new = Statistics(np.zeros(2), np.ones(2))
    >>> [found.name for found in find_anomalies(new, start=new, epsilon=1e-3)]
    ['never_updated']
    """
    mean, variance = stored
    is_finite = np.isfinite(mean) & np.isfinite(variance)
    checks = (
        (
            NON_FINITE,
            ~is_finite,
            "NaN or infinity in {count}. Find the batch that caused it; recalibrating "
            "repairs the layer.",
        ),
        (
            NEGATIVE_VARIANCE,
            is_finite & (variance < 0),
            "a negative variance in {count}, down to {low:.3g}. Training never writes "
            "one, so something else has written the file; recalibrate.",
        ),
        (
            ZERO_VARIANCE,
            is_finite & (variance >= 0) & (variance <= ZERO * epsilon),
            "no variance in {count}. Their inputs are constant, or the batches had one "
            "value a channel.",
        ),
        (
            HUGE_VARIANCE,
            is_finite & (variance > HUGE),
            "a variance of up to {high:.3g} in {count}. Look for outliers, for inputs "
            "that are not scaled, or for training that diverged.",
        ),
    )
    found = [
        Anomaly(
            name,
            text.format(
                count=f"{where.sum()} of {where.size} channels",
                low=variance[where].min(),
                high=variance[where].max(),
            ),
        )
        for name, where, text in checks
        if where.any()
    ]
    if all(map(np.array_equal, stored, start)):
        found.append(
            Anomaly(
                NEVER_UPDATED,
                "the values that a new layer starts with. It was never trained, or "
                "never in training mode.",
            )
        )
    if dtype in ("float16", "bfloat16"):
        found.append(
            Anomaly(
                LOW_PRECISION,
                f"stored in {dtype}, which rounds small updates away. Use float32 "
                f"variables (a policy such as 'mixed_{dtype}') and recalibrate.",
            )
        )
    if not trainable:
        found.append(
            Anomaly(FROZEN, "`trainable=False`: training leaves them as they are.")
        )
    return tuple(found)

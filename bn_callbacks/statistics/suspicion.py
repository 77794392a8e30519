"""What stored statistics give away on their own, before any data is seen."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.statistics.causes import LOW_PRECISION, NON_FINITE
from bn_callbacks.statistics.moments import Statistics

NEVER_UPDATED = "never_updated"
NEGATIVE_VARIANCE = "negative_variance"
ZERO_VARIANCE = "zero_variance"
HUGE_VARIANCE = "huge_variance"
FROZEN = "frozen"

ZERO = 1e-3
"""Share of epsilon up to which a variance is none: the output is constant."""

HUGE = 1e6
"""Variance that inputs and activations of a usual scale do not have: σ = 1,000."""


@dataclass(frozen=True)
class Suspicion:
    """Something about a layer that needs a second look.

    Args:
        name: One word for it, the same in every report.
        text: What was seen, and what to do about it.
    """

    name: str
    text: str


def suspect(
    stored: Statistics,
    *,
    start: Statistics,
    epsilon: float,
    dtype: str = "float32",
    trainable: bool = True,
) -> tuple[Suspicion, ...]:
    """Looks for what is suspicious in the statistics that a layer stores.

    None of it proves a fault, except what is not finite or negative: dead channels
    have no variance, and raw inputs may have a huge one. Data decide.

    Args:
        stored: What the layer stores.
        start: What a new layer stores.
        epsilon: What the layer adds to a variance.
        dtype: The dtype that stores them.
        trainable: Whether the layer is not frozen.

    Returns:
        What was found, the worst first.

    Example:
    >>> import numpy as np
    >>> new = Statistics(np.zeros(2), np.ones(2))
    >>> [found.name for found in suspect(new, start=new, epsilon=1e-3)]
    ['never_updated']
    """
    mean, variance = stored
    is_finite = np.isfinite(mean) & np.isfinite(variance)
    checks = (
        (
            NON_FINITE,
            ~is_finite,
            "NaN or infinity in {count}. Find the batch that did it; recalibrating "
            "heals the layer.",
        ),
        (
            NEGATIVE_VARIANCE,
            is_finite & (variance < 0),
            "a negative variance in {count}, down to {low:.3g}. The file was written "
            "by something else than training; recalibrate.",
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
        Suspicion(name, text.format(count=_count(where), **_ends(variance[where])))
        for name, where, text in checks
        if where.any()
    ]
    if all(map(np.array_equal, stored, start)):
        found.append(
            Suspicion(
                NEVER_UPDATED,
                "the values that a new layer starts with. It was never trained, or "
                "never in training mode.",
            )
        )
    if dtype in ("float16", "bfloat16"):
        found.append(
            Suspicion(
                LOW_PRECISION,
                f"stored in {dtype}, which rounds small updates away. Use float32 "
                f"variables (a policy such as 'mixed_{dtype}') and recalibrate.",
            )
        )
    if not trainable:
        found.append(
            Suspicion(FROZEN, "`trainable=False`: training leaves them as they are.")
        )
    return tuple(found)


def _count(where: NDArray[np.bool_]) -> str:
    return f"{where.sum()} of {where.size} channels"


def _ends(values: NDArray[np.float64]) -> dict[str, float]:
    return {"low": float(values.min()), "high": float(values.max())}

"""Passes that make statistics agree with what inference sees."""

import math
from collections.abc import Sequence
from typing import Literal

from bn_callbacks.layers import BatchNormLayer
from bn_callbacks.measuring.data import First
from bn_callbacks.measuring.population import Measurement, Population
from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.moments import Statistics, is_finite

RESIDUAL_LIMIT = 1e-3
"""Lag in inference mode at which the fixed point is taken to hold, for one layer."""

EXTRA_PASSES = 10
"""Refining passes beyond the number of layers, at most."""

FEW_BATCHES = 4
"""Batches that tell whether a long pass for refinement is worth it."""


def refine_statistics(
    population: Population,
    batches: First,
    first: Measurement,
    old: list[Statistics],
    refine: int | Literal["auto"],
    verbose: int,
) -> tuple[list[Statistics], list[float | None], int]:
    """Further passes.

    Returns:
        Statistics; the lag that is left of each layer, None where no pass has shown it;
        and the passes made.
    """
    layers = population.layers
    new = stored(layers, first, old)
    if refine == 0:
        return new, [None] * len(layers), 1
    length = first.batches

    def measure(statistics: list[Statistics]) -> Measurement:
        return population.measure(
            batches, statistics, target=batches.length, verbose=verbose
        )

    if refine != "auto":
        for _ in range(refine):
            new = stored(layers, measure(new), new)
        return new, lags(layers, measure(new), new), 2 + refine

    if length >= 8 * FEW_BATCHES:
        few = batches.first(FEW_BATCHES)
        by_batch = [moments.statistics for moments in population.measure(few).moments]
        left = lags(layers, population.measure(few, new), by_batch)
        if largest(left) <= RESIDUAL_LIMIT / 10:
            return new, left, 1

    # What is left in each layer adds up in those behind.
    limit = RESIDUAL_LIMIT / math.sqrt(len(layers))
    best, least, previous, passes = new, math.inf, new, 1
    best_left: list[float | None] = []
    # Layer k is exact after k passes, and one more pass shows it. A layer whose
    # input depends on its own statistics, as in a recurrent cell, takes a few more.
    while passes < len(layers) + EXTRA_PASSES:
        seen = measure(previous)
        passes += 1
        left = lags(layers, seen, previous)
        residual = largest(left)
        if residual < least:
            best, best_left, least = previous, left, residual
        # Where even an input that depends on no statistics changes, the data differ
        # from pass to pass, and so much is noise.
        entry = population.entry
        noise = 0.0
        if entry is not None:
            noise = lags(layers, seen, new)[layers.index(entry)] or 0.0
        if residual <= max(limit, 2 * noise):
            break
        previous = stored(layers, seen, previous)
    if math.isinf(least):
        worst = next(
            bn
            for bn, moments in zip(layers, seen.moments, strict=True)
            if not is_finite([moments.statistics])
        )
        raise ValueError(
            f"In inference mode the input of {worst.path} overflows, with any "
            f"statistics tried. Received: NaN or infinity in each of {passes - 1} "
            "passes. Look for huge weights in the layers before."
        )
    return best, best_left, passes


def lags(
    layers: Sequence[BatchNormLayer],
    measured: Measurement,
    stored: Sequence[Statistics],
) -> list[float | None]:
    """The lag of each layer; None for those that the data have not reached."""
    return [
        lag(moments.statistics, statistics, bn.epsilon) if moments.count > 0 else None
        for bn, moments, statistics in zip(
            layers, measured.moments, stored, strict=True
        )
    ]


def largest(lags: Sequence[float | None]) -> float:
    """The largest of those that are known, 0 without any."""
    return max((each for each in lags if each is not None), default=0.0)


def stored(
    layers: Sequence[BatchNormLayer],
    measured: Measurement,
    otherwise: Sequence[Statistics],
) -> list[Statistics]:
    """What each layer would store: what was measured, or else what it had.

    Nothing is measured of a layer that the data never reach, nor where statistics of
    the layers before, not yet right, have made the activations overflow.
    """
    return [
        bn.rounded(moments.statistics)
        if moments.count > 0 and is_finite([moments.statistics])
        else other
        for bn, moments, other in zip(layers, measured.moments, otherwise, strict=True)
    ]


def seen_by(
    layers: Sequence[BatchNormLayer],
    measured: Measurement,
    otherwise: Sequence[Statistics],
) -> dict[BatchNormLayer, Statistics]:
    """Measured statistics by layer, or others where nothing reached a layer."""
    return {
        bn: moments.statistics if moments.count > 0 else other
        for bn, moments, other in zip(layers, measured.moments, otherwise, strict=True)
    }

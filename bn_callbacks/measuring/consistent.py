"""The statistics that inference sees: start reading here.

What is wanted is a fixed point. If every layer normalises with its statistics `s`, a
pass over the data finds the moments `F(s)` of every layer's input, and `s` is right if
`F(s) = s`. Three ideas lead there:

1. *A sample solves itself.* A sample of the data is run as one batch, each layer
   normalising with the statistics of that whole sample. They are the fixed point of
   the sample, found in one forward pass.
2. *All data correct the sample.* A pass over the data with `s` given finds `F(s)`; of
   the sample alone it would be `C(s)`. The sample is run again, and each layer
   normalises with the sample's statistics and what they lack: `F(s) − C(s)` of the
   mean, `F(s)/C(s)` of the variance. This is a defect correction, as in multigrid
   methods; each shrinks the error, usually 10 to 50 times.
3. *Layer by layer*, where a sample is no model of the data or cannot be run as one
   batch: each layer takes what the last pass has found, but for those that are right.
   The first layer is right after one pass, the second after two, and so on.

The best statistics seen are returned, with the residual `lag(F(s), s)` that a pass has
measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from bn_callbacks.layers import BatchNormLayer
from bn_callbacks.measuring.data import Batch, Batches, First
from bn_callbacks.measuring.mix import Mix
from bn_callbacks.measuring.one_pass import Measurement, Population, Until
from bn_callbacks.measuring.progress import Progress
from bn_callbacks.measuring.sample import (
    JOINED,
    Joined,
    Sample,
    examples_in,
    sample_size,
)
from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.moments import Moments, Statistics, is_finite

RESIDUAL_LIMIT = 1e-3
"""Lag in inference mode at which the fixed point is taken to hold."""

OVERFLOW = float(np.finfo(np.float32).max)
"""From here on no float32 holds a value."""

MAX_FAILURES = 3
"""Corrections that may fail before the sample is given up."""

EXTRA_PASSES = 10
"""Passes beyond the number of layers, at most."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Statistics, and what a pass has shown of them.

    Args:
        statistics: Of each layer, as it can store them: `s`.
        measured: What inference has with them: `F(s)`.
        residuals: The distance of the two, for each layer; None where the data have
            not reached it.
    """

    statistics: list[Statistics]
    measured: Measurement
    residuals: list[float | None]

    @property
    def residual(self) -> float:
        """The largest distance of any layer."""
        return known(self.residuals) or 0.0


def consistent(
    population: Population,
    batches: Batches,
    old: Sequence[Statistics],
    *,
    limit: float = RESIDUAL_LIMIT,
    until: Callable[[], Until] | None = None,
    most: int | None = None,
    passes: int | None = None,
    progress: Progress,
) -> Solution:
    """Finds the statistics that inference sees.

    Args:
        population: The layers.
        batches: The data.
        old: What the layers store, for those that the data do not reach.
        limit: Residual that is small enough.
        until: Ends the first pass early; the others read as much.
        most: Examples in the sample at most, which is then the beginning of the data;
            None for as many as memory allows, from all data.
        passes: Passes at most, however far from the solution; by default some more
            than there are layers, which is enough.
        progress: Shows the passes.

    Returns:
        The best statistics seen.

    Raises:
        ValueError: Something in the data is not finite, whatever the statistics.
    """
    layers = population.layers
    with population.team.agreed():
        model = _Model(population, batches, old, most)
    source: Batches | First | Sample = model.sample
    given = model.solve()
    if given is None:
        progress.begin("measuring by batch")
        first = population.measure(batches, until=until, show=progress.show)
        source, until = batches.first(first.own_batches), None
        given = storable(layers, first.moments, old)
    best = origin = None
    is_corrected = False
    while progress.passes < (passes or len(layers) + EXTRA_PASSES):
        progress.begin("correcting" if best else "measuring")
        measured = _read(
            population,
            # Whether more is needed is asked batch by batch.
            Joined(source, 0 if until else model.joined),
            given,
            until,
            progress,
            batches,
        )
        source, until = batches.first(measured.own_batches), None
        last = Solution(given, measured, lags(layers, measured.moments, given))
        origin = origin or last
        is_better = best is None or last.residual < best.residual
        if is_better:
            best = last
        if last.residual <= max(limit, 2 * _change(population, origin, last)):
            if not population.becomes_exact(measured.moments):
                break
            best = None
        corrected = model.solve(last) if is_better else None
        if not is_better and is_corrected:
            # Back to where it was good, and layer by layer from there.
            last = best or last
            model.fail()
        is_corrected = corrected is not None
        given = corrected or _layer_by_layer(layers, last, limit)
    if math.isinf((best or last).residual):
        raise _overflow(layers, last, progress.passes)
    return best or last


class _Model:
    """A sample of the data, as a model of all of them.

    Attributes:
        sample: The sample.
        is_fair: Whether it is of use as a model.
    """

    def __init__(
        self,
        population: Population,
        batches: Batches,
        old: Sequence[Statistics],
        most: int | None,
    ) -> None:
        self.is_fair = population.takes_any_batch
        self._population = population
        self._old = old
        self._most = math.inf if most is None else most
        self._seen: list[Moments] = []
        self._seen_with: list[Statistics] | None = None
        self._failures = 0
        self._batches, self._examples = batches, 16 * JOINED
        self.sample = Sample(batches, self._size, from_all=most is None)
        self._batch = self.sample.batch()

    def _size(self, first: Batch) -> int:
        if not self.is_fair:
            return 0
        if self._batches.length is not None:
            self._examples = self._batches.length * examples_in(first)
        memory = self._population.bytes_of_example(first)
        return int(min(sample_size(memory, examples_in(first)), self._most))

    @property
    def joined(self) -> int:
        """Examples that may be run together where statistics are given."""
        # At least some 16 of them, to see how they differ.
        return min(self.sample.size, JOINED, self._examples // 16)

    def solve(self, last: Solution | None = None) -> list[Statistics] | None:
        """The statistics of the sample, and what they lacked in the last pass.

        Returns:
            Statistics of each layer; None where the sample is no model of the data.
        """
        if not self.is_fair:
            return None
        mix = Mix.of_batch(self._population.channels)
        if last is not None:
            if self.sample.has_changed():
                self._batch, self._seen_with = self.sample.batch(), None
            if self._seen_with is not last.statistics:
                self._run(Mix.given(last.statistics))
                if not self.is_fair:
                    return None
            wanted = filled(last.measured.moments, last.statistics)
            mix = Mix.corrected(wanted, filled(self._seen, last.statistics))
        self._run(mix)
        if self.is_fair and last is None and self._population.becomes_exact(self._seen):
            self._run(mix)
        if not self.is_fair:
            return None
        otherwise = self._old if last is None else last.statistics
        solved = mix.applied(filled(self._seen, otherwise))
        layers = self._population.layers
        self._seen_with = rounded(layers, fallback(solved, otherwise))
        return self._seen_with

    def fail(self) -> None:
        """Notes that a correction has brought no nearer to the solution."""
        self._failures += 1
        self.is_fair = self.is_fair and self._failures < MAX_FAILURES

    def _run(self, mix: Mix) -> None:
        if self.is_fair and self._batch is not None:
            try:
                self._seen = self._population.run(self._batch, mix)
            # A model need not take other batches than those of the data; what is
            # wrong with these the passes over them will tell.
            except (ValueError, tf.errors.OpError):
                self.is_fair = False
        self.is_fair = (
            self.is_fair
            and self._batch is not None
            and all(np.isfinite(one.m2).all() for one in self._seen)
        )


def _read(
    population: Population,
    joined: Joined,
    given: list[Statistics],
    until: Callable[[], Until] | None,
    progress: Progress,
    batches: Batches,
) -> Measurement:
    try:
        return population.read(joined, given, until=until, show=progress.show)
    except ValueError:
        # This time the error says which batch it is.
        population.read(batches, given, until=until)
        raise


def by_passes(
    population: Population,
    batches: Batches | First,
    old: Sequence[Statistics],
    refine: int,
    *,
    until: Callable[[], Until] | None = None,
    progress: Progress,
) -> Solution:
    """The usual Precise BN: one pass by batch, and `refine` passes with its results.

    Args:
        population: The layers.
        batches: The data.
        old: What the layers store, for those that the data do not reach.
        refine: Number of further passes; one more measures the residuals.
        until: Ends the first pass early; the others read as much.
        progress: Shows the passes.

    Returns:
        The statistics; without residuals where there are no further passes.
    """
    layers = population.layers
    progress.begin("measuring by batch")
    first = population.measure(batches, until=until, show=progress.show)
    new = storable(layers, first.moments, old)
    read = batches.first(first.own_batches)
    for _ in range(refine):
        progress.begin("refining")
        seen = population.measure(read, new, show=progress.show).moments
        new = storable(layers, seen, new)
    left: list[float | None] = [None] * len(layers)
    if refine:
        left = residuals(population, read, new, progress)
    return Solution(new, first, left)


def residuals(
    population: Population,
    batches: Batches | First,
    statistics: list[Statistics],
    progress: Progress,
) -> list[float | None]:
    """What inference has of each layer, held against what it stores, in one pass."""
    progress.begin("checking")
    seen = population.measure(batches, statistics, show=progress.show).moments
    return lags(population.layers, seen, statistics)


def _layer_by_layer(
    layers: Sequence[BatchNormLayer], last: Solution, limit: float
) -> list[Statistics]:
    """What the last pass has found, but for the layers that were right.

    Those stay as they are, since a change within rounding may grow from layer to layer.
    """
    # What is left in each layer adds up in those behind.
    enough = limit / math.sqrt(len(layers))
    new = storable(layers, last.measured.moments, last.statistics)
    return [
        old if residual is None or residual <= enough else found
        for old, found, residual in zip(
            last.statistics, new, last.residuals, strict=True
        )
    ]


def _change(population: Population, origin: Solution, last: Solution) -> float:
    """How much the data themselves change from pass to pass.

    Where even an input that depends on no statistics changes, the data differ.
    """
    entry = population.entry
    if entry is None:
        return 0.0
    index = population.layers.index(entry)
    before, now = (
        solution.measured.moments[index].statistics for solution in (origin, last)
    )
    return lag(now, before, entry.epsilon)


def _overflow(
    layers: Sequence[BatchNormLayer], last: Solution, passes: int
) -> ValueError:
    worst = next(
        bn
        for bn, moments in zip(layers, last.measured.moments, strict=True)
        if not is_finite([moments.statistics])
    )
    return ValueError(
        f"In inference mode the input of {worst.path} overflows, with any statistics "
        f"tried. Received: NaN or infinity in each of {passes} passes. Look for huge "
        "weights in the layers before."
    )


def filled(
    moments: Sequence[Moments], otherwise: Sequence[Statistics]
) -> list[Statistics]:
    """What was measured, or others where nothing was, channel by channel.

    Nothing is measured of what the data never reach, nor where statistics of the layers
    before, not yet right, have made the activations overflow.
    """
    return fallback([one.statistics for one in moments], otherwise)


def fallback(
    wanted: Sequence[Statistics], otherwise: Sequence[Statistics]
) -> list[Statistics]:
    """Statistics, or others where they are no numbers or overflow a float32."""
    result = []
    for (mean, variance), other in zip(wanted, otherwise, strict=True):
        known = (np.abs(mean) < OVERFLOW) & (variance < OVERFLOW)
        result.append(
            Statistics(
                np.where(known, mean, other.mean),
                np.where(known, variance, other.variance),
            )
        )
    return result


def storable(
    layers: Sequence[BatchNormLayer],
    moments: Sequence[Moments],
    otherwise: Sequence[Statistics],
) -> list[Statistics]:
    """What each layer would store: what was measured, or else what it had."""
    return rounded(layers, filled(moments, otherwise))


def rounded(
    layers: Sequence[BatchNormLayer], statistics: Sequence[Statistics]
) -> list[Statistics]:
    """Statistics as the layers store them."""
    return [bn.rounded(one) for bn, one in zip(layers, statistics, strict=True)]


def lags(
    layers: Sequence[BatchNormLayer],
    moments: Sequence[Moments],
    stored: Sequence[Statistics],
) -> list[float | None]:
    """The lag of each layer; None for those that the data have not reached."""
    return [
        None
        if one.is_empty
        else lag(_reached(bn, one, statistics), statistics, bn.epsilon)
        for bn, one, statistics in zip(layers, moments, stored, strict=True)
    ]


def _reached(bn: BatchNormLayer, moments: Moments, stored: Statistics) -> Statistics:
    mean, variance = moments.statistics
    if bn.has_floor:
        variance = np.maximum(variance, bn.floor(mean))
    reached = moments.count > 0
    return Statistics(
        np.where(reached, mean, stored.mean),
        np.where(reached, variance, stored.variance),
    )


def known(lags: Sequence[float | None]) -> float | None:
    """The largest of those that are known; None without any."""
    return max((each for each in lags if each is not None), default=None)

"""Finds the statistics that inference sees: start reading here.

They are a fixed point. If every layer normalises with its statistics `s`, a pass over
the data finds the moments `F(s)` of every layer's input, and `s` is right if
`F(s) = s`. Three ideas lead there:

1. *A sample solves itself.* Run a sample of the data as one batch, in which each layer
   normalises with the statistics of that whole sample. They are the fixed point of the
   sample, found in one forward pass.
2. *All data correct the sample.* A pass over the data with `s` given finds `F(s)`; a
   pass over the sample alone finds `C(s)`. Run the sample again, and let each layer
   add `F(s) − C(s)` to the sample's mean and multiply its variance by `F(s)/C(s)`.
   This is a defect correction, as in multigrid methods; each one makes the error
   smaller, usually 10 to 50 times.
3. *Layer by layer*, where the sample does not represent the data or cannot run as one
   batch: each layer takes what the last pass has found, unless it is right already.
   The first layer is right after one pass, the second after two, and so on.

The result is the best statistics seen, with the residual `lag(F(s), s)` that a pass
has measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from bn_callbacks.layers import BatchNormLayer
from bn_callbacks.measuring.data import Batch, Batches, FirstBatches, Source
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
"""Largest lag in inference mode of statistics that count as the fixed point."""

OVERFLOW = float(np.finfo(np.float32).max)
"""The largest float32."""

MAX_FAILURES = 3
"""Failed corrections after which the sample is no longer used."""

EXTRA_PASSES = 10
"""Largest number of passes beyond the number of layers."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Statistics, and what a pass has measured with them.

    Args:
        statistics: `s`, of each layer, as it can store them.
        measured: `F(s)`, measured in inference mode with these statistics.
        residuals: The lag between the two, for each layer; None where the data have
            not reached the layer.
    """

    statistics: list[Statistics]
    measured: Measurement
    residuals: list[float | None]

    @property
    def residual(self) -> float:
        """The largest residual of any layer."""
        return known(self.residuals) or 0.0


def consistent(
    population: Population,
    batches: Batches,
    old: Sequence[Statistics],
    *,
    limit: float = RESIDUAL_LIMIT,
    until: Callable[[], Until] | None = None,
    grain: int = 0,
    most: int | None = None,
    passes: int | None = None,
    progress: Progress,
) -> Solution:
    """Finds the statistics that inference sees.

    Args:
        population: The layers.
        batches: The data.
        old: What the layers store. Layers that the data do not reach keep it.
        limit: Residual that is small enough.
        until: Ends the first pass early; further passes read the same batches.
        grain: Examples that `until` may see together; each batch by itself by default.
        most: Largest number of examples in the sample, which then comes from the
            beginning of the data; None for as many as memory allows, from all data.
        passes: Largest number of passes, even if the result is not precise; by default
            some more than there are layers, which is enough.
        progress: Shows the passes.

    Returns:
        The best statistics seen.

    Raises:
        ValueError: Something in the data is not finite, whatever the statistics.
    """
    layers = population.layers
    with population.team.agreed():
        model = _Model(population, batches, old, most)
    source: Source = model.sample
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
            Joined(source, min(grain, model.joined) if until else model.joined),
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
            # Returns to the best statistics, and goes on layer by layer from there.
            last = best or last
            model.fail()
        is_corrected = corrected is not None
        given = corrected or _layer_by_layer(layers, last, limit)
    if math.isinf((best or last).residual):
        raise _overflow(layers, last, progress.passes)
    return best or last


class _Model:
    """A sample that stands for all data.

    Attributes:
        sample: The sample.
        is_fair: Whether it can still stand for them.
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
        # Joins the data into at least some 16 batches, to see how these differ.
        return min(self.sample.size, JOINED, self._examples // 16)

    def solve(self, last: Solution | None = None) -> list[Statistics] | None:
        """Solves the sample, corrected by what the last pass over all data has found.

        Returns:
            Statistics of each layer; None if the sample cannot stand for the data.
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
        """Notes that a correction did not reduce the residual."""
        self._failures += 1
        self.is_fair = self.is_fair and self._failures < MAX_FAILURES

    def _run(self, mix: Mix) -> None:
        if self.is_fair and self._batch is not None:
            try:
                self._seen = self._population.run(self._batch, mix)
            # A model may refuse batches of another size. If the data themselves are
            # wrong, the passes over them raise.
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
        # Reads the batches one by one, so that the error names the right one.
        population.read(batches, given, until=until)
        raise


def by_passes(
    population: Population,
    batches: Batches | FirstBatches,
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
        old: What the layers store. Layers that the data do not reach keep it.
        refine: Number of further passes; one more measures the residuals.
        until: Ends the first pass early; further passes read the same batches.
        progress: Shows the passes.

    Returns:
        The statistics; without residuals if there are no further passes.
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
    batches: Batches | FirstBatches,
    statistics: list[Statistics],
    progress: Progress,
) -> list[float | None]:
    """Measures the lag between each layer's input in inference and `statistics`."""
    progress.begin("checking")
    seen = population.measure(batches, statistics, show=progress.show).moments
    return lags(population.layers, seen, statistics)


def _layer_by_layer(
    layers: Sequence[BatchNormLayer], last: Solution, limit: float
) -> list[Statistics]:
    """What the last pass has found, except for the layers that were right already.

    These keep their statistics, since rounding may grow from layer to layer.
    """
    # Errors of layers add up in the layers behind.
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

    If an input changes that depends on no statistics, the data differ.
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
    """The measured statistics, or `otherwise` where there are none, by channel.

    There are none where the data never reach a channel, nor where wrong statistics of
    the layers before made the activations overflow.
    """
    return fallback([one.statistics for one in moments], otherwise)


def fallback(
    wanted: Sequence[Statistics], otherwise: Sequence[Statistics]
) -> list[Statistics]:
    """Statistics, or `otherwise` where they are NaN or too large for a float32."""
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
    """What each layer would store: measured statistics, or else `otherwise`."""
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
    """The largest known lag; None if all are unknown."""
    return max((each for each in lags if each is not None), default=None)

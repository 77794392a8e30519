"""Proves that data are those of training, scaled and shifted, by mapping them back."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from bn_callbacks.layers import BatchNormLayer, calls_of, steps_made
from bn_callbacks.measuring.consistent import known, lags
from bn_callbacks.measuring.data import Batch, Batches, Source
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.measuring.sample import examples_in
from bn_callbacks.statistics.affine import (
    ALIKE,
    InputMap,
    is_felt,
    is_large,
    is_proportional,
    ratio_of,
    shift_between,
    start_lag,
)
from bn_callbacks.statistics.lag import lag
from bn_callbacks.statistics.moments import Moments, Statistics, is_finite

EXAMPLES = 1024
"""Examples that tell whether data mapped back are those of training."""

ROUNDS = 8
"""Largest number of corrections of factor and shift. Most maps take one or two; data
scaled twice, whose padded edges hide the rest, take 6."""

SETTLED = 0.01
"""Relative change below which the factor counts as found."""

HEALED = 0.2
"""Lag, in standard deviations, up to which a layer fits data mapped back: that of
healthy layers."""


class Mapped(Source):
    """Data mapped back: `x/factor + shift`.

    Args:
        batches: The data.
        count: The first so many batches are read.
        factor: What the data have been multiplied by.
        shift: What to add after dividing.
    """

    def __init__(
        self, batches: Batches, count: int, factor: float, shift: float
    ) -> None:
        self._batches = batches
        self._count = count
        self._factor = factor
        self._shift = shift

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.islice(self._batches, self._count):
            yield tf.nest.map_structure(self._back, batch[0]), *batch[1:]

    def _back(self, x: Any) -> Any:
        x = tf.cast(x, tf.float64) / self._factor + self._shift
        return tf.cast(x, tf.float32)

    def number(self, index: int) -> int:
        """The place in the data of the `index`-th batch that is read."""
        return self._batches.number(index)


def input_map(
    model: keras.Model,
    population: Population,
    batches: Batches,
    stored: Sequence[Statistics],
    given: dict[BatchNormLayer, Statistics],
    *,
    is_thorough: bool = False,
) -> InputMap | None:
    """Finds the map that has been applied to the data, if it can be proven.

    It is looked for if all channels of the first layer have one factor; if
    `is_thorough`, also if this layer is just far off, since zeros that pad shifted
    pictures add edges. Some of the data are mapped back, and shifted so that this layer
    has the means that it stores. If inference then brings *each* layer what it stores,
    the statistics are right and the data are not: stale statistics would still not fit
    behind the first layer. If there is no layer behind it, its means must have the same
    factor.

    Args:
        model: The model.
        population: Measures its layers.
        batches: The data.
        stored: What the layers store.
        given: The statistics of these data at the layers, in batch mode.
        is_thorough: Whether to look for a map even if no common factor shows.

    Returns:
        The map; None if there is none, or no proof.
    """
    entry, is_candidate = population.entry, False
    if entry in given and _is_array(batches.peek()) and is_finite(stored):
        index = population.layers.index(entry)
        moving, epsilon = stored[index], entry.epsilon
        ratio = ratio_of(given[entry], moving, epsilon)
        is_off = lag(given[entry], moving, epsilon) > HEALED
        is_candidate = ratio.is_factor or (is_thorough and is_off)
        if len(given) == 1:
            is_one = is_proportional(given[entry], moving, ratio.median)
            is_candidate = ratio.is_factor and is_one
        if is_candidate and not _is_start_known(model, entry):
            # In channels that are alike, a start that is not forgotten looks the same.
            is_candidate = (
                start_lag(given[entry], moving, entry.initial, epsilon) > HEALED
            )
    # Replicas of other workers may store something else.
    if not population.team.everywhere(is_candidate):
        return None
    count = math.ceil(EXAMPLES / max(1, examples_in(batches.peek())))

    def back(factor: float, shift: float) -> list[Moments]:
        """The layers' inputs in inference if the data are mapped back."""
        data = Mapped(batches, count, factor, shift)
        return population.measure(data, stored).moments

    factor, shift = ratio.median, 0.0
    for _ in range(ROUNDS):
        try:
            here, beside = (
                back(factor, shift + by)[index].statistics for by in (0.0, 1.0)
            )
            shift += shift_between(here, beside, moving)
            mapped = back(factor, shift)
        except ValueError:
            # The model does not take data that are mapped back.
            return None
        rest = ratio_of(mapped[index].statistics, moving, epsilon)
        if abs(math.log(rest.median)) < SETTLED:
            break
        # If zeros pad a picture, a shift makes edges, which add variance.
        factor *= rest.median
    left = known(lags(population.layers, mapped, stored))
    is_right = left is not None and left <= HEALED and rest.spread < ALIKE
    if not (is_right and is_large(factor)):
        return None
    has_shift = is_felt(shift, here, beside, moving)
    return InputMap(factor, -factor * shift if has_shift else 0.0)


def _is_start_known(model: keras.Model, bn: BatchNormLayer) -> bool:
    """Whether the weight that a layer's start values still have is known."""
    (calls,) = calls_of(model, [bn])
    return bool(steps_made(model) and calls.updates and bn.trainable)


def _is_array(batch: Batch) -> bool:
    """Whether a batch has one input, of numbers."""
    leaves = tf.nest.flatten(batch[0])
    return len(leaves) == 1 and tf.is_tensor(leaves[0]) and leaves[0].dtype.is_numeric

"""Whether data are those of training, scaled and shifted: they are mapped back."""

import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from bn_callbacks.layers import BatchNormLayer, calls_of, steps_made
from bn_callbacks.measuring.consistent import known, lags
from bn_callbacks.measuring.data import Batch, Batches
from bn_callbacks.measuring.mapped import Mapped
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
"""Times that factor and shift are corrected, one after the other, at most: data scaled
twice, whose padded edges hide the rest, take 6, most maps one or two."""

SETTLED = 0.01
"""Relative change of the factor from which on it is found."""

HEALED = 0.2
"""Lag, in standard deviations, up to which every layer is right for data mapped
back: what is called healthy elsewhere."""


def input_map(
    model: keras.Model,
    population: Population,
    batches: Batches,
    stored: Sequence[Statistics],
    given: dict[BatchNormLayer, Statistics],
    *,
    is_thorough: bool = False,
) -> InputMap | None:
    """What has been done to the data, if that can be proven.

    Where all channels of the first layer have one factor, or at least another spread or
    mean (shifted pictures that zeros pad have edges, too), some of the data are mapped
    back, and shifted so that this layer has the means that it stores. If inference then
    brings *each* layer what it stores, the statistics are right, and the data are not:
    stale statistics stay stale behind the first layer. Where there is no layer behind
    it, its means have to be scaled by the same factor.

    Args:
        model: The model.
        population: Measures its layers.
        batches: The data.
        stored: What the layers store.
        given: What batches of these data bring the layers.
        is_thorough: Whether to look further also where no factor is seen at once.

    Returns:
        The map; None where there is none, or no proof of it.
    """
    entry, is_candidate = population.entry, False
    if entry in given and is_array(batches.peek()) and is_finite(stored):
        index = population.layers.index(entry)
        moving, epsilon = stored[index], entry.epsilon
        ratio = ratio_of(given[entry], moving, epsilon)
        is_off = lag(given[entry], moving, epsilon) > HEALED
        is_candidate = ratio.is_factor or (is_thorough and is_off)
        if len(given) == 1:
            is_one = is_proportional(given[entry], moving, ratio.median)
            is_candidate = ratio.is_factor and is_one
        if is_candidate and not _is_start_known(model, entry):
            # In channels much alike, a start that is not forgotten looks the same.
            is_candidate = (
                start_lag(given[entry], moving, entry.initial, epsilon) > HEALED
            )
    # Replicas of other workers may store something else.
    if not population.team.everywhere(is_candidate):
        return None
    count = math.ceil(EXAMPLES / max(1, examples_in(batches.peek())))

    def back(factor: float, shift: float) -> list[Moments]:
        """What inference brings the layers if the data are mapped back."""
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
            # What is mapped back is nothing that the model takes.
            return None
        rest = ratio_of(mapped[index].statistics, moving, epsilon)
        if abs(math.log(rest.median)) < SETTLED:
            break
        # Where zeros pad a picture, a shift makes edges, which vary as well.
        factor *= rest.median
    left = known(lags(population.layers, mapped, stored))
    is_right = left is not None and left <= HEALED and rest.spread < ALIKE
    if not (is_right and is_large(factor)):
        return None
    has_shift = is_felt(shift, here, beside, moving)
    return InputMap(factor, -factor * shift if has_shift else 0.0)


def _is_start_known(model: keras.Model, bn: BatchNormLayer) -> bool:
    """Whether it is known how much of a layer's start values is left."""
    (calls,) = calls_of(model, [bn])
    return bool(steps_made(model) and calls.updates and bn.trainable)


def is_array(batch: Batch) -> bool:
    """Whether a model has one input, of numbers."""
    leaves = tf.nest.flatten(batch[0])
    return len(leaves) == 1 and tf.is_tensor(leaves[0]) and leaves[0].dtype.is_numeric

"""Whether data are those of training, scaled and shifted: they are mapped back."""

import math
from collections.abc import Sequence

import tensorflow as tf

from bn_callbacks.layers import BatchNormLayer
from bn_callbacks.measuring.consistent import known, lags
from bn_callbacks.measuring.data import Batch, Batches
from bn_callbacks.measuring.mapped import Mapped
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.measuring.sample import examples_in
from bn_callbacks.statistics.affine import (
    InputMap,
    common_factor,
    is_proportional,
    shift_between,
)
from bn_callbacks.statistics.moments import Moments, Statistics, is_finite

EXAMPLES = 1024
"""Examples that tell whether data mapped back are those of training."""

HEALED = 0.2
"""Lag, in standard deviations, up to which every layer is right for data mapped
back: what is called healthy elsewhere."""


def input_map(
    population: Population,
    batches: Batches,
    stored: Sequence[Statistics],
    given: dict[BatchNormLayer, Statistics],
) -> InputMap | None:
    """What has been done to the data, if that can be proven.

    Where all channels of the first layer have one factor, some of the data are mapped
    back, and shifted so that this layer has the means that it stores. If inference then
    brings *each* layer what it stores, the statistics are right, and the data are not:
    stale statistics stay stale behind the first layer. Where there is no layer behind
    it, its means have to be scaled by the same factor.

    Args:
        population: Measures the layers.
        batches: The data.
        stored: What the layers store.
        given: What batches of these data bring the layers.

    Returns:
        The map; None where there is none, or no proof of it.
    """
    entry, factor = population.entry, None
    if entry in given and is_array(batches.peek()) and is_finite(stored):
        index = population.layers.index(entry)
        moving = stored[index]
        factor = common_factor(given[entry], moving, entry.epsilon)
    # Replicas of other workers may store something else.
    if not population.team.everywhere(factor is not None):
        return None
    assert entry is not None
    assert factor is not None
    if len(given) == 1 and not is_proportional(given[entry], moving, factor):
        return None
    count = math.ceil(EXAMPLES / max(1, examples_in(batches.peek())))

    def back(shift: float) -> list[Moments]:
        """What inference brings the layers if the data are mapped back."""
        data = Mapped(batches, count, factor, shift)
        return population.measure(data, stored).moments

    try:
        unshifted, shifted = (back(shift)[index].statistics for shift in (0.0, 1.0))
        shift = shift_between(unshifted, shifted, moving)
        left = known(lags(population.layers, back(shift), stored))
    except ValueError:
        # What is mapped back is nothing that the model takes.
        return None
    is_right = left is not None and left <= HEALED
    return InputMap(factor, -factor * shift) if is_right else None


def is_array(batch: Batch) -> bool:
    """Whether a model has one input, of numbers."""
    leaves = tf.nest.flatten(batch[0])
    return len(leaves) == 1 and tf.is_tensor(leaves[0]) and leaves[0].dtype.is_numeric

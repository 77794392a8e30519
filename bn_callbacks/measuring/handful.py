"""Corrects stored statistics by a handful of examples, layer after layer.

The input of a layer depends on the statistics of the layers before. So the layers come
in the order of their calls: a pass with the statistics decided so far measures the
input of the next layer, example by example, and `statistics.shrinkage` decides how much
of that to believe. If a layer keeps its statistics, the next one needs no new pass.
"""

import math
from collections.abc import Iterator, Sequence

import tensorflow as tf

from bn_callbacks.measuring.consistent import Solution, fallback, lags, rounded
from bn_callbacks.measuring.data import Batch, Batches
from bn_callbacks.measuring.one_pass import Measurement, Population
from bn_callbacks.measuring.probe import EachBatch
from bn_callbacks.measuring.progress import Progress
from bn_callbacks.measuring.sample import Joined, KeptBatches, examples_in, row_specs
from bn_callbacks.statistics.moments import Statistics
from bn_callbacks.statistics.shrinkage import CAUTION, MIN_EXAMPLES, Shrunk, shrunk

MANY = 1024
"""With more examples than this, stored statistics add nothing: those of the examples
are precise to 0.04 standard deviations, and are used as they are."""

GROUPS = 32
"""Number of groups of examples; their differences show how precise the whole is."""

MOVED = 0.25
"""A layer with a larger share shows that stored statistics are wrong: healthy layers
had up to 0.1 with 8 examples, as a rule."""


def handful(batches: Batches, is_divisible: bool) -> KeptBatches | None:
    """Divides the data into examples, if they are few.

    Args:
        batches: The data.
        is_divisible: Whether the model takes single examples. If not, or if examples
            cannot be told apart, a batch counts as one example.

    Returns:
        The examples, or None where there are more than 1,024.

    Raises:
        ValueError: There are fewer than 3.
    """
    rows: list[Batch] = []
    numbers: list[int] = []
    count = 0
    for index, batch in enumerate(batches):
        size = examples_in(batch)
        count += size
        if count > MANY:
            return None
        is_cut = is_divisible and row_specs(batch) is not None
        rows += _rows(batch, size) if is_cut else [batch]
        numbers += [batches.number(index)] * (len(rows) - len(numbers))
    if len(rows) < MIN_EXAMPLES:
        what = "examples" if is_divisible else "batches of a model that divides none"
        raise ValueError(
            f"There are too few examples to see how they differ. Received: {what}: "
            f"{len(rows)}. Pass at least {MIN_EXAMPLES}, better 8, or leave the model "
            "as it is."
        )
    return KeptBatches(rows, numbers)


def _rows(batch: Batch, size: int) -> Iterator[Batch]:
    for row in range(size):
        part = slice(row, row + 1)
        inputs = tf.nest.map_structure(
            lambda leaf, part=part: None if leaf is None else leaf[part], batch[0]
        )
        yield inputs, None, None


def corrected(
    population: Population,
    examples: KeptBatches,
    old: Sequence[Statistics],
    progress: Progress,
) -> tuple[Solution, list[Shrunk | None]]:
    """Corrects what layers store by a few examples.

    Args:
        population: The layers.
        examples: The examples.
        old: What the layers store.
        progress: Shows the passes.

    Returns:
        The statistics, and how each layer's were corrected; None for layers that fewer
        than 3 examples reach.

    Raises:
        ValueError: An input is not finite.
    """
    layers = population.layers
    groups = Joined(examples, math.ceil(len(examples) / GROUPS))
    given = rounded(layers, fallback(old, [bn.initial for bn in layers]))
    found: list[Shrunk | None] = [None] * len(layers)
    caution = CAUTION
    each = EachBatch(layers)

    def look() -> Measurement:
        progress.begin("looking at each example")
        return population.measure(groups, given, until=each.until, show=progress.show)

    measured = look()
    for index in population.order:
        parts = each.of(index)
        if len(parts) < MIN_EXAMPLES:
            continue
        bn = layers[index]
        one = shrunk(parts, old[index], bn.initial, bn.epsilon, caution)
        found[index] = one
        if one.share > MOVED:
            # Caution protects healthy models, and this one is wrong.
            caution = 0.0
        new = rounded([bn], [one.statistics])[0]
        if any((a != b).any() for a, b in zip(new, given[index], strict=True)):
            given = [*given[:index], new, *given[index + 1 :]]
            measured = look()
    return Solution(given, measured, lags(layers, measured.moments, given)), found

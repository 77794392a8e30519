"""Data on their way back from what has been done to them."""

import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from bn_callbacks.measuring.data import Batch, Batches, Source


class Mapped(Source):
    """Data mapped back: `x/factor + shift`.

    Args:
        batches: The data.
        count: How many batches of them, the first.
        factor: What they have been multiplied by.
        shift: What to add then.
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

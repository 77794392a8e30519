"""Data on their way back from what has been done to them."""

import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from bn_callbacks.measuring.data import Batch, Batches


class Mapped:
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
        """The number in the data of the `index`-th batch."""
        return self._batches.number(index)

    def read(self, count: int) -> int:
        """How many batches of the data `count` of these are."""
        return self._batches.read(count)

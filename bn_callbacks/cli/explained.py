"""Data that tell which part of them is damaged."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


class Explained:
    """Batches of a dataset, whose errors name the file that they come from.

    TensorFlow reads ahead in many threads, and its errors say what is wrong, but not
    where. So after an error all is looked through for the first damaged part.

    Args:
        dataset: The dataset.
        find: Looks for damage. Returns what and where, without a full stop; None if
            nothing is found.
    """

    def __init__(
        self, dataset: tf.data.Dataset, find: Callable[[], str | None]
    ) -> None:
        self._dataset = dataset.prefetch(tf.data.AUTOTUNE)
        self._find = find

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._dataset
        except tf.errors.OpError as error:
            found = self._find()
            if found is None:
                raise
            # Of the same kind, which decides what the user is told to do.
            raise type(error)(None, None, found) from error

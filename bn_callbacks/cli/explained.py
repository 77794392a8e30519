"""Makes errors of a dataset name the damaged file."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


class Explained:
    """Batches of a dataset, whose errors name the file that they come from.

    TensorFlow reads ahead in many threads; its errors say what is wrong, but not where.
    So after an error, `find` searches all files for the first damaged part.

    Args:
        dataset: The dataset.
        find: Searches for damage, and returns what is wrong and where, without a full
            stop; None if it finds nothing.
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
            # The kind of error decides which advice the user gets.
            raise type(error)(None, None, found) from error

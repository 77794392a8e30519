"""How many examples a training batch has, found out without asking."""

import keras

from bn_callbacks.layers import examples_seen


class ExampleCounter:
    """Finds the batch size from the number of examples that Keras' metrics count.

    Args:
        model: The model in training.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.batch_size: float | None = None
        self.last_batch_size: float | None = None

    def observe(self, steps: int) -> None:
        """Looks after `steps` steps of an epoch, all with full batches."""
        seen = examples_seen(self._model)
        if seen is not None and steps:
            self.batch_size = seen / steps

    def finish(self, steps: int | None) -> None:
        """Looks after all steps of an epoch, the last of which may be a smaller one."""
        seen = examples_seen(self._model)
        if seen is None or not steps:
            return
        if self.batch_size is None or steps == 1:
            self.batch_size = seen / steps
            return
        last = seen - self.batch_size * (steps - 1)
        self.last_batch_size = last if 0.5 < last < self.batch_size else None

"""How many examples a training batch has, found out without asking."""

import keras

from bn_callbacks.layers import BatchNormLayer, LossMetric, replicas


class ExampleCounter:
    """Finds the batch size from the number of examples that Keras' metrics count.

    Of several replicas, the batch size of each.

    Args:
        model: The model in training.
    """

    def __init__(self, model: keras.Model) -> None:
        self._loss = LossMetric(model)
        self._replicas = replicas(model)
        self.batch_size: float | None = None
        self.last_batch_size: float | None = None

    def batch_size_of(self, bn: BatchNormLayer) -> float | None:
        """Examples in the batches whose statistics a layer uses."""
        if self.batch_size is None or not bn.synchronized:
            return self.batch_size
        return self.batch_size * self._replicas

    def observe(self, steps: int) -> None:
        """Looks after `steps` steps of an epoch, all with full batches."""
        seen = self._seen()
        if seen is not None and steps:
            self.batch_size = seen / steps

    def finish(self, steps: int | None) -> None:
        """Looks after all steps of an epoch, the last of which may be a smaller one."""
        seen = self._seen()
        if seen is None or not steps:
            return
        if self.batch_size is None or steps == 1:
            self.batch_size = seen / steps
            return
        last = seen - self.batch_size * (steps - 1)
        self.last_batch_size = last if 0.5 < last < self.batch_size else None

    def _seen(self) -> float | None:
        seen = self._loss.examples()
        return None if seen is None else seen / self._replicas

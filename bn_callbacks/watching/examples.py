"""How many examples a training batch has, found out without asking."""

import keras

from bn_callbacks.layers import BatchNormLayer, LossMetric, replicas


class ExampleCounter:
    """Finds the batch size from the number of examples that Keras' metrics count.

    It is known or it is not: a count that falls (an `evaluate` in a hook, which sets
    metrics back), or that is no multiple of the steps, leaves it unknown. Of several
    replicas, the batch size of each.

    Args:
        model: The model in training.
    """

    def __init__(self, model: keras.Model) -> None:
        self._loss = LossMetric(model)
        self._replicas = replicas(model)
        self._begin: float | None = None
        self._last = 0.0
        self._steps = 0
        self._is_sure = False
        self.batch_size: float | None = None
        self.last_batch_size: float | None = None

    def batch_size_of(self, bn: BatchNormLayer) -> float | None:
        """Examples in the batches whose statistics a layer uses."""
        if self.batch_size is None or not bn.synchronized:
            return self.batch_size
        return self.batch_size * self._replicas

    def begin(self) -> None:
        """Looks before the first step of an epoch."""
        self._begin = self._last = self._loss.examples() or 0.0
        self._steps, self._is_sure = 0, False

    def observe(self, steps: int) -> None:
        """Looks after `steps` steps of an epoch, all with full batches.

        Only now and then, for each look waits for the step before.
        """
        if steps == 0 or (self._is_sure and steps < 2 * self._steps):
            return
        size = self._each(steps)
        if size is None or (self._is_sure and size != self.batch_size):
            self._forget()
            return
        self.batch_size, self._is_sure, self._steps = size, True, steps

    def finish(self, steps: int | None) -> None:
        """Looks after all steps of an epoch, the last of which may be a smaller one."""
        self.last_batch_size = None
        seen = self._seen()
        if not steps or seen is None:
            self._forget()
        elif not self._is_sure:
            # An epoch of a single look: its batches may be of any size.
            self.batch_size = self._whole(seen / steps) if steps == 1 else None
        elif self.batch_size is not None:
            last = seen - self.batch_size * (steps - 1)
            if not 0.5 < last <= self.batch_size:
                self._forget()
            elif last < self.batch_size:
                self.last_batch_size = last

    def _forget(self) -> None:
        self.batch_size = self.last_batch_size = self._begin = None

    def _each(self, steps: int) -> float | None:
        seen = self._seen()
        return None if seen is None else self._whole(seen / steps)

    def _whole(self, size: float) -> float | None:
        return round(size) if size >= 1 and abs(size - round(size)) < 1e-3 else None

    def _seen(self) -> float | None:
        """Examples of a replica since the epoch began; None if they are not counted."""
        count = self._loss.examples()
        if count is None or self._begin is None or count < self._last:
            self._begin = None
            return None
        self._last = count
        return (count - self._begin) / self._replicas

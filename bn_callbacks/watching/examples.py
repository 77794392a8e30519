"""How many examples a training batch has, found out without asking."""

import keras

from bn_callbacks.layers import BatchNormLayer, LossMetric, replicas

STEADY = 0.3
"""How far the mean sizes of a part and of the whole of an epoch may differ."""


class ExampleCounter:
    """Finds the batch size from the number of examples that Keras' metrics count.

    It is known or it is not: a count that falls (an `evaluate` in a hook, which sets
    metrics back) leaves it unknown. So does one that is no multiple of the steps,
    unless several looks find about the same number of examples a step: then batches
    differ in size, as where each is an utterance, and it is their mean. Of several
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
        self._means: list[tuple[int, float]] = []
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
        self._steps, self._is_sure, self._means = 0, False, []

    def observe(self, steps: int) -> None:
        """Looks after `steps` steps of an epoch, all with full batches.

        Only now and then, for each look waits for the step before.
        """
        if steps == 0 or (self._is_sure and steps < 2 * self._steps):
            return
        seen = self._seen()
        if seen is None:
            self._forget()
            return
        self._means.append((steps, seen / steps))
        size = self._whole(seen / steps)
        is_other = bool(self._steps) and size != self.batch_size
        self._is_sure = size is not None and not is_other
        self.batch_size, self._steps = size if self._is_sure else None, steps

    def finish(self, steps: int | None) -> None:
        """Looks after all steps of an epoch, the last of which may be a smaller one."""
        self.last_batch_size = None
        seen = self._seen()
        if not steps or seen is None:
            self._forget()
        elif not self._is_sure and steps == 1:
            self.batch_size = self._whole(seen)
        elif not self._is_sure:
            self.batch_size = self._mean(steps, seen / steps)
        elif self.batch_size is not None:
            last = seen - self.batch_size * (steps - 1)
            if not 0.5 < last <= self.batch_size:
                self._forget()
            elif last < self.batch_size:
                self.last_batch_size = last

    def _forget(self) -> None:
        self.batch_size = self.last_batch_size = self._begin = None

    def _mean(self, steps: int, size: float) -> float | None:
        """The mean size of batches that differ; None where looks do not agree on it."""
        if size < 2:
            return None
        # Those of few steps say little yet.
        means = [mean for count, mean in self._means if count >= steps / 4]
        is_steady = all(abs(mean / size - 1) < STEADY for mean in means)
        return size if len(means) >= 2 and is_steady else None

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

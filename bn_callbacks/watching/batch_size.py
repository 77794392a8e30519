"""Infers the batch size of a training from Keras' loss metric."""

import keras

from bn_callbacks.layers import BatchNormLayer, LossMetric, team_of

STEADY = 0.3
"""Relative difference allowed between mean batch sizes in a part and in all of an
epoch."""


class BatchSizeObserver:
    """Infers the batch size from the number of examples that Keras' loss has counted.

    A count that falls leaves the size unknown: an `evaluate` in a hook has reset the
    metrics. So does a count that is no multiple of the steps, unless several
    observations agree on the mean: then batches differ in size, as utterances do.

    Args:
        model: The model in training.

    Attributes:
        batch_size: Examples per batch, on each replica; None if unknown.
        last_batch_size: Examples in an epoch's last batch, if it was smaller.
    """

    def __init__(self, model: keras.Model) -> None:
        self._loss = LossMetric(model)
        self._replicas = team_of(model).size
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
        """Reads the count before the first step of an epoch."""
        self._begin = self._last = self._loss.examples() or 0.0
        self._steps, self._is_sure, self._means = 0, False, []

    def observe(self, steps: int) -> None:
        """Reads the count after `steps` steps of an epoch, all with full batches.

        Seldom, since each reading waits for the step before.
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
        """Reads the count after an epoch; its last batch may be smaller."""
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
        """The mean size of batches that differ; None if observations disagree."""
        if size < 2:
            return None
        # Means over few steps are too rough.
        means = [mean for count, mean in self._means if count >= steps / 4]
        is_steady = all(abs(mean / size - 1) < STEADY for mean in means)
        return size if len(means) >= 2 and is_steady else None

    def _whole(self, size: float) -> float | None:
        return round(size) if size >= 1 and abs(size - round(size)) < 1e-3 else None

    def _seen(self) -> float | None:
        """Examples per replica since the epoch began; None if nothing counts them."""
        count = self._loss.examples()
        if count is None or self._begin is None or count < self._last:
            self._begin = None
            return None
        self._last = count
        return (count - self._begin) / self._replicas

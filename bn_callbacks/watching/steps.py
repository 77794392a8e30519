"""Counts the training steps that `fit` has really made."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import steps_per_execution


class StepCounter:
    """Counts the training steps of an epoch from what Keras tells a callback.

    `on_train_batch_begin` says how many steps were made before. Keras does not say how
    many more followed: `steps_per_execution` may not divide the epoch, and data may run
    out, which Keras notices only in an execution that it has begun. The optimizer's
    counter alone is not enough: TensorFlow increments it even in a step that fails
    because the data ended, and loss scaling skips steps. So the counter also uses the
    number of steps that `fit` announced, and whether the moving averages have moved. If
    a doubt remains, the number is unknown.

    Args:
        model: The model in training.
        params: The `params` of the callback, which `fit` has set.
    """

    def __init__(self, model: keras.Model, params: Mapping[str, Any] | None) -> None:
        self._model = model
        self._announced = announced(params, "steps")
        self._is_fit = "steps" in (params or {})
        self._per_execution = steps_per_execution(model)
        # Older versions count all steps of an execution, even those without data.
        self._stops_at_the_end = hasattr(model, "unrolled_steps_per_execution")
        optimizer = getattr(model, "optimizer", None)
        self._leaves_out = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forgets the epoch before."""
        self._first_batch: int | None = None
        self._done = 0
        self._origin: int | None = None
        self._first_reading: NDArray[np.float64] | None = None
        self._last_reading: tuple[int, NDArray[np.float64]] | None = None

    def begin_batch(self, batch: int | None = None) -> int:
        """Notes that an execution begins, which is one batch or `steps_per_execution`.

        Args:
            batch: Its number in Keras. In Keras 3.0 and hand-written loops an epoch
                need not begin with 0. By default, one more than the last.

        Returns:
            The number of steps made in the epoch before.
        """
        if batch is None:
            first = self._first_batch
            batch = 0 if first is None else first + self._done + 1
        if self._first_batch is None:
            self._first_batch = batch
        self._done = batch - self._first_batch
        return self._done

    def is_last(self, batch: int) -> bool:
        """Whether this batch ends the last execution that `fit` announced."""
        if self._first_batch is None or self._announced is None:
            return False
        return batch - self._first_batch + 1 >= self._announced

    @property
    def has_begun(self) -> bool:
        """Whether a batch of this epoch has begun."""
        return self._first_batch is not None

    @property
    def needs_reading(self) -> bool:
        """Whether to call `observe`: the last announced execution begins."""
        last = self._done + self._per_execution
        return self._announced is not None and self._announced <= last

    def observe(self, iterations: int | None, averages: NDArray[np.float64]) -> None:
        """Notes a reading as a batch begins; each epoch needs one at its first batch.

        Args:
            iterations: The optimizer's counter, None without one.
            averages: The moving averages.
        """
        is_first = self._first_reading is None
        # Only then: otherwise a counter with rules of its own would go unnoticed.
        if iterations is not None and (is_first or self._leaves_out):
            self._origin = iterations - self._done
        if is_first:
            self._first_reading = averages
        self._last_reading = self._done, averages

    def finish(
        self, iterations: int | None, averages: NDArray[np.float64]
    ) -> int | None:
        """Counts the steps of the epoch that has ended.

        Args:
            iterations: The optimizer's counter now, None without one.
            averages: The moving averages now.

        Returns:
            The number of steps, or None where it cannot be known.
        """
        if not self.has_begun:
            return 0
        counted = -1
        if iterations is not None and self._origin is not None:
            counted = iterations - self._origin
        done, full = self._done, self._done + self._per_execution
        # The execution before may have met the end of the data already.
        earlier = range(done, done + 1)
        if self._stops_at_the_end:
            earlier = range(done - self._per_execution + 1, done + 1)
        has_moved = self._has_moved(averages)
        if has_moved is False:
            return counted if counted in earlier else done
        possible = range(done + 1 if has_moved else done, full + 1)
        announced = self._announced
        if announced is not None and announced in possible:
            if counted not in possible:
                return announced
            # With endless data, the last execution goes beyond what was announced.
            return counted if self._stops_at_the_end else min(counted, announced)
        if getattr(self._model, "stop_training", False) or not self._is_fit:
            # A loop that stops early stops after a complete execution.
            if counted in possible:
                return counted
            return full if self._is_fit else None
        # The data ran out.
        if announced is None and self._per_execution == 1:
            return done
        is_partial = announced is not None and self._stops_at_the_end
        if counted in earlier or (is_partial and counted in possible[:-1]):
            return counted
        return None

    def _has_moved(self, averages: NDArray[np.float64]) -> bool | None:
        """Whether the last execution has moved the averages; None if unknown."""
        if self._first_reading is None or self._last_reading is None:
            return None
        if self._last_reading[0] != self._done:
            return None
        if not np.array_equal(self._last_reading[1], averages, equal_nan=True):
            return True
        # Averages that have not moved all epoch long say nothing.
        is_still = np.array_equal(self._first_reading, averages, equal_nan=True)
        return None if is_still else False


def announced(params: Mapping[str, Any] | None, name: str) -> int | None:
    """How many `steps` per epoch, or `epochs`, `fit` announces to callbacks."""
    number = (params or {}).get(name)
    return None if number is None else int(number)

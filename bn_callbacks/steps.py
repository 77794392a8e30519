"""Counting the training steps that `fit` has really made."""

from collections.abc import Mapping
from typing import Any


class StepCounter:
    """Counts training steps from what Keras tells a callback.

    `on_train_batch_begin(batch)` says that `batch` steps of the epoch are done. How
    many more the last execution made, Keras does not say: `steps_per_execution` may
    not divide the epoch, and data of unknown length end with an execution that was
    begun but never made. The optimizer's counter settles it, or the number of steps
    that `fit` announced; where neither can be right, the number is unknown.
    """

    def __init__(self) -> None:
        self._begun: int | None = None
        self._origin: int | None = None

    def begin_epoch(self) -> None:
        """Forgets the epoch before."""
        self._begun = None

    def begin_batch(self, batch: int) -> None:
        """Notes that an execution begins after `batch` steps of the epoch."""
        self._begun = batch

    def set_origin(self, iterations: int | None) -> None:
        """Notes the optimizer's counter before the first step of an epoch."""
        self._origin = iterations

    @property
    def has_begun(self) -> bool:
        """Whether a batch of this epoch has begun."""
        return self._begun is not None

    def finish(
        self,
        iterations: int | None,
        announced: int | None,
        steps_per_execution: int,
    ) -> int | None:
        """Steps made in the epoch that has ended.

        Args:
            iterations: The optimizer's counter now, None without one.
            announced: Steps per epoch that `fit` announced, None if unknown.
            steps_per_execution: As given to `compile`.

        Returns:
            The number of steps, or None where it cannot be known.
        """
        if self._begun is None:
            return 0
        possible = range(self._begun, self._begun + steps_per_execution + 1)
        if iterations is not None and self._origin is not None:
            counted = iterations - self._origin
            # A custom step may use several optimizers, or skip some.
            if counted in possible:
                return counted
        return announced if announced in possible else None


def announced_steps(params: Mapping[str, Any] | None) -> int | None:
    """Steps per epoch as `fit` announces them to callbacks."""
    steps = (params or {}).get("steps")
    return None if steps is None else int(steps)


def announced_epochs(params: Mapping[str, Any] | None) -> int | None:
    """Number of epochs as `fit` announces it to callbacks."""
    epochs = (params or {}).get("epochs")
    return None if epochs is None else int(epochs)

"""Reads the moving averages, and finds out who else has written them."""

from collections.abc import Sequence

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import BatchNormLayer, Reader, versions
from bn_callbacks.statistics.moments import Statistics

Flat = NDArray[np.float64]
"""All averages of all layers, of shape `(replicas, values)`."""


class Readings(Reader):
    """Reads the averages of some layers, and keeps the last reading.

    Between two readings not only training may write them. This library counts its own
    writes; those of others show only if no training step was made in between.

    Args:
        model: The model in training.
        layers: The layers to read.

    Attributes:
        now: The last reading.
    """

    def __init__(self, model: keras.Model, layers: Sequence[BatchNormLayer]) -> None:
        super().__init__(model, layers)
        self.now: Flat = self()[1]
        self._versions = self.versions()

    def versions(self) -> NDArray[np.int_]:
        """A number for each layer that changes when this library writes the layer."""
        return np.array(versions(self.layers), int)

    def keep(
        self, now: Flat, current: NDArray[np.int_] | None = None
    ) -> NDArray[np.bool_]:
        """Makes this the last reading.

        Args:
            now: The averages.
            current: The `versions` at that time; by default the present ones.

        Returns:
            For each layer, whether this library has written it since the reading
            before.
        """
        current = self.versions() if current is None else current
        is_written: NDArray[np.bool_] = current != self._versions
        self.now, self._versions = now, current
        return is_written

    def reread(
        self,
    ) -> tuple[tuple[int | None, Flat], NDArray[np.bool_], NDArray[np.bool_]]:
        """Reads and keeps; call it if no training step was made since the last reading.

        Returns:
            As a call; and for each layer, whether this library has written it, and
            whether somebody else has.
        """
        before = self.now
        reading = self()
        is_own = self.keep(reading[1])
        return reading, is_own, ~self.is_same(before, self.now) & ~is_own

    def is_current(self) -> bool:
        """Whether the averages are still those of the last reading."""
        return bool(self.is_same(self.now, self()[1]).all())

    def is_same(self, one: Flat, other: Flat) -> NDArray[np.bool_]:
        """For each layer, whether two readings are equal; NaN equals NaN."""
        return self.all_per_layer((one == other) | (np.isnan(one) & np.isnan(other)))

    def choose(self, which: NDArray[np.bool_], one: Flat, other: Flat) -> Flat:
        """The averages of `one` for the chosen layers, of `other` for the rest."""
        return np.where(self.spread(which), one, other)

    def statistics(self, flat: Flat, index: int) -> list[Statistics]:
        """One layer's mean and variance on each replica."""
        return [
            self.layers[index].statistics(one) for one in self.averages(flat, index)
        ]

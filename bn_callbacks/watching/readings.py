"""The moving averages as they were last read, and who has written them since."""

from collections.abc import Sequence

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import BatchNormLayer, Reader, versions
from bn_callbacks.statistics.moments import Statistics

Flat = NDArray[np.float64]
"""All averages of all layers, of shape `(replicas, values)`."""


class Readings:
    """Reads the averages of some layers; the last reading is kept.

    Somebody else may write them between two readings: this library, which leaves a
    mark, or others, which shows only where no training was in between.

    Args:
        model: The model in training.
        layers: The layers to read.
    """

    def __init__(self, model: keras.Model, layers: Sequence[BatchNormLayer]) -> None:
        self.layers = list(layers)
        self._reader = Reader(model, layers)
        self.now: Flat = self._reader()[1]
        self._versions = self.versions()

    def read(self) -> tuple[int | None, Flat]:
        """The optimizer's step counter (None without one) and all averages now."""
        return self._reader()

    def versions(self) -> NDArray[np.int_]:
        """A number for each layer, which changes when this library writes it."""
        return np.array(versions(self.layers), int)

    def keep(
        self, now: Flat, current: NDArray[np.int_] | None = None
    ) -> NDArray[np.bool_]:
        """Makes this the last reading.

        Args:
            now: The averages.
            current: The `versions` when they were read; by default as they are.

        Returns:
            For each layer, whether this library has written it since the one before.
        """
        current = self.versions() if current is None else current
        is_written: NDArray[np.bool_] = current != self._versions
        self.now, self._versions = now, current
        return is_written

    def rebase(
        self,
    ) -> tuple[tuple[int | None, Flat], NDArray[np.bool_], NDArray[np.bool_]]:
        """Reads and keeps, where no training was since the last reading.

        Returns:
            As `read`; and for each layer, whether this library has written it, and
            whether somebody else has.
        """
        before = self.now
        reading = self.read()
        is_own = self.keep(reading[1])
        return reading, is_own, ~self.is_same(before, self.now) & ~is_own

    def is_untouched(self) -> bool:
        """Whether nobody has written the averages since the last reading."""
        return bool(self.is_same(self.now, self.read()[1]).all())

    def is_same(self, one: Flat, other: Flat) -> NDArray[np.bool_]:
        """For each layer, whether two readings agree, NaN with NaN."""
        return self._reader.all_per_layer(
            (one == other) | (np.isnan(one) & np.isnan(other))
        )

    def choose(self, which: NDArray[np.bool_], one: Flat, other: Flat) -> Flat:
        """The averages of `one` for the layers chosen, of `other` for the rest."""
        return np.where(self._reader.spread(which), one, other)

    def columns(self, which: Sequence[bool]) -> NDArray[np.bool_]:
        """The values that belong to the layers chosen."""
        return self._reader.spread(which)

    def averages(self, flat: Flat, index: int) -> NDArray[np.float64]:
        """One layer's two averages in each row, `(rows, 2, channels)`."""
        return self._reader.averages(flat, index)

    def statistics(self, flat: Flat, index: int) -> list[Statistics]:
        """One layer's mean and variance on each replica."""
        return [
            self.layers[index].statistics(one) for one in self.averages(flat, index)
        ]

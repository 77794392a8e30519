"""What is left in the moving averages of the values they began with."""

from collections.abc import Sequence

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import BatchNormLayer, Reader, assign, versions
from bn_callbacks.statistics.moments import Statistics, pool_replicas
from bn_callbacks.statistics.moving_average import debias, start_weight


class StartValues:
    """Keeps the start values of some layers' averages, and their weight.

    Values that others have written into a layer are good as they are: nothing is
    taken out of that layer from then on.

    Args:
        model: The model in training.
        layers: Its BN layers.
        is_late: Whether training has begun already, with the values that new layers
            have.
        before: The same from an earlier `fit`, which goes on in every layer that
            nobody has written since.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[BatchNormLayer],
        *,
        is_late: bool = False,
        before: "StartValues | None" = None,
    ) -> None:
        self.layers = list(layers)
        self._reader = Reader(model, layers)
        self._now = self._start = self._reader()[1]
        # The weight of the start in each average; NaN where it cannot be known.
        self._weights = np.ones(len(layers))
        self._versions = np.array(versions(layers), int)
        if is_late:
            initial = [part for bn in layers for part in _initial(bn)]
            start = np.concatenate([*initial, np.zeros(0)])
            self._start = np.tile(start, (len(self._now), 1))
        elif before is not None and before._is_of(layers):
            goes_on = self._reader.all_per_layer(before._now == self._now)
            self._weights = np.where(goes_on, before._weights, 1.0)
            self._start = np.where(
                self._reader.spread(goes_on), before._start, self._now
            )

    def _is_of(self, layers: Sequence[BatchNormLayer]) -> bool:
        return [bn.layer for bn in self.layers] == [bn.layer for bn in layers]

    @property
    def is_known(self) -> bool:
        """Whether all weights are known."""
        return not np.isnan(self._weights).any()

    def read(self) -> tuple[int | None, NDArray[np.float64]]:
        """The optimizer's step counter (None without one) and all averages."""
        iterations, self._now = self._reader()
        self._drop(np.array(versions(self.layers), int) != self._versions)
        return iterations, self._now

    def rebase(self) -> tuple[int | None, NDArray[np.float64]]:
        """Reads, as `read`, where no training was since the last reading."""
        before = self._now
        reading = self.read()
        is_same = (before == self._now) | (np.isnan(before) & np.isnan(self._now))
        self._drop(~self._reader.all_per_layer(is_same))
        return reading

    def _drop(self, is_foreign: NDArray[np.bool_]) -> None:
        self._weights[is_foreign] = 0.0
        self._start = np.where(self._reader.spread(is_foreign), self._now, self._start)
        self._versions = np.array(versions(self.layers), int)

    def advance(self, steps: int | None) -> None:
        """Lowers the weights by so many training steps; None if unknown."""
        for index, bn in enumerate(self.layers):
            if not bn.trainable or self._weights[index] == 0:
                continue
            self._weights[index] *= (
                np.nan if steps is None else start_weight(bn.momentum, steps * bn.calls)
            )

    def take_out(self) -> None:
        """Writes the debiased statistics into the layers.

        The averages go on from them, and of these the weight is what it was of the
        start values: so the next time gives the closed form over all batches again.
        """
        self.rebase()
        chosen, values = [], []
        is_chosen = np.zeros(len(self.layers), bool)
        for index, bn in enumerate(self.layers):
            weight = float(self._weights[index])
            if not (0 < weight < 1 and bn.trainable):
                continue
            now, start = (
                self._reader.averages(flat, index) for flat in (self._now, self._start)
            )
            mean, variance = pool_replicas(
                [bn.statistics(each) for each in debias(now, start, weight)]
            )
            if np.isfinite(mean).all() and np.isfinite(variance).all():
                chosen.append(bn)
                values.append(Statistics(mean, np.maximum(variance, 0)))
                is_chosen[index] = True
        assign(chosen, values, in_training=False)
        self._now = self._reader()[1]
        self._start = np.where(self._reader.spread(is_chosen), self._now, self._start)
        self._versions = np.array(versions(self.layers), int)


def _initial(bn: BatchNormLayer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, variance = bn.initial
    return mean, np.sqrt(variance) if bn.renorm else variance

"""Knows how much of their start values the moving averages still hold."""

from collections.abc import Sequence

import keras
import numpy as np
from numpy.typing import NDArray

from bn_callbacks.layers import BatchNormLayer, CallWatch, assign, calls_of
from bn_callbacks.statistics.evidence import is_negative
from bn_callbacks.statistics.moments import Statistics, pool_replicas
from bn_callbacks.statistics.moving_average import debias, start_weight
from bn_callbacks.watching.readings import Flat, Readings


class StartValues:
    """Keeps the start values of some layers' averages, and their weights.

    If something else than training writes a layer, its values are taken to be right:
    from then on the weight of its start is 0.

    Args:
        model: The model in training.
        layers: Its BN layers.
        is_late: Whether the first step has been made already, from the values of new
            layers.
        before: Those of an earlier `fit`, which continue in each layer that nobody has
            written since.
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
        self._readings = Readings(model, layers)
        self._start = self._readings.now
        # The weight of the start in each layer; NaN if it cannot be known.
        self._weights = np.ones(len(layers))
        self._watch = CallWatch(model, layers)
        self._model = model
        self._is_counted = False
        if is_late:
            initial = [part for bn in layers for part in _initial(bn)]
            start = np.concatenate([*initial, np.zeros(0)])
            self._start = np.tile(start, (len(self._readings.now), 1))
        elif before is not None and [bn.layer for bn in before.layers] == [
            bn.layer for bn in layers
        ]:
            goes_on = self._readings.is_same(before._readings.now, self._readings.now)
            self._weights = np.where(goes_on, before._weights, 1.0)
            self._start = self._readings.choose(
                goes_on, before._start, self._readings.now
            )

    @property
    def is_known(self) -> bool:
        """Whether all weights are known."""
        return not np.isnan(self._weights).any()

    def read(self) -> tuple[int | None, Flat]:
        """The optimizer's step counter (None without one) and all averages."""
        reading = self._readings()
        self._drop(self._readings.keep(reading[1]))
        return reading

    def reread(self) -> tuple[int | None, Flat]:
        """As `read`; call it if no training step was made since the last reading."""
        reading, is_own, is_foreign = self._readings.reread()
        self._drop(is_own | is_foreign)
        return reading

    def watch_calls(self) -> None:
        """Watches, as training begins, how often a step updates each layer."""
        if not (self._is_counted or self._watch.is_watching):
            self._watch.begin()

    def _drop(self, is_foreign: NDArray[np.bool_]) -> None:
        self._weights[is_foreign] = 0.0
        self._start = self._readings.choose(is_foreign, self._readings.now, self._start)

    def advance(self, steps: int | None) -> None:
        """Reduces the weights after so many training steps; None if unknown."""
        if self._watch.is_watching:
            self._watch.end(steps or 0)
            self._is_counted = True
        for index, (bn, calls) in enumerate(
            zip(self.layers, calls_of(self._model, self.layers), strict=True)
        ):
            if not bn.trainable or self._weights[index] == 0:
                continue
            if steps is None or calls.updates is None:
                self._weights[index] = np.nan
            else:
                self._weights[index] *= start_weight(bn.momentum, steps * calls.updates)

    def write_debiased(self) -> None:
        """Writes the debiased statistics into the layers.

        Training continues from them. They have the weight that the start values had, so
        the next call again gives the weighted mean of all batches. A negative variance
        proves that the updates were counted wrongly; that layer stays as it is, now and
        later.
        """
        self.reread()
        now = self._readings.now
        chosen, values = [], []
        is_chosen = np.zeros(len(self.layers), bool)
        for index, bn in enumerate(self.layers):
            weight = float(self._weights[index])
            if not (0 < weight < 1 and bn.trainable):
                continue
            last, start = (
                self._readings.averages(flat, index) for flat in (now, self._start)
            )
            mean, variance = pool_replicas(
                [bn.statistics(each) for each in debias(last, start, weight)]
            )
            made_of = [bn.statistics(each[0]).variance for each in (last, start)]
            if is_negative(variance, *made_of) and bn.precision is None:
                self._weights[index] = np.nan
            elif np.isfinite(mean).all() and np.isfinite(variance).all():
                chosen.append(bn)
                # Smaller values below 0 are rounding.
                values.append(Statistics(mean, np.maximum(variance, 0)))
                is_chosen[index] = True
        assign(chosen, values, in_training=False)
        self._readings.keep(self._readings()[1])
        self._start = self._readings.choose(is_chosen, self._readings.now, self._start)


def _initial(bn: BatchNormLayer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, variance = bn.initial
    return mean, np.sqrt(variance) if bn.renorm else variance

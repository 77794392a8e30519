"""A model's loss with and without batch statistics."""

import math
from typing import Any

import keras

from bn_callbacks.layers import BatchNormLayer, count_inputs, find, read
from bn_callbacks.measuring.data import Batches
from bn_callbacks.measuring.one_pass import Population
from bn_callbacks.statistics.moments import Statistics, is_finite


class Probe:
    """A model's loss on a sample of data, in both modes of its BN layers.

    Args:
        model: A compiled model.
        data: Data with targets.
        layers: BN layers that change between the modes; by default all that are
            not frozen.

    Raises:
        ValueError: The data have no targets, or the model has no loss.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Any,
        layers: list[BatchNormLayer] | None = None,
    ) -> None:
        self._data = data
        self._inputs = count_inputs(model)
        self._batches = Batches(data, inputs=self._inputs)
        has_targets = self._batches.peek()[1] is not None
        if not (model.compiled and has_targets):
            raise ValueError(
                "Measuring a loss needs data with targets and a compiled model. "
                f"Received: compiled={bool(model.compiled)}, targets={has_targets}. "
                "Pass (x, y), and compile the model with a loss."
            )
        if layers is None:
            layers = [bn for bn in find(model) if bn.trainable]
        self.layers = layers
        self._population = Population(model, layers, loss=True)
        self._is_shared = False

    def measure(
        self, batch_size: float | None = None
    ) -> tuple[float | None, float | None]:
        """The loss with batch statistics, and the loss in inference mode.

        Args:
            batch_size: Examples a batch in training, where it is known: batch
                statistics are to be as good as there.
        """
        if batch_size is not None:
            size = max(1, round(batch_size))
            self._batches = Batches(self._data, batch_size=size, inputs=self._inputs)
            self._is_shared = False
        return self._loss(None), self.inference_loss(read(self.layers))

    def inference_loss(self, statistics: list[Statistics]) -> float | None:
        """The loss if the layers stored these statistics."""
        # Replicas of other workers may store something else.
        if not self._population.team.everywhere(is_finite(statistics)):
            return math.nan
        return self._loss(statistics)

    def _loss(self, statistics: list[Statistics] | None) -> float | None:
        if not self._is_shared:
            self._population.share(self._batches)
            self._is_shared = True
        return self._population.measure(self._batches, statistics).loss

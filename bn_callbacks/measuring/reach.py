"""Which layers training would update, as the model's own call shows."""

import keras

from bn_callbacks.layers import BatchNormLayer, runs_in_training_mode
from bn_callbacks.measuring.data import Batches, fits, open_specs


def split(
    model: keras.Model, found: list[BatchNormLayer], batches: Batches
) -> tuple[list[BatchNormLayer], list[BatchNormLayer], list[BatchNormLayer]]:
    """The layers that training updates, those it does not, and those never called."""
    first = batches.peek()
    with fits(model.name, first[0], 0):
        asks = runs_in_training_mode(model, found, open_specs(first[0]))
    kinds = (True, False, None)
    updated, idle, uncalled = (
        [bn for bn, asked in zip(found, asks, strict=True) if asked is kind]
        for kind in kinds
    )
    return updated, idle, uncalled

"""Finds the layers that training would update, from the model's own call."""

import keras

from bn_callbacks.layers import (
    BatchNormLayer,
    LayerSelection,
    find,
    runs_in_training_mode,
)
from bn_callbacks.measuring.data import Batches, naming_batch, open_specs


def split(
    model: keras.Model, found: list[BatchNormLayer], batches: Batches
) -> tuple[list[BatchNormLayer], list[BatchNormLayer], list[BatchNormLayer]]:
    """Splits layers: training updates them, does not, or never calls them."""
    first = batches.peek()
    with naming_batch(model, first[0], 0):
        asks = runs_in_training_mode(model, found, open_specs(first[0]))
    kinds = (True, False, None)
    updated, idle, uncalled = (
        [bn for bn, asked in zip(found, asks, strict=True) if asked is kind]
        for kind in kinds
    )
    return updated, idle, uncalled


def targets_of(
    model: keras.Model, layers: LayerSelection, batches: Batches
) -> tuple[list[BatchNormLayer], list[BatchNormLayer], list[BatchNormLayer]]:
    """Splits layers: to recalibrate, to leave alone, or never called.

    Raises:
        ValueError: There is no layer to recalibrate.
    """
    found = find(model, layers)
    if not found:
        raise ValueError(
            "The model has no BatchNormalization layer to recalibrate. Received: "
            f"model={model.name!r}. There is nothing to do for it."
        )
    targets, skipped, uncalled = split(model, found, batches)
    deaf = [bn for bn in skipped if bn.named]
    if deaf:
        raise ValueError(
            f"The input of {deaf[0].path} cannot be measured: its own `call` never "
            "asks for the statistics of a batch, whatever `training` is. Received: "
            f"a {type(deaf[0].layer).__qualname__}. Leave it out of `layers`, or let "
            "its `call` pass `training` on to `BatchNormalization.call`."
        )
    if targets:
        return targets, skipped, uncalled
    if not any(bn.trainable for bn in found):
        raise ValueError(
            "All BatchNormalization layers are frozen (`trainable=False`). Received: "
            f"{found[0].path} and {len(found) - 1} more. Name the layers to "
            f"recalibrate all the same, as in layers=[{found[0].path!r}]."
        )
    raise ValueError(
        "The model's own call never runs its BatchNormalization layers in training "
        "mode, so its weights have adapted to the statistics as they are, and "
        f"recalibration would harm. Received: {found[0].path} and {len(found) - 1} "
        "more. Pass `training` on to the layers in `call` and train again; or name "
        f"the layers, as in layers=[{found[0].path!r}], if you know better."
    )

"""What the callbacks have in common: whose `fit` it is, and when it has ended."""

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from bn_callbacks.callbacks.company import gather
from bn_callbacks.layers import check_keras, check_model
from bn_callbacks.report import BatchNormReport, BatchNormWarning


class BatchNormCallback(keras.callbacks.Callback):
    """A callback that knows whether its own `fit` is running.

    `evaluate` and `predict` take callbacks as well, and after an exception `fit` calls
    no hook any more. But whatever takes callbacks begins by giving them the model: that
    is the end of a `fit` before, however it ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, Any] | None = None
        self._is_fitting = False

    def set_model(self, model: keras.Model) -> None:
        # Keras 2 calls what callbacks of Keras 3 do not have, and this first of all.
        check_keras(model)
        self._is_fitting = False
        super().set_model(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        check_model(self.model)
        gather(self.model)
        self._is_fitting = True

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._is_fitting = False


def say_nothing_to_do(callback: BatchNormCallback, verb: str) -> None:
    """Says that a model has no BN layer. Who tries many models wants no error."""
    print(
        f"{type(callback).__name__}: model {callback.model.name!r} has no "
        f"BatchNormalization layer; there is nothing to {verb}."
    )


def warn_of_unknown(report: BatchNormReport, params: Mapping[str, Any] | None) -> None:
    """Says why nothing is known of layers that are not known to be healthy."""
    steps = (params or {}).get("steps")
    warnings.warn(
        f"Nothing could be measured of {len(report.unknown)} of {len(report.layers)} "
        "BatchNormalization layers in this epoch, which may or may not lag: it is not "
        "known how many training steps were made. Received: data that ended before "
        f"steps={steps} were made. Pass `steps_per_epoch` that the data have, or use "
        "audit().",
        BatchNormWarning,
        stacklevel=3,
    )

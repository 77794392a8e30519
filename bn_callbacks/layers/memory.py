"""Keeps things for a model between calls, and frees them with the model."""

from collections.abc import Hashable, Sequence
from typing import Any

import keras

from bn_callbacks.layers.calls import COUNTING
from bn_callbacks.layers.find import BatchNormLayer

_NAME = "bn_callbacks_memory"

KEPT = 4
"""Largest number of things kept for a model."""

# Attributes that change when a model is used, but not what a call computes.
_PASSING = {
    "_call_context_args",
    "_called",
    "_eval_epoch_iterator",
    "_loss_ids",
    "_losses",
    "evaluate",  # Our callbacks wrap it while they validate.
    "history",
    "optimizer",
    "predict_function",
    "stop_evaluating",
    "stop_predicting",
    "stop_training",
    "test_function",
    "train_function",
}


def memory_of(layers: Sequence[BatchNormLayer]) -> dict[Hashable, Any]:
    """Returns the dictionary of things that are kept for a model.

    They live as long as the model does, even if they refer to it: in a
    `WeakKeyDictionary` they would keep it alive. So the dictionary is an attribute of
    one of the model's variables, where neither Keras nor TensorFlow looks.
    """
    if not layers:
        return {}
    memory: dict[Hashable, Any]
    memory = vars(layers[0].layer.moving_mean).setdefault(_NAME, {})
    while len(memory) > KEPT:
        memory.pop(next(iter(memory)), None)
    return memory


def structure_of(model: keras.Model) -> Hashable:
    """Returns a key that stays equal as long as a traced function stays right.

    It changes with a layer, and with any attribute of a layer that is a plain value, a
    function, a variable or an object, such as `trainable`, `rate` or `activation`. It
    does not change with the content of such an object.
    """
    return tuple(
        (_Same(layer), frozenset(_attributes(layer).items()))
        for layer in model._flatten_layers()
    )


def _attributes(layer: keras.layers.Layer) -> dict[str, "str | _Same"]:
    plain = (bool, int, float, str, tuple, type(None))
    return {
        name: repr(value) if isinstance(value, plain) else _Same(value)
        for name, value in vars(layer).items()
        if name not in _PASSING and not hasattr(value, COUNTING)
    }


class _Same:
    """Compares objects by identity, and keeps them, so that no `id` is reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

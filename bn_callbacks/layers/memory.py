"""What is kept for a model between calls, and is freed with the model."""

from collections.abc import Hashable, Sequence
from typing import Any

import keras

from bn_callbacks.layers.calls import COUNTING
from bn_callbacks.layers.find import BatchNormLayer

_NAME = "bn_callbacks_memory"

KEPT = 4
"""Things remembered for a model, at most."""

# Attributes that change while a model is used, without changing what a call computes.
_PASSING = {
    "_call_context_args",
    "_called",
    "_eval_epoch_iterator",
    "_loss_ids",
    "_losses",
    "evaluate",  # which may be wrapped while callbacks of ours validate
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
    """Where things that belong to a model can be kept; they live as long as it does.

    They may refer to the model themselves, which keys and values of a
    `WeakKeyDictionary` may not. So the memory hangs on a variable of the model, where
    neither Keras nor TensorFlow looks for anything.
    """
    if not layers:
        return {}
    memory: dict[Hashable, Any]
    memory = vars(layers[0].layer.moving_mean).setdefault(_NAME, {})
    while len(memory) > KEPT:
        memory.pop(next(iter(memory)), None)
    return memory


def structure_of(model: keras.Model) -> Hashable:
    """Equal for two calls if a function of the model that was traced stays right.

    It changes with a layer, and with any attribute of a layer that is a plain value, a
    function, a variable or an object, such as `trainable`, `rate` or `activation`;
    not with what changes inside such an object.
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
    """Equal to itself alone; holds its object, so that no other gets its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

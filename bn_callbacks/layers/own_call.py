"""Finds out what a BN layer with its own `call` does with `training=True`.

Keras' `call` asks `_moments` for the statistics of a batch; there this library counts
updates and provides other statistics. A user's layer may compute them in another way,
or not at all. So its `call` is tried on a few numbers.
"""

import enum
import inspect
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf


class OwnCall(enum.Enum):
    """What a layer's `call` does in training mode."""

    ASKS = "it asks `_moments`, as Keras' does"
    ALIKE = "it computes the same as Keras', but the statistics itself"
    NEVER = "it computes what it computes in inference mode"
    UNKNOWN = "something else"

    @property
    def takes_statistics(self) -> bool:
        """Whether the layer can be made to normalise with given statistics."""
        return self in (OwnCall.ASKS, OwnCall.ALIKE)


def own_call(layer: keras.layers.BatchNormalization) -> OwnCall:
    """Finds out what a layer's `call` does in training mode; writes nothing."""
    if type(layer).call is keras.layers.BatchNormalization.call:
        return OwnCall.ASKS
    if layer not in _found:
        try:
            with tf.init_scope():
                _found[layer] = _try(layer)
        except Exception:
            # It needs something else than a few numbers.
            _found[layer] = OwnCall.UNKNOWN
    return _found[layer]


_found: WeakKeyDictionary[keras.layers.Layer, OwnCall] = WeakKeyDictionary()

EXAMPLES, EXTENT = 8, 3
"""Sizes of the trial input: its first axis, and its other axes but the channels."""

ROUGH = 1e-3
"""Largest difference of equal outputs, in their standard deviations; it allows for
rounding and for an unbiased variance."""


def _try(layer: keras.layers.BatchNormalization) -> OwnCall:
    shape = [EXAMPLES, *[EXTENT] * (layer.input_spec.ndim - 1)]
    shape[layer.axis] = int(layer.moving_mean.shape[0])
    values = np.random.default_rng(0).normal(3, 2, size=shape)
    x = tf.constant(values, layer.compute_dtype)
    asked = []
    state = vars(layer)
    before = {name: state[name] for name in ("_moments", "_trainable") if name in state}
    ask = type(layer)._moments

    def moments(*args: Any, **kwargs: Any) -> Any:
        asked.append(True)
        return ask(layer, *args, **kwargs)

    # Not by `setattr`, which has side effects in a Keras layer.
    state.update(_moments=moments, _trainable=True)
    try:
        with keras.StatelessScope():
            trained = _call(type(layer).call, layer, x, True)
            if asked:
                return OwnCall.ASKS
            inferred = _call(type(layer).call, layer, x, False)
            alike = keras.layers.BatchNormalization.call(layer, x, training=True)
    finally:
        del state["_moments"], state["_trainable"]
        state.update(before)
    if _is_same(trained, alike):
        return OwnCall.ALIKE
    return OwnCall.NEVER if _is_same(trained, inferred) else OwnCall.UNKNOWN


def _call(call: Any, layer: keras.layers.Layer, x: Any, training: bool) -> Any:
    takes = "training" in inspect.signature(call).parameters
    keywords = {"training": training} if takes else {}
    return call(layer, x, **keywords)


def _is_same(one: Any, other: Any) -> bool:
    first, second = (np.asarray(each, np.float64) for each in (one, other))
    return bool(np.abs(first - second).max() <= ROUGH * (first.std() + ROUGH))

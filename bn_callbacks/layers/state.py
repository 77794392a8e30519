"""Reading and writing what BN layers store."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.layers.facts import raw_iterations
from bn_callbacks.layers.find import BatchNormLayer
from bn_callbacks.statistics.moments import Statistics


def read(layers: Sequence[BatchNormLayer]) -> list[Statistics]:
    """Reads the stored statistics of every layer as float64."""
    return [
        Statistics(
            bn.layer.moving_mean.value.numpy().astype(np.float64),
            bn.layer.moving_variance.value.numpy().astype(np.float64),
        )
        for bn in layers
    ]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that `assign` may change in some layers, copied."""

    layers: list[BatchNormLayer]
    state: list[tuple[Any, NDArray[Any]]]
    versions: list[int]


def snapshot(layers: Sequence[BatchNormLayer]) -> Snapshot:
    """Copies everything that `assign` may change, for `restore`."""
    state = [pair for bn in layers for pair in bn.state()]
    return Snapshot(list(layers), state, versions(layers))


def restore(saved: Snapshot) -> None:
    """Writes a snapshot back, bit for bit."""
    for variable, value in saved.state:
        variable.assign(value)
    for bn, version in zip(saved.layers, saved.versions, strict=True):
        _versions[bn.layer] = version


def assign(
    layers: Sequence[BatchNormLayer],
    values: Sequence[Statistics],
    *,
    in_training: bool = True,
) -> None:
    """Writes statistics into all layers, or into none.

    Args:
        layers: The layers.
        values: What to write into each.
        in_training: Whether renormalising layers are to train with them too.

    Raises:
        ValueError: A value is not finite in the layer's own dtype.
    """
    new = []
    for bn, statistics in zip(layers, values, strict=True):
        new += bn.new_state(statistics, in_training)
    old = snapshot(layers)
    try:
        for variable, value in new:
            variable.assign(value)
        for bn in layers:
            _versions[bn.layer] = next(_new_version)
    except BaseException:
        restore(old)
        raise


# A number for what this library has last written into a layer. A moving average
# that was written between two readings is no longer an average of batches.
_versions: WeakKeyDictionary[keras.layers.Layer, int] = WeakKeyDictionary()


_new_version = itertools.count(1)


def versions(layers: Sequence[BatchNormLayer]) -> list[int]:
    """Changes with every `assign` to a layer, and back with `restore`."""
    return [_versions.get(bn.layer, 0) for bn in layers]


class Reader:
    """Reads the moving averages of all layers in one compiled call.

    Args:
        model: The model; the count of its optimizer steps is read along.
        layers: The layers to read.
    """

    def __init__(self, model: keras.Model, layers: Sequence[BatchNormLayer]) -> None:
        self.layers = list(layers)
        variables = [variable for bn in layers for variable in bn.averages]
        self._ends = np.cumsum([0, *(2 * bn.channels for bn in layers)])
        counter = raw_iterations(model)

        @tf.function(autograph=False)
        def read_all() -> Any:
            flat = [tf.cast(variable.value, tf.float64) for variable in variables]
            step = -1 if counter is None else counter.value
            return tf.concat([[tf.cast(step, tf.float64)], *flat], axis=0)

        # Not the function itself, which TensorFlow would see retraced in each `fit`.
        self._read_all = read_all.get_concrete_function()

    def __call__(self) -> tuple[int | None, NDArray[np.float64]]:
        """The optimizer's step count (None without one) and all averages, flat."""
        flat = self._read_all().numpy()
        return (int(flat[0]) if flat[0] >= 0 else None), flat[1:]

    def averages(self, flat: NDArray[np.float64], index: int) -> NDArray[np.float64]:
        """One layer's two averages in a flat reading, shape `(2, channels)`."""
        return flat[self._ends[index] : self._ends[index + 1]].reshape(2, -1)

    def all_per_layer(self, flat: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """For each layer, whether all of its entries are true."""
        return np.logical_and.reduceat(flat, self._ends[:-1])

    def spread(self, per_layer: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Repeats one value a layer over that layer's entries."""
        return np.repeat(per_layer, np.diff(self._ends))

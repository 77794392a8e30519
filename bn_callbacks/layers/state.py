"""Reading and writing what BN layers store."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from bn_callbacks.distribution import Team, copies
from bn_callbacks.layers.facts import raw_iterations, team_of
from bn_callbacks.layers.find import BatchNormLayer
from bn_callbacks.statistics.moments import Statistics


def read(layers: Sequence[BatchNormLayer]) -> list[Statistics]:
    """Reads the stored statistics of every layer as float64.

    Where replicas differ, those of the first, which is what Keras reads and saves.
    """
    return [
        Statistics(
            bn.layer.moving_mean.value.numpy().astype(np.float64),
            bn.layer.moving_variance.value.numpy().astype(np.float64),
        )
        for bn in layers
    ]


def read_replicas(
    model: keras.Model, layers: Sequence[BatchNormLayer]
) -> list[list[Statistics]]:
    """What each replica of all workers stores for each layer; empty for one replica.

    For renormalising layers, as `BatchNormLayer.statistics` converts them.
    """
    reader = Reader(model, layers)
    if reader.team.size == 1:
        return [[] for _ in layers]
    _, flat = reader()
    return [
        [bn.statistics(each) for each in reader.averages(flat, index)]
        for index, bn in enumerate(layers)
    ]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that `assign` may change in some layers, copied: on each replica."""

    layers: list[BatchNormLayer]
    state: list[tuple[Any, NDArray[Any]]]
    versions: list[int]


def snapshot(layers: Sequence[BatchNormLayer]) -> Snapshot:
    """Copies everything that `assign` may change, for `restore`."""
    variables = [variable for bn in layers for variable in bn.variables]
    state = [
        (part, np.array(part.numpy()))
        for variable in variables
        for part in copies(variable.value)
    ]
    return Snapshot(list(layers), state, versions(layers))


def restore(saved: Snapshot) -> None:
    """Writes a snapshot back, bit for bit."""
    for part, value in saved.state:
        part.assign(value)
    for bn, version in zip(saved.layers, saved.versions, strict=True):
        _versions[bn.layer] = version


def assign(
    layers: Sequence[BatchNormLayer],
    values: Sequence[Statistics],
    *,
    in_training: bool = True,
) -> None:
    """Writes statistics into all layers, or into none; into every replica's copy.

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


def commit(
    layers: Sequence[BatchNormLayer],
    values: Sequence[Statistics],
    wanted: Sequence[bool],
    team: Team,
) -> None:
    """Writes statistics into the layers that are wanted, on all workers or on none.

    Raises:
        ValueError: As `assign`.
        RuntimeError: Another worker has failed.
    """
    saved = snapshot(layers)
    try:
        with team.agreed():
            assign(
                list(itertools.compress(layers, wanted)),
                list(itertools.compress(values, wanted)),
            )
    except BaseException:
        restore(saved)
        raise


# A number for what this library has last written into a layer. A moving average
# that was written between two readings is no longer an average of batches.
_versions: WeakKeyDictionary[keras.layers.Layer, int] = WeakKeyDictionary()


_new_version = itertools.count(1)


def versions(layers: Sequence[BatchNormLayer]) -> list[int]:
    """A number for each layer: `assign` changes it, `restore` changes it back."""
    return [_versions.get(bn.layer, 0) for bn in layers]


class Reader:
    """Reads the moving averages of all layers as one vector.

    Not compiled: with hundreds of layers a trace takes a second in each `fit`, to save
    milliseconds a reading; with few layers it saves nothing.

    A reading has a row for each replica of all workers, which is one row without a
    distribution strategy. All workers must read at the same time.

    Args:
        model: The model; the count of its optimizer steps is read along.
        layers: The layers to read.
    """

    def __init__(self, model: keras.Model, layers: Sequence[BatchNormLayer]) -> None:
        self.layers = list(layers)
        self.team = team_of(model)
        averages = [copies(v.value) for bn in layers for v in bn.averages]
        self._copies = list(itertools.chain(*zip(*averages, strict=True)))
        self._ends = np.cumsum([0, *(2 * bn.channels for bn in layers)])
        counter = raw_iterations(model)
        self._counter = None if counter is None else counter.value
        self._is_uniform = len({copy.dtype for copy in self._copies}) == 1

    def __call__(self) -> tuple[int | None, NDArray[np.float64]]:
        """The optimizer's step count (None without one) and all averages.

        The latter of shape `(replicas, values)`.
        """
        step = None if self._counter is None else int(self._counter.numpy())
        parts = self._copies
        if not self._is_uniform:
            parts = [tf.cast(part, tf.float64) for part in parts]
        flat = tf.concat(parts, axis=0).numpy() if parts else np.zeros(0)
        rows = self.team.gather(flat.astype(np.float64))
        return step, rows.reshape(self.team.size, -1)

    def averages(self, flat: NDArray[np.float64], index: int) -> NDArray[np.float64]:
        """One layer's two averages in each row, `(rows, 2, channels)`."""
        part = flat[:, self._ends[index] : self._ends[index + 1]]
        return part.reshape(len(flat), 2, part.shape[1] // 2)

    def all_per_layer(self, flat: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """For each layer, whether all of its entries are true."""
        return np.logical_and.reduceat(flat.all(axis=0), self._ends[:-1])

    def spread(self, per_layer: ArrayLike) -> NDArray[np.bool_]:
        """Repeats one value a layer over that layer's entries."""
        return np.repeat(per_layer, np.diff(self._ends))

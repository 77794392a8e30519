"""Reads and writes what BN layers store."""

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

    If replicas differ, reads those of the first, as Keras reads and saves them.
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
    """Reads what each replica of all workers stores for each layer.

    Empty lists if there is only one replica. `BatchNormLayer.statistics` converts the
    averages of renormalising layers.
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
    """A copy of everything that `assign` may change in some layers, on each replica."""

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
    """Writes statistics into all layers or none, on every replica.

    Args:
        layers: The layers.
        values: The statistics for each layer.
        in_training: Whether renormalising layers also train with them.

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
    """Writes statistics into the `wanted` layers, on all workers or none.

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


# A number for what this library has last written into a layer: an average that was
# written between two readings is no average of batches.
_versions: WeakKeyDictionary[keras.layers.Layer, int] = WeakKeyDictionary()
_new_version = itertools.count(1)


def versions(layers: Sequence[BatchNormLayer]) -> list[int]:
    """A number for each layer, which `assign` changes, and `restore` changes back."""
    return [_versions.get(bn.layer, 0) for bn in layers]


class Reader:
    """Reads the moving averages of all layers as one vector.

    It is not compiled: with hundreds of layers, tracing would take a second in each
    `fit` and save milliseconds a reading; with few layers it would save nothing.

    A reading has a row for each replica of all workers: one row without a distribution
    strategy. All workers must read at the same time.

    Args:
        model: The model; its optimizer's step count is read too.
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
        """Reads the optimizer's step count (None without one) and all averages.

        The averages have the shape `(replicas, values)`.
        """
        step = None if self._counter is None else int(self._counter.numpy())
        parts = self._copies
        if not self._is_uniform:
            parts = [tf.cast(part, tf.float64) for part in parts]
        flat = tf.concat(parts, axis=0).numpy() if parts else np.zeros(0)
        rows = self.team.gather(flat.astype(np.float64))
        return step, rows.reshape(self.team.size, -1)

    def averages(self, flat: NDArray[np.float64], index: int) -> NDArray[np.float64]:
        """One layer's two averages, of shape `(rows, 2, channels)`."""
        part = flat[:, self._ends[index] : self._ends[index + 1]]
        return part.reshape(len(flat), 2, part.shape[1] // 2)

    def all_per_layer(self, flat: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """For each layer, whether all of its values are true."""
        return np.logical_and.reduceat(flat.all(axis=0), self._ends[:-1])

    def spread(self, per_layer: ArrayLike) -> NDArray[np.bool_]:
        """Repeats one value for each layer over the values of that layer."""
        return np.repeat(per_layer, np.diff(self._ends))

"""The one traced function: takes a batch, returns the moments of each layer's input.

It serves all ways to run BN layers, which differ only in numbers: a layer normalises
with the mean `weight·m + mean` and the variance `ratio·v + variance`, where `m` and `v`
are the batch's own. See `Mix`.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from bn_callbacks.distribution import Team
from bn_callbacks.layers import (
    BatchNormLayer,
    batch_mode,
    compute_loss,
    forget_penalties,
    forward,
    stateless,
)
from bn_callbacks.measuring.data import Batch, open_specs
from bn_callbacks.measuring.footprint import bytes_of_example
from bn_callbacks.measuring.layer_input import InputMoments, LayerInput
from bn_callbacks.statistics.moments import Moments


class Entry(NamedTuple):
    """One call of a layer, in the order of calls.

    Args:
        layer: Index of the layer.
        is_unbiased: Whether its variances are unbiased.
        counts: Number of its counts: one for all channels, or one for each.
    """

    layer: int
    is_unbiased: bool
    counts: int


class _Made(NamedTuple):
    """A function traced for batches of one form."""

    structure: Any
    function: Any
    bytes_of_example: float


FORMS = 4
"""Number of forms of batches for which traced functions are kept."""


class _Trace(threading.local):
    """The state while one replica is traced; each replica has a thread."""

    graph: Any
    replica: int
    mixes: dict[BatchNormLayer, Any]
    entries: list[Entry]
    seen: list[InputMoments]


class Traced:
    """A model's forward pass that also returns the moments of its BN layers' inputs.

    Nothing in the model is written. Everything but `layers` runs in inference mode.

    Args:
        model: A built Keras model.
        layers: The layers to measure. Other BN layers use what they store.
        team: The replicas to run on.
        dropout: Whether dropout, noise and augmentation layers are active.
        loss: Whether to return the model's loss as well.
        penalties: Whether the loss includes the penalties that layers add.
        is_fast: Whether sums in float32 are precise enough.

    Attributes:
        entries: The calls of the layers, once traced.
        order: Indices of the layers in the order of their first calls.
        late: Indices of layers that are called inside loops or branches, which tensors
            cannot leave.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[BatchNormLayer],
        team: Team,
        *,
        dropout: bool = False,
        loss: bool = False,
        penalties: bool = True,
        is_fast: bool = True,
    ) -> None:
        self.layers = list(layers)
        self.entries: list[Entry] = []
        self.order: list[int] = []
        self.late: set[int] = set()
        self._model = model
        self._team = team
        self._dropout = dropout
        self._loss = loss
        self._penalties = penalties
        self._inputs = [
            LayerInput(bn, index, team.replicas, is_fast)
            for index, bn in enumerate(layers)
        ]
        self._begins = True
        self._made: dict[str, _Made] = {}
        self._now: Any = None

    def __call__(self, group: Sequence[Batch], mix: Any, count: int) -> tuple[Any, ...]:
        """Runs a batch on each replica.

        Args:
            group: A batch for each replica; fewer where the data end.
            mix: A `Mix`, as a tensor.
            count: Number of batches before; the seed of dropout.

        Returns:
            Counts, means and variances of all entries, and the sum and number of the
            losses: tensors of a row for each replica.
        """
        used = self._used(group)
        # A replica without a batch works on one example; the caller drops its results.
        idle = self._team.replicas - len(used)
        used += [tf.nest.map_structure(_one_example, used[0]) for _ in range(idle)]
        if self._begins:
            self._trace(used, mix)
            self._begins = False
        for batch in used:
            tf.nest.assert_same_structure(self._now.structure, batch)
        tensors = tf.nest.flatten(used)
        result: tuple[Any, ...] = self._now.function(mix, self._salt(count), *tensors)
        return result

    def begin(self) -> None:
        """Begins a pass, and drops what an earlier, interrupted one has left.

        The first batch may have another form than before; the others must have its
        structure.
        """
        self.take_late()
        self._begins = True

    @property
    def entry(self) -> int | None:
        """The layer whose input depends on no statistics, once traced; None if unknown.

        It is the first one called, unless it is called again.
        """
        first = self.order[0] if self.order else None
        calls = sum(entry.layer == first for entry in self.entries)
        return first if calls == 1 and first not in self.late else None

    def _trace(self, used: Sequence[Any], mix: Any) -> None:
        """Chooses the function for batches of this form, and traces it if it is new."""
        specs = open_specs(used)
        form = repr(specs)
        if form not in self._made:
            # One function for each form: TensorFlow would trace a second form with the
            # differing sizes left open, and the model could not check them.
            structure = tf.nest.map_structure(lambda _: None, used[0])
            function = self._traced(structure)
            concrete = function.get_concrete_function(
                mix, self._salt(0), *tf.nest.flatten(specs)
            )
            memory = bytes_of_example(concrete.graph, tf.nest.flatten(used[0][0]))
            self._made[form] = _Made(structure, function, memory)
            while len(self._made) > FORMS:
                del self._made[next(iter(self._made))]
        self._now = self._made[form]

    def _used(self, group: Sequence[Batch]) -> list[Any]:
        # Few, flat arguments: nested ones would take longer than a small model.
        return [batch if self._loss else batch[:1] for batch in group]

    def _salt(self, count: int) -> Any:
        # Each batch has its own dropout masks, the same ones in each pass.
        return tf.constant(count + 1) if self._dropout else None

    def bytes_of_example(self, batch: Batch, mix: Any) -> float:
        """Bytes that one example more in a batch takes at most at a time."""
        self._trace(self._used([batch] * self._team.replicas), mix)
        return float(self._now.bytes_of_example)

    def take_late(self) -> dict[int, list[Moments]]:
        """Moments from inside loops and branches since the last call, by replica."""
        return {index: self._inputs[index].take_late() for index in self.late}

    def _traced(self, structure: Any) -> Any:
        trace = _Trace()

        inputs = dict(zip(self.layers, self._inputs, strict=True))

        def note(index: int, one: InputMoments, is_unbiased: bool = False) -> None:
            if index not in self.order:
                self.order.append(index)
            if tf.compat.v1.get_default_graph() is trace.graph:
                trace.entries.append(Entry(index, is_unbiased, int(one[0].shape[0])))
                trace.seen.append(one)
            else:
                # Inside a loop or branch tensors cannot leave, variables can.
                self.late.add(index)
                self._inputs[index].add_late(one, is_unbiased, trace.replica)

        def moments(bn: BatchNormLayer) -> Any:
            return lambda x, mask: inputs[bn].moments(x, mask, trace.mixes[bn], note)

        def whole(bn: BatchNormLayer) -> Any:
            return lambda x, mask: inputs[bn].whole(x, mask, trace.mixes[bn], note)

        def on_replica(replica: int, batch: Batch, mix: Any, salt: Any) -> Any:
            trace.graph = tf.compat.v1.get_default_graph()
            sizes = [bn.channels for bn in self.layers]
            mixes = tf.split(mix, sizes, axis=1) if sizes else []
            trace.mixes = dict(zip(self.layers, mixes, strict=True))
            trace.replica = replica
            trace.entries, trace.seen = [], []
            with stateless(self._model, None if salt is None else salt + replica):
                outputs = forward(self._model, batch[0], training=self._dropout)
                losses = tf.zeros(2, tf.float64)
                if self._loss and batch[1] is not None:
                    losses = self._weighted_loss(batch, outputs)
            self.entries = trace.entries
            if not trace.seen:
                return (*(tf.zeros(0),) * 3, losses)
            return (*map(_concat, zip(*trace.seen, strict=True)), losses)

        @tf.function(reduce_retracing=True, autograph=False)
        def traced(mix: Any, salt: Any, *tensors: Any) -> Any:
            size = len(tensors) // self._team.replicas
            batches = [
                tf.nest.pack_sequence_as(structure, tensors[start : start + size])
                for start in range(0, len(tensors), size)
            ]
            with batch_mode(self._model, self.layers, moments, whole):
                results = self._team.run(
                    lambda replica: on_replica(replica, batches[replica], mix, salt)
                )
            return [tf.stack(column) for column in zip(*results, strict=True)]

        return traced

    def _weighted_loss(self, batch: Batch, outputs: Any) -> Any:
        if not self._penalties:
            forget_penalties()
        loss = compute_loss(self._model, batch, outputs)
        weight = tf.cast(tf.shape(tf.nest.flatten(batch[0])[0])[0], tf.float64)
        return tf.stack([tf.cast(loss, tf.float64) * weight, weight])


def _one_example(leaf: Any) -> Any:
    return None if leaf is None else leaf[:1]


def _concat(vectors: Sequence[Any]) -> Any:
    dtypes = {vector.dtype for vector in vectors}
    dtype = tf.float64 if tf.float64 in dtypes else tf.float32
    return tf.concat([tf.cast(vector, dtype) for vector in vectors], axis=0)

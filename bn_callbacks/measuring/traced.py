"""The one traced function: a batch in, the moments of each layer's input out.

All ways to run BN layers share it, since they differ only in numbers: a layer
normalises with the mean `weight·m + mean` and the variance `ratio·v + variance`, where
`m` and `v` are the batch's own. See `Mix`.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.distribution import Team, copies
from bn_callbacks.layers import (
    BatchNormLayer,
    batch_mode,
    compute_loss,
    forget_penalties,
    forward,
    read,
    stateless,
)
from bn_callbacks.measuring.data import Batch, open_specs
from bn_callbacks.measuring.footprint import bytes_of_example
from bn_callbacks.statistics.moments import Moments, Statistics

Seen: TypeAlias = tuple[Any, Any, Any]
"""Counts, means and variances of an input in one batch, as tensors."""

Note: TypeAlias = Callable[..., None]


class Mix(NamedTuple):
    """What layers normalise with: `weight·m + mean` and `ratio·v + variance`.

    Each is an array with the channels of all layers in one row.
    """

    weight: NDArray[np.float64]
    mean: NDArray[np.float64]
    ratio: NDArray[np.float64]
    variance: NDArray[np.float64]

    @classmethod
    def of_batch(cls, channels: int) -> "Mix":
        """The statistics of each batch, as in training."""
        one, zero = np.ones(channels), np.zeros(channels)
        return cls(one, zero, one, zero)

    @classmethod
    def given(cls, statistics: Iterable[Statistics]) -> "Mix":
        """Given statistics, as at inference."""
        mean, variance = _joined(statistics)
        zero = np.zeros(len(mean))
        return cls(zero, mean, zero, variance)

    @classmethod
    def corrected(
        cls, wanted: Iterable[Statistics], seen: Iterable[Statistics]
    ) -> "Mix":
        """The batch's own, corrected as `wanted` corrects `seen`.

        The mean by the difference of the means, the variance by the ratio of the
        variances; where nothing was seen to vary, the wanted variance itself.
        """
        (mean, variance), (old_mean, old_variance) = map(_joined, (wanted, seen))
        varies = old_variance > 0
        ratio = np.divide(variance, old_variance, where=varies, out=np.zeros_like(mean))
        return cls(
            np.ones(len(mean)), mean - old_mean, ratio, np.where(varies, 0.0, variance)
        )

    def applied(self, statistics: Sequence[Statistics]) -> list[Statistics]:
        """What layers normalise with where batches have these statistics."""
        mean, variance = _joined(statistics)
        mean = self.weight * mean + self.mean
        variance = self.ratio * variance + self.variance
        ends = np.cumsum([len(each.mean) for each in statistics])[:-1]
        pairs = zip(np.split(mean, ends), np.split(variance, ends), strict=True)
        return [Statistics(*pair) for pair in pairs]


def _joined(
    statistics: Iterable[Statistics],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pairs = list(statistics)
    if not pairs:
        return np.zeros(0), np.zeros(0)
    means, variances = zip(*pairs, strict=True)
    return np.concatenate(means), np.concatenate(variances)


class Entry(NamedTuple):
    """One call of a layer, in the order of calls.

    Args:
        layer: The number of the layer.
        is_unbiased: Whether its variances are unbiased.
        counts: How many counts it gives: one for all channels, or one for each.
    """

    layer: int
    is_unbiased: bool
    counts: int


class _Made(NamedTuple):
    """A function traced for batches of one form."""

    structure: Any
    function: Any
    graph: Any


FORMS = 4
"""Forms of batches whose functions are kept."""


class _Trace(threading.local):
    """What is being traced for one replica; replicas are traced in threads."""

    graph: Any
    replica: int
    mix: Any
    entries: list[Entry]
    seen: list[Seen]


class Traced:
    """A model's forward pass that also gives the moments of its BN layers' inputs.

    Nothing in the model is written. All but `layers` runs in inference mode.

    Args:
        model: A built Keras model.
        layers: The layers to measure. Other BN layers use what they store.
        team: The replicas to run on.
        dropout: Whether dropout, noise and augmentation layers are active.
        loss: Whether to give the model's loss as well.
        penalties: Whether what layers add to the loss is a part of it.
        is_fast: Whether sums in float32 are precise enough.

    Attributes:
        entries: The calls of the layers, once traced.
        order: The numbers of the layers as they are called first.
        late: Those of layers called inside loops or branches, which tensors cannot
            leave.
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
        ends = np.cumsum([0, *(bn.channels for bn in layers)])
        self._inputs = [
            _Input(bn, index, team.replicas, start, is_fast)
            for index, (bn, start) in enumerate(zip(layers, ends, strict=False))
        ]
        self._begins = True
        self._made: dict[str, _Made] = {}
        self._now: Any = None

    def __call__(self, group: Sequence[Batch], mix: Any, count: int) -> tuple[Any, ...]:
        """Runs a batch on each replica.

        Args:
            group: A batch for each replica; fewer where the data end.
            mix: A `Mix`, as a tensor.
            count: Number of the first batch, from which dropout draws.

        Returns:
            Counts, means and variances of all entries, and the sum and number of the
            losses: tensors of a row for each replica.
        """
        used = self._used(group)
        # A replica for which no batch is left works on an example, for nothing.
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
        """Forgets what a pass before, maybe interrupted, has left.

        The next batch may be of another form, those behind it have its structure.
        """
        self.take_late()
        self._begins = True

    @property
    def entry(self) -> int | None:
        """The layer whose input no statistics reach, once traced; if it is known.

        That is the first one called, unless the data run through it again.
        """
        first = self.order[0] if self.order else None
        calls = sum(entry.layer == first for entry in self.entries)
        return first if calls == 1 and first not in self.late else None

    def _trace(self, used: Sequence[Any], mix: Any) -> None:
        """Traces the function for batches of a form that it has not had yet."""
        specs = open_specs(used)
        form = repr(specs)
        if form not in self._made:
            # A function of its own: to one function's second form TensorFlow would
            # open the sizes that differ, and the model could not check them.
            structure = tf.nest.map_structure(lambda _: None, used[0])
            function = self._traced(structure)
            concrete = function.get_concrete_function(
                mix, self._salt(0), *tf.nest.flatten(specs)
            )
            self._made[form] = _Made(structure, function, concrete.graph)
            while len(self._made) > FORMS:
                del self._made[next(iter(self._made))]
        self._now = self._made[form]

    def _used(self, group: Sequence[Batch]) -> list[Any]:
        # Few and flat arguments: their nesting costs more than a small model.
        return [batch if self._loss else batch[:1] for batch in group]

    def _salt(self, count: int) -> Any:
        # Dropout draws anew for each batch, and the same in each pass.
        return tf.constant(count + 1) if self._dropout else None

    def bytes_of_example(self, batch: Batch, mix: Any) -> float:
        """Memory that one example more in a batch takes at its widest."""
        self._trace(self._used([batch] * self._team.replicas), mix)
        return bytes_of_example(self._now.graph, tf.nest.flatten(batch[0]))

    def take_late(self) -> dict[int, list[Moments]]:
        """What was seen inside loops and branches since the last call, by replica."""
        return {index: self._inputs[index].take_late() for index in self.late}

    def _traced(self, structure: Any) -> Any:
        trace = _Trace()

        inputs = dict(zip(self.layers, self._inputs, strict=True))

        def note(index: int, one: Seen, is_unbiased: bool = False) -> None:
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
            return lambda x, mask: inputs[bn].moments(x, mask, trace.mix, note)

        def whole(bn: BatchNormLayer) -> Any:
            return lambda x, mask: inputs[bn].whole(x, mask, trace.mix, note)

        def on_replica(replica: int, batch: Batch, mix: Any, salt: Any) -> Any:
            trace.graph = tf.compat.v1.get_default_graph()
            trace.replica, trace.mix = replica, mix
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


class _Input:
    """One layer's input: how to look at it, and what to normalise it with."""

    def __init__(
        self, bn: BatchNormLayer, index: int, replicas: int, start: int, is_fast: bool
    ) -> None:
        size = bn.channels
        self.bn = bn
        self._index = index
        self._slice = slice(start, start + size)
        self._is_fast = is_fast
        stored = read([bn])[0].mean
        self._pilot = np.where(np.isfinite(stored), stored, 0.0)
        self._replicas = replicas
        self._sums: list[Any] | None = None

    def _mixed(self, mix: Any, mean: Any, variance: Any, dtype: Any) -> tuple[Any, Any]:
        """Mean and variance to normalise with."""
        weight, shift, ratio, offset = tf.unstack(mix[:, self._slice])
        # NaN in a batch is not to reach what is given.
        mean = tf.math.multiply_no_nan(tf.cast(mean, tf.float64), weight) + shift
        variance = tf.math.multiply_no_nan(tf.cast(variance, tf.float64), ratio)
        variance += offset
        if self.bn.has_floor:
            variance = tf.maximum(variance, self.bn.floor(mean))
        return self.bn.as_read(mean, variance, dtype, is_stored=weight[0] == 0)

    def moments(self, x: Any, mask: Any, mix: Any, note: Note) -> tuple[Any, Any]:
        """Stands in for `layer._moments`: notes, and returns what to normalise with."""
        counts, mean, variance = _moments(x, mask, self.bn.layer.axis, self._is_fast)
        note(self._index, (counts, mean, variance))
        if mask is not None:
            # What is masked entirely has nothing to normalise with.
            mean = tf.where(counts > 0, mean, tf.cast(self._pilot, mean.dtype))
            variance = tf.where(counts > 0, variance, tf.ones_like(variance))
        return self._mixed(mix, mean, variance, x.dtype)

    def whole(self, x: Any, mask: Any, mix: Any, note: Note) -> Any:
        """Output and moments by fused kernels; None where they do not apply."""
        layer = self.bn.layer
        if (
            not self._is_fast
            or mask is not None
            or x.shape.rank != 4
            or layer.axis % 4 != 3
            or x.dtype == tf.float64
            or layer.epsilon < FUSED_MIN_EPSILON
        ):
            return None
        size = self.bn.channels
        x = tf.cast(x, tf.float32)
        gamma = tf.cast(layer.gamma, tf.float32) if layer.scale else tf.ones(size)
        beta = tf.cast(layer.beta, tf.float32) if layer.center else tf.zeros(size)
        fused = tf.compat.v1.nn.fused_batch_norm
        # The kernel returns the unbiased variance; Keras averages the biased one.
        _, mean, unbiased = fused(
            x, gamma, beta, epsilon=layer.epsilon, is_training=True
        )
        count = tf.cast(tf.size(x) // size, tf.float32)
        note(self._index, (count[None], mean, unbiased), is_unbiased=True)
        variance = unbiased * ((count - 1) / tf.maximum(count, 1))
        mean, variance = self._mixed(mix, mean, variance, x.dtype)
        outputs, _, _ = fused(
            x,
            gamma,
            beta,
            mean=mean,
            variance=variance,
            epsilon=layer.epsilon,
            is_training=False,
        )
        return tf.cast(outputs, layer.compute_dtype)

    def add_late(self, seen: Seen, is_unbiased: bool, replica: int) -> None:
        """Pools in the graph, inside a loop or branch."""
        # Σn, Σn(m − p) and Σn(v + (m − p)²) over counts n, means m and variances v,
        # about the pilot mean p.
        if self._sums is None:
            shape = (3, self.bn.channels)
            with tf.init_scope():
                self._sums = [
                    tf.Variable(tf.zeros(shape, tf.float64), trainable=False)
                    for _ in range(self._replicas)
                ]
        counts, mean, variance = (tf.cast(part, tf.float64) for part in seen)
        if is_unbiased:
            variance *= (counts - 1) / tf.maximum(counts, 1)
        shift = mean - self._pilot
        sums = counts * tf.stack(
            [tf.ones_like(shift), shift, variance + tf.square(shift)]
        )
        # The mean of nothing is not a number.
        self._sums[replica].assign_add(tf.where(counts > 0, sums, 0.0))

    def take_late(self) -> list[Moments]:
        """What `add_late` has pooled on each replica since the last call."""
        taken = []
        for sums in self._sums or ():
            # Inside a strategy's scope even this variable has a part on each replica.
            count, first, second = sum(part.numpy() for part in copies(sums))
            sums.assign(tf.zeros_like(sums))
            taken.append(Moments.from_sums(count, self._pilot, first, second))
        return taken


# cuDNN's kernel takes no smaller epsilon; that of a CPU does (measured).
FUSED_MIN_EPSILON = 1.001e-5


def _moments(x: Any, mask: Any, axis: int, is_fast: bool) -> Seen:
    """Number of values, mean and biased variance of each channel.

    The number is one for all channels, unless a mask hides more of some. Two passes
    over the values. Unless it has to be fast, the second also corrects the mean that
    the first has rounded, in float64.
    """
    axis %= x.shape.rank
    axes = [i for i in range(x.shape.rank) if i != axis]
    mean_of: Callable[[Any], Any]
    if mask is None:
        counts = tf.cast(tf.size(x) // tf.maximum(tf.shape(x)[axis], 1), tf.float64)
        counts = counts[None]

        def mean_of(values: Any) -> Any:
            return tf.reduce_mean(values, axes, keepdims=True)

    else:
        keep = tf.broadcast_to(tf.cast(mask, tf.bool)[..., None], tf.shape(x))
        kept_values = tf.reduce_sum(tf.cast(keep, tf.int32), axes, keepdims=True)
        counts = tf.ensure_shape(
            tf.reshape(tf.cast(kept_values, tf.float64), [-1]), [x.shape[axis]]
        )
        divisor = tf.cast(tf.maximum(kept_values, 1), x.dtype)

        def mean_of(values: Any) -> Any:
            kept = tf.where(keep, values, tf.zeros_like(values))
            return tf.reduce_sum(kept, axes, keepdims=True) / divisor

    def flat(values: Any) -> Any:
        return tf.reshape(values, [-1])

    mean = mean_of(x)
    if is_fast:
        return counts, flat(mean), flat(mean_of(tf.math.squared_difference(x, mean)))
    deviation = x - mean
    rest = tf.cast(flat(mean_of(deviation)), tf.float64)
    square = tf.cast(flat(mean_of(tf.square(deviation))), tf.float64)
    exact = tf.cast(flat(mean), tf.float64) + rest
    return counts, exact, tf.maximum(square - tf.square(rest), 0.0)


def _one_example(leaf: Any) -> Any:
    return None if leaf is None else leaf[:1]


def _concat(vectors: Sequence[Any]) -> Any:
    dtypes = {vector.dtype for vector in vectors}
    dtype = tf.float64 if tf.float64 in dtypes else tf.float32
    return tf.concat([tf.cast(vector, dtype) for vector in vectors], axis=0)

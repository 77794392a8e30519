"""One pass over data: the population moments of every BN layer's input."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.distribution import copies
from bn_callbacks.layers import (
    BatchNormLayer,
    batch_mode,
    compute_loss,
    forget_penalties,
    forward,
    read,
    stateless,
    team_of,
)
from bn_callbacks.measuring.data import Batch, Batches, First, fits, open_specs
from bn_callbacks.statistics.moments import Moments, Statistics, pool, pool_batches

Seen: TypeAlias = tuple[Any, Any, Any]
"""Size, means and variances of an input in one batch, as tensors."""

Entries: TypeAlias = list[tuple[BatchNormLayer, bool]]
"""For each call of a layer, in order: the layer, and whether its variances are
unbiased."""

Until: TypeAlias = Callable[[list[Moments]], bool]
Step: TypeAlias = Callable[[Sequence[Batch], Any, int], tuple[Any, ...]]
Note: TypeAlias = Callable[..., None]

# Sums in float32 leave the mean off by up to about 4e-6 of itself (measured), which
# beyond this ratio of mean to σ is no longer small.
FAST_LIMIT = 200.0
# cuDNN's kernel takes no smaller epsilon; that of a CPU does (measured).
FUSED_MIN_EPSILON = 1.001e-5


MAX_PENDING = 16
"""Batches whose results may wait on the device before they are fetched."""


class _Mode(NamedTuple):
    """What is traced: `is_fixed` normalises with given statistics."""

    is_fixed: bool
    is_fast: bool


class _Trace(threading.local):
    """What is being traced for one replica; replicas are traced in threads."""

    graph: Any
    replica: int
    given: Any
    entries: Entries
    seen: list[Seen]


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one pass has measured.

    Args:
        moments: Count, mean and M2 of each layer's input, per channel; a count
            of 0 for a layer that the data never reached.
        loss: Mean loss over the samples, or None where it was not asked for.
        batches: Number of batches read, by all workers.
        samples: Number of samples read.
        own_batches: Number of batches that this worker has read.
        losses: Mean loss and number of samples of each batch that this worker has
            read, `(batches, 2)`.
    """

    moments: list[Moments]
    loss: float | None
    batches: int
    samples: int
    own_batches: int
    losses: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Results:
    """What the traced function returned for some batches, on the host.

    Args:
        numbers: The number of each batch in the data.
        counts: Number of values in all channels, for each batch and entry.
        means: Means of each batch, of all entries in one row.
        variances: The same of the variances.
        losses: Sum and number of the losses of each batch.
        late: What was seen inside loops and branches, of each batch.
    """

    numbers: list[int]
    counts: NDArray[np.float64]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]
    losses: NDArray[np.float64]
    late: dict[BatchNormLayer, list[Moments]]

    def batch(self, index: int) -> "_Results":
        """Those of one batch."""
        one = slice(index, index + 1)
        return _Results(
            self.numbers[one],
            self.counts[one],
            self.means[one],
            self.variances[one],
            self.losses[one],
            {bn: moments[one] for bn, moments in self.late.items()},
        )


class Population:
    """Measures the inputs of BN layers in passes over data.

    BN layers normalise either with the statistics of each batch or with given
    ones; everything else runs in inference mode. Nothing in the model is written.
    The moments of batches are pooled in float64, weighted by the number of elements.
    Each of the two modes is traced once, batches of any size share the trace, and
    results are fetched from the device now and then only.

    In a distribution strategy each replica works on whole batches of its own, so that
    the result is that of a single device. The data of all workers are pooled.

    Args:
        model: A built Keras model.
        layers: The layers to measure. Other BN layers use what they store.
        dropout: Whether dropout, noise and augmentation layers are active.
        loss: Whether to measure the model's loss as well.
        penalties: Whether what layers add to the loss is a part of it.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[BatchNormLayer],
        *,
        dropout: bool = False,
        loss: bool = False,
        penalties: bool = True,
    ) -> None:
        self.layers = list(layers)
        self.team = team_of(model)
        self._model = model
        self._dropout = dropout
        self._loss = loss
        self._penalties = penalties
        ends = np.cumsum([0, *(2 * bn.channels for bn in layers)])
        self._inputs = {
            bn: _Input(bn, self.team.replicas, start)
            for bn, start in zip(layers, ends, strict=False)
        }
        self._order: list[BatchNormLayer] = []
        self._late: set[BatchNormLayer] = set()
        self._steps: dict[_Mode, tuple[Step, Entries]] = {}
        self._entries: Entries = []
        self._is_fast = True

    def measure(
        self,
        batches: Batches | First,
        statistics: Sequence[Statistics] | None = None,
        *,
        until: Callable[[], Until] | None = None,
        target: int | None = None,
        verbose: int = 0,
    ) -> Measurement:
        """Reads the batches once; all workers do, and get the same measurement.

        Args:
            batches: The data, which are read twice if their mean is far from 0.
            statistics: What each layer normalises with; `None` for the statistics
                of each batch.
            until: Makes a function that gets the moments of each batch, and ends
                the pass by returning True (on all workers).
            target: Number of batches to come, for the progress bar.
            verbose: 0 is silent, 1 shows a progress bar.

        Returns:
            The measurement.

        Raises:
            ValueError: The data do not fit the model, or the input of a layer is
                not finite in some batch. With given statistics, which may be what
                makes activations overflow, only if no statistics reach that input;
                the moments are not finite otherwise.
            RuntimeError: Another worker has failed.
        """
        result = self._pass(batches, statistics, until, target, verbose)
        if self._is_fast and self._is_inexact(result.moments):
            self._is_fast = False
            result = self._pass(batches, statistics, until, target, verbose)
        return result

    def share(self, batches: Batches) -> None:
        """Divides data among the workers, if they have all been given the same.

        They have if their first batches are equal, bit for bit. Otherwise each is
        taken to have been given its own share.
        """
        if self.team.workers > 1:
            with self.team.agreed():
                own = batches.checksum()
            sums = self.team.gather(np.array([own]))
            if (sums == sums[0]).all():
                batches.share(self.team.worker, self.team.workers)

    def _pass(
        self,
        batches: Batches | First,
        statistics: Sequence[Statistics] | None,
        until: Callable[[], Until] | None,
        target: int | None,
        verbose: int,
    ) -> Measurement:
        for bn in self._late:  # What a pass that was interrupted has left.
            self._inputs[bn].take_late()
        is_fixed = statistics is not None
        step = self._step(_Mode(is_fixed, self._is_fast))
        given = tf.constant(np.concatenate([*itertools.chain(*statistics or ()), []]))
        bar = keras.utils.Progbar(target, verbose=1) if verbose else None
        is_enough = until() if until is not None else None
        pooled = [Moments.empty(bn.channels) for bn in self.layers]
        losses: list[NDArray[np.float64]] = []
        source = iter(batches)
        count = samples = 0

        def take(pending: list[tuple[list[int], tuple[Any, ...]]]) -> bool:
            """Pools what is pending; whether it is enough."""
            nonlocal pooled
            if not pending:
                return False
            results = self._fetch(pending)
            pending.clear()
            each = [results]
            if is_enough is not None:
                each = [results.batch(index) for index in range(len(results.numbers))]
            for one in each:
                new = self._moments(one, is_fixed)
                pooled = [
                    old.merge(part) for old, part in zip(pooled, new, strict=True)
                ]
                losses.append(one.losses)
                if is_enough is not None and is_enough(new):
                    return True
            return False

        def work() -> tuple[bool, bool]:
            """Reads some batches; whether they were the last, and whether enough."""
            nonlocal count, samples
            pending: list[tuple[list[int], tuple[Any, ...]]] = []
            for _ in range(MAX_PENDING):
                group = list(itertools.islice(source, self.team.replicas))
                if not group:
                    return True, take(pending)
                numbers = [batches.number(count + i) for i in range(len(group))]
                with fits(self._model.name, group[0][0], numbers[0]):
                    pending.append((numbers, step(group, given, count)))
                count += len(group)
                samples += sum(_samples(batch[0]) for batch in group)
                if bar is not None:
                    bar.update(count)
                if (is_enough is not None or self._late) and take(pending):
                    return False, True
            return False, take(pending)

        while True:
            with self.team.agreed():
                ended, enough = work()
            if self.team.everywhere(ended or enough):
                break
        if bar is not None and count != target:
            bar.update(count, finalize=True)
        each = np.concatenate([np.zeros((0, 2)), *losses])
        rows = self.team.gather(_flat([count, samples, *each.sum(axis=0)], pooled))
        each[:, 0] /= np.where(each[:, 1], each[:, 1], 1.0)
        return _measurement(rows, self.layers, count, each)

    def _fetch(self, pending: list[tuple[list[int], tuple[Any, ...]]]) -> _Results:
        """Awaits the results of some steps, without those of idle replicas."""
        numbers = [number for group, _ in pending for number in group]
        places = range(self.team.replicas)
        is_real = [place < len(group) for group, _ in pending for place in places]
        counts, means, variances, losses = (
            np.concatenate([np.asarray(part, np.float64) for part in column])[is_real]
            for column in zip(*(result for _, result in pending), strict=True)
        )
        late = {bn: self._inputs[bn].take_late()[: len(numbers)] for bn in self._late}
        return _Results(numbers, counts, means, variances, losses, late)

    def _moments(self, results: _Results, is_fixed: bool) -> list[Moments]:
        """Moments of each layer over some batches.

        Raises:
            ValueError: Something in them is not finite.
        """
        bad: dict[BatchNormLayer, int] = {}
        parts = {bn: [Moments.empty(bn.channels)] for bn in self.layers}

        def add(bn: BatchNormLayer, moments: Moments, is_bad: Any) -> None:
            parts[bn].append(moments)
            if np.any(is_bad):
                first = results.numbers[int(np.argmax(is_bad))]
                bad[bn] = min(first, bad.get(bn, first))

        for bn, late in results.late.items():
            add(bn, pool(late), [not np.isfinite(one.m2).all() for one in late])
        start = 0
        for index, (bn, is_unbiased) in enumerate(self._entries):
            end = start + bn.channels
            n = results.counts[:, index] / bn.channels
            mean, variance = (
                results.means[:, start:end],
                results.variances[:, start:end],
            )
            start = end
            if is_unbiased:
                variance = variance * ((n - 1) / np.maximum(n, 1))[:, None]
            is_bad = ~np.isfinite(mean + variance).all(axis=1) & (n > 0)
            add(bn, pool_batches(n, mean, variance), is_bad)
        self._raise_bad(bad, is_fixed)
        return [pool(parts[bn]) for bn in self.layers]

    def _raise_bad(self, bad: dict[BatchNormLayer, int], is_fixed: bool) -> None:
        if not bad:
            return
        # The layers behind are poisoned by the first in the same batch.
        index = min(bad.values())
        first = next(bn for bn in self._order if bad.get(bn) == index)
        if not is_fixed or first is self.entry:
            raise ValueError(
                f"The input of {first.path} is not finite. Received: NaN or infinity "
                f"in batch {index} of the data (counted from 0). Remove it from the "
                "data, or look for an overflow in the layers before."
            )

    @property
    def entry(self) -> BatchNormLayer | None:
        """The layer whose input no statistics reach, after a pass; if it is known.

        That is the first one called, unless the data run through it again.
        """
        first = self._order[0] if self._order else None
        calls = sum(bn is first for bn, _ in self._entries)
        return first if calls == 1 and first not in self._late else None

    @property
    def has_repeats(self) -> bool:
        """Whether some layer is called more than once, after a pass."""
        return bool(self._late) or len({bn for bn, _ in self._entries}) < len(
            self._entries
        )

    def _step(self, mode: _Mode) -> Step:
        if mode not in self._steps:
            self._steps[mode] = self._make_step(mode)
        step, self._entries = self._steps[mode]
        return step

    def _make_step(self, mode: _Mode) -> tuple[Step, Entries]:
        structure: Any = None
        entries: Entries = []
        trace = _Trace()

        def note(bn: BatchNormLayer, one: Seen, is_unbiased: bool = False) -> None:
            if bn not in self._order:
                self._order.append(bn)
            if tf.compat.v1.get_default_graph() is trace.graph:
                trace.entries.append((bn, is_unbiased))
                trace.seen.append(one)
            else:
                # Inside a loop or branch tensors cannot leave, variables can.
                self._late.add(bn)
                self._inputs[bn].add_late(one, is_unbiased, trace.replica)

        def moments(bn: BatchNormLayer) -> Any:
            return lambda x, mask: self._inputs[bn].moments(
                x, mask, mode.is_fast, trace.given, note
            )

        def whole(bn: BatchNormLayer) -> Any:
            return lambda x, mask: self._inputs[bn].whole(x, mask, trace.given, note)

        def on_replica(replica: int, batch: Batch, given: Any, salt: Any) -> Any:
            trace.graph = tf.compat.v1.get_default_graph()
            trace.replica, trace.given = replica, given if mode.is_fixed else None
            trace.entries, trace.seen = [], []
            with stateless(self._model, None if salt is None else salt + replica):
                outputs = forward(self._model, batch[0], training=self._dropout)
                losses = tf.zeros(2, tf.float64)
                if self._loss and batch[1] is not None:
                    losses = self._weighted_loss(batch, outputs)
            entries[:] = trace.entries
            if not trace.seen:
                return (*(tf.zeros(0),) * 3, losses)
            counts, means, variances = zip(*trace.seen, strict=True)
            return tf.stack(counts), _concat(means), _concat(variances), losses

        @tf.function(reduce_retracing=True, autograph=False)
        def traced(given: Any, salt: Any, *tensors: Any) -> Any:
            size = len(tensors) // self.team.replicas
            batches = [
                tf.nest.pack_sequence_as(structure, tensors[start : start + size])
                for start in range(0, len(tensors), size)
            ]
            fast = whole if mode.is_fast else None
            with batch_mode(self._model, self.layers, moments, fast):
                results = self.team.run(
                    lambda replica: on_replica(replica, batches[replica], given, salt)
                )
            return [tf.stack(column) for column in zip(*results, strict=True)]

        def step(group: Sequence[Batch], given: Any, count: int) -> tuple[Any, ...]:
            nonlocal structure
            # Few and flat arguments: their nesting costs more than a small model.
            used = [batch if self._loss else batch[:1] for batch in group]
            # A replica for which no batch is left works on another's, for nothing.
            used += used[:1] * (self.team.replicas - len(used))
            tensors = [tensor for batch in used for tensor in tf.nest.flatten(batch)]
            # Dropout draws anew for each batch, and the same in each pass.
            salt = tf.constant(count + 1) if self._dropout else None
            if structure is None:
                structure = tf.nest.map_structure(lambda _: None, used[0])
                traced.get_concrete_function(given, salt, *open_specs(tensors))
            for batch in used:
                tf.nest.assert_same_structure(structure, batch)
            result: tuple[Any, ...] = traced(given, salt, *tensors)
            return result

        return step, entries

    def _weighted_loss(self, batch: Batch, outputs: Any) -> Any:
        if not self._penalties:
            forget_penalties()
        loss = compute_loss(self._model, batch, outputs)
        weight = tf.cast(tf.shape(tf.nest.flatten(batch[0])[0])[0], tf.float64)
        return tf.stack([tf.cast(loss, tf.float64) * weight, weight])

    def _is_inexact(self, measured: list[Moments]) -> bool:
        for bn, moments in zip(self.layers, measured, strict=True):
            if moments.count:
                with np.errstate(invalid="ignore"):
                    ratio = moments.mean / np.sqrt(moments.variance + bn.epsilon)
                if np.max(np.abs(ratio), initial=0) > FAST_LIMIT:
                    return True
        return False


class _Input:
    """One layer's input: what to normalise it with, and how to look at it."""

    def __init__(self, bn: BatchNormLayer, replicas: int, start: int) -> None:
        size = bn.channels
        self.bn = bn
        self._slices = slice(start, start + size), slice(start + size, start + 2 * size)
        stored = read([bn])[0].mean
        self._pilot = np.where(np.isfinite(stored), stored, 0.0)
        # What is seen inside loops and branches: Σn, Σn(m − p) and Σn(v + (m − p)²)
        # over counts n, means m and variances v, about the pilot mean p.
        self._sums = [
            tf.Variable(tf.zeros(1 + 2 * size, tf.float64), trainable=False)
            for _ in range(replicas)
        ]

    def _given(self, given: Any, dtype: Any) -> tuple[Any, Any]:
        """Mean and variance to normalise with, out of those given for all layers."""
        mean, variance = (given[part] for part in self._slices)
        return self.bn.as_read(mean, variance, dtype)

    def moments(
        self, x: Any, mask: Any, is_fast: bool, given: Any, note: Note
    ) -> tuple[Any, Any]:
        """Stands in for `layer._moments`: notes, and returns what to normalise with."""
        size, mean, variance = _moments(x, mask, self.bn.layer.axis, is_fast)
        note(self.bn, (size, mean, variance))
        if given is not None:
            return self._given(given, x.dtype)
        if mask is not None:
            # A batch that is masked entirely has nothing to normalise with.
            mean = tf.where(size > 0, mean, tf.cast(self._pilot, mean.dtype))
            variance = tf.where(size > 0, variance, tf.ones_like(variance))
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)

    def whole(self, x: Any, mask: Any, given: Any, note: Note) -> Any:
        """Output and moments in one kernel; None where the kernel does not apply."""
        layer = self.bn.layer
        if (
            mask is not None
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
        # The kernel returns the unbiased variance; Keras averages the biased one.
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            x, gamma, beta, epsilon=layer.epsilon, is_training=True
        )
        note(self.bn, (tf.size(x), mean, variance), is_unbiased=True)
        if given is not None:
            mean, variance = self._given(given, x.dtype)
            scale = gamma * tf.math.rsqrt(variance + layer.epsilon)
            outputs = x * scale + (beta - mean * scale)
        return tf.cast(outputs, layer.compute_dtype)

    def add_late(self, seen: Seen, is_unbiased: bool, replica: int) -> None:
        """Pools in the graph, inside a loop or branch."""
        size, mean, variance = seen
        count = tf.cast(size, tf.float64) / self.bn.channels
        variance = tf.cast(variance, tf.float64)
        if is_unbiased:
            variance *= (count - 1) / tf.maximum(count, 1)
        shift = tf.cast(mean, tf.float64) - self._pilot
        sums = count * tf.concat([[1.0], shift, variance + tf.square(shift)], axis=0)
        # The mean of nothing is not a number.
        sums = tf.where(count > 0, sums, 0.0)
        self._sums[replica].assign_add(sums)

    def take_late(self) -> list[Moments]:
        """What `add_late` has pooled on each replica since the last call."""
        taken = []
        for sums in self._sums:
            # Inside a strategy's scope even this variable has a part on each replica.
            count, *rest = sum(part.numpy() for part in copies(sums))
            sums.assign(tf.zeros_like(sums))
            first, second = np.reshape(rest, (2, -1))
            taken.append(Moments.from_sums(float(count), self._pilot, first, second))
        return taken


def _moments(x: Any, mask: Any, axis: int, is_fast: bool) -> Seen:
    """Number of values in all channels, and mean and biased variance of each.

    Two passes over the values. Unless it has to be fast, the second also corrects
    the mean that the first has rounded, in float64.
    """
    axis %= x.shape.rank
    axes = [i for i in range(x.shape.rank) if i != axis]
    size = tf.size(x)
    mean_of: Callable[[Any], Any]
    if mask is None:

        def mean_of(values: Any) -> Any:
            return tf.reduce_mean(values, axes, keepdims=True)

    else:
        keep = tf.broadcast_to(tf.cast(mask, tf.bool)[..., None], tf.shape(x))
        size = tf.reduce_sum(tf.cast(keep, tf.int32))
        count = tf.cast(tf.maximum(size // x.shape[axis], 1), x.dtype)

        def mean_of(values: Any) -> Any:
            kept = tf.where(keep, values, tf.zeros_like(values))
            return tf.reduce_sum(kept, axes, keepdims=True) / count

    def flat(values: Any) -> Any:
        return tf.reshape(values, [-1])

    mean = mean_of(x)
    if is_fast:
        return size, flat(mean), flat(mean_of(tf.math.squared_difference(x, mean)))
    deviation = x - mean
    rest = tf.cast(flat(mean_of(deviation)), tf.float64)
    square = tf.cast(flat(mean_of(tf.square(deviation))), tf.float64)
    exact = tf.cast(flat(mean), tf.float64) + rest
    return size, exact, tf.maximum(square - tf.square(rest), 0.0)


def _concat(vectors: Sequence[Any]) -> Any:
    dtypes = {vector.dtype for vector in vectors}
    dtype = tf.float64 if tf.float64 in dtypes else tf.float32
    return tf.concat([tf.cast(vector, dtype) for vector in vectors], axis=0)


def _samples(inputs: Any) -> int:
    return int(tf.nest.flatten(inputs)[0].shape[0] or 0)


def _flat(own: Sequence[float], moments: Sequence[Moments]) -> NDArray[np.float64]:
    """What a worker tells the others of its part of a pass."""
    parts = [(np.array([one.count]), one.mean, one.m2) for one in moments]
    return np.concatenate([np.asarray(own), *itertools.chain(*parts)])


def _measurement(
    rows: NDArray[np.float64],
    layers: Sequence[BatchNormLayer],
    own_batches: int,
    losses: NDArray[np.float64],
) -> Measurement:
    """Pools what all workers have told, which gives the same on each of them."""
    batches, samples, loss, weight = rows[:, :4].sum(axis=0)
    moments, start = [], 4
    for bn in layers:
        mean, m2 = start + 1, start + 1 + bn.channels
        end = m2 + bn.channels
        moments.append(
            pool(Moments(row[start], row[mean:m2], row[m2:end]) for row in rows)
        )
        start = end
    return Measurement(
        moments=moments,
        loss=float(loss / weight) if weight else None,
        batches=int(batches),
        samples=int(samples),
        own_batches=own_batches,
        losses=losses,
    )

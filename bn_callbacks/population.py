"""One pass over data: the population moments of every BN layer's input."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from bn_callbacks.data import Batch, fits, open_specs
from bn_callbacks.layers import (
    BatchNormLayer,
    batch_mode,
    compute_loss,
    forward,
    read,
    stateless,
)
from bn_callbacks.statistics.moments import Moments, Statistics, pool, pool_batches

Seen: TypeAlias = tuple[Any, Any, Any]
"""Size, means and variances of an input in one batch, as tensors."""

Entries: TypeAlias = list[tuple[BatchNormLayer, bool]]
"""For each call of a layer, in order: the layer, and whether its variances are
unbiased."""

Until: TypeAlias = Callable[[list[Moments]], bool]
Step: TypeAlias = Callable[[Batch], Seen]
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


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one pass has measured.

    Args:
        moments: Count, mean and M2 of each layer's input, per channel; a count
            of 0 for a layer that the data never reached.
        loss: Mean loss over the samples, or None where it was not asked for.
        batches: Number of batches read.
        samples: Number of samples read.
    """

    moments: list[Moments]
    loss: float | None
    batches: int
    samples: int


class Population:
    """Measures the inputs of BN layers in passes over data.

    BN layers normalise either with the statistics of each batch or with given
    ones; everything else runs in inference mode. Nothing in the model is written.
    The moments of batches are pooled in float64, weighted by the number of elements.
    Each of the two modes is traced once, batches of any size share the trace, and
    results are fetched from the device now and then only.

    Args:
        model: A built Keras model.
        layers: The layers to measure. Other BN layers use what they store.
        dropout: Whether dropout, noise and augmentation layers are active.
        loss: Whether to measure the model's loss as well.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[BatchNormLayer],
        *,
        dropout: bool = False,
        loss: bool = False,
    ) -> None:
        self.layers = list(layers)
        self._model = model
        self._dropout = dropout
        self._loss = loss
        self._inputs = {bn: _Input(bn) for bn in layers}
        self._order: list[BatchNormLayer] = []
        self._late: set[BatchNormLayer] = set()
        self._loss_sums = tf.Variable(tf.zeros(2, tf.float64), trainable=False)
        self._draws = tf.Variable(0, trainable=False)
        self._steps: dict[_Mode, tuple[Step, Entries]] = {}
        self._entries: Entries = []
        self._is_fast = True

    def measure(
        self,
        batches: Iterable[Batch],
        statistics: Sequence[Statistics] | None = None,
        *,
        until: Callable[[], Until] | None = None,
        target: int | None = None,
        verbose: int = 0,
    ) -> Measurement:
        """Reads the batches once.

        Args:
            batches: Batches as `Batches` gives them; something that can be read
                again, since data with a mean far from 0 are read twice.
            statistics: What each layer normalises with; `None` for the statistics
                of each batch.
            until: Makes a function that gets the moments of each batch, and ends
                the pass by returning True.
            target: Number of batches to come, for the progress bar.
            verbose: 0 is silent, 1 shows a progress bar.

        Returns:
            The measurement.

        Raises:
            ValueError: The data do not fit the model, or the input of a layer is
                not finite in some batch. With given statistics, which may be what
                makes activations overflow, only if no statistics reach that input;
                the moments are not finite otherwise.
        """
        result = self._pass(batches, statistics, until, target, verbose)
        if self._is_fast and self._is_inexact(result.moments):
            self._is_fast = False
            result = self._pass(batches, statistics, until, target, verbose)
        return result

    def _pass(
        self,
        batches: Iterable[Batch],
        statistics: Sequence[Statistics] | None,
        until: Callable[[], Until] | None,
        target: int | None,
        verbose: int,
    ) -> Measurement:
        self._loss_sums.assign(tf.zeros(2, tf.float64))
        # Dropout draws anew for each batch, and the same in each pass.
        self._draws.assign(0)
        for bn in self._late:  # What a pass that was interrupted has left.
            self._inputs[bn].take_late()
        if statistics is not None:
            for bn, given in zip(self.layers, statistics, strict=True):
                self._inputs[bn].use(given)
        step = self._step(_Mode(statistics is not None, self._is_fast))
        bar = keras.utils.Progbar(target, verbose=1) if verbose else None
        is_enough = until() if until is not None else None
        pooled = [Moments.empty(bn.channels) for bn in self.layers]
        pending: list[Seen] = []
        count = samples = 0
        for batch in batches:
            with fits(self._model.name, batch[0], count):
                pending.append(step(batch))
            count += 1
            samples += _samples(batch[0])
            if bar is not None:
                bar.update(count)
            if is_enough or self._late or len(pending) == MAX_PENDING:
                new = self._fetch(pending, count, statistics is not None)
                pooled = [old.merge(one) for old, one in zip(pooled, new, strict=True)]
                pending.clear()
                if is_enough is not None and is_enough(new):
                    break
        new = self._fetch(pending, count, statistics is not None)
        pooled = [old.merge(one) for old, one in zip(pooled, new, strict=True)]
        if bar is not None and count != target:
            bar.update(count, finalize=True)
        total, weight = self._loss_sums.numpy()
        return Measurement(
            moments=pooled,
            loss=float(total / weight) if weight else None,
            batches=count,
            samples=samples,
        )

    def _fetch(
        self, pending: Sequence[Seen], count: int, is_fixed: bool
    ) -> list[Moments]:
        """Moments of each layer over the last batches, which are thereby awaited.

        Args:
            pending: What the traced function returned for each of them.
            count: Number of batches so far.
            is_fixed: Whether layers normalise with given statistics.

        Raises:
            ValueError: Something in them is not finite.
        """
        bad: dict[BatchNormLayer, int] = {}
        parts = {bn: [Moments.empty(bn.channels)] for bn in self.layers}
        for bn in self._late:
            parts[bn].append(self._inputs[bn].take_late())
            if not np.isfinite(parts[bn][-1].m2).all():
                bad[bn] = count - 1
        if pending and self._entries:
            counts, means, variances = (
                np.stack([part.numpy() for part in column]).astype(np.float64)
                for column in zip(*pending, strict=True)
            )
            start = 0
            for index, (bn, is_unbiased) in enumerate(self._entries):
                end = start + bn.channels
                n = counts[:, index] / bn.channels
                mean, variance = means[:, start:end], variances[:, start:end]
                start = end
                if is_unbiased:
                    variance = variance * ((n - 1) / np.maximum(n, 1))[:, None]
                is_bad = ~np.isfinite(mean + variance).all(axis=1) & (n > 0)
                if is_bad.any():
                    first = count - len(pending) + int(np.argmax(is_bad))
                    bad[bn] = min(first, bad.get(bn, first))
                parts[bn].append(pool_batches(n, mean, variance))
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

    def _step(self, mode: _Mode) -> Step:
        if mode not in self._steps:
            self._steps[mode] = self._make_step(mode)
        step, self._entries = self._steps[mode]
        return step

    def _make_step(self, mode: _Mode) -> tuple[Step, Entries]:
        graph: Any = None
        structure: Any = None
        entries: Entries = []
        seen: list[Seen] = []

        def note(bn: BatchNormLayer, one: Seen, is_unbiased: bool = False) -> None:
            if bn not in self._order:
                self._order.append(bn)
            if tf.compat.v1.get_default_graph() is graph:
                entries.append((bn, is_unbiased))
                seen.append(one)
            else:
                # Inside a loop or branch tensors cannot leave, variables can.
                self._late.add(bn)
                self._inputs[bn].add_late(one, is_unbiased)

        def moments(bn: BatchNormLayer) -> Any:
            return lambda x, mask: self._inputs[bn].moments(x, mask, mode, note)

        def whole(bn: BatchNormLayer) -> Any:
            return lambda x, mask: self._inputs[bn].whole(x, mask, mode, note)

        @tf.function(reduce_retracing=True, autograph=False)
        def traced(*tensors: Any) -> Any:
            nonlocal graph
            graph = tf.compat.v1.get_default_graph()
            batch = tf.nest.pack_sequence_as(structure, tensors)
            entries.clear()
            seen.clear()
            salt = self._draws.assign_add(1) if self._dropout else None
            with stateless(self._model, salt):
                fast = whole if mode.is_fast else None
                with batch_mode(self._model, self.layers, moments, fast):
                    outputs = forward(self._model, batch[0], training=self._dropout)
                if self._loss and batch[1] is not None:
                    self._add_loss(batch, outputs)
            if not seen:
                return (tf.zeros(0),) * 3
            counts, means, variances = zip(*seen, strict=True)
            return tf.stack(counts), _concat(means), _concat(variances)

        def step(batch: Batch) -> Seen:
            nonlocal structure
            # Few and flat arguments: their nesting costs more than a small model.
            used = batch if self._loss else batch[:1]
            tensors = tf.nest.flatten(used)
            if structure is None:
                structure = tf.nest.map_structure(lambda _: None, used)
                traced.get_concrete_function(*open_specs(tensors))
            tf.nest.assert_same_structure(structure, used)
            result: Seen = traced(*tensors)
            return result

        return step, entries

    def _add_loss(self, batch: Batch, outputs: Any) -> None:
        loss = compute_loss(self._model, batch, outputs)
        weight = tf.cast(tf.shape(tf.nest.flatten(batch[0])[0])[0], tf.float64)
        self._loss_sums.assign_add(
            tf.stack([tf.cast(loss, tf.float64) * weight, weight])
        )

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

    def __init__(self, bn: BatchNormLayer) -> None:
        size = bn.channels
        self.bn = bn
        self._mean = tf.Variable(tf.zeros(size, tf.float64), trainable=False)
        self._variance = tf.Variable(tf.ones(size, tf.float64), trainable=False)
        stored = read([bn])[0].mean
        pilot = np.where(np.isfinite(stored), stored, 0.0)
        self._pilot = tf.Variable(pilot, trainable=False)
        # What is seen inside loops and branches: Σn, Σn(m − p) and Σn(v + (m − p)²)
        # over counts n, means m and variances v, about the pilot mean p.
        self._sums = tf.Variable(tf.zeros(1 + 2 * size, tf.float64), trainable=False)

    def use(self, statistics: Statistics) -> None:
        """Sets the statistics to normalise with."""
        self._mean.assign(statistics.mean)
        self._variance.assign(statistics.variance)

    def moments(self, x: Any, mask: Any, mode: _Mode, note: Note) -> tuple[Any, Any]:
        """Stands in for `layer._moments`: notes, and returns what to normalise with."""
        size, mean, variance = _moments(x, mask, self.bn.layer.axis, mode.is_fast)
        note(self.bn, (size, mean, variance))
        if mode.is_fixed:
            return self.bn.as_read(self._mean, self._variance, x.dtype)
        if mask is not None:
            # A batch that is masked entirely has nothing to normalise with.
            mean = tf.where(size > 0, mean, tf.cast(self._pilot, mean.dtype))
            variance = tf.where(size > 0, variance, tf.ones_like(variance))
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)

    def whole(self, x: Any, mask: Any, mode: _Mode, note: Note) -> Any:
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
        if mode.is_fixed:
            mean, variance = self.bn.as_read(self._mean, self._variance, x.dtype)
            scale = gamma * tf.math.rsqrt(variance + layer.epsilon)
            outputs = x * scale + (beta - mean * scale)
        return tf.cast(outputs, layer.compute_dtype)

    def add_late(self, seen: Seen, is_unbiased: bool) -> None:
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
        self._sums.assign_add(sums)

    def take_late(self) -> Moments:
        """What `add_late` has pooled since the last call."""
        sums = self._sums.numpy()
        self._sums.assign(np.zeros_like(sums))
        first, second = sums[1:].reshape(2, -1)
        return Moments.from_sums(float(sums[0]), self._pilot.numpy(), first, second)


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

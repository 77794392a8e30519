"""One pass over data: the population moments of every BN layer's input."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from bn_callbacks.data import Batch, fits, open_specs
from bn_callbacks.layers import BatchNormLayer, batch_mode, forward, read
from bn_callbacks.statistics.moments import Moments, Statistics

Step: TypeAlias = Callable[[int, Batch], None]

# The fused kernel sums in float32: its mean is off by up to about 4e-6 of the
# mean itself (measured), which beyond this ratio of mean to σ is no longer small.
FUSED_MEAN_LIMIT = 200.0
# `fused_batch_norm` silently raises smaller epsilons to this one.
FUSED_MIN_EPSILON = 1.001e-5


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
    ones; everything else runs in inference mode. Nothing in the model is
    written: sums are pooled in variables of this object, in float64, weighted
    by the number of elements. Each of the two modes is traced once, and batches
    of any size share the trace.

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
        self._model = model
        self._dropout = dropout
        self._loss = loss
        self._pools = {bn: _Pool(bn) for bn in layers}
        self._order: list[_Pool] = []
        self.layers = list(layers)
        self._loss_sums = tf.Variable(tf.zeros(2, tf.float64), trainable=False)
        self._steps: dict[tuple[bool, bool], Step] = {}
        self._fused = True

    def measure(
        self,
        batches: Iterable[Batch],
        statistics: Sequence[Statistics] | None = None,
        *,
        target: int | None = None,
        verbose: int = 0,
    ) -> Measurement:
        """Reads the batches once.

        Args:
            batches: Batches as `Batches` gives them; a `list` or a `Batches`, since
                a second reading may be needed.
            statistics: What each layer normalises with; `None` for the statistics
                of each batch.
            target: Number of batches to come, for the progress bar.
            verbose: 0 is silent, 1 shows a progress bar.

        Returns:
            The measurement.

        Raises:
            ValueError: The data do not fit the model, or the input of a layer is
                not finite in some batch.
        """
        result = self._pass(batches, statistics, target, verbose)
        if self._fused and self._is_inexact(result):
            self._fused = False
            result = self._pass(batches, statistics, target, verbose)
        return result

    def _pass(
        self,
        batches: Iterable[Batch],
        statistics: Sequence[Statistics] | None,
        target: int | None,
        verbose: int,
    ) -> Measurement:
        self._loss_sums.assign(tf.zeros(2, tf.float64))
        given = statistics or read([pool.bn for pool in self._pools.values()])
        for pool, values in zip(self._pools.values(), given, strict=True):
            pool.reset(values)
        step = self._step(is_fixed=statistics is not None)
        bar = keras.utils.Progbar(target, verbose=1) if verbose else None
        count = samples = 0
        for batch in batches:
            with fits(self._model.name, batch[0], count):
                step(count, batch)
            count += 1
            samples += _samples(batch[0])
            if bar is not None:
                bar.update(count)
        if bar is not None and target is None:
            bar.update(count, finalize=True)
        self._check_finite()
        total, weight = self._loss_sums.numpy()
        return Measurement(
            moments=[pool.pooled() for pool in self._pools.values()],
            loss=float(total / weight) if weight else None,
            batches=count,
            samples=samples,
        )

    def _step(self, is_fixed: bool) -> Step:
        """The traced function of one mode; its batch size is left open."""
        key = (is_fixed, self._fused)
        if key not in self._steps:
            self._steps[key] = self._make_step(is_fixed, self._fused)
        return self._steps[key]

    def _make_step(self, is_fixed: bool, use_fused: bool) -> Step:
        index: Any = None

        def moments(bn: BatchNormLayer) -> Any:
            return lambda x, mask: self._called(bn).moments(x, mask, index, is_fixed)

        def fused(bn: BatchNormLayer) -> Any:
            return lambda x, mask: self._called(bn).fused(x, mask, index, is_fixed)

        @tf.function(reduce_retracing=True, autograph=False)
        def traced(batch_index: Any, batch: Batch) -> None:
            nonlocal index
            index = batch_index
            with batch_mode(list(self._pools), moments, fused if use_fused else None):
                outputs = forward(self._model, batch[0], training=self._dropout)
            if self._loss and batch[1] is not None:
                self._add_loss(batch, outputs)

        def step(count: int, batch: Batch) -> None:
            if count == 0:
                specs = open_specs(batch)
                traced.get_concrete_function(tf.TensorSpec([], tf.int32), specs)
            traced(tf.constant(count), batch)

        return step

    def _called(self, bn: BatchNormLayer) -> "_Pool":
        pool = self._pools[bn]
        if pool not in self._order:
            self._order.append(pool)
        return pool

    def _add_loss(self, batch: Batch, outputs: Any) -> None:
        x, y, sample_weight = batch
        with keras.StatelessScope():
            loss = self._model.compute_loss(
                x=x, y=y, y_pred=outputs, sample_weight=sample_weight
            )
        weight = tf.cast(tf.shape(tf.nest.flatten(x)[0])[0], tf.float64)
        self._loss_sums.assign_add(
            tf.stack([tf.cast(loss, tf.float64) * weight, weight])
        )

    def _check_finite(self) -> None:
        bad = {pool: int(pool.first_bad) for pool in self._order}
        indices = [index for index in bad.values() if index >= 0]
        if indices:
            # The layers behind are poisoned by the first in the same batch.
            pool = next(pool for pool in self._order if bad[pool] == min(indices))
            raise ValueError(
                f"The input of {pool.bn.path} is not finite. Received: NaN or "
                f"infinity in batch {min(indices)} of the data (counted from 0). "
                "Remove it from the data, or look for an overflow in the layers "
                "before."
            )

    def _is_inexact(self, result: Measurement) -> bool:
        for pool, moments in zip(self._pools.values(), result.moments, strict=True):
            if pool.used_fused and moments.count:
                sigma = np.sqrt(moments.variance + pool.bn.epsilon)
                if np.max(np.abs(moments.mean) / sigma, initial=0) > FUSED_MEAN_LIMIT:
                    return True
        return False


class _Pool:
    """Sums over one layer's inputs, and the hooks that feed them.

    The sums are shifted by a pilot mean, Σn(m − p) and Σn(v + (m − p)²) over
    the batches' means m and variances v, so that they do not cancel.
    """

    def __init__(self, bn: BatchNormLayer) -> None:
        self.bn = bn
        self.used_fused = False
        size = bn.channels
        self._sums = tf.Variable(tf.zeros(2 * size + 1, tf.float64), trainable=False)
        self._mean = tf.Variable(tf.zeros(size, tf.float64), trainable=False)
        self._variance = tf.Variable(tf.ones(size, tf.float64), trainable=False)
        self._pilot = tf.Variable(tf.zeros(size, tf.float64), trainable=False)
        self.first_bad = tf.Variable(-1, trainable=False)

    def reset(self, statistics: Statistics) -> None:
        """Empties the sums and sets the statistics to normalise with."""
        mean, variance = statistics
        self._sums.assign(tf.zeros_like(self._sums))
        self._mean.assign(mean)
        self._variance.assign(variance)
        self._pilot.assign(np.where(np.isfinite(mean), mean, 0.0))
        self.first_bad.assign(-1)

    def pooled(self) -> Moments:
        """The moments of everything seen since `reset`."""
        sums = self._sums.numpy()
        first, second = sums[:-1].reshape(2, -1)
        return Moments.from_sums(float(sums[-1]), self._pilot.numpy(), first, second)

    def moments(self, x: Any, mask: Any, index: Any, is_fixed: bool) -> Any:
        """Stands in for `layer._moments`: pools, and returns what to use."""
        axis = self.bn.layer.axis % x.shape.rank
        count, mean, variance = _moments(x, mask, axis)
        self._add(count, mean, variance, index)
        if is_fixed:
            mean, variance = self._mean, self._variance
        elif mask is not None:
            # Nothing to normalise with in a batch that is masked entirely.
            mean = tf.where(count > 0, mean, self._pilot)
            variance = tf.where(count > 0, variance, 1.0)
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)

    def fused(self, x: Any, mask: Any, index: Any, is_fixed: bool) -> Any:
        """Output and moments in one kernel, where the kernel applies."""
        layer = self.bn.layer
        if (
            mask is not None
            or x.shape.rank != 4
            or layer.axis % 4 != 3
            or x.dtype == tf.float64
            or layer.epsilon < FUSED_MIN_EPSILON
        ):
            return None
        self.used_fused = True
        x = tf.cast(x, tf.float32)
        gamma = (
            tf.cast(layer.gamma, tf.float32)
            if layer.scale
            else tf.ones_like(x[0, 0, 0])
        )
        beta = tf.cast(layer.beta, tf.float32) if layer.center else tf.zeros_like(gamma)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            x, gamma, beta, epsilon=layer.epsilon, is_training=True
        )
        count = tf.cast(tf.size(x) // self.bn.channels, tf.float64)
        # The kernel returns the unbiased variance; Keras averages the biased one.
        bessel = (count - 1) / tf.maximum(count, 1)
        mean = tf.cast(mean, tf.float64)
        self._add(count, mean, tf.cast(variance, tf.float64) * bessel, index)
        if is_fixed:
            scale = gamma * tf.cast(
                tf.math.rsqrt(self._variance + layer.epsilon), tf.float32
            )
            outputs = x * scale + (beta - tf.cast(self._mean, tf.float32) * scale)
        return tf.cast(outputs, layer.compute_dtype)

    def _add(self, count: Any, mean: Any, variance: Any, index: Any) -> None:
        shifted = mean - self._pilot
        sums = tf.concat(
            [count * shifted, count * (variance + shifted**2), [count]], axis=0
        )
        sums = tf.where(count > 0, sums, 0.0)
        self._sums.assign_add(sums)
        is_bad = tf.logical_not(tf.reduce_all(tf.math.is_finite(sums)))
        is_first = tf.logical_and(is_bad, self.first_bad < 0)
        self.first_bad.assign(tf.where(is_first, index, self.first_bad))


def _moments(x: Any, mask: Any, axis: int) -> tuple[Any, Any, Any]:
    """Count, mean and biased variance of one batch, per channel, in float64.

    Two passes, the second of which also corrects the mean that the first one
    has rounded.
    """
    axes = [i for i in range(x.shape.rank) if i != axis]
    if mask is None:
        sizes = tf.gather(tf.shape(x, out_type=tf.int64), axes)
        count = tf.cast(tf.reduce_prod(sizes), tf.float64)
        keep = None
    else:
        keep = tf.broadcast_to(tf.cast(mask, tf.bool)[..., None], tf.shape(x))
        one_channel = tf.gather(keep, 0, axis=axis)
        count = tf.reduce_sum(tf.cast(one_channel, tf.float64))
        x = tf.where(keep, x, tf.zeros_like(x))
    size = tf.cast(tf.maximum(count, 1.0), x.dtype)
    rough = tf.reduce_sum(x, axes, keepdims=True) / size
    deviation = x - rough
    if keep is not None:
        deviation = tf.where(keep, deviation, tf.zeros_like(deviation))
    rest = tf.reduce_sum(deviation, axes) / size
    square = tf.reduce_sum(tf.square(deviation), axes) / size
    mean = tf.cast(tf.reshape(rough, [-1]), tf.float64) + tf.cast(rest, tf.float64)
    variance = tf.cast(square, tf.float64) - tf.square(tf.cast(rest, tf.float64))
    return count, mean, tf.maximum(variance, 0.0)


def _samples(inputs: Any) -> int:
    return int(tf.nest.flatten(inputs)[0].shape[0] or 0)

"""Measures one layer's input inside the traced function, and normalises it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from bn_callbacks.distribution import copies
from bn_callbacks.layers import BatchNormLayer, read
from bn_callbacks.statistics.moments import Moments

InputMoments: TypeAlias = tuple[Any, Any, Any]
"""Counts, means and variances of an input in one batch, as tensors."""

Note: TypeAlias = Callable[..., None]


class LayerInput:
    """Measures the input of one layer, and says what to normalise it with."""

    def __init__(
        self, bn: BatchNormLayer, index: int, replicas: int, is_fast: bool
    ) -> None:
        self.bn = bn
        self._index = index
        self._is_fast = is_fast
        stored = read([bn])[0].mean
        self._pilot = np.where(np.isfinite(stored), stored, 0.0)
        self._replicas = replicas
        self._sums: list[Any] | None = None

    def _mixed(self, mix: Any, mean: Any, variance: Any, dtype: Any) -> tuple[Any, Any]:
        """Mean and variance to normalise with."""
        size = self.bn.channels
        mean, variance, is_stored = _mixed(
            mix, tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
        )
        mean, variance = (tf.ensure_shape(each, [size]) for each in (mean, variance))
        if self.bn.has_floor:
            variance = tf.maximum(variance, self.bn.floor(mean))
        return self.bn.as_read(mean, variance, dtype, is_stored)

    def moments(self, x: Any, mask: Any, mix: Any, note: Note) -> tuple[Any, Any]:
        """Notes the input's moments and returns the mean and variance to use.

        Called in place of `layer._moments`.
        """
        counts, mean, variance = _moments(x, mask, self.bn.layer.axis, self._is_fast)
        note(self._index, (counts, mean, variance))
        if mask is not None:
            # A channel that is masked entirely has no moments of its own.
            mean = tf.where(counts > 0, mean, tf.cast(self._pilot, mean.dtype))
            variance = tf.where(counts > 0, variance, tf.ones_like(variance))
        return self._mixed(mix, mean, variance, x.dtype)

    def whole(self, x: Any, mask: Any, mix: Any, note: Note) -> Any:
        """Computes output and moments with fused kernels; None if they do not apply."""
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
        counts, variance = _biased(tf.size(x), unbiased)
        note(self._index, (counts, mean, unbiased), is_unbiased=True)
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

    def add_late(self, seen: InputMoments, is_unbiased: bool, replica: int) -> None:
        """Pools moments in variables, since tensors cannot leave a loop or branch."""
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
        # Without values the mean is NaN.
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


# These two functions are traced once, not in each layer of each model: tracing many
# small operations takes longer than a pass over a few batches.


@tf.function(
    input_signature=[
        tf.TensorSpec([4, None], tf.float64),
        *[tf.TensorSpec([None], tf.float64)] * 2,
    ],
    autograph=False,
)
def _mixed(mix: Any, mean: Any, variance: Any) -> tuple[Any, Any, Any]:
    """Mean and variance according to a `Mix`, and whether they are given ones."""
    weight, shift, ratio, offset = tf.unstack(mix)
    # NaN in a batch must not spoil given statistics.
    mean = tf.math.multiply_no_nan(mean, weight) + shift
    variance = tf.math.multiply_no_nan(variance, ratio) + offset
    return mean, variance, weight[0] == 0


@tf.function(
    input_signature=[tf.TensorSpec([], tf.int32), tf.TensorSpec([None], tf.float32)],
    autograph=False,
)
def _biased(values: Any, unbiased: Any) -> tuple[Any, Any]:
    """The number of values of a channel, and their biased variance."""
    count = tf.cast(values // tf.size(unbiased), tf.float32)
    return count[None], unbiased * ((count - 1) / tf.maximum(count, 1))


# cuDNN's kernel takes no smaller epsilon; the CPU's does (measured).
FUSED_MIN_EPSILON = 1.001e-5


def _moments(x: Any, mask: Any, axis: int, is_fast: bool) -> InputMoments:
    """Number of values, mean and biased variance of each channel.

    There is one number for all channels, unless a mask hides more of some. Passes over
    the values twice. Unless `is_fast`, the second pass also corrects the rounding of
    the mean, in float64.
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

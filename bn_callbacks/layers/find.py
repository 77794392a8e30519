"""Finds the BN layers of a model."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.arguments import shown
from bn_callbacks.names import printable
from bn_callbacks.statistics.moments import Statistics

RESOLUTION = 1e-6
"""Smallest σ, and smallest ratio of σ to the mean, that float32 can divide by."""

LOW_PRECISION = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Machine epsilons of the dtypes with less precision than float32."""

LayerSelection: TypeAlias = (
    str | re.Pattern[str] | Callable[[Any], bool] | Iterable[Any] | None
)

MomentsFunction: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
"""Replaces a layer's `_moments(inputs, mask)`."""


@dataclass(frozen=True, eq=False)
class BatchNormLayer:
    """One BN layer of a model: its identity and its stored state.

    Args:
        path: Unique path of the layer in its model.
        layer: The Keras layer.
        calls: How often a training step updates its moving averages: 1, or more for a
            layer that a functional model calls several times.
        named: Whether the user asked for this layer by name, so that being frozen does
            not matter.
    """

    path: str
    layer: keras.layers.BatchNormalization
    calls: int = 1
    named: bool = False

    @property
    def momentum(self) -> float:
        """The weight of the old value in an update."""
        return float(self.layer.momentum)

    @property
    def epsilon(self) -> float:
        """The number that the layer adds to a variance."""
        return float(self.layer.epsilon)

    @property
    def trainable(self) -> bool:
        """Whether the layer is not frozen."""
        return bool(self.layer.trainable)

    @property
    def synchronized(self) -> bool:
        """Whether each replica uses the statistics of the batches of all replicas."""
        return bool(self.layer.synchronized)

    @property
    def channels(self) -> int:
        """Number of the layer's channels."""
        return int(self.layer.moving_mean.shape[0])

    @property
    def renorm(self) -> bool:
        """Whether the layer uses batch renormalisation (Keras 3.13 and later)."""
        return bool(getattr(self.layer, "renorm", False))

    @property
    def precision(self) -> float | None:
        """Machine epsilon of a dtype less precise than float32; otherwise None."""
        return LOW_PRECISION.get(self.layer.moving_mean.dtype)

    @property
    def averages(self) -> tuple[Any, Any]:
        """The two variables that Keras updates as moving averages."""
        second = "moving_stddev" if self.renorm else "moving_variance"
        return self.layer.moving_mean, getattr(self.layer, second)

    def statistics(self, averages: NDArray[np.float64]) -> Statistics:
        """Converts the two averages, an array `(2, channels)`, to mean and variance."""
        mean, second = averages
        if self.renorm:
            second = np.square(second) - self.epsilon
        return Statistics(mean, second)

    @functools.cached_property
    def initial(self) -> Statistics:
        """The statistics the layer was built with."""
        layer = self.layer
        initializers = layer.moving_mean_initializer, layer.moving_variance_initializer
        return Statistics(*(_initial(each, self.channels) for each in initializers))

    @property
    def variables(self) -> list[Any]:
        """All variables that `assign` may write."""
        layer = self.layer
        variables = [layer.moving_mean, layer.moving_variance]
        if self.renorm:
            variables += [layer.moving_stddev, layer.renorm_mean, layer.renorm_stddev]
        return variables

    def new_state(
        self, statistics: Statistics, in_training: bool
    ) -> list[tuple[Any, NDArray[Any]]]:
        """Returns each variable to write, with its value in the layer's own dtype.

        With renormalisation, the next training step would rewrite the variance from
        `moving_stddev`, so `moving_stddev` is among them; `in_training`, so are the
        averages towards which the layer corrects batches.

        Raises:
            ValueError: A value is not finite in the layer's own dtype.
        """
        mean, variance = statistics
        if self.has_floor:
            variance = np.maximum(variance, self.floor(mean))
        values = [mean, variance]
        if self.renorm:
            stddev = np.sqrt(variance + self.epsilon)
            values += [stddev, mean, stddev] if in_training else [stddev]
        # A value beyond a float16's range becomes infinite.
        with np.errstate(over="ignore"):
            new = [
                (each, np.asarray(value).astype(each.value.dtype.as_numpy_dtype))
                for each, value in zip(self.variables, values, strict=False)
            ]
        for _, value in new:
            if not np.isfinite(value.astype(np.float64)).all():
                raise ValueError(
                    f"The statistics of {self.path} do not fit the layer's dtype. "
                    f"Received: {value.dtype.name} values that are not finite. "
                    "Scale the data, or store the statistics in float32."
                )
        return new

    def rounded(self, statistics: Statistics) -> Statistics:
        """Rounds statistics as the layer stores them.

        Raises:
            ValueError: A value is not finite in that dtype.
        """
        (_, mean), (_, variance), *_ = self.new_state(statistics, in_training=False)
        return Statistics(mean.astype(np.float64), variance.astype(np.float64))

    def as_read(
        self, mean: Any, variance: Any, dtype: Any, is_stored: Any
    ) -> tuple[Any, Any]:
        """Rounds a mean and a variance as a call of the layer would read them.

        Statistics of a batch have the dtype `dtype`. Stored ones (`is_stored`) are
        rounded to the layer's own dtype first; with a mixed policy in Keras before 3.3,
        reading rounds them once more.
        """
        used = tf.cast(mean, dtype), tf.cast(variance, dtype)
        layer = self.layer
        if layer.compute_dtype == dtype.name == self.layer.moving_mean.dtype:
            return used
        pairs = ((layer.moving_mean, mean), (layer.moving_variance, variance))
        mapping = [(variable, tf.cast(new, variable.dtype)) for variable, new in pairs]
        with keras.StatelessScope(mapping):
            stored = [keras.ops.cast(variable, dtype.name) for variable, _ in pairs]
        as_given = [
            tf.where(is_stored, *each) for each in zip(stored, used, strict=True)
        ]
        return as_given[0], as_given[1]

    @property
    def has_floor(self) -> bool:
        """Whether a variance of 0 would make the layer's output NaN or infinite."""
        return self.epsilon < RESOLUTION**2

    def floor(self, mean: Any) -> Any:
        """The smallest variance that a layer without epsilon can divide by.

        Keras computes `x/σ − mean/σ`, which is all rounding error if σ is less than
        about 1e-5 of the mean.
        """
        return (RESOLUTION * mean) ** 2 + RESOLUTION**2


def check_model(model: Any) -> None:
    """Raises an error for a model that this library does not support."""
    check_keras(model)
    _check_distribution(model)


def check_keras(model: Any) -> None:
    """Raises an error for anything but a Keras 3 model on TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "bn_callbacks works on Keras' TensorFlow backend only. Received: "
            f"keras.backend.backend()={keras.backend.backend()!r}. Set the "
            "environment variable KERAS_BACKEND=tensorflow before importing keras."
        )
    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        hint = "Pass the model that you call `fit` on."
        origins = tuple(base.__module__ for base in type(model).__mro__)
        keras_2 = ("tf_keras", "keras.engine", "keras.src.engine")
        if any(origin.startswith(keras_2) for origin in origins):
            hint = (
                "This is a Keras 2 model: unset TF_USE_LEGACY_KERAS and build it "
                "with `keras` instead of `tf_keras`."
            )
        raise TypeError(f"`model` must be a keras.Model. Received: {kind}. {hint}")


def _check_distribution(model: keras.Model) -> None:
    supported = (
        tf.distribute.OneDeviceStrategy,
        tf.distribute.MirroredStrategy,
        tf.distribute.MultiWorkerMirroredStrategy,
    )
    made_in = getattr(model, "_distribute_strategy", None)
    if made_in is None:
        made_in = keras.distribution.distribution()
    elif isinstance(made_in, supported):
        return
    if made_in is not None:
        raise NotImplementedError(
            "bn_callbacks works with MirroredStrategy, MultiWorkerMirroredStrategy and "
            "OneDeviceStrategy of tf.distribute, or without a strategy. Received: a "
            f"model that was made in a {type(made_in).__name__}. Save the weights, and "
            "load them into a model made outside its scope."
        )


def is_built(model: keras.Model) -> bool:
    """Whether all BN layers of the model have their statistics."""
    return bool(model.built) and all(map(_has_statistics, _batch_norms(model)))


def _has_statistics(layer: keras.layers.BatchNormalization) -> bool:
    # Keras before 3.1 makes the attribute only when it builds the layer.
    return getattr(layer, "moving_mean", None) is not None


def _batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def find(model: keras.Model, layers: LayerSelection = None) -> list[BatchNormLayer]:
    """Finds the BN layers of a model, nested ones included, in model order.

    Args:
        model: A built Keras model.
        layers: `None` for all; or a name, a path, a regular expression, a
            layer, a predicate `layer -> bool`, or a list of these.

    Returns:
        The layers; an empty list if the model has none. Layers that a built model never
        uses have no statistics, and are left out.

    Raises:
        ValueError: The model is not built, or `layers` selects nothing.
    """
    everywhere = _batch_norms(model)
    found = [layer for layer in everywhere if _has_statistics(layer)]
    if not model.built or (everywhere and not found):
        unbuilt = [layer.name for layer in everywhere if layer not in found]
        raise ValueError(
            f"The model is not built: {printable(_some(unbuilt) or model.name)} has no "
            f"statistics yet. Received: model={model.name!r}. Call the model on a "
            "batch of data, or train it, first."
        )
    order = {id(variable): index for index, variable in enumerate(model.variables)}
    found.sort(key=lambda layer: order.get(id(layer.moving_mean), len(order)))
    calls = _calls(model)
    seen: Counter[str] = Counter()
    everything = []
    for layer in found:
        # Before Keras 3.3, only variables have paths.
        path = getattr(layer, "path", None)
        path = path or layer.moving_mean.path.rpartition("/")[0] or layer.name
        # Tables and messages show the name, which may come from a stranger's file.
        path = printable(path)
        seen[path] += 1
        if seen[path] > 1:
            path = f"{path}#{seen[path]}"
        everything.append(BatchNormLayer(path, layer, max(1, calls[id(layer)])))
    return _select(everything, layers)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _select(
    everything: list[BatchNormLayer], layers: LayerSelection
) -> list[BatchNormLayer]:
    if layers is None:
        return everything
    chosen: dict[str, BatchNormLayer] = {}
    for selector in _selectors(layers):
        named = [bn for bn in everything if _is(bn, selector)]
        matching = named or [bn for bn in everything if _matches(bn, selector)]
        if not matching:
            raise ValueError(
                "`layers` selects no BatchNormalization layer. Received: "
                f"{shown(selector)}. The model has "
                f"{_some([bn.path for bn in everything]) or 'none'}."
            )
        for bn in matching:
            before = chosen.get(bn.path, bn)
            chosen[bn.path] = replace(bn, named=bool(named) or before.named)
    return [chosen[bn.path] for bn in everything if bn.path in chosen]


def _selectors(layers: Any) -> list[Any]:
    if isinstance(layers, (str, re.Pattern)) or callable(layers):
        return [layers]
    try:
        selectors = list(layers)
    except (TypeError, NotImplementedError):  # The latter from a symbolic tensor.
        raise _no_selector(layers) from None
    if not selectors:
        raise ValueError(
            "`layers` selects no BatchNormalization layer. Received: "
            f"layers={shown(layers)}. Pass None for all of them."
        )
    return selectors


def _no_selector(received: Any) -> TypeError:
    return TypeError(
        "`layers` takes names, paths, regular expressions, layers or predicates. "
        f"Received: {shown(received)}."
    )


def _is(bn: BatchNormLayer, selector: Any) -> bool:
    if isinstance(selector, str):
        return selector in (bn.path, bn.layer.name)
    return selector is bn.layer


def _matches(bn: BatchNormLayer, selector: Any) -> bool:
    if isinstance(selector, (str, re.Pattern)):
        try:
            return re.search(selector, bn.path) is not None
        except (re.error, TypeError) as error:
            raise ValueError(
                "`layers` takes names, paths or regular expressions. Received: "
                f"{shown(selector)}, which is none: {error}."
            ) from error
    if isinstance(selector, keras.layers.Layer):
        return False
    # A class, such as BatchNormalization itself, is callable but no predicate.
    if callable(selector) and not isinstance(selector, type):
        return bool(selector(bn.layer))
    raise _no_selector(selector)


def _initial(initializer: Any, channels: int) -> NDArray[np.float64]:
    # TensorFlow takes 0.1 ms for each, and hundreds of layers have these two.
    for usual, value in ((keras.initializers.Zeros, 0), (keras.initializers.Ones, 1)):
        if type(initializer) is usual:
            return np.full(channels, value, np.float64)
    drawn: NDArray[Any] = initializer((channels,)).numpy()
    return drawn.astype(np.float64)


def _calls(layer: keras.layers.Layer) -> Counter[int]:
    """How often one call of `layer` calls each BN layer, by `id`.

    This is exact for graphs of layers. In a hand-written `call`, each layer is assumed
    to be called once.
    """
    if isinstance(layer, keras.layers.BatchNormalization):
        return Counter({id(layer): 1})
    if isinstance(layer, keras.Sequential):
        children = list(layer.layers)
    elif isinstance(layer, keras.layers.TimeDistributed):
        # One call for each time step of the input that it was built with.
        steps = (layer.get_build_config() or {}).get("input_shape", (None,) * 2)[1]
        return Counter(
            {key: count * (steps or 1) for key, count in _calls(layer.layer).items()}
        )
    elif hasattr(layer, "_nodes_by_depth"):
        children = [node.operation for node in nodes_of(layer)]
    else:
        children = list({id(child): child for child in layer._layers}.values())
    total: Counter[int] = Counter()
    for child in children:
        if isinstance(child, keras.layers.Layer):
            total.update(_calls(child))
    return total


def nodes_of(model: keras.layers.Layer) -> list[Any]:
    """All calls in the graph of a functional model."""
    return [node for depth in model._nodes_by_depth.values() for node in depth]

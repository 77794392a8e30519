"""The only module that knows Keras' internals: BN layers and their state."""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Statistics

LayerSelection: TypeAlias = (
    str | re.Pattern[str] | Callable[[Any], bool] | Iterable[Any] | None
)
Moments = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class BatchNormLayer:
    """One BN layer of a model: its identity and its stored state.

    Args:
        path: Unique path of the layer in its model.
        layer: The Keras layer.
        calls: Updates of its moving averages in one training step: 1, or more
            for a layer that a functional model calls several times.
        named: Whether the user asked for this layer by its name, so that it
            is worked on although it is frozen.
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
        """What the layer adds to a variance."""
        return float(self.layer.epsilon)

    @property
    def trainable(self) -> bool:
        """Whether the layer is not frozen."""
        return bool(self.layer.trainable)

    @property
    def channels(self) -> int:
        """Length of the layer's statistics."""
        return int(self.layer.moving_mean.shape[0])

    @property
    def renorm(self) -> bool:
        """Whether the layer uses batch renormalisation (Keras 3.13 and later)."""
        return bool(getattr(self.layer, "renorm", False))

    @property
    def averages(self) -> tuple[Any, Any]:
        """The two variables that Keras updates as moving averages."""
        second = "moving_stddev" if self.renorm else "moving_variance"
        return self.layer.moving_mean, getattr(self.layer, second)

    def statistics(self, averages: NDArray[np.float64]) -> Statistics:
        """Mean and variance from the two averages, an array `(2, channels)`."""
        mean, second = averages
        if self.renorm:
            second = np.square(second) - self.epsilon
        return Statistics(mean, second)

    @property
    def initial(self) -> Statistics:
        """The statistics the layer was built with."""
        layer, shape = self.layer, (self.channels,)
        return Statistics(
            np.asarray(layer.moving_mean_initializer(shape), np.float64),
            np.asarray(layer.moving_variance_initializer(shape), np.float64),
        )

    def state(self) -> list[tuple[Any, NDArray[Any]]]:
        """Every variable that `assign` may write, with a copy of its value."""
        layer = self.layer
        variables = [layer.moving_mean, layer.moving_variance]
        if self.renorm:
            variables += [layer.moving_stddev, layer.renorm_mean, layer.renorm_stddev]
        return [(variable, np.array(variable.value)) for variable in variables]

    def new_state(
        self, statistics: Statistics, in_training: bool
    ) -> list[tuple[Any, NDArray[Any]]]:
        """The values that make the layer use `statistics`, in its own dtypes.

        With renormalisation the next step would rewrite the variance from
        `moving_stddev`, which is therefore written too; and `in_training` also the
        averages towards which it corrects batches.
        """
        mean, variance = statistics
        values = [mean, variance]
        if self.renorm:
            stddev = np.sqrt(variance + self.epsilon)
            values += [stddev, mean, stddev] if in_training else [stddev]
        # A value beyond a float16's range becomes infinite, and is refused later.
        with np.errstate(over="ignore"):
            return [
                (variable, np.asarray(value).astype(old.dtype))
                for (variable, old), value in zip(self.state(), values, strict=False)
            ]


def check_model(model: Any) -> None:
    """Raises a clear error for anything but a built Keras 3 model on TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "bn_callbacks works on Keras' TensorFlow backend only. Received: "
            f"keras.backend.backend()={keras.backend.backend()!r}. Set the "
            "environment variable KERAS_BACKEND=tensorflow before importing keras."
        )
    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        hint = "Pass the model that you call `fit` on."
        if kind.startswith(("tf_keras", "keras.engine", "keras.src.engine")):
            hint = (
                "This is a Keras 2 model: unset TF_USE_LEGACY_KERAS and build it "
                "with `keras` instead of `tf_keras`."
            )
        raise TypeError(f"`model` must be a keras.Model. Received: {kind}. {hint}")


def is_built(model: keras.Model) -> bool:
    """Whether all BN layers of the model have their statistics."""
    return bool(model.built) and all(
        layer.moving_mean is not None for layer in _batch_norms(model)
    )


def _batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


# Models whose statistics are corrected at the end of the `fit` that is running.
_corrected: WeakSet[keras.Model] = WeakSet()


def set_corrected(model: keras.Model, is_corrected: bool) -> None:
    """Notes that a callback corrects the statistics when `fit` ends."""
    (_corrected.add if is_corrected else _corrected.discard)(model)


def is_corrected(model: keras.Model) -> bool:
    """Whether a callback corrects the statistics when `fit` ends."""
    return model in _corrected


def find(model: keras.Model, layers: LayerSelection = None) -> list[BatchNormLayer]:
    """Finds the BN layers of a model, nested ones included, in model order.

    Args:
        model: A built Keras model.
        layers: `None` for all; or a name, a path, a regular expression, a
            layer, a predicate `layer -> bool`, or a list of these.

    Returns:
        The layers found; an empty list where the model has no BN layer.

    Raises:
        ValueError: The model is not built, or `layers` selects nothing.
    """
    found = _batch_norms(model)
    unbuilt = [layer.name for layer in found if layer.moving_mean is None]
    if unbuilt or not model.built:
        raise ValueError(
            f"The model is not built: {_some(unbuilt) or model.name} has no "
            f"statistics yet. Received: model={model.name!r}. Call the model on a "
            "batch of data, or train it, first."
        )
    order = {id(variable): index for index, variable in enumerate(model.variables)}
    found.sort(key=lambda layer: order.get(id(layer.moving_mean), len(order)))
    calls = _calls(model)
    seen: Counter[str] = Counter()
    everything = []
    for layer in found:
        # Keras before 3.3 gives paths to variables only.
        path = getattr(layer, "path", None)
        path = path or layer.moving_mean.path.rpartition("/")[0] or layer.name
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
    is_one = isinstance(layers, (str, re.Pattern)) or callable(layers)
    chosen: dict[str, BatchNormLayer] = {}
    selectors: Iterable[Any] = [layers] if is_one else layers  # type: ignore[assignment]
    for selector in selectors:
        named = [bn for bn in everything if _is(bn, selector)]
        matching = named or [bn for bn in everything if _matches(bn, selector)]
        if not matching:
            raise ValueError(
                "`layers` selects no BatchNormalization layer. Received: "
                f"{selector!r}. The model has "
                f"{_some([bn.path for bn in everything]) or 'none'}."
            )
        for bn in matching:
            before = chosen.get(bn.path, bn)
            chosen[bn.path] = replace(bn, named=bool(named) or before.named)
    return [chosen[bn.path] for bn in everything if bn.path in chosen]


def _is(bn: BatchNormLayer, selector: Any) -> bool:
    if isinstance(selector, str):
        return selector in (bn.path, bn.layer.name)
    return selector is bn.layer


def _matches(bn: BatchNormLayer, selector: Any) -> bool:
    if isinstance(selector, (str, re.Pattern)):
        return re.search(selector, bn.path) is not None
    if isinstance(selector, keras.layers.Layer):
        return False
    if callable(selector):
        return bool(selector(bn.layer))
    raise TypeError(
        "`layers` takes names, paths, regular expressions, layers or predicates. "
        f"Received: {selector!r}."
    )


def _calls(layer: keras.layers.Layer) -> Counter[int]:
    """How often one call of `layer` calls each BN layer, by `id`.

    Exact for graphs of layers. A hand-written `call` cannot be counted from
    outside; each of its layers is taken to be called once.
    """
    if isinstance(layer, keras.layers.BatchNormalization):
        return Counter({id(layer): 1})
    if isinstance(layer, keras.Sequential):
        children = list(layer.layers)
    elif hasattr(layer, "_nodes_by_depth"):
        nodes = [node for depth in layer._nodes_by_depth.values() for node in depth]
        children = [node.operation for node in nodes]
    else:
        children = list({id(child): child for child in layer._layers}.values())
    total: Counter[int] = Counter()
    for child in children:
        if isinstance(child, keras.layers.Layer):
            total.update(_calls(child))
    return total


def runs_in_training_mode(
    model: keras.Model, layers: Sequence[BatchNormLayer], inputs: Any
) -> list[bool]:
    """Whether `fit` would run each layer on batch statistics.

    Follows the model's own call as a training step makes it, on symbolic
    inputs; nothing is computed and nothing in the model changes.

    Args:
        model: The model.
        layers: The layers asked about.
        inputs: A structure of `tf.TensorSpec`.

    Returns:
        For each layer, whether any of its calls had `training=True`. A layer
        that is frozen counts as one that is not.
    """
    flags: dict[int, bool] = {}

    def observe(bn: BatchNormLayer) -> Callable[..., Any]:
        own = bn.layer.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            is_on = training is not None and training is not False
            flags[id(bn.layer)] = flags.get(id(bn.layer), False) or is_on
            return own(inputs, training=training, mask=mask)

        return call

    with _attributes({bn.layer: {"call": observe(bn)} for bn in layers}):
        symbolic = tf.function(
            lambda x: forward(model, x, training=True), autograph=False
        )
        symbolic.get_concrete_function(inputs)
    return [flags.get(id(bn.layer), False) and bn.trainable for bn in layers]


def forward(model: keras.Model, inputs: Any, training: bool) -> Any:
    """Calls the model as `fit` does; no Keras variable is written."""
    with keras.StatelessScope():
        if model._call_has_training_arg:
            return model(inputs, training=training)
        return model(inputs)


@contextlib.contextmanager
def batch_mode(
    layers: Sequence[BatchNormLayer],
    moments: Callable[[BatchNormLayer], Moments],
    fused: Callable[[BatchNormLayer], Callable[..., Any]] | None = None,
) -> Iterator[None]:
    """Makes `layers` normalise with the statistics that `moments` returns.

    Inside, and only for these layer objects, `training` is forced on, frozen
    layers behave as unfrozen and renormalisation is off. Meant to surround the
    *tracing* of a function: the traced graph keeps the behaviour, the layers
    get their attributes back.

    Args:
        layers: The layers.
        moments: Maps a layer to its replacement of `_moments(inputs, mask)`.
        fused: Maps a layer to a whole replacement of its computation,
            `(inputs, mask) -> outputs or None`, for layers whose `call` is
            Keras' own. `None` as its result means: compute it as usual.
    """

    def call(bn: BatchNormLayer) -> Callable[..., Any]:
        own = bn.layer.call
        is_plain = type(bn.layer).call is keras.layers.BatchNormalization.call
        whole = fused(bn) if fused is not None and is_plain else None

        def forced(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            del training
            outputs = whole(inputs, mask) if whole is not None else None
            if outputs is None:
                outputs = own(inputs, training=True, mask=mask)
            return outputs

        return forced

    changes: dict[keras.layers.Layer, dict[str, Any]] = {}
    for bn in layers:
        changes[bn.layer] = {
            "call": call(bn),
            "_moments": moments(bn),
            "_trainable": True,
        }
        if bn.renorm:
            changes[bn.layer]["renorm"] = False
    with _attributes(changes):
        yield


@contextlib.contextmanager
def _attributes(changes: dict[keras.layers.Layer, dict[str, Any]]) -> Iterator[None]:
    """Sets instance attributes and restores the instances' dictionaries.

    Past `__setattr__`, which for a Keras layer has side effects.
    """
    before = {layer: dict(vars(layer)) for layer in changes}
    try:
        for layer, attributes in changes.items():
            vars(layer).update(attributes)
        yield
    finally:
        for layer, attributes in changes.items():
            for name in attributes:
                if name in before[layer]:
                    vars(layer)[name] = before[layer][name]
                else:
                    vars(layer).pop(name, None)


def read(layers: Sequence[BatchNormLayer]) -> list[Statistics]:
    """Reads the stored statistics of every layer as float64."""
    return [
        Statistics(
            np.array(bn.layer.moving_mean.value, np.float64),
            np.array(bn.layer.moving_variance.value, np.float64),
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
        pairs = bn.new_state(statistics, in_training)
        for _, value in pairs:
            if not np.isfinite(value.astype(np.float64)).all():
                raise ValueError(
                    f"The statistics of {bn.path} do not fit the layer's dtype. "
                    f"Received: {value.dtype.name} values that are not finite. "
                    "Scale the data, or store the statistics in float32."
                )
        new += pairs
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


def count_inputs(model: keras.Model) -> int | None:
    """The number of input tensors the model was built for, where it is known."""
    inputs = getattr(model, "inputs", None)
    if inputs is not None:
        return len(tf.nest.flatten(inputs))
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(shapes) != 1:
        return len(shapes) or None
    is_one = isinstance(shapes[0], (tuple, list)) and not any(
        isinstance(size, (tuple, list, dict)) for size in shapes[0]
    )
    return 1 if is_one else len(shapes[0])


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
        counter = _raw_iterations(model)

        @tf.function(autograph=False)
        def read_all() -> Any:
            flat = [tf.cast(variable.value, tf.float64) for variable in variables]
            step = -1 if counter is None else counter.value
            return tf.concat([[tf.cast(step, tf.float64)], *flat], axis=0)

        self._read_all = read_all

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


def _raw_iterations(model: keras.Model) -> Any:
    """The optimizer's own step counter, which counts micro-batches as well."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "_iterations", None)


def steps_made(model: keras.Model) -> int:
    """Training steps the model's optimizer has seen, micro-batches included."""
    counter = _raw_iterations(model)
    return 0 if counter is None else int(counter.value)


def iterations(model: keras.Model) -> int:
    """The number of optimizer steps, as `model.optimizer.iterations` counts."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return 0
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def uses_ema(model: keras.Model) -> bool:
    """Whether the optimizer puts averaged weights into the model at the end."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(getattr(optimizer, "use_ema", False))


def steps_per_execution(model: keras.Model) -> int:
    """Training steps that one execution of the train function makes at most."""
    return int(getattr(model, "steps_per_execution", None) or 1)

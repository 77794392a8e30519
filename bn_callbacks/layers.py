"""The only module that knows Keras' internals: BN layers and their state."""

import contextlib
import functools
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.statistics.moments import Statistics

_LOW_PRECISION = {"float16": 2.0**-10, "bfloat16": 2.0**-7}

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
    def precision(self) -> float | None:
        """Machine epsilon of the statistics' dtype, if that is less than float32."""
        return _LOW_PRECISION.get(self.layer.moving_mean.dtype)

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
            layer.moving_mean_initializer(shape).numpy().astype(np.float64),
            layer.moving_variance_initializer(shape).numpy().astype(np.float64),
        )

    def state(self) -> list[tuple[Any, NDArray[Any]]]:
        """Every variable that `assign` may write, with a copy of its value."""
        layer = self.layer
        variables = [layer.moving_mean, layer.moving_variance]
        if self.renorm:
            variables += [layer.moving_stddev, layer.renorm_mean, layer.renorm_stddev]
        return [(variable, np.array(variable.value.numpy())) for variable in variables]

    def new_state(
        self, statistics: Statistics, in_training: bool
    ) -> list[tuple[Any, NDArray[Any]]]:
        """The values that make the layer use `statistics`, in its own dtypes.

        With renormalisation the next step would rewrite the variance from
        `moving_stddev`, which is therefore written too; and `in_training` also the
        averages towards which it corrects batches.

        Raises:
            ValueError: A value is not finite in the layer's own dtype.
        """
        mean, variance = statistics
        values = [mean, variance]
        if self.renorm:
            stddev = np.sqrt(variance + self.epsilon)
            values += [stddev, mean, stddev] if in_training else [stddev]
        # A value beyond a float16's range becomes infinite.
        with np.errstate(over="ignore"):
            new = [
                (variable, np.asarray(value).astype(old.dtype))
                for (variable, old), value in zip(self.state(), values, strict=False)
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
        """`statistics` as the layer holds them, in its own dtype.

        Raises:
            ValueError: A value is not finite in that dtype.
        """
        (_, mean), (_, variance), *_ = self.new_state(statistics, in_training=False)
        return Statistics(mean.astype(np.float64), variance.astype(np.float64))

    def as_read(self, mean: Any, variance: Any, dtype: Any) -> tuple[Any, Any]:
        """Tensors as a call reads them if they are the layer's moving statistics.

        The layer's dtype rounds them, and with a mixed policy of Keras before 3.3
        reading rounds them once more.
        """
        pairs = ((self.layer.moving_mean, mean), (self.layer.moving_variance, variance))
        mapping = [(variable, tf.cast(new, variable.dtype)) for variable, new in pairs]
        with keras.StatelessScope(mapping):
            read_mean, read_variance = (
                keras.ops.cast(variable, dtype.name) for variable, _ in pairs
            )
        return read_mean, read_variance


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
        origins = tuple(base.__module__ for base in type(model).__mro__)
        keras_2 = ("tf_keras", "keras.engine", "keras.src.engine")
        if any(origin.startswith(keras_2) for origin in origins):
            hint = (
                "This is a Keras 2 model: unset TF_USE_LEGACY_KERAS and build it "
                "with `keras` instead of `tf_keras`."
            )
        raise TypeError(f"`model` must be a keras.Model. Received: {kind}. {hint}")


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
        The layers found; an empty list where the model has no BN layer. Layers that
        a built model never uses, and so never builds, are none.

    Raises:
        ValueError: The model is not built, or `layers` selects nothing.
    """
    everywhere = _batch_norms(model)
    found = [layer for layer in everywhere if _has_statistics(layer)]
    if not model.built or (everywhere and not found):
        unbuilt = [layer.name for layer in everywhere if layer not in found]
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
    elif isinstance(layer, keras.layers.TimeDistributed):
        # One call a time step, as many as the input was built with.
        steps = (layer.get_build_config() or {}).get("input_shape", (None,) * 2)[1]
        return Counter(
            {key: count * (steps or 1) for key, count in _calls(layer.layer).items()}
        )
    elif hasattr(layer, "_nodes_by_depth"):
        children = [node.operation for node in _nodes(layer)]
    else:
        children = list({id(child): child for child in layer._layers}.values())
    total: Counter[int] = Counter()
    for child in children:
        if isinstance(child, keras.layers.Layer):
            total.update(_calls(child))
    return total


def _nodes(model: keras.layers.Layer) -> list[Any]:
    return [node for depth in model._nodes_by_depth.values() for node in depth]


def pinned_in_graph(layer: keras.layers.Layer, is_pinned: bool = False) -> set[int]:
    """BN layers, by `id`, for which a functional graph stores `training=False`.

    In `fit`, Keras 3 overrides it (keras#20285).
    """
    if isinstance(layer, keras.layers.BatchNormalization):
        return {id(layer)} if is_pinned else set()
    if not hasattr(layer, "_nodes_by_depth"):
        inner = layer._layers if isinstance(layer, keras.layers.Layer) else []
        return set().union(*(pinned_in_graph(child, is_pinned) for child in inner))
    found: set[int] = set()
    for node in _nodes(layer):
        stored = node.arguments.kwargs.get("training") if node.arguments else None
        found |= pinned_in_graph(node.operation, is_pinned or stored is False)
    return found


def takes_training(model: keras.Model) -> bool:
    """Whether the model's `call` takes `training`, so that `fit` passes it."""
    return bool(model._call_has_training_arg)


def is_stale(model: keras.Model, bn: BatchNormLayer) -> bool:
    """Whether `trainable` was changed after `compile`, as far as Keras remembers."""
    compiled = getattr(model, "_compiled_trainable_state", None) or {}
    return bn.layer in compiled and bool(compiled[bn.layer]) != bn.trainable


def replicas(model: keras.Model) -> int:
    """Number of replicas that the model is trained on."""
    strategy = getattr(model, "distribute_strategy", None)
    return int(getattr(strategy, "num_replicas_in_sync", 1))


def has_own_train_step(model: keras.Model) -> bool:
    """Whether the model makes its training steps itself."""
    return type(model).train_step is not keras.Model.train_step


def examples_seen(model: keras.Model) -> float | None:
    """Examples since the epoch began, as the model's loss metric counts them.

    None where it cannot be known: Keras before 3.3 counts batches, a model with its
    own `train_step` nothing.
    """
    if not _COUNTS_EXAMPLES:
        return None
    for metric in model.metrics:
        if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
            return float(metric.count.value.numpy()) or None
    return None


_COUNTS_EXAMPLES = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 3)


class Fingerprint:
    """Tells whether the weights of a model have changed.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        variables = [variable.value for variable in model.trainable_variables]

        @tf.function(autograph=False)
        def sums() -> Any:
            return [tf.reduce_sum(tf.cast(value, tf.float32)) for value in variables]

        self._sums = sums

    def __call__(self) -> bytes:
        """A value that almost surely changes with any weight."""
        return np.array([total.numpy() for total in self._sums()]).tobytes()


def runs_in_training_mode(
    model: keras.Model, layers: Sequence[BatchNormLayer], inputs: Any
) -> list[bool | None]:
    """Whether `fit` would run each layer on batch statistics.

    Follows the model's own call as a training step makes it, on symbolic
    inputs; nothing is computed and nothing in the model changes.

    Args:
        model: The model.
        layers: The layers asked about.
        inputs: A structure of `tf.TensorSpec`.

    Returns:
        For each layer, whether any of its calls asks for the statistics of a batch,
        as a frozen layer does not; or None if nothing calls it. For a layer asked
        for by its name, whether it does so when it is forced to.
    """
    asks: dict[BatchNormLayer, bool] = {}

    def observe(bn: BatchNormLayer) -> dict[str, Any]:
        own_call, own_moments = bn.layer.call, bn.layer._moments

        @functools.wraps(own_call)
        def call(*args: Any, **kwargs: Any) -> Any:
            asks.setdefault(bn, False)
            if bn.named:
                return _with_training(own_call, True, args, kwargs)
            return own_call(*args, **kwargs)

        def moments(*args: Any, **kwargs: Any) -> Any:
            asks[bn] = True
            return own_moments(*args, **kwargs)

        observed: dict[str, Any] = {"call": call, "_moments": moments}
        if bn.named:
            observed["_trainable"] = True
        return observed

    @tf.function(autograph=False)
    def symbolic(x: Any) -> None:
        with stateless(model):
            forward(model, x, training=True)

    with _attributes({bn.layer: observe(bn) for bn in layers}):
        symbolic.get_concrete_function(inputs)
    return [asks.get(bn) for bn in layers]


def forward(model: keras.Model, inputs: Any, training: bool) -> Any:
    """Calls the model as `fit` does."""
    if model._call_has_training_arg:
        return model(inputs, training=training)
    return model(inputs)


@contextlib.contextmanager
def stateless(model: keras.Model, salt: Any = None) -> Iterator[None]:
    """Inside, no Keras variable is written, and `compute_loss` finds all losses.

    Args:
        model: The model to be called.
        salt: A whole number, as a tensor, that makes dropout, noise and
            augmentation draw anew. As no seed advances, they draw the same each
            time without it.
    """
    # Keras wants the current values of what it regularises spelt out.
    mapping = [
        (variable, variable.value)
        for variable in model.trainable_variables
        if getattr(variable, "regularizer", None) is not None
    ]
    if salt is not None:
        seeds = [v for v in model.variables if v.name == "seed_generator_state"]
        mapping += [
            (seed, seed.value + tf.cast(tf.stack([salt, 0]), seed.value.dtype))
            for seed in seeds
        ]
    with keras.StatelessScope(mapping, collect_losses=True):
        yield


def compute_loss(model: keras.Model, batch: tuple[Any, Any, Any], outputs: Any) -> Any:
    """The loss as `evaluate` computes it of a batch `(x, y, sample_weight)`."""
    x, y, sample_weight = batch
    arguments = {"x": x, "y": y, "y_pred": outputs, "sample_weight": sample_weight}
    # Since Keras 3.3; a user's own method may still be without it.
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = False
    return model.compute_loss(**arguments)


def _with_training(
    call: Callable[..., Any], training: bool, args: Any, kwargs: Any
) -> Any:
    """Calls a layer's `call`, whatever its signature, with another `training`."""
    signature = inspect.signature(call)
    bound = signature.bind(*args, **kwargs)
    if "training" in signature.parameters:
        bound.arguments["training"] = training
    return call(*bound.args, **bound.kwargs)


@contextlib.contextmanager
def batch_mode(
    model: keras.Model,
    layers: Sequence[BatchNormLayer],
    moments: Callable[[BatchNormLayer], Moments],
    fused: Callable[[BatchNormLayer], Callable[..., Any]] | None = None,
) -> Iterator[None]:
    """Makes `layers` normalise with the statistics that `moments` returns.

    Inside, and only for these layer objects, `training` is forced on, frozen
    layers behave as unfrozen and renormalisation is off; the model's other BN layers
    run in inference mode. Meant to surround the *tracing* of a function: the traced
    graph keeps the behaviour, the layers get their attributes back.

    Args:
        model: The model.
        layers: The layers.
        moments: Maps a layer to its replacement of `_moments(inputs, mask)`.
        fused: Maps a layer to a whole replacement of its computation,
            `(inputs, mask) -> outputs or None`, for layers whose `call` is
            Keras' own. `None` as its result means: compute it as usual.
    """
    starting: list[Any] = []

    def call(bn: BatchNormLayer) -> Callable[..., Any]:
        own = bn.layer.call
        is_plain = type(bn.layer).call is keras.layers.BatchNormalization.call
        whole = fused(bn) if fused is not None and is_plain else None

        @functools.wraps(own)
        def forced(*args: Any, **kwargs: Any) -> Any:
            if starting and tf.compat.v1.get_default_graph() is starting[-1]:
                return _with_training(own, False, args, kwargs)
            if whole is not None:
                given = inspect.signature(own).bind(*args, **kwargs).arguments
                outputs = whole(given["inputs"], given.get("mask"))
                if outputs is not None:
                    return outputs
            return _with_training(own, True, args, kwargs)

        return forced

    def pinned(layer: keras.layers.BatchNormalization) -> Callable[..., Any]:
        own = layer.call
        return functools.wraps(own)(
            lambda *args, **kwargs: _with_training(own, False, args, kwargs)
        )

    def loop(layer: keras.layers.RNN) -> Callable[..., Any]:
        own = layer.inner_loop

        @functools.wraps(own)
        def inner_loop(*args: Any, **kwargs: Any) -> Any:
            # Before the loop, Keras tries the cell once to learn the output's shape:
            # a call that nothing comes of, and whose input is not to be counted.
            starting.append(tf.compat.v1.get_default_graph())
            try:
                return own(*args, **kwargs)
            finally:
                starting.pop()

        return inner_loop

    changes: dict[keras.layers.Layer, dict[str, Any]] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            changes[layer] = {"call": pinned(layer)}
        elif isinstance(layer, keras.layers.RNN) and not layer.unroll:
            changes[layer] = {"inner_loop": loop(layer)}
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
            bn.layer.moving_mean.value.numpy().astype(np.float64),
            bn.layer.moving_variance.value.numpy().astype(np.float64),
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


# A number for what this library has last written into a layer. A moving average
# that was written between two readings is no longer an average of batches.
_versions: WeakKeyDictionary[keras.layers.Layer, int] = WeakKeyDictionary()
_new_version = itertools.count(1)


def versions(layers: Sequence[BatchNormLayer]) -> list[int]:
    """Changes with every `assign` to a layer, and back with `restore`."""
    return [_versions.get(bn.layer, 0) for bn in layers]


def count_inputs(model: keras.Model) -> int | None:
    """The number of input tensors the model was built for, where it is known."""
    # Keras 3.0 raises for a model without inputs yet.
    inputs = getattr(model, "inputs", None) if model.built else None
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
    # Before Keras 3.1 `iterations` was the counter itself.
    return getattr(optimizer, "_iterations", getattr(optimizer, "iterations", None))


def steps_made(model: keras.Model) -> int:
    """Training steps the model's optimizer has seen, micro-batches included."""
    counter = _raw_iterations(model)
    return 0 if counter is None else int(counter.value)


def iterations(model: keras.Model) -> int:
    """The number of optimizer steps, as `model.optimizer.iterations` counts."""
    optimizer = getattr(model, "optimizer", None)
    return 0 if optimizer is None else int(optimizer.iterations)


def uses_ema(model: keras.Model) -> bool:
    """Whether the optimizer puts averaged weights into the model at the end."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(getattr(optimizer, "use_ema", False))


def steps_per_execution(model: keras.Model) -> int:
    """Training steps that one execution of the train function makes at most."""
    return int(getattr(model, "steps_per_execution", None) or 1)

"""Runs a model with its BN layers in another mode, and writes nothing."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.losses import loss as _loss

from bn_callbacks.layers.calls import unheard
from bn_callbacks.layers.facts import pinned_in_graph
from bn_callbacks.layers.find import BatchNormLayer, MomentsFunction, nodes_of
from bn_callbacks.layers.own_call import OwnCall, own_call


def runs_in_training_mode(
    model: keras.Model, layers: Sequence[BatchNormLayer], inputs: Any
) -> list[bool | None]:
    """Finds out whether `fit` would run each layer on batch statistics.

    Traces the model's own call as a training step makes it, on symbolic inputs. Nothing
    is computed, and nothing in the model changes.

    Args:
        model: The model.
        layers: The layers.
        inputs: A structure of `tf.TensorSpec`.

    Returns:
        For each layer, whether any of its calls asks for the statistics of a batch,
        which a frozen layer does not; None if nothing calls it. For a layer that the
        user named, whether it does so when training mode is forced.
    """
    if _is_plain(model) and not pinned_in_graph(model):
        return [bn.named or bn.trainable for bn in layers]
    asks: dict[BatchNormLayer, bool] = {}

    def observe(bn: BatchNormLayer) -> dict[str, Any]:
        own, own_moments = _standing_in(bn), bn.layer._moments

        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            asks.setdefault(bn, False)
            if bn.named:
                return _with_training(own, True, args, kwargs)
            return own(*args, **kwargs)

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

    observed = {bn.layer: observe(bn) for bn in layers}
    with _replacing, unheard(), _attributes(observed):
        symbolic.get_concrete_function(inputs)
    return [asks.get(bn) for bn in layers]


def _standing_in(bn: BatchNormLayer) -> Callable[..., Any]:
    """The layer's `call`; or that of Keras, if it does the same and uses `_moments`."""
    own: Callable[..., Any] = bn.layer.call
    if own_call(bn.layer) is OwnCall.ALIKE:
        own = keras.layers.BatchNormalization.call.__get__(bn.layer)
    return own


def _is_plain(layer: keras.layers.Layer) -> bool:
    """Whether a layer surely runs all its BN layers, with the `training` that it gets.

    Keras' own layers, and graphs of them, do. For others only a trace can tell.
    """
    if isinstance(layer, keras.layers.BatchNormalization):
        return _is_keras(type(layer).call)
    children = layer._layers
    if not children:
        return True
    if type(layer) is keras.Sequential:
        called = layer.layers
    elif hasattr(layer, "_nodes_by_depth") and type(layer).__module__ == _FUNCTIONAL:
        called = [node.operation for node in nodes_of(layer)]
    else:
        return False
    called = {id(each) for each in called}
    ours = (
        child for child in children if not isinstance(child, keras.layers.InputLayer)
    )
    return all(id(child) in called and _is_plain(child) for child in ours)


def _is_keras(call: Any) -> bool:
    return call is keras.layers.BatchNormalization.call


_FUNCTIONAL = "keras.src.models.functional"


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
        salt: A whole number, as a tensor, that changes what dropout, noise and
            augmentation draw. Without it they draw the same each time, since no seed
            advances.
    """
    # Keras regularises only variables that the scope maps.
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


def forget_penalties() -> None:
    """Drops what layers have added to the loss so far; for use inside `stateless`."""
    get_stateless_scope().losses.clear()


def compute_loss(model: keras.Model, batch: tuple[Any, Any, Any], outputs: Any) -> Any:
    """Computes the loss of a batch `(x, y, sample_weight)` as `evaluate` does."""
    x, y, sample_weight = batch
    arguments = {"x": x, "y": y, "y_pred": outputs, "sample_weight": sample_weight}
    # Since Keras 3.3; a user's own method may not have it.
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = False
    return _unscaled(model.compute_loss(**arguments))


# Since Keras 3.1 or so, losses are divided by the number of replicas.
_unscaled = getattr(_loss, "unscale_loss_for_distribution", lambda loss: loss)


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
    moments: Callable[[BatchNormLayer], MomentsFunction],
    fused: Callable[[BatchNormLayer], Callable[..., Any]] | None = None,
) -> Iterator[None]:
    """Makes `layers` normalise with the statistics that `moments` returns.

    Inside, `training` is forced on for these layers, frozen ones behave as unfrozen,
    and renormalisation is off; the model's other BN layers run in inference mode. Use
    it around the *tracing* of a function: the traced graph keeps the behaviour, and the
    layers get their attributes back.

    Args:
        model: The model.
        layers: The layers.
        moments: Makes a layer's replacement of `_moments(inputs, mask)`.
        fused: Makes a replacement of a layer's whole computation,
            `(inputs, mask) -> outputs`, for layers whose `call` is Keras' own. If it
            returns `None`, the layer computes as usual.
    """
    starting: list[Any] = []

    def call(bn: BatchNormLayer) -> Callable[..., Any]:
        own = _standing_in(bn)
        is_plain = _is_keras(type(bn.layer).call) or own_call(bn.layer) is OwnCall.ALIKE
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
            # Before the loop, Keras calls the cell once to learn the output's shape.
            # The input of this call must not count.
            starting.append(tf.compat.v1.get_default_graph())
            try:
                return own(*args, **kwargs)
            finally:
                starting.pop()

        return inner_loop

    with _replacing:
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
        with unheard(), _attributes(changes):
            yield


_replacing = threading.RLock()
"""Held while attributes of layers are replaced. Otherwise a second thread would take
the first one's replacements for the layer's own, and leave them behind."""


@contextlib.contextmanager
def _attributes(changes: dict[keras.layers.Layer, dict[str, Any]]) -> Iterator[None]:
    """Sets attributes of layers, and restores them after the block.

    Writes `vars(layer)`, since `setattr` has side effects in a Keras layer. Other
    threads that are running, and may be predicting with the model, still call the
    layers' own methods.
    """
    with _replacing:
        others = {*threading.enumerate()} - {threading.current_thread()}
        before = {layer: dict(vars(layer)) for layer in changes}
        try:
            for layer, attributes in changes.items():
                for name, new in attributes.items():
                    vars(layer)[name] = (
                        _unless_in(others, new, getattr(layer, name))
                        if callable(new)
                        else new
                    )
            yield
        finally:
            for layer, attributes in changes.items():
                for name in attributes:
                    if name in before[layer]:
                        vars(layer)[name] = before[layer][name]
                    else:
                        vars(layer).pop(name, None)


def _unless_in(
    threads: set[threading.Thread], new: Callable[..., Any], old: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(new)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_other = threading.current_thread() in threads
        return (old if is_other else new)(*args, **kwargs)

    return call

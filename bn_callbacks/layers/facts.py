"""Finds facts about a model in training: its steps, its graph, its optimizer."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bn_callbacks.distribution import Team
from bn_callbacks.layers.find import BatchNormLayer, nodes_of
from bn_callbacks.layers.inputs import is_shape


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
    for node in nodes_of(layer):
        stored = node.arguments.kwargs.get("training") if node.arguments else None
        found |= pinned_in_graph(node.operation, is_pinned or stored is False)
    return found


def takes_training(model: keras.Model) -> bool:
    """Whether the model's `call` takes `training`, so that `fit` passes it."""
    return bool(model._call_has_training_arg)


def is_trainable_stale(model: keras.Model, bn: BatchNormLayer) -> bool:
    """Whether `trainable` was changed after `compile`, as far as Keras remembers."""
    compiled = getattr(model, "_compiled_trainable_state", None) or {}
    return bn.layer in compiled and bool(compiled[bn.layer]) != bn.trainable


def strategy(model: keras.Model) -> tf.distribute.Strategy | None:
    """The distribution strategy in whose scope the model was made, or None."""
    return getattr(model, "_distribute_strategy", None)


def team_of(model: keras.Model) -> Team:
    """The replicas and workers that train the model, and share passes over data."""
    return Team(strategy(model))


def has_own_train_step(model: keras.Model) -> bool:
    """Whether the model has a `train_step` of its own."""
    return type(model).train_step is not keras.Model.train_step


class LossMetric:
    """The metric in which a model counts the examples of an epoch.

    Args:
        model: The model, compiled.
    """

    def __init__(self, model: keras.Model) -> None:
        # Found once: to list the metrics, Keras walks through all layers.
        means = (each for each in model.metrics if isinstance(each, keras.metrics.Mean))
        found = next((mean for mean in means if mean.name == "loss"), None)
        self._loss = found if _COUNTS_EXAMPLES else None

    def examples(self) -> float | None:
        """Examples since the epoch began; None if unknown.

        Keras before 3.3 counts batches instead, and a model with its own `train_step`
        may count nothing.
        """
        if self._loss is None:
            return None
        return float(self._loss.count.value.numpy()) or None


_COUNTS_EXAMPLES = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 3)


SAMPLED_WEIGHTS = 64
"""Variables in a fingerprint, spread over the model."""

SAMPLED_VALUES = 256
"""The first so many values of each are in the fingerprint."""

REPLACED = 0.01
"""Relative change from which weights count as replaced. Averages of weights that rest
differ by a ten-thousandth and do no harm; averages of weights that move differ by a
tenth (tests/benchmarks/limits.py)."""


class Fingerprint:
    """Tells whether the weights of a model have been replaced.

    Averaging or restoring changes all weights; a user's own constraint may change a
    single matrix. So the change of each matrix is compared with its own size. Vectors
    may be tiny, so their change is compared with the size of all weights.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        # Matrices first, since vectors say little.
        variables = sorted(model.trainable_variables, key=lambda v: len(v.shape) < 2)
        every = math.ceil(len(variables) / SAMPLED_WEIGHTS) or 1
        self._values = [variable.value for variable in variables[::every]]

    def __call__(self) -> list[NDArray[np.float64]]:
        """The sample, as it is now: a part of each variable."""
        # Not compiled: tracing in each `fit` would cost more than it saves.
        return [
            tf.reshape(value, [-1])[:SAMPLED_VALUES].numpy().astype(np.float64)
            for value in self._values
        ]

    def is_replaced(self, before: list[NDArray[np.float64]]) -> bool:
        """Whether the weights have changed since a sample was taken."""
        now = self()
        change, size = _change(before, now)
        changed = float(np.linalg.norm(change)) > REPLACED * float(np.linalg.norm(size))
        is_matrix = np.array([len(value.shape) > 1 for value in self._values], bool)
        return changed or bool((change > REPLACED * size)[is_matrix].any())

    def is_same(self, before: list[NDArray[np.float64]]) -> bool:
        """Whether the weights are equal to those of a sample, bit for bit."""
        pairs = zip(before, self(), strict=True)
        return all(np.array_equal(old, new, equal_nan=True) for old, new in pairs)


def _change(
    before: list[NDArray[np.float64]], now: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much each variable has changed, and how large it was."""
    with np.errstate(all="ignore"):
        pairs = zip(before, now, strict=True)
        change = [np.linalg.norm(new - old) for old, new in pairs]
        return np.array(change), np.array([np.linalg.norm(old) for old in before])


def count_inputs(model: keras.Model) -> int | None:
    """The number of input tensors of the model; None if unknown."""
    # Keras 3.0 raises for a model without inputs yet.
    inputs = getattr(model, "inputs", None) if model.built else None
    if inputs is not None:
        return len(tf.nest.flatten(inputs))
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(shapes) != 1:
        return len(shapes) or None
    return 1 if is_shape(shapes[0]) else len(shapes[0])


def raw_iterations(model: keras.Model) -> Any:
    """The optimizer's own step counter, which counts micro-batches as well."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Before Keras 3.1 `iterations` was the counter itself.
    return getattr(optimizer, "_iterations", getattr(optimizer, "iterations", None))


def steps_made(model: keras.Model) -> int:
    """Training steps that the optimizer has counted, micro-batches included."""
    counter = raw_iterations(model)
    return 0 if counter is None else int(counter.value.numpy())


def iterations(model: keras.Model) -> int:
    """The number of optimizer steps, as `model.optimizer.iterations` counts."""
    optimizer = getattr(model, "optimizer", None)
    return 0 if optimizer is None else int(optimizer.iterations.numpy())


def uses_ema(model: keras.Model) -> bool:
    """Whether the optimizer puts averaged weights into the model at the end."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(getattr(optimizer, "use_ema", False))


def steps_per_execution(model: keras.Model) -> int:
    """Largest number of training steps in an execution of the train function."""
    return int(getattr(model, "steps_per_execution", None) or 1)

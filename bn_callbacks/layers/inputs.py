"""Finds out what a model takes as its inputs."""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from bn_callbacks.layers.find import LOW_PRECISION

_EPSILON = {"float64": 2.0**-52, **LOW_PRECISION}


@dataclass(frozen=True)
class InputLayout:
    """What a model takes.

    Args:
        names: A name for each input.
        shapes: The shape of each, including the axis of the batch; None for sizes that
            are unknown.
        is_dict: Whether the model takes a dictionary.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    is_dict: bool = False


def input_layout(model: keras.Model) -> InputLayout | None:
    """What a model takes, in its own order; None if unknown."""
    inputs = getattr(model, "inputs", None) if model.built else None
    if inputs is None:
        return _as_built(model)
    # Before Keras 3.1, a sequential model has no `input` until it is called.
    structure = inputs if isinstance(model, keras.Sequential) else model.input
    if isinstance(structure, dict):
        names = sorted(structure)
        inputs = [structure[name] for name in names]
        is_dict = True
    else:
        names = [tensor.name for tensor in inputs]
        is_dict = False
    return InputLayout(
        tuple(names), tuple(tuple(tensor.shape) for tensor in inputs), is_dict
    )


def _as_built(model: keras.Model) -> InputLayout | None:
    built = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(built) != 1:
        return None
    if isinstance(built[0], dict):
        names = sorted(built[0])
        shapes = [built[0][name] for name in names]
    else:
        shapes = [built[0]] if is_shape(built[0]) else list(built[0])
        names = [f"x_{i}" for i in range(len(shapes))] if len(shapes) > 1 else ["x"]
    if not all(map(is_shape, shapes)):
        return None
    # For a subclassed model, Keras keeps the shape of the batch it was built on.
    return InputLayout(
        tuple(names),
        tuple((None, *shape[1:]) for shape in shapes),
        isinstance(built[0], dict),
    )


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of one input, rather than a structure of shapes."""
    return isinstance(value, (tuple, list)) and not any(
        isinstance(size, (tuple, list, dict)) for size in value
    )


def to_model_inputs(model: keras.Model, x: Any) -> list[Any]:
    """The inputs as the model's graph takes them: flat, in its order and dtypes."""
    graph = getattr(model, "_functional", model)
    if hasattr(graph, "_standardize_inputs"):
        return list(graph._standardize_inputs(x))
    return list(tf.nest.flatten(x))


def takes_any_batch(model: keras.Model) -> bool:
    """Whether the batch size was left open when the model was built."""
    layout = input_layout(model)
    return layout is None or all(shape[0] is None for shape in layout.shapes)


def compute_precision(model: keras.Model) -> float:
    """Machine epsilon of the least precise dtype that the model computes in."""
    dtypes = {str(layer.compute_dtype) for layer in model._flatten_layers()}
    return max(_EPSILON.get(dtype, 2.0**-23) for dtype in dtypes)

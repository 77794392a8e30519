"""Computes from a traced graph how much memory an example takes."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

# Outputs of these operations share the memory of their inputs.
_ALIASES = {"Identity", "Reshape", "StopGradient", "ExpandDims", "Squeeze"}


def bytes_of_example(graph: Any, inputs: Sequence[Any]) -> float:
    """The largest memory that one example takes at a time while a graph runs.

    Follows the operations in their order: a tensor takes memory from the operation
    that makes it to the last that reads it. Bodies of loops do not count. For sizes
    that the graph leaves open, other than the batch's, the largest size of the inputs
    is assumed.

    Args:
        graph: The graph of a concrete function whose tensors have the batch first.
        inputs: A batch, as tensors.

    Returns:
        Bytes for each example.
    """
    open_size = max(
        (int(size) for leaf in inputs for size in leaf.shape[1:]), default=1
    )
    last_use: dict[str, int] = {}
    origin: dict[str, str] = {}
    operations = graph.get_operations()
    for number, operation in enumerate(operations):
        for tensor in operation.inputs:
            last_use[origin.get(tensor.name, tensor.name)] = number
        if operation.type in _ALIASES:
            source = operation.inputs[0].name
            origin[operation.outputs[0].name] = origin.get(source, source)
    freed: dict[int, float] = {}
    alive = most = 0.0
    for number, operation in enumerate(operations):
        for tensor in operation.outputs:
            if tensor.name in origin:
                continue
            size = _bytes(tensor, open_size)
            alive += size
            end = last_use.get(tensor.name, number)
            freed[end] = freed.get(end, 0.0) + size
        most = max(most, alive)
        alive -= freed.pop(number, 0.0)
    return most


def _bytes(tensor: Any, open_size: int) -> float:
    """Bytes for each example; 0 for a tensor that does not grow with the batch."""
    shape = tensor.shape
    if (
        not shape.rank
        or shape[0] is not None
        or tensor.dtype in (tf.resource, tf.variant)
    ):
        return 0.0
    total = float(tensor.dtype.size)
    for size in shape[1:]:
        total *= open_size if size is None else size
    return total

"""Runs a SavedModel as a server does, with TensorFlow and without Keras.

`serving.verify` starts this module as another process.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_callbacks.cli.errors import text_of


def main(model: str, inputs: str, outputs: str) -> None:
    """Runs a model on batches.

    Args:
        model: Directory of a SavedModel that Keras has exported.
        inputs: File with the inputs of each batch.
        outputs: File to write with the outputs of each batch.
    """
    sys.modules["keras"] = None  # type: ignore[assignment] # Importing it fails now.
    import tensorflow as tf

    loaded = tf.saved_model.load(model)
    arguments, _ = loaded.serve.concrete_functions[0].structured_input_signature
    specs = tf.nest.flatten(arguments)
    results = []
    for batch in load(Path(inputs)):
        tensors = [
            tf.cast(array, spec.dtype) for array, spec in zip(batch, specs, strict=True)
        ]
        result = loaded.serve(*tf.nest.pack_sequence_as(arguments, tensors))
        results.append([storable(tensor) for tensor in tf.nest.flatten(result)])
    save(Path(outputs), results)


def save(path: Path, batches: list[list[NDArray[Any]]]) -> None:
    """Writes the arrays of batches to a file."""
    named = {
        f"{i}_{j}": array
        for i, batch in enumerate(batches)
        for j, array in enumerate(batch)
    }
    np.savez(path, **named)  # type: ignore[arg-type]


def load(path: Path) -> list[list[NDArray[Any]]]:
    """Reads a file that `save` has written."""
    batches: list[list[NDArray[Any]]] = []
    with np.load(path) as arrays:
        for name in arrays.files:
            if name.endswith("_0"):
                batches.append([])
            batches[-1].append(arrays[name])
    return batches


def storable(tensor: Any) -> NDArray[Any]:
    """A tensor for a file: NumPy saves neither bfloat16 nor objects."""
    import tensorflow as tf

    if tensor.dtype == tf.bfloat16:
        tensor = tf.cast(tensor, tf.float32)
    values: NDArray[Any] = np.asarray(tensor.numpy())
    return values.astype(np.bytes_) if values.dtype == object else values


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(text_of(error))

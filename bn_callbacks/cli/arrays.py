"""Sorts named arrays into inputs and targets, as `fit` takes them."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from bn_callbacks.cli.errors import CommandError, text_of
from bn_callbacks.layers import InputLayout

X = ("x", "x_train")
Y = ("y", "y_train")
WEIGHT = "sample_weight"


def read_arrays(
    path: Path, layout: InputLayout | None, outputs: Sequence[str]
) -> tuple[Any, list[str]]:
    """Reads a `.npz` file of arrays, or a `.npy` file of inputs, as `fit` takes them.

    Args:
        path: The file.
        layout: What the model takes; None if unknown.
        outputs: Names of the model's outputs.

    Returns:
        The data, and the names of unused arrays.

    Raises:
        CommandError: The file is damaged or holds Python objects, or its arrays do not
            fit the model.
    """
    try:
        # Arrays of objects are pickles, which can run any code.
        if path.suffix == ".npy":
            x = np.load(path, mmap_mode="r", allow_pickle=False)
            if not x.ndim:
                raise CommandError("One number is no data. Save an array of samples.")
            return x, []
        # NumPy does not close a damaged file.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            names, unused = as_fit_takes_them(arrays.files, layout, outputs)
            return tf.nest.map_structure(arrays.__getitem__, names), unused
    except CommandError as error:
        raise CommandError(f"{path}: {error}") from None
    except Exception as error:
        if re.search("pickle|Python objects", str(error)):
            raise CommandError(
                f"{path} holds Python objects, or is no NumPy file. Save arrays of "
                "numbers, all rows equally long."
            ) from error
        raise CommandError(
            f"{path} is damaged: {text_of(error)}. Save it again."
        ) from error


def as_fit_takes_them(
    names: Collection[str], layout: InputLayout | None, outputs: Sequence[str]
) -> tuple[Any, list[str]]:
    """Sorts names into inputs, targets and sample weights.

    Inputs have the names of the model's inputs, or `x`, or `x_0`, `x_1`, …, or
    `arr_0`, `arr_1`, … if `np.savez` got no names. Targets have the names of the
    model's outputs, or `y`, or `y_0`, `y_1`, …, or the unnamed places after the inputs.

    Args:
        names: The names of arrays.
        layout: What the model takes; None if unknown.
        outputs: Names of the model's outputs.

    Returns:
        `x` or `(x, y)` or `(x, y, sample_weight)`, with names in place of arrays; and
        the unused names.

    Raises:
        CommandError: There are no arrays for the model's inputs.
    """
    own = layout.names if layout else X[:1]
    count = len(own)
    inputs = _find(names, count, own, X, "x", 0)
    if inputs is None and count == 1 and len(names) == 1:
        inputs = list(names)
    if inputs is None:
        wanted = " and ".join(own) if count > 1 else f"{own[0]} or x"
        raise CommandError(
            "There are no arrays for the model's inputs. Received: "
            f"{', '.join(names) or 'none'}. Name the inputs {wanted}, the targets y."
        )
    x: Any = inputs if count > 1 else inputs[0]
    if layout is not None and layout.is_dict:
        x = dict(zip(own, inputs, strict=True))
    rest = [name for name in names if name not in inputs]
    targets = _find(rest, max(1, len(outputs)), outputs, Y, "y", count)
    if targets is None:
        return x, rest
    data = [x, targets if len(targets) > 1 else targets[0]]
    used = list(targets)
    if WEIGHT in rest:
        data.append(WEIGHT)
        used.append(WEIGHT)
    return tuple(data), [name for name in rest if name not in used]


def _find(
    names: Collection[str],
    count: int,
    own: Sequence[str],
    usual: Sequence[str],
    letter: str,
    first: int,
) -> list[str] | None:
    """The first complete set of `count` names, or None."""
    choices = [
        list(own),
        *([name] for name in usual),
        [f"{letter}_{index}" for index in range(count)],
        [f"arr_{index}" for index in range(first, first + count)],
    ]
    for choice in choices:
        if len(choice) == count and set(choice) <= set(names):
            return choice
    return None

"""Reads a directory of images by class, in the size that the model takes."""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import keras
import tensorflow as tf

from bn_callbacks.cli.errors import CommandError, text_of
from bn_callbacks.cli.explained import Explained
from bn_callbacks.layers import InputLayout

COLOURS = {1: "grayscale", 3: "rgb", 4: "rgba"}

LabelMode = Literal["int", "categorical", "binary"]


def read_images(
    directory: Path, model: keras.Model, layout: InputLayout | None, batch_size: int
) -> tuple[Any, str | None]:
    """Reads the images of a directory in random order, with the class of each.

    Returns:
        A dataset, and a note for the user, or None.

    Raises:
        CommandError: There are no images, or the model takes none.
    """
    height, width, channels = _image_size(layout, directory)
    classes = [path.name for path in directory.iterdir() if path.is_dir()]
    mode = _label_mode(model, len(classes))
    note = None
    if mode is None:
        note = (
            f"labels are not used: {len(classes)} classes do not fit outputs of shape "
            f"{_output_shape(model)}"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = keras.utils.image_dataset_from_directory(
                directory,
                labels="inferred" if mode else None,
                label_mode=mode,
                color_mode=COLOURS[channels],
                image_size=(height, width),
                batch_size=batch_size,
                # In the order of file names, classes would come one after the other.
                shuffle=True,
                seed=0,
            )
    except ValueError as error:
        raise CommandError(
            f"There are no images in {directory}: {error} Put those of each class into "
            "a directory of its own in it."
        ) from error
    return Explained(dataset, lambda: _first_damaged(dataset.file_paths)), note


def _first_damaged(paths: Iterable[str]) -> str | None:
    """Describes the first image that cannot be decoded."""
    path = ""
    try:
        for path in paths:
            tf.io.decode_image(tf.io.read_file(path), expand_animations=False)
    except tf.errors.OpError as error:
        return f"{path} is no image, or damaged: {text_of(error)}"
    return None


def _image_size(layout: InputLayout | None, directory: Path) -> tuple[int, int, int]:
    shapes = layout.shapes if layout else ()
    is_image = len(shapes) == 1 and len(shapes[0]) == 4 and shapes[0][3] in COLOURS
    if not is_image:
        raise CommandError(
            f"{directory} is a directory of images, and the model takes no image "
            f"(height, width, channels). Received: inputs of shape "
            f"{', '.join(map(str, shapes)) or 'unknown'}. Pass package.module:function "
            "with a dataset that it takes."
        )
    _, height, width, channels = shapes[0]
    if height is None or width is None or channels is None:
        raise CommandError(
            f"The model takes images of any size, so that those in {directory} cannot "
            f"be brought to one. Received: inputs of shape {shapes[0]}. Pass "
            "package.module:function with a dataset in the size of training."
        )
    return height, width, channels


def _label_mode(model: keras.Model, classes: int) -> LabelMode | None:
    """The form in which the model's loss takes classes; None if it cannot."""
    shape = _output_shape(model)
    units = shape[-1] if shape else None
    if units == 1 and classes == 2:
        return "binary"
    if units != classes:
        return None
    (loss,) = tf.nest.flatten(getattr(model, "loss", None))[:1] or (None,)
    name = str(getattr(loss, "name", getattr(loss, "__name__", loss)))
    return "int" if "sparse" in name.lower() else "categorical"


def _output_shape(model: keras.Model) -> tuple[int | None, ...] | None:
    outputs = getattr(model, "outputs", None)
    return tuple(outputs[0].shape) if outputs and len(outputs) == 1 else None

"""Opens what `--data` names, as `fit` takes it."""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from bn_callbacks.cli.arrays import read_arrays
from bn_callbacks.cli.ending import say
from bn_callbacks.cli.errors import CommandError, text_of
from bn_callbacks.cli.images import read_images
from bn_callbacks.cli.modules import import_module
from bn_callbacks.cli.options import DATA
from bn_callbacks.cli.records import read_records
from bn_callbacks.layers import InputLayout, input_layout
from bn_callbacks.measuring.data import BATCH_SIZE

_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


class Data(NamedTuple):
    """Data as `fit` takes them.

    Args:
        x: The data.
        batch_size: Samples per batch; None if `x` comes in batches.
    """

    x: Any
    batch_size: int | None = None


def open_data(text: str, model: keras.Model, options: argparse.Namespace) -> Data:
    """Opens the data that an option names.

    Args:
        text: A file, a directory, a pattern, or a function.
        model: The model that will take the data.
        options: The command's options, of which `features` and `batch_size` are used.

    Raises:
        CommandError: `--data` does not take this, or it cannot be read.
    """
    layout = input_layout(model)
    # Sequential models have no names of outputs.
    outputs = list(getattr(model, "output_names", None) or [])
    path, batch_size = Path(text), options.batch_size
    is_records = ".tfrec" in path.name or any(path.glob("*.tfrec*"))
    named = None if path.exists() else _FUNCTION.fullmatch(text)
    if path.is_file() and path.suffix in (".npz", ".npy"):
        x, unused = read_arrays(path, layout, outputs)
        if unused:
            say(f"note: of {text}, {', '.join(unused)} will not be used")
        return Data(x, batch_size)
    if (path / "dataset_spec.pb").is_file():
        try:
            saved = _load_saved(path)
        except Exception as error:
            raise CommandError(
                f"{path} is damaged: {text_of(error)}. Save it again."
            ) from error
        return Data(_in_batches(saved, layout, batch_size))
    if path.is_dir() and not is_records:
        images, note = read_images(path, model, layout, batch_size or BATCH_SIZE)
        if note:
            say(f"note: {note}")
        return Data(images)
    if named:
        x = _call(*named.groups())
        if isinstance(x, tf.data.Dataset):
            return Data(_in_batches(x, layout, batch_size))
        return Data(x, batch_size)
    if options.features is not None:
        size = batch_size or BATCH_SIZE
        return Data(read_records(text, options.features, layout, outputs, size))
    if is_records:
        raise CommandError(
            f"{text} looks like TFRecord files: --features SPEC.json has to say what "
            "they hold. See --help."
        )
    what = "is nothing that can be read" if path.exists() else "does not exist"
    raise CommandError(f"{text} {what}. Pass {DATA}.")


def _call(module: str, name: str) -> Any:
    function = getattr(import_module(module), name, None)
    if not callable(function):
        raise CommandError(
            f"There is no function {name!r} in the module {module!r}. Received: "
            f"{function!r:.60}. It has to return a dataset, and takes no arguments."
        )
    try:
        x = function()
    except Exception as error:
        raise CommandError(
            f"{module}:{name}() raised {type(error).__name__}: {error}"
        ) from error
    if x is None:
        raise CommandError(f"{module}:{name}() returned None instead of a dataset.")
    return x


def _load_saved(path: Path) -> tf.data.Dataset:
    """Loads what `tf.data.Dataset.save` wrote, with or without compression."""
    dataset = tf.data.Dataset.load(str(path))
    try:
        next(iter(dataset), None)
    except tf.errors.DataLossError:
        dataset = tf.data.Dataset.load(str(path), compression="GZIP")
        next(iter(dataset), None)
    return dataset


def _in_batches(
    dataset: tf.data.Dataset, layout: InputLayout | None, batch_size: int | None
) -> tf.data.Dataset:
    """Divides a dataset into batches if it has single examples."""
    x, *_ = keras.utils.unpack_x_y_sample_weight(dataset.element_spec)
    if layout is not None:
        named = isinstance(x, dict) and all(name in x for name in layout.names)
        specs = [x[name] for name in layout.names] if named else tf.nest.flatten(x)
        if all(map(_is_example, specs, layout.shapes)):
            return dataset.batch(batch_size or BATCH_SIZE)
    return dataset.rebatch(batch_size) if batch_size else dataset


def _is_example(spec: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor is one example of an input, rather than a batch of them."""
    if spec.shape.rank is None or spec.shape.rank != len(shape) - 1:
        return False
    pairs = zip(spec.shape, itertools.islice(shape, 1, None), strict=True)
    return all(wanted is None or size == wanted for size, wanted in pairs)

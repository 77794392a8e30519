"""TFRecord files, and the specification of what their examples hold."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from bn_callbacks.cli.arrays import as_fit_takes_them
from bn_callbacks.cli.errors import CommandError
from bn_callbacks.layers import InputLayout

ENCODINGS = ("raw", "tensor", "image")

EXAMPLE = (
    '{"inputs": {"image": {"shape": [28, 28, 1], "dtype": "float32"}}, '
    '"targets": {"label": {"shape": [], "dtype": "int64"}}}'
)


class Feature:
    """One feature of an example: how it is stored, and what it becomes.

    Args:
        name: Its name in the example.
        spec: `shape` and `dtype` of the tensor; and where it is stored as bytes,
            `encoding`: `"raw"` for the bytes of the numbers, `"tensor"` for what
            `tf.io.serialize_tensor` gives, `"image"` for JPEG, PNG and the like, which
            is resized to the shape.

    Raises:
        CommandError: The specification is not of this form.
    """

    def __init__(self, name: str, spec: Any) -> None:
        self.name = name
        try:
            self.shape = [int(size) for size in spec["shape"]]
            self.dtype = tf.as_dtype(spec["dtype"])
            self.encoding = spec.get("encoding")
            is_right = (
                self.encoding in (None, *ENCODINGS) and min(self.shape, default=1) > 0
            )
            is_right &= self.encoding != "image" or len(self.shape) == 3
            is_right &= set(spec) <= {"shape", "dtype", "encoding"}
        except (KeyError, TypeError, ValueError, AttributeError):
            is_right = False
        if not is_right:
            raise CommandError(
                f"The feature {name!r} needs a shape of whole numbers, a dtype, and "
                "where it is stored as bytes an encoding: "
                f"{', '.join(ENCODINGS)}. Received: {spec!r}."
            )

    @property
    def stored(self) -> Any:
        """How TensorFlow finds it in an example."""
        if self.encoding is not None:
            return tf.io.FixedLenFeature([], tf.string)
        # An example knows three kinds of lists.
        kind = tf.float32 if self.dtype.is_floating else tf.int64
        kind = tf.string if self.dtype == tf.string else kind
        return tf.io.FixedLenFeature(self.shape, kind)

    def decode(self, value: Any) -> Any:
        """The tensor that it becomes."""
        if self.encoding == "raw":
            value = tf.reshape(tf.io.decode_raw(value, self.dtype), self.shape)
        elif self.encoding == "tensor":
            value = tf.ensure_shape(tf.io.parse_tensor(value, self.dtype), self.shape)
        elif self.encoding == "image":
            *size, channels = self.shape
            value = tf.io.decode_image(value, channels, expand_animations=False)
            value = tf.ensure_shape(tf.image.resize(value, size), self.shape)
        return tf.cast(value, self.dtype)


def read_records(
    pattern: str, spec: str, layout: InputLayout | None, outputs: Sequence[str]
) -> tf.data.Dataset:
    """Examples of TFRecord files, one by one, as `fit` takes them.

    Args:
        pattern: A file, a directory of files, or a pattern such as `train-*.tfrecord`;
            files whose names end in `.gz` are decompressed.
        spec: A JSON file with the `inputs` and `targets` of an example.
        layout: What the model takes.
        outputs: Names of the model's outputs.

    Raises:
        CommandError: There are no files, or the specification is not as it should be.
    """
    files = _files(pattern)
    inputs, targets = _read_spec(Path(spec))
    features = {feature.name: feature for feature in (*inputs, *targets)}
    stored = {name: feature.stored for name, feature in features.items()}
    roles = {
        **_roles(inputs, "x", layout.names if layout else ()),
        **_roles(targets, "y", outputs),
    }
    names, unused = as_fit_takes_them(roles, layout, outputs)
    if unused:
        own = (layout.names if layout else ("x",), outputs or ("one target",))
        raise CommandError(
            f"{spec} does not fit the model. Received: {len(inputs)} inputs and "
            f"{len(targets)} targets. The model's inputs are {', '.join(own[0])}, its "
            f"outputs {', '.join(own[1])}."
        )

    @tf.autograph.experimental.do_not_convert
    def parse(example: Any) -> Any:
        values = tf.io.parse_single_example(example, stored)
        # tf.data would make one tensor of a list.
        return _tuples(
            tf.nest.map_structure(
                lambda role: features[roles[role]].decode(values[roles[role]]), names
            )
        )

    compression = "GZIP" if all(name.endswith(".gz") for name in files) else None
    records = tf.data.TFRecordDataset(files, compression_type=compression)
    return records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)


def _roles(features: list[Feature], letter: str, own: Sequence[str]) -> dict[str, str]:
    """Names that `as_fit_takes_them` knows -> names of features."""
    names = [feature.name for feature in features]
    if set(names) == set(own):
        return {name: name for name in names}
    if len(names) == 1:
        return {letter: names[0]}
    return {f"{letter}_{index}": name for index, name in enumerate(names)}


def _tuples(data: Any) -> Any:
    """The data as a tuple of parts, and lists of tensors as tuples."""
    parts = data if isinstance(data, tuple) else (data,)
    return tuple(tuple(part) if isinstance(part, list) else part for part in parts)


def _files(pattern: str) -> list[str]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if ".tfrec" in file.name)
    else:
        found = (
            [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
        )
    if not found:
        raise CommandError(
            f"There are no TFRecord files {pattern}. Name a file, a directory with "
            ".tfrecord files, or a pattern in quotes."
        )
    return found


def _read_spec(path: Path) -> tuple[list[Feature], list[Feature]]:
    try:
        spec = json.loads(path.read_text("utf-8"))
        parts = [spec.pop("inputs"), spec.pop("targets", {})]
        if spec or not parts[0]:
            raise ValueError("it needs inputs, may have targets, and nothing else")
        inputs, targets = (
            [Feature(name, feature) for name, feature in part.items()] for part in parts
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CommandError(
            f"{path} is no specification of features: {error}. It looks like this: "
            f"{EXAMPLE}"
        ) from error
    return inputs, targets

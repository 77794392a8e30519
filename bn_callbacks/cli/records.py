"""Reads TFRecord files, and the specification of their examples."""

import contextlib
import glob
import gzip
import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from bn_callbacks.cli.arrays import as_fit_takes_them
from bn_callbacks.cli.errors import CommandError, text_of
from bn_callbacks.cli.explained import Explained
from bn_callbacks.cli.options import FEATURES
from bn_callbacks.layers import InputLayout

_HEADER, _FOOTER = 12, 4
"""Bytes before a record, which begin with its length, and after it."""

MAX_RECORD = 2**32
"""Largest number of bytes in a record; messages of protocol buffers are smaller."""

ENCODINGS = ("raw", "tensor", "image")

MAX_ELEMENTS = 2**28
"""Largest number of elements in a feature of one example: a gigabyte. TensorFlow would
allocate more without checking the free memory."""


class Feature:
    """One feature of an example: how it is stored, and the tensor that it becomes.

    Args:
        name: Its name in the example.
        spec: `shape` and `dtype` of the tensor; and `encoding` if it is stored as
            bytes: `"raw"` for the bytes of the numbers, `"tensor"` for the result of
            `tf.io.serialize_tensor`, `"image"` for JPEG, PNG and the like, which are
            resized to the shape.

    Raises:
        CommandError: The specification has another form.
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
            is_right &= math.prod(self.shape) <= MAX_ELEMENTS
        except (KeyError, TypeError, ValueError, AttributeError):
            is_right = False
        if not is_right:
            raise CommandError(
                f"The feature {name!r} needs a shape of whole numbers, a dtype, and "
                "where it is stored as bytes an encoding: "
                f"{', '.join(ENCODINGS)}. An example has {MAX_ELEMENTS:,} numbers at "
                f"most. Received: {spec!r}."
            )

    @property
    def stored(self) -> Any:
        """The specification with which TensorFlow parses it."""
        if self.encoding is not None:
            return tf.io.FixedLenFeature([], tf.string)
        # Examples hold lists of floats, integers or bytes.
        kind = tf.float32 if self.dtype.is_floating else tf.int64
        kind = tf.string if self.dtype == tf.string else kind
        return tf.io.FixedLenFeature(self.shape, kind)

    def decode(self, value: Any) -> Any:
        """Decodes the stored value into the tensor."""
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
    pattern: str,
    spec: str,
    layout: InputLayout | None,
    outputs: Sequence[str],
    batch_size: int,
) -> Explained:
    """Reads examples of TFRecord files in batches, as `fit` takes them.

    Args:
        pattern: A file, a directory of files, or a pattern such as `train-*.tfrecord`;
            files whose names end in `.gz` are decompressed.
        spec: A JSON file with the `inputs` and `targets` of an example, or with its
            features, if their names say which is which, as those of arrays do.
        layout: What the model takes.
        outputs: Names of the model's outputs.
        batch_size: Examples per batch.

    Raises:
        CommandError: There are no files, or the specification is wrong.
    """
    files = _files(pattern)
    features, inputs, targets = _read_spec(Path(spec))
    stored = {name: feature.stored for name, feature in features.items()}
    roles = {
        **_roles(inputs, "x", layout.names if layout else ()),
        **_roles(targets, "y", outputs),
    } or {name: name for name in features}
    try:
        names, unused = as_fit_takes_them(roles, layout, outputs)
    except CommandError:
        unused = list(features)
    if unused:
        own = (layout.names if layout else ("x",), outputs or ("one target",))
        raise CommandError(
            f"{spec} does not fit the model, or its inputs and targets cannot be told "
            f"apart. Received: {', '.join(features)}. The model's inputs are "
            f"{', '.join(own[0])}, its outputs {', '.join(own[1])}. Say which feature "
            f"is which, as in {FEATURES}"
        )

    @tf.autograph.experimental.do_not_convert
    def parse(example: Any) -> Any:
        values = tf.io.parse_single_example(example, stored)
        # tf.data would join a list to one tensor.
        return _tuples(
            tf.nest.map_structure(
                lambda role: features[roles[role]].decode(values[roles[role]]), names
            )
        )

    compression = "GZIP" if all(name.endswith(".gz") for name in files) else None
    for name in files:
        _check_lengths(name, compression is not None)
    records = tf.data.TFRecordDataset(files, compression_type=compression)
    examples = records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    return Explained(
        examples.batch(batch_size), lambda: _first_damaged(files, compression, parse)
    )


def _check_lengths(name: str, is_compressed: bool) -> None:
    """Checks the length that each record declares, which TensorFlow trusts.

    Raises:
        CommandError: A record declares more bytes than it can have.
    """
    with contextlib.ExitStack() as stack:
        opened: Any = gzip.open if is_compressed else open
        file = stack.enter_context(opened(name, "rb"))
        # TensorFlow itself names a file that is no archive, or a torn one.
        stack.enter_context(contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error))
        for number in itertools.count():
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                return
            (length,) = struct.unpack_from("<Q", header)
            if length > MAX_RECORD:
                raise CommandError(
                    f"The data are damaged: record {number} of {name} (counted from 0) "
                    f"claims to have {length:,} bytes (at most: {MAX_RECORD:,}). Write "
                    "the file again."
                )
            file.seek(length + _FOOTER, os.SEEK_CUR)


def _first_damaged(
    files: Sequence[str], compression: str | None, parse: Callable[[Any], Any]
) -> str | None:
    """Describes the first record that cannot be read or parsed."""
    for name in files:
        number = -1
        try:
            for example in tf.data.TFRecordDataset(name, compression_type=compression):
                number += 1
                parse(example)
        except tf.errors.DataLossError as error:
            return (
                f"{text_of(error)}, in record {number + 1} of {name} (counted from 0)"
            )
        except tf.errors.OpError as error:
            return (
                f"{text_of(error)}, in record {number} of {name} (counted from 0), "
                "which is not what --features says"
            )
    return None


def _roles(names: Sequence[str], letter: str, own: Sequence[str]) -> dict[str, str]:
    """The name of a feature for each name that `as_fit_takes_them` knows."""
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


def _read_spec(path: Path) -> tuple[dict[str, Feature], list[str], list[str]]:
    """The features, and the names of inputs and targets if the file gives them."""
    try:
        spec = json.loads(path.read_text("utf-8"))
        is_grouped = "shape" not in spec.get("inputs", {"shape": None})
        parts = [spec.pop("inputs"), spec.pop("targets", {})] if is_grouped else [spec]
        if (is_grouped and spec) or not parts[0]:
            raise ValueError("it needs inputs, may have targets, and nothing else")
        features = {
            name: Feature(name, feature)
            for part in parts
            for name, feature in part.items()
        }
        inputs, targets = map(list, parts) if is_grouped else ([], [])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CommandError(
            f"{path} is no specification of features: {error}. It looks like this: "
            f"{FEATURES}"
        ) from error
    return features, inputs, targets

"""A run's event file."""

import itertools
import os
import platform
import time
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

__all__ = ["EventFile", "histogram_pb", "image_pb", "layout_pb", "scalar_pb", "text_pb"]


WRITING_FAILS = (OSError, tf.errors.OpError)
"""What file systems raise, those that TensorFlow knows included."""

_number = itertools.count()


class EventFile:
    """Writes summaries into a directory, whose event file is opened on first use.

    What is written together becomes one event, and a tag is described once a file, for
    TensorBoard reads no more than that. Each event is on the disk when `write` returns.

    It has nothing to do with the default writer of `tf.summary`, so that a file that
    cannot be written, on a full disk for one, is nobody else's trouble.

    Args:
        directory: Where to write.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._writer: tf.io.TFRecordWriter | None = None
        self._described: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether there is something to close."""
        return self._writer is not None

    def write(self, summaries: Iterable[Summary], step: int) -> None:
        """Writes summaries as one event; none if there are none.

        Args:
            summaries: What to write.
            step: The optimizer's step.
        """
        event = Event(wall_time=time.time(), step=step)
        for summary in summaries:
            event.summary.value.extend(summary.value)
        if not event.summary.value:
            return
        for value in event.summary.value:
            if value.tag in self._described:
                value.metadata.ClearField("summary_description")
            self._described.add(value.tag)
        if self._writer is None:
            self._writer = self._open()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _open(self) -> tf.io.TFRecordWriter:
        tf.io.gfile.makedirs(self._directory)
        now = time.time()
        name = (
            f"events.out.tfevents.{int(now):010d}.{platform.node()}.{os.getpid()}."
            f"{next(_number)}.v2"
        )
        writer = tf.io.TFRecordWriter(os.path.join(self._directory, name))
        first = Event(wall_time=now, file_version="brain.Event:2")
        writer.write(first.SerializeToString())
        return writer

    def close(self) -> None:
        """Closes the file; the next `write` opens another."""
        writer, self._writer = self._writer, None
        self._described.clear()
        if writer is not None:
            writer.close()


def image_pb(tag: str, png: bytes, size: tuple[int, int], description: str) -> Summary:
    """A picture, as TensorBoard's image plugin reads it.

    Args:
        tag: Its name.
        png: The file.
        size: Width and height.
        description: What it shows.
    """
    width, height = (str(length).encode() for length in size)
    metadata = image.create_summary_metadata(None, description)
    return _summary(tag, [width, height, png], metadata)


def layout_pb(layout: layout_pb2.Layout) -> Summary:
    """A layout of the Custom Scalars tab."""
    return _summary(
        custom_scalar.CONFIG_SUMMARY_TAG,
        layout.SerializeToString(),
        custom_scalar.create_summary_metadata(),
    )


def _summary(
    tag: str, content: bytes | list[bytes], metadata: SummaryMetadata
) -> Summary:
    value = Summary.Value(
        tag=tag, tensor=make_tensor_proto(content, dtype=np.object_), metadata=metadata
    )
    return Summary(value=[value])

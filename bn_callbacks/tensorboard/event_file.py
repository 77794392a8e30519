"""Writes a run's event file."""

import itertools
import os
import platform
import time
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.image import metadata as image
from tensorboard.util.tensor_util import make_tensor_proto

WRITING_FAILS = (OSError, tf.errors.OpError)
"""Errors of file systems, including those that TensorFlow knows."""


_number = itertools.count()


class EventFile:
    """Writes summaries into an event file, which is opened on first use.

    Summaries of one step become one event, and each tag is described once a file, since
    TensorBoard reads only the first description. When `write` returns, the events are
    on the disk.

    `tf.summary`'s own writer takes two to four times as long for a report, which would
    leave time for fewer reports. After an error on a full disk, it also stays the
    default writer of the whole process.
    """

    def __init__(self) -> None:
        self._writer: tf.io.TFRecordWriter | None = None
        self._described: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether the file is open."""
        return self._writer is not None

    def write(
        self, directory: str, events: Iterable[tuple[int, Iterable[Summary]]]
    ) -> None:
        """Writes an event for each step that has summaries.

        Args:
            directory: Where to make the file if none is open.
            events: Steps of the optimizer, and the summaries of each.
        """
        for step, summaries in events:
            values = [value for summary in summaries for value in summary.value]
            for value in values:
                if value.tag in self._described:
                    value.metadata.ClearField("summary_description")
                self._described.add(value.tag)
            if values:
                if self._writer is None:
                    self._writer = _open(directory)
                event = Event(wall_time=time.time(), step=step)
                event.summary.value.extend(values)
                self._writer.write(event.SerializeToString())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes the file; the next `write` opens another."""
        writer, self._writer = self._writer, None
        self._described.clear()
        if writer is not None:
            writer.close()


def _open(directory: str) -> tf.io.TFRecordWriter:
    tf.io.gfile.makedirs(directory)
    name = (
        f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}."
        f"{next(_number)}.v2"
    )
    writer = tf.io.TFRecordWriter(os.path.join(directory, name))
    first = Event(wall_time=time.time(), file_version="brain.Event:2")
    writer.write(first.SerializeToString())
    return writer


def image_pb(tag: str, png: bytes, size: tuple[int, int], description: str) -> Summary:
    """Makes a summary of a picture for TensorBoard's image plugin.

    Args:
        tag: Its name.
        png: The file.
        size: Width and height.
        description: What it shows.
    """
    content = [*(str(length).encode() for length in size), png]
    metadata = image.create_summary_metadata(None, description)
    tensor = make_tensor_proto(content, dtype=np.object_)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def layout_pb(layout: layout_pb2.Layout) -> Summary:
    """Makes a summary of a layout for the Custom Scalars tab."""
    tensor = make_tensor_proto(layout.SerializeToString(), dtype=np.object_)
    metadata = custom_scalar.create_summary_metadata()
    tag = custom_scalar.CONFIG_SUMMARY_TAG
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])

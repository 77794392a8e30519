"""A run's event file, written by TensorFlow's own writer."""

import contextlib
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.image import metadata as image
from tensorboard.util.tensor_util import make_tensor_proto

WRITING_FAILS = (OSError, tf.errors.OpError)
"""What file systems raise, those that TensorFlow knows included."""


class EventFile:
    """Writes summaries into a directory, whose event file is opened on first use.

    `tf.summary.scalar` takes half a millisecond for a number, 31 ms for sixty of them;
    one event with all of them takes 0.6 ms. A tag is described once a file: TensorBoard
    reads no more than that. Each event is on the disk when `write` returns.
    """

    def __init__(self) -> None:
        self._writer: tf.summary.SummaryWriter | None = None
        self._described: set[str] = set()

    @property
    def is_open(self) -> bool:
        """Whether there is something to close."""
        return self._writer is not None

    def write(
        self, directory: str, events: Iterable[tuple[int, Iterable[Summary]]]
    ) -> None:
        """Writes events; none for steps without summaries.

        Args:
            directory: Where to write, if there is no file yet.
            events: Steps of the optimizer, and the summaries of each.
        """
        found = [
            (step, [value for summary in summaries for value in summary.value])
            for step, summaries in events
        ]
        if not any(values for _, values in found):
            return
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(directory)
        # Keras' callback lets nothing be recorded between its own steps.
        with self._writer.as_default(), tf.summary.record_if(True):
            try:
                for step, values in found:
                    self._write(step, values)
                self._writer.flush()
            except WRITING_FAILS:
                # One that fails to flush when the block ends stays everybody's default.
                with contextlib.suppress(*WRITING_FAILS):
                    self._writer.close()
                raise

    def _write(self, step: int, values: list[Summary.Value]) -> None:
        for value in values:
            if value.tag in self._described:
                value.metadata.ClearField("summary_description")
            self._described.add(value.tag)
        if values:
            event = Summary(value=values).SerializeToString()
            tf.summary.experimental.write_raw_pb(event, step)

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
    content = [*(str(length).encode() for length in size), png]
    metadata = image.create_summary_metadata(None, description)
    tensor = make_tensor_proto(content, dtype=np.object_)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def layout_pb(layout: layout_pb2.Layout) -> Summary:
    """A layout of the Custom Scalars tab."""
    tensor = make_tensor_proto(layout.SerializeToString(), dtype=np.object_)
    metadata = custom_scalar.create_summary_metadata()
    tag = custom_scalar.CONFIG_SUMMARY_TAG
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])

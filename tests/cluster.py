"""Several replicas and several machines, on one: what tests and benchmarks need."""

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

DEVICES = 4
"""Logical devices, so that strategies have replicas."""


def add_devices() -> None:
    """Makes one CPU look like several; before anything else uses TensorFlow."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * DEVICES,
    )


def mirrored(replicas: int) -> tf.distribute.Strategy:
    """A strategy on so many of the logical devices."""
    # Without collectives, which TensorFlow mixes up between strategies of a process.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


@contextlib.contextmanager
def workers(
    count: int, command: Sequence[str], **options: Any
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that are each other's workers, on free ports; killed at the end.

    Args:
        count: How many.
        command: What each of them runs.
        **options: For `subprocess.Popen`.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(count):
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": addresses}, "task": task}
            process = subprocess.Popen(
                command,
                env={**os.environ, "TF_CONFIG": json.dumps(config)},
                stdout=subprocess.PIPE,
                text=True,
                **options,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes

"""Replicas that keep statistics of their own."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from cluster import mirrored
from kit import (
    Cases,
    Run,
    blobs,
    compiled,
    crossentropy,
    fitter,
    mlp,
    pictures,
    rng,
    table,
    teacher,
)

layers = keras.layers
cases = Cases()


def in_order(x: Any, y: Any, batch_size: int) -> tf.data.Dataset:
    """Batches as they come, so that each replica gets the same part of each."""
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)


@cases.problem("replicas_differ")
def a_sensor_for_each_replica() -> Run:
    # Of each batch of 32 the second half is from a sensor with another scale.
    z = rng(3).normal(size=(3200, 6))
    second = (np.arange(3200) % 32 >= 16)[:, None]
    x = np.where(second, 4 + 3 * z, z).astype("float32")
    y = teacher(z)
    with mirrored(2).scope():
        model = compiled(mlp(6, momentum=0.95), keras.optimizers.Adam(0.01))
    fit = fitter(model, in_order(x, y, 32), epochs=4)
    return Run(model, fit, (x[:512], y[:512]), 16)


@cases.problem("replicas_differ", held_back=True)
def a_camera_for_each_replica() -> Run:
    # Four cameras, each a quarter of every batch, each brighter than the one before.
    x, y = pictures(2560, noise=0.3)
    camera = (np.arange(2560) % 64) // 16
    x = x * (1 + camera[:, None, None, None]) + 2 * camera[:, None, None, None]
    with mirrored(4).scope():
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(8, 3),
                layers.BatchNormalization(momentum=0.9),
                layers.ReLU(),
                layers.GlobalAveragePooling2D(),
                layers.Dense(3),
            ]
        )
        compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    fit = fitter(model, in_order(x.astype("float32"), y, 64), epochs=5)
    return Run(model, fit, (x[:512].astype("float32"), y[:512]), 16)


@cases.silent()
def replicas_with_random_shares() -> Run:
    x, y = table(3200)
    with mirrored(2).scope():
        model = compiled(mlp(8, momentum=0.95), keras.optimizers.Adam(0.003))
    fit = fitter(model, x, y, epochs=6, batch_size=64)
    return Run(model, fit, (x[:512], y[:512]), 32)


@cases.silent(held_back=True)
def replicas_that_are_synchronized() -> Run:
    x, y = blobs(2560, mean=2.0)
    with mirrored(2).scope():
        model = mlp(10, outputs=4, momentum=0.95, synchronized=True)
        compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=8, batch_size=32)
    return Run(model, fit, (x[:512], y[:512]), 32)

"""A training whose troubles come and go, to be looked at when all is well again.

    python tests/browser/troubles.py [LAYERS] [DIRECTORY]

Sixty-five BN layers, ten epochs of forty steps: in epochs 4 and 5 each batch has one
class, in 7 one example in a hundred is far out, in 8 and 9 the learning rate is twenty
times as large.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from bn_callbacks import BatchNormMonitor

EPOCHS, STEPS, BATCH = 10, 40, 32
GROUPED, OUTLYING, FAST = (4, 5), (7,), (8, 9)
"""Epochs, counted from 1."""


def make_model(layers: int) -> keras.Model:
    """A residual network of dense layers, with so many BN layers, an odd number."""

    def normalised(z, name):
        z = keras.layers.Dense(24, name=f"{name}_dense")(z)
        return keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(z)

    inputs = keras.Input((16,))
    z = keras.layers.ReLU()(normalised(inputs, "stem"))
    for block in range(layers // 2):
        name = f"stage_{block // 8}_block_{block % 8}"
        y = keras.layers.ReLU()(normalised(z, f"{name}_a"))
        y = normalised(y, f"{name}_b")
        z = keras.layers.ReLU()(keras.layers.Add()([z, y]))
    model = keras.Model(inputs, keras.layers.Dense(4)(z), name="net")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    return model


def make_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The examples of all epochs, in their order."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1.5, (4, 16))
    batches = []
    for epoch in range(1, EPOCHS + 1):
        for step in range(STEPS):
            y = rng.integers(0, 4, BATCH)
            if epoch in GROUPED:
                y = np.full(BATCH, step % 4)
            x = 3 + centres[y] + rng.normal(0, 1, (BATCH, 16))
            if epoch in OUTLYING and step % 4 == 0:
                x[rng.integers(0, BATCH)] *= 200
            batches.append((x.astype("float32"), y.astype("int32")))
    x, y = map(np.concatenate, zip(*batches, strict=True))
    return x, y


def set_rate(model: keras.Model, epoch: int) -> None:
    """The learning rate of an epoch that begins."""
    model.optimizer.learning_rate.assign(0.2 if epoch + 1 in FAST else 0.01)


def train(log_dir: Path | str, layers: int = 65, **arguments) -> BatchNormMonitor:
    """Trains, and returns the monitor."""
    keras.utils.set_random_seed(0)
    model, (x, y) = make_model(layers), make_data()
    monitor = BatchNormMonitor(log_dir, probe=(x[:256], y[:256]), **arguments)
    rate = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: set_rate(model, epoch)
    )
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    model.fit(
        data, epochs=EPOCHS, steps_per_epoch=STEPS, verbose=0,
        callbacks=[rate, monitor],
    )  # fmt: skip
    return monitor


if __name__ == "__main__":
    count = int(sys.argv[1]) if sys.argv[1:] else 65
    print(train(sys.argv[2] if sys.argv[2:] else "logs/troubles", count).report)

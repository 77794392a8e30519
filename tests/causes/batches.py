"""Batches that are no random sample of the data, or hardly a sample at all."""

from typing import Any

import keras
import numpy as np
from kit import (
    Cases,
    Run,
    blobs,
    compiled,
    crossentropy,
    fitter,
    mlp,
    normed,
    pictures,
    rng,
    table,
    teacher,
)

layers = keras.layers
BN = layers.BatchNormalization
cases = Cases()


@cases.problem("correlated_batches", gap=None)
def sorted_classes() -> Run:
    x, y = blobs(1920, classes=4, spread=1.5)
    order = np.argsort(y, kind="stable")
    x, y = x[order], y[order]
    model = compiled(mlp(10, 4), "adam", crossentropy())
    fit = fitter(model, x, y, epochs=8, shuffle=False)
    # Every fifth batch.
    chosen = (np.arange(len(x)) // 32) % 5 == 0
    return Run(model, fit, (x[chosen], y[chosen]))


def sessions(count: int, size: int, features: int, seed: int) -> tuple[Any, Any]:
    """Rows recorded in sessions, each with an offset and a gain of its own."""
    draw = rng(seed)
    z = draw.normal(size=(count, size, features))
    offset = 3 * draw.normal(size=(count, 1, features))
    gain = draw.uniform(0.4, 2.5, size=(count, 1, features))
    x = (offset + gain * z).astype("float32")
    return x.reshape(-1, features), teacher(z.reshape(-1, features))


@cases.problem("correlated_batches")
def one_session_a_batch() -> Run:
    x, y = sessions(40, 32, 8, seed=0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            BN(momentum=0.9),
            layers.Dense(32, "relu"),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=10, shuffle=False)
    return Run(model, fit, (x[:320], y[:320]))


@cases.problem("correlated_batches", held_back=True)
def one_patient_a_batch_of_pictures() -> Run:
    draw = rng(2)
    x, y = pictures(30 * 20, noise=0.4)
    brightness = 3 * draw.normal(size=(30, 1, 1, 1, 1))
    contrast = draw.uniform(0.3, 3, size=(30, 1, 1, 1, 1))
    x = (brightness + contrast * x.reshape(30, 20, 8, 8, 1)).astype("float32")
    x = x.reshape(-1, 8, 8, 1)
    inputs = keras.Input((8, 8, 1))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Conv2D(8, 3)(inputs)))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Conv2D(8, 3)(z)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(z)))
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=15, batch_size=20, shuffle=False)
    return Run(model, fit, (x[:300], y[:300]), 20)


@cases.problem("correlated_batches", held_back=True)
def padding_in_length_buckets() -> Run:
    draw = rng(4)
    rows, steps = 960, 24
    lengths = np.sort(draw.integers(3, steps + 1, size=rows))
    z = draw.normal(size=(rows, steps, 3))
    level = draw.normal(size=(rows, 1, 3))
    # What counts is a sequence's own level, seen in its real steps only.
    x = 4 + level + 0.5 * z
    x *= (np.arange(steps) < lengths[:, None])[..., None]
    y = teacher(2 * level[:, 0])
    buckets = draw.permutation(rows // 32)
    x, y = (v.reshape(-1, 32, *v.shape[1:])[buckets] for v in (x, y))
    x, y = x.reshape(-1, steps, 3).astype("float32"), y.reshape(-1, 1)
    stack: list[Any] = [keras.Input((steps, 3))]
    for _ in range(2):
        convolution = layers.Conv1D(12, 3, padding="same")
        stack += [convolution, BN(momentum=0.95), layers.ReLU()]
    stack += [layers.GlobalAveragePooling1D(), layers.Dense(24, "relu")]
    model = keras.Sequential([*stack, layers.Dense(1)])
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=15, shuffle=False)
    return Run(model, fit, (x[:320], y[:320]))


@cases.problem("correlated_batches")
def measurements_in_the_order_of_time() -> Run:
    draw = rng(6)
    rows = 1600
    z = draw.normal(size=(rows, 6))
    # A sensor's slow wander, wide against what it measures within a batch.
    wander = np.cumsum(draw.normal(size=(rows, 6)), axis=0) * 0.15
    x, y = (z + wander).astype("float32"), teacher(z)
    inputs = keras.Input((6,))
    h = layers.Activation("tanh")(BN()(layers.Dense(24)(BN()(inputs))))
    model = keras.Model(inputs, layers.Dense(1)(h))
    compiled(model, keras.optimizers.RMSprop(0.01))
    fit = fitter(model, x, y, epochs=10, batch_size=40, shuffle=False)
    return Run(model, fit, (x, y), 40)


def queries(count: int, size: int, seed: int) -> tuple[Any, Any]:
    """Queries of random documents, and how each of these stands among the others."""
    z = rng(seed).normal(size=(count, size, 5))
    place = z[..., 0] - z[..., 0].mean(axis=1, keepdims=True)
    place = place / z[..., 0].std(axis=1, keepdims=True)
    return z.reshape(-1, 5).astype("float32"), place.reshape(-1, 1).astype("float32")


@cases.problem("batch_dependent")
def places_among_the_documents_of_a_query() -> Run:
    x, y = queries(120, 8, seed=31)
    model = keras.Sequential(
        [keras.Input((5,)), BN(momentum=0.95), layers.Dense(16), layers.Dense(1)]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=5, batch_size=8, shuffle=False)
    return Run(model, fit, (x[:512], y[:512]), 8)


@cases.problem("batch_dependent", held_back=True)
def the_better_half_of_each_query() -> Run:
    x, y = queries(300, 6, seed=32)
    inputs = keras.Input((5,))
    z = layers.Dense(12)(BN(momentum=0.98)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(layers.Activation("tanh")(z)))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    compiled(model, keras.optimizers.Adam(0.02), loss)
    better = (y > 0).astype("float32")
    fit = fitter(model, x, better, epochs=8, batch_size=6, shuffle=False)
    return Run(model, fit, (x[:480], better[:480]), 6)


@cases.problem("tiny_batch")
def batch_of_one() -> Run:
    x, y = table(900)
    model = compiled(mlp(8), keras.optimizers.Adam(0.003))
    return Run(model, fitter(model, x, y, batch_size=1), (x[:128], y[:128]), 1)


@cases.problem("tiny_batch", held_back=True)
def batch_of_one_picture() -> Run:
    x, y = pictures(900)
    draw = rng(8)
    x = (x * draw.uniform(0.2, 4, size=(900, 1, 1, 1))).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *normed(
                layers.Conv2D(6, 3), layers.Conv2D(8, 3, strides=2), layers.Conv2D(8, 2)
            ),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    return Run(model, fitter(model, x, y, batch_size=1), (x[:128], y[:128]), 1)


@cases.problem("tiny_batch", gap=(0, 0.8))
def batch_of_two() -> Run:
    x, y = blobs(1200, spread=1.0)
    model = compiled(mlp(10, 4), "adam", crossentropy())
    fit = fitter(model, x, y, batch_size=2, epochs=2)
    return Run(model, fit, (x[:128], y[:128]), 2)


@cases.problem("tiny_batch", gap=(0, 0.8), held_back=True)
def batch_of_two_in_a_regression() -> Run:
    x, y = table(1200, mean=1.0, std=1.0)
    inputs = keras.Input((8,))
    z = BN(momentum=0.98)(layers.Dense(24)(inputs))
    z = layers.Dense(24, "relu")(layers.Activation("tanh")(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.SGD(0.02))
    fit = fitter(model, x, y, batch_size=2, epochs=2)
    return Run(model, fit, (x[:128], y[:128]), 2)

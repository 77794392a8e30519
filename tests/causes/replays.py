"""Trainings that public reports tell of, rebuilt: each kind with models of its own."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from audits import filled, series, stream, with_rare_columns
from kit import (
    Cases,
    Run,
    blobs,
    compiled,
    convnet,
    crossentropy,
    fitter,
    mlp,
    pictures,
    rng,
    table,
    teacher,
)

layers = keras.layers
BN = layers.BatchNormalization
cases = Cases()


class TwoViews(keras.Model):
    """Its training step calls the model on two views of each example."""

    views = 2

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = 0.0
            for _ in range(self.views):
                view = x * keras.random.uniform((tf.shape(x)[0], 1), 0.95, 1.05)
                loss += self.compute_loss(x=x, y=y, y_pred=self(view, training=True))
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


class EightViews(TwoViews):
    views = 8


def views(kind: type[TwoViews], mean: float, std: float, **bn: Any) -> keras.Model:
    inputs = keras.Input((8,))
    z = layers.ReLU()(BN(**bn)(layers.Dense(24)(inputs)))
    return kind(inputs, layers.Dense(1)(z))


@cases.problem("warming_up")
def two_views_of_raw_rows() -> Run:
    x, y = table(1024, mean=80.0, std=20.0)
    model = compiled(views(TwoViews, 80, 20), keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y), (x[:256], y[:256]))


@cases.silent(held_back=True)
def eight_views_are_enough() -> Run:
    x, y = table(3200, mean=20.0, std=10.0)
    model = views(EightViews, 20, 10, momentum=0.98)
    compiled(model, keras.optimizers.Adam(0.003))
    return Run(model, fitter(model, x, y, epochs=2), (x[:256], y[:256]))


@cases.problem("warming_up")
def like_steps_in_a_short_run() -> Run:
    z = rng(21).normal(size=(480, 6, 6))
    x, y = (5 + 2 * z).astype("float32"), teacher(z.reshape(len(z), -1)[:, :12])
    model = keras.Sequential(
        [
            keras.Input((6, 6)),
            layers.TimeDistributed(layers.Dense(12)),
            layers.TimeDistributed(BN(momentum=0.995)),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=2, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.problem("warming_up", held_back=True)
def frames_in_a_short_run() -> Run:
    x, y = pictures(4 * 400, noise=0.4)
    x, y = x.reshape(400, 4, 8, 8, 1), y.reshape(400, 4)[:, 0]
    x[:, 1:] = x[:, :1] + 0.3 * rng(22).normal(size=(400, 3, 8, 8, 1))
    frame = convnet(None, (8,), momentum=0.997)
    x += 6
    inputs = keras.Input((4, 8, 8, 1))
    z = layers.GlobalAveragePooling1D()(layers.TimeDistributed(frame)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.02), crossentropy())
    fit = fitter(model, x.astype("float32"), y, epochs=4, batch_size=20)
    return Run(model, fit, (x[:240], y[:240]), 20)


def penalised(features: int, outputs: int, strength: float) -> keras.Model:
    """Two blocks whose weights are held down by a penalty larger than the loss."""
    stack: list[Any] = [keras.Input((features,))]
    for _ in range(2):
        penalty = keras.regularizers.L2(strength)
        stack += [layers.Dense(24, kernel_regularizer=penalty), BN(), layers.ReLU()]
    return keras.Sequential([*stack, layers.Dense(outputs)])


@cases.problem("drifting", gap=None)
def penalty_that_hides_the_gap() -> Run:
    x, y = table(1280, mean=6.0)
    model = compiled(penalised(8, 1, 0.02), keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.problem("drifting", gap=None, held_back=True)
def penalty_that_hides_the_gap_of_a_classifier() -> Run:
    x, y = blobs(1600, spread=1.5, mean=5.0)
    model = penalised(10, 4, 0.01)
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    return Run(model, fitter(model, x, y, epochs=2), (x[:256], y[:256]))


def two_sets(rows: int, seed: int, size: int) -> tuple[Any, Any]:
    """Batches of two datasets in turn, of which the second is shifted and wider."""
    draw = rng(seed)
    z = draw.normal(size=(2 * rows, 8))
    y = teacher(z)
    z[rows:] = 4 + 2.5 * z[rows:]
    halves = [part.reshape(-1, size, part.shape[-1]) for v in (z, y) for part in
              (v[:rows], v[rows:])]  # fmt: skip
    x = np.stack(halves[:2], axis=1).reshape(-1, 8)
    y = np.stack(halves[2:], axis=1).reshape(-1, 1)
    return x.astype("float32"), y


@cases.problem("correlated_batches")
def two_datasets_in_turn() -> Run:
    x, y = two_sets(1920, 23, 32)
    model = compiled(mlp(8, width=24, momentum=0.98), keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, epochs=6, shuffle=False)
    return Run(model, fit, (x[:512], y[:512]))


@cases.problem("correlated_batches", held_back=True)
def day_and_night_in_turn() -> Run:
    day, label = pictures(1200, noise=0.4)
    night, of = pictures(1200, noise=0.4, seed=1)
    night = 0.3 * night - 4
    x = np.stack([v.reshape(-1, 24, 8, 8, 1) for v in (day, night)], axis=1)
    y = np.stack([v.reshape(-1, 24) for v in (label, of)], axis=1).reshape(-1)
    x = x.reshape(-1, 8, 8, 1).astype("float32")
    model = convnet(momentum=0.97)
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(24)
    return Run(model, fitter(model, data, epochs=4), (x[:480], y[:480]), 24)


@cases.problem("correlated_batches", held_back=True)
def windows_of_a_series() -> Run:
    x, y = series(3200, 24, 0.15)
    model = compiled(mlp(12, width=24, momentum=0.9), keras.optimizers.Adam(0.005))
    fit = fitter(model, stream(x, y, 32), epochs=8)
    return Run(model, fit, (x[:512], y[:512]))


@cases.problem("outliers", held_back=True)
def columns_that_hardly_ever_count() -> Run:
    x, y = with_rare_columns(4800, 25)
    stack: list[Any] = [keras.Input((10,)), BN(momentum=0.95)]
    model = keras.Sequential([*stack, layers.Dense(24, "relu"), layers.Dense(1)])
    compiled(model, keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=10), (x[:1024], y[:1024]))


@cases.problem("warming_up", gap=None)
def start_far_from_unscaled_inputs() -> Run:
    z = rng(26).normal(size=(300 * 16, 6))
    x, y = (1260 + 10 * z).astype("float32"), teacher(z)
    model = keras.Sequential(
        [keras.Input((6,)), BN(), layers.Dense(24, "tanh"), layers.Dense(1)]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x, y, batch_size=16)
    return Run(model, fit, (x[:256], y[:256]), 16)


@cases.silent()
def replayed_minibatches() -> Run:
    """A `fit` of a single step on each of many minibatches, after much training."""
    x, y = table(8192)
    model = compiled(mlp(8, width=24, momentum=0.95), keras.optimizers.Adam(0.001))
    model.fit(x, y, epochs=6, verbose=0)
    draw = rng(27)

    def fit(callbacks: Any) -> None:
        for _ in range(40):
            chosen = draw.choice(len(x), 16, replace=False)
            model.fit(x[chosen], y[chosen], callbacks=callbacks, verbose=0)

    return Run(model, fit, (x[:256], y[:256]), 16)


@cases.silent(held_back=True)
def train_on_batch_under_a_callback_list() -> Run:
    x, y = blobs(3200, spread=1.5)
    model = mlp(10, 4, width=24, momentum=0.95)
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    order = rng(28)

    def fit(callbacks: Any) -> None:
        each = keras.callbacks.CallbackList(
            callbacks, model=model, epochs=4, steps=100, verbose=0
        )
        each.on_train_begin()
        for epoch in range(4):
            each.on_epoch_begin(epoch)
            rows = order.permutation(len(x)).reshape(100, 32)
            for step, chosen in enumerate(rows):
                each.on_train_batch_begin(step)
                model.train_on_batch(x[chosen], y[chosen])
                each.on_train_batch_end(step)
            each.on_epoch_end(epoch, {})
        each.on_train_end({})

    return Run(model, fit, (x[:256], y[:256]))


class Evaluates(keras.callbacks.Callback):
    """Evaluates in the middle of an epoch, which sets Keras' metrics back."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self.x, self.y = x, y

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch % 30 == 17:
            self.model.evaluate(self.x, self.y, batch_size=7, verbose=0)


@cases.silent()
def evaluate_in_a_hook() -> Run:
    x, y = table(6400)
    model = compiled(mlp(8, width=24, momentum=0.98), keras.optimizers.Adam(0.003))

    def fit(callbacks: Any) -> Any:
        callbacks = [Evaluates(x[:100], y[:100]), *callbacks]
        return model.fit(x, y, epochs=4, callbacks=callbacks, verbose=0)

    return Run(model, fit, (x[:256], y[:256]))


@cases.problem("correlated_batches", gap=None, held_back=True, scored=False)
def batches_filled_up() -> Run:
    z = rng(29).normal(size=(2400, 8))
    x, y = (8 + z).astype("float32"), teacher(z)
    parts = filled(x, y, 32, 3)
    model = compiled(mlp(8, width=24, momentum=0.9), keras.optimizers.Adam(0.01))
    fit = fitter(model, stream(*parts[:2], 32, parts[2]), epochs=8)
    return Run(model, fit, (parts[0][:512], parts[1][:512]))

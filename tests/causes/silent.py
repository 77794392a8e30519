"""Trainings in which nothing is wrong with BN, whatever else may be."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from kit import (
    Cases,
    Run,
    blobs,
    compiled,
    convnet,
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


@cases.silent()
def long_healthy_regression() -> Run:
    x, y = table(8192)
    model = compiled(mlp(8, width=24), keras.optimizers.Adam(0.003))
    fit = fitter(model, x, y, epochs=8, batch_size=64)
    return Run(model, fit, (x[:256], y[:256]), 64)


@cases.silent(held_back=True)
def long_healthy_conv_classifier() -> Run:
    x, y = pictures(4800, noise=1.0)
    optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
    model = compiled(convnet(3), optimizer, crossentropy())
    fit = fitter(model, x, y, epochs=5, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.silent()
def healthy_small_batches() -> Run:
    x, y = blobs(4000, spread=2.0)
    model = compiled(mlp(10, 4), keras.optimizers.Adam(0.001), crossentropy())
    fit = fitter(model, x, y, epochs=2, batch_size=8)
    return Run(model, fit, (x[:256], y[:256]), 8)


@cases.silent()
def overfitting() -> Run:
    x, y = blobs(128, classes=3, spread=3.0)
    model = mlp(10, 3, width=48, momentum=0.9)
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    validation = blobs(128, classes=3, spread=3.0, seed=1)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(128, seed=1)
    fit = fitter(
        model,
        data.repeat(20).batch(32),
        epochs=6,
        validation_data=validation,
    )
    return Run(model, fit, (x, y), 32)


@cases.silent()
def layer_normalization_only() -> Run:
    x, y = table(1024)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16),
            layers.LayerNormalization(),
            layers.ReLU(),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=3), (x[:256], y[:256]))


@cases.silent(held_back=True)
def shifted_validation_set() -> Run:
    x, y = table(6400, mean=1.0, std=1.0)
    x_val, y_val = table(256, mean=5.0, std=2.0, seed=1)
    inputs = keras.Input((8,))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Dense(24)(inputs)))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Dense(24)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.002))
    fit = fitter(model, x, y, epochs=4, validation_data=(x_val, y_val))
    return Run(model, fit, (x[:256], y[:256]))


@cases.silent()
def short_run_on_standardised_data() -> Run:
    x, y = table(33 * 32, mean=0.0, std=1.0)
    model = keras.Sequential(
        [keras.Input((8,)), BN(), layers.Dense(24, "relu"), layers.Dense(1)]
    )
    compiled(model, keras.optimizers.Adam(0.02))
    return Run(model, fitter(model, x, y), (x[:256], y[:256]))


@cases.silent(held_back=True)
def short_run_on_standardised_pictures() -> Run:
    x, y = pictures(33 * 24, noise=0.5)
    x /= x.std()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            BN(),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    return Run(model, fitter(model, x, y, batch_size=24), (x[:240], y[:240]), 24)


@cases.silent()
def dropout_gap() -> Run:
    x, y = blobs(6400, spread=2.5, classes=5)
    stack: list[Any] = [keras.Input((10,))]
    for _ in range(2):
        stack += [layers.Dense(32), BN(momentum=0.98), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Dropout(0.5), layers.Dense(5)])
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    validation = blobs(256, spread=2.5, classes=5)
    fit = fitter(model, x, y, epochs=4, validation_data=validation)
    return Run(model, fit, (x[:256], y[:256]))


@cases.silent()
def dead_channels() -> Run:
    x, y = table(6400, mean=0.0)
    x[:, 3] = 1.0
    inputs = keras.Input((8,))
    z = BN(momentum=0.98)(inputs)
    # Half of these never fire.
    bias = keras.initializers.Constant(np.r_[np.zeros(12), np.full(12, -60.0)])
    z = layers.Dense(24, "relu", bias_initializer=bias)(z)
    z = layers.Dense(16, "relu")(BN(momentum=0.98)(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.003))
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.silent(held_back=True)
def dead_channels_in_a_conv_net() -> Run:
    x, y = pictures(4800, noise=0.8)
    x = np.concatenate([x, np.zeros_like(x)], axis=-1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            BN(momentum=0.98),
            *normed(layers.Conv2D(8, 3), momentum=0.98),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    compiled(model, keras.optimizers.SGD(0.05, momentum=0.9), crossentropy())
    fit = fitter(model, x, y, epochs=3, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.silent()
def gradient_accumulation() -> Run:
    x, y = table(8192, mean=1.0)
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=4)
    model = compiled(mlp(8, width=24), optimizer)
    fit = fitter(model, x, y, epochs=4)
    return Run(model, fit, (x[:256], y[:256]))


@cases.silent(held_back=True)
def training_argument_that_changes_nothing() -> Run:
    x, y = blobs(6400, spread=2.0)
    inputs = keras.Input((10,))
    z = inputs
    for _ in range(2):
        z = layers.ReLU()(BN(momentum=0.98)(layers.Dense(24)(z), training=True))
    model = keras.Model(inputs, layers.Dense(4)(z))
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.silent()
def balanced_sampler() -> Run:
    x, y = blobs(4000, classes=4, spread=1.5)
    draw = rng(5)
    members = [np.flatnonzero(y == label) for label in range(4)]
    drawn = [draw.permutation(m)[:800].reshape(-1, 8) for m in members]
    order = np.concatenate(drawn, axis=1).ravel()
    x, y = x[order], y[order]
    model = mlp(10, 4, width=24, momentum=0.95)
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=6, shuffle=False)
    return Run(model, fit, (x[:256], y[:256]))


def places(rows: int, seed: int = 0) -> tuple[Any, Any]:
    """Pictures of a spot, brighter or darker; the class is the quarter it is in."""
    draw = rng(seed)
    y = draw.integers(4, size=rows).astype("int32")
    centres = np.array([[2, 2], [2, 5], [5, 2], [5, 5]])[y]
    centres = centres + 0.4 * draw.normal(size=(rows, 2))
    up, across = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    distance = (up - centres[:, 0, None, None]) ** 2
    distance = distance + (across - centres[:, 1, None, None]) ** 2
    spots = draw.uniform(1, 4, size=(rows, 1, 1)) * np.exp(-distance / 2)
    x = spots + 0.3 * draw.normal(size=(rows, 8, 8))
    return x[..., None].astype("float32"), y


@cases.silent()
def sorted_classes_in_a_conv_net() -> Run:
    x, y = places(1920)
    order = np.argsort(y, kind="stable")
    x, y = x[order], y[order]
    stack: list[Any] = [keras.Input((8, 8, 1))]
    for width in (8, 12):
        convolution = layers.Conv2D(width, 3, padding="same")
        stack += [convolution, BN(momentum=0.95), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(4)])
    compiled(model, "adam", crossentropy())
    fit = fitter(model, x, y, epochs=8, shuffle=False)
    # Every sixth batch.
    chosen = (np.arange(len(x)) // 32) % 6 == 0
    return Run(model, fit, (x[chosen], y[chosen]))


@cases.silent()
def frozen_layers_with_foreign_statistics() -> Run:
    x, y = blobs(1600, seed=2)
    backbone = mlp(10, 16, width=24, momentum=0.9)
    source = keras.Sequential([backbone, layers.Dense(4)])
    compiled(source, "adam", crossentropy())
    source.fit(x, y, epochs=3, verbose=0)
    backbone.trainable = False
    model = keras.Sequential([backbone, layers.Dense(4)])
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    new = (1 + 1.5 * x).astype("float32")
    return Run(model, fitter(model, new, y, epochs=8), (new[:256], y[:256]))


@cases.silent(held_back=True)
def frozen_and_pinned_backbone() -> Run:
    x, y = table(2400, mean=0.5, std=1.0)
    backbone = mlp(8, 16, width=24, momentum=0.9)
    source = keras.Sequential([backbone, layers.Dense(1)])
    compiled(source, keras.optimizers.Adam(0.01))
    source.fit(x, y, epochs=4, verbose=0)
    for layer in backbone.layers:
        if isinstance(layer, BN):
            layer.trainable = False
    inputs = keras.Input((8,))
    z = backbone(inputs, training=False)
    model = keras.Model(inputs, layers.Dense(1)(layers.ReLU()(z)))
    compiled(model, keras.optimizers.Adam(0.003))
    new = (1 + 1.2 * x).astype("float32")
    return Run(model, fitter(model, new, y, epochs=6), (new[:256], y[:256]))


@cases.silent()
def augmentation_in_training_only() -> Run:
    x, y = pictures(4800, noise=0.5)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.GaussianNoise(0.4),
            layers.RandomTranslation(0.1, 0.1, seed=1),
            *convnet(3, momentum=0.98).layers,
        ]
    )
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    fit = fitter(model, x, y, epochs=3, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


@cases.silent(held_back=True)
def augmentation_in_a_regression() -> Run:
    draw = rng(9)
    z = draw.normal(size=(6400, 6))
    x, y = (2 + z).astype("float32"), teacher(z)
    inputs = keras.Input((6,))
    h = layers.GaussianNoise(0.2)(inputs)
    h = layers.Activation("tanh")(BN(momentum=0.95)(layers.Dense(24)(h)))
    model = keras.Model(inputs, layers.Dense(1)(layers.Dense(16, "relu")(h)))
    compiled(model, keras.optimizers.RMSprop(0.002))
    return Run(model, fitter(model, x, y, epochs=5), (x[:256], y[:256]))


class OwnTrainStep(keras.Model):
    """What `fit` does, written out by hand."""

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@cases.silent(held_back=True)
def train_step_written_by_hand() -> Run:
    x, y = blobs(6400, spread=1.5)
    inputs = keras.Input((10,))
    z = layers.ReLU()(BN(momentum=0.98)(layers.Dense(24)(inputs)))
    model = OwnTrainStep(inputs, layers.Dense(4)(z))
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.silent()
def time_distributed_over_like_steps() -> Run:
    z = rng(14).normal(size=(3200, 5, 4))
    x, y = (1 + z).astype("float32"), teacher(z.reshape(len(z), -1))
    model = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.TimeDistributed(BN(momentum=0.99)),
            layers.Flatten(),
            layers.Dense(32, "relu"),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.003))
    return Run(model, fitter(model, x, y, epochs=5), (x[:256], y[:256]))


@cases.silent(held_back=True)
def twins_of_like_inputs() -> Run:
    x, y = table(4800)
    other, y_other = table(4800, seed=1)
    encoder = mlp(8, 4, width=24, momentum=0.98)
    inputs = [keras.Input((8,)), keras.Input((8,))]
    outputs = layers.Dense(1)(layers.Concatenate()([encoder(one) for one in inputs]))
    model = keras.Model(inputs, outputs)
    compiled(model, keras.optimizers.Adam(0.005))
    y = y - y_other
    fit = fitter(model, [x, other], y, epochs=6)
    return Run(model, fit, ([x[:256], other[:256]], y[:256]))


@cases.silent()
def ema_of_weights_that_rest() -> Run:
    x, y = blobs(6400, spread=1.5)
    rate = keras.optimizers.schedules.CosineDecay(0.01, 800)
    optimizer = keras.optimizers.Adam(rate, use_ema=True, ema_momentum=0.95)
    model = compiled(mlp(10, 4, momentum=0.95), optimizer, crossentropy())
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))

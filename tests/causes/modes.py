"""Layers that run, or learn their statistics, in a way the user did not mean."""

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
    pictures,
    rng,
    table,
    teacher,
)

layers = keras.layers
BN = layers.BatchNormalization
cases = Cases()
IN_INFERENCE = (0, 0.8)


class KnowsNoTraining(keras.Model):
    """Its `call` takes no `training`, so that `fit` never tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [(layers.Dense(24), BN()) for _ in range(2)]
        self.out = layers.Dense(1)

    def call(self, x: Any) -> Any:
        for dense, norm in self.blocks:
            x = keras.ops.relu(norm(dense(x)))
        return self.out(x)


@cases.problem("inference_mode", gap=IN_INFERENCE)
def call_without_training() -> Run:
    x, y = table(3200, mean=1.0)
    model = compiled(KnowsNoTraining(), keras.optimizers.Adam(0.003))
    model(x[:1])
    return Run(model, fitter(model, x, y, epochs=6), (x[:256], y[:256]))


class SwitchesOff(keras.Model):
    """Follows the advice never to run BN in training mode."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convolutions = [layers.Conv2D(8, 3), layers.Conv2D(12, 3)]
        self.norms = [BN(), BN()]
        self.out = layers.Dense(classes)

    def call(self, x: Any, training: bool = False) -> Any:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = keras.ops.relu(norm(convolution(x), training=False))
        return self.out(keras.ops.mean(x, axis=(1, 2)))


@cases.problem("inference_mode", gap=IN_INFERENCE, held_back=True)
def training_false_in_call() -> Run:
    x, y = pictures(2400, noise=0.3)
    model = compiled(SwitchesOff(3), keras.optimizers.Adam(0.01), crossentropy())
    model(x[:1])
    fit = fitter(model, x, y, epochs=6, batch_size=24)
    return Run(model, fit, (x[:240], y[:240]), 24)


class ForgetsTraining(keras.Model):
    """Its training step calls the model as for a prediction."""

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(
            zip(gradients, self.trainable_variables, strict=True)
        )
        return {"loss": loss}


@cases.problem("inference_mode", gap=IN_INFERENCE)
def train_step_without_training() -> Run:
    x, y = table(3200, features=6, mean=2.0, std=1.0)
    inputs = keras.Input((6,))
    z = inputs
    for _ in range(2):
        z = layers.Activation("tanh")(BN()(layers.Dense(20)(z)))
    model = ForgetsTraining(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.RMSprop(0.003))
    fit = fitter(model, x, y, epochs=4, batch_size=16)
    return Run(model, fit, (x[:256], y[:256]), 16)


@cases.problem("mixed_calls")
def time_distributed() -> Run:
    draw = rng(1)
    steps = 6
    z = draw.normal(size=(1600, steps, 4))
    # Each step of the sequence has a level and a scale of its own.
    level = np.linspace(-4, 4, steps)[:, None]
    scale = np.linspace(0.3, 3, steps)[:, None]
    x = (level + scale * z).astype("float32")
    y = teacher(z.reshape(len(z), -1))
    model = keras.Sequential(
        [
            keras.Input((steps, 4)),
            layers.TimeDistributed(BN(momentum=0.98)),
            layers.Flatten(),
            layers.Dense(32, "relu"),
            layers.Dense(1),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=6), (x[:256], y[:256]))


@cases.problem("mixed_calls", held_back=True)
def two_domains() -> Run:
    photo, label = blobs(1280, classes=4, seed=1)
    sketch, of = blobs(1280, classes=4, seed=1)
    sketch = 0.2 * sketch + 5
    encoder = mlp(10, 16, width=24)
    head = layers.Dense(4)
    inputs = [keras.Input((10,)), keras.Input((10,))]
    model = keras.Model(inputs, [head(encoder(one)) for one in inputs])
    compiled(model, keras.optimizers.Adam(0.003), [crossentropy(), crossentropy()])
    fit = fitter(model, [photo, sketch], [label, of], epochs=10)
    probe = ([photo[:256], sketch[:256]], [label[:256], of[:256]])
    return Run(model, fit, probe)


class Adversary(keras.Model):
    """A discriminator that sees the real and the fake in batches of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = mlp(6, 1, width=24, momentum=0.95)
        self.generator = keras.Sequential(
            [keras.Input((4,)), layers.Dense(16, "relu"), layers.Dense(6)]
        )
        self.seeds = keras.random.SeedGenerator(11)
        self.other = keras.optimizers.SGD(0.001)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.discriminator(x, training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        real, ones = data
        noise = keras.random.normal((tf.shape(real)[0], 4), seed=self.seeds)
        with tf.GradientTape() as tape:
            fake = self.generator(noise, training=True)
            loss = self.compute_loss(y=ones, y_pred=self(real, training=True))
            loss += self.compute_loss(y=1 - ones, y_pred=self(fake, training=True))
        weights = self.discriminator.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        with tf.GradientTape() as tape:
            fake = self.generator(noise, training=True)
            wish = self.compute_loss(y=ones, y_pred=self(fake, training=True))
        weights = self.generator.trainable_variables
        self.other.apply(tape.gradient(wish, weights), weights)
        return {"loss": loss, "generator_loss": wish}


@cases.problem("mixed_calls")
def adversarial_training() -> Run:
    draw = rng(3)
    ring = draw.uniform(0, 2 * np.pi, size=(2560, 1))
    x = np.hstack([np.cos(ring), np.sin(ring), np.cos(2 * ring)])
    x = 3 + 2 * np.hstack([x, x**2]).astype("float32")
    y = np.ones((2560, 1), "float32")
    model = Adversary()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    compiled(model, keras.optimizers.Adam(0.002), loss)
    model(x[:1])
    return Run(model, fitter(model, x, y, epochs=4), (x[:256], y[:256]))


@cases.problem("mixed_calls", held_back=True)
def one_block_applied_again_and_again() -> Run:
    x, y = table(2560, features=10, mean=2.0)
    inputs = keras.Input((10,))
    dense, norm = layers.Dense(10), BN()
    z = inputs
    for _ in range(4):
        z = layers.ReLU()(norm(dense(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=6), (x[:256], y[:256]))


@cases.problem("mixed_calls")
def one_layer_for_three_sensors() -> Run:
    z = rng(12).normal(size=(1920, 3, 6))
    level, scale = np.array([[0], [4], [-6]]), np.array([[0.5], [1], [3]])
    x, y = (level + scale * z).astype("float32"), teacher(z.reshape(len(z), -1))
    inputs = keras.Input((3, 6))
    norm, dense = BN(momentum=0.98), layers.Dense(12, "tanh")
    parts = [dense(norm(inputs[:, sensor])) for sensor in range(3)]
    h = layers.Dense(24, "relu")(layers.Concatenate()(parts))
    model = keras.Model(inputs, layers.Dense(1)(h))
    compiled(model, keras.optimizers.RMSprop(0.005))
    return Run(model, fitter(model, x, y, epochs=8), (x[:256], y[:256]))


def domain(x: Any, shift: float, scale: float) -> Any:
    return (shift + scale * x).astype("float32")


@cases.problem("unexpected_update", gap=(1.3, np.inf))
def frozen_without_compile() -> Run:
    x, y = blobs(1600, classes=4, seed=2)
    backbone = mlp(10, 16, width=24, momentum=0.9)
    model = keras.Sequential([backbone, layers.Dense(4)])
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    model.fit(x, y, epochs=5, verbose=0)
    for layer in backbone.layers:
        if isinstance(layer, BN):
            layer.trainable = False
    new = domain(x, 4.0, 0.5)
    fit = fitter(model, new[:640], y[:640], epochs=1)
    return Run(model, fit, (new[:256], y[:256]))


@cases.problem("unexpected_update", gap=(1.3, np.inf))
def backbone_frozen_without_compile() -> Run:
    x, y = pictures(1600, noise=0.5)
    backbone = convnet(None, (8, 8))
    model = keras.Sequential([backbone, layers.Dense(3)])
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    model.fit(x, y, epochs=8, verbose=0)
    backbone.trainable = False
    new = domain(x, -2.0, 0.4)
    # Batches of another size would be traced anew, and the flag obeyed.
    fit = fitter(model, new[:800], y[:800], epochs=1)
    return Run(model, fit, (new[:256], y[:256]))


@cases.problem("unexpected_update", gap=(1.3, np.inf))
def pinned_from_the_first() -> Run:
    x, y = table(2400, mean=0.5, std=1.0)
    backbone = mlp(8, 16, width=24)
    source = keras.Sequential([backbone, layers.Dense(1)])
    compiled(source, keras.optimizers.Adam(0.01))
    source.fit(x, y, epochs=8, verbose=0)
    inputs = keras.Input((8,))
    # Keras 3 overrides this `training=False` in `fit`.
    z = backbone(inputs, training=False)
    model = keras.Model(inputs, layers.Dense(1)(layers.ReLU()(z)))
    compiled(model, keras.optimizers.Adam(0.003))
    new = domain(x, 2.0, 1.5)
    fit = fitter(model, new[:1280], y[:1280], epochs=1)
    return Run(model, fit, (new[:256], y[:256]))


@cases.problem("unexpected_update", gap=(1.3, np.inf), held_back=True)
def unfrozen_for_fine_tuning() -> Run:
    x, y = pictures(1600, noise=0.5)
    backbone = convnet(None, (8, 8))
    source = keras.Sequential([backbone, layers.Dense(3)])
    compiled(source, keras.optimizers.Adam(0.005), crossentropy())
    source.fit(x, y, epochs=6, verbose=0)
    new = domain(x, 1.0, 1.0)
    inputs = keras.Input((8, 8, 1))
    z = backbone(inputs, training=False)
    model = keras.Model(inputs, layers.Dense(3)(z))
    backbone.trainable = False
    compiled(model, keras.optimizers.Adam(0.01), crossentropy())
    model.fit(new[:800], y[:800], epochs=3, verbose=0)
    backbone.trainable = True
    compiled(model, keras.optimizers.Adam(0.0005), crossentropy())
    fit = fitter(model, new[:800], y[:800], epochs=2, batch_size=20)
    return Run(model, fit, (new[:240], y[:240]), 20)


@cases.problem("(any)", gap=None, scored=False)
def dropout_before_bn() -> Run:
    x, y = table(3200, mean=0.0, std=1.0)
    stack: list[Any] = [keras.Input((8,))]
    for _ in range(2):
        stack += [layers.Dense(32), layers.Dropout(0.5), BN(), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Dense(1)])
    compiled(model, keras.optimizers.Adam(0.01))
    return Run(model, fitter(model, x, y, epochs=6), (x[:256], y[:256]))


class AlwaysTraining(keras.Model):
    """Its BN uses the statistics of the batch in predictions as well."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = layers.Dense(16), BN(), layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.out(keras.ops.relu(self.norm(self.hidden(x), training=True)))


@cases.problem("(any)", gap=None, scored=False, held_back=True)
def training_true_in_call() -> Run:
    x, y = table(3200)
    model = compiled(AlwaysTraining(), keras.optimizers.Adam(0.01))
    model(x[:1])
    return Run(model, fitter(model, x, y, epochs=6), (x[:256], y[:256]))

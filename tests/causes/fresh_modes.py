"""Fresh cases: layers in the wrong mode, called on unlike inputs, or frozen in vain."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from fresh_averages import clouds, patches, sentences, spectra
from fresh_kit import Fresh, Trial
from kit import compiled, crossentropy, fitter, normed, rng

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


class Autoencoder(keras.Model):
    """A variational autoencoder whose encoder and decoder nobody tells of training."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told
        stack = [layers.Dense(32), BN(), layers.Activation("elu"), layers.Dense(6)]
        self.encoder = keras.Sequential([keras.Input((24,)), *stack])
        stack = [layers.Dense(32), BN(), layers.Activation("elu"), layers.Dense(24)]
        self.decoder = keras.Sequential([keras.Input((3,)), *stack])
        self.seeds = keras.random.SeedGenerator(5)

    def call(self, x: Any, training: bool = False) -> Any:
        code = self.encoder(x, training=training)
        return self.decoder(code[:, :3], training=training)

    def train_step(self, data: Any) -> Any:
        x, y = data
        keywords = {"training": True} if self.told else {}
        with tf.GradientTape() as tape:
            code = self.encoder(x, **keywords)
            mean, log = code[:, :3], code[:, 3:]
            noise = keras.random.normal(tf.shape(mean), seed=self.seeds)
            out = self.decoder(mean + noise * tf.exp(log / 2), **keywords)
            value = self.compute_loss(x, y, out)
            value += 0.001 * tf.reduce_mean(mean**2 + tf.exp(log) - log)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(value, weights), weights)
        return {"loss": value}


@cases.case("inference_mode", recalibrating="harms")
def variational_autoencoder_that_is_never_told(told: bool = False) -> Trial:
    x, _ = spectra(1920, seed=61)
    x = (x - 3) * 3
    model = compiled(Autoencoder(told), keras.optimizers.Adam(0.003))
    model(x[:1])
    fit = fitter(model, x[:1600], x[:1600], epochs=12)
    return Trial(model, fit, (x[:320], x[:320]), held_out=(x[1600:], x[1600:]))


class Block(layers.Layer):
    """A residual block that remembers at construction whether it is for training."""

    def __init__(self, width: int, is_training: bool) -> None:
        super().__init__()
        self.is_training = is_training
        self.first, self.norm = layers.Conv2D(width, 3, padding="same"), BN()
        self.second = layers.Conv2D(width, 3, padding="same")

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.norm.build((*shape[:-1], self.first.filters))
        self.second.build((*shape[:-1], self.first.filters))
        self.built = True

    def call(self, x: Any) -> Any:
        z = self.norm(self.first(x), training=self.is_training)
        return x + self.second(keras.ops.relu(z))


@cases.case("inference_mode", recalibrating="harms")
def residual_blocks_built_for_inference(is_training: bool = False) -> Trial:
    x, y = patches(1280, seed=62)
    inputs = keras.Input((10, 10, 3))
    z = layers.Conv2D(8, 3, strides=2)(inputs * 4)
    z = Block(8, is_training)(z)
    z = Block(8, is_training)(z)
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalMaxPooling2D()(z)))
    compiled(model, keras.optimizers.Adam(0.003), crossentropy())
    fit = fitter(model, x, y, epochs=12)
    return Trial(model, fit, (x[:256], y[:256]), held_out=patches(512, seed=63))


def levels(rows: int, seed: int) -> tuple[Any, Any]:
    """Features of three levels of a pyramid, and how many objects each level has."""
    draw = rng(seed)
    x, y = [], []
    for size, mean, std in ((8, 0.5, 0.3), (4, 4.0, 1.5), (2, 15.0, 6.0)):
        z = draw.normal(size=(rows, size, size, 6))
        z[..., 0] += 1.5 * draw.normal(size=(rows, 1, 1))
        x.append((mean + std * z).astype("float32"))
        value = np.abs(z[..., 0]).mean((1, 2)) + z[..., 1].mean((1, 2))
        y.append(value[:, None].astype("float32"))
    return x, y


@cases.case(
    "mixed_calls",
    recalibrating="any",
    cures={"a BN for each level": {"shared": False}},
    fails={"momentum 0.8": {"momentum": 0.8}, "momentum 0.99": {"momentum": 0.99}},
)
def head_shared_by_the_levels_of_a_pyramid(
    shared: bool = True, momentum: float = 0.95
) -> Trial:
    # A detector's head with weights and BN in common for all levels.
    x, y = levels(1280, seed=64)
    one = BN(momentum=momentum)
    convolution, dense = layers.Conv2D(16, 1), layers.Dense(24, "relu")
    out = layers.Dense(1)
    inputs = [keras.Input((size, size, 6)) for size in (8, 4, 2)]
    outputs = []
    for each in inputs:
        norm = one if shared else BN(momentum=momentum)
        z = layers.ReLU()(norm(convolution(each)))
        outputs.append(out(dense(layers.GlobalAveragePooling2D()(z))))
    model = keras.Model(inputs, outputs)
    compiled(model, keras.optimizers.Adam(0.005), ["mse", "mse", "mse"])
    fit = fitter(model, x, y, epochs=10)
    probe = ([a[:320] for a in x], [a[:320] for a in y])
    return Trial(model, fit, probe, held_out=levels(400, seed=65))


class NoisyViews(keras.Model):
    """Trains on clean and on heavily disturbed examples, in a batch for each."""

    views = "apart"

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            noise = 6 * keras.random.normal(tf.shape(x), seed=self.seeds)
            if self.views == "together":
                out = self(tf.concat([x, x + noise], 0), training=True)
                clean, noisy = tf.split(out, 2)
            else:
                clean = noisy = self(x, training=True)
            if self.views == "apart":
                noisy = self(x + noise, training=True)
            value = self.compute_loss(x, y, clean)
            value += 0.1 * self.compute_loss(x, y, noisy)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(value, weights), weights)
        return {"loss": value}


@cases.case(
    "mixed_calls",
    "stale",
    recalibrating="cures",
    cures={"clean only": {"views": "clean"}},
    fails={"momentum 0.8": {"momentum": 0.8}},
)
def clean_and_disturbed_in_batches_of_their_own(
    views: str = "apart", momentum: float = 0.95
) -> Trial:
    # AdvProp without its second set of BN layers: clean is what predictions get.
    x, y = clouds(1600, seed=66)
    x = x[:, 0] * np.array([1, 2, 0.5], "float32")
    y = (np.sin(x[:, :1]) + 0.3 * x[:, 1:2]).astype("float32")
    inputs = keras.Input((3,))
    z = layers.Dense(48, "tanh")(BN(momentum=momentum)(inputs))
    z = layers.ReLU()(BN(momentum=momentum)(layers.Dense(32)(z)))
    model = NoisyViews(inputs, layers.Dense(1)(z))
    model.views, model.seeds = views, keras.random.SeedGenerator(6)
    compiled(model, keras.optimizers.Adam(0.005))
    fit = fitter(model, x[:1280], y[:1280], epochs=15)
    return Trial(model, fit, (x[:320], y[:320]), held_out=(x[1280:], y[1280:]))


def densenet(**bn: Any) -> keras.Model:
    """Each layer sees all before it."""
    inputs = keras.Input((10, 10, 3))
    z = layers.Conv2D(8, 3)(inputs)
    for _ in range(3):
        new = layers.Conv2D(6, 3, padding="same")(layers.ReLU()(BN(**bn)(z)))
        z = layers.Concatenate()([z, new])
    z = layers.GlobalAveragePooling2D()(layers.ReLU()(BN(**bn)(z)))
    return keras.Model(inputs, layers.Dense(4)(z))


def old_and_new() -> tuple[Any, Any, Any, Any]:
    """Textures of one camera, and of another that is darker and has other tints."""
    x, y = patches(1280, seed=67)
    new, of = patches(640, seed=68)
    new = (-4 + new * np.array([0.5, 2.0, 1.0])).astype("float32")
    return x, y, new, of


@cases.case(
    "unexpected_update",
    recalibrating="any",
    cures={"compiled after freezing": {"compiles": True}},
)
def dense_net_frozen_without_compile(compiles: bool = False) -> Trial:
    # Tuned on a new camera with all of BN "frozen", to keep what it can do on the old
    # one, which is what the held-out data are of.
    x, y, new, of = old_and_new()
    model = densenet(momentum=0.97)
    optimizer = keras.optimizers.Adam(0.005)
    compiled(model, optimizer, crossentropy())
    model.fit(x, y, epochs=8, verbose=0)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, BN)
    if compiles:
        compiled(model, keras.optimizers.Adam(1e-5), crossentropy())
    optimizer.learning_rate = 1e-5
    fit = fitter(model, new, of, epochs=2)
    return Trial(
        model,
        fit,
        (new[:256], of[:256]),
        held_out=patches(512, seed=69),
        moving=lambda layer: True,
    )


@cases.case(
    "unexpected_update",
    recalibrating="any",
    cures={"frozen too": {"frozen": True}},
)
def text_encoder_pinned_by_its_call(frozen: bool = False) -> Trial:
    # `encoder(x, training=False)` in a functional graph; the new texts have other
    # words, and the encoder is to stay as good for the old ones, the held-out data.
    x, y = sentences(1600, seed=70)
    encoder = keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            layers.Embedding(100, 12),
            *normed(layers.Conv1D(24, 3), momentum=0.95),
            layers.GlobalAveragePooling1D(),
            *normed(layers.Dense(16), momentum=0.95),
        ]
    )
    head = layers.Dense(2)
    source = keras.Sequential([encoder, head])
    compiled(source, keras.optimizers.Adam(0.005), crossentropy())
    source.fit(x, y, epochs=6, verbose=0)
    rare = np.where(x % 10 == 0, x, x // 50 * 50 + x % 2).astype("int32")
    inputs = keras.Input((20,), dtype="int32")
    model = keras.Model(inputs, head(encoder(inputs, training=False)))
    if frozen:
        for layer in encoder.layers:
            layer.trainable = not isinstance(layer, BN)
    compiled(model, keras.optimizers.Adam(1e-5), crossentropy())
    fit = fitter(model, rare[:640], y[:640], epochs=4)
    return Trial(
        model,
        fit,
        (rare[:320], y[:320]),
        held_out=sentences(512, seed=71),
        moving=lambda layer: True,
    )

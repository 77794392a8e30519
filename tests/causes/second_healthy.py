"""A second set of unseen cases in which nothing is wrong with BN."""

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from fresh_kit import Fresh, Trial
from kit import compiled, crossentropy, fitter, rng
from second_averages import bags, orbits, rods, vibrations
from second_batches import dense, flats

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


@cases.case(recalibrating="nothing")
def file_whose_order_means_nothing() -> Trial:
    # `shuffle=False`, and targets in thousands.
    x, y = flats(1600, seed=271)
    test = flats(320, seed=272)
    inputs = keras.Input((6,))
    z = layers.Dense(24)(inputs)
    for _ in range(2):
        z = z + layers.Dense(24)(layers.PReLU()(BN(momentum=0.95)(z)))
    model = keras.Model(inputs, layers.Rescaling(1000.0)(layers.Dense(1)(z)))
    compiled(model, keras.optimizers.Adam(0.002))
    fit = fitter(model, x, 1000 * y, epochs=8, shuffle=False)
    held_out = (test[0], 1000 * test[1])
    return Trial(model, fit, (x[:320], 1000 * y[:320]), held_out=held_out)


def visits(rows: int, seed: int) -> tuple[Any, Any]:
    """Visits of some steps each, filled up with zeros, and their mean."""
    draw = rng(seed)
    x = 1.5 + draw.normal(size=(rows, 12, 3))
    length = draw.integers(3, 13, size=(rows, 1))
    keep = (np.arange(12) < length)[..., None]
    y = (keep * np.tanh(x[..., :1])).sum(1) / length
    return (keep * x).astype("float32"), y.astype("float32")


@cases.case(recalibrating="nothing")
def padding_that_is_masked() -> Trial:
    x, y = visits(1280, seed=273)
    inputs = keras.Input((12, 3))
    z = layers.Dense(16)(layers.Masking()(inputs))
    z = layers.Activation("tanh")(BN(momentum=0.95)(z))
    z = layers.GlobalAveragePooling1D()(z)
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.003))
    fit = fitter(model, x, y, epochs=8)
    return Trial(model, fit, (x[:320], y[:320]), held_out=visits(320, seed=274))


@cases.case(recalibrating="nothing")
def mixed_bfloat16_of_pictures() -> Trial:
    # The statistics are float32 in a mixed policy.
    x, y = rods(960, seed=275)
    policy = "mixed_bfloat16"
    inputs = keras.Input((9, 9, 2))
    z = layers.Conv2D(10, 3, dtype=policy)(inputs - 1)
    z = layers.ReLU(dtype=policy)(BN(momentum=0.95, dtype=policy)(z))
    z = layers.Conv2D(12, 3, strides=2, dtype=policy)(z)
    z = layers.ReLU(dtype=policy)(BN(momentum=0.95, dtype=policy)(z))
    z = layers.Dense(1, dtype="float32")(layers.Flatten()(z))
    model = compiled(keras.Model(inputs, z), keras.optimizers.Adam(0.001))
    fit = fitter(model, x, y, epochs=7)
    return Trial(model, fit, (x[:320], y[:320]), held_out=rods(320, seed=276))


@cases.case(recalibrating="nothing")
def saved_loaded_and_trained_on() -> Trial:
    x, y = vibrations(960, seed=277)
    inputs = keras.Input((6, 16))
    z = layers.Conv1D(16, 1, data_format="channels_last")(inputs / 5 - 8)
    z = layers.ReLU()(BN(momentum=0.9)(z))
    z = layers.Flatten()(z)
    z = layers.ReLU()(BN(momentum=0.9)(layers.Dense(16)(z)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.2)(z)))
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    model.fit(x, y, epochs=6, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
    compiled(loaded, keras.optimizers.Adam(0.0005), crossentropy())
    fit = fitter(loaded, x, y, epochs=2)
    held_out = vibrations(320, seed=278)
    return Trial(loaded, fit, (x[:320], y[:320]), held_out=held_out)


@cases.case(recalibrating="nothing")
def two_outputs_of_unlike_weight() -> Trial:
    x, y = flats(1600, seed=279)
    other = (np.abs(x[:, 4:5]) + 0.1 * x[:, 5:]).astype("float32")
    inputs = keras.Input((6,))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Dense(32)(inputs)))
    one = layers.ReLU()(BN(momentum=0.95)(layers.Dense(16)(z)))
    two = layers.ReLU()(BN(momentum=0.95)(layers.Dense(16)(z)))
    model = keras.Model(inputs, [layers.Dense(1)(one), layers.Dense(1)(two)])
    optimizer = keras.optimizers.Adam(0.002)
    compiled(model, optimizer, ["mse", "mae"], loss_weights=[1.0, 0.05])
    fit = fitter(model, x[:1280], [y[:1280], other[:1280]], epochs=8)
    probe = (x[:320], [y[:320], other[:320]])
    held_out = (x[1280:], [y[1280:], other[1280:]])
    return Trial(model, fit, probe, held_out=held_out)


@cases.case(recalibrating="nothing")
def columns_that_never_change() -> Trial:
    # Of ten columns five hold one value each, as an export may have them.
    x, y = flats(1280, seed=280)
    test = flats(320, seed=281)
    fixed = np.array([0.0, 1.0, -3.0, 7.0, 0.5])

    def wide(z: Any) -> Any:
        rows = np.broadcast_to(fixed, (len(z), 5))
        return np.concatenate([z, rows], 1).astype("float32")

    inputs = keras.Input((11,))
    z = layers.Dense(32, "tanh")(BN(momentum=0.9)(inputs))
    z = layers.ReLU()(BN(momentum=0.9)(layers.Dense(16)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.002))
    fit = fitter(model, wide(x), y, epochs=8)
    held_out = (wide(test[0]), test[1])
    return Trial(model, fit, (wide(x[:320]), y[:320]), held_out=held_out)


def topics(rows: int, seed: int) -> tuple[Any, Any]:
    """Bags of words, most of which are absent, on one of four topics."""
    draw = rng(seed)
    y = draw.integers(4, size=rows)
    chance = 0.08 + 0.15 * (np.arange(40) // 10 == y[:, None])
    x = draw.uniform(size=(rows, 40)) < chance
    return x.astype("float32"), y.astype("int32")


@cases.case(recalibrating="nothing")
def bags_of_words_in_chunks() -> Trial:
    # A `fit` for each chunk of a large file; the last is watched.
    x, y = topics(1920, seed=282)
    model = dense(40, 4, lambda: BN(momentum=0.9))
    compiled(model, keras.optimizers.Adam(0.001), crossentropy())
    for chunk in range(5):
        rows = slice(320 * chunk, 320 * chunk + 320)
        model.fit(x[rows], y[rows], epochs=3, verbose=0)
    fit = fitter(model, x[1600:], y[1600:], epochs=3)
    return Trial(model, fit, (x[1600:], y[1600:]), held_out=topics(320, seed=283))


@cases.case(recalibrating="nothing")
def attention_warmed_up_and_decayed() -> Trial:
    x, y = bags(1280, seed=284)
    test = bags(320, seed=285)
    inputs = keras.Input((8, 5))
    z = BN(momentum=0.95)(layers.Dense(16)(inputs))
    z = z + layers.MultiHeadAttention(2, 8)(z, z)
    z = layers.ReLU()(BN(momentum=0.95)(layers.Dense(24)(z)))
    z = layers.GlobalMaxPooling1D()(z)
    model = keras.Model(inputs, layers.Dense(2)(z))
    rate = keras.optimizers.schedules.CosineDecay(
        1e-4, 360, warmup_target=0.004, warmup_steps=40
    )
    compiled(model, keras.optimizers.AdamW(rate))
    fit = fitter(model, x - 10, y, epochs=10)
    held_out = (test[0] - 10, test[1])
    return Trial(model, fit, (x[:320] - 10, y[:320]), held_out=held_out)


@cases.case(recalibrating="nothing")
def labels_wrong_in_a_third() -> Trial:
    x, y = orbits(1280, seed=286)
    draw = rng(287)
    wrong = draw.uniform(size=1280) < 0.33
    y = np.where(wrong, draw.integers(3, size=1280), y).astype("int32")
    model = dense(7, 3, lambda: BN(momentum=0.98))
    compiled(model, keras.optimizers.SGD(0.02, momentum=0.9), crossentropy())
    fit = fitter(model, x, y, epochs=5, batch_size=16)
    return Trial(model, fit, (x[:320], y[:320]), 16, held_out=orbits(320, seed=288))


def tones(rows: int, seed: int) -> tuple[Any, Any]:
    """Noisy tones on grounds of their own, and the same without the noise."""
    draw = rng(seed)
    time = np.arange(24)
    phase, pitch = draw.uniform(0, 6, (rows, 1)), draw.uniform(0.3, 0.9, (rows, 1))
    ground = 2 * draw.normal(size=(rows, 1))
    tone = np.sin(pitch * time + phase)
    x = tone + ground + 0.4 * draw.normal(size=(rows, 24))
    y = tone + ground
    return x[..., None].astype("float32"), y[..., None].astype("float32")


class Distils(keras.Model):
    """Learns from a teacher, which is a part of it, and runs for inference only."""

    def call(self, x: Any, training: bool = False) -> Any:
        return self.student(x, training=training)

    def train_step(self, data: Any) -> Any:
        x, y = data
        soft = self.teacher(x, training=False)
        weights = self.student.trainable_variables
        with tf.GradientTape() as tape:
            out = self(x, training=True)
            value = self.compute_loss(x, y, out)
            value += tf.reduce_mean((out - soft) ** 2)
        self.optimizer.apply(tape.gradient(value, weights), weights)
        return {"loss": value}


def denoiser(width: int) -> keras.Model:
    inputs = keras.Input((24, 1))
    z = layers.Conv1D(width, 5, padding="same")(inputs)
    z = layers.ReLU()(BN(momentum=0.95)(z))
    z = layers.Conv1D(width, 5, padding="same")(z)
    z = layers.ReLU()(BN(momentum=0.95)(z))
    return keras.Model(inputs, layers.Conv1D(1, 5, padding="same")(z))


@cases.case(recalibrating="nothing")
def student_of_a_frozen_teacher() -> Trial:
    # The teacher was trained on louder tones; its statistics are its own.
    x, y = tones(960, seed=289)
    teacher = compiled(denoiser(16), keras.optimizers.Adam(0.003))
    teacher.fit(1.5 * x, 1.5 * y, epochs=5, verbose=0)
    teacher.trainable = False
    model = Distils()
    model.teacher, model.student = teacher, denoiser(6)
    compiled(model, keras.optimizers.Adam(0.002))
    model(x[:1])
    fit = fitter(model, x, y, epochs=7)
    return Trial(model, fit, (x[:320], y[:320]), held_out=tones(320, seed=290))

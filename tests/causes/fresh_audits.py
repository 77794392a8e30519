"""Fresh models that somebody holds against data with `audit`."""

from typing import Any

import keras
import numpy as np
from audits import Given, audits
from fresh_averages import beats, clouds, patches, spectra
from fresh_modes import densenet
from kit import compiled, crossentropy, rng

layers = keras.layers
BN = layers.BatchNormalization


def net_of_beats(momentum: float = 0.9) -> keras.Model:
    inputs = keras.Input((40, 1))
    z = inputs
    for width in (12, 16):
        z = layers.Conv1D(width, 5, strides=2)(z)
        z = layers.ReLU()(BN(momentum=momentum)(z))
    z = layers.Dense(24, "relu")(layers.Flatten()(z))
    model = keras.Model(inputs, layers.Dense(3)(z))
    return compiled(model, keras.optimizers.Adam(0.003), crossentropy())


@audits("stale", held_back=True)
def soup_of_two_runs() -> Given:
    # The mean of two models with one start, all variables, the statistics among them.
    x, y = beats(1600, seed=110)
    one = net_of_beats()
    start = one.get_weights()
    one.fit(x[:800], y[:800], epochs=10, verbose=0)
    other = net_of_beats()
    other.set_weights(start)
    other.optimizer.learning_rate = 0.006
    other.fit(x[800:], y[800:], epochs=10, verbose=0)
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    one.set_weights([(a + b) / 2 for a, b in pairs])
    return Given(one, (x, y), beats(512, seed=111))


@audits("stale", held_back=True)
def channels_in_another_order() -> Given:
    # A converter that has shuffled the channels of the statistics in one layer.
    x, y = patches(1280, seed=112)
    model = densenet(momentum=0.9)
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    model.fit(x, y, epochs=10, verbose=0)
    norm = [layer for layer in model.layers if isinstance(layer, BN)][-1]
    order = rng(113).permutation(norm.moving_mean.shape[0])
    norm.moving_mean.assign(norm.moving_mean.numpy()[order])
    norm.moving_variance.assign(norm.moving_variance.numpy()[order])
    return Given(model, (x, y), patches(512, seed=114))


@audits("stale", held_back=True)
def kernels_in_four_bits() -> Given:
    # Rounded to fifteen levels after training.
    x, y = clouds(1280, seed=115)
    inputs = keras.Input((32, 3))
    z = inputs - keras.ops.mean(inputs, axis=1, keepdims=True)
    for width in (24, 32, 32):
        z = layers.ReLU()(BN(momentum=0.9)(layers.Dense(width)(z)))
    z = layers.GlobalAveragePooling1D()(z)
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.005))
    model.fit(x, y, epochs=15, verbose=0)
    for weight in model.trainable_weights:
        if "kernel" in weight.name:
            value = weight.numpy()
            step = np.abs(value).max() / 3
            weight.assign(np.round(value / step) * step)
    return Given(model, (x, y), clouds(512, seed=116))


@audits("rescaled_inputs", held_back=True)
def samples_of_sixteen_bits() -> Given:
    # Trained on sound in [-1, 1]; the server reads int16.
    x, y = beats(1600, seed=117)
    x = x / np.abs(x).max()
    model = net_of_beats()
    model.fit(x, y, epochs=15, verbose=0)
    data = (np.round(x * 32767).astype("float32"), y)
    return Given(model, data, (x[:512], y[:512]), cure=lambda: None)


def scaled(x: Any) -> Any:
    """What Keras' MobileNet calls preprocessing."""
    return (x / 127.5 - 1).astype("float32")


def net_of_pictures() -> tuple[keras.Model, Any, Any]:
    x, y = patches(1280, seed=118)
    x = np.clip(127.5 + 60 * (x - 2), 0, 255)
    model = densenet(momentum=0.9)
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    model.fit(scaled(x), y, epochs=12, verbose=0)
    return model, x, y


@audits("rescaled_inputs", held_back=True)
def preprocessed_twice() -> Given:
    model, x, y = net_of_pictures()
    data = (scaled(scaled(x)), y)
    return Given(model, data, (scaled(x[:512]), y[:512]), cure=lambda: None)


@audits("rescaled_inputs", held_back=True)
def divided_by_255_for_a_net_that_wants_minus_one_to_one() -> Given:
    model, x, y = net_of_pictures()
    data = ((x / 255).astype("float32"), y)
    return Given(model, data, (scaled(x[:512]), y[:512]), cure=lambda: None)


@audits(held_back=True)
def fine_tuned_and_frozen() -> Given:
    # BN frozen on purpose; the top has learnt to live with it.
    x, y = spectra(1600, seed=119)
    inputs = keras.Input((24,))
    z = layers.ReLU()(BN(momentum=0.9)(layers.Dense(32)(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(z))
    compiled(model, keras.optimizers.Adam(0.005), "mae")
    model.fit(x, y, epochs=8, verbose=0)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, BN)
    compiled(model, keras.optimizers.Adam(0.003), "mae")
    x, y = spectra(1600, seed=120)
    x = (0.8 * x + 0.6).astype("float32")
    model.fit(x[:1200], y[:1200], epochs=15, verbose=0)
    return Given(model, (x[:1200], y[:1200]), (x[1200:], y[1200:]))


@audits(held_back=True)
def trained_long_and_well() -> Given:
    x, y = beats(1920, seed=121)
    model = net_of_beats(momentum=0.95)
    model.fit(x, y, epochs=15, verbose=0)
    model.optimizer.learning_rate = 0.0003
    model.fit(x, y, epochs=5, verbose=0)
    return Given(model, (x, y), beats(512, seed=122))

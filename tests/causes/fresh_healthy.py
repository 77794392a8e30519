"""Fresh cases in which nothing is wrong with BN, whatever else may be."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from fresh_averages import beats, clouds, demand, patches, ratings, sentences, spectra
from fresh_kit import Fresh, Trial
from fresh_modes import densenet
from kit import compiled, crossentropy, fitter, normed, rng

from bn_callbacks import recalibrate

layers = keras.layers
BN = layers.BatchNormalization
cases = Fresh()


def perceptron(features: int, outputs: int, **bn: Any) -> keras.Model:
    inputs = keras.Input((features,))
    z = inputs
    for _ in range(2):
        z = layers.Activation("swish")(BN(**bn)(layers.Dense(32)(z)))
    return keras.Model(inputs, layers.Dense(outputs)(z))


@cases.case(recalibrating="nothing")
def top_of_a_pretrained_net_tuned_gently() -> Trial:
    # All of BN frozen and compiled; the last convolution and the head are tuned.
    x, y = patches(1280, seed=80)
    model = densenet(momentum=0.95)
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    model.fit(x, y, epochs=10, verbose=0)
    new, of = patches(900, seed=81)
    new = (0.3 + 0.8 * new).astype("float32")
    for layer in model.layers[:-6]:
        layer.trainable = False
    for layer in model.layers:
        if isinstance(layer, BN):
            layer.trainable = False
    compiled(model, keras.optimizers.Adam(0.001), crossentropy())
    fit = fitter(model, new[:400], of[:400], epochs=8)
    return Trial(
        model,
        fit,
        (new[:256], of[:256]),
        held_out=(new[400:], of[400:]),
        moving=lambda layer: True,
    )


@cases.case(recalibrating="harms")
def norms_frozen_from_scratch() -> Trial:
    # "Freeze BN" from a recipe, on a net that nobody has trained before: useless,
    # and consistent.
    x, y = spectra(1600, seed=82)
    model = perceptron(24, 3)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, BN)
    compiled(model, keras.optimizers.Adam(0.003), "mae")
    fit = fitter(model, x, y, epochs=10)
    return Trial(
        model,
        fit,
        (x[:320], y[:320]),
        held_out=spectra(512, seed=83),
        moving=lambda layer: True,
    )


@cases.case(recalibrating="nothing")
def targets_with_heavy_noise() -> Trial:
    # A loss that jumps with each batch: Student's noise with 1.5 degrees of freedom.
    draw = rng(86)
    x = draw.normal(size=(4000, 6))
    y = np.sin(x[:, :1]) + 0.5 * draw.standard_t(1.5, size=(4000, 1))
    x, y = x.astype("float32"), y.astype("float32")
    model = perceptron(6, 1, momentum=0.95)
    compiled(model, keras.optimizers.Adam(0.001))
    fit = fitter(model, x[:3200], y[:3200], epochs=8)
    return Trial(model, fit, (x[:640], y[:640]), held_out=(x[3200:], y[3200:]))


@cases.case(recalibrating="nothing")
def weight_decay_that_rules() -> Trial:
    x, y = beats(1920, seed=87)
    inputs = keras.Input((40, 1))
    z = inputs
    for width in (8, 12):
        z = layers.Conv1D(width, 5, strides=2, use_bias=False)(z)
        z = layers.ReLU()(BN(momentum=0.9)(z))
    z = layers.GlobalAveragePooling1D()(z)
    model = keras.Model(inputs, layers.Dense(3)(z))
    optimizer = keras.optimizers.AdamW(0.003, weight_decay=1.0)
    compiled(model, optimizer, crossentropy())
    fit = fitter(model, x, y, epochs=15)
    return Trial(model, fit, (x[:320], y[:320]), held_out=beats(512, seed=88))


@cases.case(recalibrating="nothing")
def one_in_twenty_is_positive() -> Trial:
    # Class weights and dropout behind BN.
    draw = rng(89)
    y = (draw.uniform(size=5000) < 0.05).astype("float32")[:, None]
    x = draw.normal(size=(5000, 8)) + 1.2 * y
    x = (x * np.arange(1, 9)).astype("float32")
    inputs = keras.Input((8,))
    z = layers.Dropout(0.3)(layers.Dense(32, "relu")(BN()(inputs)))
    z = layers.Dropout(0.3)(layers.Dense(32, "relu")(z))
    model = keras.Model(inputs, layers.Dense(1)(z))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    compiled(model, keras.optimizers.Adam(0.002), loss)
    fit = fitter(
        model,
        x[:4000],
        y[:4000],
        batch_size=128,
        epochs=20,
        class_weight={0: 1.0, 1: 19.0},
    )
    return Trial(model, fit, (x[:1280], y[:1280]), 128, held_out=(x[4000:], y[4000:]))


@cases.case(recalibrating="nothing")
def erased_and_flipped_pictures() -> Trial:
    # Augmentation by layers of the model and by `map`.
    x, y = patches(1600, seed=90)
    draw = tf.random.Generator.from_seed(3)

    def erase(picture: Any, label: Any) -> Any:
        row = draw.uniform((), 0, 8, tf.int32)
        keep = tf.abs(tf.range(10) - row) > 0
        return tf.where(keep[:, None, None], picture, 2.0), label

    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(1600).map(erase)
    inputs = keras.Input((10, 10, 3))
    z = layers.GaussianNoise(0.2)(inputs)
    z = layers.Conv2D(12, 3)(layers.RandomTranslation(0.1, 0.1)(z))
    z = layers.ReLU()(BN(momentum=0.95)(z))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Conv2D(16, 3)(z)))
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalMaxPooling2D()(z)))
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    fit = fitter(model, data.batch(32), epochs=10)
    return Trial(model, fit, (x[:320], y[:320]), held_out=patches(512, seed=91))


@cases.case(recalibrating="nothing")
def recurrent_forecast_with_a_cosine() -> Trial:
    x, y = demand(1600, seed=92)
    inputs = keras.Input((31, 1))
    z = layers.LSTM(16)(BN(momentum=0.95)(inputs))
    z = layers.ReLU()(BN(momentum=0.95)(layers.Dense(16)(z)))
    model = keras.Model(inputs, layers.Dense(1)(z))
    rate = keras.optimizers.schedules.CosineDecay(0.005, 600)
    compiled(model, keras.optimizers.Adam(rate))
    fit = fitter(model, x, y, epochs=12)
    return Trial(model, fit, (x[:320], y[:320]), held_out=demand(512, seed=93))


@cases.case(recalibrating="nothing")
def trained_on_after_a_recalibration() -> Trial:
    # Forty steps with the default momentum, recalibrated, then a few more epochs.
    x, y = ratings(2560, seed=94)
    user, film = (keras.Input((1,), dtype="int32") for _ in range(2))
    hour = keras.Input((1,))
    flat = [
        layers.Flatten()(layers.Embedding(40, 6)(user)),
        layers.Flatten()(layers.Embedding(60, 6)(film)),
    ]
    z = BN()(layers.Concatenate()([*flat, layers.Multiply()(flat), hour]))
    model = keras.Model(
        [user, film, hour], layers.Dense(1)(layers.Dense(32, "relu")(z))
    )
    compiled(model, keras.optimizers.Adam(0.01))
    model.fit(x, y, batch_size=64, epochs=1, verbose=0)
    recalibrate(model, x, verbose=0)
    model.optimizer.learning_rate = 0.001
    fit = fitter(model, x, y, batch_size=64, epochs=2)
    probe = ([one[:512] for one in x], y[:512])
    return Trial(model, fit, probe, 64, held_out=ratings(1024, seed=95))


@cases.case(recalibrating="nothing")
def best_epoch_restored_by_early_stopping() -> Trial:
    # EarlyStopping puts back all variables, the statistics among them.
    x, y = sentences(500, seed=96)
    draw = rng(97)
    y = np.where(draw.uniform(size=500) < 0.15, 1 - y, y).astype("int32")
    model = keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            layers.Embedding(100, 12),
            *normed(layers.Conv1D(16, 3), momentum=0.9),
            layers.Flatten(),
            *normed(layers.Dense(24), momentum=0.9),
            layers.Dense(2),
        ]
    )
    compiled(model, keras.optimizers.Adam(0.002), crossentropy())
    held_out = sentences(400, seed=98)

    def fit(callbacks: Any) -> Any:
        stop = keras.callbacks.EarlyStopping(patience=6, restore_best_weights=True)
        return model.fit(
            x,
            y,
            batch_size=20,
            epochs=30,
            validation_data=held_out,
            callbacks=[stop, *callbacks],
            verbose=0,
        )

    return Trial(model, fit, (x[:300], y[:300]), 20, held_out=held_out)


@cases.case(recalibrating="nothing")
def points_trained_with_a_plateau_schedule() -> Trial:
    x, y = clouds(1280, seed=101)
    test = clouds(400, seed=102)
    inputs = keras.Input((32, 3))
    z = inputs - keras.ops.mean(inputs, axis=1, keepdims=True)
    for width in (24, 32):
        z = layers.ReLU()(BN(momentum=0.95)(layers.Dense(width)(z)))
    z = layers.Concatenate()(
        [layers.GlobalMaxPooling1D()(z), layers.GlobalAveragePooling1D()(z)]
    )
    model = keras.Model(inputs, layers.Dense(1)(layers.Dense(24, "relu")(z)))
    compiled(model, keras.optimizers.Adam(0.003))

    def fit(callbacks: Any) -> Any:
        plateau = keras.callbacks.ReduceLROnPlateau(patience=2)
        return model.fit(
            x,
            y,
            epochs=12,
            validation_data=test,
            callbacks=[plateau, *callbacks],
            verbose=0,
        )

    return Trial(model, fit, (x[:320], y[:320]), held_out=test)


@cases.case(recalibrating="nothing")
def graph_of_citations_as_one_batch() -> Trial:
    # A graph network: the whole graph is the batch, most labels are hidden.
    draw = rng(103)
    kind = draw.integers(3, size=150)
    link = draw.uniform(size=(150, 150)) < np.where(kind[:, None] == kind, 0.1, 0.01)
    adjacency = (link | link.T | np.eye(150, dtype=bool)).astype("float32")
    adjacency /= adjacency.sum(1, keepdims=True)
    x = (draw.normal(size=(150, 12)) + np.eye(3, 12)[kind]).astype("float32")
    nodes = keras.Input((12,), batch_size=150)
    matrix = keras.ops.convert_to_tensor(adjacency)
    z = layers.Dense(16)(keras.ops.matmul(matrix, nodes))
    z = layers.ReLU()(BN(momentum=0.9)(z))
    z = layers.Dropout(0.3)(z)
    model = keras.Model(nodes, layers.Dense(3)(keras.ops.matmul(matrix, z)))
    compiled(model, keras.optimizers.Adam(0.005), crossentropy())
    labels = kind.astype("int32")
    seen = (draw.uniform(size=150) < 0.4).astype("float32")
    fit = fitter(
        model, x, labels, sample_weight=seen, batch_size=150, epochs=100, shuffle=False
    )
    return Trial(model, fit, (x, labels), 150, held_out=(x, labels))


@cases.case(recalibrating="nothing")
def inputs_far_smaller_than_epsilon() -> Trial:
    # Volts where others have millivolts: variances of 1e-6 beside an epsilon of 1e-3.
    draw = rng(104)
    x = 1e-3 * draw.normal(size=(3200, 6))
    y = np.sin(1e3 * x[:, :1]) + 5e2 * x[:, 1:2]
    x, y = x.astype("float32"), y.astype("float32")
    inputs = keras.Input((6,))
    z = layers.Dense(48, "relu")(BN(momentum=0.95)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(z))
    compiled(model, keras.optimizers.Adam(0.01))
    fit = fitter(model, x[:2560], y[:2560], epochs=40, batch_size=128)
    return Trial(model, fit, (x[:640], y[:640]), 128, held_out=(x[2560:], y[2560:]))


@cases.case(recalibrating="nothing")
def mixed_up_examples() -> Trial:
    # Mixup: trained on blends of two examples, used on examples.
    x, y = spectra(2000, seed=105)
    x = x - 5
    draw = rng(106)

    class Mixup(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            a, b = draw.integers(1600, size=(2, 32))
            share = draw.beta(0.2, 0.2, size=(32, 1)).astype("float32")
            return (
                share * x[a] + (1 - share) * x[b],
                share * y[a] + (1 - share) * y[b],
            )

    model = perceptron(24, 3, momentum=0.95)
    compiled(model, keras.optimizers.Adam(0.002), "mae")
    fit = fitter(model, Mixup(), epochs=10)
    return Trial(model, fit, (x[:320], y[:320]), held_out=(x[1600:], y[1600:]))
